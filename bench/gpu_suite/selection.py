"""Section "selection": scores and features in, kept rows out; against the PyTorch chains that do the same.

All ways follow the released LLaVA code's rule ("official", on means over the queries), where none of these inputs tells
it from the paper's but for anchors on the border of the grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import hiprune_kernels as hk
from hiprune_kernels import reference
from hiprune_kernels.budget import anchor_count

from .context import Case, Context, Row, seconds_row
from .timing import rotation

RULE = "official"


class Shape(NamedTuple):
    B: int
    grid: tuple[int, int]
    budget: int
    channels: int


SHAPES = {
    "CLIP-L 576 to 192, B=1": Shape(1, (24, 24), 192, 1024),
    "CLIP-L 576 to 192, B=8": Shape(8, (24, 24), 192, 1024),
    "CLIP-L 576 to 192, B=64": Shape(64, (24, 24), 192, 1024),
    "Qwen 1024 to 342, B=1": Shape(1, (32, 32), 342, 3584),
    "Qwen 4096 to 1368, B=1": Shape(1, (64, 64), 1368, 3584),
    "16384 to 5472, B=1": Shape(1, (128, 128), 5472, 3584),
}


def released_chain(features: Tensor, objects: Tensor, deeps: Tensor, budget: int, grid: tuple[int, int]):
    """The released code, image by image: unique() waits for the GPU. Kept rows [B, budget, C] and indices."""
    indices = []
    for object_scores, deep_scores in zip(objects, deeps):
        anchors = object_scores.topk(anchor_count(budget, rule=RULE)).indices
        around = [anchors, anchors - 1, anchors + 1, anchors - grid[1], anchors + grid[1]]
        taken = torch.cat(around).clamp(0, len(object_scores) - 1).unique()
        rest = deep_scores.clone()
        rest[taken] -= 1.0
        registers = rest.topk(budget - len(taken)).indices
        indices.append(torch.cat([taken, registers]).sort().values)
    indices = torch.stack(indices)
    return _gathered(features, indices), indices


def fixed_size_chain(features: Tensor, objects: Tensor, deeps: Tensor, budget: int, grid: tuple[int, int]):
    """The same without waiting, so that a CUDA graph can hold it: taken tokens come first in the second top-k."""
    count = objects.shape[1]
    anchors = objects.topk(anchor_count(budget, rule=RULE)).indices
    around = torch.cat([anchors, anchors - 1, anchors + 1, anchors - grid[1], anchors + grid[1]], dim=1)
    rest = deeps.scatter(1, around.clamp(0, count - 1), float("inf"))
    indices = rest.topk(budget).indices.sort().values
    return _gathered(features, indices), indices


def _gathered(features: Tensor, indices: Tensor) -> Tensor:
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))


def ours(features: Tensor, objects: Tensor, deeps: Tensor, budget: int, grid: tuple[int, int]):
    kept, indices, _ = hk.prune_tokens(features, objects, deeps, budget=budget, grid=grid, rule=RULE)
    return kept, indices


WAYS = {"ours": ours, "fixed-size chain": fixed_size_chain, "released chain": released_chain}


def _sets(context: Context, shape: Shape) -> list[tuple[Tensor, Tensor, Tensor]]:
    tokens, generator = shape.grid[0] * shape.grid[1], torch.Generator(context.device).manual_seed(0)

    def one() -> tuple[Tensor, Tensor, Tensor]:
        features = torch.randn(shape.B, tokens, shape.channels, device=context.device, generator=generator)
        order = torch.rand(2, shape.B, tokens, device=context.device, generator=generator).argsort(dim=-1)
        return features.bfloat16(), *(order / tokens)  # no ties, where torch.topk may take any

    # Kept rows are read and written, the rest of the features is not touched.
    return [one() for _ in range(rotation(2 * shape.B * shape.budget * shape.channels * 2, context.device))]


def _measure(context: Context, shape: Shape) -> list[Row]:
    sets, options = _sets(context, shape), (shape.budget, shape.grid)
    features, objects, deeps = (x.cpu() for x in sets[0])
    indices, _ = reference.select_tokens(objects, deeps, budget=shape.budget, grid=shape.grid, rule=RULE)
    kept = _gathered(features, indices)
    rows, calls = {}, {}
    for name, way in WAYS.items():
        rows[name] = {"way": name}
        try:
            found = [x.cpu() for x in way(*sets[0], *options)]
        except Exception as error:
            rows[name]["failure"] = context.failure(name, error)
            continue
        if torch.equal(found[1], indices) and torch.equal(found[0], kept):
            calls[name] = [lambda tensors=tensors, way=way: way(*tensors, *options) for tensors in sets]
        else:
            rows[name]["failure"] = f"wrong: {int((found[1] == indices).sum())} of {indices.numel()} indices agree"
    times = context.compare(calls, rows, prepare=context.prepare)
    for name, measured in times.items():
        rows[name] |= seconds_row(measured, times.get("ours"))
    return list(rows.values())


def cases(context: Context) -> list[Case]:
    def case(name: str, shape: Shape) -> Case:
        size = Shape(min(shape.B, 2), (12, 12), 100, 16) if context.quick else shape
        return Case(name, 2.0, lambda: _measure(context, size))

    return [case(*item) for item in SHAPES.items()]
