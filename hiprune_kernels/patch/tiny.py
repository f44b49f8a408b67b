"""Tiny random models of every family, and inputs for them: what `selfcheck` runs, and what the tests are made on.

Their weights make every token's output its own, and attention as sharp as in a trained model: a wrong token shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
import transformers

from .edits import StockModule
from .models import internvl, llava

# ----------------------------------------------------------------------------------------------- encoders by themselves


@dataclass
class EncoderCase:
    """One vision encoder."""

    name: str  # what the names of its classes begin with
    grid: tuple[int, ...] = (6, 6)
    prefix: int = 1
    depth: int = 5
    options: dict = field(default_factory=dict)  # of the config
    arguments: dict = field(default_factory=dict)  # of the forward

    @property
    def config(self) -> type[Any]:
        return getattr(transformers, f"{self.name}Config")

    @property
    def model(self) -> type[Any]:
        return getattr(transformers, f"{self.name}Model")

    @property
    def layers(self) -> tuple[int, int]:
        """The default object layer and the feature layer."""
        return round(9 / 24 * self.depth), self.depth


_HEADLESS = {"vision_use_head": False}
_JEPA = {"crop_size": 32, "frames_per_clip": 6, "pred_hidden_size": 64, "pred_num_attention_heads": 4}
ENCODER_CASES = {
    "clip b": EncoderCase("CLIPVision", (7, 7), depth=12, options={"image_size": 56}),
    "siglip": EncoderCase("SiglipVision", prefix=0, options=_HEADLESS),
    "siglip 2": EncoderCase("Siglip2Vision", prefix=0, options={"num_patches": 36}),
    "vit": EncoderCase("ViT"),
    "deit": EncoderCase("DeiT", prefix=2),
    "dinov2": EncoderCase("Dinov2"),
    "dinov2 swiglu": EncoderCase("Dinov2", options={"use_swiglu_ffn": True}),
    "dinov2 registers": EncoderCase("Dinov2WithRegisters", prefix=4, options={"num_register_tokens": 3}),
    "v-jepa 2": EncoderCase("VJEPA2", (3, 4, 4), prefix=0, options=_JEPA, arguments={"skip_predictor": True}),
    "internvl": EncoderCase("InternVLVision"),
    "internvl qk norm": EncoderCase("InternVLVision", options={"use_qk_norm": True, "norm_type": "rms_norm"}),
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


def tiny_encoder(name: str, implementation: str = "sdpa", **changes) -> transformers.PreTrainedModel:
    case = ENCODER_CASES[name]
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
    generator, case = torch.Generator().manual_seed(seed), ENCODER_CASES[name]
    if name == "siglip 2":  # images of several sizes, padded to 40 patches
        shapes = torch.tensor([(5, 7), (4, 4), (8, 5)])[:count]
        mask = (torch.arange(40) < shapes.prod(dim=1, keepdim=True)).long()
        pixels = torch.randn(count, 40, 3 * 8 * 8, generator=generator)
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    sides = [8 * side for side in case.grid[-2:]]
    if len(case.grid) == 3:
        frames = 2 * case.grid[0]
        return {"pixel_values_videos": torch.randn(count, frames, 3, *sides, generator=generator), **case.arguments}
    return {"pixel_values": torch.randn(count, 3, *sides, generator=generator), **case.arguments}


# ------------------------------------------------------------------------------------------------------------ LLaVA-1.5

IMAGE_TOKEN, VIDEO_TOKEN = 90, 91
GRID = (6, 6)
NUM_TOKENS = 36
DEPTH = 5


def tiny_clip_config(**changes) -> transformers.CLIPVisionConfig:
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
    return transformers.CLIPVisionConfig(**{**values, **changes})


def tiny_siglip_config(**changes) -> transformers.SiglipVisionConfig:
    values = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    sizes = {"image_size": 48, "patch_size": 8, "vision_use_head": False}
    return transformers.SiglipVisionConfig(**{**values, **sizes, **changes})


def tiny_text_config(model_type: str = "llama", **changes) -> transformers.PretrainedConfig:
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
    return transformers.AutoConfig.for_model(model_type, **{**values, **changes})


def _sharpen(encoder: StockModule) -> None:
    """Attention of random weights is nearly flat; make scores differ as widely as in a trained encoder."""
    if encoder.config.model_type == "siglip_vision_model":  # whose own start is too small to be seen
        for parameter in encoder.encoder.parameters():
            if parameter.ndim == 2:
                torch.nn.init.normal_(parameter, std=0.2)
        torch.nn.init.normal_(encoder.embeddings.position_embedding.weight)
    for layer in encoder.encoder.layers:
        layer.self_attn.q_proj.weight.data.mul_(3)


def tiny_clip(seed: int = 0, implementation: str = "sdpa", **changes) -> transformers.CLIPVisionModel:
    torch.manual_seed(seed)
    model = transformers.CLIPVisionModel._from_config(
        tiny_clip_config(**changes), attn_implementation=implementation
    ).eval()
    _sharpen(model)
    return model


def tiny_llava(
    seed: int = 0,
    implementation: str = "sdpa",
    text: transformers.PretrainedConfig | None = None,
    vision: transformers.PretrainedConfig | None = None,
    **changes,
) -> transformers.LlavaForConditionalGeneration:
    torch.manual_seed(seed)
    config = transformers.LlavaConfig(
        vision_config=vision or tiny_clip_config(),
        text_config=text or tiny_text_config(),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=NUM_TOKENS,
        **changes,
    )
    model = transformers.LlavaForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()
    _sharpen(model.model.vision_tower)
    return model


def images(count: int, seed: int = 0, size: int = 48) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def prompt(*parts: int | Literal["image"] | list[int], seed: int = 0, image_tokens: int = NUM_TOKENS) -> list[int]:
    """Token ids: an int is that many random text tokens, "image" the placeholders of one image, a list itself."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            part = torch.randint(2, 89, (part,), generator=generator).tolist()
        ids += [IMAGE_TOKEN] * image_tokens if part == "image" else part
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


