"""Attention with column scores on GPUs: which Triton kernels run, with which blocks, and their launches.

A column score is a sum over the rows of softmax(scale Q K^T) (Eq. 2 of the paper), and a row's maximum and sum are
known only after all of its keys: no exact one-pass scheme exists unless the probabilities are kept. `plan` chooses a
path:

    strip    all logits of a block of queries stay in registers: exp and Q K^T once. For up to 128 keys.
    sweeps   one launch: a flash-attention sweep over the keys, then a second sweep for the probabilities, transposed
             (keys x queries), so that queries lie along a thread's registers and their sum is cheap.
    passes   two launches and O(N) extra memory: output, maximum and sum of each row, then the scores. The scores pass
             owns a block of keys, adds up probabilities elementwise and reduces over rows once, at the end (a
             reduction per step costs twice the instructions). For many keys, and for packed sequences.
    flash, cudnn    as passes, with output and log-sum-exp (LSE) from PyTorch's own attention.
    flash_attn      as passes, with both from the flash-attn package; never measured, so the table does not choose it.

Nothing is added atomically: partial scores stand in fixed slots, [B, Hq, slots, N], and are added in a fixed order.
Block shapes and slots follow from (M, N, H, D, dtype, architecture), never from the batch, so results are the same bits
from run to run and whatever else is in the batch. Packed sequences are cut into blocks that begin where their sequence
does, for the same reason; the grid's size is fixed and programs find their sequence in `cu_seqlens` by bisection, so
nothing waits for the host. Every offset that is read on the device is clamped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from . import cdiv, launch, next_power_of_2
from .attention_kernels import attention_kernel, reduce_kernel, scores_kernel, strip_kernel

LOG2_E = math.log2(math.e)  # the kernels work in base 2
BORROWED = ("flash", "cudnn", "flash_attn")
# Whose attention lends its output and LSE, by architecture. Flash attention 2 was written for the first three. On an
# H200 cuDNN's is the fastest, and its bits never depended on the batch in 52 comparisons (six shapes, batches to 16).
BORROWED_ON = {80: "flash", 86: "flash", 89: "flash", 90: "cudnn"}

# ---------------------------------------------------------------------------------------------------------- the table


class Blocks(NamedTuple):
    """Tile and launch of one kernel."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """How a call is computed."""

    path: str
    attention: Blocks
    scores: Blocks | None = None  # of the scores pass, as are the splits
    splits: int = 1  # shares of the queries


@functools.lru_cache(maxsize=4096)
def plan(
    M: int,
    N: int,
    heads: int,
    D: int,
    dtype: torch.dtype,
    architecture: int,
    *,
    packed: bool = False,
    borrow: bool = False,
    path: str | None = None,
) -> Plan:
    """The table, as measured on an H200 (bench/results/gpu_h200.md). Elsewhere the same blocks are assumed to be best.

    Of 11 shapes of tiles, 64 x 64 with 4 warps and 3 stages were the fastest or within 5% of it for nearly every kernel
    and shape that was tried (577 x 64, 729 x 72, 2048 x 64 and 4096 x 80, batches of 1 to 32). With D = 72 and 80 eight
    warps took up to twice as long: their registers let one block at a time onto a multiprocessor.

    Paths on an H200, output and scores, in CUDA graphs: strip takes two thirds of the time of sweeps with 50 keys, and
    as long as they with 198. From 577 keys on passes take up to 9% less than sweeps. cuDNN's attention with a scores
    pass takes 0 to 15% less than passes from 198 keys on, in batches of 1 to 64, and never more.

    Args:
        M, N: queries and keys; of no account where `packed`, since lengths then stand on the device.
        architecture: 90 for compute capability 9.0.
        borrow: whether the attention that is `BORROWED_ON` this architecture covers the call and its output is wanted.
        path: take this path whatever the table says.

    Example:
        >>> plan(577, 577, 16, 64, torch.bfloat16, 90).path, plan(50, 50, 12, 64, torch.bfloat16, 90).path
        ('passes', 'strip')
        >>> plan(577, 577, 16, 64, torch.bfloat16, 90, borrow=True).path
        'cudnn'
    """
    half = dtype != torch.float32
    if half and D <= 128:
        attention = scores = Blocks(64, 64, 4, 3 if D <= 80 else 2)
    elif half:
        attention, scores = Blocks(64, 32, 8, 2), Blocks(64, 64, 8, 1)
    elif D <= 128:  # three products of split operands: small tiles. With D above 96 some registers spill.
        attention = Blocks(64, 32, 4, 2) if D <= 32 else Blocks(64, 16, 4, 2 if D <= 96 else 1)
        scores = Blocks(64, 32, 4, 2) if D <= 96 else Blocks(64, 32, 8, 1)
    else:
        attention = scores = Blocks(32, 16, 4, 1)

    if path is None:
        borrowed, most_swept = BORROWED_ON.get(architecture), 256 if architecture == 90 else 1024
        if packed:
            path = "passes"  # sweeps would need a slot per block of the longest sequence, which the host does not know
        elif half and D <= 128 and _split_head_dim(D)[1] == 0 and N <= 128:  # a strip's head dimension is one tile
            path = "strip"
        elif borrow and borrowed == "cudnn" and 64 <= D <= 128:  # others were not measured
            path = "cudnn"
        elif borrow and borrowed == "flash" and N > 1024 and heads * cdiv(M, 64) >= 256:
            # It splits the keys, by a rule that counts the batch, only where one block per 64 queries leaves
            # multiprocessors idle: with 256 blocks per batch entry it never does.
            path = "flash"
        elif most_swept >= N and (half or D <= 64):
            path = "sweeps"  # above, M N / 64 partial sums a head begin to weigh as much as the queries
        else:
            path = "passes"
    if path == "strip":
        return Plan(path, Blocks(64, max(16, next_power_of_2(N)), 4, 1))
    if path == "sweeps":
        return Plan(path, attention)
    if packed:
        return Plan(path, attention, scores)
    # Few keys and many queries: shares of at least 8 blocks, until one batch entry fills a GPU about four times over.
    programs = heads * cdiv(N, scores.block_n)
    splits = max(1, min(512 // programs, M // (8 * scores.block_m)))
    return Plan(path, attention, scores, splits)


# ---------------------------------------------------------------------------------------------------------- launchers


def _launch(kernel, programs: int, arguments: dict, constants: dict, blocks: Blocks) -> None:
    launch(kernel, (programs,), arguments, constants, blocks.warps, blocks.stages)


@functools.cache
def _split_head_dim(D: int) -> tuple[int, int]:
    """D in at most two powers of two, from 16 on: 80 is 64 + 16."""
    first = max(16, 1 << (D.bit_length() - 1))
    second = max(16, next_power_of_2(D - first)) if first < D else 0
    return (first, second) if second < first else (2 * first, 0)


def _empty_output(query: Tensor, packed: bool) -> Tensor:
    if packed:
        return query.new_empty(query.shape)
    return query.new_empty(query.transpose(1, 2).shape).transpose(1, 2)


def _strides(x: Tensor | None, packed: bool) -> tuple[int, int, int]:
    """Strides over batch, heads and rows of [B, H, M, D], or of packed [T, H, D]."""
    if x is None:
        return 0, 0, 0
    strides = x.stride()
    return (0, strides[1], strides[0]) if packed else strides[:3]


def _mask_strides(mask: Tensor | None) -> tuple[int, int]:
    if mask is None:
        return 0, 0
    return (0, mask.stride(0)) if mask.dim() == 1 else mask.stride()


def _reduced(partial: Tensor, per_head: bool, factor: float, launch: Callable) -> Tensor:
    """[B, H, slots, N] to [B, H, N] or [B, N]."""
    B, heads, slots, N = partial.shape
    rows, slots = (B * heads, slots) if per_head else (B, heads * slots)
    scores = partial.new_empty(B, heads, N) if per_head else partial.new_empty(B, N)
    arguments = {"partial_ptr": partial, "scores_ptr": scores, "slots": slots, "N": N, "factor": factor}
    constants = {"ROWS": 32 if slots > 16 else 16, "BLOCK_N": 32}
    launch(reduce_kernel, rows * cdiv(N, 32), arguments, constants, Blocks(32, 32, 4, 2))
    return scores


def _borrowable(
    path: str, query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float, causal: bool
) -> bool:
    """Whether this attention of PyTorch's covers the call (`plan` says whether it is wanted)."""
    (_, heads, M, D), (_, heads_k, N, _) = query.shape, key.shape
    if not scale > 1e-30:  # it takes the largest logit before it scales, and 1 / scale must be finite here
        return False
    if query.dtype == torch.float32 or key_mask is not None or heads != heads_k or D % 8:
        return False
    if causal and M != N:  # aligned otherwise there
        return False
    if path == "cudnn" and not can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, causal, False)):
        return False  # or the user has turned it off
    # They read 16 bytes at a time.
    return all(x.data_ptr() % 16 == 0 and math.gcd(8, *x.stride()[:3]) == 8 for x in (query, key, value))


