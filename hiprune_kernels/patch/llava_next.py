"""LLaVA-NeXT: an image is cut into tiles behind a view of the whole, padding is cut away, and newlines end its rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from . import llava
from .encoders import Call, EncoderRun

NEWLINE = torch.tensor([-1])  # in `EncoderRun.places`


def image_sizes(call: Call) -> list[list[int]]:
    """(height, width) of each image, in pixels."""
    return torch.as_tensor(call.arguments["image_sizes"]).tolist()


def tiles_of(call: Call, size: list[int]) -> int:
    """How many tiles stock code cuts an image into, the view of the whole included."""
    config = call.patch.host.config
    return image_size_to_num_patches(size, config.image_grid_pinpoints, config.vision_config.image_size)


def check_tiles(run: EncoderRun) -> None:
    """Raise ValueError if the images' tiles are not those that the encoder runs on."""
    if sum(run.tiles) != len(run.grids):
        raise ValueError(f"image_sizes: expected sizes of {len(run.grids)} tiles in all, got those of {run.tiles}")


def check_strategy(call: Call) -> None:
    """Raise ValueError unless the features are those of the grid alone, as tiles are put together."""
    if llava.rows_before_grid(call) != 0:
        tower = call.patch.towers[0]
        needed = '"default"' if tower.num_prefix_tokens else '"full"'
        raise ValueError(
            f"vision_feature_select_strategy: expected {needed} for {tower.family.name}, as an image is put together "
            "of the grids of its tiles, without CLS tokens"
        )


def _layout(call: Call, run: EncoderRun) -> None:
    sizes = image_sizes(call)
    run.tiles = [tiles_of(call, size) for size in sizes]
    check_tiles(run)
    tokens = torch.arange(sum(run.sizes)).view(len(run.grids), -1, 1).split(run.tiles)
    packed, _ = call.patch.host.pack_image_features(tokens, sizes, "default", image_newline=NEWLINE)
    run.places = torch.cat(packed).flatten()


FAMILIES = {
    "llava_next": replace(
        llava.FAMILIES["llava"],
        name="LLaVA-NeXT (LlavaNextForConditionalGeneration)",
        check_call=check_strategy,
        layout=_layout,
        has_unpad=True,
        notes="the budget is shared out equally among an image's tiles; newlines stay besides",
    ),
}
