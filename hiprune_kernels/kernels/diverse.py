"""Greedy diverse selection: the cosines between an image's tokens in one launch, and all its choices in another.

Every tile of the matrix of cosines is a program of its own, computed once and stored twice, as the matrix is symmetric.
Then one program per image holds what each token is worth in its registers, and reads one row of the matrix per choice:
no launch, no synchronisation between them. Sizes and counts travel as kernel arguments, so a call may be captured in a
CUDA graph.

The order of every sum is fixed by constants: tiles are of one size, and what is summed up token by token is added in
the order of choice. So results depend on nothing but the image itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import cdiv, launch, next_power_of_2
from .selection import IMAGES, warps_for

MAX_TOKENS = 8192  # of one image: its matrix of cosines takes 256 MiB

# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit
def _number(images, k: tl.constexpr):
    return tl.full([], images[k], tl.int32)


@triton.jit
def _image(images, token_start, row_start):
    """Of this program's image: tokens, choices, and where it starts among tokens and among rows of the results."""
    image = tl.program_id(0)
    tokens, count = _number(images, 0), _number(images, 1)
    first_token = tl.full([], 0, tl.int64) + token_start
    first_row = tl.full([], 0, tl.int64) + row_start
    if len(images) == 2:
        first_token += image.to(tl.int64) * tokens
        first_row += image.to(tl.int64) * count
    else:
        for k in tl.static_range(2, len(images), 2):
            later = image >= k // 2
            first_token += tl.where(later, tokens, 0)
            first_row += tl.where(later, count, 0)
            tokens = tl.where(later, _number(images, k), tokens)
            count = tl.where(later, _number(images, k + 1), count)
    return tokens, count, first_token, first_row


@triton.jit
def _candidates(mask_ptr, stride, token, valid):
    candidate = valid
    if mask_ptr is not None:
        candidate &= tl.load(mask_ptr + token.to(tl.int64) * stride, mask=valid, other=0) != 0
    return candidate


@triton.jit
def _scale(squares):
    return 1.0 / tl.maximum(tl.sqrt(squares), 1e-12)