def _llava_case(**options):
    prompts = [prompt(5, "image", 7), prompt(2, "image", 3, "image", 2, seed=1)]
    return tiny_llava(**options), batch(prompts, images(3))


# ------------------------------------------------------------------- LLaVA-NeXT, LLaVA-OneVision and Video-LLaVA

PINPOINTS = [[48, 96], [96, 48], [96, 96], [144, 144]]  # tiles of 48 pixels


def tiny_llava_next(
    seed: int = 0,
    text: transformers.PretrainedConfig | None = None,
    vision: transformers.PretrainedConfig | None = None,
    **changes,
) -> transformers.LlavaNextForConditionalGeneration:
    torch.manual_seed(seed)
    config = transformers.LlavaNextConfig(
        vision_config=vision or tiny_clip_config(),
        text_config=text or tiny_text_config(),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        **changes,
    )
    model = transformers.LlavaNextForConditionalGeneration._from_config(config).eval()
    _sharpen(model.model.vision_tower)
    return model


def tiny_onevision(
    seed: int = 0, text: transformers.PretrainedConfig | None = None, **changes
) -> transformers.LlavaOnevisionForConditionalGeneration:
    """With a grid of 5 x 5 tokens, of which video frames become 3 x 3; images of more than 4 tiles are interpolated."""
    torch.manual_seed(seed)
    config = transformers.LlavaOnevisionConfig(
        vision_config=tiny_siglip_config(patch_size=9),
        text_config=text or tiny_text_config("qwen2"),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        **{"vision_aspect_ratio": "anyres_max_4", **changes},
    )
    model = transformers.LlavaOnevisionForConditionalGeneration._from_config(config).eval()
    _sharpen(model.model.vision_tower)
    return model


def tiny_video_llava(
    seed: int = 0, text: transformers.PretrainedConfig | None = None, **changes
) -> transformers.VideoLlavaForConditionalGeneration:
    torch.manual_seed(seed)
    config = transformers.VideoLlavaConfig(
        vision_config=tiny_clip_config(),
        text_config=text or tiny_text_config(),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        **changes,
    )
    model = transformers.VideoLlavaForConditionalGeneration._from_config(config).eval()
    _sharpen(model.model.image_tower)
    _sharpen(model.model.video_tower)
    return model


