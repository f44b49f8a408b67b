"""Tiny vision encoders of every family but Qwen-VL's, and their exact column scores."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hiprune_kernels.patch.tiny import ENCODER_CASES as CASES
from hiprune_kernels.patch.tiny import encoder_inputs, tiny_encoder

__all__ = ["CASES", "as_dtype", "eager_columns", "encoder_inputs", "tiny_encoder"]


def as_dtype(inputs: dict, dtype: torch.dtype) -> dict:
    return {
        key: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


def eager_columns(model: PreTrainedModel, inputs: dict, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Column sums [B, prefix + N] of each layer's eager attention matrix, mean over heads, padded queries left out."""
    model, maps = copy.deepcopy(model).to(dtype), []
    model.set_attn_implementation("eager")

    def keep(module, args, output):
        if isinstance(output, tuple) and output[1] is not None and output[1].ndim == 4:
            maps.append(output[1])

    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_hook(keep)
    with torch.no_grad():
        model(**as_dtype(inputs, dtype))
    counts = inputs.get("pixel_attention_mask", torch.ones(maps[0].shape[0], maps[0].shape[2]))
    return [(weights.double().mean(dim=1) * counts[..., None]).sum(dim=1) for weights in maps]
