"""Section "llava": prefill, decode and memory of LLaVA-1.5-7B and LLaVA-NeXT-7B in bfloat16 with random weights,
unpruned and pruned.

As the paper's efficiency table. Prefill: one forward over prompt and image, with the vision tower. Decode: what
`generate` takes per further token. Both include the time that Python needs to launch the work, as users see it; the
GPU's share of the prefill stands beside it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

import hiprune_kernels as hk

from .attention import relative_error
from .context import Case, Context, Row
from .models import llava_model, random_model
from .timing import compare, device_seconds, free_memory, peak_extra_bytes

TEXT_TOKENS = 48  # of a prompt beside the image's, about a question's
_DEFAULT = {"vision_feature_select_strategy": "default"}  # without CLS tokens


class _Llava:
    """The model, and prompts of one image each."""

    def __init__(self, context: Context, tiled: bool) -> None:
        kind, self.config = llava_model(tiled, context.quick)
        self.model = random_model(kind, self.config, context.device)
        self.device = context.device
        self.side = self.config.vision_config.image_size
        count = (self.side // self.config.vision_config.patch_size) ** 2
        self.places = torch.arange(count)  # the visual token of each placeholder in the prompt, -1 for a newline
        self.sizes = {}
        if tiled:  # square images twice as large: a view of the whole and 2 x 2 tiles, without padding
            self.sizes = {"image_sizes": torch.tensor([[2 * self.side, 2 * self.side]])}
            tokens, newline = torch.arange(5 * count).view(1, 5, count, 1), torch.tensor([-1])
            packed, _ = self.model.model.pack_image_features(tokens, image_newline=newline, **self.sizes, **_DEFAULT)
            self.places = packed[0].flatten()

    def images(self, batch: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(2)
        shape = (batch, 5, 3) if self.sizes else (batch, 3)
        pixels = torch.randn(*shape, self.side, self.side, generator=generator).to(self.device, torch.bfloat16)
        return {"pixel_values": pixels, **{name: sizes.repeat(batch, 1) for name, sizes in self.sizes.items()}}

    def inputs(self, batch: int) -> dict[str, Tensor]:
        text = torch.randint(3, 32000, (batch, TEXT_TOKENS), generator=torch.Generator().manual_seed(3))
        image = torch.full((batch, len(self.places)), self.config.image_token_id)
        ids = torch.cat([text[:, :8], image, text[:, 8:]], dim=1).to(self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.images(batch)}

    def prompt_tokens(self, budget: int | None) -> int:
        """Length of the prompt behind the vision tower; newlines stay."""
        return TEXT_TOKENS + (len(self.places) if budget is None else budget + int((self.places < 0).sum()))

    def pruning(self, budget: int | None) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if budget is None else hk.hiprune(self.model, budget=budget)

    def prefill(self, inputs: dict[str, Tensor]) -> object:
        return self.model(**inputs, use_cache=True, logits_to_keep=1)

    def generate(self, inputs: dict[str, Tensor], new_tokens: int) -> Tensor:
        return self.model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    def pruned_error(self, inputs: dict[str, Tensor], budget: int) -> float:
        """Of the pruned prefill's logits, against the stock language model fed with the kept rows of stock's features.

        Raises:
            RuntimeError: if the cache has another length than the pruned prompt.
        """
        from hiprune_kernels.patch.language import CACHE  # imports transformers, which only the models need

        with self.pruning(budget):
            found = self.prefill(inputs)
            kept = [selection.indices.cpu() for selection in hk.last_selection(self.model)]
        length, expected_length = found[CACHE].get_seq_length(), self.prompt_tokens(budget)
        if length != expected_length:
            raise RuntimeError(f"pruned prefill: expected {expected_length} tokens in the cache, got {length}")
        images = {name: value for name, value in inputs.items() if name in ("pixel_values", "image_sizes")}
        features = self.model.get_image_features(**images).pooler_output
        stays = (torch.isin(self.places, indices) | (self.places < 0) for indices in kept)
        features = torch.stack([rows[rows_kept.to(rows.device)] for rows, rows_kept in zip(features, stays)])
        embeds = self.model.get_input_embeddings()(inputs["input_ids"])
        prompt = torch.cat([embeds[:, :8], features, embeds[:, 8 + len(self.places) :]], dim=1)
        expected = self.model.model.language_model(inputs_embeds=prompt, use_cache=False).last_hidden_state[:, -1:]
        return relative_error(found.logits, self.model.lm_head(expected).double())


def _measure(context: Context, model: Callable[[], _Llava], batch: int, budget: int | None) -> list[Row]:
    llava = model()  # made at the first use, shared by all cases
    with torch.inference_mode():
        inputs = llava.inputs(batch)
        row: Row = {"way": "unpruned" if budget is None else f"{budget} tokens"}
        row["prompt tokens"] = llava.prompt_tokens(budget)
        if budget is not None:
            row["logit error"] = llava.pruned_error(inputs, budget)
            if not row["logit error"] < 0.1:  # bfloat16 through all layers
                raise RuntimeError(f"pruned prefill: the logits are off by {row['logit error']:.1e}")
        new_tokens = 4 if context.quick else 32
        with llava.pruning(budget):
            peak = peak_extra_bytes(lambda: llava.generate(inputs, new_tokens), context.device)
            samples = 3 if context.quick else 10  # as in the paper
            options = {"samples": samples, "graph_below": 0.0, "warm_up": 1}
            prefill = compare({"": [lambda: llava.prefill(inputs)]}, context.clock, **options)[""].launched
            busy = device_seconds(lambda: llava.prefill(inputs), context.device)
            lengths = {n: [lambda n=n: llava.generate(inputs, n)] for n in (1, 1 + new_tokens)}
            generated = compare(lengths, context.clock, **(options | {"samples": max(3, samples // 3)}))
        decode = (generated[1 + new_tokens].launched.median - generated[1].launched.median) / new_tokens
        row |= {"prefill ms": prefill.median * 1e3, "decode ms": decode * 1e3, "tokens/s": batch / decode}
        if busy is not None:
            row["prefill GPU ms"] = busy * 1e3
        if peak is not None:
            weights = sum(p.numel() * p.element_size() for p in llava.model.parameters())
            row |= {"peak GiB": (peak + torch.cuda.memory_allocated()) / 2**30, "weights GiB": weights / 2**30}
            row["beyond weights MiB"] = peak / 2**20
        free_memory(context.device)
        return [row]


def cases(context: Context) -> list[Case]:
    models = {tiled: functools.cache(lambda tiled=tiled: _Llava(context, tiled)) for tiled in (False, True)}
    goals, others = {False: 64, True: 320}, {False: (192, 128), True: (640, 160)}  # of the paper
    if context.quick:
        goals, others = {False: 3, True: 30}, {False: (12, 6), True: (60, 15)}
    found = []

    def add(tiled: bool, batch: int, budget: int | None) -> None:
        name = f"{'LLaVA-NeXT-7B' if tiled else 'LLaVA-1.5-7B'} B={batch}, "
        name += "unpruned" if budget is None else f"{budget} tokens"
        seconds = 11.0 if budget is None else 9.0  # the first of each kind makes the model, or compiles
        found.append(Case(name, seconds, functools.partial(_measure, context, models[tiled], batch, budget)))

    kinds = ((False, 1), (True, 1), (False, 2 if context.quick else 8))
    for tiled, batch in kinds:
        add(tiled, batch, None)
        add(tiled, batch, goals[tiled])
    for tiled, batch in kinds:
        for budget in others[tiled]:
            add(tiled, batch, budget)
    return found
