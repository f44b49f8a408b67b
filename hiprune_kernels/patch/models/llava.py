"""LLaVA-1.5: CLIP features of the last layer but one, a projector, one language model."""

from __future__ import annotations

from typing import Any

from ...facts import MODELS, encoder_type
from ..call import Call
from ..edits import StockModule
from .family import ModelFamily

VISION_TOWERS = ("clip_vision_model", "siglip_vision_model")
TEXT_MODELS: tuple[str, ...] = ("llama", "mistral", "qwen2")


def llava_host(model: StockModule) -> StockModule:
    """The model without its head."""
    return model if hasattr(model, "language_model") else model.model


def check_parts(host: StockModule) -> None:
    """Raise ValueError unless the vision tower and the text model are supported."""
    vision, text = encoder_type(host.config.vision_config), host.config.text_config.model_type
    if vision not in VISION_TOWERS:
        raise ValueError(f"model: expected a vision tower of type {', '.join(VISION_TOWERS)}, got {vision!r}")
    if text not in TEXT_MODELS:
        raise ValueError(f"model: expected a text model of type {', '.join(TEXT_MODELS)}, got {text!r}")


def argument(host: StockModule, arguments: dict[str, Any], name: str) -> Any:
    """An argument of the host's forward that its config has a default for."""
    given = arguments.get(name)
    return getattr(host.config, name) if given is None else given


def vision_feature_layer(host: StockModule, arguments: dict[str, Any]) -> int:
    """The 1-based layer whose output are the features, from transformers' index into the hidden states."""
    index = argument(host, arguments, "vision_feature_layer")
    if not isinstance(index, int):
        raise ValueError(f"vision_feature_layer: pruning needs the features of one layer, got {index!r}")
    depth = host.config.vision_config.num_hidden_layers
    layer = index if index >= 0 else depth + 1 + index
    if not 1 <= layer <= depth:
        raise ValueError(f"vision_feature_layer: expected the output of one of {depth} layers, got {index}")
    return layer


def rows_before_grid(call: Call) -> int:
    """How many of an image's features are not of its grid; -1 where stock code takes the first of the grid off."""
    dropped = argument(call.patch.host, call.arguments, "vision_feature_select_strategy") == "default"
    return call.patch.encoders[0].facts.num_prefix_tokens - dropped


def check_strategy(call: Call) -> None:
    """Raise ValueError if stock code takes a token of the grid for a CLS token."""
    if rows_before_grid(call) < 0:
        name = call.patch.encoders[0].facts.kind.name
        raise ValueError(f'vision_feature_select_strategy: expected "full", as {name} has no CLS token, got "default"')


FAMILIES = {
    "llava": ModelFamily(
        kind=MODELS["llava"],
        host=llava_host,
        check=check_parts,
        check_call=check_strategy,
        encoders=lambda host: [host.vision_tower],
        feature_layer=vision_feature_layer,
        connector=lambda host: host.multi_modal_projector,
        language_model=lambda host: host.language_model,
    ),
}
