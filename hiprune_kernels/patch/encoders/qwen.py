"""The encoders of Qwen-VL and GLM-4V: all images packed into one sequence [T, C], patches in merge groups."""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from ...facts import ENCODERS
from ...methods.base import Grid
from ..edits import StockModule
from ..tap import Attention
from .family import EncoderFamily, finish_layer


def _grids(config: Any, arguments: dict[str, Any]) -> list[Grid]:
    """Of merged tokens; a video has one more side, its frames."""
    merge = config.spatial_merge_size
    grids = [(t, h // merge, w // merge) for t, h, w in arguments["grid_thw"].tolist()]
    return [grid if grid[0] > 1 else grid[1:] for grid in grids]


def _unit_rows(config: Any, arguments: dict[str, Any]) -> Tensor:
    """Patches come in merge groups: of 2 by 2, token t is made of rows 4 t to 4 t + 3."""
    grid_thw = arguments["grid_thw"]
    rows = torch.arange(int(grid_thw.prod(dim=1).sum()), device=grid_thw.device)
    return rows.view(-1, config.spatial_merge_size**2)


def _window_unit_rows(config: Any, arguments: dict[str, Any]) -> Tensor:
    """... and Qwen2.5-VL brings the groups into window order."""
    sizes = config.spatial_merge_size, config.window_size, config.patch_size
    window_index, _ = get_vision_window_index(arguments["grid_thw"], *sizes, kwargs=dict(arguments))
    rows = _unit_rows(config, arguments)
    return rows[window_index.to(rows.device).argsort()]


def _project(
    layer: StockModule,
    hidden_states: Tensor,  # [T, C]
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **kwargs: Any,
) -> Attention:
    attention = layer.attn
    qkv = attention.qkv(layer.norm1(hidden_states)).unflatten(-1, (3, attention.num_heads, -1))
    query, key, value = qkv.unbind(1)  # [T, H, D]
    rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
    rotated_query, rotated_key = rotate(query, key, *position_embeddings)
    starts = cu_seqlens.to(torch.int32)
    return Attention(rotated_query, rotated_key, value, attention.scaling, cu_seqlens=starts, plain_key=key)


_QWEN2 = EncoderFamily(
    kind=ENCODERS["qwen2_vl_vision"],
    layers="blocks",
    attention="attn",
    project=_project,
    finish=partial(finish_layer, output="attn.proj", norm="norm2"),
    grids=_grids,
    unit_rows=_unit_rows,
    packed=True,
)
_NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe")

# config.model_type of the vision encoder -> family
FAMILIES = {f"{name}_vision": replace(_QWEN2, kind=ENCODERS[f"{name}_vision"]) for name in _NAMES}
FAMILIES["qwen2_5_vl_vision"] = replace(FAMILIES["qwen2_5_vl_vision"], unit_rows=_window_unit_rows)
