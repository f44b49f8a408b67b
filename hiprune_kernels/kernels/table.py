"""The table of launch plans: which path a call takes on which GPU, and with which blocks.

As measured on an H200 (bench/results/gpu_h200.md). Elsewhere the same blocks are assumed to be best.

Of 11 shapes of tiles, 64 x 64 with 4 warps and 3 stages were the fastest or within 5% of it for nearly every kernel and
shape that was tried (577 x 64, 729 x 72, 2048 x 64 and 4096 x 80, batches of 1 to 32). With D = 72 and 80 eight warps
took up to twice as long: their registers let one block at a time onto a multiprocessor.

Paths on an H200, output and scores, in CUDA graphs: strip takes two thirds of the time of sweeps with 50 keys, and as
long as they with 198. From 577 keys on passes take up to 9% less than sweeps. cuDNN's attention with a scores pass
takes 0 to 15% less than passes from 198 keys on, in batches of 1 to 64, and never more.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import cdiv, next_power_of_2
from .paths import LENDERS, Blocks, LaunchPlan, Problem, lends, split_head_dim


class Shape(NamedTuple):
    """What the table's answer follows from, beside the architecture. Never the batch."""

    M: int  # queries; of no account where packed, as are the keys, since lengths then stand on the device
    N: int  # keys
    heads: int
    D: int
    dtype: torch.dtype
    packed: bool

    @property
    def half(self) -> bool:
        return self.dtype != torch.float32


# Up to this head dimension: blocks of the attention and of the scores pass.
_HALF = (
    (80, Blocks(64, 64, 4, 3), Blocks(64, 64, 4, 3)),
    (128, Blocks(64, 64, 4, 2), Blocks(64, 64, 4, 2)),
    (256, Blocks(64, 32, 8, 2), Blocks(64, 64, 8, 1)),
)
_FLOAT32 = (  # three products of split operands: small tiles. With D above 96 some registers spill.
    (32, Blocks(64, 32, 4, 2), Blocks(64, 32, 4, 2)),
    (96, Blocks(64, 16, 4, 2), Blocks(64, 32, 4, 2)),
    (128, Blocks(64, 16, 4, 1), Blocks(64, 32, 8, 1)),
    (256, Blocks(32, 16, 4, 1), Blocks(32, 16, 4, 1)),
)


def _blocks(shape: Shape) -> tuple[Blocks, Blocks]:
    rows = _HALF if shape.half else _FLOAT32
    return next((attention, scores) for most, attention, scores in rows if most >= shape.D)


def _all_keys(shape: Shape) -> tuple[Blocks]:
    return (Blocks(64, max(16, next_power_of_2(shape.N)), 4, 1),)


def _one_launch(shape: Shape) -> tuple[Blocks]:
    return _blocks(shape)[:1]


def _two_launches(shape: Shape) -> tuple[Blocks, Blocks, int]:
    attention, scores = _blocks(shape)
    if shape.packed:
        return attention, scores, 1
    # Few keys and many queries: shares of at least 8 blocks, until one batch entry fills a GPU about four times over.
    programs = shape.heads * cdiv(shape.N, scores.block_n)
    return attention, scores, max(1, min(512 // programs, shape.M // (8 * scores.block_m)))


class Row(NamedTuple):
    """A path, and the calls that take it."""

    path: str
    plan: Callable[[Shape], tuple]  # what follows the path in a `LaunchPlan`
    on: tuple[int, ...] | None  # architectures, 90 for compute capability 9.0; None: any
    calls: Callable[[Shape], bool]


# The first row that matches counts; a lender's only where it also `lends` its attention to the call.
TABLE = (
    # Sweeps would need a slot per block of the longest sequence, which the host does not know.
    Row("passes", _two_launches, None, lambda call: call.packed),
    # A strip's head dimension is one tile.
    Row("strip", _all_keys, None, lambda call: _in_one_tile(call) and call.N <= 128),
    # On an H200 cuDNN's is the fastest, and its bits never depended on the batch in 52 comparisons (six shapes, batches
    # to 16). Other head dimensions were not measured.
    Row("cudnn", _two_launches, (90,), lambda call: 64 <= call.D <= 128),
    # Flash attention 2 was written for these three. It splits the keys, by a rule that counts the batch, only where one
    # block per 64 queries leaves multiprocessors idle: with 256 blocks per batch entry it never does.
    Row("flash", _two_launches, (80, 86, 89), lambda call: call.N > 1024 and call.heads * cdiv(call.M, 64) >= 256),
    # Above 1024 keys M N / 64 partial sums a head begin to weigh as much as the queries. On Hopper passes are faster
    # before that.
    Row("passes", _two_launches, (90,), lambda call: call.N > 256),
    Row("sweeps", _one_launch, None, lambda call: call.N <= 1024 and (call.half or call.D <= 64)),
    Row("passes", _two_launches, None, lambda call: True),
    # Never measured.
    Row("flash_attn", _two_launches, (), lambda call: True),
)


def _in_one_tile(call: Shape) -> bool:
    return call.half and call.D <= 128 and split_head_dim(call.D)[1] == 0


def choose(problem: Problem, architecture: int, path: str | None = None) -> LaunchPlan:
    """The plan for a call on a GPU of this architecture, 90 for compute capability 9.0.

    Args:
        path: take this path whatever the table says.

    Example:
        >>> query = torch.empty(1, 16, 577, 64, dtype=torch.bfloat16)
        >>> choose(Problem.of(query, query, query, *[None] * 4), 80).path
        'sweeps'
    """
    shape = (problem.M, problem.N, problem.heads, problem.D, problem.query.dtype, problem.packed)
    if path is not None:
        return next(_planned(row, Shape(*shape)) for row in TABLE if row.path == path)
    lent, own = _candidates(architecture, *shape)
    for plan in lent:
        if lends(plan.path, problem):
            return plan
    return own


@functools.lru_cache(maxsize=4096)
def _candidates(architecture: int, *shape: Any) -> tuple[tuple[LaunchPlan, ...], LaunchPlan]:
    """The plans that a lender has to agree to, in order, and the first that none has to: of the rows that match."""
    call = Shape(*shape)
    rows = (row for row in TABLE if (row.on is None or architecture in row.on) and row.calls(call))
    plans = tuple(_planned(row, call) for row in rows)
    first = next(i for i, plan in enumerate(plans) if plan.path not in LENDERS)
    return plans[:first], plans[first]


def _planned(row: Row, shape: Shape) -> LaunchPlan:
    return LaunchPlan(row.path, *row.plan(shape))
