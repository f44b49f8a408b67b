"""What is known of each vision encoder and each type of model, as plain data.

Patching, serving engines and the command line read it. It imports nothing of the package, nor torch or transformers.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class EncoderKind(NamedTuple):
    """What all vision encoders of one `config.model_type` have in common."""

    name: str  # as people call it
    prefix_tokens: int = 0  # leading rows (CLS, registers), which are never candidates ...
    further_prefix: str = ""  # ... and the attribute of the config that says how many more there are
    object_share: float = 9 / 24  # default object layer as a share of the depth: layer 9 of CLIP-L's 24
    merges_rows: bool = False  # several rows make one token (merge groups, pixel shuffle)
    official_rule: str = "official"  # the selection rule of HiPrune's released code for this kind of encoder ...
    official_means: bool = True  # ... and whether that is handed means over queries instead of sums
    notes: str = ""  # what `hiprune info --models` says of limits

    def num_prefix_tokens(self, config: Any) -> int:
        """How many leading rows of an encoder with this config are not of the image's grid."""
        return self.prefix_tokens + (getattr(config, self.further_prefix) if self.further_prefix else 0)

    def object_layer(self, depth: int, feature_layer: int) -> int:
        """The default object layer, 1-based, of an encoder of `depth` layers: at most the feature layer."""
        return min(max(1, round(self.object_share * depth)), feature_layer)


class EncoderFacts(NamedTuple):
    """What a method may want to know of the one encoder it is applied to, and of the model around it."""

    model_type: str  # of the encoder's config
    kind: EncoderKind
    depth: int  # how many layers it has
    feature_layer: int  # 1-based: the layer whose output are the image's features
    num_prefix_tokens: int
    tiled: bool = False  # the model cuts an image into a thumbnail and tiles, and encodes each by itself
    places_tiles: bool = False  # ... and tells where in the image each of them lies
    decoder_layers: int = 0  # layers of the language model; 0: there is none
    attention_layers: tuple[int, ...] = ()  # those of them, 1-based, with softmax attention
    class_name: str = ""  # of the encoder, for messages

    @property
    def name(self) -> str:
        return self.class_name or self.kind.name

    @property
    def has_cls(self) -> bool:
        """Whether row 0 is a CLS token."""
        return self.num_prefix_tokens > 0

    def attention_layer(self, layer: int) -> int:
        """The first decoder layer from this one on that has softmax attention; the layer itself where none has."""
        return next((each for each in self.attention_layers if each >= layer), layer)

    @property
    def object_layer(self) -> int:
        """HiPrune's default object layer, 1-based."""
        return self.kind.object_layer(self.depth, self.feature_layer)


class ModelKind(NamedTuple):
    """What all models of one `config.model_type` have in common."""

    name: str  # as people call it, and its transformers class
    budget_per: str = "image"  # what `budget` counts the tokens of
    thumbnail: int | None = None  # images are cut into tiles, and this one shows the whole: 0 the first, -1 the last
    places_tiles: bool = False  # the inputs tell where in the image each tile lies
    unpad: bool = False  # the padding of tiles is cut away before the prompt
    notes: str = ""  # what `hiprune info --models` says of limits


_CLIP = EncoderKind("CLIP", prefix_tokens=1)
_QWEN = EncoderKind(
    "Qwen2-VL", object_share=16 / 32, merges_rows=True, official_rule="official_qwen", official_means=False
)

ENCODERS = {  # config.model_type of the vision encoder -> what is known
    "clip_vision_model": _CLIP,
    "siglip_vision_model": EncoderKind("SigLIP", notes="SigLIP 2 of a fixed resolution too"),
    "siglip2_vision_model": EncoderKind(
        "SigLIP 2 NaFlex",
        notes="recording only: its images are padded to one length, and what reads its output counts in padded patches",
    ),
    "vit": EncoderKind("ViT", prefix_tokens=1),
    "deit": EncoderKind("DeiT", prefix_tokens=2),
    "dinov2": EncoderKind("DINOv2", prefix_tokens=1),
    "dinov2_with_registers": EncoderKind(
        "DINOv2 with registers", prefix_tokens=1, further_prefix="num_register_tokens"
    ),
    "vjepa2": EncoderKind("V-JEPA 2"),
    "internvl_vision": EncoderKind(
        "InternVL", prefix_tokens=1, merges_rows=True, notes="pruned as a part of InternVL, not by itself"
    ),
    "qwen2_vl_vision": _QWEN,
    "qwen2_5_vl_vision": _QWEN._replace(name="Qwen2.5-VL"),
    "qwen3_vl_vision": _QWEN._replace(name="Qwen3-VL"),
    "qwen3_vl_moe_vision": _QWEN._replace(name="Qwen3-VL-MoE"),
    "qwen3_5_vision": _QWEN._replace(name="Qwen3.5"),
    "qwen3_5_moe_vision": _QWEN._replace(name="Qwen3.5-MoE"),
    "glm4v_vision": _QWEN._replace(name="GLM-4V"),
    "glm4v_moe_vision": _QWEN._replace(name="GLM-4V-MoE"),
}


