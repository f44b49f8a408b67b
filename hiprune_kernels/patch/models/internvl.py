"""InternVL: the image is cut into tiles, and pixel shuffle makes one token of each square of 2 by 2 patches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from ...facts import MODELS, encoder_type
from ...methods import TokenLayout
from ...methods.base import Grid
from ..call import Call
from ..edits import StockModule
from ..language import cache_of, cached_length, live_map
from ..late import placeholders_in
from . import llava
from .family import ModelFamily
from .llava import llava_host, rows_before_grid, vision_feature_layer

TEXT_MODELS = (*llava.TEXT_MODELS, "qwen3")


def _check(host: StockModule) -> None:
    vision, text = encoder_type(host.config.vision_config), host.config.text_config.model_type
    if vision != "internvl_vision":
        raise ValueError(f"model: expected a vision tower of type internvl_vision, got {vision!r}")
    if text not in TEXT_MODELS:
        raise ValueError(f"model: expected a text model of type {', '.join(TEXT_MODELS)}, got {text!r}")


def _check_call(call: Call) -> None:
    if rows_before_grid(call) != 0:
        raise ValueError('vision_feature_select_strategy: expected "default", as CLS has no place in the grid')
    encoder, side = call.patch.encoders[0], _side(call)
    height, width = encoder.family.grids(encoder.config, call.arguments)[0]
    if height != width or height % side:
        raise ValueError(
            f"pixel_values: expected square tiles of a multiple of {side} patches, got tiles of {height} by {width}"
        )


def _side(call: Call) -> int:
    """Tokens are squares of so many patches a side."""
    return round(1 / call.patch.host.config.downsample_ratio)


def _layout(call: Call, grids: list[Grid], video: bool) -> TokenLayout:
    """Stock code takes the grid of patches for a square one, whatever the image is."""
    side = _side(call)
    length = math.isqrt(math.prod(grids[0])) // side
    squares = torch.arange((length * side) ** 2).view(length, side, length, side)
    return TokenLayout(
        ((length, length),) * len(grids),
        (1,) * len(grids),
        unit_rows=squares.transpose(1, 2).reshape(-1, side**2),
        pictures=_pictures(call, length**2, len(grids)),
        thumbnail=-1,
    )


def _pictures(call: Call, tokens: int, tiles: int) -> tuple[int, ...] | None:
    """How many tiles each picture has: in the prompt its placeholders stand together, and text is between pictures.

    None where the prompt does not tell.
    """
    places = placeholders_in(call.patch.host, call.arguments, call.patch.host.config.image_token_id).cpu()
    cache = cache_of(call.arguments)
    if call.prompts is not None and cache is not None:  # `generate` hands over earlier turns too
        cache_map = live_map(cache)
        places = places[:, cached_length(cache) + (cache_map.gone if cache_map is not None else 0) :]
    places = F.pad(places, (1, 1))
    before, here = places[:, :-1], places[:, 1:]
    lengths = (before & ~here).nonzero()[:, 1] - (here & ~before).nonzero()[:, 1]
    if int(lengths.sum()) != tiles * tokens or bool((lengths % tokens).any()):
        return None
    return tuple((lengths // tokens).tolist())


FAMILIES = {
    "internvl": ModelFamily(
        kind=MODELS["internvl"],
        host=llava_host,
        check=_check,
        check_call=_check_call,
        encoders=lambda host: [host.vision_tower],
        feature_layer=vision_feature_layer,
        layout=_layout,
        connector=lambda host: host.multi_modal_projector,
        language_model=lambda host: host.language_model,
    ),
}
