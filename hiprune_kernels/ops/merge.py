"""Merging of tokens: every source goes to the target that its key is most like, and is averaged into it.

From here to the kernel: `merge_tokens` -> `torch.ops.hiprune.merge_tokens` -> csrc/merge.cpp (`cpu_merge_gap` says what
it does not cover) or kernels/merge.py on GPUs (`cuda_merge_gap`); the rest goes to `hiprune_kernels.reference`. The
operator takes a batch, [B, N, C], or packed images, [T, C], with their sizes and numbers of targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..budget import check_int, check_list
from .checks import check_bool, check_floating, check_like, check_mask, check_shape, check_tensor
from .library import CPU_KERNELS, NO_CPU_KERNELS, NO_TRITON, TRITON, library, transformed, warn_without_cpu_kernels

_COVERED = (torch.float32, torch.bfloat16, torch.float16)


# ---------------------------------------------------------------------------------------------- public functions


def merge_tokens(
    features: Tensor, keys: Tensor, targets: Tensor, sources: Tensor, *, rows_only: bool = False
) -> tuple[Tensor, Tensor]:
    """Merge tokens into others of their image, as VisionZip does (Yang et al., CVPR 2025, contextual tokens).

    A source is assigned to the target whose key has the largest cosine with its own; of equals, to the one that stands
    first in `targets`. A target's row becomes its features and the mean of those of its sources, ``x_t + mean(x_s)``;
    the target is not in the mean, and one without sources stays what it is. Sums are taken in float32, in the order of
    the tokens.

    Args:
        features: [B, N, C] floating point.
        keys: [B, N, D] floating point (VisionZip: the keys of an encoder layer, averaged over heads). A key of zeros
            has cosine 0 with all; cosines that are not finite come last.
        targets: [B, c] int64, indices of tokens, in any order. What is no index of a token (-1, say) is no target.
        sources: [B, N] bool, the tokens to merge. Targets are no sources, whatever this says of them.
        rows_only: return the rows of the targets alone, which takes less time.

    Returns:
        merged: [B, N, C], the features with the targets' rows replaced: what `Method.merge` returns. With `rows_only`,
            [B, c, C]: the targets' rows, zeros for what is no target. Differentiable in `features`.
        assigned: [B, N] int64, for each source the position in `targets` that it went to, -1 for other tokens. Not
            differentiable, and no gradient goes through the choice.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> features = torch.tensor([[[0.0], [10.0], [20.0], [30.0]]])
        >>> keys = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 2.0], [0.0, 1.0]]])
        >>> sources = torch.tensor([[False, False, True, False]])
        >>> merged, assigned = merge_tokens(features, keys, torch.tensor([[1, 3]]), sources)
        >>> merged.flatten().tolist(), assigned.tolist()
        ([0.0, 10.0, 20.0, 50.0], [[-1, -1, 1, -1]])
    """
    _check(features, keys, targets, sources, rows_only, "B N", "B c")
    check_shape("targets", targets, "B c", (features.shape[0], targets.shape[1]))
    return _merge(features, keys, targets, sources, (), (), rows_only)


def merge_tokens_varlen(
    features: Tensor,
    keys: Tensor,
    targets: Tensor,
    sources: Tensor,
    *,
    sizes: Sequence[int],
    counts: Sequence[int],
    rows_only: bool = False,
) -> tuple[Tensor, Tensor]:
    """`merge_tokens` for images of different sizes packed one behind the other; tokens stay in their image.

    Args:
        features: [T, C] floating point.
        keys: [T, D] floating point.
        targets: [M] int64, indices into T, image by image. What is no index of a token of its image is no target.
        sources: [T] bool.
        sizes: tokens of each image (host data), with sum T.
        counts: targets of each image (host data), with sum M.
        rows_only: return the rows of the targets alone.

    Returns:
        merged: [T, C] or, with `rows_only`, [M, C].
        assigned: [T] int64, positions in `targets` (0 to M - 1), or -1.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> features, keys, targets = torch.randn(100, 32), torch.randn(100, 8), torch.tensor([0, 9, 40])
        >>> sources = torch.arange(100) > 1
        >>> merged, _ = merge_tokens_varlen(features, keys, targets, sources, sizes=[36, 64], counts=[2, 1])
        >>> torch.equal(merged[1], features[1]), torch.equal(merged[0], features[0])
        (True, False)
    """
    for name, values in (("sizes", sizes), ("counts", counts)):
        check_list(name, values)
        for i, value in enumerate(values):
            check_int(f"{name}[{i}]", value, least=0)
    if len(counts) != len(sizes):
        raise ValueError(f"counts: expected {len(sizes)}, one for each image, got {len(counts)}")
    _check(features, keys, targets, sources, rows_only, "T", "M")
    if len(features) != sum(sizes):
        raise ValueError(f"sizes: expected a sum of {len(features)}, the rows of features, got {sum(sizes)}")
    check_shape("targets", targets, "M", (sum(counts),))
    return _merge(features, keys, targets, sources, sizes, counts, rows_only)


def _check(
    features: Tensor, keys: Tensor, targets: Tensor, sources: Tensor, rows_only: bool, rows: str, columns: str
) -> None:
    check_tensor("features", features, f"{rows} C")
    check_floating("features", features)
    check_tensor("keys", keys, f"{rows} D")
    check_floating("keys", keys)
    check_shape("keys", keys, f"{rows} D", (*features.shape[:-1], keys.shape[-1]))
    check_like("keys", keys, "features", features, dtype=False)
    check_tensor("targets", targets, columns)
    if targets.dtype != torch.int64:
        raise TypeError(f"targets: expected int64, got {targets.dtype}")
    check_like("targets", targets, "features", features, dtype=False)
    check_tensor("sources", sources, rows)
    check_mask("sources", sources, rows, tuple(features.shape[:-1]), "features", features)
    check_bool("rows_only", rows_only)


def _merge(
    features: Tensor,
    keys: Tensor,
    targets: Tensor,
    sources: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    rows_only: bool,
) -> tuple[Tensor, Tensor]:
    if transformed():
        return reference.merge_tokens(features, keys, targets, sources, sizes, counts, rows_only)
    keys = keys.detach() if keys.requires_grad else keys
    if features.requires_grad and torch.is_grad_enabled():
        return _Merge.apply(features, keys, targets, sources, sizes, counts, rows_only)
    return _merge_op(features, keys, targets, sources, sizes, counts, rows_only)


class _Merge(torch.autograd.Function):
    """The operator with its derivative. Both are gathers of rows, and so have the same bits in every run."""

    @staticmethod
    def forward(ctx: Any, features, keys, targets, sources, sizes, counts, rows_only):
        merged, assigned = _merge_op(features.detach(), keys, targets, sources, sizes, counts, rows_only)
        ctx.mark_non_differentiable(assigned)
        ctx.save_for_backward(targets, assigned)
        ctx.rows_only, ctx.sizes, ctx.counts = rows_only, sizes, counts
        return merged, assigned

    @staticmethod
    def backward(ctx: Any, gradient, _):
        targets, assigned = ctx.saved_tensors
        gradient = _gradient(gradient, targets, assigned, ctx.sizes, ctx.counts, ctx.rows_only)
        return (gradient, *[None] * 6)


def _gradient(
    gradient: Tensor,
    targets: Tensor,
    assigned: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    rows_only: bool,
) -> Tensor:
    """Of the features: a target's passes through, and goes in equal parts to its sources."""
    tokens, number = assigned.shape[-1], targets.shape[-1]
    own = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    targets = _inside(targets, sizes, counts, tokens)
    # Row `tokens` stands for no token, and position `number` for no target.
    to = targets.where(targets >= 0, tokens)[..., None].expand(*targets.shape, own.shape[-1])
    if rows_only:
        of_targets = own
        shape = (*assigned.shape[:-1], tokens + 1, own.shape[-1])
        own = own.new_zeros(shape).scatter_add(-2, to, of_targets)[..., :tokens, :]
    else:
        of_targets = F.pad(own, (0, 0, 0, 1)).gather(-2, to)
    at = assigned.where(assigned >= 0, number)
    members = F.one_hot(at, number + 1).sum(dim=-2)[..., :-1, None]
    parts = F.pad(of_targets / members.clamp(min=1), (0, 0, 0, 1))
    return (own + parts.gather(-2, at[..., None].expand(*at.shape, own.shape[-1]))).to(gradient.dtype)


