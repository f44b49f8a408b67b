"""Token selection in one launch: both top-k searches, neighbours, roles, ascending indices and the gather of rows.

One image fits one program, and a search is a handful of block reductions, so every program of an image does the whole
selection over again and then gathers its own share of the rows: no second launch, no synchronisation between programs.
Nothing is copied to the device: sizes and budgets travel as kernel arguments, so a call may be captured in a CUDA graph
from the first, and no table has to outlive it. Results depend on nothing but the image itself.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..budget import Image, SelectionPlan
from ..reference import ANCHOR, BUFFER, DROPPED, NEIGHBORS, REGISTER
from . import cdiv, launch, next_power_of_2

MAX_TOKENS = 16384  # of one image: the most that one program's registers hold

_DROPPED, _ANCHOR, _BUFFER, _REGISTER = map(tl.constexpr, (DROPPED, ANCHOR, BUFFER, REGISTER))

# ------------------------------------------------------------------------------------------------------------- kernel


@triton.jit
def _load_scores(scores_ptr, slots, stride_slot, stride_token, token, valid):
    """The sums over the slots, in slot order: float32, or float64 where the scores are."""
    wide: tl.constexpr = tl.float64 if scores_ptr.dtype.element_ty == tl.float64 else tl.float32
    scores_ptr += token.to(tl.int64) * stride_token
    total = tl.zeros(token.shape, wide)
    for _ in range(slots):
        total += tl.load(scores_ptr, mask=valid, other=0.0).to(wide)
        scores_ptr += stride_slot
    return total


@triton.jit
def _keys(scores):
    """Unsigned integers in the order of the scores, above 0; NaN is 1, behind -inf. Sums from +0 on are never -0."""
    integer: tl.constexpr = tl.uint64 if scores.dtype == tl.float64 else tl.uint32
    sign = tl.full([], 1, integer) << (scores.dtype.primitive_bitwidth - 1)
    bits = scores.to(integer, bitcast=True)
    ones = sign | (sign - 1)
    return tl.where(scores == scores, bits ^ tl.where(bits >= sign, ones, sign), 1)


@triton.jit
def _best(keys, count, COUNTS_FIT: tl.constexpr):
    """Mask of the `count` largest keys, the lowest index first among equals; keys of 0 are out of the race.

    Two bits of the count-th largest key are found per step: how many keys reach each of the three candidates is counted
    in one reduction, in three fields of ten bits, or of twenty where those do not fit.
    """
    width: tl.constexpr = keys.dtype.primitive_bitwidth
    field: tl.constexpr = 10 if COUNTS_FIT else 20
    packed: tl.constexpr = tl.int32 if COUNTS_FIT else tl.int64
    threshold = tl.full([], 0, keys.dtype)
    bit = tl.full([], 1, keys.dtype) << (width - 2)
    for _ in range(width // 2):
        low = threshold | bit
        middle = threshold | (bit << 1)
        high = low | middle
        reached = (keys >= low).to(packed)
        reached += (keys >= middle).to(packed) << field
        reached += (keys >= high).to(packed) << (2 * field)
        counts = tl.sum(reached, 0)
        threshold = tl.where((counts & ((1 << field) - 1)) >= count, low, threshold)
        threshold = tl.where(((counts >> field) & ((1 << field) - 1)) >= count, middle, threshold)
        threshold = tl.where((counts >> (2 * field)) >= count, high, threshold)
        bit = bit >> 2
    above = keys > threshold
    equal = (keys == threshold) & (keys > 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= count - tl.sum(above.to(tl.int32), 0)))


@triton.jit
def _near(anchors, token, frame, width, RULE: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Which tokens are neighbours of an anchor in their frame (Eq. 5): reference._neighbors, seen from the token."""
    place = token % frame  # within the frame
    row, column = place // width, place % width
    chosen = anchors.to(tl.int32)
    near = token < 0
    reach = 0
    for k in tl.static_range(len(STEPS)):
        dy, dx = STEPS[k][0], STEPS[k][1]
        step = dy * width + dx
        reach = tl.maximum(reach, step)
        if RULE == "grid":
            inside = (row >= dy) & (row - dy < frame // width) & (column >= dx) & (column - dx < width)
        else:
            inside = (place >= step) & (place - step < frame)
        near |= inside & (tl.gather(chosen, tl.minimum(tl.maximum(token - step, 0), BLOCK - 1), 0) > 0)
    if RULE == "official" and len(STEPS) > 0:
        # Neighbours beyond the frame are clamped to its first and last token: does an anchor lie close enough?
        upto = tl.cumsum(chosen, 0)
        before = upto - chosen
        first, reach = token - place, tl.minimum(reach, frame)
        last = tl.minimum(first + frame, BLOCK) - 1
        head = tl.gather(upto, tl.minimum(first + reach, BLOCK) - 1, 0) > tl.gather(before, first, 0)
        tail = tl.gather(upto, last, 0) > tl.gather(before, tl.maximum(last + 1 - reach, 0), 0)
        near |= ((place == 0) & head) | ((place == frame - 1) & tail)
    return near


@triton.jit
def _size(images, k: tl.constexpr):
    return tl.full([], images[k], tl.int32)


@triton.jit(
    do_not_specialize=[
        "token_start", "row_start", "rows_per_program", "num_prefix_tokens",
        "stride_oi", "stride_os", "stride_di", "stride_ds", "stride_mi",
    ]
)  # fmt: skip
def select_kernel(
    object_ptr,  # [B, slots, P + N] or [slots, T]
    deep_ptr,  # the same, with slots of its own
    mask_ptr,  # [B, N] or [T] uint8, or None
    features_ptr,  # [B, P + N, C] or [T, C], as integers of the same size, or None: select only
    kept_ptr,  # [rows, C], contiguous, or None
    indices_ptr,  # [rows], contiguous
    roles_ptr,  # [B * N] or [T], contiguous
    images,  # tokens, frame, width, budget, anchors of each image; one entry serves all where there is only one
    token_start,  # of this launch's first image, in a packed sequence
    row_start,
    rows_per_program,
    num_prefix_tokens,
    channels,
    object_slots,
    deep_slots,
    stride_oi,
    stride_os,
    stride_ot,
    stride_di,
    stride_ds,
    stride_dt,
    stride_mi,
    stride_mt,
    stride_fi,
    stride_ft,
    stride_fc,
    PACKED: tl.constexpr,
    RULE: tl.constexpr,  # "paper", "official" or "grid"
    STEPS: tl.constexpr,  # (row, column) from an anchor to each neighbour
    REGISTERS: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least the tokens of an image
    COUNTS_FIT: tl.constexpr,  # at most 1023 tokens
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (i, s) selects for image i and gathers its rows from s * rows_per_program; s = 0 writes the roles."""
    image, part = tl.program_id(0), tl.program_id(1)
    tokens, frame, width = _size(images, 0), _size(images, 1), _size(images, 2)
    budget, anchor_limit = _size(images, 3), _size(images, 4)
    first_token = tl.full([], 0, tl.int64) + token_start
    first_row = tl.full([], 0, tl.int64) + row_start
    if len(images) == 5:
        first_token += image.to(tl.int64) * tokens
        first_row += image.to(tl.int64) * budget
    else:
        for k in tl.static_range(5, len(images), 5):
            later = image >= k // 5
            first_token += tl.where(later, tokens, 0)
            first_row += tl.where(later, budget, 0)
            tokens = tl.where(later, _size(images, k), tokens)
            frame = tl.where(later, _size(images, k + 1), frame)
            width = tl.where(later, _size(images, k + 2), width)
            budget = tl.where(later, _size(images, k + 3), budget)
            anchor_limit = tl.where(later, _size(images, k + 4), anchor_limit)

    # Where the image starts in the inputs: behind the prefix of its own row, or in the packed sequence.
    batch = tl.full([], 0, tl.int64) if PACKED else image.to(tl.int64)
    origin = first_token if PACKED else tl.full([], 0, tl.int64) + num_prefix_tokens
    token = tl.arange(0, BLOCK)
    valid = token < tokens
    eligible = valid
    if mask_ptr is not None:
        candidate = mask_ptr + batch * stride_mi + (token + (first_token if PACKED else 0)).to(tl.int64) * stride_mt
        eligible &= tl.load(candidate, mask=valid, other=0) != 0

    objects = _load_scores(
        object_ptr + batch * stride_oi + origin * stride_ot, object_slots, stride_os, stride_ot, token, valid
    )
    object_keys = tl.where(eligible, _keys(objects), 0)
    anchors = _best(object_keys, anchor_limit, COUNTS_FIT)  # Eq. 4
    buffers = _near(anchors, token, frame, width, RULE, STEPS, BLOCK) & eligible & (anchors == 0)
    if RULE == "official":  # nothing bounds the anchors there: the buffers of the highest indices go
        room = budget - tl.sum(anchors.to(tl.int32), 0)
        buffers &= tl.cumsum(buffers.to(tl.int32), 0) <= room
    taken = anchors | buffers
    rest = budget - tl.sum(taken.to(tl.int32), 0)
    role = tl.where(anchors, _ANCHOR, tl.where(buffers, _BUFFER, _DROPPED))
    if REGISTERS:
        deeps = _load_scores(
            deep_ptr + batch * stride_di + origin * stride_dt, deep_slots, stride_ds, stride_dt, token, valid
        )
        racing = eligible
        if RULE == "official":  # taken tokens lose 1 but stay in the race, as in the released code
            deeps -= taken.to(deeps.dtype)
        else:
            racing &= taken == 0
        registers = _best(tl.where(racing, _keys(deeps), 0), rest, COUNTS_FIT)  # Eq. 6 and 7
        role = tl.where(registers & (taken == 0), _REGISTER, role)
    else:
        role = tl.where(_best(tl.where(taken, 0, object_keys), rest, COUNTS_FIT), _ANCHOR, role)
    tl.store(roles_ptr + first_token + token, role.to(tl.uint8), mask=valid & (part == 0))

    kept = role != _DROPPED
    position = tl.cumsum(kept.to(tl.int32), 0)
    survivors = tl.max(position, 0)
    begin = part * rows_per_program
    end = tl.minimum(begin + rows_per_program, budget)
    indices_ptr += first_row
    position -= 1
    base = first_token if PACKED else tl.full([], 0, tl.int64)
    tl.store(indices_ptr + position, base + token, mask=kept & (position >= begin) & (position < end))
    tl.store(indices_ptr + token, -1, mask=(token >= survivors) & (token >= begin) & (token < end))

    if features_ptr is not None:
        tl.debug_barrier()  # this program's indices, written by any of its threads, are read back by all of them
        features_ptr += batch * stride_fi
        kept_ptr += first_row * channels
        for start in range(begin, end, ROWS):
            row = start + tl.arange(0, ROWS)
            index = tl.load(indices_ptr + row, mask=row < end, other=-1)
            source = tl.maximum(index, 0) + (0 if PACKED else num_prefix_tokens)
            for first_column in range(0, channels, COLUMNS):
                column = first_column + tl.arange(0, COLUMNS)
                inside = (column < channels)[None, :]
                values = tl.load(
                    features_ptr + source[:, None] * stride_ft + column.to(tl.int64)[None, :] * stride_fc,
                    mask=(index >= 0)[:, None] & inside,
                    other=0,
                )
                target = kept_ptr + row.to(tl.int64)[:, None] * channels + column[None, :]
                tl.store(target, values, mask=(row < end)[:, None] & inside)


# ------------------------------------------------------------------------------------------------------------ launcher

IMAGES = 16  # different images per launch: their sizes are kernel arguments, and 16 of them cost little time to pass
_ROWS = 8  # gathered at a time
_COLUMN_BYTES = 2048  # of each of them
# In all programs of a launch. Each repeats the selection, and more of them copy rows faster: as measured on an H200, up
# to 256 programs of 4 warps (576 tokens), 64 of 16 (4096) and 32 to 64 of 32 (16384).
_MOST_WARPS = 1024
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Chunk(NamedTuple):
    """The images of one launch."""

    number: int
    sizes: tuple[float, ...]  # see select_kernel; Triton compiles anew for integers of a tuple that 16 divides
    token_start: int
    row_start: int
    tokens: int  # of the largest image
    budget: int  # the largest


@functools.lru_cache(maxsize=1024)
def _chunks(images: tuple[Image, ...], batch: int | None) -> list[_Chunk]:
    """The launches for a batch of `batch` images that share one entry, or, None, for packed images: usually one."""
    entries = [(i.frames * i.height * i.width, i.height * i.width, i.width, i.budget, i.anchors) for i in images]
    if len(set(entries)) == 1:
        tokens, _, _, budget, _ = entries[0]
        return [_Chunk(len(entries) if batch is None else batch, tuple(map(float, entries[0])), 0, 0, tokens, budget)]
    chunks, token_start, row_start = [], 0, 0
    for first in range(0, len(entries), IMAGES):
        part = entries[first : first + IMAGES]
        padded = part + part[-1:] * (IMAGES - len(part))  # one compiled kernel for every number of images
        largest = max(entry[0] for entry in part), max(entry[3] for entry in part)
        sizes = tuple(float(size) for entry in padded for size in entry)
        chunks.append(_Chunk(len(part), sizes, token_start, row_start, *largest))
        token_start += sum(entry[0] for entry in part)
        row_start += sum(entry[3] for entry in part)
    return chunks


def warps_for(tokens: int) -> int:
    # Eight tokens per thread spill no registers; 16384 tokens are sixteen each and spill a few (bench/results/aot.md).
    return max(4, min(32, next_power_of_2(tokens) // 256))


@functools.lru_cache(maxsize=1024)
def constants_of(packed: bool, tokens: int, element_size: int, plan: SelectionPlan) -> dict:
    """The kernel's compile-time arguments. `tokens`: of the largest image."""
    return {
        "PACKED": packed,
        "RULE": "official" if plan.rule == "official_qwen" else plan.rule,  # they differ in the scores they are given
        "STEPS": NEIGHBORS[plan.neighborhood] if plan.buffers else (),
        "REGISTERS": plan.registers,
        "BLOCK": max(16, next_power_of_2(tokens)),
        "COUNTS_FIT": tokens <= 1023,
        "ROWS": _ROWS,
        "COLUMNS": _COLUMN_BYTES // element_size,
    }


def _select(
    features: Tensor | None,
    object_scores: Tensor,
    deep_scores: Tensor,
    candidate_mask: Tensor | None,
    plan: SelectionPlan,
) -> tuple[Tensor | None, Tensor, Tensor]:
    packed = object_scores.dim() == 2
    batch = () if packed else (len(object_scores),)
    tokens = object_scores.shape[-1] - plan.num_prefix_tokens
    indices = object_scores.new_empty(*batch, sum(image.budget for image in plan.images), dtype=torch.int64)
    roles = object_scores.new_empty(*batch, tokens, dtype=torch.uint8)
    kept = source = target = None
    if features is not None:
        kept = features.new_empty(*indices.shape, features.shape[-1])
        if features.element_size() == 16:  # complex numbers of two float64: no integer is as wide
            features = features.contiguous()
        integer = _INTEGERS[min(features.element_size(), 8)]
        source, target = features.view(integer), kept.view(integer)
    mask = None if candidate_mask is None else candidate_mask.view(torch.uint8)
    element_size = 8 if source is None else source.element_size()

    for chunk in _chunks(plan.images, *(batch or (None,))):
        if chunk.number == 0:
            continue
        parts = 1
        if source is not None:
            parts = min(cdiv(chunk.budget, _ROWS), max(1, _MOST_WARPS // (warps_for(chunk.tokens) * chunk.number)))
        rows = cdiv(cdiv(chunk.budget, parts), _ROWS) * _ROWS
        arguments = {
            "object_ptr": object_scores,
            "deep_ptr": deep_scores,
            "mask_ptr": mask,
            "features_ptr": source,
            "kept_ptr": target,
            "indices_ptr": indices,
            "roles_ptr": roles,
            "images": chunk.sizes,
            "token_start": chunk.token_start,
            "row_start": chunk.row_start,
            "rows_per_program": rows,
            "num_prefix_tokens": plan.num_prefix_tokens,
            "channels": 0 if source is None else source.shape[-1],
            "object_slots": object_scores.shape[-2],
            "deep_slots": deep_scores.shape[-2],
            **_strides("stride_o", "ist", object_scores),
            **_strides("stride_d", "ist", deep_scores),
            **_strides("stride_m", "it", mask),
            **_strides("stride_f", "itc", source),
        }
        constants = constants_of(packed, chunk.tokens, element_size, plan)
        grid = (chunk.number, cdiv(chunk.budget, rows))
        launch(select_kernel, grid, arguments, constants, warps_for(chunk.tokens), 3)
    return kept, indices, roles


def _strides(prefix: str, dims: str, tensor: Tensor | None) -> dict[str, int]:
    """Strides by the kernel's names: (i)mage, (s)lot, (t)oken, (c)hannel. A packed tensor's image stride is 0."""
    strides = () if tensor is None else tensor.stride()
    strides = (0,) * (len(dims) - len(strides)) + strides
    return {prefix + dim: stride for dim, stride in zip(dims, strides)}


def select_tokens(
    object_scores: Tensor, deep_scores: Tensor, candidate_mask: Tensor | None, plan: SelectionPlan
) -> tuple[Tensor, Tensor]:
    """`reference.select_tokens` and `select_tokens_varlen` on a GPU.

    Args:
        object_scores: [B, slots, P + N], or packed [slots, T]: scores are the sums over the slots, added in slot order,
            so that partial sums need no launch of their own. Every program adds them up again: meant for a handful of
            slots. Any strides.
        deep_scores: the same; its number of slots may be another.
        candidate_mask: [B, N] or [T] bool, or None.
        plan: images of at most `MAX_TOKENS` tokens.

    Returns:
        indices, roles: as the operator.

    Example:
        >>> indices, roles = select_tokens(sums, deep[:, None], None, plan)
    """
    return _select(None, object_scores, deep_scores, candidate_mask, plan)[1:]


def prune_tokens(
    features: Tensor, object_scores: Tensor, deep_scores: Tensor, candidate_mask: Tensor | None, plan: SelectionPlan
) -> tuple[Tensor, Tensor, Tensor]:
    """`select_tokens`, and in the same launch the kept rows of `features`.

    Args:
        features: [B, P + N, C] or [T, C], any dtype and strides.
        object_scores, deep_scores, candidate_mask, plan: as `select_tokens`.

    Returns:
        kept, indices, roles: as `torch.ops.hiprune.prune_tokens`.

    Example:
        >>> kept, indices, roles = prune_tokens(features, sums, deep[:, None], None, plan)
    """
    kept, indices, roles = _select(features, object_scores, deep_scores, candidate_mask, plan)
    assert kept is not None  # with features there are rows
    return kept, indices, roles
