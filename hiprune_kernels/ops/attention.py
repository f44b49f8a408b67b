"""Column-sum attention scores, alone or together with the attention output.

From here to the kernel: `attention_with_scores` -> `torch.ops.hiprune.attention_with_scores` -> `_with_scores_cpu` ->
csrc/attention.cpp, or `_with_scores_cuda` -> kernels/attention.py. What the kernels do not cover (`cpu_kernel_gap`,
`cuda_kernel_gap`) and devices without a kernel go to `hiprune_kernels.reference`. The operators take dense tensors
[B, H, M, D], or packed [T, H, D] with `cu_seqlens_q`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..budget import check_choice, check_int
from .checks import check_bool, check_floating, check_like, check_mask, check_scale, check_shape, check_tensor
from .library import (
    CPU_KERNELS,
    NO_CPU_KERNELS,
    compute_capability,
    gpu_gap,
    library,
    transformed,
    warn_without_cpu_kernels,
)

REDUCTIONS = ("sum", "mean", "max")

# ---------------------------------------------------------------------------------------------- public functions


def attention_with_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output and its column scores (Eq. 1 and 2 of the paper) without an N x N matrix.

    Where PyTorch wants more than a gradient, the reference computes it, which has that matrix: for gradients of
    gradients, forward-mode differentiation, and within transforms of `torch.func` (where scores have derivatives too).

    Args:
        query: [B, Hq, M, D] float32, bfloat16, float16 or float64 (float64 through the reference); any strides, fastest
            with a contiguous last dimension.
        key, value: [B, Hk, N, D], Hq a multiple of Hk (grouped-query attention).
        scale: finite factor of the logits, D ** -0.5 by default.
        causal: right-aligned: query m sees key n if n <= m + N - M.
        key_mask: [B, N] bool, False hides a key from every query: neither it nor its value is read, so both may be NaN.
            (`causal` alone promises less: a NaN in a value that only later queries see may reach the others' output.)
        query_mask: [B, M] bool, a False query adds nothing to the scores; its output is what it would be anyway. Padded
            self-attention passes the same mask as both.

    Returns:
        output: [B, Hq, M, D] in the query's dtype, laid out in memory as [B, M, Hq, D]; zero for a query that sees no
            key. Differentiable in query, key and value.
        scores: [B, N] float32 (float64 for float64): the attention each key receives, summed over the queries and
            averaged over the heads. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> query, key, value = torch.randn(3, 1, 16, 577, 64)
        >>> output, scores = attention_with_scores(query, key, value)
        >>> output.shape, scores.shape, round(float(scores.sum()))
        (torch.Size([1, 16, 577, 64]), torch.Size([1, 577]), 577)
    """
    _check_dense(query, key, scale, causal, key_mask, query_mask)
    _check_value(value, "B Hk N D", query, key)
    return (_with_scores_reference if transformed() else _with_scores_op)(
        query,
        key,
        value,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        scale=scale,
        causal=causal,
        key_mask=key_mask,
        query_mask=query_mask,
    )