def anyres_batch(model: transformers.PreTrainedModel, rows: list[list], side: str = "left", seed: int = 0) -> dict:
    """Processor-like inputs of models that cut images into tiles.

    Of a row's parts an int is that many tokens of text, (height, width) an image, and "video" one of three frames.
    Images with fewer tiles than others are padded with tiles of noise, which must not count.
    """
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    generator = torch.Generator().manual_seed(seed)
    onevision = model.config.model_type == "llava_onevision"
    ids, tiles, videos, counts = [], [], 0, []
    sizes: list[tuple[int, int]] = []
    for i, row in enumerate(rows):
        images_of_row = [part for part in row if isinstance(part, tuple)]
        several, first = onevision and len(images_of_row) > 1, len(sizes)
        for size in images_of_row:
            sizes.append(size)
            tiles.append(1 if several else image_size_to_num_patches(size, PINPOINTS, 48))
        counts += [len(images_of_row)] if images_of_row else []
        videos += row.count("video")
        lengths = iter(anyres_lengths(model, sizes[first:], tiles[first:]) if images_of_row else ())
        parts = [[IMAGE_TOKEN] * next(lengths) if isinstance(part, tuple) else part for part in row]
        parts = [[VIDEO_TOKEN] * (3 * 9 + 1) if part == "video" else part for part in parts]
        ids.append(prompt(*parts, seed=seed + i))
    inputs = batch(ids, side=side)
    if sizes:
        inputs["pixel_values"] = torch.randn(len(sizes), max(tiles), 3, 48, 48, generator=generator)
        inputs["image_sizes"] = torch.tensor(sizes)
        if onevision:
            inputs["batch_num_images"] = torch.tensor(counts)
    if videos:
        inputs["pixel_values_videos"] = torch.randn(videos, 3, 3, 48, 48, generator=generator)
    return inputs


def anyres_lengths(model: transformers.PreTrainedModel, sizes: list[tuple[int, int]], tiles: list[int]) -> list[int]:
    """How many placeholders images have, by the stock packing of their tiles."""
    vision = model.config.vision_config
    features = [torch.zeros(count, (vision.image_size // vision.patch_size) ** 2, 1) for count in tiles]
    if model.config.model_type == "llava_next":
        options = {"vision_feature_select_strategy": "default"}
    else:
        options = {"vision_aspect_ratio": model.config.vision_aspect_ratio}
    return model.model.pack_image_features(features, sizes, image_newline=torch.zeros(1), **options)[1].tolist()


def video_llava_batch(rows: list[list], frames: int = 2, side: str = "left", seed: int = 0) -> dict:
    """Processor-like inputs of Video-LLaVA: of a row's parts an int is text, "image" and "video" are what they say."""
    generator = torch.Generator().manual_seed(seed)
    video = [VIDEO_TOKEN] * (NUM_TOKENS + 1) * frames
    ids = [prompt(*(video if part == "video" else part for part in row), seed=seed + i) for i, row in enumerate(rows)]
    inputs = batch(ids, side=side)
    shown = [part for row in rows for part in row]
    if "image" in shown:
        inputs["pixel_values_images"] = torch.randn(shown.count("image"), 3, 48, 48, generator=generator)
    if "video" in shown:
        inputs["pixel_values_videos"] = torch.randn(shown.count("video"), frames, 3, 48, 48, generator=generator)
    return inputs


def _llava_next_case(**options):
    model = tiny_llava_next(**options)
    return model, anyres_batch(model, [[5, (40, 90), 7], [2, (90, 50), 3, (96, 90), 2]])


def _onevision_case(**options):
    model = tiny_onevision(**options)
    return model, anyres_batch(model, [[5, (40, 90), 7, "video", 2], [2, (90, 50), 3, (96, 90), 2]])


def _video_llava_case(**options):
    return tiny_video_llava(**options), video_llava_batch([[5, "image", 7], [2, "video", 3, "image", 2]])


# ------------------------------------------------------------------------------------------------------------ InternVL


def tiny_internvl(
    seed: int = 0,
    text: transformers.PretrainedConfig | None = None,
    implementation: str = "sdpa",
    use_qk_norm: bool = False,
    **changes,
) -> transformers.InternVLForConditionalGeneration:
    """An InternVL whose tiles have 12 by 12 patches and, as images elsewhere, 6 by 6 tokens."""
    torch.manual_seed(seed)
    vision: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
    }
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**vision, image_size=96, patch_size=8, use_qk_norm=use_qk_norm),
        text_config=text or tiny_text_config(),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=NUM_TOKENS,
        **changes,
    )
    model = transformers.InternVLForConditionalGeneration._from_config(
        config, attn_implementation=implementation
    ).eval()
    randomise(model.model.vision_tower, seed)
    randomise(model.model.multi_modal_projector, seed)
    return model


def _internvl_case(**options):
    prompts = [prompt(5, "image", "image", 7), prompt(2, "image", 3, seed=1)]
    return tiny_internvl(**options), batch(prompts, images(3, size=96))