def _inside(targets: Tensor, sizes: Sequence[int], counts: Sequence[int], tokens: int) -> Tensor:
    """The targets, -1 where they are no token of their image."""
    if not sizes:
        return targets.where((targets >= 0) & (targets < tokens), -1)
    parts, first = [], 0
    for size, part in zip(sizes, targets.split(list(counts))):
        parts.append(part.where((part >= first) & (part < first + size), -1))
        first += size
    return torch.cat(parts)


# ------------------------------------------------------------------------------------------------------ dispatch

library.define(
    "merge_tokens(Tensor features, Tensor keys, Tensor targets, Tensor sources, int[] sizes, int[] counts, "
    "bool rows_only) -> (Tensor merged, Tensor assigned)"
)
_merge_op = torch.ops.hiprune.merge_tokens.default


def cpu_merge_gap(features: Tensor, keys: Tensor) -> str:
    """Why csrc/merge.cpp does not cover a CPU call, or "" where it does."""
    if not CPU_KERNELS:
        return NO_CPU_KERNELS
    for name, tensor in (("features", features), ("keys", keys)):
        if tensor.dtype not in _COVERED:
            return f"{name} of {tensor.dtype}"
    return ""


@torch.library.impl(library, "merge_tokens", "CompositeExplicitAutograd")
def _merge_reference(features, keys, targets, sources, sizes, counts, rows_only):
    return reference.merge_tokens(features, keys, targets, sources, sizes, counts, rows_only)


