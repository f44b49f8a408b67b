"""Trains the small LLaVA that `hiprune quality` asks, and writes it as a checkpoint of transformers.

    python -m bench.quality.train --out DIR

In two processes of one thread each. A seed gives the same scenes everywhere; weights differ by rounding between
processors.

The tower learns first, on small pictures: which digit and which color is at a token, where it is, and what is in the
scene. These heads are thrown away. Then everything learns to answer, in half of the steps from few tokens: any, or
those on digits first. A language model that has always seen all tokens breaks on few, and takes places from their
number in the prompt. At last the projector and the language model go on by themselves.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from bench.quality.checkpoint import VOCABULARY, save
from hiprune_kernels.quality.scenes import COLORS, NUMBERS, PATCH, SIDE, Scene, scene

GRID = SIDE // PATCH
PROCESSES = 2


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        trained: "tower", "all" or "language".
        side: of the pictures in pixels; smaller ones stand at a random place of the position embedding.
        digits: least and largest number of them in a picture.
        batch: pictures a step, of all processes.
        rate: learning rate, reached after 60 steps.
        whole: share of the steps in which the language model sees all tokens.
        decays: whether the rate falls linearly to 0 in the last 70% of the steps.
    """

    trained: str
    side: int
    digits: tuple[int, int]
    batch: int
    steps: int
    rate: float
    whole: float = 1.0
    decays: bool = False


STAGES = {
    "A": Stage("tower", 32, (1, 1), 128, 400, 3e-3),
    "B": Stage("tower", 48, (1, 1), 80, 200, 3e-3),
    "C": Stage("all", 64, (1, 2), 40, 400, 3e-3),
    "D": Stage("all", 96, (2, 4), 24, 1200, 2e-3, 1 / 2, decays=True),
    "L": Stage("language", 96, (2, 4), 32, 1000, 2e-3, 1 / 3, decays=True),
}


# -------------------------------------------------------------------------------------------------------------- model