def encoder_type(config: Any) -> str:
    """The key in `ENCODERS` of a vision encoder's config.

    Checkpoints that an older transformers saved say the whole model's type in the encoder's config too ("qwen2_5_vl"),
    and some releases keep it. Then the type of the config's class counts.
    """
    found: str = config.model_type
    return found if found in ENCODERS else getattr(type(config), "model_type", found)


_LINEAR = "linear attention takes no padding: in a later turn with images all rows must keep as many tokens"
_FRAMES = "the budget is shared out equally among a video's frames; a call takes images or videos, not both"

MODELS = {  # config.model_type of the model -> what is known
    "llava": ModelKind("LLaVA-1.5 (LlavaForConditionalGeneration)"),
    "llava_next": ModelKind(
        "LLaVA-NeXT (LlavaNextForConditionalGeneration)",
        thumbnail=0,
        places_tiles=True,
        unpad=True,
        notes="the budget is shared out equally among an image's tiles; newlines stay besides",
    ),
    "llava_onevision": ModelKind(
        "LLaVA-OneVision (LlavaOnevisionForConditionalGeneration)",
        budget_per="image or video",
        thumbnail=0,
        places_tiles=True,
        unpad=True,
        notes="the budget is shared out equally among an image's tiles or a video's frames, newlines stay besides; "
        "interpolated features (large images, videos) are computed for all tokens and selected afterwards",
    ),
    "video_llava": ModelKind(
        "Video-LLaVA (VideoLlavaForConditionalGeneration)",
        budget_per="image or video",
        notes="the budget is shared out equally among a video's frames; their CLS tokens stay besides",
    ),
    "qwen2_vl": ModelKind("Qwen2-VL (Qwen2VLForConditionalGeneration)", "image or video"),
    "qwen2_5_vl": ModelKind("Qwen2.5-VL (Qwen2_5_VLForConditionalGeneration)", "image or video"),
    "qwen3_vl": ModelKind("Qwen3-VL (Qwen3VLForConditionalGeneration)", "image or video"),
    "qwen3_vl_moe": ModelKind("Qwen3-VL-MoE (Qwen3VLMoeForConditionalGeneration)", "image or video"),
    "qwen3_5": ModelKind("Qwen3.5 (Qwen3_5ForConditionalGeneration)", "image or video", notes=_LINEAR),
    "qwen3_5_moe": ModelKind("Qwen3.5-MoE (Qwen3_5MoeForConditionalGeneration)", "image or video", notes=_LINEAR),
    "glm4v": ModelKind("GLM-4.1V (Glm4vForConditionalGeneration)", "image or video", notes=_FRAMES),
    "glm4v_moe": ModelKind("GLM-4.5V (Glm4vMoeForConditionalGeneration)", "image or video", notes=_FRAMES),
    "glm46v": ModelKind("GLM-4.6V (Glm46VForConditionalGeneration)", "image or video", notes=_FRAMES),
    "internvl": ModelKind(
        "InternVL (InternVLForConditionalGeneration)",
        budget_per="tile",
        thumbnail=-1,
        notes="an image's tiles and a video's frames count as images of their own",
    ),
    "clip_vision_model": ModelKind("CLIP vision encoder (CLIPVisionModel)"),
    "siglip_vision_model": ModelKind(
        "SigLIP vision encoder (SiglipVisionModel)", notes="loaded with vision_use_head=False"
    ),
    "vit": ModelKind("ViT vision encoder (ViTModel)"),
    "deit": ModelKind("DeiT vision encoder (DeiTModel)"),
    "dinov2": ModelKind("DINOv2 vision encoder (Dinov2Model)"),
    "dinov2_with_registers": ModelKind("DINOv2 with registers vision encoder (Dinov2WithRegistersModel)"),
    "vjepa2": ModelKind(
        "V-JEPA 2 vision encoder (VJEPA2Model)", budget_per="clip", notes="called with skip_predictor=True"
    ),
}
