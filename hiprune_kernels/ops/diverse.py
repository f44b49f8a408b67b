"""Diverse selection: tokens that differ most from one another.

From here to the kernel: `select_diverse` -> `torch.ops.hiprune.select_diverse` -> csrc/diverse.cpp, which covers every
CPU call, or kernels/diverse.py on GPUs. What that does not cover (`cuda_kernel_gap`) and devices without a kernel go to
`hiprune_kernels.reference`. The operator takes a batch of images with one count, or packed images with a size and a
count for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..budget import check_int, check_list
from .checks import check_dense, check_floating, check_like, check_mask, check_shape, check_tensor
from .library import NO_TRITON, TRITON, gpu_gap, library, warn_without_cpu_kernels

# ---------------------------------------------------------------------------------------------- public functions


def select_diverse(
    features: Tensor, *, count: int, quality: Tensor | None = None, candidate_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose tokens that differ most from one another, by the cosines between their features.

    Without `quality`, *farthest points* (DivPrune, https://arxiv.org/abs/2503.02175): first the token whose nearest
    other one is farthest away, then, again and again, the one that is farthest from all chosen ones; distances are
    1 - cosine. With it, the greedy MAP of a *determinantal point process* (CDPruner, https://arxiv.org/abs/2506.10967)
    with the kernel K = diag(q) L diag(q), where L are the cosines: each token adds most to the determinant of the part
    of K that belongs to those chosen. Where nobody gains more than 1e-12 of the largest q^2 L, the highest quality is
    next.

    Equal worth: the lowest index wins. No token is chosen twice. Rows of zeros are orthogonal to everything. Which
    tokens are chosen is not defined where features or quality are not finite (`check_inputs` tells).

    Args:
        features: [B, N, C], floating point. Cosines are computed in float32, of float64 features in float64.
        count: tokens chosen per image, in 1..N.
        quality: [B, N], floating point, not negative. A token counts the less the lower it is; its square matters.
        candidate_mask: [B, N] bool, False takes a token out (padding, say): it is not chosen, and nobody's neighbour.

    Returns:
        indices: [B, count] int64, ascending, ready for a gather.
        order: [B, count] int64, the same tokens in the order of choice. The first k are what a count of k gives.
        Where a `candidate_mask` leaves fewer candidates than `count`, -1 fills the end of both. Neither is
        differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> angles = torch.tensor([0.0, 10.0, 90.0, 180.0]).deg2rad()
        >>> features = torch.stack([angles.cos(), angles.sin()], dim=1)
        >>> indices, order = select_diverse(features[None], count=3)
        >>> indices.tolist(), order.tolist()
        ([[0, 2, 3]], [[3, 0, 2]])
    """
    check_tensor("features", features, "B N C")
    size = features.shape[1]
    _check_count("count", count, size)
    _check_tokens(features, quality, candidate_mask, "B N")
    return _select_op(features, quality, candidate_mask, [], [count])


def select_diverse_varlen(
    features: Tensor,
    *,
    sizes: Sequence[int],
    counts: Sequence[int],
    quality: Tensor | None = None,
    candidate_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`select_diverse` for images of different sizes packed one behind the other, each by itself.

    Args:
        features: [T, C], T the sum of the sizes.
        sizes: tokens of each image (host data), each at least 1.
        counts: how many of each are chosen (host data), each in 1..its size.
        quality: [T].
        candidate_mask: [T] bool.

    Returns:
        indices: [sum(counts)] int64 positions in the packed sequence, ascending, ready for `features[indices]`.
        order: [sum(counts)] int64, each image's part in the order of choice.
        Where an image has fewer candidates than its count, -1 fills the end of its part of both.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> features = torch.eye(7)
        >>> select_diverse_varlen(features, sizes=[3, 4], counts=[2, 1], quality=torch.arange(7.0))
        (tensor([1, 2, 6]), tensor([2, 1, 6]))
    """
    check_tensor("features", features, "T C")
    check_list("sizes", sizes)
    check_list("counts", counts)
    for i, size in enumerate(sizes):
        check_int(f"sizes[{i}]", size)
    if sum(sizes) != features.shape[0]:
        raise ValueError(f"sizes: expected a sum of {features.shape[0]}, the rows of features, got {sum(sizes)}")
    if len(counts) != len(sizes):
        raise ValueError(f"counts: expected {len(sizes)}, one per size, got {len(counts)}")
    for i, count in enumerate(counts):
        _check_count(f"counts[{i}]", count, sizes[i])
    _check_tokens(features, quality, candidate_mask, "T")
    return _select_op(features, quality, candidate_mask, list(sizes), list(counts))


# -------------------------------------------------------------------------------------------------------- checks


def _check_count(name: str, count: int, size: int) -> None:
    check_int(name, count)
    if count > size:
        raise ValueError(f"{name}: expected 1..{size}, as many as there are tokens, got {count}")


def _check_tokens(features: Tensor, quality: Tensor | None, candidate_mask: Tensor | None, dims: str) -> None:
    check_floating("features", features)
    shape = tuple(features.shape[:-1])
    if quality is not None:
        check_shape("quality", quality, dims, shape)
        check_floating("quality", quality)
        check_like("quality", quality, "features", features, dtype=False)
    check_mask("candidate_mask", candidate_mask, dims, shape, "features", features)


# ------------------------------------------------------------------------------------------------------ dispatch

# `sizes` is empty where features are a batch.
library.define(
    "select_diverse(Tensor features, Tensor? quality, Tensor? candidate_mask, int[] sizes, int[] counts) -> "
    "(Tensor indices, Tensor order)"
)
_select_op = torch.ops.hiprune.select_diverse.default


@torch.library.impl(library, "select_diverse", "CompositeExplicitAutograd")
def _select_reference(features, quality, candidate_mask, sizes, counts):
    check_dense("features", features)
    if features.device.type == "cpu":
        warn_without_cpu_kernels()
    options = {"quality": quality, "candidate_mask": candidate_mask}
    if features.dim() == 3:
        return reference.select_diverse(features, count=counts[0], **options)
    return reference.select_diverse_varlen(features, sizes=sizes, counts=counts, **options)


def cuda_kernel_gap(dtype: torch.dtype, most_tokens: int) -> str:
    """Why kernels/diverse.py does not cover a CUDA call, or "" where it does. `most_tokens`: of the largest image.

    The reference serves what it does not cover; it synchronises, and cannot be captured in a CUDA graph.
    """
    if not TRITON:
        return NO_TRITON
    from ..kernels.diverse import MAX_TOKENS

    if dtype == torch.float64:
        return "features of float64"
    return "" if most_tokens <= MAX_TOKENS else f"an image of {most_tokens} tokens, above {MAX_TOKENS}"


@torch.library.impl(library, "select_diverse", "CUDA")
def _select_cuda(features, quality, candidate_mask, sizes, counts):
    most = features.shape[1] if features.dim() == 3 else max(sizes, default=0)
    if cuda_kernel_gap(features.dtype, most) or gpu_gap(features.device):
        return _select_reference(features, quality, candidate_mask, sizes, counts)
    from ..kernels import diverse

    with torch.cuda.device_of(features):
        return diverse.select_diverse(features, quality, candidate_mask, sizes, counts)


@torch.library.register_fake("hiprune::select_diverse", lib=library)
def _select_fake(features, quality, candidate_mask, sizes, counts):
    shape = (features.shape[0], counts[0]) if features.dim() == 3 else (sum(counts),)
    return features.new_empty(shape, dtype=torch.int64), features.new_empty(shape, dtype=torch.int64)
