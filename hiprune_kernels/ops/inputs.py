"""Value checks that need the device's data; never called on the hot path."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..budget import check_int
from .checks import check_dense, check_floating


def check_inputs(
    *,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    features: Tensor | None = None,
    object_scores: Tensor | None = None,
    deep_scores: Tensor | None = None,
    quality: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    candidate_mask: Tensor | None = None,
    budget: int | None = None,
) -> None:
    """Check what only the data shows, before handing the same arguments to an operator. Synchronises with the device.

    The operators check metadata only (shapes, dtypes, devices), so that they never wait for a GPU and compile without
    graph breaks. Here: floating-point tensors must be finite, a quality must not be negative, cumulative lengths must
    start at 0, never decrease and end at the number of packed rows, `max_seqlen_q` must cover the longest segment, and
    every image must have at least `budget` candidates.

    Args:
        query, key, value, features, object_scores, deep_scores, quality: floating-point tensors, checked for NaN and
            infinity.
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32, for packed `query` and `key` [T, H, D], which must be given too.
        max_seqlen_q: the value meant for the varlen operators.
        candidate_mask: [B, N] bool, checked against `budget`.
        budget: tokens kept per image.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> check_inputs(object_scores=torch.tensor([[0.1, float("nan")]]))
        Traceback (most recent call last):
        ValueError: object_scores: expected finite values, got 1 NaN and 0 infinite of 2
    """
    tensors = {"query": query, "key": key, "value": value, "features": features}
    tensors |= {"object_scores": object_scores, "deep_scores": deep_scores, "quality": quality}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        _check_data(name, tensor)
        if name != "features":  # may be of any dtype
            check_floating(name, tensor)
        tensor = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # float8 has no isfinite
        if not bool(tensor.isfinite().all()):
            nan, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
            raise ValueError(
                f"{name}: expected finite values, got {nan} NaN and {infinite} infinite of {tensor.numel()}"
            )
    if quality is not None and bool((quality < 0).any()):
        raise ValueError(f"quality: expected no negative values, got {int((quality < 0).sum())} of {quality.numel()}")
    _check_lengths("cu_seqlens_q", cu_seqlens_q, "query", query)
    _check_lengths("cu_seqlens_k", cu_seqlens_k, "key", key)
    if max_seqlen_q is not None:
        check_int("max_seqlen_q", max_seqlen_q, least=0)
        longest = int(cu_seqlens_q.diff().max()) if cu_seqlens_q is not None and len(cu_seqlens_q) > 1 else 0
        if max_seqlen_q < longest:
            raise ValueError(f"max_seqlen_q: expected at least {longest}, the longest segment, got {max_seqlen_q}")
    if budget is not None:
        check_int("budget", budget)
    if candidate_mask is not None:
        _check_data("candidate_mask", candidate_mask)
        if candidate_mask.dtype != torch.bool or candidate_mask.dim() not in (1, 2):
            came = f"{candidate_mask.dtype} {tuple(candidate_mask.shape)}"
            raise TypeError(f"candidate_mask: expected bool [B N] or [N], got {came}")
        if budget is not None and len(candidate_mask):
            fewest = int(torch.atleast_2d(candidate_mask).sum(dim=-1).min())
            if fewest < budget:
                expected = f"at least budget={budget} candidates per image"
                raise ValueError(f"candidate_mask: expected {expected}, got {fewest}")


def _check_lengths(name: str, cu_seqlens: Tensor | None, rows_name: str, rows: Tensor | None) -> None:
    if cu_seqlens is None:
        return
    if rows is None:
        raise ValueError(f"{rows_name}: expected the packed tensor that {name} cuts, got None")
    if rows.dim() != 3:
        raise ValueError(f"{rows_name}: expected [T H D], as {name} cuts it, got shape {tuple(rows.shape)}")
    _check_data(name, cu_seqlens)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not len(cu_seqlens):
        raise TypeError(f"{name}: expected int32 [S+1], got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}")
    reference.segments(cu_seqlens, rows.shape[0], name)


def _check_data(name: str, tensor: Tensor) -> None:
    check_dense(name, tensor)
    if tensor.is_meta:
        raise ValueError(f"{name}: expected a tensor with data, got device meta")
