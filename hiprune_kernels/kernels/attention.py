"""Attention with column scores on GPUs: `table.py` chooses a path and its blocks, `paths.py` launches its kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import cdiv, launch
from .attention_kernels import reduce_kernel
from .paths import PATHS, Blocks, Launch, LaunchPlan, Problem
from .table import choose


def launch_kernel(
    kernel: Any, programs: int, arguments: dict[str, Any], constants: dict[str, Any], blocks: Blocks
) -> None:
    """The `Launch` that does it."""
    launch(kernel, (programs,), arguments, constants, blocks.warps, blocks.stages)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    scale: float | None,
    causal: bool,
    per_head: bool,
    score_factor: float,
    *,
    architecture: int,
    path: str | None = None,
    launch: Launch = launch_kernel,
) -> tuple[Tensor | None, Tensor]:
    """Output (None without `value`) and scores times `score_factor`, summed over the heads unless `per_head`.

    Tensors as in `hiprune_kernels.attention_with_scores` and its varlen form. `path` and `launch` take the place of the
    table's choice and of the launch, for tests, benchmarks and ahead-of-time compilation.
    """
    problem = Problem.of(query, key, value, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask, scale, causal)
    if problem.B * problem.M * problem.N == 0 or (problem.packed and problem.segments == 0):
        output = problem.empty_output()
        shape = ([] if problem.packed else [problem.B]) + ([problem.heads] if per_head else []) + [problem.N]
        return None if output is None else output.zero_(), query.new_zeros(shape, dtype=torch.float32)
    return compute(problem, choose(problem, architecture, path), per_head, score_factor, launch)


def compute(
    problem: Problem, plan: LaunchPlan, per_head: bool, score_factor: float, launch: Launch = launch_kernel
) -> tuple[Tensor | None, Tensor]:
    """`attention` by a given plan. The problem has queries and keys."""
    output, partial = PATHS[plan.path](problem, plan, launch)
    scores = _reduced(problem, partial, per_head, score_factor, launch)
    return output, scores[0] if problem.packed else scores


_REDUCED = Blocks(32, 32, 4, 2)


def _reduced(problem: Problem, partial: Tensor, per_head: bool, factor: float, launch: Launch) -> Tensor:
    """[B, heads, slots, N] to [B, heads, N] or [B, N]."""
    B, heads, N, slots = problem.B, problem.heads, problem.N, partial.shape[2]
    if per_head:
        rows, scores = B * heads, partial.new_empty(B, heads, N)
    else:
        rows, slots, scores = B, heads * slots, partial.new_empty(B, N)
    arguments = {"partial_ptr": partial, "scores_ptr": scores, "slots": slots, "N": N, "factor": factor}
    constants = {"ROWS": 32 if slots > 16 else 16, "BLOCK_N": 32}
    launch(reduce_kernel, rows * cdiv(N, 32), arguments, constants, _REDUCED)
    return scores