@torch.library.impl(library, "merge_tokens", "CPU")
def _merge_cpu(features, keys, targets, sources, sizes, counts, rows_only):
    if not CPU_KERNELS:
        warn_without_cpu_kernels()
    if cpu_merge_gap(features, keys):
        return _merge_reference(features, keys, targets, sources, sizes, counts, rows_only)
    return torch.ops.hiprune._cpu_merge_tokens(features, keys, targets, sources, sizes, counts, rows_only, 2)


def cuda_merge_gap(features: Tensor, keys: Tensor, sizes: Sequence[int], counts: Sequence[int]) -> str:
    """Why kernels/merge.py does not cover a CUDA call with these images, or "" where it does."""
    if not TRITON:
        return NO_TRITON
    for name, tensor in (("features", features), ("keys", keys)):
        if tensor.dtype not in _COVERED:
            return f"{name} of {tensor.dtype}"
    from ..kernels.merge import merge_gap

    return merge_gap(sizes, counts)


@torch.library.impl(library, "merge_tokens", "CUDA")
def _merge_cuda(features, keys, targets, sources, sizes, counts, rows_only):
    if features.dim() == 3:
        sizes, counts = [features.shape[1]] * len(features), [targets.shape[1]] * len(features)
    if cuda_merge_gap(features, keys, sizes, counts):
        return _merge_reference(features, keys, targets, sources, sizes, counts, rows_only)
    from ..kernels import merge

    with torch.cuda.device_of(features):
        return merge.merge_tokens(features, keys, targets, sources, sizes, counts, rows_only)


@torch.library.register_fake("hiprune::merge_tokens", lib=library)
def _merge_fake(features, keys, targets, sources, sizes, counts, rows_only):
    shape = (*targets.shape, features.shape[-1]) if rows_only else features.shape
    return features.new_empty(shape), targets.new_empty(sources.shape)