def attention_scores(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    query_reduction: str = "sum",
    head_reduction: str = "mean",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """Column scores of an attention matrix (Eq. 2 of the paper), without the matrix and without the output.

    Heads are reduced first, then queries (with "max" the order matters). Sharded heads: "sum", all-reduce, divide by
    the number of all heads; exact for the query reductions "sum" and "mean".

    Args:
        query, key, scale, causal, key_mask, query_mask: as in `attention_with_scores`. The scores of one query row, the
            CLS row say, are those of `query[:, :, :1]`.
        query_reduction: "sum"; "mean", which divides by the number of counted queries that may see the key; or "max".
        head_reduction: "mean", "sum" or "max".

    Returns:
        scores: [B, N] float32 (float64 for float64); 0 for a key that no counted query sees. Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> query, key = torch.randn(2, 1, 16, 577, 64)
        >>> attention_scores(query, key).shape, attention_scores(query[:, :, :1], key).shape
        (torch.Size([1, 577]), torch.Size([1, 577]))
    """
    _check_dense(query, key, scale, causal, key_mask, query_mask)
    check_choice("head_reduction", head_reduction, REDUCTIONS)
    return _scores(query, key, scale, causal, query_reduction, head_reduction, key_mask, query_mask)


def attention_scores_per_head(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    query_reduction: str = "sum",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """`attention_scores` with the heads left apart.

    Args:
        query, key, scale, causal, query_reduction, key_mask, query_mask: as in `attention_scores`.

    Returns:
        scores: [B, Hq, N] float32 (float64 for float64). Not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> query, key = torch.randn(1, 8, 5, 64), torch.randn(1, 2, 40, 64)
        >>> attention_scores_per_head(query, key, causal=True, query_reduction="max").shape
        torch.Size([1, 8, 40])
    """
    _check_dense(query, key, scale, causal, key_mask, query_mask)
    return _scores(query, key, scale, causal, query_reduction, "none", key_mask, query_mask)


def attention_with_scores_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attention_with_scores` of sequences packed one behind the other, each attending to itself only.

    Args:
        query: [Tq, Hq, D].
        key, value: [Tk, Hk, D].
        cu_seqlens_q: [S + 1] int32 on the query's device, from 0 to Tq: where each sequence begins, and the
            end.
        cu_seqlens_k: the same for keys, to Tk; `cu_seqlens_q` by default.
        max_seqlen_q: length of the longest query sequence, as flash-attn's functions take it; never changes the result.
        scale, causal: as in `attention_with_scores`, within each sequence.
        key_mask, query_mask: [Tk], [Tq] bool, as in `attention_with_scores`.

    Returns:
        output: [Tq, Hq, D] in the query's dtype, differentiable.
        scores: [Tk] float32 (float64 for float64), not differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came. The values of `cu_seqlens_*` are
            checked on CPUs; elsewhere `check_inputs` does that.

    Example:
        >>> cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> query, key, value = torch.randn(3, 10, 16, 80)
        >>> output, scores = attention_with_scores_varlen(query, key, value, cu_seqlens_q=cu_seqlens)
        >>> output.shape, round(float(scores[:4].sum()))
        (torch.Size([10, 16, 80]), 4)
    """
    _check_packed(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, scale, causal, key_mask, query_mask)
    _check_value(value, "Tk Hk D", query, key)
    return (_with_scores_reference if transformed() else _with_scores_op)(
        query,
        key,
        value,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        scale=scale,
        causal=causal,
        key_mask=key_mask,
        query_mask=query_mask,
    )


def attention_scores_varlen(
    query: Tensor,
    key: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    query_reduction: str = "sum",
    head_reduction: str = "mean",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """`attention_scores` of sequences packed one behind the other.

    Args:
        query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, key_mask, query_mask: as in
            `attention_with_scores_varlen`.
        scale, causal, query_reduction, head_reduction: as in `attention_scores`; "mean" over queries divides by those
            of the key's own sequence.

    Returns:
        scores: [Tk] float32 (float64 for float64). Not differentiable.

    Raises:
        TypeError, ValueError: as in `attention_with_scores_varlen`.

    Example:
        >>> cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> query, key = torch.randn(2, 10, 16, 80)
        >>> attention_scores_varlen(query, key, cu_seqlens_q=cu_seqlens).shape
        torch.Size([10])
    """
    _check_packed(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, scale, causal, key_mask, query_mask)
    check_choice("head_reduction", head_reduction, REDUCTIONS)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
    return _scores(query, key, scale, causal, query_reduction, head_reduction, key_mask, query_mask, *lengths)


def attention_scores_per_head_varlen(
    query: Tensor,
    key: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    query_reduction: str = "sum",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
) -> Tensor:
    """`attention_scores_varlen` with the heads left apart.

    Args:
        query, key, and every option: as in `attention_scores_varlen`.

    Returns:
        scores: [Hq, Tk] float32 (float64 for float64). Not differentiable.

    Raises:
        TypeError, ValueError: as in `attention_with_scores_varlen`.

    Example:
        >>> cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> query, key = torch.randn(2, 10, 16, 80)
        >>> attention_scores_per_head_varlen(query, key, cu_seqlens_q=cu_seqlens).shape
        torch.Size([16, 10])
    """
    _check_packed(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, scale, causal, key_mask, query_mask)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q)
    return _scores(query, key, scale, causal, query_reduction, "none", key_mask, query_mask, *lengths)


def _scores(
    query,
    key,
    scale,
    causal,
    query_reduction,
    head_reduction,
    key_mask,
    query_mask,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    max_seqlen_q=None,
) -> Tensor:
    check_choice("query_reduction", query_reduction, REDUCTIONS)
    return (_scores_reference if transformed() else _scores_op)(
        query,
        key,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        scale=scale,
        causal=causal,
        query_reduction=query_reduction,
        head_reduction=head_reduction,
        key_mask=key_mask,
        query_mask=query_mask,
    )


# -------------------------------------------------------------------------------------------------------- checks


def _check_heads(query: Tensor, key: Tensor, scale: float | None, causal: bool, key_dims: str) -> tuple:
    """The shapes of both, since asking a tensor for its shape takes time."""
    check_floating("query", query)
    check_like("key", key, "query", query)
    check_scale(scale)
    check_bool("causal", causal)
    shape_q, shape_k = query.shape, key.shape
    if shape_q[-1] < 1:
        raise ValueError(f"query: expected D >= 1, got shape {tuple(shape_q)}")
    if shape_k[-1] != shape_q[-1]:
        raise ValueError(f"key: expected [{key_dims}] with D = {shape_q[-1]}, got shape {tuple(shape_k)}")
    heads_q, heads_k = shape_q[1], shape_k[1]
    if heads_k < 1 or heads_q < 1 or heads_q % heads_k:
        raise ValueError(f"key: expected a number of heads that divides the query's {heads_q}, got {heads_k}")
    return shape_q, shape_k


def _check_dense(query, key, scale, causal, key_mask, query_mask) -> None:
    check_tensor("query", query, "B Hq M D")
    check_tensor("key", key, "B Hk N D")
    shape_q, shape_k = _check_heads(query, key, scale, causal, "B Hk N D")
    if shape_k[0] != shape_q[0]:
        raise ValueError(f"key: expected [B Hk N D] with B = {shape_q[0]}, got shape {tuple(shape_k)}")
    check_mask("key_mask", key_mask, "B N", (shape_k[0], shape_k[2]), "query", query)
    check_mask("query_mask", query_mask, "B M", (shape_q[0], shape_q[2]), "query", query)


def _check_packed(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, scale, causal, key_mask, query_mask) -> None:
    check_tensor("query", query, "Tq Hq D")
    check_tensor("key", key, "Tk Hk D")
    shape_q, shape_k = _check_heads(query, key, scale, causal, "Tk Hk D")
    if max_seqlen_q is not None and not isinstance(max_seqlen_q, torch.SymInt):
        check_int("max_seqlen_q", max_seqlen_q, least=0)
    for name, lengths in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if lengths is None and name == "cu_seqlens_k":
            continue
        check_tensor(name, lengths, "S+1")
        if lengths.dtype != torch.int32:
            raise TypeError(f"{name}: expected int32, got {lengths.dtype}")
        if lengths.shape != cu_seqlens_q.shape or lengths.shape[0] < 1:
            raise ValueError(f"{name}: expected [S+1] with S >= 0, as cu_seqlens_q, got shape {tuple(lengths.shape)}")
        check_like(name, lengths, "query", query, dtype=False)
    check_mask("key_mask", key_mask, "Tk", shape_k[:1], "query", query)
    check_mask("query_mask", query_mask, "Tq", shape_q[:1], "query", query)


def _check_value(value: Tensor, dims: str, query: Tensor, key: Tensor) -> None:
    check_shape("value", value, dims, key.shape)
    check_like("value", value, "query", query)


# ------------------------------------------------------------------------------------------------------ dispatch

# Optional tensors stand before the star because torch's autograd registration takes no keyword-only tensors.
_TENSORS = "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Tensor? key_mask, Tensor? query_mask"
_OPTIONS = "SymInt? max_seqlen_q, float? scale, bool causal"
library.define(
    f"attention_scores(Tensor query, Tensor key, {_TENSORS}, *, {_OPTIONS}, str query_reduction, str head_reduction) "
    "-> Tensor"  # head_reduction "none": per head
)
library.define(
    f"attention_with_scores(Tensor query, Tensor key, Tensor value, {_TENSORS}, *, {_OPTIONS}) "
    "-> (Tensor output, Tensor scores)"
)
_scores_op = torch.ops.hiprune.attention_scores.default
_with_scores_op = torch.ops.hiprune.attention_with_scores.default


def cpu_kernel_gap(*tensors: Tensor, query_reduction: str = "sum", head_reduction: str = "mean") -> str:
    """Why csrc/attention.cpp does not cover a CPU call on query, key (and value), or "" where it does.

    The reference serves what it does not cover.
    """
    if not CPU_KERNELS:
        warn_without_cpu_kernels()
        return NO_CPU_KERNELS
    return _kernel_gap(tensors, query_reduction, head_reduction)


_SIMD = CPU_KERNELS and torch.ops.hiprune._cpu_instruction_sets() > 1  # AVX2 at least


def outruns_sdpa(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention_with_scores` takes less time than PyTorch's fused attention, scores left aside.

    On a CPU with AVX2 it does, at all sizes of encoders (`bench/sweeps.py`). Its backward does not.
    """
    if not _SIMD or query.device.type != "cpu" or transformed():
        return False
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return False
    return not _kernel_gap((query, key, value), "sum", "mean")


def cuda_kernel_gap(*tensors: Tensor, query_reduction: str = "sum", head_reduction: str = "mean") -> str:
    """Why kernels/attention.py does not cover a CUDA call on query, key (and value), or "" where it does."""
    rows = [x.stride(0 if x.dim() == 3 else 2) for x in tensors]
    if max(rows) >= 2**23:  # offsets within a tile of 256 rows are 32-bit
        return f"a row stride of {max(rows)}, 2**23 or more"
    return gpu_gap(tensors[0].device) or _kernel_gap(tensors, query_reduction, head_reduction)


def _kernel_gap(tensors: tuple[Tensor, ...], query_reduction: str, head_reduction: str) -> str:
    if "max" in (query_reduction, head_reduction):
        return 'the reduction "max"'
    if tensors[0].dtype == torch.float64:
        return "float64"
    if tensors[0].shape[-1] > 256:
        return f"a head dimension of {tensors[0].shape[-1]}, above 256"
    if any(x.shape[-1] > 1 and x.stride(-1) != 1 for x in tensors):
        return "a last dimension that is not contiguous"
    return ""


def _cpu_kernel(
    query, key, value, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask, scale, causal, per_head, score_scale
) -> tuple[Tensor, Tensor]:
    options = (query.shape[-1] ** -0.5 if scale is None else scale, causal, True, per_head, score_scale)
    if cu_seqlens_q is None:
        return torch.ops.hiprune._cpu_attention.default(query, key, value, key_mask, query_mask, *options)
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    reference.segments(cu_seqlens_q, query.shape[0], "cu_seqlens_q")
    reference.segments(cu_seqlens_k, key.shape[0], "cu_seqlens_k")
    return torch.ops.hiprune._cpu_attention_varlen.default(
        query, key, value, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask, *options
    )


def _cuda_kernel(query, *arguments) -> tuple[Tensor | None, Tensor]:
    from ..kernels.attention import attention  # Triton is loaded by the first CUDA call

    with torch.cuda.device_of(query):
        return attention(query, *arguments, architecture=compute_capability(query.device))


def query_counts(num_queries: int, num_keys: int, causal: bool, query_mask: Tensor | None, device) -> Tensor:
    """`reference.counted_queries` of visible keys, without the M x N mask: [N], or [B, N] with a query mask [B, M]."""
    before = _counted_before(num_queries, query_mask, device)
    if not causal:
        return before[..., -1:].clamp(min=1).expand(*before.shape[:-1], num_keys)
    first = torch.arange(num_keys, device=device) - (num_keys - num_queries)  # query that sees each key
    return (before[..., -1:] - before[..., first.clamp(0, num_queries)]).clamp(min=1)


def _counted_before(num_queries: int, query_mask: Tensor | None, device) -> Tensor:
    """How many counted queries stand before each, and in all: [M + 1] or [B, M + 1]."""
    counted = torch.ones(num_queries, dtype=torch.int64, device=device) if query_mask is None else query_mask
    return torch.nn.functional.pad(counted.cumsum(-1), (1, 0))


def packed_query_counts(query, key, cu_seqlens_q, cu_seqlens_k, causal, query_mask) -> Tensor:
    """`query_counts` of packed sequences, [Tk]. The lengths stay on the device: bad ones give a wrong answer only."""
    total, last = query.shape[0], len(cu_seqlens_q) - 2
    before = _counted_before(total, query_mask, query.device)
    ends_k = (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)[1:].long()
    columns = torch.arange(key.shape[0], device=key.device)
    segment = torch.bucketize(columns, ends_k, right=True).clamp(max=last)
    first, end = cu_seqlens_q[segment].long(), cu_seqlens_q[segment + 1].long()
    if causal:  # right-aligned: compare the distances to the sequence's end
        first = torch.maximum(first, end - ends_k[segment] + columns)
    return (before[end.clamp(0, total)] - before[first.clamp(0, total)]).clamp(min=1)


def _reductions(options: dict) -> dict:
    return {name: options[name] for name in ("query_reduction", "head_reduction")}


def _scores_of(kernel, query, key, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask, *, scale, causal, **options):
    query_reduction, head_reduction = options["query_reduction"], options["head_reduction"]
    tensors = (query, key, None, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask)
    per_head, score_scale = head_reduction == "none", 1 / query.shape[1] if head_reduction == "mean" else 1.0
    _, scores = kernel(*tensors, scale, causal, per_head, score_scale)
    if query_reduction == "sum" or not scores.numel():
        return scores
    if cu_seqlens_q is not None:
        counts = packed_query_counts(query, key, cu_seqlens_q, cu_seqlens_k, causal, query_mask)
    else:
        counts = query_counts(query.shape[2], key.shape[2], causal, query_mask, query.device)
        counts = counts[:, None] if counts.dim() == 2 and per_head else counts
    return scores.div_(counts)


@torch.library.impl(library, "attention_scores", "CompositeExplicitAutograd")
def _scores_reference(
    query, key, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask, *, max_seqlen_q, head_reduction, **options
):
    options |= {"key_mask": key_mask, "query_mask": query_mask}
    if head_reduction != "none":
        options["head_reduction"] = head_reduction
    if cu_seqlens_q is None:
        dense = reference.attention_scores_per_head if head_reduction == "none" else reference.attention_scores
        return dense(query, key, **options)
    packed = (
        reference.attention_scores_per_head_varlen if head_reduction == "none" else reference.attention_scores_varlen
    )
    return packed(query, key, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **options)


@torch.library.impl(library, "attention_scores", "CPU")
def _scores_cpu(query, key, *tensors, **options):
    if cpu_kernel_gap(query, key, **_reductions(options)):
        return _scores_reference(query, key, *tensors, **options)
    return _scores_of(_cpu_kernel, query, key, *tensors, **options)


@torch.library.impl(library, "attention_scores", "CUDA")
def _scores_cuda(query, key, *tensors, **options):
    if cuda_kernel_gap(query, key, **_reductions(options)):
        return _scores_reference(query, key, *tensors, **options)
    return _scores_of(_cuda_kernel, query, key, *tensors, **options)


@torch.library.register_fake("hiprune::attention_scores", lib=library)
def _scores_fake(query, key, cu_seqlens_q, *_, head_reduction, **__):
    dtype = torch.promote_types(query.dtype, torch.float32)
    lead = () if cu_seqlens_q is not None else query.shape[:1]
    heads = query.shape[1:2] if head_reduction == "none" else ()
    return query.new_empty(*lead, *heads, key.shape[2 if cu_seqlens_q is None else 0], dtype=dtype)


@torch.library.impl(library, "attention_with_scores", "CompositeExplicitAutograd")
def _with_scores_reference(
    query, key, value, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask, *, max_seqlen_q, **options
):
    options |= {"key_mask": key_mask, "query_mask": query_mask}
    if cu_seqlens_q is None:
        return reference.attention_with_scores(query, key, value, **options)
    lengths = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return reference.attention_with_scores_varlen(query, key, value, **lengths, **options)


@torch.library.impl(library, "attention_with_scores", "CPU")
def _with_scores_cpu(
    query, key, value, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask, *, scale, causal, max_seqlen_q
):
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask)
    if cpu_kernel_gap(query, key, value):
        return _with_scores_reference(*tensors, scale=scale, causal=causal, max_seqlen_q=max_seqlen_q)
    return _cpu_kernel(*tensors, scale, causal, False, 1 / query.shape[1])


@torch.library.impl(library, "attention_with_scores", "CUDA")
def _with_scores_cuda(query, key, value, *tensors, scale, causal, max_seqlen_q):
    if cuda_kernel_gap(query, key, value):
        options = {"scale": scale, "causal": causal, "max_seqlen_q": max_seqlen_q}
        return _with_scores_reference(query, key, value, *tensors, **options)
    return _cuda_kernel(query, key, value, *tensors, scale, causal, False, 1 / query.shape[1])


@torch.library.register_fake("hiprune::attention_with_scores", lib=library)
def _with_scores_fake(query, key, value, cu_seqlens_q, *_, **__):
    scores = _scores_fake(query, key, cu_seqlens_q, head_reduction="mean")
    if cu_seqlens_q is not None:
        return query.new_empty(query.shape), scores
    return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2), scores


# --------------------------------------------------------------------------------------------------------- gradients


def _scores_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.mark_non_differentiable(output)


def _scores_backward(ctx, _grad_scores):
    return (None,) * 6


def _with_scores_setup(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs)
    ctx.scale, ctx.causal = keyword_only_inputs["scale"], keyword_only_inputs["causal"]


def _with_scores_backward(ctx, grad_output, _grad_scores):
    """Gradients of the output, from a scaled_dot_product_attention that is computed again."""
    *inputs, cu_seqlens_q, cu_seqlens_k, key_mask, _ = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph: they are to be differentiated again, and SDPA's gradients cannot be

        def attend(query, key, value):
            options = {"max_seqlen_q": None, "scale": ctx.scale, "causal": ctx.causal}
            return _with_scores_reference(query, key, value, cu_seqlens_q, cu_seqlens_k, key_mask, None, **options)[0]

        return (*torch.func.vjp(attend, *inputs)[1](grad_output), None, None, None, None)
    inputs = [x.detach().requires_grad_() for x in inputs]
    with torch.enable_grad():
        if cu_seqlens_q is None:
            query, key, value = inputs
            visible = None
            if ctx.causal or key_mask is not None:
                visible = reference.visible_keys(query, key, ctx.causal, key_mask)
        else:
            query, key, value, grad_output = (x[None].transpose(1, 2) for x in (*inputs, grad_output))
            visible = _visible_packed(query, key, cu_seqlens_q, cu_seqlens_k, ctx.causal, key_mask)
            key_mask = None if key_mask is None else key_mask[None]
        key, value = (reference.without_hidden(x, key_mask) for x in (key, value))
        if visible is not None:
            # A query that sees no key has output 0 and no gradient; SDPA must not meet its empty row.
            blind = ~visible.any(dim=-1, keepdim=True)
            visible, grad_output = visible | blind, grad_output.masked_fill(blind, 0.0)
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=visible, scale=ctx.scale, enable_gqa=bool(query.shape[1] != key.shape[1])
        )
        return (*torch.autograd.grad(output, inputs, grad_output), None, None, None, None)


def _visible_packed(query, key, cu_seqlens_q, cu_seqlens_k, causal, key_mask) -> Tensor:
    """`reference.visible_keys` of packed sequences as one block-diagonal mask: bool [1, 1, Tq, Tk]."""
    ends_q, ends_k = cu_seqlens_q[1:], (cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k)[1:]
    rows = torch.arange(query.shape[2], device=query.device)[:, None]
    columns = torch.arange(key.shape[2], device=key.device)
    segment_q, segment_k = torch.bucketize(rows, ends_q, right=True), torch.bucketize(columns, ends_k, right=True)
    visible = segment_q == segment_k
    if causal:  # right-aligned: compare the distances to the segment's end
        visible = visible & (ends_q[segment_q] - rows <= ends_k[segment_k] - columns)
    return (visible if key_mask is None else visible & key_mask)[None, None]


torch.library.register_autograd("hiprune::attention_scores", _scores_backward, setup_context=_scores_setup, lib=library)
torch.library.register_autograd(
    "hiprune::attention_with_scores", _with_scores_backward, setup_context=_with_scores_setup, lib=library
)
