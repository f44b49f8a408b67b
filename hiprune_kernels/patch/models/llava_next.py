"""LLaVA-NeXT: an image is cut into tiles behind a view of the whole, padding is cut away, and newlines end its rows."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, image_size_to_num_patches

from ...facts import MODELS
from ...methods import TokenLayout
from ...methods.base import Grid
from ..call import Call
from . import llava

NEWLINE = torch.tensor([-1])  # in `TokenLayout.placeholders`


def image_sizes(call: Call) -> list[list[int]]:
    """(height, width) of each image, in pixels."""
    return torch.as_tensor(call.arguments["image_sizes"]).tolist()


def tiles_of(call: Call, size: list[int]) -> int:
    """How many tiles stock code cuts an image into, the view of the whole included."""
    config = call.patch.host.config
    return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)


def tile_grid(call: Call, size: list[int]) -> tuple[int, int]:
    """(rows, columns) in which an image's tiles lie, without the view of the whole."""
    config = call.patch.host.config
    return get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)


def check_tiles(tiles: list[int], grids: list[Grid]) -> None:
    """Raise ValueError if the images' tiles are not those that the encoder runs on."""
    if sum(tiles) != len(grids):
        raise ValueError(f"image_sizes: expected sizes of {len(grids)} tiles in all, got those of {tiles}")


def check_strategy(call: Call) -> None:
    """Raise ValueError unless the features are those of the grid alone, as tiles are put together."""
    if llava.rows_before_grid(call) != 0:
        encoder = call.patch.encoders[0].facts
        needed = '"default"' if encoder.has_cls else '"full"'
        raise ValueError(
            f"vision_feature_select_strategy: expected {needed} for {encoder.kind.name}, as an image is put together "
            "of the grids of its tiles, without CLS tokens"
        )


def _layout(call: Call, grids: list[Grid], video: bool) -> TokenLayout:
    sizes = image_sizes(call)
    tiles = [tiles_of(call, size) for size in sizes]
    check_tiles(tiles, grids)
    tokens = torch.arange(sum(map(math.prod, grids))).view(len(grids), -1, 1).split(tiles)
    packed, _ = call.patch.host.pack_image_features(tokens, sizes, "default", image_newline=NEWLINE)
    return TokenLayout(
        tuple(grids),
        tuple(tiles),
        placeholders=torch.cat(packed).flatten(),
        thumbnail=0,
        tile_grids=tuple(tile_grid(call, size) for size in sizes),
    )


FAMILIES = {
    "llava_next": replace(
        llava.FAMILIES["llava"],
        kind=MODELS["llava_next"],
        check_call=check_strategy,
        layout=_layout,
    ),
}
