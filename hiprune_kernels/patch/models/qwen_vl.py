"""Qwen-VL: images and videos of any size packed in one sequence, a merger inside the encoder, M-RoPE positions."""

from __future__ import annotations

from dataclasses import replace

from ...facts import MODELS
from ..edits import StockModule
from .family import ModelFamily
from .llava import llava_host


def _check(host: StockModule) -> None:
    """Raise ValueError if features of the last block, which has selected rows only, are read before the merger."""
    vision = host.config.vision_config
    if any(index >= vision.depth - 1 for index in getattr(vision, "deepstack_visual_indexes", ())):
        raise ValueError(
            f"model: expected deepstack_visual_indexes below {vision.depth - 1}, as the last of {vision.depth} blocks "
            f"computes the kept tokens only, got {list(vision.deepstack_visual_indexes)}"
        )


_QWEN2 = ModelFamily(
    kind=MODELS["qwen2_vl"],
    host=llava_host,
    check=_check,
    encoders=lambda host: [host.visual],
    feature_layer=lambda host, arguments: host.config.vision_config.depth,
    connector=lambda host: host.visual.merger,
    language_model=lambda host: host.language_model,
    multimodal_positions=True,
)

_TYPES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
FAMILIES = {model_type: replace(_QWEN2, kind=MODELS[model_type]) for model_type in _TYPES}
