"""Encoders whose images form a batch [B, N, C]: CLIP, SigLIP, ViT, DeiT, DINOv2, V-JEPA 2, InternVL."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers.models.dinov2 import modeling_dinov2

from ...facts import ENCODERS
from ...methods.base import Grid
from ..edits import StockModule
from ..tap import Attention, split_heads
from .family import EncoderFamily, finish_layer, image_grids


def _heads(attention: StockModule, states: Tensor, head_dim: int, *names: str) -> Iterator[Tensor]:
    """What the attention's projections of these names make of states [B, N, C], by heads: [B, H, N, D] each."""
    return (split_heads(getattr(attention, name)(states), head_dim) for name in names)


# ------------------------------------------------------------------------------------- CLIP, SigLIP, ViT and DeiT


def _plain_project(
    layer: StockModule,
    hidden_states: Tensor,
    attention_mask: None = None,
    *,
    path: str,
    norm: str,
    scale: str,
    **_: Any,
) -> Attention:
    """Layers that differ in names only."""
    attention, normed = layer.get_submodule(path), getattr(layer, norm)(hidden_states)
    query, key, value = _heads(attention, normed, attention.head_dim, "q_proj", "k_proj", "v_proj")
    return Attention(query, key, value, getattr(attention, scale))


_SIGLIP = EncoderFamily(
    kind=ENCODERS["siglip_vision_model"],
    layers="layers",
    attention="self_attn",
    project=partial(_plain_project, path="self_attn", norm="layer_norm1", scale="scale"),
    finish=partial(finish_layer, output="self_attn.out_proj", norm="layer_norm2"),
    grids=image_grids,
)
_VIT = EncoderFamily(
    kind=ENCODERS["vit"],
    layers="layers",
    attention="attention",
    project=partial(_plain_project, path="attention", norm="layernorm_before", scale="scaling"),
    finish=partial(finish_layer, output="attention.o_proj", norm="layernorm_after", drop="dropout"),
    grids=image_grids,
)

# -------------------------------------------------------------------------------------------------------------- DINOv2


def _dino_finish(layer: StockModule, states: Tensor, attended: Tensor) -> Tensor:
    states = states + layer.drop_path(layer.layer_scale1(layer.attention.o_proj(attended)))
    return states + layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(states))))


_DINO = EncoderFamily(
    kind=ENCODERS["dinov2"],
    layers="layer",
    attention="attention",
    project=partial(_plain_project, path="attention", norm="norm1", scale="scaling"),
    finish=_dino_finish,
    grids=image_grids,
)


def _dino_project_before_518(layer: StockModule, hidden_states: Tensor) -> Attention:
    attention, normed = layer.attention.attention, layer.norm1(hidden_states)
    query, key, value = _heads(attention, normed, attention.attention_head_size, "query", "key", "value")
    return Attention(query, key, value, attention.scaling)


def _dino_finish_before_518(layer: StockModule, states: Tensor, attended: Tensor) -> Tensor:
    states = states + layer.drop_path(layer.layer_scale1(layer.attention.output(attended, states)))
    return states + layer.drop_path(layer.layer_scale2(layer.mlp(layer.norm2(states))))


if hasattr(modeling_dinov2, "Dinov2SelfAttention"):  # transformers before 5.18
    _DINO = replace(
        _DINO,
        attention="attention.attention",
        project=_dino_project_before_518,
        finish=_dino_finish_before_518,
        computed=("attention", "attention.output"),
    )

# ------------------------------------------------------------------------------------------------------------ V-JEPA 2


def _video_grids(config: Any, arguments: dict[str, Any]) -> list[Grid]:
    """`pixel_values_videos` [B, T, C, H, W]; too short a clip is repeated as often as a tubelet has frames."""
    frames, _, height, width = arguments["pixel_values_videos"].shape[1:]
    tubelets = frames // config.tubelet_size if frames >= config.tubelet_size else frames
    grid = (tubelets, height // config.patch_size, width // config.patch_size)
    return [grid if tubelets > 1 else grid[1:]] * len(arguments["pixel_values_videos"])


def _jepa_project(
    layer: StockModule, hidden_states: Tensor, position_mask: Tensor | None = None, **kwargs: Any
) -> Attention:
    attention, normed = layer.attention, layer.norm1(hidden_states)
    query, key, value = _heads(attention, normed, attention.attention_head_size, "query", "key", "value")
    positions = attention.get_position_ids(normed, masks=position_mask)
    rotated_query, rotated_key = (attention.apply_rotary_embeddings(states, positions) for states in (query, key))
    return Attention(rotated_query, rotated_key, value, attention.scaling, plain_key=key)


# ------------------------------------------------------------------------------------------------------------ InternVL


def _intern_project(layer: StockModule, hidden_states: Tensor) -> Attention:
    attention, normed = layer.attention, layer.layernorm_before(hidden_states)
    query, key = attention.q_norm(attention.q_proj(normed)), attention.k_norm(attention.k_proj(normed))
    query, key, value = (split_heads(each, attention.head_dim) for each in (query, key, attention.v_proj(normed)))
    return Attention(query, key, value, attention.scale)


def _intern_finish(layer: StockModule, states: Tensor, attended: Tensor) -> Tensor:
    attention = layer.attention
    states = states + layer.lambda_1 * attention.projection_dropout(attention.projection_layer(attended))
    return states + layer.lambda_2 * layer.dropout(layer.mlp(layer.layernorm_after(states)))


_JEPA = EncoderFamily(
    kind=ENCODERS["vjepa2"],
    layers="layer",
    not_in=("VJEPA2Predictor",),
    attention="attention",
    project=_jepa_project,
    finish=partial(finish_layer, output="attention.proj", norm="norm2", drop="drop_path"),
    grids=_video_grids,
    returns_tuple=True,
)
_INTERN = EncoderFamily(
    kind=ENCODERS["internvl_vision"],
    layers="layer",
    attention="attention",
    project=_intern_project,
    finish=_intern_finish,
    grids=image_grids,
    full_shape=True,
)

FAMILIES = {  # config.model_type of the vision encoder -> family
    "clip_vision_model": replace(_SIGLIP, kind=ENCODERS["clip_vision_model"]),
    "siglip_vision_model": _SIGLIP,
    "siglip2_vision_model": replace(_SIGLIP, kind=ENCODERS["siglip2_vision_model"]),
    "vit": _VIT,
    "deit": replace(_VIT, kind=ENCODERS["deit"]),
    "dinov2": _DINO,
    "dinov2_with_registers": replace(_DINO, kind=ENCODERS["dinov2_with_registers"]),
    "vjepa2": _JEPA,
    "internvl_vision": _INTERN,
}
