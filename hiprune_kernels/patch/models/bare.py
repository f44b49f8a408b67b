"""Vision encoders by themselves: `last_hidden_state` holds the kept rows of the last layer."""

from __future__ import annotations

from functools import partial
from typing import Any

from ...facts import MODELS
from ..call import Call
from ..edits import StockModule
from .family import ModelFamily


def _last_layer(host: StockModule, arguments: object) -> int:
    return host.config.num_hidden_layers


def _check_class(expected: str, host: StockModule) -> None:
    """Models of one type share it, but most classes behind an encoder read the tokens that are dropped."""
    if expected not in (cls.__name__ for cls in type(host).__mro__):
        raise ValueError(
            f"model: expected a {expected}, as other models of type {host.config.model_type!r} may need dropped "
            f"tokens, got {type(host).__name__}"
        )


def _check_head(host: StockModule) -> None:
    if host.use_head:
        raise ValueError(
            f"model: the pooling head of this {type(host).__name__} attends to every token, dropped ones "
            "too; load it with vision_use_head=False"
        )


def _check_mask(call: Call) -> None:
    if call.arguments.get("attention_mask") is not None:
        raise ValueError("attention_mask: expected None, as masked patches of an image are not told from others")


def _check_predictor(call: Call) -> None:
    """V-JEPA 2's predictor, and its masks, count in tokens of the whole clip."""
    if not call.arguments.get("skip_predictor"):
        raise ValueError("skip_predictor: expected True, as the predictor needs dropped tokens")
    for name in ("context_mask", "target_mask"):
        if call.arguments.get(name) is not None:
            raise ValueError(f"{name}: expected None, as it counts in tokens of the whole clip")


def _encoder(model_type: str, cls: str, **others: Any) -> ModelFamily:
    options = {"check": partial(_check_class, cls), "check_call": _check_mask, **others}
    return ModelFamily(
        kind=MODELS[model_type],
        host=lambda model: getattr(model, "vision_model", model),  # CLIPVisionModelWithProjection holds the encoder
        encoders=lambda host: [host],
        feature_layer=_last_layer,
        **options,
    )


FAMILIES = {
    "clip_vision_model": _encoder("clip_vision_model", "CLIPVisionModel"),
    "siglip_vision_model": _encoder("siglip_vision_model", "SiglipVisionModel", check=_check_head),
    "vit": _encoder("vit", "ViTModel"),
    "deit": _encoder("deit", "DeiTModel"),
    "dinov2": _encoder("dinov2", "Dinov2Model"),
    "dinov2_with_registers": _encoder("dinov2_with_registers", "Dinov2WithRegistersModel"),
    "vjepa2": _encoder("vjepa2", "VJEPA2Model", check_call=_check_predictor),
}
