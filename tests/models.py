"""Model builders: the tiny random ones of the package, and one of real size."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from hiprune_kernels.patch.tiny import *  # noqa: F403


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
