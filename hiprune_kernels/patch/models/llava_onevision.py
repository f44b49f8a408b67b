"""LLaVA-OneVision: tiles as in LLaVA-NeXT, but the features of large images and of videos are interpolated.

Each token of the language model is then a mixture of several of the encoder's tokens. So all features are computed, the
encoder's scores are interpolated as the features are, and the selection is made among the language model's tokens.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...facts import MODELS
from ...methods import TokenLayout
from ...methods.base import Grid
from ..call import Call
from ..edits import StockModule
from . import llava_next
from .llava_next import NEWLINE


def _layout(call: Call, grids: list[Grid], video: bool) -> TokenLayout:
    return (_layout_of_videos if video else _layout_of_images)(call, grids)


def _with_newlines(tokens: Tensor) -> Tensor:
    """Places of rows of tokens, [R, W], with a newline behind each row."""
    return F.pad(tokens, (0, 1), value=int(NEWLINE)).flatten()


def _layout_of_videos(call: Call, grids: list[Grid]) -> TokenLayout:
    host, (height, width) = call.patch.host, grids[0]
    videos, frames = call.arguments["pixel_values_videos"].shape[:2]
    pooled = math.ceil(height / 2), math.ceil(width / 2)
    tokens = torch.arange(len(grids) * math.prod(pooled)).view(videos, -1)

    def pool(rows: Tensor) -> Tensor:
        return host.apply_pooling(rows.view(-1, height * width, rows.shape[-1])).flatten(0, 1)

    return TokenLayout((pooled,) * len(grids), (frames,) * videos, placeholders=_with_newlines(tokens), pool=pool)


def _layout_of_images(call: Call, grids: list[Grid]) -> TokenLayout:
    host, grid, sizes = call.patch.host, grids[0], llava_next.image_sizes(call)
    counts = call.arguments.get("batch_num_images")
    cut = [True] * len(sizes)
    if counts is not None:  # of prompts with several images each is one tile
        cut = [count == 1 for count in torch.as_tensor(counts).tolist() for _ in range(count)]
    tiles = [llava_next.tiles_of(call, size) if one else 1 for size, one in zip(sizes, cut)]
    llava_next.check_tiles(tiles, grids)
    laid = [_lay_image(host, grid, count, size) for count, size in zip(tiles, sizes)]
    tokens = [sum(map(math.prod, own)) for own, _ in laid]
    firsts = [0, *itertools.accumulate(tokens)]
    placeholders = torch.cat([torch.where(p < 0, p, p + first) for (_, p), first in zip(laid, firsts)])

    def pool(rows: Tensor) -> Tensor:
        parts = rows.view(sum(tiles), -1, rows.shape[-1]).split(tiles)
        images = zip((part.flatten(0, 1) for part in parts), parts, tokens, sizes)
        # What is not interpolated keeps its number of tokens.
        return torch.cat([own if len(own) == n else _pack(host, part, size) for own, part, n, size in images])

    counts = [len(own) for own, _ in laid]
    return TokenLayout(
        tuple(each for own, _ in laid for each in own),
        tuple(counts),
        placeholders=placeholders,
        pool=None if counts == tiles else pool,
        thumbnail=0,
        tile_grids=tuple(llava_next.tile_grid(call, size) for size in sizes),
        encoder_tiles=tuple(tiles),
    )


def _lay_image(host: StockModule, grid: Grid, tiles: int, size: list[int]) -> tuple[list[Grid], Tensor]:
    """The token grids in which one image reaches the prompt, and its places, counted from the image's first token."""
    tokens = torch.arange(tiles * math.prod(grid)).view(tiles, -1, 1)
    probe = torch.empty(tokens.shape, device="meta")
    length = len(_pack(host, probe, size, torch.empty(1, device="meta")))
    # So many may be had without being interpolated.
    places = _pack(host, tokens, size, NEWLINE, f"anyres_max_{tiles}").flatten()
    if len(places) == length:
        return [grid] * tiles, places
    rows = length - len(_pack(host, probe, size))  # each has one newline
    common = rows, (length - math.prod(grid)) // rows - 1
    mixed = torch.arange(math.prod(common)).view(common) + math.prod(grid)
    return [grid, common], torch.cat([torch.arange(math.prod(grid)), _with_newlines(mixed)])


def _pack(
    host: StockModule, tiles: Tensor, size: list[int], newline: Tensor | None = None, aspect_ratio: str | None = None
) -> Tensor:
    """One image's tiles, [tiles, N, C], through the stock packing: [P, C]."""
    aspect_ratio = host.config.vision_aspect_ratio if aspect_ratio is None else aspect_ratio
    packed, _ = host.pack_image_features([tiles], [size], image_newline=newline, vision_aspect_ratio=aspect_ratio)
    return packed[0]


FAMILIES = {
    "llava_onevision": replace(
        llava_next.FAMILIES["llava_next"],
        kind=MODELS["llava_onevision"],
        layout=_layout,
    ),
}
