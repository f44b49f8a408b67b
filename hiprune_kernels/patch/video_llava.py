"""Video-LLaVA: one vision tower for images and one for frames of videos, which keep the CLS token of each frame."""

from __future__ import annotations

from dataclasses import replace

from . import llava
from .encoders import Call, EncoderRun


def _layout(call: Call, run: EncoderRun) -> None:
    if run.video:
        videos, frames = call.arguments["pixel_values_videos"].shape[:2]
        run.tiles = [frames] * videos


FAMILIES = {
    "video_llava": replace(
        llava.FAMILIES["llava"],
        name="Video-LLaVA (VideoLlavaForConditionalGeneration)",
        encoders=lambda host: [host.image_tower, host.video_tower],
        layout=_layout,
        budget_per="image or video",
        notes="the budget is shared out equally among a video's frames; their CLS tokens stay besides",
    ),
}
