"""Models at their published sizes, by name, with random weights: to measure speed without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
_SIGLIP_SO400M = {  # LLaVA-OneVision takes 26 of its 27 layers
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
_VICUNA_7B = {
    "model_type": "llama",
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}
_VICUNA_13B = _VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}
_QWEN2_0_5B = {
    "model_type": "qwen2",
    "vocab_size": 152000,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
_QWEN2_7B = {
    "model_type": "qwen2",
    "vocab_size": 152128,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
_QWEN_VISION = {"depth": 32, "num_heads": 16, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
_MROPE = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
_NEXT_TILES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_TILES = [[384 * rows, 384 * columns] for rows in range(1, 7) for columns in range(1, 7)]
_NO_END = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}  # so that every run generates as many tokens


def _llava(text: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "Llava", {
        "vision_config": _CLIP_L,
        "text_config": text | _NO_END,
        "image_token_id": 32000,
        "image_seq_length": 576,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def _llava_next(text: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "LlavaNext", _llava(text)[1] | {"image_grid_pinpoints": _NEXT_TILES}


def _onevision(text: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return "LlavaOnevision", {
        "vision_config": _SIGLIP_SO400M,
        "text_config": text | _NO_END,
        "image_token_id": 151646,
        "video_token_id": 151647,
        "image_grid_pinpoints": _ONEVISION_TILES,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_9",
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
    }


def _qwen2_5_vl(text: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    vision = _QWEN_VISION | {
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "out_hidden_size": text["hidden_size"],
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    tied = text.get("tie_word_embeddings", False)
    return "Qwen2_5_VL", {"vision_config": vision, "text_config": text | _NO_END, "tie_word_embeddings": tied}


def _qwen2_vl(text: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    vision = _QWEN_VISION | {"embed_dim": 1280, "mlp_ratio": 4, "hidden_size": text["hidden_size"]}
    tied = text.get("tie_word_embeddings", False)
    return "Qwen2VL", {"vision_config": vision, "text_config": text | _NO_END, "tie_word_embeddings": tied}


def _qwen_text(hidden: int, intermediate: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool) -> Any:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 32768,
        "rope_parameters": _MROPE,
        "tie_word_embeddings": tied,
    }


CONFIGS: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {  # name -> the family's prefix, and its config
    "llava-1.5-7b": lambda: _llava(_VICUNA_7B),
    "llava-1.5-13b": lambda: _llava(_VICUNA_13B),
    "llava-next-7b": lambda: _llava_next(_VICUNA_7B),
    "llava-next-13b": lambda: _llava_next(_VICUNA_13B),
    "llava-onevision-0.5b": lambda: _onevision(_QWEN2_0_5B),
    "llava-onevision-7b": lambda: _onevision(_QWEN2_7B),
    "qwen2-vl-2b": lambda: _qwen2_vl(_qwen_text(1536, 8960, 28, 12, 2, 151936, True)),
    "qwen2-vl-7b": lambda: _qwen2_vl(_qwen_text(3584, 18944, 28, 28, 4, 152064, False)),
    "qwen2.5-vl-3b": lambda: _qwen2_5_vl(_qwen_text(2048, 11008, 36, 16, 2, 151936, True)),
    "qwen2.5-vl-7b": lambda: _qwen2_5_vl(_qwen_text(3584, 18944, 28, 28, 4, 152064, False)),
}


def config_of(name: str) -> tuple[Any, Any]:
    """The model's class and its config.

    Raises:
        ValueError: for a name that is not known.

    Example:
        >>> config_of("llava-1.5-7b")[1].text_config.hidden_size
        4096
    """
    import transformers

    if name not in CONFIGS:
        raise ValueError(f"config: expected one of {', '.join(CONFIGS)}, got {name!r}")
    prefix, options = CONFIGS[name]()
    config = getattr(transformers, f"{prefix}Config")(**options)
    return getattr(transformers, f"{prefix}ForConditionalGeneration"), config


def bytes_of(name: str, dtype: torch.dtype) -> int:
    """What the weights take, by a model without any."""
    import torch

    cls, config = config_of(name)
    with torch.device("meta"):
        model = cls(config)
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def random_model(name: str, *, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """A model with seeded random weights, made on the device, in evaluation mode.

    Raises:
        ValueError: for a name that is not known, or where the weights would not fit into the memory that is free.
    """
    import torch

    needed, free = bytes_of(name, dtype), _free_bytes(device)
    if free is not None and needed > free:
        raise ValueError(
            f"config: the weights of {name} take {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, but "
            f"{free / 2**30:.1f} GiB are free on {device}"
        )
    cls, config = config_of(name)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        with torch.device(device):
            model = cls._from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def _free_bytes(device: torch.device) -> int | None:
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
