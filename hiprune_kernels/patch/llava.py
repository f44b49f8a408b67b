"""LLaVA-1.5: CLIP features of the last layer but one, a projector, one language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .decoder import install_decoder, placeholder_mask
from .edits import Edits
from .encoders import ENCODERS, Call, ModelFamily, current_call, gather_rows, with_prefix

TEXT_MODELS = ("llama", "mistral", "qwen2")


def _host(model: nn.Module) -> nn.Module:
    return model if hasattr(model, "language_model") and hasattr(model, "vision_tower") else model.model


def _check(host: nn.Module) -> None:
    vision, text = host.config.vision_config.model_type, host.config.text_config.model_type
    if vision not in ENCODERS:
        raise ValueError(f"model: expected a vision tower of type {', '.join(ENCODERS)}, got {vision!r}")
    if text not in TEXT_MODELS:
        raise ValueError(f"model: expected a text model of type {', '.join(TEXT_MODELS)}, got {text!r}")


def _argument(host: nn.Module, arguments: dict[str, Any], name: str) -> Any:
    given = arguments.get(name)
    return getattr(host.config, name) if given is None else given


def _feature_layer(host: nn.Module, arguments: dict[str, Any]) -> int:
    index = _argument(host, arguments, "vision_feature_layer")
    if not isinstance(index, int):
        raise ValueError(f"vision_feature_layer: pruning needs the features of one layer, got {index!r}")
    depth = host.config.vision_config.num_hidden_layers
    layer = index if index >= 0 else depth + 1 + index
    if not 1 <= layer <= depth:
        raise ValueError(f"vision_feature_layer: expected the output of one of {depth} layers, got {index}")
    return layer


def _feature_rows(call: Call) -> tuple[Tensor, int]:
    """Rows of the features that go to the language model which were computed, [images, K], and how many there are."""
    prefix = call.patch.encoder_family.num_prefix_tokens
    if _argument(call.patch.host, call.arguments, "vision_feature_select_strategy") == "default":
        prefix = 0
    return with_prefix(call.indices, prefix), prefix + call.roles.shape[1]


def _projector_forward(self: nn.Module, image_features: Tensor) -> Tensor:
    """Projects the computed rows and spreads them over the places of all, so that stock code finds its shapes."""
    projected = type(self).forward(self, image_features)
    call = current_call(self)
    if call is None:
        return projected
    rows, length = _feature_rows(call)
    rows = rows.to(projected.device)[..., None].expand_as(projected)
    return projected.new_zeros(len(projected), length, projected.shape[-1]).scatter(1, rows, projected)


def _keep_mask(call: Call) -> Tensor:
    """False where the prompt has a dropped image token, [B, L]."""
    rows, length = _feature_rows(call)
    kept = torch.zeros(len(rows), length, dtype=torch.bool, device=rows.device).scatter(1, rows, True)
    host = call.patch.host
    placeholders = placeholder_mask(host, call.arguments, host.config.image_token_id)
    return torch.ones_like(placeholders).masked_scatter(placeholders, kept.flatten().to(placeholders.device))


def _finish(call: Call, output: Any) -> Any:
    """`image_hidden_states` keeps the computed rows only."""
    rows, length = _feature_rows(call)

    def kept(states: Tensor) -> Tensor:
        return gather_rows(states.unflatten(0, (-1, length)), rows.to(states.device)).flatten(0, 1)

    if isinstance(output, tuple):
        return (*output[:-1], kept(output[-1]))
    output.image_hidden_states = kept(output.image_hidden_states)
    return output


def _install(edits: Edits, model: nn.Module, host: nn.Module) -> None:
    edits.set_method(host.multi_modal_projector, "forward", _projector_forward)
    install_decoder(edits, model, host, host.language_model)


LLAVA = ModelFamily(
    host=_host,
    check=_check,
    encoder=lambda host: host.vision_tower,
    feature_layer=_feature_layer,
    connector=lambda host: host.multi_modal_projector,
    language_model=lambda host: host.language_model,
    keep_mask=_keep_mask,
    install=_install,
    finish=_finish,
)
