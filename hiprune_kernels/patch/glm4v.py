"""GLM-4V: as Qwen-VL, but the encoder takes each frame of a video by itself, and all placeholders are images'."""

from __future__ import annotations

from dataclasses import replace

from . import qwen_vl
from .encoders import Call, EncoderRun

_QWEN2 = qwen_vl.FAMILIES["qwen2_vl"]


def _layout(call: Call, run: EncoderRun) -> None:
    if run.video:
        run.tiles = call.arguments["video_grid_thw"][:, 0].tolist()


def _video_token(call: Call) -> int:
    """Stock looks for videos where images could be, but in prompts that come embedded for a token of their own."""
    config = call.patch.host.config
    return config.video_token_id if call.arguments.get("input_ids") is None else config.image_token_id


_GLM4V = replace(
    _QWEN2,
    name="GLM-4.1V (Glm4vForConditionalGeneration)",
    layout=_layout,
    video_token=_video_token,
    notes="the budget is shared out equally among a video's frames; a call takes images or videos, not both",
)

FAMILIES = {
    "glm4v": _GLM4V,
    "glm4v_moe": replace(_GLM4V, name="GLM-4.5V (Glm4vMoeForConditionalGeneration)"),
    "glm46v": replace(_GLM4V, name="GLM-4.6V (Glm46VForConditionalGeneration)"),
}
