"""Checkpoints of every family on disk, as the hub has them: a tiny random model, and a real processor in its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import transformers
from models import (
    IMAGE_TOKEN,
    PINPOINTS,
    VIDEO_END,
    VIDEO_START,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    build,
)
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SIDE = 48  # of the pictures that the tiny encoders take
CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
WHOLE = {"size": {"height": SIDE, "width": SIDE}}
# The tiny vocabulary has no words: whatever is asked becomes w3.
TEMPLATE = (
    "w1 w2 {% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}MARK{% else %} "
    "{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %} w8 w9{% endif %}"
)


def tokenizer(names: dict[str, str] | None = None, **special: int) -> PreTrainedTokenizerFast:
    """The token of id i is the word wi; `special` ones have other names, and `names` are attributes for some."""
    vocabulary = {f"w{i}": i for i in range(100) if i not in special.values()} | special
    words = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    options = {"extra_special_tokens": names} if names else {}
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", unk_token="w3", padding_side="left", **options
    )
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


class Parts(NamedTuple):
    """Of which a family's processor is made."""

    cls: str
    images: object
    words: PreTrainedTokenizerFast
    settings: dict
    mark: str  # what stands for an image in a prompt


def _clip_settings() -> dict:
    return {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}


def _llava() -> Parts:
    words = tokenizer(**{"<image>": IMAGE_TOKEN})
    return Parts("LlavaProcessor", CLIPImageProcessorPil(**CROPPED), words, _clip_settings(), "<image>")


def _llava_next() -> Parts:
    images = LlavaNextImageProcessorPil(**CROPPED, image_grid_pinpoints=PINPOINTS)
    words = tokenizer(**{"<image>": IMAGE_TOKEN})
    return Parts("LlavaNextProcessor", images, words, _clip_settings(), "<image>")


def _onevision() -> Parts:
    images = LlavaOnevisionImageProcessorPil(**WHOLE, image_grid_pinpoints=PINPOINTS)
    words = tokenizer(**{"<image>": IMAGE_TOKEN, "<video>": VIDEO_TOKEN})
    settings = {
        "num_image_tokens": 25,
        "vision_feature_select_strategy": "full",
        "vision_aspect_ratio": "anyres_max_4",
    }
    return Parts("LlavaOnevisionProcessor", images, words, settings, "<image>")


def _video_llava() -> Parts:
    words = tokenizer(**{"<image>": IMAGE_TOKEN, "<video>": VIDEO_TOKEN})
    images = transformers.VideoLlavaImageProcessor(**CROPPED)
    return Parts("VideoLlavaProcessor", images, words, _clip_settings(), "<image>")


def _internvl() -> Parts:
    special = {"<IMG_CONTEXT>": IMAGE_TOKEN, "<video>": VIDEO_TOKEN, "<img>": 92, "</img>": 93}
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    images = GotOcr2ImageProcessorPil(size={"height": 96, "width": 96}, crop_to_patches=True, max_patches=6)
    settings = {"image_seq_length": 36}
    return Parts("InternVLProcessor", images, tokenizer(names, **special), settings, "<IMG_CONTEXT>")


def qwen_parts(name: str, longest: int = 64) -> Parts:
    """`longest` is the side of the largest square that stays as it is."""
    glm = name.startswith("Glm")
    marks = ("<|image|>", "<|video|>") if glm else ("<|image_pad|>", "<|video_pad|>")
    ends = ("<|begin_of_image|>", "<|end_of_image|>") if glm else ("<|vision_start|>", "<|vision_end|>")
    special = dict(zip((*marks, *ends), (IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END)))
    if glm:
        special |= {"<|begin_of_video|>": VIDEO_START, "<|end_of_video|>": VIDEO_END}
    kind = Glm4vImageProcessorPil if glm else Qwen2VLImageProcessorPil
    frames = 2 if glm else 1  # GLM counts the pixels of all of them
    sizes = {"shortest_edge": frames * 16 * 16, "longest_edge": frames * longest**2}
    images = kind(patch_size=4, merge_size=2, temporal_patch_size=2, size=sizes)
    return Parts(f"{name}Processor", images, tokenizer(**special), {}, f"{ends[0]}{marks[0]}{ends[1]}")


class NoVideos(transformers.BaseVideoProcessor):
    """In the place of video processors, which cannot be made without torchvision."""

    model_input_names = ()

    def __init__(self):
        pass


def assemble(parts: Parts) -> transformers.ProcessorMixin:
    """A processor as its class makes it, but for the check of a class that some releases look for in vain."""
    stock = getattr(transformers, parts.cls)
    cls = type(stock.__name__, (stock,), {"check_argument_for_proper_class": lambda self, name, part: type(part)})
    made = {"image_processor": parts.images, "tokenizer": parts.words, "video_processor": NoVideos()}
    return cls(**{name: made[name] for name in cls.get_attributes()}, **parts.settings)


PARTS = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _onevision,
    "video_llava": _video_llava,
    "internvl": _internvl,
    "qwen2_vl": lambda: qwen_parts("Qwen2VL"),
    "qwen2_5_vl": lambda: qwen_parts("Qwen2_5_VL"),
    "qwen3_vl": lambda: qwen_parts("Qwen3VL"),
    "qwen3_vl_moe": lambda: qwen_parts("Qwen3VL"),
    "qwen3_5": lambda: qwen_parts("Qwen3VL"),
    "qwen3_5_moe": lambda: qwen_parts("Qwen3VL"),
    "glm4v": lambda: qwen_parts("Glm4v"),
    "glm4v_moe": lambda: qwen_parts("Glm4v"),
    "glm46v": lambda: qwen_parts("Glm46V"),
}


def save(model_type: str, path: Path, *, template: bool = True, processor: bool = True) -> Path:
    """Write a tiny random checkpoint of this type, with its processor, and with a chat template where there is one."""
    model, _ = build(model_type)
    model.save_pretrained(path)
    if not processor or model_type not in PARTS:
        return path
    parts = PARTS[model_type]()
    parts.images.save_pretrained(path)
    parts.words.save_pretrained(path)
    settings = {"processor_class": parts.cls, **parts.settings}
    (path / "processor_config.json").write_text(json.dumps(settings))
    if template:
        (path / "chat_template.jinja").write_text(TEMPLATE.replace("MARK", parts.mark))
    return path


def save_clip(path: Path, llava: str) -> Path:
    """Write a checkpoint of a CLIP whose vision tower is as wide as that of a LLaVA's checkpoint."""
    vision = transformers.AutoConfig.from_pretrained(llava).vision_config.to_dict()
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(vision_config=vision, text_config=text | {"vocab_size": 100}, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def photograph(path: Path, size: tuple[int, int] = (150, 100)) -> Path:
    """A picture with something to see in it."""
    width, height = size
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    sky = np.stack([90 + 90 * y, 130 + 60 * y, 220 - 40 * y], axis=-1)
    sun = (x - 0.75) ** 2 * (width / height) ** 2 + (y - 0.3) ** 2 < 0.03
    hill = y > 0.65 - 0.2 * np.sin(3.5 * x + 0.4)
    house = (abs(x - 0.35) < 0.1) & (y > 0.45) & (y < 0.75)
    sky[sun], sky[hill], sky[house] = (250, 220, 110), (70, 140, 70), (170, 70, 60)
    noise = np.random.default_rng(0).normal(0, 8, sky.shape)
    Image.fromarray(np.clip(sky + noise, 0, 255).astype(np.uint8)).save(path)
    return path
