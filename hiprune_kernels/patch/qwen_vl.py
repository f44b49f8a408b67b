"""Qwen-VL: images and videos of any size packed in one sequence, a merger inside the encoder, M-RoPE positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .decoder import CACHE, cache_of, live_plan
from .edits import Edits
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


def compute_3d_position_ids(self: nn.Module, **kwargs: Any) -> Tensor | None:
    """Stock, but behind a pruned prompt positions go on as behind the whole one, which the cache is shorter than."""
    cache = cache_of(kwargs)
    plan = live_plan(cache)
    if plan is None or plan.rope_deltas is None:
        return type(self).compute_3d_position_ids(self, **kwargs)
    embeds = kwargs["inputs_embeds"]
    batch, new = embeds.shape[:2]
    plan.check_batch(batch)
    text = plan.text_positions(kwargs["attention_mask"], cache.get_seq_length(), new)
    return (text.to(embeds.device) + plan.rope_deltas.to(embeds.device)).expand(3, batch, new)


class _FullLength:
    """Stands for a pruned cache where stock code asks how much of a prompt is in it."""

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def _prepare_position_ids_for_generation(
    self: nn.Module, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
) -> Tensor:
    """Stock, which looks behind what is cached for new images, and is to count the pruned tokens as cached."""
    cache = cache_of(model_kwargs)
    plan = live_plan(cache)
    if plan is not None:
        model_kwargs = {**model_kwargs, CACHE: _FullLength(cache.get_seq_length() + plan.gone)}
    return type(self)._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)


def _install(edits: Edits, model: nn.Module, host: nn.Module) -> None:
    edits.set_method(host, "compute_3d_position_ids", compute_3d_position_ids)
    if model is not host:
        edits.set_method(model, "_prepare_position_ids_for_generation", _prepare_position_ids_for_generation)


_QWEN2 = ModelFamily(
    name="Qwen2-VL (Qwen2VLForConditionalGeneration)",
    host=llava_host,
    check=_check,
    encoders=lambda host: [host.visual],
    feature_layer=lambda host, arguments: host.config.vision_config.depth,
    connector=lambda host: host.visual.merger,
    language_model=lambda host: host.language_model,
    install=_install,
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