# --------------------------------------------------------------------------------------------------- Qwen-VL and GLM-4V

VISION_START, VISION_END, VIDEO_START, VIDEO_END = 92, 93, 94, 95  # the latter two of GLM, where the former are images'
QWEN_DEPTH = 4
_QWEN_CLASSES = {  # kind -> what the names of its classes begin with
    "qwen2": "Qwen2VL",
    "qwen2.5": "Qwen2_5_VL",
    "qwen3": "Qwen3VL",
    "qwen3 moe": "Qwen3VLMoe",
    "qwen3.5": "Qwen3_5",
    "qwen3.5 moe": "Qwen3_5Moe",
    "glm": "Glm4v",
    "glm moe": "Glm4vMoe",
    "glm 4.6": "Glm46V",
}
_QWEN_VISION = {
    "qwen2": {"embed_dim": 64, "hidden_size": 48, "mlp_ratio": 2},
    "qwen2.5": {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 48, "window_size": 16},
    "qwen3": {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 48, "num_position_embeddings": 25},
    "glm": {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 48, "image_size": 20},
}
_QWEN_VISION["qwen3.5"] = _QWEN_VISION["qwen3"]


def tiny_qwen(kind: str, seed: int = 0, implementation: str = "sdpa", **vision) -> transformers.PreTrainedModel:
    """A Qwen-VL or GLM-4V of one of `_QWEN_CLASSES`, with patches of 4 pixels and windows of 2 x 2 tokens."""
    torch.manual_seed(seed)
    config_class, model_class = (
        getattr(transformers, _QWEN_CLASSES[kind] + end) for end in ("Config", "ForConditionalGeneration")
    )
    common: dict[str, Any] = {"depth": QWEN_DEPTH, "num_heads": 4, "patch_size": 4, "initializer_range": 0.2}
    if kind == "qwen2.5":
        common["fullatt_block_indexes"] = [1, 3]
    if kind in ("qwen3", "qwen3 moe"):
        common["deepstack_visual_indexes"] = [0, 2]
    text = tiny_text_config().to_dict()
    text = {name: text[name] for name in _QWEN_TEXT}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2], "partial_rotary_factor": 1.0}
    if kind.startswith("qwen3.5"):
        sizes = {"key_head_dim": 8, "value_head_dim": 8, "num_key_heads": 2, "num_value_heads": 4}
        text |= {f"linear_{name}": size for name, size in sizes.items()}
        text["layer_types"] = ["full_attention", "linear_attention", "full_attention"]
    if kind.endswith("moe"):
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        text["n_routed_experts"] = 4  # GLM's name
    config = config_class(
        vision_config={**common, **_QWEN_VISION[kind.split()[0]], **vision},
        text_config={**text, "hidden_size": 48, "head_dim": 12, "rope_parameters": rope},
        image_token_id=IMAGE_TOKEN,
        video_token_id=VIDEO_TOKEN,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        image_start_token_id=VISION_START,
        image_end_token_id=VISION_END,
        video_start_token_id=VIDEO_START,
        video_end_token_id=VIDEO_END,
    )
    model = model_class._from_config(config, attn_implementation=implementation).eval()
    for block in model.model.visual.blocks:
        rows = block.attn.qkv.weight.shape[1]  # the queries'
        block.attn.qkv.weight.data[:rows].mul_(3)
    for name, parameter in model.model.visual.named_parameters():
        if "norm" in name:  # norms of a new model are all alike
            parameter.data.add_(torch.randn_like(parameter) / 4)
    if kind.startswith("glm"):  # rows of unit length would be mostly what the layers add: errors would grow too fast
        model.model.visual.post_conv_layernorm.weight.data.mul_(8)
    return model


_QWEN_TEXT = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "initializer_range"),
)


