"""InternVL: the image is cut into tiles, and pixel shuffle makes one token of each square of 2 by 2 patches."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .encoders import Call, EncoderRun, ModelFamily
from .llava import TEXT_MODELS, finish_llava, llava_host, rows_before_grid, vision_feature_layer

_TEXT_MODELS = (*TEXT_MODELS, "qwen3")


def _check(host: nn.Module) -> None:
    vision, text = host.config.vision_config.model_type, host.config.text_config.model_type
    if vision != "internvl_vision":
        raise ValueError(f"model: expected a vision tower of type internvl_vision, got {vision!r}")
    if text not in _TEXT_MODELS:
        raise ValueError(f"model: expected a text model of type {', '.join(_TEXT_MODELS)}, got {text!r}")


def _check_call(call: Call) -> None:
    if rows_before_grid(call) != 0:
        raise ValueError('vision_feature_select_strategy: expected "default", as CLS has no place in the grid')
    tower, side = call.patch.towers[0], _side(call)
    height, width = tower.family.grids(tower.config, call.arguments)[0]
    if height != width or height % side:
        raise ValueError(
            f"pixel_values: expected square tiles of a multiple of {side} patches, got tiles of {height} by {width}"
        )


def _side(call: Call) -> int:
    """Tokens are squares of so many patches a side."""
    return round(1 / call.patch.host.config.downsample_ratio)


def _layout(call: Call, run: EncoderRun) -> None:
    """Stock code takes the grid of patches for a square one, whatever the image is."""
    side = _side(call)
    length = math.isqrt(math.prod(run.grids[0])) // side
    squares = torch.arange((length * side) ** 2).view(length, side, length, side)
    run.unit_rows = squares.transpose(1, 2).reshape(-1, side**2)
    run.grids = [(length, length)] * len(run.grids)


def _finish(call: Call, output: Any) -> Any:
    """`image_hidden_states` keep the rows that the language model saw only: [tiles, budget, C]."""
    output, tiles = finish_llava(call, output), len(call.runs[0].grids)
    if isinstance(output, tuple):
        return (*output[:-1], output[-1].unflatten(0, (tiles, -1)))
    output.image_hidden_states = output.image_hidden_states.unflatten(0, (tiles, -1))
    return output


FAMILIES = {
    "internvl": ModelFamily(
        name="InternVL (InternVLForConditionalGeneration)",
        host=llava_host,
        check=_check,
        check_call=_check_call,
        encoders=lambda host: [host.vision_tower],
        feature_layer=vision_feature_layer,
        layout=_layout,
        connector=lambda host: host.multi_modal_projector,
        language_model=lambda host: host.language_model,
        finish=_finish,
        budget_per="tile",
        notes="an image's tiles and a video's frames count as images of their own",
    ),
}
