"""Model builders: tiny random ones, whose outputs change visibly with every token, and one of real size."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
)

IMAGE_TOKEN = 90
GRID = (6, 6)
NUM_TOKENS = 36
DEPTH = 5


def tiny_clip_config(**changes) -> CLIPVisionConfig:
    values = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "image_size": 48,
        "patch_size": 8,
        "initializer_range": 0.2,
        "initializer_factor": 3.0,
    }
    return CLIPVisionConfig(**{**values, **changes})


def tiny_text_config(**changes) -> LlamaConfig:
    values = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 100,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**{**values, **changes})


def _sharpen(encoder: CLIPVisionModel) -> None:
    """Attention of random weights is nearly flat; make scores differ as widely as in a trained encoder."""
    for layer in encoder.encoder.layers:
        layer.self_attn.q_proj.weight.data.mul_(3)


def tiny_clip(seed: int = 0, implementation: str = "sdpa", **changes) -> CLIPVisionModel:
    torch.manual_seed(seed)
    model = CLIPVisionModel._from_config(tiny_clip_config(**changes), attn_implementation=implementation).eval()
    _sharpen(model)
    return model


def tiny_llava(
    seed: int = 0, implementation: str = "sdpa", text: PretrainedConfig | None = None, **changes
) -> LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=tiny_clip_config(),
        text_config=text or tiny_text_config(),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=NUM_TOKENS,
        **changes,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()
    _sharpen(model.model.vision_tower)
    return model


def clip_l_336(seed: int = 0, dtype: torch.dtype = torch.float32) -> CLIPVisionModel:
    """CLIP-L/14 at 336 pixels (the tower of LLaVA-1.5) at its real size, with random weights."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )
    return CLIPVisionModel._from_config(config, dtype=dtype).eval()


def images(count: int, seed: int = 0, size: int = 48) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def prompt(*parts: int | str, seed: int = 0, image_tokens: int = NUM_TOKENS) -> list[int]:
    """Token ids: an int is that many random text tokens, "image" the placeholders of one image."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for part in parts:
        text = () if part == "image" else torch.randint(2, 89, (part,), generator=generator).tolist()
        ids += [IMAGE_TOKEN] * image_tokens if part == "image" else text
    return ids


def batch(rows: list[list[int]], pixel_values: torch.Tensor | None = None, side: str = "left") -> dict:
    """Processor-like inputs: padded ids, 2-D mask, images."""
    length = max(map(len, rows))
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    return inputs if pixel_values is None else {**inputs, "pixel_values": pixel_values}


def _llava_case():
    return tiny_llava(), batch([prompt(5, "image", 7), prompt(2, "image", 3, "image", 2, seed=1)], images(3))


# One model of each family of vision-language models, with inputs: name -> () -> (model, inputs of two prompts)
VLM_CASES = {"llava": _llava_case}
