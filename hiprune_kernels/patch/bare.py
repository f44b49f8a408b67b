"""Vision encoders by themselves: `last_hidden_state` holds the kept rows of the last layer."""

from __future__ import annotations

from torch import nn

from .encoders import ModelFamily


def _last_layer(host: nn.Module, arguments: object) -> int:
    return host.config.num_hidden_layers


FAMILIES = {
    "clip_vision_model": ModelFamily(
        name="CLIP vision encoder (CLIPVisionModel)",
        host=lambda model: getattr(model, "vision_model", model),  # CLIPVisionModelWithProjection holds the encoder
        encoders=lambda host: [host],
        feature_layer=_last_layer,
    ),
}
