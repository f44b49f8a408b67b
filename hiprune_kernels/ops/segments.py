"""Budgets that are data: the best tokens of segments (an image's tiles), and a budget shared out by weights.

From here to the kernels: `select_top_segments` -> `torch.ops.hiprune.select_top_segments` -> csrc/segments.cpp, which
covers every CPU call, or kernels/segments.py on GPUs. What that does not cover (`cuda_segments_gap`) and devices
without a kernel go to `hiprune_kernels.reference`, which does not wait for the device either. So it is with `shares`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..budget import check_int, check_list
from .checks import check_floating, check_like, check_mask, check_shape, check_tensor
from .library import NO_TRITON, TRITON, library, warn_without_cpu_kernels

_INTEGERS = (torch.int64, torch.int32)


# ---------------------------------------------------------------------------------------------- public functions


def select_top_segments(
    scores: Tensor,
    budgets: Tensor,
    *,
    sizes: Sequence[int],
    tiles: Sequence[int],
    totals: Sequence[int],
    candidate_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """In each segment the tokens with the highest scores, as many as a tensor of budgets says; the host never waits.

    A segment is a tile (or a frame) of an image, and the tiles of an image share a budget that the host knows: so the
    results have a known shape, however the data share it out. Equal scores: the lowest index wins. NaN ranks last.

    What the device alone knows is not checked (`check_inputs` does): a budget below 0 counts as 0, one above the
    segment's candidates as their number, and a segment gets no more than those before it leave of the image's total.
    So what is kept of an image is never more than its total. Where it is less, -1 fills the end of its indices.

    Args:
        scores: [T] floating point, segment by segment.
        budgets: [R] int64 or int32, on the scores' device: tokens kept of each segment; 0 is allowed.
        sizes: tokens of each segment (host data), R in all, each at least 1, with sum T.
        tiles: segments of each image (host data), each at least 1, with sum R.
        totals: tokens kept of each image (host data), each from 0 to the image's tokens: the sums of its budgets.
        candidate_mask: [T] bool, False takes a token out (padding, say).

    Returns:
        indices: [sum(totals)] int64 positions in T, ascending, with the -1 of an image at the end of its part.
        roles: [T] uint8: 1 kept, 0 dropped.
        Neither is differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> scores, budgets = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 6.0]), torch.tensor([1, 2])
        >>> indices, roles = select_top_segments(scores, budgets, sizes=[3, 3], tiles=[2], totals=[3])
        >>> indices, roles
        (tensor([1, 3, 5]), tensor([0, 1, 0, 1, 0, 1], dtype=torch.uint8))
    """
    check_segments(sizes, tiles, totals)
    check_tensor("scores", scores, "T")
    check_floating("scores", scores)
    check_shape("scores", scores, "T", (sum(sizes),))
    check_integers("budgets", budgets, len(sizes), "scores", scores)
    if candidate_mask is not None:
        check_mask("candidate_mask", candidate_mask, "T", tuple(scores.shape), "scores", scores)
    return _select_op(scores, budgets, candidate_mask, sizes, tiles, totals)


def shares(weights: Tensor, totals: Sequence[int], caps: Tensor | Sequence[int], *, tiles: Sequence[int]) -> Tensor:
    """Each image's budget shared out among its tiles by weights that are on the device: `budget.shares`, exactly.

    1. Tiles whose quota, total * w / sum(w), reaches their cap get the cap and leave; the rest is shared anew, until
    none is full. 2. The others get their quotas rounded down. 3. What is left goes one each to the largest fractions;
    the lowest index wins ties. So an image's shares have the sum min(total, sum of its caps). In float64.

    What the device alone knows is not checked (`check_inputs` does): weights that are negative or not finite (or above
    1e280) count as 0, as do caps below 0. Tiles are equal where all weights are 0.

    Args:
        weights: [R] floating point, of each tile.
        totals: tokens to share out of each image (host data), each at least 0.
        caps: [R] int64 or int32 on the weights' device, the most that each tile can take. Or host data, which is copied
            to the device: not while a CUDA graph is captured.
        tiles: tiles of each image (host data), each at least 1, with sum R.

    Returns:
        [R] int64, on the weights' device; not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> shares(torch.tensor([0.7, 0.1, 0.1, 0.1]), [40], [16, 16, 16, 16], tiles=[4])
        tensor([16,  8,  8,  8])
    """
    _check_tiles(tiles, totals)
    check_tensor("weights", weights, "R")
    check_floating("weights", weights)
    check_shape("weights", weights, "R", (sum(tiles),))
    if not isinstance(caps, Tensor):
        check_list("caps", caps)
        for i, cap in enumerate(caps):
            check_int(f"caps[{i}]", cap, least=0)
        caps = torch.tensor(caps, dtype=torch.int64, device=weights.device)
    check_integers("caps", caps, sum(tiles), "weights", weights)
    return _shares_op(weights, caps, totals, tiles)


# -------------------------------------------------------------------------------------------------------- checks


def _check_tiles(tiles: Sequence[int], totals: Sequence[int]) -> None:
    check_list("tiles", tiles)
    for i, count in enumerate(tiles):
        check_int(f"tiles[{i}]", count)
    check_list("totals", totals)
    if len(totals) != len(tiles):
        raise ValueError(f"totals: expected {len(tiles)}, one for each image, got {len(totals)}")
    for i, total in enumerate(totals):
        check_int(f"totals[{i}]", total, least=0)


def check_segments(sizes: Sequence[int], tiles: Sequence[int], totals: Sequence[int]) -> None:
    """Raise ValueError or TypeError, naming the argument, unless these cut tokens into segments and images."""
    check_list("sizes", sizes)
    for i, size in enumerate(sizes):
        check_int(f"sizes[{i}]", size)
    _check_tiles(tiles, totals)
    if sum(tiles) != len(sizes):
        raise ValueError(f"tiles: expected a sum of {len(sizes)}, as there are sizes, got {sum(tiles)}")
    parts = iter(sizes)
    for i, (count, total) in enumerate(zip(tiles, totals)):
        tokens = sum(itertools.islice(parts, count))
        if total > tokens:
            raise ValueError(f"totals[{i}]: expected at most {tokens}, the image's tokens, got {total}")


def check_integers(name: str, value: Tensor, count: int, other_name: str, other: Tensor) -> None:
    check_tensor(name, value, "R")
    if value.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected int64 or int32, got {value.dtype}")
    check_shape(name, value, "R", (count,))
    check_like(name, value, other_name, other, dtype=False)


# ------------------------------------------------------------------------------------------------------ dispatch

library.define(
    "select_top_segments(Tensor scores, Tensor budgets, Tensor? candidate_mask, int[] sizes, int[] tiles, int[] totals)"
    " -> (Tensor indices, Tensor roles)"
)
library.define("shares(Tensor weights, Tensor caps, int[] totals, int[] tiles) -> Tensor")
_select_op, _shares_op = torch.ops.hiprune.select_top_segments.default, torch.ops.hiprune.shares.default


@torch.library.impl(library, "select_top_segments", "CompositeExplicitAutograd")
def _select_reference(scores, budgets, candidate_mask, sizes, tiles, totals):
    if scores.device.type == "cpu":
        warn_without_cpu_kernels()
    return reference.select_top_segments(scores, budgets, candidate_mask, sizes, tiles, totals)


@torch.library.impl(library, "shares", "CompositeExplicitAutograd")
def _shares_reference(weights, caps, totals, tiles):
    if weights.device.type == "cpu":
        warn_without_cpu_kernels()
    return reference.shares(weights, caps, totals, tiles)


def cuda_segments_gap(sizes: Sequence[int], tiles: Sequence[int], totals: Sequence[int]) -> str:
    """Why kernels/segments.py does not cover a CUDA call of `select_top_segments`, or "" where it does."""
    if not TRITON:
        return NO_TRITON
    from ..kernels.segments import segments_gap

    return segments_gap(sizes, tiles, totals)


def cuda_shares_gap(totals: Sequence[int], tiles: Sequence[int]) -> str:
    """Why kernels/segments.py does not cover a CUDA call of `shares`, or "" where it does."""
    if not TRITON:
        return NO_TRITON
    from ..kernels.segments import shares_gap

    return shares_gap(totals, tiles)


@torch.library.impl(library, "select_top_segments", "CUDA")
def _select_cuda(scores, budgets, candidate_mask, sizes, tiles, totals):
    if cuda_segments_gap(sizes, tiles, totals):
        return _select_reference(scores, budgets, candidate_mask, sizes, tiles, totals)
    from ..kernels import segments

    with torch.cuda.device_of(scores):
        return segments.select_top_segments(scores, budgets, candidate_mask, sizes, tiles, totals)


@torch.library.impl(library, "shares", "CUDA")
def _shares_cuda(weights, caps, totals, tiles):
    if cuda_shares_gap(totals, tiles):
        return _shares_reference(weights, caps, totals, tiles)
    from ..kernels import segments

    with torch.cuda.device_of(weights):
        return segments.shares(weights, caps, totals, tiles)


@torch.library.register_fake("hiprune::select_top_segments", lib=library)
def _select_fake(scores, budgets, candidate_mask, sizes, tiles, totals):
    return scores.new_empty(sum(totals), dtype=torch.int64), torch.empty_like(scores, dtype=torch.uint8)


@torch.library.register_fake("hiprune::shares", lib=library)
def _shares_fake(weights, caps, totals, tiles):
    return weights.new_empty(weights.shape, dtype=torch.int64)
