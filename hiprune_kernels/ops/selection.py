"""Token selection: anchors, buffers, registers, and the gather of their rows.

From here to the kernel: `prune_tokens` -> `torch.ops.hiprune.prune_tokens` -> csrc/selection.cpp, which covers every
CPU call, or kernels/selection.py on GPUs. What that does not cover (`cuda_kernel_gap`) and devices without a kernel go
to `hiprune_kernels.reference`. The operators take one grid and one budget per packed image; two-dimensional scores are
a batch that shares both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..budget import ROLE_NAMES, SelectionPlan, check_budget, check_grid, plan_selection
from .checks import FLOATING, check_dense, check_floating, check_like, check_mask, check_shape, check_tensor
from .library import NO_TRITON, TRITON, library, transformed, warn_without_cpu_kernels

# ---------------------------------------------------------------------------------------------- public functions


def select_tokens(
    object_scores: Tensor,
    deep_scores: Tensor,
    *,
    budget: int,
    alpha: float = 0.1,
    grid: Sequence[int],
    rule: str = "paper",
    neighborhood: str = "cross",
    num_prefix_tokens: int = 0,
    candidate_mask: Tensor | None = None,
    keep_roles: Sequence[str] = ROLE_NAMES,
) -> tuple[Tensor, Tensor]:
    """Choose the visual tokens that HiPrune keeps (Eq. 4 to 7 and Algorithm 1 of the paper).

    *Anchors* are the best tokens by object score, *buffers* their neighbours on the grid, *registers* the best of the
    others by deep score, until `budget` tokens are kept. Equal scores: the lowest index wins. NaN scores rank last.

    Args:
        object_scores: [B, P + N] column scores of the object layer, floating point; P = `num_prefix_tokens`.
        deep_scores: [B, P + N] column scores of the deep layer.
        budget: tokens kept per image, N' in 1..N.
        alpha: share of the budget given to anchors and buffers, in [0, 1].
        grid: (h, w), or (t, h, w) for video (neighbours within a frame), with product N, in raster order.
        rule: "paper"; "official", the authors' released LLaVA code, made for column *means* over the queries;
            "official_qwen", their Qwen code: the same on column sums, where a kept token can be picked again and fewer
            than `budget` survive; "grid": as "paper", with neighbours that never leave the grid or wrap over row ends.
        neighborhood: "cross" (4 neighbours), "square" (8), "row" (2) or "none".
        num_prefix_tokens: leading columns (CLS, register tokens) that are no candidates.
        candidate_mask: [B, N] bool, False takes a token out (padding, say).
        keep_roles: which kinds to use, of ("anchor", "buffer", "register"). Without "register", alpha acts as 1 and the
            best remaining object scores fill the budget as anchors.

    Returns:
        indices: [B, budget] int64, ascending, counting candidates (prefix excluded). Where fewer tokens survive
            ("official_qwen", or a `candidate_mask` with fewer candidates than the budget), -1 fills the end.
        roles: [B, N] uint8: 0 dropped, 1 anchor, 2 buffer, 3 register.
        Neither is differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> scores = torch.rand(1, 577)
        >>> indices, roles = select_tokens(scores, scores, budget=192, grid=(24, 24), num_prefix_tokens=1)
        >>> indices.shape, int((roles == 1).sum())
        (torch.Size([1, 192]), 4)
    """
    plan = _check_dense(
        object_scores,
        deep_scores,
        budget,
        alpha,
        grid,
        rule,
        neighborhood,
        num_prefix_tokens,
        candidate_mask,
        keep_roles,
    )
    return _select_op(object_scores, deep_scores, candidate_mask, plan)


def prune_tokens(
    features: Tensor,
    object_scores: Tensor,
    deep_scores: Tensor,
    *,
    budget: int,
    alpha: float = 0.1,
    grid: Sequence[int],
    rule: str = "paper",
    neighborhood: str = "cross",
    num_prefix_tokens: int = 0,
    candidate_mask: Tensor | None = None,
    keep_roles: Sequence[str] = ROLE_NAMES,
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_tokens` and the kept rows of `features` (Eq. 8), in one kernel.

    Args:
        features: [B, P + N, C], any dtype; the P prefix rows are skipped, never kept.
        object_scores, deep_scores, and every option: as in `select_tokens`.

    Returns:
        kept: [B, budget, C], differentiable in `features`; zero rows where an index is -1.
        indices, roles: as in `select_tokens`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> scores, features = torch.rand(1, 576), torch.randn(1, 576, 1024)
        >>> kept, indices, roles = prune_tokens(features, scores, scores, budget=64, grid=(24, 24))
        >>> torch.equal(kept[0], features[0, indices[0]])
        True
    """
    plan = _check_dense(
        object_scores,
        deep_scores,
        budget,
        alpha,
        grid,
        rule,
        neighborhood,
        num_prefix_tokens,
        candidate_mask,
        keep_roles,
    )
    _check_features(features, "B P+N C", object_scores)
    return _prune(features, object_scores, deep_scores, candidate_mask, plan)


