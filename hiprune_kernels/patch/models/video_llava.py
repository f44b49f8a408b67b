"""Video-LLaVA: one vision tower for images and one for frames of videos, which keep the CLS token of each frame."""

from __future__ import annotations

from dataclasses import replace

from ...facts import MODELS
from ...methods import TokenLayout
from ...methods.base import Grid
from ..call import Call
from . import llava
from .family import one_tile_each


def _layout(call: Call, grids: list[Grid], video: bool) -> TokenLayout:
    if not video:
        return one_tile_each(call, grids, video)
    videos, frames = call.arguments["pixel_values_videos"].shape[:2]
    return TokenLayout(tuple(grids), (frames,) * videos)


FAMILIES = {
    "video_llava": replace(
        llava.FAMILIES["llava"],
        kind=MODELS["video_llava"],
        encoders=lambda host: [host.image_tower, host.video_tower],
        layout=_layout,
    ),
}
