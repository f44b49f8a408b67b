"""Tiny vision encoders of every family but Qwen-VL's, inputs for them, and their exact column scores."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    PreTrainedModel,
    Siglip2VisionConfig,
    Siglip2VisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
    VJEPA2Config,
    VJEPA2Model,
)


@dataclass
class Case:
    config: type
    model: type
    grid: tuple[int, ...] = (6, 6)
    prefix: int = 1
    depth: int = 5
    options: dict = field(default_factory=dict)  # of the config
    arguments: dict = field(default_factory=dict)  # of the forward

    @property
    def layers(self) -> tuple[int, int]:
        """The default object layer and the feature layer."""
        return round(9 / 24 * self.depth), self.depth


_HEADLESS = {"vision_use_head": False}
_JEPA = {"crop_size": 32, "frames_per_clip": 6, "pred_hidden_size": 64, "pred_num_attention_heads": 4}
CASES = {
    "clip b": Case(CLIPVisionConfig, CLIPVisionModel, (7, 7), depth=12, options={"image_size": 56}),
    "siglip": Case(SiglipVisionConfig, SiglipVisionModel, prefix=0, options=_HEADLESS),
    "siglip 2": Case(Siglip2VisionConfig, Siglip2VisionModel, prefix=0, options={"num_patches": 36}),
    "vit": Case(ViTConfig, ViTModel),
    "deit": Case(DeiTConfig, DeiTModel, prefix=2),
    "dinov2": Case(Dinov2Config, Dinov2Model),
    "dinov2 swiglu": Case(Dinov2Config, Dinov2Model, options={"use_swiglu_ffn": True}),
    "dinov2 registers": Case(
        Dinov2WithRegistersConfig, Dinov2WithRegistersModel, prefix=4, options={"num_register_tokens": 3}
    ),
    "v-jepa 2": Case(VJEPA2Config, VJEPA2Model, (3, 4, 4), prefix=0, options=_JEPA, arguments={"skip_predictor": True}),
    "internvl": Case(InternVLVisionConfig, InternVLVisionModel),
    "internvl qk norm": Case(
        InternVLVisionConfig, InternVLVisionModel, options={"use_qk_norm": True, "norm_type": "rms_norm"}
    ),
}


def randomise(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights that make every token's output its own, and attention as sharp as in a trained encoder."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name and name.endswith("weight"):
            values = (1 + 0.1 * noise) * (3 if "q_norm" in name else 1)
        elif "lambda" in name:
            values = 0.5 + 0.1 * noise
        else:
            values = noise * (0.4 if ".q_proj.weight" in name or ".query.weight" in name else 0.13)
        parameter.data.copy_(values)


def tiny_encoder(name: str, implementation: str = "sdpa", **changes) -> PreTrainedModel:
    case = CASES[name]
    values = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": case.depth,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
        "mlp_ratio": 2,
    }
    known = set(case.config.__dataclass_fields__)
    values = {key: value for key, value in values.items() if key in known} | case.options | changes
    model = case.model._from_config(case.config(**values), attn_implementation=implementation).eval()
    randomise(model)
    return model


def encoder_inputs(name: str, count: int = 2, seed: int = 0) -> dict:
    """Arguments of the forward."""
    generator, case = torch.Generator().manual_seed(seed), CASES[name]
    if name == "siglip 2":  # images of several sizes, padded to 40 patches
        shapes = torch.tensor([(5, 7), (4, 4), (8, 5)])[:count]
        mask = (torch.arange(40) < shapes.prod(dim=1, keepdim=True)).long()
        pixels = torch.randn(count, 40, 3 * 8 * 8, generator=generator)
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    pixels = [8 * side for side in case.grid[-2:]]
    if len(case.grid) == 3:
        frames = 2 * case.grid[0]
        return {"pixel_values_videos": torch.randn(count, frames, 3, *pixels, generator=generator), **case.arguments}
    return {"pixel_values": torch.randn(count, 3, *pixels, generator=generator), **case.arguments}


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
