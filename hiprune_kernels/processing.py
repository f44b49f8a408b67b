"""What turns a picture and a question into a model's inputs: a checkpoint's own processor, or a default one."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer, PreTrainedModel
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils.import_utils import is_torchvision_available

from .facts import encoder_type
from .patch.edits import StockModule
from .patch.encoders import ENCODERS

if TYPE_CHECKING:
    from PIL.Image import Image

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_DESCRIBE = "Describe the image."


@contextlib.contextmanager
def quiet_transformers(*, bars: bool = False) -> Iterator[None]:
    """No reports of unused weights: errors are raised, the rest is not the user's concern. Progress only if asked."""
    logging = transformers.logging
    verbosity, shown = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if shown:
            logging.enable_progress_bar()


# ----------------------------------------------------------------------------------------------------------- processors


def load_processor(source: str, config: Any, *, answers: bool = False, **where: Any) -> tuple[Any, tuple[str, ...]]:
    """A checkpoint's processor, whole where there is one with a tokenizer, else of images alone; and remarks.

    Raises:
        ValueError: if it is to answer questions, and there is no whole processor.
    """
    if hasattr(config, "text_config"):
        try:
            return _whole_processor(source, config, **where), ()
        except Exception as error:  # what it raises where a file is missing or broken differs between releases
            if answers:
                reason = f"{source!r} has no processor with a tokenizer, which a question needs: {error}"
                raise ValueError(f"model: {reason}") from error
    try:
        processor = AutoImageProcessor.from_pretrained(source, **where)
        remark = f"{source} has no processor with a tokenizer: its image processor alone prepares the image"
        return processor, (remark,) if hasattr(config, "text_config") else ()
    except (OSError, ValueError):
        vision = getattr(config, "vision_config", config)
        kind, side = ENCODERS[encoder_type(vision)].kind.name, image_side(vision)
        size = "" if side is None else f" at {side} px"
        remark = f"{source} has no image processor: images are prepared as for {kind}{size}"
        return default_image_processor(config), (remark,)


def _whole_processor(source: str, config: Any, **where: Any) -> Any:
    cls: Any = PROCESSOR_MAPPING[type(config)]
    if "video_processor" in cls.get_attributes() and not is_torchvision_available():
        return _without_videos(source, cls, **where)
    processor = AutoProcessor.from_pretrained(source, **where)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ValueError(f"got a {type(processor).__name__}")
    return processor


class _NoVideos:
    """In the place of a video processor: those need torchvision, pictures do not."""

    model_input_names = ()


def _without_videos(source: str, cls: Any, **where: Any) -> Any:
    """A processor put together from its parts, all but the one for videos."""
    settings, _ = cls.get_processor_dict(source, **where)
    load: dict[str, Any] = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    parts = [load[x].from_pretrained(source, **where) if x in load else _NoVideos() for x in cls.get_attributes()]
    changes = {
        "check_argument_for_proper_class": lambda self, name, part: type(part),
        "__repr__": lambda self: cls.__name__,  # the stock one asks every part for its settings
    }
    assembled: Any = type(cls.__name__, (cls,), changes)
    return assembled.from_args_and_dict(parts, settings)


def image_side(vision: Any) -> int | None:
    """The side of the pictures that an encoder takes, in pixels; None where it takes any."""
    if hasattr(vision, "spatial_merge_size"):
        return None
    side = getattr(vision, "crop_size", None) or vision.image_size
    return side if isinstance(side, int) else side[0]


def default_image_processor(config: Any, *, side: int | None = None) -> Any:
    """The image processor that models of this type have, with the sizes of this config, or another side."""
    vision = getattr(config, "vision_config", config)
    kind, side = encoder_type(vision), image_side(vision) if side is None else side
    if side is None:
        sizes = {"patch_size": vision.patch_size, "merge_size": vision.spatial_merge_size}
        name = "Glm4vImageProcessor" if kind.startswith("glm") else "Qwen2VLImageProcessor"
        return getattr(transformers, name)(**sizes, temporal_patch_size=vision.temporal_patch_size)
    whole = {"height": side, "width": side}
    cropped: dict[str, Any] = {"size": {"shortest_edge": side}, "crop_size": side}
    tiles = {"image_grid_pinpoints": getattr(config, "image_grid_pinpoints", None)}
    if config.model_type == "llava_next":
        return transformers.LlavaNextImageProcessor(**cropped, **tiles)
    if config.model_type == "llava_onevision":
        return transformers.LlavaOnevisionImageProcessor(size=whole, **tiles)
    if config.model_type == "video_llava":
        return transformers.VideoLlavaImageProcessor(**cropped)
    if kind == "clip_vision_model":
        return transformers.CLIPImageProcessor(**cropped)
    if kind == "siglip_vision_model":
        return transformers.SiglipImageProcessor(size=whole)
    if kind == "internvl_vision":
        return transformers.GotOcr2ImageProcessor(size=whole, crop_to_patches=True)
    if kind in ("vit", "deit"):
        return transformers.ViTImageProcessor(size=whole)
    return transformers.CLIPImageProcessor(**cropped, **_IMAGENET)


