"""Small checkpoints that load offline, with weights under which answers depend on the picture, and pictures."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
)

CHAT = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endfor %}ASSISTANT:"
)
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
MEANS = {"image_mean": [0.48, 0.45, 0.40], "image_std": [0.26, 0.26, 0.27]}

# A tower of the size of CLIP-L/14-336, and a language model with a tenth of the weights of LLaVA-1.5-7B's.
REAL_VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
REAL_VISION |= {"image_size": 336, "patch_size": 14, "projection_dim": 768}
HEAVY_TEXT = {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 12, "num_attention_heads": 16}
HEAVY_TEXT |= {"num_key_value_heads": 16, "head_dim": 128}


def picture(seed: int, height: int = 300, width: int = 400) -> Image.Image:
    """Waves of random directions and colours."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[:height, :width]
    waves = 0
    for _ in range(5):
        phase = x / random.randint(8, 60) + y / random.randint(8, 60) + random.rand() * 6
        waves = waves + random.randint(40, 90) * np.sin(phase)[..., None] * random.rand(3)
    return Image.fromarray((128 + waves).clip(0, 255).astype(np.uint8))


def tokenizer(specials: list[str]) -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary.setdefault(letter, len(vocabulary))
    bytes_alone = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, **names)
    fast.add_special_tokens({"additional_special_tokens": specials})
    return fast


@torch.no_grad()
def spread(model: torch.nn.Module) -> torch.nn.Module:
    """Weights of unit gain, with peaked attention in the encoder. As a library initialises them, pictures hardly count."""
    random = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        vision = "vision" in name or "visual" in name
        if weight.ndim < 2:
            if "bias" in name:
                weight.copy_(torch.randn(weight.shape, generator=random) * 0.1)
            elif "class_embedding" in name or "newline" in name:
                weight.copy_(torch.randn(weight.shape, generator=random))
            else:
                weight.fill_(1.0)
            continue
        fan, gain = weight[0].numel(), 1.0
        if vision and ("q_proj" in name or "k_proj" in name):
            gain = 1.6
        elif "embed_tokens" in name:
            fan = 1
        elif ".experts." in name:
            fan = weight.shape[-1]
        elif "position_embedding" in name:
            fan, gain = 1, 0.5
        elif "lm_head" in name or "multi_modal_projector.linear_2" in name:
            gain = 2.0
        weight.copy_(torch.empty(weight.shape).normal_(0, gain * fan**-0.5, generator=random))
        if vision and name.endswith("attn.qkv.weight"):
            weight[: 2 * len(weight) // 3] *= 1.6
    return model.eval()


def save(model: torch.nn.Module, fast: PreTrainedTokenizerFast, folder: Path, **files: dict) -> Path:
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def as_on_the_hub(folder: Path, name: Callable[[str], str] = str, transposed: str | None = None) -> None:
    """Rewrite a checkpoint as those of the hub are, which vLLM reads and transformers 5 does not save."""
    path = folder / "model.safetensors"
    weights = {
        name(key): weight.mT.contiguous() if transposed and transposed in key else weight
        for key, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


def with_vision_model(key: str) -> str:
    old, new = "vision_tower.", "vision_tower.vision_model."
    return key.replace(old, new, 1) if key.startswith(old) and ".vision_model." not in key else key


def _text(**options) -> LlamaConfig:
    tiny = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny |= {"num_key_value_heads": 4, "head_dim": 64}
    fixed = {"vocab_size": 512, "max_position_embeddings": 4096, "architectures": ["LlamaForCausalLM"]}
    return LlamaConfig(**(tiny | options), **fixed, bos_token_id=1, eos_token_id=2, rms_norm_eps=1e-5)


def llava(folder: Path, vision: dict | None = None, text: dict | None = None) -> Path:
    """LLaVA-1.5 with 576 tokens an image; tiny unless sizes are given."""
    tiny = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    tiny |= {"image_size": 336, "patch_size": 14, "projection_dim": 64}
    fast = tokenizer(["<image>"])
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**(vision or tiny)),
        text_config=_text(**(text or {})),
        image_token_index=fast.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        architectures=["LlavaForConditionalGeneration"],
    )
    return _save_llava(LlavaForConditionalGeneration(config), fast, folder, "Llava", 336)


def llava_next(folder: Path) -> Path:
    """LLaVA-NeXT with tiles of 28 pixels, 7 x 7 tokens each."""
    vision = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4}
    vision |= {"image_size": 28, "patch_size": 4, "projection_dim": 64}
    fast = tokenizer(["<image>"])
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=_text(),
        image_token_index=fast.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_grid_pinpoints=PINPOINTS,
        architectures=["LlavaNextForConditionalGeneration"],
    )
    return _save_llava(LlavaNextForConditionalGeneration(config), fast, folder, "LlavaNext", 28, patch_size=4)


