"""Vision towers for the command line and the demo: from a checkpoint, or random at CLIP-L/14-336's real size."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from .patch.encoders import ENCODERS, find_encoder
from .visualize import to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

    VisionConfig = CLIPVisionConfig | SiglipVisionConfig
    VisionModel = CLIPVisionModel | SiglipVisionModel
    ImageProcessor = transformers.CLIPImageProcessor | transformers.SiglipImageProcessor

CLIP_L_14_336 = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
    projection_dim=768,
)

# config.model_type of a vision tower -> its class, and the name of the class that prepares images for it
TOWERS = {
    "clip_vision_model": (CLIPVisionModel, "CLIPImageProcessor"),
    "siglip_vision_model": (SiglipVisionModel, "SiglipImageProcessor"),
}
_LLAVAS = ("llava", "llava_next", "llava_onevision")  # hold such a tower as `vision_tower`


@dataclass(frozen=True)
class Tower:
    """A vision encoder in evaluation mode, and what is needed to feed it."""

    encoder: VisionModel
    processor: ImageProcessor
    name: str
    random: bool  # no checkpoint was given: which tokens survive then means nothing
    deep_layer: int  # 1-based; the layer whose output language models take as image features
    remarks: tuple[str, ...]  # what a reader of the result should know

    @property
    def grid(self) -> tuple[int, int]:
        side = self.encoder.config.image_size // self.encoder.config.patch_size
        return side, side

    @property
    def num_prefix_tokens(self) -> int:
        family, config, _ = find_encoder(self.encoder)
        return family.kind.num_prefix_tokens(config)

    @property
    def object_layer(self) -> int:
        """1-based default, as `apply_hiprune` takes it: layer 9 of CLIP-L's 24, scaled to other depths."""
        family, _, layers = find_encoder(self.encoder)
        return family.kind.object_layer(len(layers), self.deep_layer)

    def overview_titles(self, object_layer: int, kept: int) -> tuple[str, str, str, str]:
        return (
            "what the model sees",
            f"layer {object_layer} scores: anchors",
            f"layer {self.deep_layer} scores: registers",
            f"{kept} of {math.prod(self.grid)} tokens kept",
        )

    def pixel_values(self, image: Image) -> Tensor:
        """[1, 3, H, W], resized, cropped and normalised, in the encoder's dtype and on its device."""
        pixels = self.processor(images=to_rgb(image), return_tensors="pt")["pixel_values"]
        return pixels.to(device=self.encoder.device, dtype=self.encoder.dtype)

    def seen_image(self, pixel_values: Tensor) -> Image:
        """The picture that the encoder gets to see: `pixel_values` [1, 3, H, W] without their normalisation."""
        from PIL import Image

        std, mean = (torch.tensor(x).view(3, 1, 1) for x in (self.processor.image_std, self.processor.image_mean))
        colors = (pixel_values[0].float().cpu() * std + mean).clamp(0, 1) * 255
        return Image.fromarray(colors.round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


def load_tower(
    source: str | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    config: CLIPVisionConfig = CLIP_L_14_336,
    kinds: Sequence[str] = ("clip_vision_model",),
) -> Tower:
    """The vision tower of a checkpoint, or a seeded random one.

    Args:
        source: local directory or hub id of a CLIP or SigLIP (vision) checkpoint, or of a LLaVA-1.5, LLaVA-NeXT or
            LLaVA-OneVision, of which only the tower is loaded. None: random weights.
        dtype: of the weights.
        device: to put them on.
        seed: of the random weights.
        config: of the random tower.
        kinds: which of `TOWERS` to accept.

    Raises:
        ValueError: if ``seed`` is out of range, there is no such checkpoint, it is of another family, or its weights
            are incomplete.

    Example:
        >>> tower = load_tower()
        >>> tower.encoder(tower.pixel_values(image)).last_hidden_state.shape
        torch.Size([1, 577, 1024])
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected 0 to 2**63 - 1, got {seed}")
    if source is None:
        encoder, deep_layer = _random_encoder(config, seed), max(1, config.num_hidden_layers - 1)
        name = f"a random CLIP vision tower of {config.num_hidden_layers} layers (seed {seed})"
        processor, remarks = _default_processor(config), ()
    else:
        name = source
        encoder, processor, deep_layer, remarks = _from_checkpoint(source, kinds)
    encoder = encoder.eval().requires_grad_(False).to(device=device, dtype=dtype)
    return Tower(encoder, processor, name, source is None, deep_layer, remarks)


def queries_and_keys(
    encoder: VisionModel, pixel_values: Tensor, layers: Sequence[int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Queries and keys [B, H, N, D] of some 1-based layers, from a forward of the stock modules."""
    heads: dict[int, tuple[Tensor, Tensor]] = {}
    _, _, modules = find_encoder(encoder)

    def keep(layer: int):
        def hook(module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            projected = (projection(states) for projection in (module.q_proj, module.k_proj))
            heads[layer] = tuple(x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in projected)

        return hook

    with contextlib.ExitStack() as handles:
        for layer in layers:
            attention = modules[layer - 1].self_attn
            handles.callback(attention.register_forward_pre_hook(keep(layer), with_kwargs=True).remove)
        encoder(pixel_values)
    return heads


def _random_encoder(config: CLIPVisionConfig, seed: int) -> CLIPVisionModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPVisionModel(config)
        # CLIP's own initialisation leaves every attention row nearly uniform, and all column scores nearly equal. With
        # these weights the logits have a standard deviation of about 2, and the scores differ as trained ones do.
        for layer in find_encoder(encoder)[2]:
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                torch.nn.init.normal_(projection.weight, std=(2 / config.hidden_size) ** 0.5)
    return encoder


def _from_checkpoint(source: str, kinds: Sequence[str]) -> tuple[VisionModel, ImageProcessor, int, tuple[str, ...]]:
    """Encoder, image processor, deep layer and remarks."""
    local_only = _is_local(source)
    remarks: list[str] = []
    with _quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(source, local_files_only=local_only)
        except (OSError, ValueError) as error:
            if local_only and not os.path.isdir(source):
                where = "no local directory, not in the local cache, and the hub cannot be reached"
                raise ValueError(f"model: {source!r} is {where}") from error
            raise ValueError(f"model: the configuration of {source!r} cannot be read: {error}") from error
        vision_config, deep_layer, renamed = _vision_part(source, config, kinds)
        model_class, processor_name = TOWERS[vision_config.model_type]
        try:
            encoder, info = model_class.from_pretrained(
                source,
                config=vision_config,
                key_mapping=renamed,
                output_loading_info=True,
                local_files_only=local_only,
            )
        except Exception as error:  # safetensors, zip, pickle and size errors: a broken file can raise any of them
            raise ValueError(f"model: the weights of {source!r} cannot be loaded: {error}") from error
        if info["missing_keys"]:  # transformers would leave these random
            missing = sorted(info["missing_keys"])
            raise ValueError(f"model: {source!r} lacks {len(missing)} weights of the vision tower, first {missing[0]}")
        try:
            processor = getattr(transformers, processor_name).from_pretrained(source, local_files_only=local_only)
        except OSError:
            processor = _default_processor(vision_config)
            kind = find_encoder(encoder)[0].kind.name
            remarks.append(
                f"{source} has no image processor: images are prepared as for {kind} at {vision_config.image_size} px"
            )
    if config.model_type in ("llava_next", "llava_onevision"):
        remarks.append(f"a {config.model_type} model cuts images into tiles; here one view of the image is all of them")
    return encoder, processor, deep_layer, tuple(remarks)


def _vision_part(source: str, config, kinds: Sequence[str]) -> tuple[VisionConfig, int, dict[str, str] | None]:
    """The tower's config, its 1-based deep layer, and how the checkpoint's weights of the tower are renamed."""
    family = config.model_type
    vision = config if family in kinds else getattr(config, "vision_config", None)
    if getattr(vision, "model_type", None) not in kinds or family not in (*kinds, "clip", "siglip", *_LLAVAS):
        names = " or ".join(ENCODERS[kind].kind.name for kind in kinds)
        tower = f" with a {vision.model_type} tower" if vision is not None else ""
        raise ValueError(
            f"model: expected a {names} vision model, or a model of type {', '.join(_LLAVAS)} with such a tower, got "
            f"model_type {family!r}{tower} in {source!r}"
        )
    layers = vision.num_hidden_layers
    if vision.model_type == "siglip_vision_model":
        vision.vision_use_head = False  # no layer's scores need it
    if family not in _LLAVAS:  # what models that take this tower read: CLIP's last layer but one, SigLIP's last
        return vision, max(1, layers - 1) if vision.model_type == "clip_vision_model" else layers, None
    state = config.vision_feature_layer
    if not isinstance(state, int):
        raise ValueError(f"model: expected one vision_feature_layer in {source!r}, got {state}")
    return vision, state if state >= 0 else layers + 1 + state, {r"^(model\.)?vision_tower\.": ""}


def _default_processor(config: VisionConfig) -> ImageProcessor:
    side = config.image_size
    with _quiet_transformers():
        if config.model_type == "siglip_vision_model":
            return transformers.SiglipImageProcessor(size={"height": side, "width": side})
        return transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size=side)


def _is_local(source: str) -> bool:
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


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no reports of unused weights: errors are raised, the rest is not the user's concern."""
    logging = transformers.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
