"""GLM-4V: as Qwen-VL, but the encoder takes each frame of a video by itself, and all placeholders are images'."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import GenerationMixin

from . import qwen_vl
from .edits import Edits
from .encoders import Call, EncoderRun

_QWEN2 = qwen_vl.FAMILIES["qwen2_vl"]


def _layout(call: Call, run: EncoderRun) -> None:
    if run.video:
        run.tiles = call.arguments["video_grid_thw"][:, 0].tolist()


def _video_token(call: Call) -> int:
    """Stock looks for videos where images could be, but in prompts that come embedded for a token of their own."""
    config = call.patch.host.config
    return config.video_token_id if call.arguments.get("input_ids") is None else config.image_token_id


def _expand_multimodal_outputs(self: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """transformers' own for all models: GLM's repeats image by image, but in the beams prompts follow one another."""
    return GenerationMixin._expand_multimodal_outputs(self, *args, **kwargs)


def _install(edits: Edits, model: nn.Module, host: nn.Module) -> None:
    _QWEN2.install(edits, model, host)
    edits.set_method(model, "_expand_multimodal_outputs", _expand_multimodal_outputs)  # which 5.16 and 5.17 never call


_GLM4V = replace(
    _QWEN2,
    name="GLM-4.1V (Glm4vForConditionalGeneration)",
    layout=_layout,
    video_token=_video_token,
    install=_install,
    notes="the budget is shared out equally among a video's frames; a call takes images or videos, not both",
)

FAMILIES = {
    "glm4v": _GLM4V,
    "glm4v_moe": replace(_GLM4V, name="GLM-4.5V (Glm4vMoeForConditionalGeneration)"),
    "glm46v": replace(_GLM4V, name="GLM-4.6V (Glm46VForConditionalGeneration)"),
}
