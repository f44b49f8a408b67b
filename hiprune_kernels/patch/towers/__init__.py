"""The vision encoders that can be scored and pruned: one `EncoderFamily` each, in `ENCODERS`."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from . import qwen, vit
from .family import EncoderFamily, Grid

__all__ = [
    "ENCODERS",
    "EncoderFamily",
    "Grid",
    "find_encoder",
    "locate_layers",
    "source_digest",
    "warn_unknown_sources",
]

ENCODERS = {**vit.FAMILIES, **qwen.FAMILIES}  # config.model_type of the vision encoder -> family


def find_encoder(model: nn.Module) -> tuple[EncoderFamily, Any, list[nn.Module]]:
    """Family, config and layers of the vision encoder that `model` is, holds (the first one), or is the inside of.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if there is no supported encoder.
    """
    family, module = locate_layers(model)
    return family, module.config, list(module.get_submodule(family.layers))


def locate_layers(model: nn.Module) -> tuple[EncoderFamily, nn.Module]:
    """Family of the vision encoder that `find_encoder` finds, and the module right above its layers.

    Raises:
        TypeError, ValueError: as `find_encoder`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        family = ENCODERS.get(getattr(getattr(module, "config", None), "model_type", None))
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


def warn_unknown_sources(family: EncoderFamily, layer: nn.Module) -> None:
    """Warn if the stock forwards that the feature layer stands in for are not the known ones."""
    for path, known in family.stock_sources.items():
        forward = type(layer.get_submodule(path)).forward
        if source_digest(forward) not in known:
            warnings.warn(
                f"hiprune_kernels computes {forward.__qualname__} by itself in the feature layer, and the installed "
                "transformers has a version of it that was never compared with ours: check the outputs, or use a "
                "transformers release that hiprune_kernels was tested with",
                stacklevel=5,  # where apply_hiprune was called
            )


def source_digest(function: Callable[..., Any]) -> str:
    """A short digest of a function's source text; empty where there is no source to read."""
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""