def build() -> LlavaForConditionalGeneration:
    """The model, 1.04M parameters, as it begins."""
    vision = CLIPVisionConfig(
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=7,
        num_attention_heads=3,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=3,
        num_key_value_heads=3,
        max_position_embeddings=512,
        bos_token_id=VOCABULARY["<s>"],
        eos_token_id=VOCABULARY["</s>"],
        pad_token_id=VOCABULARY["<pad>"],
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=VOCABULARY["<image>"],
        image_seq_length=GRID**2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                nn.init.xavier_normal_(weight, gain=0.7)
            elif name.endswith("bias"):
                weight.zero_()
        embeddings = model.model.vision_tower.embeddings
        embeddings.patch_embedding.weight.copy_(_cosine_filters())
        embeddings.position_embedding.weight.copy_(_sines())
        embeddings.class_embedding.normal_(std=0.5)
        model.model.language_model.embed_tokens.weight.normal_(std=0.5)
    return model


def _cosine_filters() -> Tensor:
    """[96, 3, 8, 8]: low frequencies of brightness, and of two differences of colors."""
    x = torch.arange(PATCH, dtype=torch.float64)
    waves = torch.stack([torch.cos(math.pi * (2 * x + 1) * k / (2 * PATCH)) for k in range(PATCH)])
    waves /= waves.norm(dim=1, keepdim=True)
    orders = sorted(((i, j) for i in range(PATCH) for j in range(PATCH)), key=lambda order: (sum(order), order))
    planes = torch.tensor([[1.0, 1, 1], [1, -1, 0], [-0.5, -0.5, 1]], dtype=torch.float64)
    planes /= planes.norm(dim=1, keepdim=True)
    filters = [
        plane[:, None, None] * torch.outer(waves[i], waves[j])
        for plane, count in zip(planes, (48, 24, 24))
        for i, j in orders[:count]
    ]
    return torch.stack(filters).float()


def _sines() -> Tensor:
    """[1 + 144, 96]: sines and cosines of row and column; 0 for CLS."""
    places = torch.arange(GRID, dtype=torch.float64)
    rates = torch.exp(torch.linspace(math.log(0.15), math.log(2.0), 24, dtype=torch.float64))
    waves = torch.cat([(places[:, None] * rates).sin(), (places[:, None] * rates).cos()], dim=1)  # [12, 48]
    rows, columns = waves[:, None].expand(-1, GRID, -1), waves[None].expand(GRID, -1, -1)
    grid = torch.cat([rows, columns], dim=-1).reshape(GRID**2, -1)
    return torch.cat([torch.zeros(1, 96), 0.5 * grid.float()])


def features_of(tower: Any, pixels: Tensor, place: tuple[int, int]) -> Tensor:
    """[B, 1 + T, 96]: the hidden states that the projector reads, of pictures at a place of the position embedding."""
    patches = tower.embeddings.patch_embedding(pixels)
    rows, columns = patches.shape[-2:]
    embedding = tower.embeddings.position_embedding.weight
    window = embedding[1:].view(GRID, GRID, -1)[place[0] : place[0] + rows, place[1] : place[1] + columns]
    states = patches.flatten(2).transpose(1, 2) + window.reshape(1, rows * columns, -1)
    first = (tower.embeddings.class_embedding + embedding[0]).expand(len(states), 1, -1)
    states = tower.pre_layrnorm(torch.cat([first, states], dim=1))
    for layer in tower.encoder.layers[:-1]:
        states = layer(states, attention_mask=None)
    return states


class Heads(nn.Module):
    """What the tower is asked while it learns: digit, color and place of a token, and of CLS what is in the scene."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Linear(96, len(NUMBERS) + 1 + len(COLORS) + 1)
        self.place = nn.Linear(96, 2 * GRID)
        self.scene = nn.Linear(96, len(NUMBERS) + len(COLORS))

    def forward(self, states: Tensor, digits: Tensor, colors: Tensor, place: tuple[int, int]) -> tuple[Tensor, float]:
        """The loss, and the share of right digits among tokens on digits. Digits and colors [B, T], 0 is none."""
        states = F.layer_norm(states, states.shape[-1:])
        tokens, there = self.token(states[:, 1:]), self.scene(states[:, 0])
        side = math.isqrt(digits.shape[1])
        rows, columns = (torch.arange(side) + first for first in place)
        where = torch.stack([rows.repeat_interleave(side), columns.repeat(side)]).expand(len(states), -1, -1)
        found = self.place(states[:, 1:]).unflatten(-1, (2, GRID)).permute(0, 3, 2, 1)  # [B, 12, 2, T]
        loss = 0.3 * F.cross_entropy(found, where)
        for logits, truth in zip(tokens.split([len(NUMBERS) + 1, len(COLORS) + 1], dim=-1), (digits, colors)):
            weight = torch.ones(logits.shape[-1])
            weight[0] = 0.15
            loss = loss + F.cross_entropy(logits.flatten(0, 1), truth.flatten(), weight=weight)
        present = [
            F.one_hot(truth, count + 1).amax(dim=1)[:, 1:]
            for truth, count in ((digits, len(NUMBERS)), (colors, len(COLORS)))
        ]
        loss = loss + F.binary_cross_entropy_with_logits(there, torch.cat(present, dim=1).float())
        on = digits > 0
        return loss, float((tokens[..., : len(NUMBERS) + 1].argmax(dim=-1) == digits)[on].float().mean())


# --------------------------------------------------------------------------------------------------------------- data


@dataclass
class Batch:
    pixels: Tensor
    digits: Tensor  # [B, T]
    colors: Tensor
    words: Tensor  # [B, L]: all questions of a scene with their answers
    starts: list[int]  # where in L each question begins, and L


def batch_of(stage: Stage, seeds: range) -> Batch:
    scenes = [scene(seed, side=stage.side, digits=stage.digits, training=True) for seed in seeds]
    pixels = torch.from_numpy(np.stack([each.pixels for each in scenes])).permute(0, 3, 1, 2).float()
    values = list(COLORS)
    truths = np.array(
        [[_truth(each, lambda t: t.digit + 1), _truth(each, lambda t: values.index(t.color) + 1)] for each in scenes]
    )
    rows, starts = [], [0]
    for seed, each in zip(seeds, scenes):
        row: list[int] = []
        starts = [0]
        for question, answer in each.questions(np.random.default_rng(seed)):
            row += [VOCABULARY[word] for word in f"{question} ? {answer} </s>".split()]
            starts.append(len(row))
        rows.append(row)
    digits, colors = torch.from_numpy(truths).long().unbind(dim=1)
    return Batch(pixels / 127.5 - 1, digits, colors, torch.tensor(rows), starts)


def _truth(each: Scene, of: Any) -> list[int]:
    table = np.array([of(thing) for thing in each.things] + [0])
    return table[each.owners.ravel()].tolist()


def answer_loss(model: Any, features: Tensor, batch: Batch) -> tuple[Tensor, float]:
    """The loss of all questions behind one image, each blind to the others, and the share of right answers."""
    language, projector = model.model.language_model, model.model.multi_modal_projector
    image, words = projector(features), language.embed_tokens(batch.words)
    first = language.embed_tokens(torch.full((len(image), 1), VOCABULARY["<s>"]))
    prefix, count = 1 + image.shape[1], batch.words.shape[1]
    lengths = [end - start for start, end in zip(batch.starts, batch.starts[1:])]
    block = torch.cat([torch.full((prefix,), -1), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))])
    rows, columns = torch.meshgrid(torch.arange(prefix + count), torch.arange(prefix + count), indexing="ij")
    seen = (columns <= rows) & ((block[columns] == -1) | (block[columns] == block[rows]))
    mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
    positions = torch.cat([torch.arange(prefix)] + [prefix + torch.arange(length) for length in lengths])
    states = language(
        inputs_embeds=torch.cat([first, image, words], dim=1),
        attention_mask=mask.expand(len(image), -1, -1, -1),
        position_ids=positions[None].expand(len(image), -1),
        use_cache=False,
    ).last_hidden_state
    ends = torch.tensor(batch.starts[1:])
    logits = model.lm_head(states[:, prefix + ends - 3])  # at the question mark
    answers = batch.words[:, ends - 2]
    loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
    closing = model.lm_head(states[:, prefix + ends - 2])
    loss = loss + 0.1 * F.cross_entropy(closing.flatten(0, 1), batch.words[:, ends - 1].flatten())
    return loss, float((logits.argmax(dim=-1) == answers).float().mean())


def some_tokens(features: Tensor, digits: Tensor, draw: torch.Generator) -> Tensor:
    """Of every picture the same number of tokens, from any to those on digits first."""
    low, high = math.log(5), math.log(features.shape[1])
    count = round(math.exp(low + (high - low) * float(torch.rand((), generator=draw))))
    favor = float(torch.rand((), generator=draw))
    ranks = torch.rand(digits.shape, generator=draw) + favor * (digits > 0)
    kept = ranks.topk(count, dim=1).indices.sort(dim=1).values
    return features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))


# ----------------------------------------------------------------------------------------------------------- training


def optimizers_of(parameters: dict[str, nn.Parameter], rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside, AdamW for embeddings, heads, filters and vectors."""

    def inside(name: str, weight: nn.Parameter) -> bool:
        return weight.ndim == 2 and not any(part in name for part in ("embed", "lm_head", "token.", "place.", "scene."))

    matrices = [weight for name, weight in parameters.items() if inside(name, weight)]
    others = [weight for name, weight in parameters.items() if not inside(name, weight)]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, weight_decay=0.01, betas=(0.9, 0.98)),
    ]