def qwen_prompt(kind: str, *parts: int | tuple[int, ...], seed: int = 0) -> list[int]:
    """Token ids: an int is that many random text tokens, (h, w) an image of so many tokens, (t, h, w) a video."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids += torch.randint(2, 89, (part,), generator=generator).tolist()
            continue
        glm, video = kind.startswith("glm"), len(part) == 3
        token = VIDEO_TOKEN if video and not glm else IMAGE_TOKEN
        frames = part[0] if video and kind.startswith(("qwen3", "glm")) else 1
        count = math.prod(part) // frames
        ids += [VIDEO_START] * (glm and video)
        for frame in range(frames):  # Qwen3-VL puts a time stamp before each, GLM-4V behind
            stamp = [10 + frame] * (frames > 1)
            shown = [VISION_START] + [token] * count + [VISION_END]
            ids += shown + stamp if glm else stamp + shown
        ids += [VIDEO_END] * (glm and video)
    return ids


def qwen_batch(kind: str, rows: list[tuple], side: str = "left", seed: int = 0) -> dict:
    """Processor-like inputs of prompts given as in `qwen_prompt`."""
    inputs = batch([qwen_prompt(kind, *row, seed=seed + i) for i, row in enumerate(rows)], side=side)
    ids = inputs["input_ids"]
    in_video = (ids == VIDEO_START).cumsum(dim=1) > (ids == VIDEO_END).cumsum(dim=1)
    inputs["mm_token_type_ids"] = ((ids == IMAGE_TOKEN) * (1 + in_video.int()) + 2 * (ids == VIDEO_TOKEN)).int()
    generator = torch.Generator().manual_seed(seed)
    for sides, pixels, grids in ((2, "pixel_values", "image_grid_thw"), (3, "pixel_values_videos", "video_grid_thw")):
        shown = [part for row in rows for part in row if not isinstance(part, int) and len(part) == sides]
        if shown:
            inputs[grids] = torch.tensor([((1, *part)[-3], 2 * part[-2], 2 * part[-1]) for part in shown])
            patches = int(inputs[grids].prod(dim=1).sum())
            inputs[pixels] = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator)
    return inputs


def _qwen_case(kind: str):
    rows = [(3, (4, 6), 2, (4, 3) if kind.startswith("glm") else (2, 3, 4), 5), (4, (3, 3), 6)]
    return tiny_qwen(kind), qwen_batch(kind, rows, seed=3)  # in which half precision selects nearly the same tokens


# Of each family of vision-language models: model type -> (options) -> (model, inputs of two prompts)
VLM_CASES: dict[str, Callable[..., tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]]] = {
    "llava": _llava_case,
    "llava_next": _llava_next_case,
    "llava_onevision": _onevision_case,
    "video_llava": _video_llava_case,
    "internvl": _internvl_case,
    "qwen2_vl": partial(_qwen_case, "qwen2"),
    "qwen2_5_vl": partial(_qwen_case, "qwen2.5"),
    "qwen3_vl": partial(_qwen_case, "qwen3"),
    "qwen3_vl_moe": partial(_qwen_case, "qwen3 moe"),
    "qwen3_5": partial(_qwen_case, "qwen3.5"),
    "qwen3_5_moe": partial(_qwen_case, "qwen3.5 moe"),
    "glm4v": partial(_qwen_case, "glm"),
    "glm4v_moe": partial(_qwen_case, "glm moe"),
    "glm46v": partial(_qwen_case, "glm 4.6"),
}


# ---------------------------------------------------------------------------------------------------------- all of them

_ENCODERS = {
    "clip_vision_model": "clip b",
    "siglip_vision_model": "siglip",
    "vit": "vit",
    "deit": "deit",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2 registers",
    "vjepa2": "v-jepa 2",
}
_TEXTS = dict.fromkeys(("llava", "llava_next", "llava_onevision", "video_llava"), llava.TEXT_MODELS)
_TEXTS["internvl"] = internvl.TEXT_MODELS
_TOWERS = dict.fromkeys(("llava", "llava_next"), llava.VISION_TOWERS)


def build(
    model_type: str, text: str | None = None, tower: str | None = None
) -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """A model of this type, where it has a choice with a text model and a vision tower of these, and inputs for it."""
    if model_type in _ENCODERS:
        return tiny_encoder(_ENCODERS[model_type]), encoder_inputs(_ENCODERS[model_type])
    options: dict[str, Any] = {}
    if text is not None and text in _TEXTS.get(model_type, ()):
        options["text"] = tiny_text_config(text, **({"head_dim": 16} if text == "qwen3" else {}))
    if tower in _TOWERS.get(model_type, ()) and tower == "siglip_vision_model":
        options |= {"vision": tiny_siglip_config(), "vision_feature_select_strategy": "full"}
    return VLM_CASES[model_type](**options)


def variants(model_type: str) -> list[tuple[str, str | None, str | None]]:
    """What `build` makes different models of."""
    towers = _TOWERS.get(model_type, (None,))
    return [(model_type, text, tower) for text in _TEXTS.get(model_type, (None,)) for tower in towers]