# --------------------------------------------------------------------------------------------------------------- inputs


def image_processor_of(processor: Any) -> Any:
    return getattr(processor, "image_processor", processor)


def answers_text(processor: Any) -> bool:
    """Whether there is a tokenizer too."""
    return hasattr(processor, "tokenizer")


def prompt_inputs(model: PreTrainedModel, processor: Any, image: Image, question: str) -> dict[str, Any]:
    """A model's inputs for one image and a question, by the processor's chat template where it has one.

    Raises:
        ValueError: if the prompt has no place for the image.
    """
    options = {}
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        bos = processor.tokenizer.bos_token
        if bos and text.startswith(bos):  # the template wrote it
            options["add_special_tokens"] = False
    else:
        text = f"USER: {_image_mark(model, processor)}\n{question} ASSISTANT:"
    try:
        with quiet_transformers():
            inputs = processor(images=[image], text=[text], return_tensors="pt", **options)
        if not bool((inputs["input_ids"] == model.config.image_token_id).any()):
            raise ValueError("the image has no place in it")
    except ValueError as error:
        raise ValueError(f"model: the processor makes no prompt with one image of it: {error}") from error
    return _fitting(model, inputs)


def _image_mark(model: PreTrainedModel, processor: Any) -> str:
    """What stands for an image in a prompt: its token, for Qwen-VL and GLM-4V between those of begin and end."""
    config, tokenizer = model.config, processor.tokenizer
    marks = [processor.image_token]
    for kind in ("image", "vision"):
        start, end = (getattr(config, f"{kind}_{side}_token_id", None) for side in ("start", "end"))
        if start is not None and end is not None:
            first, last = tokenizer.convert_ids_to_tokens([start, end])
            return f"{first}{marks[0]}{last}"
    return marks[0]


def vision_inputs(
    model: PreTrainedModel, processor: Any, image: Image, *, language: bool, question: str = _DESCRIBE
) -> dict[str, Any]:
    """A model's inputs for one image, with a short prompt where the model takes one.

    Args:
        language: whether the language model's features will be looked at, for which the prompt must be right. Without a
            tokenizer it is the image alone.
        question: about the image, where there is a tokenizer.
    """
    if answers_text(processor):
        return prompt_inputs(model, processor, image, question)
    with quiet_transformers():
        inputs = dict(processor(images=[image], return_tensors="pt"))
    if model.config.model_type == "vjepa2":  # a still
        frames = inputs["pixel_values"][:, None].repeat(1, model.config.tubelet_size, 1, 1, 1)
        return _fitting(model, {"pixel_values_videos": frames, "skip_predictor": True})
    inputs = _fitting(model, inputs)
    if not hasattr(model.config, "text_config"):
        return inputs
    count = 1  # nobody counts the places in the prompt before the features are there
    if language:
        stock: StockModule = model
        with torch.inference_mode():
            features = stock.get_image_features(**inputs, return_dict=True).pooler_output
        count = sum(tile.numel() // tile.shape[-1] for tile in features)
    ids = torch.full((1, count), model.config.image_token_id, device=model.device)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": torch.ones_like(ids)}
    return _fitting(model, {**inputs, **prompt})


def _fitting(model: PreTrainedModel, inputs: Any) -> dict[str, Any]:
    """What the model's forward takes, on its device, pixels in its dtype."""
    names = inspect.signature(type(model).forward).parameters
    return {name: _moved(model, value) for name, value in dict(inputs).items() if name in names}


def _moved(model: PreTrainedModel, value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)
