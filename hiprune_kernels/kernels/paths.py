"""The ways through an attention call with column scores: which Triton kernels run, with which arguments.

A column score is a sum over the rows of softmax(scale Q K^T) (Eq. 2 of the paper), and a row's maximum and sum are
known only after all of its keys: no exact one-pass scheme exists unless the probabilities are kept. A path is a
function in `PATHS`; `table.py` chooses among them:

    strip    all logits of a block of queries stay in registers: exp and Q K^T once. For up to 128 keys.
    sweeps   one launch: a flash-attention sweep over the keys, then a second sweep for the probabilities, transposed
             (keys x queries), so that queries lie along a thread's registers and their sum is cheap.
    passes   two launches and O(N) extra memory: output, maximum and sum of each row, then the scores. The scores pass
             owns a block of keys, adds up probabilities elementwise and reduces over rows once, at the end (a
             reduction per step costs twice the instructions). For many keys, and for packed sequences.
    flash, cudnn    as passes, with output and log-sum-exp (LSE) from PyTorch's own attention.
    flash_attn      as passes, with both from the flash-attn package; never measured, so the table does not choose it.

Nothing is added atomically: partial sums stand in fixed slots, [B, heads, slots, N], and are added in a fixed order.
Block shapes and slots follow from (M, N, H, D, dtype, architecture), never from the batch, so results are the same bits
from run to run and whatever else is in the batch. Packed sequences are cut into blocks that begin where their sequence
does, for the same reason; the grid's size is fixed and programs find their sequence in `cu_seqlens` by bisection, so
nothing waits for the host. Every offset that is read on the device is clamped.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from . import cdiv, next_power_of_2
from .attention_kernels import attention_kernel, scores_kernel, strip_kernel

LOG2_E = math.log2(math.e)  # the kernels work in base 2


class Problem(NamedTuple):
    """The tensors and sizes of one call."""

    query: Tensor  # [B, heads, M, D], packed [M, heads, D]
    key: Tensor  # [B, heads_k, N, D], packed [N, heads_k, D]
    value: Tensor | None  # as the key; None: no output is wanted
    cu_seqlens_q: Tensor | None  # [segments + 1], None: not packed
    cu_seqlens_k: Tensor | None
    key_mask: Tensor | None  # [B, N], packed [N]
    query_mask: Tensor | None  # [B, M], packed [M]
    scale: float
    causal: bool
    B: int  # 1 where packed
    heads: int
    heads_k: int
    M: int
    N: int
    D: int
    packed: bool
    segments: int  # packed sequences; 0 where not packed

    @staticmethod
    def of(
        query: Tensor,
        key: Tensor,
        value: Tensor | None,
        cu_seqlens_q: Tensor | None,
        cu_seqlens_k: Tensor | None,
        key_mask: Tensor | None,
        query_mask: Tensor | None,
        scale: float | None = None,
        causal: bool = False,
    ) -> Problem:
        """The call with these arguments, as `attention.attention` takes them."""
        if cu_seqlens_q is None:
            (B, heads, M, D), (_, heads_k, N, _), packed, segments = query.shape, key.shape, False, 0
        else:
            (M, heads, D), (N, heads_k, _), B, packed = query.shape, key.shape, 1, True
            cu_seqlens_q = cu_seqlens_q.contiguous()
            cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k.contiguous()
            segments = len(cu_seqlens_q) - 1
        scale = D**-0.5 if scale is None else scale
        return Problem(
            query,
            key,
            value,
            cu_seqlens_q,
            cu_seqlens_k,
            key_mask,
            query_mask,
            scale,
            causal,
            B,
            heads,
            heads_k,
            M,
            N,
            D,
            packed,
            segments,
        )

    def empty_output(self) -> Tensor | None:
        """Like the query, laid out in memory as [B, M, heads, D]. None where no output is wanted."""
        if self.value is None:
            return None
        if self.packed:
            return self.query.new_empty(self.M, self.heads, self.D)
        return self.query.new_empty(self.B, self.M, self.heads, self.D).transpose(1, 2)

    def empty_sums(self, slots: int) -> Tensor:
        """[B, heads, slots, N] float32."""
        return self.query.new_empty(self.B, self.heads, slots, self.N, dtype=torch.float32)


class Blocks(NamedTuple):
    """Tile and launch of one kernel."""

    block_m: int
    block_n: int
    warps: int
    stages: int


class LaunchPlan(NamedTuple):
    """How a call is computed."""

    path: str
    attention: Blocks
    scores: Blocks | None = None  # of the scores pass, as are the splits
    splits: int = 1  # shares of the queries


# (kernel, programs, arguments by name, constexprs by name, blocks)
Launch = Callable[[Any, int, dict[str, Any], dict[str, Any], Blocks], None]
# What a path gives: the output (None where none is wanted) and partial sums [B, heads, slots, N].
Path = Callable[[Problem, LaunchPlan, Launch], tuple[Tensor | None, Tensor]]

# ----------------------------------------------------------------------------------------------- arguments of kernels

_Operands = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def _operands(problem: Problem, output: Tensor | None) -> _Operands:
    """What the kernels of one call share, by the kernels' names.

    Returns:
        rows: queries, keys, masks and sizes.
        values: and the output, for kernels that compute it.
        constants: constexprs.
    """
    query, key, value, _, _, key_mask, query_mask, scale, causal, _, heads, heads_k, M, N, D, packed, _ = problem
    q_strides, k_strides = _strides(query, packed), _strides(key, packed)
    v_strides, output_strides = _strides(value, packed), _strides(output, packed)
    rows = {
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
    values = {"v_ptr": value, "v_strides": v_strides, "output_ptr": output, "output_strides": output_strides}
    align = math.gcd(16, *q_strides, *k_strides, *v_strides, *output_strides)
    D1, D2 = split_head_dim(D)
    constants = {"CAUSAL": causal, "NEGATE": scale < 0, "D": D, "D1": D1, "D2": D2, "ALIGN": align}
    return rows, values, constants


def _strides(x: Tensor | None, packed: bool) -> tuple[int, ...]:
    """Strides over batch, heads and rows of [B, H, M, D], or of packed [T, H, D]."""
    if x is None:
        return 0, 0, 0
    strides = x.stride()
    return (0, strides[1], strides[0]) if packed else strides[:3]


def _mask_strides(mask: Tensor | None) -> tuple[int, ...]:
    if mask is None:
        return 0, 0
    return (0, mask.stride(0)) if mask.dim() == 1 else mask.stride()


@functools.cache
def split_head_dim(D: int) -> tuple[int, int]:
    """D in at most two powers of two, from 16 on: 80 is 64 + 16."""
    first = max(16, 1 << (D.bit_length() - 1))
    second = max(16, next_power_of_2(D - first)) if first < D else 0
    return (first, second) if second < first else (2 * first, 0)


# -------------------------------------------------------------------------------------------------------------- paths


def _strip(problem: Problem, plan: LaunchPlan, launch: Launch) -> tuple[Tensor | None, Tensor]:
    blocks, output = plan.attention, problem.empty_output()
    slots = cdiv(problem.M, blocks.block_m)
    partial, (rows, values, shared) = problem.empty_sums(slots), _operands(problem, output)
    arguments = {**rows, **values, "partial_ptr": partial}
    constants = {**shared, "BLOCK_M": blocks.block_m, "BLOCK_N": blocks.block_n}
    constants["D1"] = max(16, next_power_of_2(problem.D))
    del constants["D2"]
    launch(strip_kernel, problem.B * problem.heads * slots, arguments, constants, blocks)
    return output, partial


def _sweeps(problem: Problem, plan: LaunchPlan, launch: Launch) -> tuple[Tensor | None, Tensor]:
    output, slots = problem.empty_output(), cdiv(problem.M, plan.attention.block_m)
    partial = problem.empty_sums(slots)
    _attend(problem, _operands(problem, output), plan.attention, launch, slots, partial=partial)
    return output, partial


def _passes(problem: Problem, plan: LaunchPlan, launch: Launch) -> tuple[Tensor | None, Tensor]:
    output = problem.empty_output()
    operands, row_blocks = _operands(problem, output), _row_blocks(problem, problem.M, plan.attention.block_m)
    top, weight = problem.query.new_empty(2, problem.B, problem.heads, problem.M, dtype=torch.float32).unbind()
    _attend(problem, operands, plan.attention, launch, row_blocks, top, weight)
    return output, _scores_pass(problem, operands, plan, launch, top, weight)


def _row_blocks(problem: Problem, rows: int, block: int) -> int:
    """Blocks of queries, or of keys. Each packed sequence begins one: `_locate` in attention_kernels.py counts so."""
    return rows // block + problem.segments if problem.packed else cdiv(rows, block)


def _attend(
    problem: Problem,
    operands: _Operands,
    blocks: Blocks,
    launch: Launch,
    row_blocks: int,
    top: Tensor | None = None,
    weight: Tensor | None = None,
    partial: Tensor | None = None,
) -> None:
    """The attention. It leaves `top` and `weight`, [B, heads, M], for `_scores_pass`, or partial sums."""
    rows, values, constants = operands
    arguments = {
        **rows,
        **values,
        "lengths_q_ptr": problem.cu_seqlens_q,
        "lengths_k_ptr": problem.cu_seqlens_k,
        "segments": problem.segments,
        "top_ptr": top,
        "weight_ptr": weight,
        "partial_ptr": partial,
    }
    constants = {**constants, "BLOCK_M": blocks.block_m, "BLOCK_N": blocks.block_n}
    launch(attention_kernel, problem.B * problem.heads * row_blocks, arguments, constants, blocks)


def _scores_pass(
    problem: Problem,
    operands: _Operands,
    plan: LaunchPlan,
    launch: Launch,
    top: Tensor,
    weight: Tensor | None,
    top_scale: float = 1.0,
) -> Tensor:
    """Partial sums [B, heads, splits, N] from what an attention left of each row.

    Args:
        top: [B, heads, M] float32, the largest Q K^T; or, without `weight`, the natural LSE.
        weight: [B, heads, M] float32, 1 / the sum of the exponentials.
        top_scale: factor from an LSE to the scale of Q K^T.
    """
    assert plan.scores is not None  # a plan of two launches
    (rows, _, constants), blocks = operands, plan.scores
    split_rows = cdiv(cdiv(problem.M, plan.splits), blocks.block_m) * blocks.block_m
    splits = cdiv(problem.M, split_rows)
    partial = problem.empty_sums(splits)
    arguments = {
        **rows,
        "lengths_q_ptr": problem.cu_seqlens_q,
        "lengths_k_ptr": problem.cu_seqlens_k,
        "segments": problem.segments,
        "top_ptr": top,
        "top_strides": top.stride()[:2],
        "top_scale": top_scale,
        "weight_ptr": weight,
        "partial_ptr": partial,
        "splits": splits,
        "split_rows": split_rows,
    }
    constants = {**constants, "BLOCK_M": blocks.block_m, "BLOCK_N": blocks.block_n}
    programs = problem.B * problem.heads * splits * _row_blocks(problem, problem.N, blocks.block_n)
    launch(scores_kernel, programs, arguments, constants, blocks)
    return partial


# ------------------------------------------------------------------------------------------------ borrowed attention

# Another's attention of query, key and value [B, heads, M, D] by this scale, causal or not: output and natural LSE.
Lender = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    forward = torch.ops.aten._scaled_dot_product_flash_attention.default
    output, lse, *_ = forward(query, key, value, is_causal=causal, scale=scale)
    return output, lse


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    output, lse, *_ = forward(query, key, value, None, True, is_causal=causal, scale=scale)
    return output, lse


def _flash_attn(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    from flash_attn import flash_attn_func

    rows_first = (x.transpose(1, 2) for x in (query, key, value))
    output, lse, _ = flash_attn_func(*rows_first, softmax_scale=scale, causal=causal, return_attn_probs=True)
    return output.transpose(1, 2), lse


def lends(path: str, problem: Problem) -> bool:
    """Whether this attention of PyTorch's covers the call (the table says whether it is wanted)."""
    query, key, value = problem.query, problem.key, problem.value
    if value is None or problem.packed or problem.key_mask is not None:
        return False
    if not problem.scale > 1e-30:  # it takes the largest logit before it scales, and 1 / scale must be finite here
        return False
    if query.dtype == torch.float32 or problem.heads != problem.heads_k or problem.D % 8:
        return False
    if problem.causal and problem.M != problem.N:  # aligned otherwise there
        return False
    if path == "cudnn" and not can_use_cudnn_attention(SDPAParams(query, key, value, None, 0.0, problem.causal, False)):
        return False  # or the user has turned it off
    # They read 16 bytes at a time.
    return all(x.data_ptr() % 16 == 0 and math.gcd(8, *x.stride()[:3]) == 8 for x in (query, key, value))


def behind(lender: Lender) -> Path:
    """The path of a scores pass behind another's attention."""

    def path(problem: Problem, plan: LaunchPlan, launch: Launch) -> tuple[Tensor | None, Tensor]:
        assert problem.value is not None  # or nothing is lent
        output, lse = lender(problem.query, problem.key, problem.value, problem.scale, problem.causal)
        output = output.transpose(1, 2).contiguous().transpose(1, 2)  # a copy only where the memory order is another
        lse = lse.reshape(problem.B, problem.heads, problem.M)
        operands = _operands(problem, None)
        return output, _scores_pass(problem, operands, plan, launch, lse, None, 1 / problem.scale)

    return path


LENDERS: dict[str, Lender] = {"flash": _flash, "cudnn": _cudnn, "flash_attn": _flash_attn}
PATHS: dict[str, Path] = {"strip": _strip, "sweeps": _sweeps, "passes": _passes}
PATHS |= {name: behind(lender) for name, lender in LENDERS.items()}
