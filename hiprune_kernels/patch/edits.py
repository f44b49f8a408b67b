"""Reversible edits to live modules.

What was changed is kept as data, so it deep-copies along with the model and can be undone there.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import transformers
from torch import nn
from torch.utils.hooks import RemovableHandle


class Edits:
    """The changes made to one model, undone together by `undo`.

    Nothing here holds a closure over a module: a deep copy of a patched model owns a deep copy of its edits, and
    undoing them touches the copy alone.
    """

    def __init__(self) -> None:
        self._methods: list[tuple[nn.Module, str, Callable[..., Any]]] = []
        self._attributes: list[tuple[nn.Module, str, bool, Any]] = []
        self._hooks: list[RemovableHandle] = []

    def set_method(
        self, module: nn.Module, name: str, function: Callable[..., Any], *, may_be_missing: bool = False
    ) -> None:
        """Let `module.name` be `function`, for this instance only.

        Accelerate keeps the forward that its own hook wraps in `_old_forward`; there ours goes where a hook is present.

        Raises:
            ValueError: if the class has no such method, so that ours would never be called, unless it `may_be_missing`;
                or if the method of this instance was already replaced by something else.
        """
        stock = getattr(type(module), name, None)
        if stock is None and not may_be_missing:
            raise ValueError(
                f"model: expected a {type(module).__name__} with a method `{name}`, which it has not in transformers "
                f"{transformers.__version__}"
            )
        slot = "_old_forward" if name == "forward" and hasattr(module, "_hf_hook") else name
        present = module.__dict__.get(slot)
        if present is not None and getattr(present, "__func__", None) is not stock:
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
