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
from torch import Tensor, nn

from . import llava_next
from .encoders import Call, EncoderRun
from .llava_next import NEWLINE
from .towers import Grid


def _layout(call: Call, run: EncoderRun) -> None:
    (_layout_of_videos if run.video else _layout_of_images)(call, run)


def _with_newlines(tokens: Tensor) -> Tensor:
    """Places of rows of tokens, [R, W], with a newline behind each row."""
    return F.pad(tokens, (0, 1), value=int(NEWLINE)).flatten()


def _layout_of_videos(call: Call, run: EncoderRun) -> None:
    host, (height, width) = call.patch.host, run.grids[0]
    videos, frames = call.arguments["pixel_values_videos"].shape[:2]
    run.pool = lambda scores: host.apply_pooling(scores.view(-1, height * width, 1)).flatten()
    run.tiles = [frames] * videos
    run.grids = [(math.ceil(height / 2), math.ceil(width / 2))] * len(run.grids)
    run.places = _with_newlines(torch.arange(sum(run.sizes)).view(videos, -1))


def _layout_of_images(call: Call, run: EncoderRun) -> None:
    host, grid, sizes = call.patch.host, run.grids[0], llava_next.image_sizes(call)
    counts = call.arguments.get("batch_num_images")
    cut = [True] * len(sizes)
    if counts is not None:  # of prompts with several images each is one tile
        cut = [count == 1 for count in torch.as_tensor(counts).tolist() for _ in range(count)]
    tiles = run.tiles = [llava_next.tiles_of(call, size) if one else 1 for size, one in zip(sizes, cut)]
    llava_next.check_tiles(run)
    laid = [_lay_image(host, grid, count, size) for count, size in zip(tiles, sizes)]
    run.tiles, run.grids = [len(grids) for grids, _ in laid], [each for grids, _ in laid for each in grids]
    tokens = [sum(map(math.prod, grids)) for grids, _ in laid]
    firsts = [0, *itertools.accumulate(tokens)]
    run.places = torch.cat([torch.where(p < 0, p, p + first) for (_, p), first in zip(laid, firsts)])

    def pool(scores: Tensor) -> Tensor:
        parts = scores.view(sum(tiles), -1, 1).split(tiles)
        images = zip(parts, tokens, sizes)  # what is not interpolated keeps its number of tokens
        return torch.cat([p.flatten() if p.numel() == n else _pack(host, p, size) for p, n, size in images])

    if run.tiles != tiles:
        run.pool = pool


def _lay_image(host: nn.Module, grid: Grid, tiles: int, size: list[int]) -> tuple[list[Grid], Tensor]:
    """The token grids in which one image reaches the prompt, and its places, counted from the image's first token."""
    tokens = torch.arange(tiles * math.prod(grid)).view(tiles, -1, 1)
    probe = torch.empty(tokens.shape, device="meta")
    length = len(_pack(host, probe, size, torch.empty(1, device="meta")))
    places = _pack(host, tokens, size, NEWLINE, f"anyres_max_{tiles}")  # too many to be interpolated
    if len(places) == length:
        return [grid] * tiles, places
    rows = length - len(_pack(host, probe, size))  # each has one newline
    common = rows, (length - math.prod(grid)) // rows - 1
    mixed = torch.arange(math.prod(common)).view(common) + math.prod(grid)
    return [grid, common], torch.cat([torch.arange(math.prod(grid)), _with_newlines(mixed)])


def _pack(
    host: nn.Module, tiles: Tensor, size: list[int], newline: Tensor | None = None, aspect_ratio: str | None = None
) -> Tensor:
    """One image's tiles, [tiles, N, 1], through the stock packing: [P]."""
    aspect_ratio = host.config.vision_aspect_ratio if aspect_ratio is None else aspect_ratio
    packed, _ = host.pack_image_features([tiles], [size], image_newline=newline, vision_aspect_ratio=aspect_ratio)
    return packed[0].flatten()


FAMILIES = {
    "llava_onevision": replace(
        llava_next.FAMILIES["llava_next"],
        name="LLaVA-OneVision (LlavaOnevisionForConditionalGeneration)",
        layout=_layout,
        budget_per="image or video",
        notes="the budget is shared out equally among an image's tiles or a video's frames, newlines stay besides; "
        "interpolated features (large images, videos) are computed for all tokens and selected afterwards",
    ),
}
