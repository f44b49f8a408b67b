"""Qwen-VL: images and videos of any size packed in one sequence, a merger inside the encoder, M-RoPE positions."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .encoders import ModelFamily
from .llava import llava_host


def _check(host: nn.Module) -> None:
    """Raise ValueError if features of the last block, which has selected rows only, are read before the merger."""
    vision = host.config.vision_config
    if any(index >= vision.depth - 1 for index in getattr(vision, "deepstack_visual_indexes", ())):
        raise ValueError(
            f"model: expected deepstack_visual_indexes below {vision.depth - 1}, as the last of {vision.depth} blocks "
            f"computes the kept tokens only, got {list(vision.deepstack_visual_indexes)}"
        )


_QWEN2 = ModelFamily(
    name="Qwen2-VL (Qwen2VLForConditionalGeneration)",
    host=llava_host,
    check=_check,
    encoders=lambda host: [host.visual],
    feature_layer=lambda host, arguments: host.config.vision_config.depth,
    connector=lambda host: host.visual.merger,
    language_model=lambda host: host.language_model,
    multimodal_positions=True,
    budget_per="image or video",
)

_QWEN3_5 = replace(
    _QWEN2,
    name="Qwen3.5 (Qwen3_5ForConditionalGeneration)",
    notes="linear attention takes no padding: in a later turn with images all rows must keep as many tokens",
)

FAMILIES = {
    "qwen2_vl": _QWEN2,
    "qwen2_5_vl": replace(_QWEN2, name="Qwen2.5-VL (Qwen2_5_VLForConditionalGeneration)"),
    "qwen3_vl": replace(_QWEN2, name="Qwen3-VL (Qwen3VLForConditionalGeneration)"),
    "qwen3_vl_moe": replace(_QWEN2, name="Qwen3-VL-MoE (Qwen3VLMoeForConditionalGeneration)"),
    "qwen3_5": _QWEN3_5,
    "qwen3_5_moe": replace(_QWEN3_5, name="Qwen3.5-MoE (Qwen3_5MoeForConditionalGeneration)"),
}
