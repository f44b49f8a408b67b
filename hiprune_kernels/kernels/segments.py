"""The best tokens of segments whose budgets are on the device, and budgets shared out by weights: a launch each.

A program per segment. Where its indices begin depends on what the segments before it keep, so it works that out for
itself: a number each, and with a mask a count of candidates. No program waits for another, and nothing is copied to the
device: sizes are kernel arguments, as in kernels/selection.py.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch, next_power_of_2
from .selection import MAX_TOKENS, _best, _keys, _load_scores, _size, warps_for

RUNS = 16  # runs of equal segments per launch: their sizes are kernel arguments
MAX_TILES = 1024  # of one image, of whose shares one program holds all
MAX_TOTAL = 1 << 24  # sizes reach the kernels as float32

# ------------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _used(budgets_ptr, mask_ptr, earlier, tokens, stride_b, stride_m, BLOCK: tl.constexpr):
    """What the first `earlier` segments of a run keep, if the image's total leaves it to them."""
    token = tl.arange(0, BLOCK)
    used = tl.full([], 0, tl.int32)
    for _ in range(earlier):
        most = tokens
        if mask_ptr is not None:
            candidates = tl.load(mask_ptr + token.to(tl.int64) * stride_m, mask=token < tokens, other=0) != 0
            most = tl.sum(candidates.to(tl.int32), 0)
            mask_ptr += tokens.to(tl.int64) * stride_m
        budget = tl.load(budgets_ptr).to(tl.int64)
        used += tl.minimum(tl.maximum(budget, 0), most.to(tl.int64)).to(tl.int32)
        budgets_ptr += stride_b
    return used


@triton.jit(do_not_specialize=["token_start", "segment_start", "row_start"])
def segment_kernel(
    scores_ptr,  # [T]
    budgets_ptr,  # [R]
    mask_ptr,  # [T] uint8, or None
    indices_ptr,  # contiguous
    roles_ptr,  # [T], contiguous
    runs,  # of each run of equal segments: tokens, segments, and the image's total, -1 where it opens no image
    token_start,  # where this launch's first image begins in T, R and the indices
    segment_start,
    row_start,
    stride_s,
    stride_b,
    stride_m,
    BLOCK: tl.constexpr,  # power of two, at least the tokens of a segment
    COUNTS_FIT: tl.constexpr,  # at most 1023 tokens
):
    """Program p selects for the launch's segment p. One run serves all images where there is only one."""
    program = tl.program_id(0)
    first_segment = tl.full([], 0, tl.int32)  # of the run, in this launch
    run_token = tl.full([], 0, tl.int64) + token_start
    row = tl.full([], 0, tl.int64) + row_start
    used = tl.full([], 0, tl.int32)
    if len(runs) == 3:
        tokens, segments, total = _size(runs, 0), _size(runs, 1), _size(runs, 2)
        image = program // segments
        first_segment += image * segments
        run_token += image.to(tl.int64) * segments * tokens
        row += image.to(tl.int64) * total
        earlier = program - first_segment
        last = earlier == segments - 1
        at = budgets_ptr + (first_segment + segment_start).to(tl.int64) * stride_b
        masks = None if mask_ptr is None else mask_ptr + run_token * stride_m
        used += _used(at, masks, earlier, tokens, stride_b, stride_m, BLOCK)
        first_token = run_token + earlier.to(tl.int64) * tokens
    else:
        # Which image is it of, and where do that one's segments and indices begin?
        image_segment = tl.full([], 0, tl.int32)
        next_row = row
        total = tl.full([], 0, tl.int32)
        for k in tl.static_range(0, len(runs), 3):
            given = _size(runs, k + 2)
            opens = (given >= 0) & (program >= first_segment)
            image_segment = tl.where(opens, first_segment, image_segment)
            row = tl.where(opens, next_row, row)
            total = tl.where(opens, given, total)
            next_row += tl.maximum(given, 0)
            first_segment += _size(runs, k + 1)
        first_segment = tl.full([], 0, tl.int32)
        first_token = run_token
        tokens = tl.full([], 0, tl.int32)
        last = program < 0
        for k in tl.static_range(0, len(runs), 3):
            size, segments = _size(runs, k), _size(runs, k + 1)
            earlier = tl.minimum(tl.maximum(program - first_segment, 0), segments)
            mine = (program >= first_segment) & (program < first_segment + segments)
            first_token = tl.where(mine, run_token + earlier.to(tl.int64) * size, first_token)
            tokens = tl.where(mine, size, tokens)
            ends = mine & (earlier == segments - 1)
            if k + 3 < len(runs):
                ends &= _size(runs, k + 5) >= 0
            last |= ends
            at = budgets_ptr + (first_segment + segment_start).to(tl.int64) * stride_b
            masks = None if mask_ptr is None else mask_ptr + run_token * stride_m
            earlier = tl.where(first_segment >= image_segment, earlier, 0)
            used += _used(at, masks, earlier, size, stride_b, stride_m, BLOCK)
            first_segment += segments
            run_token += segments.to(tl.int64) * size

    token = tl.arange(0, BLOCK)
    valid = token < tokens
    eligible = valid
    if mask_ptr is not None:
        eligible &= tl.load(mask_ptr + (first_token + token) * stride_m, mask=valid, other=0) != 0
    used = tl.minimum(used, total)
    most = tl.minimum(tl.sum(eligible.to(tl.int32), 0), total - used)
    budget = tl.load(budgets_ptr + (program + segment_start).to(tl.int64) * stride_b).to(tl.int64)
    budget = tl.minimum(tl.maximum(budget, 0), most.to(tl.int64)).to(tl.int32)
    scores = _load_scores(scores_ptr + first_token * stride_s, 1, 0, stride_s, token, valid)
    kept = _best(tl.where(eligible, _keys(scores), 0), budget, COUNTS_FIT)
    tl.store(roles_ptr + first_token + token, kept.to(tl.uint8), mask=valid)
    place = row + used + tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(indices_ptr + place, first_token + token, mask=kept)
    if last:
        for start in range(used + budget, total, BLOCK):
            tl.store(indices_ptr + row + start + token, -1, mask=start + token < total)