def _borrowed(
    path: str, query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Another's attention: output and natural LSE [B, H, M]."""
    if path == "flash_attn":
        from flash_attn import flash_attn_func

        rows_first = (x.transpose(1, 2) for x in (query, key, value))
        output, lse, _ = flash_attn_func(*rows_first, softmax_scale=scale, causal=causal, return_attn_probs=True)
        output = output.transpose(1, 2)
    elif path == "flash":
        forward = torch.ops.aten._scaled_dot_product_flash_attention.default
        output, lse, *_ = forward(query, key, value, is_causal=causal, scale=scale)
    else:
        forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
        output, lse, *_ = forward(query, key, value, None, True, is_causal=causal, scale=scale)
    output = output.transpose(1, 2).contiguous().transpose(1, 2)  # a copy only where the memory order is another
    return output, lse.reshape(query.shape[:3])


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
    launch: Callable = _launch,
) -> tuple[Tensor | None, Tensor]:
    """Output (None without `value`) and scores times `score_factor`, summed over the heads unless `per_head`.

    Tensors as in `hiprune_kernels.attention_with_scores` and its varlen form. `path` and `launch` take the place of the
    table's choice and of the launch, for tests, benchmarks and ahead-of-time compilation.
    """
    packed = cu_seqlens_q is not None
    if packed:
        (M, heads, D), (N, heads_k, _), B = query.shape, key.shape, 1
        cu_seqlens_q = cu_seqlens_q.contiguous()
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k.contiguous()
        segments = len(cu_seqlens_q) - 1
    else:
        (B, heads, M, D), (_, heads_k, N, _), segments = query.shape, key.shape, 0
    if B * M * N == 0 or (packed and segments == 0):
        shape = ([] if packed else [B]) + ([heads] if per_head else []) + [N]
        output = None if value is None else _empty_output(query, packed).zero_()
        return output, query.new_zeros(shape, dtype=torch.float32)

    scale = D**-0.5 if scale is None else scale
    lender = BORROWED_ON.get(architecture)
    borrow = (
        lender is not None
        and value is not None
        and not packed
        and _borrowable(lender, query, key, value, key_mask, scale, causal)
    )
    chosen = plan(M, N, heads, D, query.dtype, architecture, packed=packed, borrow=borrow, path=path)
    output = None if value is None or chosen.path in BORROWED else _empty_output(query, packed)
    D1, D2 = _split_head_dim(D)
    constants = {"CAUSAL": causal, "NEGATE": scale < 0, "D": D, "D1": D1, "D2": D2}
    q_strides, k_strides, v_strides, output_strides = (_strides(x, packed) for x in (query, key, value, output))
    constants["ALIGN"] = math.gcd(16, *q_strides, *k_strides, *v_strides, *output_strides)
    sequences = {
        "q_ptr": query,
        "q_strides": q_strides,
        "k_ptr": key,
        "k_strides": k_strides,
        "key_mask_ptr": key_mask,
        "key_mask_strides": _mask_strides(key_mask),
        "query_mask_ptr": query_mask,
        "query_mask_strides": _mask_strides(query_mask),
        "heads": heads,
        "group": heads // heads_k,
        "M": M,
        "N": N,
        "logit_scale": min(max(abs(scale) * LOG2_E, 2.0**-126), 2.0**127),  # finite float32, so that 0 times it is 0
    }
    lengths = {"lengths_q_ptr": cu_seqlens_q, "lengths_k_ptr": cu_seqlens_k, "segments": segments}
    values = {
        "v_ptr": value,
        "v_strides": v_strides,
        "output_ptr": output,
        "output_strides": output_strides,
    }

    def shape(blocks: Blocks) -> dict:
        return {**constants, "BLOCK_M": blocks.block_m, "BLOCK_N": blocks.block_n}

    blocks = chosen.attention
    slots = cdiv(M, blocks.block_m)
    programs = B * heads * (M // blocks.block_m + segments if packed else slots)
    if chosen.path in ("strip", "sweeps"):
        partial = query.new_empty(B, heads, slots, N, dtype=torch.float32)
        arguments = {**sequences, **values, "partial_ptr": partial}
        if chosen.path == "strip":
            constants["D1"] = max(16, next_power_of_2(D))
            del constants["D2"]
            launch(strip_kernel, programs, arguments, shape(blocks), blocks)
        else:
            launch(
                attention_kernel,
                programs,
                {**arguments, **lengths, "top_ptr": None, "weight_ptr": None},
                shape(blocks),
                blocks,
            )
    else:
        weight, top_scale = None, 1.0
        if chosen.path in BORROWED:
            output, top = _borrowed(chosen.path, query, key, value, scale, causal)
            top_scale = 1 / scale
        else:
            top, weight = query.new_empty(2, B, heads, M, dtype=torch.float32)
            arguments = {**sequences, **lengths, **values, "top_ptr": top, "weight_ptr": weight, "partial_ptr": None}
            launch(attention_kernel, programs, arguments, shape(blocks), blocks)
        blocks = chosen.scores
        split_rows = cdiv(cdiv(M, chosen.splits), blocks.block_m) * blocks.block_m
        splits = cdiv(M, split_rows)
        partial = query.new_empty(B, heads, splits, N, dtype=torch.float32)
        arguments = {**sequences, **lengths, "top_ptr": top, "top_strides": top.stride()[:2], "top_scale": top_scale}
        arguments |= {"weight_ptr": weight, "partial_ptr": partial, "splits": splits, "split_rows": split_rows}
        programs = B * heads * splits * (N // blocks.block_n + segments if packed else cdiv(N, blocks.block_n))
        launch(scores_kernel, programs, arguments, shape(blocks), blocks)
    scores = _reduced(partial, per_head, score_factor, launch)
    return output, scores[0] if packed else scores


# ------------------------------------------------------------------------------------------- ahead-of-time compilation

_SHAPES = {  # queries and keys, heads, key heads, D: what encoders and language models have
    "clip_b32": (50, 12, 12, 64),
    "deit": (198, 12, 12, 64),
    "clip_l": (577, 16, 16, 64),
    "siglip": (729, 16, 16, 72),
    "d128": (1024, 25, 25, 128),
    "d256": (1024, 8, 4, 256),
    "vjepa2": (2048, 16, 16, 64),
    "qwen": (4096, 16, 16, 80),
    "llm": (4096, 32, 8, 128),
}


def aot_variants() -> list[tuple]:
    """What the table can launch, for `bench/aot.py`: name, function, signature, constexprs, warps, stages.

    The launcher itself makes the list, from tensors without data.
    """
    found = {}

    def record(case: str, **options) -> None:
        def launch(kernel, programs: int, arguments: dict, constants: dict, blocks: Blocks) -> None:
            signature = {}
            for name, x in arguments.items():
                if x is None or (type(x) is int and x == 1):  # Triton compiles these in
                    constants = {**constants, name: x}
                else:
                    signature[name] = tuple(map(_kind, x)) if isinstance(x, tuple) else _kind(x)
            rest = (kernel, signature, constants, blocks.warps, blocks.stages)
            if rest not in found.values():
                found[f"{kernel.__name__}/{case}"] = rest

        _example_call(launch=launch, **options)

    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        short = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]
        for shape in _SHAPES if dtype != torch.float16 else ("clip_b32", "clip_l", "qwen"):
            for output in (True, False):
                record(f"{shape}/{short}/{'output' if output else 'scores'}", shape=shape, dtype=dtype, output=output)
        record(f"qwen_packed/{short}/output", shape="qwen", dtype=dtype, packed=True)
    bf16 = {"dtype": torch.bfloat16, "masked": True}
    for shape in ("clip_b32", "clip_l", "vjepa2"):
        record(f"{shape}/bf16/masked", shape=shape, **bf16)
        record(f"{shape}/bf16/masked_causal", shape=shape, causal=True, **bf16)
    record("qwen_packed/bf16/masked_causal", shape="qwen", causal=True, packed=True, **bf16)
    record("clip_l/bf16/output_sweeps", shape="clip_l", dtype=torch.bfloat16, architecture=80)
    for shape in ("siglip", "vjepa2", "qwen"):
        record(f"{shape}/bf16/borrowed", shape=shape, dtype=torch.bfloat16, path="cudnn")
    return [(name, *rest) for name, rest in found.items()]


def _kind(x: object) -> str:
    if isinstance(x, Tensor):
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.bool: "i1"}
        return "*" + names.get(x.dtype, "i32")
    if isinstance(x, float):
        return "fp32"
    return "i32:16" if x % 16 == 0 else "i32"


def _example_call(
    *,
    shape: str,
    dtype: torch.dtype,
    launch: Callable,
    output: bool = True,
    packed: bool = False,
    masked: bool = False,
    causal: bool = False,
    architecture: int = 90,
    path: str | None = None,
) -> None:
    N, heads, heads_k, D = _SHAPES[shape]
    query, key, value = (torch.empty(2, N, h, D, dtype=dtype, device="meta") for h in (heads, heads_k, heads_k))
    mask = torch.empty(2, N, dtype=torch.bool, device="meta") if masked else None
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta") if packed else None
    if packed:
        query, key, value = query[0], key[0], value[0]
        mask = None if mask is None else mask[0]
    else:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    tensors = (query, key, value if output else None, cu_seqlens, None, mask, mask)
    attention(*tensors, None, causal, False, 1 / heads, architecture=architecture, path=path, launch=launch)
