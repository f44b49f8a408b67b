"""Merging of tokens in two launches: each source finds its target, then each target adds up its sources.

No atomics: a program of the second launch goes through its image's tokens in order and adds those that are its own.
Blocks have one size whatever the shape, so a result depends on nothing but the image itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cdiv, launch
from .selection import IMAGES, _size

MAX_TARGETS = 65535  # of one image: an axis of the launch grid
MAX_TOKENS = 1 << 24  # of one image: sizes reach the kernels as float32
ASSIGN = {"ROWS": 32, "COLUMNS": 16, "DEPTH": 32}  # sources, targets and channels of keys at a time
MERGE = {"ROWS": 16, "COLUMNS": 256}  # tokens and channels at a time
WARPS = 4

_LARGEST = tl.constexpr(3.4028234663852886e38)

# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _place(images, image, token_start, target_start):
    """Tokens and targets of an image, and where they begin."""
    tokens, count = _size(images, 0), _size(images, 1)
    first_token = tl.full([], 0, tl.int64) + token_start
    first_target = tl.full([], 0, tl.int64) + target_start
    if len(images) == 2:
        first_token += image.to(tl.int64) * tokens
        first_target += image.to(tl.int64) * count
    else:
        for k in tl.static_range(2, len(images), 2):
            later = image >= k // 2
            first_token += tl.where(later, tokens, 0)
            first_target += tl.where(later, count, 0)
            tokens = tl.where(later, _size(images, k), tokens)
            count = tl.where(later, _size(images, k + 1), count)
    return tokens, count, first_token, first_target


@triton.jit(do_not_specialize=["token_start", "target_start", "stride_ki", "stride_ti", "stride_si"])
def assign_kernel(
    keys_ptr,  # [B, N, D] or [T, D]
    targets_ptr,  # [B, c] or [M]
    sources_ptr,  # [B, N] or [T] uint8
    assigned_ptr,  # the same, contiguous
    images,  # tokens and targets of each image; one entry serves all where there is only one
    token_start,  # of this launch's first image, in a packed sequence
    target_start,
    depth,
    stride_ki,
    stride_kt,
    stride_kd,
    stride_ti,
    stride_tt,
    stride_si,
    stride_st,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Program (i, s) finds the targets of tokens s * ROWS and following of image i."""
    image = tl.program_id(0)
    tokens, count, first_token, first_target = _place(images, image, token_start, target_start)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = token < tokens
    base = first_token if PACKED else tl.full([], 0, tl.int64)  # what indices count from
    position = first_target if PACKED else tl.full([], 0, tl.int64)
    batch = tl.full([], 0, tl.int64) if PACKED else image.to(tl.int64)
    keys_ptr += batch * stride_ki + base * stride_kt
    targets_ptr += batch * stride_ti + position * stride_tt
    sources_ptr += batch * stride_si + base * stride_st
    source = tl.load(sources_ptr + token.to(tl.int64) * stride_st, mask=valid, other=0) != 0
    best = tl.full([ROWS], float("-inf"), tl.float32)
    chosen = tl.zeros([ROWS], tl.int32)
    for start in range(0, count, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        target = tl.load(targets_ptr + column.to(tl.int64) * stride_tt, mask=column < count, other=-1)
        inside = (column < count) & (target >= base) & (target < base + tokens)
        target = tl.where(inside, target - base, -1)
        source &= tl.max((token[:, None] == target[None, :]).to(tl.int32), 1) == 0
        products = tl.zeros([ROWS, COLUMNS], tl.float32)
        squares = tl.zeros([COLUMNS], tl.float32)
        for first in range(0, depth, DEPTH):
            channel = first + tl.arange(0, DEPTH)
            within = (channel < depth)[None, :]
            at = keys_ptr + channel.to(tl.int64)[None, :] * stride_kd
            ours = tl.load(at + token.to(tl.int64)[:, None] * stride_kt, mask=valid[:, None] & within, other=0.0)
            theirs = tl.load(
                at + tl.maximum(target, 0)[:, None] * stride_kt, mask=inside[:, None] & within, other=0.0
            ).to(tl.float32)
            products = tl.dot(ours.to(tl.float32), tl.trans(theirs), products, input_precision="ieee")
            squares += tl.sum(theirs * theirs, 1)
        lengths = tl.maximum(tl.sqrt_rn(squares), 1e-12)  # of zeros, too: 0 / 0 is no cosine
        products = tl.div_rn(products, tl.broadcast_to(lengths[None, :], [ROWS, COLUMNS]))
        products = tl.where(tl.abs(products) <= _LARGEST, products, -_LARGEST)  # NaN, too
        products = tl.where(inside[None, :], products, float("-inf"))
        top = tl.max(products, 1)
        first_top = tl.min(tl.where(products == top[:, None], column[None, :], count), 1)  # of equals
        better = top > best
        best = tl.where(better, top, best)
        chosen = tl.where(better, first_top, chosen)
    moves = source & (best > float("-inf"))
    tl.store(assigned_ptr + first_token + token, tl.where(moves, position + chosen, -1), mask=valid)


@triton.jit(do_not_specialize=["token_start", "target_start", "stride_ti", "stride_fi"])
def merge_kernel(
    features_ptr,  # [B, N, C] or [T, C]
    targets_ptr,
    assigned_ptr,
    merged_ptr,  # as the features, or [B, c, C] or [M, C] with ROWS_ONLY; contiguous
    images,
    token_start,
    target_start,
    channels,
    stride_ti,
    stride_tt,
    stride_fi,
    stride_ft,
    stride_fc,
    PACKED: tl.constexpr,
    ROWS_ONLY: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (i, j, s) writes channels s * COLUMNS and following of the row of image i's target j."""
    image, j = tl.program_id(0), tl.program_id(1)
    tokens, count, first_token, first_target = _place(images, image, token_start, target_start)
    if j >= count:
        return
    base = first_token if PACKED else tl.full([], 0, tl.int64)
    position = (first_target if PACKED else tl.full([], 0, tl.int64)) + j
    batch = tl.full([], 0, tl.int64) if PACKED else image.to(tl.int64)
    target = tl.load(targets_ptr + batch * stride_ti + position * stride_tt) - base
    inside = (target >= 0) & (target < tokens)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    within = column < channels
    features_ptr += batch * stride_fi + base * stride_ft
    columns_ptr = features_ptr + column.to(tl.int64) * stride_fc
    total = tl.zeros([COLUMNS], tl.float32)
    members = tl.full([], 0, tl.int32)
    for start in range(0, tokens, ROWS):
        token = start + tl.arange(0, ROWS)
        mine = tl.load(assigned_ptr + first_token + token, mask=token < tokens, other=-1) == position
        here = tl.sum(mine.to(tl.int32), 0)
        if here > 0:
            rows = columns_ptr[None, :] + token.to(tl.int64)[:, None] * stride_ft
            values = tl.load(rows, mask=mine[:, None] & within[None, :], other=0.0)
            total += tl.sum(values.to(tl.float32), 0)
            members += here
    own = tl.load(columns_ptr + tl.maximum(target, 0) * stride_ft, mask=within & inside, other=0.0)
    divisor = tl.full([COLUMNS], 1.0, tl.float32) * tl.maximum(members, 1).to(tl.float32)
    result = (own.to(tl.float32) + tl.div_rn(total, divisor)).to(merged_ptr.dtype.element_ty)
    if ROWS_ONLY:
        tl.store(merged_ptr + (first_target + j) * channels + column, result, mask=within)
    else:  # a target that is in the list twice has its sources at the first place, and stays as that one makes it
        row = merged_ptr + (first_token + target) * channels
        tl.store(row + column, result, mask=within & (members > 0))


# ------------------------------------------------------------------------------------------------------------ launcher


class _Chunk(NamedTuple):
    """The images of one launch."""

    number: int
    sizes: tuple[float, ...]  # Triton compiles anew for integers of a tuple that 16 divides
    token_start: int
    target_start: int
    tokens: int  # the most
    targets: int


def merge_gap(sizes: Sequence[int], counts: Sequence[int]) -> str:
    """What the kernels do not cover of these, or ""."""
    if max(sizes, default=0) >= MAX_TOKENS:
        return f"an image of {max(sizes)} tokens, not below {MAX_TOKENS}"
    return "" if max(counts, default=0) <= MAX_TARGETS else f"an image of {max(counts)} targets, above {MAX_TARGETS}"


@functools.lru_cache(maxsize=1024)
def _chunks(sizes: tuple[int, ...], counts: tuple[int, ...]) -> list[_Chunk]:
    """The launches for these images: usually one."""
    entries = list(zip(sizes, counts))
    if len(set(entries)) == 1:
        return [_Chunk(len(entries), tuple(map(float, entries[0])), 0, 0, *entries[0])]
    chunks, tokens, targets = [], 0, 0
    for first in range(0, len(entries), IMAGES):
        part = entries[first : first + IMAGES]
        padded = part + part[-1:] * (IMAGES - len(part))  # one compiled kernel for every number of images
        flat = tuple(float(size) for entry in padded for size in entry)
        chunks.append(_Chunk(len(part), flat, tokens, targets, max(e[0] for e in part), max(e[1] for e in part)))
        tokens, targets = tokens + sum(e[0] for e in part), targets + sum(e[1] for e in part)
    return chunks


def merge_tokens(
    features: Tensor,
    keys: Tensor,
    targets: Tensor,
    sources: Tensor,
    sizes: Sequence[int],
    counts: Sequence[int],
    rows_only: bool,
) -> tuple[Tensor, Tensor]:
    """`reference.merge_tokens` on a GPU, for what `merge_gap` does not name.

    Args:
        features, keys: [B, N, C] and [B, N, D], or packed [T, C] and [T, D]; float32, bfloat16 or float16, any strides.
        targets, sources: as the operator's.
        sizes, counts: of every image, of a batch too.

    Example:
        >>> merged, assigned = merge_tokens(features, keys, targets, sources, [576], [10], True)
    """
    packed, channels = features.dim() == 2, features.shape[-1]
    assigned = targets.new_empty(sources.shape)
    if rows_only:
        merged = features.new_empty(*targets.shape, channels)
    else:
        merged = features.clone(memory_format=torch.contiguous_format)
    for chunk in _chunks(tuple(sizes), tuple(counts)):
        common = {"images": chunk.sizes, "token_start": chunk.token_start, "target_start": chunk.target_start}
        if chunk.tokens == 0 and not rows_only:
            continue
        if chunk.tokens:
            arguments = {
                "keys_ptr": keys,
                "targets_ptr": targets,
                "sources_ptr": sources.view(torch.uint8),
                "assigned_ptr": assigned,
                **common,
                "depth": keys.shape[-1],
                **_strides("stride_k", "itd", keys),
                **_strides("stride_t", "it", targets),
                **_strides("stride_s", "it", sources),
            }
            grid = chunk.number, cdiv(chunk.tokens, ASSIGN["ROWS"])
            launch(assign_kernel, grid, arguments, {"PACKED": packed, **ASSIGN}, WARPS, 2)
        if chunk.targets and channels:
            arguments = {
                "features_ptr": features,
                "targets_ptr": targets,
                "assigned_ptr": assigned,
                "merged_ptr": merged,
                **common,
                "channels": channels,
                **_strides("stride_t", "it", targets),
                **_strides("stride_f", "itc", features),
            }
            blocks = chunk.number, chunk.targets, cdiv(channels, MERGE["COLUMNS"])
            constants = {"PACKED": packed, "ROWS_ONLY": rows_only, **MERGE}
            launch(merge_kernel, blocks, arguments, constants, WARPS, 2)
    return merged, assigned


def _strides(prefix: str, dims: str, tensor: Tensor) -> dict[str, int]:
    """Strides by the kernels' names: (i)mage, (t)oken, (c)hannel or (d)epth. A packed tensor's image stride is 0."""
    strides = (0,) * (len(dims) - tensor.dim()) + tensor.stride()
    return {prefix + dim: stride for dim, stride in zip(dims, strides)}
