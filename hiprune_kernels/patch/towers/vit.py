"""Encoders whose images form a batch [B, N, C]: CLIP."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..attention import Attention, padding_mask, split_heads
from .family import EncoderFamily, image_grids, residual

# ------------------------------------------------------------------------------------------- CLIP, SigLIP and SigLIP 2


def _clip_project(
    layer: nn.Module, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
) -> Attention:
    attention, normed = layer.self_attn, layer.layer_norm1(hidden_states)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (split_heads(projection(normed), attention.head_dim) for projection in projections)
    return Attention(query, key, value, attention.scale, padding_mask(attention_mask))


def _clip_finish(layer: nn.Module, states: Tensor, attended: Tensor) -> Tensor:
    return residual(layer, states, layer.self_attn.out_proj(attended), "layer_norm2")


# config.model_type of the vision encoder -> family
FAMILIES = {
    "clip_vision_model": EncoderFamily(
        name="CLIP",
        layers="layers",
        attention="self_attn",
        project=_clip_project,
        finish=_clip_finish,
        grids=image_grids,
        num_prefix_tokens=lambda config: 1,
        stock_sources={"": "9c77f9ba2eeb4169", "self_attn": "45fb45ce967c253b"},
    ),
    "siglip_vision_model": EncoderFamily(
        name="SigLIP",
        layers="layers",
        attention="self_attn",
        project=_clip_project,
        finish=_clip_finish,
        grids=image_grids,
        stock_sources={"": "22f28409c86c589b", "self_attn": "66b32085cb786718"},
    ),
}