def select_tokens_varlen(
    object_scores: Tensor,
    deep_scores: Tensor,
    *,
    grids: Sequence[Sequence[int]],
    budgets: Sequence[int],
    alpha: float = 0.1,
    rule: str = "paper",
    neighborhood: str = "cross",
    candidate_mask: Tensor | None = None,
    keep_roles: Sequence[str] = ROLE_NAMES,
) -> tuple[Tensor, Tensor]:
    """`select_tokens` for images of different sizes packed one behind the other, each with its own grid and budget.

    Args:
        object_scores, deep_scores: [T] column scores, T the sum of the grids' products; candidates only, no prefix.
        grids: one (h, w) or (t, h, w) per image (host data).
        budgets: one number of kept tokens per image (host data), each in 1..its N.
        alpha, rule, neighborhood, keep_roles: as in `select_tokens`.
        candidate_mask: [T] bool.

    Returns:
        indices: [sum(budgets)] int64 positions in the packed sequence, ascending, ready for `features[indices]`; -1 at
            the end of an image's part where fewer survive.
        roles: [T] uint8.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> scores = torch.rand(12 * 16 + 8 * 8)
        >>> indices, roles = select_tokens_varlen(scores, scores, grids=[(12, 16), (8, 8)], budgets=[64, 21])
        >>> indices.shape
        torch.Size([85])
    """
    plan = _check_packed(
        object_scores, deep_scores, grids, budgets, alpha, rule, neighborhood, candidate_mask, keep_roles
    )
    return _select_op(object_scores, deep_scores, candidate_mask, plan)


