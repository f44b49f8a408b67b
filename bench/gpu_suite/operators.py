"""Section "operators": diverse selection, merging, and budgets that are data; against PyTorch's way to the same."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import hiprune_kernels as hk
from hiprune_kernels import reference

from .context import Case, Context, Row, seconds_row
from .timing import rotation

Way = Callable[..., Tensor]


class Operator(NamedTuple):
    """A case: what it draws, and the ways to compute the same of it, ours first."""

    inputs: Callable[[torch.Generator, torch.device, bool], tuple[Any, ...]]  # the last says: tiny ones
    expected: Way  # on the CPU
    ways: dict[str, Way]
    exact: bool = True


# -------------------------------------------------------------------------------------------------- diverse selection


def _diverse_inputs(
    tokens: int, channels: int, count: int, generator: torch.Generator, device: torch.device, tiny: bool
) -> tuple[Any, ...]:
    tokens, channels, count = (60, 16, 9) if tiny else (tokens, channels, count)
    features = torch.randn(1, tokens, channels, device=device, generator=generator)
    return features, torch.rand(1, tokens, device=device, generator=generator) + 0.1, count


def _cosines(features: Tensor) -> Tensor:
    units = F.normalize(features[0].float(), dim=-1)
    return units @ units.T


def farthest_loop(features: Tensor, quality: Tensor, count: int) -> Tensor:
    """DivPrune's loop, without waiting for the device: [1, count] in the order of choice."""
    distances = 1 - _cosines(features)
    least = distances.clone().fill_diagonal_(torch.inf).amin(dim=1)
    chosen, least = [least.argmax()], torch.full_like(least, torch.inf)
    for _ in range(count - 1):
        least = torch.minimum(least, distances.index_select(0, chosen[-1][None])[0])
        least = least.index_fill(0, chosen[-1], -torch.inf)
        chosen.append(least.argmax())
    return torch.stack(chosen)[None]


def determinant_loop(features: Tensor, quality: Tensor, count: int) -> Tensor:
    """CDPruner's loop, without waiting for the device: [1, count] in the order of choice."""
    kernel = quality[0][:, None] * _cosines(features) * quality[0]
    gain, covered, chosen = kernel.diagonal().clone(), kernel.new_zeros(count, len(kernel)), []
    for step in range(count):
        j = gain.argmax()[None]
        chosen.append(j[0])
        row = kernel.index_select(0, j)[0] - covered[:step].index_select(1, j)[:, 0] @ covered[:step]
        covered[step] = row / gain.index_select(0, j).sqrt()
        gain = (gain - covered[step].square()).index_fill(0, j, -torch.inf)
    return torch.stack(chosen)[None]


def _diverse(select: Any, with_quality: bool, features: Tensor, quality: Tensor, count: int) -> Tensor:
    return select(features, count=count, quality=quality if with_quality else None)[1]


# ------------------------------------------------------------------------------------------------------------- merging


