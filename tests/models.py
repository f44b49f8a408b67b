"""Model builders: tiny random ones, whose outputs change visibly with every token, and one of real size."""

from __future__ import annotations

import math
from functools import partial

import torch
from encoder_models import randomise
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Glm4vConfig,
    Glm4vForConditionalGeneration,
    Glm4vMoeConfig,
    Glm4vMoeForConditionalGeneration,
    Glm46VConfig,
    Glm46VForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

IMAGE_TOKEN, VIDEO_TOKEN = 90, 91
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


def prompt(*parts: int | str | list[int], seed: int = 0, image_tokens: int = NUM_TOKENS) -> list[int]:
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


def _llava_case():
    return tiny_llava(), batch([prompt(5, "image", 7), prompt(2, "image", 3, "image", 2, seed=1)], images(3))


# One model of each family of vision-language models, with inputs: name -> () -> (model, inputs of two prompts)
VLM_CASES = {"llava": _llava_case}


# ------------------------------------------------------------------- LLaVA-NeXT, LLaVA-OneVision and Video-LLaVA

PINPOINTS = [[48, 96], [96, 48], [96, 96], [144, 144]]  # tiles of 48 pixels


def tiny_llava_next(
    seed: int = 0, text: PretrainedConfig | None = None, **changes
) -> LlavaNextForConditionalGeneration:
    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=tiny_clip_config(),
        text_config=text or tiny_text_config(),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        **changes,
    )
    model = LlavaNextForConditionalGeneration._from_config(config).eval()
    _sharpen(model.model.vision_tower)
    return model


def tiny_onevision(seed: int = 0, **changes) -> LlavaOnevisionForConditionalGeneration:
    """With a grid of 5 x 5 tokens, of which video frames become 3 x 3; images of more than 4 tiles are interpolated."""
    torch.manual_seed(seed)
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, image_size=48, patch_size=9, vision_use_head=False),
        text_config=Qwen2Config(**{**tiny_text_config().to_dict(), "model_type": "qwen2"}),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        **{"vision_aspect_ratio": "anyres_max_4", **changes},
    )
    model = LlavaOnevisionForConditionalGeneration._from_config(config).eval()
    for parameter in model.model.vision_tower.encoder.parameters():  # SigLIP's own start is too small to be seen
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight)
    _sharpen(model.model.vision_tower)
    return model


def tiny_video_llava(seed: int = 0, **changes) -> VideoLlavaForConditionalGeneration:
    torch.manual_seed(seed)
    config = VideoLlavaConfig(
        vision_config=tiny_clip_config(),
        text_config=tiny_text_config(),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        **changes,
    )
    model = VideoLlavaForConditionalGeneration._from_config(config).eval()
    _sharpen(model.model.image_tower)
    _sharpen(model.model.video_tower)
    return model


def anyres_batch(model: PreTrainedModel, rows: list[list], side: str = "left", seed: int = 0) -> dict:
    """Processor-like inputs of models that cut images into tiles.

    Of a row's parts an int is that many tokens of text, (height, width) an image, and "video" one of three frames.
    Images with fewer tiles than others are padded with tiles of noise, which must not count.
    """
    generator = torch.Generator().manual_seed(seed)
    onevision = model.config.model_type == "llava_onevision"
    ids, sizes, tiles, videos, counts = [], [], [], 0, []
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


def anyres_lengths(model: PreTrainedModel, sizes: list[tuple[int, int]], tiles: list[int]) -> list[int]:
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


def _llava_next_case():
    model = tiny_llava_next()
    return model, anyres_batch(model, [[5, (40, 90), 7], [2, (90, 50), 3, (96, 90), 2]])


def _onevision_case():
    model = tiny_onevision()
    return model, anyres_batch(model, [[5, (40, 90), 7, "video", 2], [2, (90, 50), 3, (96, 90), 2]])


def _video_llava_case():
    return tiny_video_llava(), video_llava_batch([[5, "image", 7], [2, "video", 3, "image", 2]])


VLM_CASES |= {"next": _llava_next_case, "onevision": _onevision_case, "video llava": _video_llava_case}


# ------------------------------------------------------------------------------------------------------------ InternVL


def tiny_internvl(
    seed: int = 0,
    text: PretrainedConfig | None = None,
    implementation: str = "sdpa",
    use_qk_norm: bool = False,
    **changes,
) -> InternVLForConditionalGeneration:
    """An InternVL whose tiles have 12 by 12 patches and, as images elsewhere, 6 by 6 tokens."""
    torch.manual_seed(seed)
    vision = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": DEPTH, "num_attention_heads": 4}
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**vision, image_size=96, patch_size=8, use_qk_norm=use_qk_norm),
        text_config=text or tiny_text_config(),
        image_token_id=IMAGE_TOKEN,
        image_seq_length=NUM_TOKENS,
        **changes,
    )
    model = InternVLForConditionalGeneration._from_config(config, attn_implementation=implementation).eval()
    randomise(model.model.vision_tower, seed)
    randomise(model.model.multi_modal_projector, seed)
    return model


def _internvl_case():
    prompts = [prompt(5, "image", "image", 7), prompt(2, "image", 3, seed=1)]
    return tiny_internvl(), batch(prompts, images(3, size=96))


VLM_CASES["internvl"] = _internvl_case


# --------------------------------------------------------------------------------------------------- Qwen-VL and GLM-4V

VISION_START, VISION_END, VIDEO_START, VIDEO_END = 92, 93, 94, 95  # the latter two of GLM, where the former are images'
QWEN_DEPTH = 4
_QWEN_CLASSES = {
    "qwen2": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2.5": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3 moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
    "qwen3.5": (Qwen3_5Config, Qwen3_5ForConditionalGeneration),
    "qwen3.5 moe": (Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration),
    "glm": (Glm4vConfig, Glm4vForConditionalGeneration),
    "glm moe": (Glm4vMoeConfig, Glm4vMoeForConditionalGeneration),
    "glm 4.6": (Glm46VConfig, Glm46VForConditionalGeneration),
}
_QWEN_VISION = {
    "qwen2": {"embed_dim": 64, "hidden_size": 48, "mlp_ratio": 2},
    "qwen2.5": {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 48, "window_size": 16},
    "qwen3": {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 48, "num_position_embeddings": 25},
    "glm": {"hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 48, "image_size": 20},
}
_QWEN_VISION["qwen3.5"] = _QWEN_VISION["qwen3"]


def tiny_qwen(kind: str, seed: int = 0, implementation: str = "sdpa", **vision) -> PreTrainedModel:
    """A Qwen-VL or GLM-4V of one of `_QWEN_CLASSES`, with patches of 4 pixels and windows of 2 x 2 tokens."""
    torch.manual_seed(seed)
    config_class, model_class = _QWEN_CLASSES[kind]
    common = {"depth": QWEN_DEPTH, "num_heads": 4, "patch_size": 4, "initializer_range": 0.2}
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


VLM_CASES |= {kind: partial(_qwen_case, kind) for kind in _QWEN_CLASSES}