def _save_llava(model, fast, folder: Path, name: str, side: int, patch_size: int = 14) -> Path:
    model.config.dtype = "float32"
    fast.chat_template = CHAT
    image_processor = "CLIPImageProcessor" if name == "Llava" else f"{name}ImageProcessor"
    pictures = {"image_processor_type": image_processor, "do_resize": True, "size": {"shortest_edge": side}}
    pictures |= {"do_center_crop": True, "crop_size": {"height": side, "width": side}, "do_rescale": True}
    pictures |= {
        "do_normalize": True,
        "do_convert_rgb": True,
        "resample": 3,
        "processor_class": f"{name}Processor",
    } | MEANS
    if name == "LlavaNext":
        pictures["image_grid_pinpoints"] = PINPOINTS
    processor = {"processor_class": f"{name}Processor", "patch_size": patch_size, "num_additional_image_tokens": 1}
    processor |= {"vision_feature_select_strategy": "default", "image_token": "<image>"}
    save(spread(model), fast, folder, preprocessor_config=pictures, processor_config=processor)
    (folder / "chat_template.jinja").write_text(CHAT)
    as_on_the_hub(folder, with_vision_model)
    return folder


_QWEN_CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe"}
_QWEN_CLASSES |= {"qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
_QWEN_VISION = {
    "qwen2_vl": {"embed_dim": 128, "hidden_size": 256, "mlp_ratio": 2},
    "qwen2_5_vl": {"hidden_size": 128, "intermediate_size": 256, "out_hidden_size": 256, "window_size": 112},
    "qwen3": {"hidden_size": 128, "intermediate_size": 256, "out_hidden_size": 256, "num_position_embeddings": 576},
}
_QWEN_VISION["qwen2_5_vl"] |= {"fullatt_block_indexes": [1, 3], "tokens_per_second": 2}


def qwen(folder: Path, kind: str) -> Path:
    """A Qwen-VL of a type of config: an image of 28 h x 28 w pixels has h x w tokens."""
    fast = tokenizer(["<|im_start|>", "<|im_end|>", VISION_START, VISION_END, IMAGE_PAD, "<|video_pad|>"])
    text = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 4096}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}}
    text |= {"bos_token_id": 1, "eos_token_id": 2, "layer_types": ["full_attention"] * 2, "use_sliding_window": False}
    vision = {"depth": 4, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"in_channels": 3} | _QWEN_VISION.get(kind, _QWEN_VISION["qwen3"])
    if kind.startswith("qwen3"):
        text["rope_parameters"]["mrope_interleaved"] = True
    if kind.startswith("qwen3_vl"):
        vision["deepstack_visual_indexes"] = [0, 2]
    if kind.startswith("qwen3_5"):
        text |= {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "linear_num_key_heads": 4}
        text |= {"linear_num_value_heads": 4, "layer_types": ["linear_attention", "full_attention"]}
        text["rope_parameters"] |= {"partial_rotary_factor": 0.5, "mrope_section": [12, 10, 10]}
    if kind.endswith("moe"):
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
        text |= {"norm_topk_prob": True} if kind == "qwen3_vl_moe" else {"shared_expert_intermediate_size": 128}
    ids = fast.convert_tokens_to_ids
    config = getattr(transformers, _QWEN_CLASSES[kind] + "Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids(IMAGE_PAD),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids(VISION_START),
        vision_end_token_id=ids(VISION_END),
        architectures=[_QWEN_CLASSES[kind] + "ForConditionalGeneration"],
    )
    config.dtype, config.tie_word_embeddings, config.text_config.tie_word_embeddings = "float32", False, False
    fast.image_token, fast.video_token = IMAGE_PAD, "<|video_pad|>"
    sizes = {"min_pixels": 3136, "max_pixels": 602112, "size": {"shortest_edge": 3136, "longest_edge": 602112}}
    processor = ("Qwen3VL" if kind.startswith("qwen3") else _QWEN_CLASSES[kind]) + "Processor"
    sizes |= {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "processor_class": processor} | MEANS
    videos = "Qwen3VLVideoProcessor" if kind.startswith("qwen3") else "Qwen2VLVideoProcessor"
    model = getattr(transformers, _QWEN_CLASSES[kind] + "ForConditionalGeneration")(config)
    save(
        spread(model),
        fast,
        folder,
        preprocessor_config={"image_processor_type": "Qwen2VLImageProcessor"} | sizes,
        video_preprocessor_config={"video_processor_type": videos} | sizes,
    )
    if kind == "qwen3_vl_moe":
        as_on_the_hub(folder, transposed=".experts.")
    return folder


MAKERS = {"llava": llava, "llava_next": llava_next}
MAKERS |= {kind: functools.partial(qwen, kind=kind) for kind in _QWEN_CLASSES}