def _merging_inputs(
    images: int, kept: int, count: int, generator: torch.Generator, device: torch.device, tiny: bool
) -> tuple[Any, ...]:
    tokens, channels = (60, 16) if tiny else (576, 1024)
    kept, count = (20, 5) if tiny else (kept, count)
    features = torch.randn(images, tokens, channels, device=device, generator=generator)
    keys = torch.randn(images, tokens, 64, device=device, generator=generator)
    rest = torch.rand(tokens, device=device, generator=generator).argsort()[kept:].sort().values
    targets = rest[:: len(rest) // count][:count]
    sources = torch.zeros(tokens, dtype=torch.bool, device=device)
    sources[rest] = True
    sources[targets] = False
    return features, keys, targets.expand(images, count).contiguous(), sources.expand(images, tokens).contiguous()


def released_merging(features: Tensor, keys: Tensor, targets: Tensor, sources: Tensor) -> Tensor:
    """What VisionZip's released code computes, with sources as weights, so that nobody waits for their number."""
    keys = F.normalize(keys, dim=-1)
    rows = targets[..., None]
    nearest = torch.bmm(keys, keys.gather(1, rows.expand(-1, -1, keys.shape[-1])).transpose(1, 2)).argmax(dim=2)
    assigned = F.one_hot(nearest, targets.shape[1]).to(features.dtype) * sources[..., None]
    means = torch.bmm(assigned.transpose(1, 2), features) / assigned.sum(dim=1).clamp(min=1)[..., None]
    return features.gather(1, rows.expand(-1, -1, features.shape[-1])) + means


# ------------------------------------------------------------------------------------------------ budgets that are data


def _segment_inputs(images: int, generator: torch.Generator, device: torch.device, tiny: bool) -> tuple[Any, ...]:
    size, total = (36, 20) if tiny else (576, 640)
    scores = torch.rand(images * 5 * size, device=device, generator=generator)
    return scores, torch.rand(images * 5, device=device, generator=generator), [size] * 5 * images, [total] * images


def _ours_segments(scores: Tensor, weights: Tensor, sizes: Sequence[int], totals: Sequence[int]) -> Tensor:
    tiles = [5] * len(totals)
    budgets = hk.shares(weights, totals, sizes, tiles=tiles)
    return hk.select_top_segments(scores, budgets, sizes=sizes, tiles=tiles, totals=totals)[0]


def _reference_segments(scores: Tensor, weights: Tensor, sizes: Sequence[int], totals: Sequence[int]) -> Tensor:
    tiles = [5] * len(totals)
    budgets = reference.shares(weights, torch.tensor(sizes), totals, tiles)
    return reference.select_top_segments(scores, budgets, None, sizes, tiles, totals)[0]


def waiting_segments(scores: Tensor, weights: Tensor, sizes: Sequence[int], totals: Sequence[int]) -> Tensor:
    """Budgets brought to the host, then a top-k for each tile."""
    from hiprune_kernels.budget import shares

    found, first = [], 0
    for image, total in enumerate(totals):
        own = slice(5 * image, 5 * image + 5)
        for size, budget in zip(sizes[own], shares(weights[own].tolist(), total, list(sizes[own]))):
            found.append(first + scores[first : first + size].topk(budget).indices.sort().values)
            first += size
    return torch.cat(found)


# --------------------------------------------------------------------------------------------------------------- cases

OPERATORS = {
    f"{name}, {tokens} x {channels} to {count}": Operator(
        functools.partial(_diverse_inputs, tokens, channels, count),
        functools.partial(_diverse, reference.select_diverse, with_quality),
        {"ours": functools.partial(_diverse, hk.select_diverse, with_quality), "torch loop": loop},
    )
    for tokens, channels, count in ((576, 1024, 64), (576, 4096, 192))
    for name, with_quality, loop in (
        ("farthest points", False, farthest_loop),
        ("determinant", True, determinant_loop),
    )
}
OPERATORS |= {
    f"merging, B={images}": Operator(
        functools.partial(_merging_inputs, images, 54, 10),
        lambda *inputs: reference.merge_tokens(*inputs, rows_only=True)[0],
        {"ours": lambda *inputs: hk.merge_tokens(*inputs, rows_only=True)[0], "released chain": released_merging},
        exact=False,
    )
    for images in (1, 8)
}
OPERATORS |= {
    f"shares and segments, B={images}": Operator(
        functools.partial(_segment_inputs, images),
        _reference_segments,
        {"ours": _ours_segments, "on the host": waiting_segments},
    )
    for images in (1, 8)
}


def _measure(context: Context, operator: Operator) -> list[Row]:
    generator = torch.Generator(context.device).manual_seed(0)
    first = operator.inputs(generator, context.device, context.quick)
    read = sum(x.numel() * x.element_size() for x in first if isinstance(x, Tensor))
    others = range(rotation(read, context.device) - 1)
    sets = [first, *(operator.inputs(generator, context.device, context.quick) for _ in others)]
    expected = operator.expected(*(x.cpu() if isinstance(x, Tensor) else x for x in first))
    rows: dict[str, Row] = {}
    calls = {}
    for name, way in operator.ways.items():
        rows[name] = {"way": name}
        try:
            found = way(*first).cpu()
        except Exception as error:
            rows[name]["failure"] = context.failure(name, error)
            continue
        right = found.shape == expected.shape and (
            torch.equal(found, expected) if operator.exact else torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
        )
        if right:
            calls[name] = [lambda inputs=inputs, way=way: way(*inputs) for inputs in sets]
        else:
            rows[name]["failure"] = "wrong: another result than the reference's"
    times = context.compare(calls, rows, prepare=context.prepare)
    for name, measured in times.items():
        rows[name] |= seconds_row(measured, times.get("ours"))
    return list(rows.values())


def cases(context: Context) -> list[Case]:
    def case(name: str, operator: Operator) -> Case:
        return Case(name, 3.0, lambda: _measure(context, operator))

    return [case(*item) for item in OPERATORS.items()]