def rate_at(stage: Stage, step: int) -> float:
    left = (stage.steps - step) / (0.7 * stage.steps) if stage.decays else 1
    return stage.rate * min(1, (step + 1) / 60, left)


def trained_in(stage: Stage, model: Any, heads: Heads) -> dict[str, nn.Parameter]:
    unread = ("encoder.layers.6.", "post_layernorm")  # the feature layer is the last but one
    tower = {name: p for name, p in model.model.vision_tower.named_parameters() if not name.startswith(unread)}
    tower |= dict(heads.named_parameters())
    language = {name: p for name, p in model.named_parameters() if "vision_tower" not in name}
    return {"tower": tower, "all": tower | language, "language": language}[stage.trained]


def run_stage(name: str, stage: Stage, model: Any, heads: Heads, rank: int, seed: int) -> Iterator[str]:
    parameters = trained_in(stage, model, heads)
    model.requires_grad_(False)
    heads.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizers = optimizers_of(parameters, stage.rate)
    share = stage.batch // PROCESSES
    before = seed * 10**8 + list(STAGES).index(name) * 10**7
    smooth, started = np.zeros(3), time.perf_counter()
    for step in range(stage.steps):
        common = torch.Generator().manual_seed(before + step)  # the same in both processes
        first = before + (step * PROCESSES + rank) * share
        batch = batch_of(stage, range(first, first + share))
        room = GRID - stage.side // PATCH + 1
        place = tuple(torch.randint(room, (2,), generator=common).tolist())
        loss, seen, right = torch.zeros(()), 0.0, 0.0
        with torch.set_grad_enabled(stage.trained != "language"):
            states = features_of(model.model.vision_tower, batch.pixels, place)
            if stage.trained != "language":
                loss, seen = heads(states, batch.digits, batch.colors, place)
        if stage.trained != "tower":
            features = states[:, 1:]
            if float(torch.rand((), generator=common)) > stage.whole:
                features = some_tokens(features, batch.digits, common)
            found, right = answer_loss(model, features, batch)
            loss = loss + found
        loss.backward()
        step_together(list(parameters.values()), optimizers, rate_at(stage, step))
        smooth += (np.array([float(loss.detach()), seen, right]) - smooth) / min(step + 1, 40)
        if step % 20 == 19 or step == stage.steps - 1:
            seconds = time.perf_counter() - started
            yield (
                f"stage {name}: step {step + 1} of {stage.steps}, loss {smooth[0]:.3f}, digits of tokens "
                f"{smooth[1]:.3f}, answers {smooth[2]:.3f}, {seconds:.0f} s"
            )


def step_together(parameters: list[nn.Parameter], optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """One step of all processes, with the mean of their gradients, no longer than 1."""
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
    dist.all_reduce(flat)
    flat /= PROCESSES
    flat *= min(1.0, 1 / (float(flat.norm()) + 1e-6))
    row = 0
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.copy_(flat[row : row + parameter.numel()].view_as(parameter))
            row += parameter.numel()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()


def work(rank: int, meeting: str, out: Path, seed: int, steps: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=PROCESSES)
    torch.manual_seed(seed)  # the same beginning in both
    model, heads = build(), Heads()
    for name, stage in STAGES.items():
        shorter = Stage(**(vars(stage) | {"steps": max(1, round(stage.steps * steps))}))
        for line in run_stage(name, shorter, model, heads, rank, seed):
            if rank == 0:
                print(line, flush=True)
        if rank == 0:
            save(model, out)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=float, default=1.0, metavar="SHARE", help="of the steps of every stage")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (f"{folder}/meeting", args.out, args.seed, args.steps), nprocs=PROCESSES)


if __name__ == "__main__":
    main()
