"""The vision encoders that can be scored and pruned: one `EncoderFamily` each, in `ENCODERS`."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...facts import encoder_type
from ..edits import StockModule
from . import qwen, vit
from .family import EncoderFamily

__all__ = ["ENCODERS", "EncoderFamily", "find_encoder", "locate_layers"]

ENCODERS = {**vit.FAMILIES, **qwen.FAMILIES}  # config.model_type of the vision encoder -> family


def find_encoder(model: nn.Module) -> tuple[EncoderFamily, Any, list[nn.Module]]:
    """Family, config and layers of the vision encoder that `model` is, holds (the first one), or is the inside of.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if there is no supported encoder.
    """
    family, module = locate_layers(model)
    return family, module.config, list(module.get_submodule(family.layers))


def locate_layers(model: nn.Module) -> tuple[EncoderFamily, StockModule]:
    """Family of the vision encoder that `find_encoder` finds, and the module right above its layers.

    Raises:
        TypeError, ValueError: as `find_encoder`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        config = getattr(module, "config", None)
        family = ENCODERS.get(encoder_type(config)) if hasattr(config, "model_type") else None
        if family is None or type(module).__name__ in family.not_in:
            continue
        if isinstance(_descend(module, family.layers), nn.ModuleList):
            return family, module
    raise ValueError(f"model: found no supported vision encoder ({', '.join(ENCODERS)}) in {type(model).__name__}")


def _descend(module: nn.Module, path: str) -> Any:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