@triton.jit
def _pick(values, place, i):
    """values[i]"""
    return tl.sum(tl.where(place == i, values, 0.0), 0)


@triton.jit(do_not_specialize=["segment_start"])
def shares_kernel(
    weights_ptr,  # [R]
    caps_ptr,  # [R]
    shares_ptr,  # [R], contiguous
    images,  # tiles and total of each image; one entry serves all where there is only one
    segment_start,  # of this launch's first image
    stride_w,
    stride_c,
    BLOCK: tl.constexpr,  # power of two, at least the tiles of an image
):
    """Program i shares out the total of image i: `budget.shares`, operation by operation."""
    program = tl.program_id(0)
    tiles, total = _size(images, 0), _size(images, 1)
    first = tl.full([], 0, tl.int64) + segment_start
    if len(images) == 2:
        first += program.to(tl.int64) * tiles
    else:
        for k in tl.static_range(2, len(images), 2):
            later = program >= k // 2
            first += tl.where(later, tiles, 0)
            tiles = tl.where(later, _size(images, k), tiles)
            total = tl.where(later, _size(images, k + 1), total)
    place = tl.arange(0, BLOCK)
    part = place < tiles  # those that are not full
    weights = tl.load(weights_ptr + (first + place) * stride_w, mask=part, other=0.0).to(tl.float64)
    weights = tl.where((weights > 0) & (weights < 1e280), weights, 0.0)
    caps = tl.load(caps_ptr + (first + place) * stride_c, mask=part, other=0).to(tl.int64)
    caps = tl.minimum(tl.maximum(caps, 0), total.to(tl.int64))
    left = tl.minimum(tl.sum(caps, 0), total.to(tl.int64))
    quotas = weights
    full = tiles
    while full > 0:  # each round fills one at least, or is the last one
        counted = tl.where(part, weights, 0.0)
        counted = tl.where(tl.max(counted, 0) > 0, counted, part.to(tl.float64))
        divisor = tl.full([], 0.0, tl.float64)
        for i in range(tiles):  # in order, as the host adds them up
            divisor += _pick(counted, place, i)
        quotas = left.to(tl.float64) * counted / tl.where(divisor > 0, divisor, 1.0)
        filled = part & (quotas >= caps.to(tl.float64))
        left -= tl.sum(tl.where(filled, caps, 0), 0)
        part = part & (filled == 0)
        full = tl.sum(filled.to(tl.int32), 0)
    whole = tl.where(part, tl.floor(quotas), 0.0)
    fractions = tl.where(part, quotas - whole, -1.0)
    left -= tl.sum(whole.to(tl.int64), 0)
    before = tl.zeros([BLOCK], tl.int32)  # how many have a larger fraction, or as large a one and a lower index
    for i in range(tiles):
        other = _pick(fractions, place, i)
        before += ((other > fractions) | ((other == fractions) & (i < place))).to(tl.int32)
    more = part & (before < left)
    result = tl.where(part, whole.to(tl.int64) + more.to(tl.int64), caps)
    tl.store(shares_ptr + first + place, result, mask=place < tiles)


# ----------------------------------------------------------------------------------------------------------- launchers


class _Chunk(NamedTuple):
    """The images of one launch."""

    programs: int
    sizes: tuple[float, ...]  # Triton compiles anew for integers of a tuple that 16 divides
    token_start: int
    segment_start: int
    row_start: int
    largest: int  # tokens of a segment


def _runs(sizes: tuple[int, ...], tiles: tuple[int, ...], totals: tuple[int, ...]) -> list[list[tuple[int, int, int]]]:
    """Of each image: tokens, segments and total of its runs of equal segments; a total of -1 opens no image."""
    images, parts = [], iter(sizes)
    for count, total in zip(tiles, totals):
        groups = [(size, len(list(same))) for size, same in itertools.groupby(itertools.islice(parts, count))]
        images.append([(*group, -1 if i else total) for i, group in enumerate(groups)])
    return images


