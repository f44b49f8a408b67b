"""Value checks that need the device's data; never called on the hot path."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference


def check_inputs(
    *,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    features: Tensor | None = None,
    object_scores: Tensor | None = None,
    deep_scores: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    candidate_mask: Tensor | None = None,
    budget: int | None = None,
) -> None:
    """Check what only the data shows, before handing the same arguments to an operator. Synchronises with the device.

    The operators check metadata only (shapes, dtypes, devices), so that they never wait for a GPU and compile without
    graph breaks. Here: floating-point tensors must be finite, cumulative lengths must start at 0, never decrease and
    end at the number of packed rows, `max_seqlen_q` must cover the longest segment, and every image must have at least
    `budget` candidates.

    Args:
        query, key, value, features, object_scores, deep_scores: floating-point tensors, checked for NaN and infinity.
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32, for packed `query` and `key` [T, H, D], which must be given too.
        max_seqlen_q: the value meant for the varlen operators.
        candidate_mask: [B, N] bool, checked against `budget`.
        budget: tokens kept per image.

    Raises:
        ValueError: naming the argument, what was expected and what came.

    Example:
        >>> check_inputs(object_scores=torch.tensor([[0.1, float("nan")]]))
        Traceback (most recent call last):
        ValueError: object_scores: expected finite values, got 1 NaN and 0 infinite of 2
    """
    tensors = {"query": query, "key": key, "value": value, "features": features}
    for name, tensor in {**tensors, "object_scores": object_scores, "deep_scores": deep_scores}.items():
        if tensor is not None and not bool(tensor.isfinite().all()):
            nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            raise ValueError(
                f"{name}: expected finite values, got {nan} NaN and {infinite} infinite of {tensor.numel()}"
            )
    _check_lengths("cu_seqlens_q", cu_seqlens_q, "query", query)
    _check_lengths("cu_seqlens_k", cu_seqlens_k, "key", key)
    if max_seqlen_q is not None and cu_seqlens_q is not None:
        longest = int(cu_seqlens_q.diff().max()) if len(cu_seqlens_q) > 1 else 0
        if max_seqlen_q < longest:
            raise ValueError(f"max_seqlen_q: expected at least {longest}, the longest segment, got {max_seqlen_q}")
    if candidate_mask is not None and budget is not None:
        fewest = int(torch.atleast_2d(candidate_mask).sum(dim=-1).min()) if len(candidate_mask) else budget
        if fewest < budget:
            raise ValueError(f"candidate_mask: expected at least budget={budget} candidates per image, got {fewest}")


def _check_lengths(name: str, cu_seqlens: Tensor | None, rows_name: str, rows: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    if rows is None:
        raise ValueError(f"{rows_name}: expected the packed tensor that {name} cuts, got None")
    reference.segments(cu_seqlens, rows.shape[0], name)
