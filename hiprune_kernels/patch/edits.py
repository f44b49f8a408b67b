"""Reversible edits to live modules, and the tap on an attention function.

What was changed is kept as data, so it deep-copies along with the model and can be undone there.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_TAP = "_hiprune_tap"
_TAPPED = "hiprune_tapped"  # attention implementation that hands the call to the module's tap


class Edits:
    """The changes made to one model, undone together by `undo`.

    Nothing here holds a closure over a module: a deep copy of a patched model owns a deep copy of its edits, and
    undoing them touches the copy alone.
    """

    def __init__(self) -> None:
        self._methods: list[tuple[nn.Module, str, Callable[..., Any]]] = []
        self._attributes: list[tuple[nn.Module, str, bool, Any]] = []
        self._hooks: list[RemovableHandle] = []

    def set_method(self, module: nn.Module, name: str, function: Callable[..., Any]) -> None:
        """Let `module.name` be `function`, for this instance only.

        Accelerate keeps the forward that its own hook wraps in `_old_forward`; there ours goes where a hook is present.

        Raises:
            ValueError: if the method of this instance was already replaced by something else.
        """
        slot = "_old_forward" if name == "forward" and hasattr(module, "_hf_hook") else name
        present = module.__dict__.get(slot)
        if present is not None and getattr(present, "__func__", None) is not getattr(type(module), name):
            raise ValueError(
                f"model: expected the stock `{name}` on {type(module).__name__}, but this instance carries a "
                f"replacement ({present!r}); remove it first"
            )
        module.__dict__[slot] = types.MethodType(function, module)
        self._methods.append((module, name, function))

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Let the plain attribute `module.name` be `value`."""
        self._attributes.append((module, name, name in module.__dict__, module.__dict__.get(name)))
        module.__dict__[name] = value

    def add_hook(self, handle: RemovableHandle) -> None:
        """Remember a registered hook."""
        self._hooks.append(handle)

    def undo(self) -> None:
        """Bring everything back. Accelerate's hooks may have come or gone since, so our methods are looked for."""
        for handle in self._hooks:
            handle.remove()
        for module, name, existed, value in reversed(self._attributes):
            if existed:
                module.__dict__[name] = value
            else:
                del module.__dict__[name]
        for module, name, function in self._methods:
            for slot in (name, "_old_forward"):
                if getattr(module.__dict__.get(slot), "__func__", None) is not function:
                    continue
                if slot == name:
                    del module.__dict__[slot]
                else:
                    module.__dict__[slot] = types.MethodType(getattr(type(module), name), module)
        for record in (self._hooks, self._attributes, self._methods):
            record.clear()


@dataclass
class _Tap:
    """Who listens to one attention module, and the config that the module had before."""

    config: Any
    listener: Callable[..., tuple[Tensor, Tensor | None]]


def _tapped_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, N, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of a tapped module: its tap's listener decides, and may run the stock function."""
    tap: _Tap = module.__dict__[_TAP]

    def stock() -> tuple[Tensor, Tensor | None]:
        implementation = tap.config._attn_implementation  # looked up per call: set_attn_implementation may change it
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        untapped = copy.copy(module)  # flash attention reads the implementation's name from module.config
        untapped.config = tap.config
        return function(untapped, query, key, value, attention_mask, scaling=scaling, **kwargs)

    if attention_mask is not None:
        raise ValueError("attention_mask: column scores of a masked vision encoder are not supported")
    return tap.listener(module, query, key, value, scaling, stock)


ALL_ATTENTION_FUNCTIONS.register(_TAPPED, _tapped_attention)


def tap_attention(edits: Edits, attention: nn.Module, listener: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    """Put a listener between an attention module and its attention function.

    Every attention module looks its function up by the name in its own `config`, so a private copy of that config
    changes this one layer; the config that the model saves is untouched.
    """
    config = copy.copy(attention.config)
    config._attn_implementation_internal = _TAPPED
    edits.set_attribute(attention, _TAP, _Tap(attention.config, listener))
    edits.set_attribute(attention, "config", config)


def refuse_tapped(attentions: Iterable[nn.Module]) -> None:
    """Raise ValueError if any of these attention modules has a tap already."""
    if any(_TAP in attention.__dict__ for attention in attentions):
        raise ValueError(
            "model: its vision encoder is patched or being recorded already; call remove_hiprune, or leave "
            "record_scores, before this"
        )