def segments_gap(sizes: Sequence[int], tiles: Sequence[int], totals: Sequence[int]) -> str:
    """What segment_kernel does not cover of these, or ""."""
    largest, most = max(sizes, default=0), max(map(len, _runs(tuple(sizes), tuple(tiles), tuple(totals))), default=0)
    if largest > MAX_TOKENS:
        return f"a segment of {largest} tokens, above {MAX_TOKENS}"
    if most > RUNS:
        return f"an image of {most} runs of equal segments, above {RUNS}"
    return "" if max(totals, default=0) < MAX_TOTAL else f"a total of {max(totals)}, not below {MAX_TOTAL}"


def shares_gap(totals: Sequence[int], tiles: Sequence[int]) -> str:
    """What shares_kernel does not cover of these, or ""."""
    if max(tiles, default=0) > MAX_TILES:
        return f"an image of {max(tiles)} tiles, above {MAX_TILES}"
    return "" if max(totals, default=0) < MAX_TOTAL else f"a total of {max(totals)}, not below {MAX_TOTAL}"


@functools.lru_cache(maxsize=1024)
def _chunks(sizes: tuple[int, ...], tiles: tuple[int, ...], totals: tuple[int, ...]) -> list[_Chunk]:
    """The launches for these images: usually one."""
    images = _runs(sizes, tiles, totals)
    if images and len(images[0]) == 1 and images.count(images[0]) == len(images):
        return [_Chunk(len(sizes), tuple(map(float, images[0][0])), 0, 0, 0, sizes[0])]
    chunks: list[_Chunk] = []
    runs: list[tuple[int, int, int]] = []
    starts = (0, 0, 0)

    def close() -> tuple[int, int, int]:
        padded = runs + [(1, 0, 0)] * (RUNS - len(runs))  # one compiled kernel for every number of runs
        programs = sum(run[1] for run in runs)
        flat = tuple(float(size) for run in padded for size in run)
        chunks.append(_Chunk(programs, flat, *starts, max(run[0] for run in runs)))
        tokens, rows = sum(size * count for size, count, _ in runs), sum(max(total, 0) for *_, total in runs)
        return starts[0] + tokens, starts[1] + programs, starts[2] + rows

    for image in images:
        if len(runs) + len(image) > RUNS:
            starts, runs = close(), []
        runs = runs + image
    if runs:
        close()
    return chunks


def segment_constants(tokens: int) -> dict:
    """segment_kernel's compile-time arguments; `tokens` of the largest segment."""
    return {"BLOCK": max(16, next_power_of_2(tokens)), "COUNTS_FIT": tokens <= 1023}


def select_top_segments(
    scores: Tensor,
    budgets: Tensor,
    candidate_mask: Tensor | None,
    sizes: Sequence[int],
    tiles: Sequence[int],
    totals: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """`reference.select_top_segments` on a GPU, for what `segments_gap` does not name. Any strides.

    Example:
        >>> indices, roles = select_top_segments(scores, budgets, None, [576] * 5, [5], [640])
    """
    indices = scores.new_empty(sum(totals), dtype=torch.int64)
    roles = scores.new_empty(len(scores), dtype=torch.uint8)
    for chunk in _chunks(tuple(sizes), tuple(tiles), tuple(totals)):
        arguments = {
            "scores_ptr": scores,
            "budgets_ptr": budgets,
            "mask_ptr": None if candidate_mask is None else candidate_mask.view(torch.uint8),
            "indices_ptr": indices,
            "roles_ptr": roles,
            "runs": chunk.sizes,
            "token_start": chunk.token_start,
            "segment_start": chunk.segment_start,
            "row_start": chunk.row_start,
            "stride_s": scores.stride(0),
            "stride_b": budgets.stride(0),
            "stride_m": 0 if candidate_mask is None else candidate_mask.stride(0),
        }
        constants = segment_constants(chunk.largest)
        launch(segment_kernel, (chunk.programs,), arguments, constants, warps_for(chunk.largest), 3)
    return indices, roles


def shares(weights: Tensor, caps: Tensor, totals: Sequence[int], tiles: Sequence[int]) -> Tensor:
    """`reference.shares` on a GPU, for what `shares_gap` does not name. Any strides.

    Example:
        >>> budgets = shares(weights, caps, [512], [4])
    """
    result = weights.new_empty(len(weights), dtype=torch.int64)
    entries, start = list(zip(tiles, totals)), 0
    step = len(entries) if len(set(entries)) == 1 else RUNS
    for first in range(0, len(entries), max(step, 1)):
        part = entries[first : first + step]
        padded = part[:1] if step != RUNS or len(set(entries)) == 1 else part + part[-1:] * (RUNS - len(part))
        arguments = {
            "weights_ptr": weights,
            "caps_ptr": caps,
            "shares_ptr": result,
            "images": tuple(float(number) for entry in padded for number in entry),
            "segment_start": start,
            "stride_w": weights.stride(0),
            "stride_c": caps.stride(0),
        }
        launch(shares_kernel, (len(part),), arguments, {"BLOCK": next_power_of_2(max(tiles))}, 1, 3)
        start += sum(count for count, _ in part)
    return result