def prune_tokens_varlen(
    features: Tensor,
    object_scores: Tensor,
    deep_scores: Tensor,
    *,
    grids: Sequence[Sequence[int]],
    budgets: Sequence[int],
    alpha: float = 0.1,
    rule: str = "paper",
    neighborhood: str = "cross",
    candidate_mask: Tensor | None = None,
    keep_roles: Sequence[str] = ROLE_NAMES,
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_tokens_varlen` and the kept rows of the packed `features`, in one kernel.

    Args:
        features: [T, C], any dtype.
        object_scores, deep_scores, and every option: as in `select_tokens_varlen`.

    Returns:
        kept: [sum(budgets), C], differentiable in `features`; zero rows where an index is -1.
        indices, roles: as in `select_tokens_varlen`.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> scores, features = torch.rand(100), torch.randn(100, 32)
        >>> kept, indices, _ = prune_tokens_varlen(features, scores, scores, grids=[(6, 6), (8, 8)], budgets=[9, 16])
        >>> torch.equal(kept, features[indices])
        True
    """
    plan = _check_packed(
        object_scores, deep_scores, grids, budgets, alpha, rule, neighborhood, candidate_mask, keep_roles
    )
    _check_features(features, "T C", object_scores)
    return _prune(features, object_scores, deep_scores, candidate_mask, plan)


def _prune(features, object_scores, deep_scores, candidate_mask, plan) -> tuple[Tensor, Tensor, Tensor]:
    if (features.requires_grad and torch.is_grad_enabled()) or transformed():
        # The fused operator has no derivative (one in Python would cost more than the kernel); PyTorch's gather has.
        check_dense("features", features)
        indices, roles = _select_op(object_scores, deep_scores, candidate_mask, plan)
        return (
            reference.gather_rows(features[..., SelectionPlan.from_flat(plan).num_prefix_tokens :, :], indices),
            indices,
            roles,
        )
    return _prune_op(features, object_scores, deep_scores, candidate_mask, plan)


# -------------------------------------------------------------------------------------------------------- checks


# The kernel takes a microsecond, each of these checks a tenth of one. So the usual case passes in few tests, and what
# an image's sizes and options come to is worked out once. Where something is wrong, the slower checks say what.


def _check_scores(object_scores, deep_scores, candidate_mask, dims: str, num_prefix_tokens: int, count: int) -> None:
    if candidate_mask is None and isinstance(object_scores, Tensor) and isinstance(deep_scores, Tensor):
        try:
            shape, dtype = object_scores.shape, object_scores.dtype
            if (
                len(shape) == 1 + (" " in dims)
                and shape[-1] == num_prefix_tokens + count
                and shape == deep_scores.shape
                and dtype in FLOATING
                and dtype == deep_scores.dtype
                and object_scores.device == deep_scores.device
            ):
                return
        except RuntimeError:  # a nested tensor has no shape
            pass
    check_tensor("object_scores", object_scores, dims)
    check_floating("object_scores", object_scores)
    shape = object_scores.shape
    if shape[-1] != num_prefix_tokens + count:
        raise ValueError(
            f"object_scores: expected {num_prefix_tokens + count} columns (prefix and grid), got shape {tuple(shape)}"
        )
    check_shape("deep_scores", deep_scores, dims, shape)
    check_like("deep_scores", deep_scores, "object_scores", object_scores)
    if candidate_mask is not None:
        dims = "B N" if len(shape) == 2 else "T"
        check_mask("candidate_mask", candidate_mask, dims, (*shape[:-1], count), "scores", object_scores)


def _check_features(features, dims: str, object_scores) -> None:
    try:
        if (
            isinstance(features, Tensor)
            and features.shape[:-1] == object_scores.shape
            and features.device == object_scores.device
        ):
            return
    except RuntimeError:
        pass
    check_tensor("features", features, dims)
    check_shape("features", features, dims, (*object_scores.shape, features.shape[-1]))
    check_like("features", features, "object_scores", object_scores, dtype=False)


def _plan_dense(budget, alpha, rule, neighborhood, keep_roles, num_prefix_tokens, grid) -> tuple[tuple[int, ...], int]:
    """The plan as the operators take it, and the number of candidates."""
    sides = check_grid("grid", grid)
    check_budget("budget", budget, sides)
    plan = plan_selection((sides,), (budget,), alpha, rule, neighborhood, keep_roles, num_prefix_tokens)
    return tuple(plan), math.prod(sides)


@functools.lru_cache(maxsize=1024, typed=True)  # typed, and the sides one by one: 24.0 equals 24, but is no size
def _cached_plan(budget, alpha, rule, neighborhood, keep_roles, num_prefix_tokens, *grid):
    return _plan_dense(budget, alpha, rule, neighborhood, keep_roles, num_prefix_tokens, grid)


def _check_dense(
    object_scores, deep_scores, budget, alpha, grid, rule, neighborhood, num_prefix_tokens, candidate_mask, keep_roles
) -> tuple[int, ...]:
    # A set would become a grid as it is cut up below; and torch.compile traces no cache.
    cacheable = (type(grid) is tuple or type(grid) is list) and not torch.compiler.is_compiling()
    options = budget, alpha, rule, neighborhood, keep_roles, num_prefix_tokens
    try:
        plan, count = _cached_plan(*options, *grid) if cacheable else (None, 0)
    except TypeError:  # a list, which cannot be looked up; or an error that comes again below, and then alone
        plan = None
    if plan is None:
        plan, count = _plan_dense(*options, grid)
    _check_scores(object_scores, deep_scores, candidate_mask, "B P+N", num_prefix_tokens, count)
    return plan


def _check_packed(
    object_scores, deep_scores, grids, budgets, alpha, rule, neighborhood, candidate_mask, keep_roles
) -> list[int]:
    plan = plan_selection(grids, budgets, alpha, rule, neighborhood, keep_roles)
    _check_scores(object_scores, deep_scores, candidate_mask, "T", 0, sum(map(math.prod, grids)))
    return plan


# ------------------------------------------------------------------------------------------------------ dispatch

# csrc/selection.cpp serves both on CPUs, whole (no Python in between: the kernel takes microseconds). `plan` is
# `budget.plan_selection`'s list.
_ARGUMENTS = "Tensor object_scores, Tensor deep_scores, Tensor? candidate_mask, int[] plan"
library.define(f"select_tokens({_ARGUMENTS}) -> (Tensor indices, Tensor roles)")
library.define(f"prune_tokens(Tensor features, {_ARGUMENTS}) -> (Tensor kept, Tensor indices, Tensor roles)")
_select_op, _prune_op = torch.ops.hiprune.select_tokens.default, torch.ops.hiprune.prune_tokens.default


@torch.library.impl(library, "select_tokens", "CompositeExplicitAutograd")
def _select_reference(object_scores, deep_scores, candidate_mask, plan):
    _check_reference(object_scores=object_scores, deep_scores=deep_scores)
    return reference.select_planned(object_scores, deep_scores, candidate_mask, SelectionPlan.from_flat(plan))


@torch.library.impl(library, "prune_tokens", "CompositeExplicitAutograd")
def _prune_reference(features, object_scores, deep_scores, candidate_mask, plan):
    _check_reference(features=features, object_scores=object_scores, deep_scores=deep_scores)
    plan = SelectionPlan.from_flat(plan)
    return reference.prune_planned(features, object_scores, deep_scores, candidate_mask, plan)


def _check_reference(object_scores: Tensor, **others: Tensor) -> None:
    """Sparse and quantized tensors come to the reference on any device: checked here, they cost the kernels nothing."""
    for name, tensor in {"object_scores": object_scores, **others}.items():
        check_dense(name, tensor)
    if object_scores.device.type == "cpu":
        warn_without_cpu_kernels()


def cuda_kernel_gap(plan: SelectionPlan) -> str:
    """Why kernels/selection.py does not cover a CUDA call, or "" where it does.

    The reference serves what it does not cover; it synchronises, and cannot be captured in a CUDA graph.
    """
    if not TRITON:
        return NO_TRITON
    from ..kernels.selection import MAX_TOKENS

    most = max((image.frames * image.height * image.width for image in plan.images), default=0)
    return "" if most <= MAX_TOKENS else f"an image of {most} tokens, above {MAX_TOKENS}"


@functools.lru_cache(maxsize=1024)
def _cuda_plan(plan: tuple[int, ...]) -> SelectionPlan | None:
    """What the kernel gets, or None where it does not cover the plan."""
    decoded = SelectionPlan.from_flat(plan)
    return None if cuda_kernel_gap(decoded) else decoded


@torch.library.impl(library, "select_tokens", "CUDA")
def _select_cuda(object_scores, deep_scores, candidate_mask, plan):
    decoded = _cuda_plan(tuple(plan))
    if decoded is None:
        return _select_reference(object_scores, deep_scores, candidate_mask, plan)
    from ..kernels import selection

    scores = object_scores.unsqueeze(-2), deep_scores.unsqueeze(-2)  # the kernel also takes partial sums
    with torch.cuda.device_of(object_scores):
        return selection.select_tokens(*scores, candidate_mask, decoded)


@torch.library.impl(library, "prune_tokens", "CUDA")
def _prune_cuda(features, object_scores, deep_scores, candidate_mask, plan):
    decoded = _cuda_plan(tuple(plan))
    if decoded is None:
        return _prune_reference(features, object_scores, deep_scores, candidate_mask, plan)
    from ..kernels import selection

    scores = object_scores.unsqueeze(-2), deep_scores.unsqueeze(-2)
    with torch.cuda.device_of(object_scores):
        return selection.prune_tokens(features, *scores, candidate_mask, decoded)


@torch.library.register_fake("hiprune::select_tokens", lib=library)
def _select_fake(object_scores, deep_scores, candidate_mask, plan):
    plan = SelectionPlan.from_flat(plan)
    lead, tokens = object_scores.shape[:-1], object_scores.shape[-1] - plan.num_prefix_tokens
    indices = object_scores.new_empty(*lead, sum(image.budget for image in plan.images), dtype=torch.int64)
    return indices, object_scores.new_empty(*lead, tokens, dtype=torch.uint8)


@torch.library.register_fake("hiprune::prune_tokens", lib=library)
def _prune_fake(features, *arguments):
    indices, roles = _select_fake(*arguments)
    return features.new_empty(*indices.shape, features.shape[-1]), indices, roles
