"""GLM-4V: as Qwen-VL, but the encoder takes each frame of a video by itself, and all placeholders are images'."""

from __future__ import annotations

from dataclasses import replace

from ...facts import MODELS
from ...methods import TokenLayout
from ...methods.base import Grid
from ..call import Call
from . import qwen_vl
from .family import one_tile_each

_QWEN2 = qwen_vl.FAMILIES["qwen2_vl"]


def _layout(call: Call, grids: list[Grid], video: bool) -> TokenLayout:
    if not video:
        return one_tile_each(call, grids, video)
    return TokenLayout(tuple(grids), tuple(call.arguments["video_grid_thw"][:, 0].tolist()))


def _video_token(call: Call) -> int:
    """Stock looks for videos where images could be, but in prompts that come embedded for a token of their own."""
    config = call.patch.host.config
    return config.video_token_id if call.arguments.get("input_ids") is None else config.image_token_id


_GLM4V = replace(
    _QWEN2,
    kind=MODELS["glm4v"],
    layout=_layout,
    video_token=_video_token,
)

FAMILIES = {
    "glm4v": _GLM4V,
    "glm4v_moe": replace(_GLM4V, kind=MODELS["glm4v_moe"]),
    "glm46v": replace(_GLM4V, kind=MODELS["glm46v"]),
}
