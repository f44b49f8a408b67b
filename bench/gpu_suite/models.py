"""Random models at their real sizes, made on the device in bfloat16: no weight ever passes through the host."""

from __future__ import annotations

from typing import TypeVar

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)

from hiprune_kernels.loading import CLIP_L_14_336
from hiprune_kernels.patch.encoders import find_encoder

Model = TypeVar("Model", bound=PreTrainedModel)

TINY_CLIP = CLIPVisionConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=48,
    patch_size=8,
)


def clip_config(tiny: bool) -> CLIPVisionConfig:
    return TINY_CLIP if tiny else CLIP_L_14_336


def llava_model(tiled: bool, tiny: bool) -> tuple[type[PreTrainedModel], LlavaConfig | LlavaNextConfig]:
    """LLaVA-1.5-7B, or LLaVA-NeXT-7B (`tiled`): class and config.

    The end-of-sequence token is taken away, so that every run generates equally many tokens.
    """
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    if tiny:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = LlamaConfig(
        **sizes,
        vocab_size=32064,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    vision = clip_config(tiny)
    options = {"vision_config": vision, "text_config": text, "image_token_index": 32000}
    options |= {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
    if not tiled:
        tokens = (vision.image_size // vision.patch_size) ** 2
        return LlavaForConditionalGeneration, LlavaConfig(**options, image_seq_length=tokens)
    pinpoints = [[vision.image_size * rows, vision.image_size * columns] for rows, columns in _TILES]
    return LlavaNextForConditionalGeneration, LlavaNextConfig(**options, image_grid_pinpoints=pinpoints)


_TILES = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))  # rows and columns of tiles that LLaVA-NeXT brings images to


def random_model(
    kind: type[Model], config: PretrainedConfig, device: torch.device, implementation: str = "sdpa"
) -> Model:
    """A model in evaluation mode with seeded weights, its attention about as uneven as in trained encoders."""
    torch.manual_seed(0)
    with torch.device(device):
        model = kind._from_config(config, dtype=torch.bfloat16, attn_implementation=implementation)
    model = model.eval().requires_grad_(False)
    _, vision, layers = find_encoder(model)
    for layer in layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            torch.nn.init.normal_(projection.weight, std=(2 / vision.hidden_size) ** 0.5)
    return model
