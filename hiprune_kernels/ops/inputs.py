"""Value checks that need the device's data; never called on the hot path."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..budget import check_int
from .checks import check_dense, check_floating, check_shape
from .segments import check_integers, check_segments


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
    scores: Tensor | None = None,
    keys: Tensor | None = None,
    weights: Tensor | None = None,
    budgets: Tensor | None = None,
    sizes: Sequence[int] | None = None,
    tiles: Sequence[int] | None = None,
    totals: Sequence[int] | None = None,
) -> None:
    """Check what only the data shows, before handing the same arguments to an operator. Synchronises with the device.

    The operators check metadata only (shapes, dtypes, devices), so that they never wait for a GPU and compile without
    graph breaks. Here: floating-point tensors must be finite, cumulative lengths must start at 0, never decrease and
    end at the number of packed rows, `max_seqlen_q` must cover the longest segment, and every image must have at least
    `budget` candidates. Weights and a quality must not be negative; budgets on the device must be what their segments
    can give, and come to the totals of their images.

    Args:
        query, key, value, features, object_scores, deep_scores, scores, keys, weights, quality: floating-point tensors,
            checked for NaN and infinity.
        cu_seqlens_q, cu_seqlens_k: [S + 1] int32, for packed `query` and `key` [T, H, D], which must be given too.
        max_seqlen_q: the value meant for the varlen operators.
        candidate_mask: [B, N] bool, checked against `budget`; or [T], against `budgets`.
        budget: tokens kept per image.
        budgets, sizes, tiles, totals: as in `select_top_segments`; with the first one all are needed.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> check_inputs(object_scores=torch.tensor([[0.1, float("nan")]]))
        Traceback (most recent call last):
        ValueError: object_scores: expected finite values, got 1 NaN and 0 infinite of 2
    """
    tensors = {"query": query, "key": key, "value": value, "features": features}
    tensors |= {"object_scores": object_scores, "deep_scores": deep_scores, "scores": scores, "keys": keys}
    for name, tensor in {**tensors, "weights": weights, "quality": quality}.items():
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
        if name == "weights" and bool((tensor < 0).any()):
            raise ValueError(f"weights: expected at least 0, got {float(tensor.min())}")
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
    if budgets is not None:
        _check_budgets(budgets, sizes, tiles, totals, candidate_mask)


def _check_budgets(budgets: Tensor, sizes: Any, tiles: Any, totals: Any, candidate_mask: Tensor | None) -> None:
    check_segments(sizes, tiles, totals)
    _check_data("budgets", budgets)
    check_integers("budgets", budgets, len(sizes), "budgets", budgets)
    room = list(sizes)
    if candidate_mask is not None:
        check_shape("candidate_mask", candidate_mask, "T", (sum(sizes),))
        room = [int(part.sum()) for part in candidate_mask.split(room)]
    values = budgets.tolist()
    for r, (value, most) in enumerate(zip(values, room)):
        if not 0 <= value <= most:
            raise ValueError(f"budgets: expected 0..{most}, the candidates of segment {r}, got {value}")
    parts = iter(values)
    for i, (count, total) in enumerate(zip(tiles, totals)):
        found = sum(itertools.islice(parts, count))
        if found != total:
            raise ValueError(f"budgets: expected a sum of {total}, the total of image {i}, got {found}")


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
