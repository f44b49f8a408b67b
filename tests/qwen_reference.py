"""What a pruned Qwen-VL or GLM-4V must compute, by hand from stock modules on pruned embeddings and positions."""

from __future__ import annotations

import copy
import itertools
import sys
from dataclasses import dataclass

import torch
from models import IMAGE_TOKEN, VIDEO_TOKEN
from torch import Tensor

from hiprune_kernels import reference

KINDS = {IMAGE_TOKEN: ("pixel_values", "image_grid_thw"), VIDEO_TOKEN: ("pixel_values_videos", "video_grid_thw")}
TYPES = {IMAGE_TOKEN: 1, VIDEO_TOKEN: 2}  # in mm_token_type_ids


def token_grids(grid_thw: Tensor) -> list[tuple[int, int, int]]:
    return [(t, h // 2, w // 2) for t, h, w in grid_thw.tolist()]


def encoder_grids(model, grid_thw: Tensor) -> list[Tensor]:
    """Of each image (or video) the sizes that the encoder is given: GLM-4V's takes each frame by itself."""
    if not model.config.model_type.startswith("glm"):
        return list(grid_thw.split(1))
    return [torch.tensor([[1, h, w]] * t) for t, h, w in grid_thw.tolist()]


def raster_order(model, grid_thw: Tensor) -> Tensor:
    """Where in the encoder's rows the merge group of each token lies: by windows of 2 x 2 tokens, if it has any."""
    order, start = [], 0
    for t, h, w in token_grids(grid_thw):
        tokens = [(f, y, x) for f in range(t) for y in range(h) for x in range(w)]
        if hasattr(model.config.vision_config, "window_size"):
            walked = sorted(tokens, key=lambda token: (token[0], token[1] // 2, token[2] // 2, token[1], token[2]))
        else:
            walked = tokens
        place = {token: start + i for i, token in enumerate(walked)}
        order += [place[token] for token in tokens]
        start += len(tokens)
    return torch.tensor(order)


def patch_order(model, grid_thw: Tensor) -> Tensor:
    """Where in the encoder's rows each patch lies, with the patches of each image row by row."""
    groups, order, start = raster_order(model, grid_thw).tolist(), [], 0
    for t, h, w in token_grids(grid_thw):
        for f in range(t):
            for y in range(2 * h):
                row = [groups[start + (f * h + y // 2) * w + x] for x in range(w)]
                order += [4 * group + y % 2 * 2 + x for group in row for x in range(2)]
        start += t * h * w
    return torch.tensor(order)


def eager_row_scores(model, pixels: Tensor, grid_thw: Tensor, layer: int) -> Tensor:
    """Column scores of the encoder's rows in a 1-based layer, from full attention matrices in float64."""
    visual = copy.deepcopy(model.model.visual).double()
    visual.set_attn_implementation("eager")
    attention, seen = visual.blocks[layer - 1].attn, {}

    def remember(module, args, kwargs):
        seen.update(kwargs, hidden_states=args[0])

    attention.register_forward_pre_hook(remember, with_kwargs=True)
    with torch.no_grad():
        visual(pixels.double(), grid_thw=torch.cat(encoder_grids(model, grid_thw)))
        heads = attention.qkv(seen["hidden_states"]).view(len(pixels), 3, attention.num_heads, -1)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        query, key = rotate(heads[:, 0], heads[:, 1], *seen["position_embeddings"])
        ends = seen["cu_seqlens"].tolist()
        scores = []
        for start, end in itertools.pairwise(ends):
            logits = torch.einsum("qhd,khd->hqk", query[start:end], key[start:end]) * attention.scaling
            scores.append(logits.softmax(dim=-1).mean(dim=0).sum(dim=0))
    return torch.cat(scores)


def eager_scores(model, pixels: Tensor, grid_thw: Tensor, layer: int) -> list[Tensor]:
    """... as means over merge groups, for the tokens of each image in raster order."""
    groups = eager_row_scores(model, pixels, grid_thw, layer).view(-1, 4).mean(dim=1)
    return list(groups[raster_order(model, grid_thw)].split([t * h * w for t, h, w in token_grids(grid_thw)]))


def expected_selection(
    model, inputs: dict, token: int, budgets, layers: tuple[int, int], **options
) -> list[tuple[Tensor, Tensor]]:
    """Indices and roles of each image (or video), by the reference implementation on float64 eager scores."""
    pixels, grid_thw = (inputs[name] for name in KINDS[token])
    tiles = encoder_grids(model, grid_thw)
    scores = zip(*(eager_scores(model, pixels, torch.cat(tiles), layer) for layer in layers))
    selections = []
    for tiles_of_one in tiles:
        share = budgets // len(tiles_of_one) if isinstance(budgets, int) else budgets
        chosen = []
        for grid in token_grids(tiles_of_one):
            object_scores, deep_scores = next(scores)
            tokens = len(object_scores)
            budget = min(share, tokens) if isinstance(share, int) else max(1, round(share * tokens))
            if budget == tokens:  # nothing is selected
                chosen.append(torch.full((tokens,), 3, dtype=torch.uint8))
                continue
            both = object_scores[None], deep_scores[None]
            chosen.append(reference.select_tokens(*both, budget=budget, grid=grid, **options)[1][0])
        roles = torch.cat(chosen)
        selections.append((roles.nonzero()[:, 0], roles))
    return selections


@dataclass
class Row:
    """One row of a batch without padding and dropped tokens."""

    embeds: Tensor  # [L', C]
    positions: Tensor  # [4, L']
    deepstack: list[Tensor]  # one per level: [V, C]
    visual: Tensor  # [L'] bool
    columns: Tensor  # [L'] full columns that are kept


def features_of(model, inputs: dict, token: int) -> tuple[Tensor, list[Tensor]]:
    """The stock encoder's features of all images (or videos), and of each deepstack level."""
    pixels, grid_thw = (inputs[name] for name in KINDS[token])
    get = model.get_image_features if token == IMAGE_TOKEN else model.get_video_features
    with torch.no_grad():
        output = get(pixels, grid_thw, return_dict=True)
    deepstack = getattr(output, "deepstack_features", None) or []  # of each level all images, or a tuple of images
    levels = [level if isinstance(level, Tensor) else torch.cat(list(level)) for level in deepstack]
    return torch.cat(list(output.pooler_output)), levels


def pruned_rows(model, inputs: dict, selections: dict[int, list[tuple[Tensor, Tensor]]]) -> list[Row]:
    """The rows of a batch, with of each kind of placeholder only the selected ones."""
    ids, types, mask = inputs["input_ids"], inputs["mm_token_type_ids"], inputs["attention_mask"].bool()
    levels = len(getattr(model.config.vision_config, "deepstack_visual_indexes", ()))
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        deep = [torch.zeros_like(embeds) for _ in range(levels)]
        keep = mask.clone()
        for token, kept in selections.items():
            features, deepstack = features_of(model, inputs, token)
            places = types == TYPES[token]
            embeds[places] = features
            for level, states in zip(deep, deepstack, strict=True):
                level[places] = states
            keep[places] = torch.cat([roles > 0 for _, roles in kept])
        if selections:
            grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
            positions, _ = model.model.get_rope_index(ids, types, **grids, attention_mask=mask)
        else:
            positions = (mask.cumsum(dim=1) - 1).expand(3, -1, -1)
    rows = []
    for i, columns in enumerate(row.nonzero()[:, 0] for row in keep):
        text = torch.arange(len(columns))
        visual = types[i, columns] > 0
        levels = [level[i, columns][visual] for level in deep]
        places = torch.cat([text[None], positions[:, i, columns]])
        rows.append(Row(embeds[i, columns], places, levels, visual, columns))
    return rows


def extended(model, row: Row, tokens: Tensor) -> Row:
    """The row with text tokens [n] behind it."""
    with torch.no_grad():
        embeds = model.get_input_embeddings()(tokens)
    steps = torch.arange(1, len(tokens) + 1)
    text, multimodal = row.positions[:1, -1:] + steps, row.positions[1:].amax() + steps.expand(3, -1)
    return Row(
        torch.cat([row.embeds, embeds]),
        torch.cat([row.positions, torch.cat([text, multimodal])], dim=1),
        row.deepstack,
        torch.cat([row.visual, torch.zeros(len(tokens), dtype=torch.bool)]),
        torch.cat([row.columns, row.columns[-1] + steps]),
    )


def row_logits(model, row: Row) -> Tensor:
    """Stock logits [L', V]."""
    deepstack = {}
    if row.deepstack and bool(row.visual.any()):
        deepstack = {"visual_pos_masks": row.visual[None], "deepstack_visual_embeds": row.deepstack}
    with torch.no_grad():
        states = model.model.language_model(
            inputs_embeds=row.embeds[None], position_ids=row.positions[:, None], use_cache=False, **deepstack
        ).last_hidden_state
        return model.lm_head(states)[0]


def greedy(model, rows: list[Row], count: int, forbidden: list[int] = ()) -> Tensor:
    """New tokens [B, count], each from a forward over the whole row."""
    answers = []
    for row in rows:
        tokens = []
        for _ in range(count):
            logits = row_logits(model, row)[-1]
            logits[list(forbidden)] = -torch.inf
            tokens.append(logits.argmax())
            row = extended(model, row, tokens[-1][None])
        answers.append(torch.stack(tokens))
    return torch.stack(answers)


def beam_search(model, row: Row, count: int, width: int) -> list[tuple[float, list[int]]]:
    """The best sequences of new tokens with their log-likelihoods, best first."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(count):
        candidates = []
        for score, tokens in beams:
            longer = extended(model, row, torch.tensor(tokens)) if tokens else row
            best = row_logits(model, longer)[-1].log_softmax(dim=-1).topk(width)
            candidates += [(score + float(step), [*tokens, int(token)]) for step, token in zip(*best)]
        beams = sorted(candidates, reverse=True)[:width]
    return beams