@triton.jit(do_not_specialize=["token_start", "stride_fi", "stride_ft", "stride_mi", "side"])
def cosines_kernel(
    features_ptr,  # [B, N, C] or [T, C]
    mask_ptr,  # [B, N] or [T] uint8, or None
    cosines_ptr,  # [images, side, side]
    nearest_ptr,  # [images, tiles, side], or None: each token's largest cosine with another candidate of a tile
    images,  # tokens and choices of each image; one entry serves all where there is only one
    token_start,  # of this launch's first image
    channels,
    side,  # at least the tokens of an image
    stride_fi,
    stride_ft,
    stride_fc,
    stride_mi,
    stride_mt,
    PACKED: tl.constexpr,
    TOKENS: tl.constexpr,  # of a tile
    CHANNELS: tl.constexpr,  # at a time
):
    """Program (i, r, c) computes tile (r, c) of image i's cosines, with c >= r, and stores it at (c, r) as well."""
    tile_row, tile_column = tl.program_id(1), tl.program_id(2)
    if tile_column < tile_row:
        return
    tokens, _, first_token, _ = _image(images, token_start, 0)
    if tile_column * TOKENS >= tokens:
        return
    image = tl.program_id(0).to(tl.int64)
    if PACKED:
        features_ptr += first_token * stride_ft
    else:
        features_ptr += (image + token_start) * stride_fi

    row = tile_row * TOKENS + tl.arange(0, TOKENS)
    column = tile_column * TOKENS + tl.arange(0, TOKENS)
    products = tl.zeros((TOKENS, TOKENS), tl.float32)
    row_squares, column_squares = tl.zeros((TOKENS,), tl.float32), tl.zeros((TOKENS,), tl.float32)
    row_ptr = features_ptr + row.to(tl.int64)[:, None] * stride_ft
    column_ptr = features_ptr + column.to(tl.int64)[:, None] * stride_ft
    for first in range(0, channels, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        inside, offset = (channel < channels)[None, :], channel.to(tl.int64)[None, :] * stride_fc
        x = tl.load(row_ptr + offset, mask=(row < tokens)[:, None] & inside, other=0.0)
        y = tl.load(column_ptr + offset, mask=(column < tokens)[:, None] & inside, other=0.0)
        row_squares += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
        column_squares += tl.sum(y.to(tl.float32) * y.to(tl.float32), 1)
        products = tl.dot(x, tl.trans(y), products, input_precision="ieee")
    # The product of the scales first: it is the same from either side.
    cosines = products * (_scale(row_squares)[:, None] * _scale(column_squares)[None, :])

    cosines_ptr += image * side * side  # within an image, 32 bits hold what MAX_TOKENS allows
    inside = (row < tokens)[:, None] & (column < tokens)[None, :]
    tl.store(cosines_ptr + row[:, None] * side + column[None, :], cosines, mask=inside)
    if tile_row != tile_column:
        tl.store(cosines_ptr + column[None, :] * side + row[:, None], cosines, mask=inside)

    if nearest_ptr is not None:
        if mask_ptr is not None:
            if PACKED:
                mask_ptr += first_token * stride_mt
            else:
                mask_ptr += (image + token_start) * stride_mi
        low = float("-inf")
        other = row[:, None] != column[None, :]
        by_row = tl.where(other & _candidates(mask_ptr, stride_mt, column, column < tokens)[None, :], cosines, low)
        by_column = tl.where(other & _candidates(mask_ptr, stride_mt, row, row < tokens)[:, None], cosines, low)
        nearest_ptr += image * tl.num_programs(1) * side
        tl.store(nearest_ptr + tile_column * side + row, tl.max(by_row, 1), mask=row < tokens)
        if tile_row != tile_column:
            tl.store(nearest_ptr + tile_row * side + column, tl.max(by_column, 0), mask=column < tokens)


@triton.jit
def _best(worth, left, token, BLOCK: tl.constexpr):
    """The token of the highest worth among those left, of which there is one, and that worth. NaN is behind all."""
    worth = tl.where((left > 0) & (worth == worth), worth, float("-inf"))
    most = tl.max(worth, 0)
    return tl.min(tl.where((left > 0) & (worth == most), token, BLOCK), 0), most


@triton.jit(do_not_specialize=["token_start", "row_start", "steps", "side", "stride_qi", "stride_mi"])
def choose_kernel(
    cosines_ptr,  # [images, side, side]
    nearest_ptr,  # [images, tiles, side], or None
    quality_ptr,  # [B, N] or [T], or None: farthest points
    mask_ptr,  # [B, N] or [T] uint8, or None
    covered_ptr,  # [images, steps, BLOCK], or None: of each choice, the part of each token that it covers
    indices_ptr,  # [rows], contiguous
    order_ptr,  # [rows], contiguous
    images,  # as cosines_kernel
    token_start,
    row_start,
    steps,  # at least the choices of an image
    side,
    tile_tokens,
    stride_qi,
    stride_qt,
    stride_mi,
    stride_mt,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,  # power of two, at least the tokens of an image
    UNROLL: tl.constexpr,
):
    """Program i makes all choices for image i."""
    tokens, count, first_token, first_row = _image(images, token_start, row_start)
    image = tl.program_id(0).to(tl.int64)
    base = first_token if PACKED else tl.full([], 0, tl.int64)
    batch = tl.full([], 0, tl.int64) if PACKED else image + token_start
    token = tl.arange(0, BLOCK)
    valid = token < tokens
    if mask_ptr is not None:
        mask_ptr += batch * stride_mi + base * stride_mt
    left = _candidates(mask_ptr, stride_mt, token, valid).to(tl.int32)
    candidates = left
    found = tl.minimum(tl.sum(left, 0), count)
    cosines_ptr += image * side * side
    indices_ptr += first_row
    order_ptr += first_row

    if quality_ptr is None:
        tiles = tl.cdiv(tokens, tile_tokens)
        nearest_ptr += image * tl.cdiv(side, tile_tokens) * side
        nearest = tl.full((BLOCK,), float("-inf"), tl.float32)
        for tile in range(tiles):
            cosine = tl.load(nearest_ptr + tile * side + token, mask=valid, other=0.0)
            nearest = tl.where(cosine > nearest, cosine, nearest)
        worth = 1 - nearest
    else:
        quality_ptr += batch * stride_qi + base * stride_qt
        covered_ptr += image * steps * BLOCK
        quality = tl.load(quality_ptr + token.to(tl.int64) * stride_qt, mask=valid, other=0.0).to(tl.float32)
        diagonal = tl.load(cosines_ptr + token.to(tl.int64) * (side + 1), mask=valid, other=0.0)
        worth = quality * quality * diagonal
        least = 1e-12 * tl.max(tl.where((left > 0) & (worth == worth), worth, 0.0), 0)

    for step in range(found):
        choice, most = _best(worth, left, token, BLOCK)
        if quality_ptr is not None:  # noqa: SIM102 (known when this is compiled; the next one is not)
            if most <= least:
                choice, _ = _best(quality, left, token, BLOCK)
        left = tl.where(token == choice, 0, left)
        tl.store(order_ptr + step, base + choice)
        cosine = tl.load(cosines_ptr + choice.to(tl.int64) * side + token, mask=valid, other=0.0)
        if quality_ptr is None:
            known = tl.where(step == 0, float("inf"), worth)
            worth = tl.where(1 - cosine < known, 1 - cosine, known)
        else:
            if most > least:
                own = tl.load(quality_ptr + choice.to(tl.int64) * stride_qt).to(tl.float32)
                part = cosine * quality * own
                for first in range(0, step, UNROLL):
                    for k in tl.static_range(UNROLL):
                        past = covered_ptr + (first + k) * BLOCK
                        weight = tl.load(past + choice, mask=first + k < step, other=0.0)
                        part -= weight * tl.load(past + token, mask=(first + k < step) & valid, other=0.0)
                part = part / tl.sqrt(most)
                worth -= part * part
                tl.store(covered_ptr + step * BLOCK + token, part, mask=valid)
                tl.debug_barrier()  # written by any of this program's threads, read back by all of them

    chosen = candidates - left
    position = tl.cumsum(chosen, 0) - 1
    tl.store(indices_ptr + position, base + token, mask=chosen > 0)
    missing = (token >= found) & (token < count)
    tl.store(indices_ptr + token, -1, mask=missing)
    tl.store(order_ptr + token, -1, mask=missing)


# ------------------------------------------------------------------------------------------------------------ launcher

TILE = 64  # tokens of a tile of cosines
_UNROLL = 4  # earlier choices that are read together
_MOST_BYTES = 1 << 28  # of the cosines of a launch, if it is of more than one image


class _Chunk(NamedTuple):
    """The images of one launch."""

    number: int
    sizes: tuple[float, ...]  # see cosines_kernel; Triton compiles anew for integers of a tuple that 16 divides
    first_image: int
    token_start: int
    row_start: int
    tokens: int  # of the largest image
    choices: int  # the most


@functools.lru_cache(maxsize=1024)
def _chunks(sizes: tuple[int, ...], counts: tuple[int, ...]) -> list[_Chunk]:
    """The launches for images of these sizes, usually one; images that are all alike share one entry."""
    chunks, entries = [], list(zip(sizes, counts))
    first = token_start = row_start = 0
    alike = len(set(entries)) == 1
    while first < len(entries):
        end, tokens = first + 1, sizes[first]
        while end < len(entries) and (alike or end - first < IMAGES):
            largest = max(tokens, sizes[end])
            if 4 * largest * largest * (end - first + 1) > _MOST_BYTES:
                break
            tokens, end = largest, end + 1
        part = entries[first:end]
        padded = part[:1] if alike else part + part[-1:] * (IMAGES - len(part))  # one compiled kernel for any number
        numbers = tuple(float(number) for entry in padded for number in entry)
        chunks.append(_Chunk(len(part), numbers, first, token_start, row_start, tokens, max(n for _, n in part)))
        token_start += sum(size for size, _ in part)
        row_start += sum(count for _, count in part)
        first = end
    return chunks


def constants_of(packed: bool, tokens: int, dtype: torch.dtype) -> tuple[dict, dict]:
    """The compile-time arguments of both kernels. `tokens`: of the largest image."""
    channels = 16 if dtype == torch.float32 else 32
    return (
        {"PACKED": packed, "TOKENS": TILE, "CHANNELS": channels},
        {"PACKED": packed, "BLOCK": max(16, next_power_of_2(tokens)), "UNROLL": _UNROLL},
    )


def select_diverse(
    features: Tensor,
    quality: Tensor | None,
    candidate_mask: Tensor | None,
    sizes: Sequence[int],
    counts: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """`torch.ops.hiprune.select_diverse` on a GPU.

    Args:
        features: [B, N, C] or [T, C] of any strides, float32, bfloat16 or float16; images of at most `MAX_TOKENS`.
        quality, candidate_mask: [B, N] or [T], or None.
        sizes, counts: as the operator.

    Returns:
        indices, order: as the operator.

    Example:
        >>> indices, order = select_diverse(features, None, None, [], [64])
    """
    packed = features.dim() == 2
    shape = (sum(counts),) if packed else (len(features), counts[0])
    indices, order = (features.new_empty(shape, dtype=torch.int64) for _ in range(2))
    if not packed:
        sizes, counts = [features.shape[1]] * len(features), [counts[0]] * len(features)
    for chunk in _chunks(tuple(sizes), tuple(counts)):
        _launch(features, quality, candidate_mask, chunk, packed, indices, order)
    return indices, order


def _launch(
    features: Tensor,
    quality: Tensor | None,
    candidate_mask: Tensor | None,
    chunk: _Chunk,
    packed: bool,
    indices: Tensor,
    order: Tensor,
) -> None:
    side, tiles = chunk.tokens, cdiv(chunk.tokens, TILE)
    of_tiles, of_choices = constants_of(packed, chunk.tokens, features.dtype)
    cosines = features.new_empty(chunk.number, side, side, dtype=torch.float32)
    nearest = covered = None
    if quality is None:
        nearest = features.new_empty(chunk.number, tiles, side, dtype=torch.float32)
    else:
        covered = features.new_empty(chunk.number, chunk.choices, of_choices["BLOCK"], dtype=torch.float32)
    mask = None if candidate_mask is None else candidate_mask.view(torch.uint8)
    # A batch's tensors are found by image, packed ones by token; results always by row.
    shared = {
        "images": chunk.sizes,
        "token_start": chunk.token_start if packed else chunk.first_image,
        "side": side,
        **_strides("stride_m", "it", mask),
    }
    arguments = {
        "features_ptr": features,
        "mask_ptr": mask,
        "cosines_ptr": cosines,
        "nearest_ptr": nearest,
        "channels": features.shape[-1],
        **_strides("stride_f", "itc", features),
        **shared,
    }
    launch(cosines_kernel, (chunk.number, tiles, tiles), arguments, of_tiles, 4, 3)
    arguments = {
        "cosines_ptr": cosines,
        "nearest_ptr": nearest,
        "quality_ptr": quality,
        "mask_ptr": mask,
        "covered_ptr": covered,
        "indices_ptr": indices,
        "order_ptr": order,
        "row_start": chunk.row_start,
        "steps": chunk.choices,
        "tile_tokens": TILE,
        **_strides("stride_q", "it", quality),
        **shared,
    }
    launch(choose_kernel, (chunk.number,), arguments, of_choices, warps_for(chunk.tokens), 3)


def _strides(prefix: str, dims: str, tensor: Tensor | None) -> dict[str, int]:
    """Strides by the kernels' names: (i)mage, (t)oken, (c)hannel. A packed tensor's image stride is 0."""
    strides = () if tensor is None else tensor.stride()
    strides = (0,) * (len(dims) - len(strides)) + strides
    return {prefix + dim: stride for dim, stride in zip(dims, strides)}
