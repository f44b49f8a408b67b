"""Reversible edits to live modules.

What was changed is kept as data, so it deep-copies along with the model and can be undone there.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeAlias

import transformers
from torch import nn

_PACKAGE = __name__.split(".")[0]

StockModule: TypeAlias = Any  # a module of transformers: torch declares none of its attributes, config and parts


class _Around:
    """An instance's forward: `function`, which is handed the module and the forward that it had before.

    It does what a pair of hooks would. Hooks will not do: a graph that torch.compile traced before they came never
    looks for them, but it does look for a forward of the instance's own.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)  # `generate` reads the names of the arguments
        self.module, self.function, self.forward = module, function, forward
        self.retired = False  # after `undo`; somebody who wrapped this in a forward of his own still calls it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.retired:
            return self.forward(*args, **kwargs)
        return self.function(self.module, self.forward, *args, **kwargs)


class Edits:
    """The changes made to one model, undone together by `undo`.

    Nothing here holds a closure over a module: a deep copy of a patched model owns a deep copy of its edits, and
    undoing them touches the copy alone.
    """

    def __init__(self) -> None:
        self._methods: list[tuple[nn.Module, str, Callable[..., Any]]] = []
        self._arounds: list[_Around] = []
        self._attributes: list[tuple[nn.Module, str, bool, Any]] = []

    def set_method(
        self, module: nn.Module, name: str, function: Callable[..., Any], *, may_be_missing: bool = False
    ) -> None:
        """Let `module.name` be `function`, for this instance only.

        Accelerate keeps the forward that its own hook wraps in `_old_forward`; there ours goes where a hook is present.

        Raises:
            ValueError: if the class has no such method, so that ours would never be called, unless it `may_be_missing`;
                or if the method of this instance was already replaced by something else.
        """
        if getattr(type(module), name, None) is None and not may_be_missing:
            raise ValueError(
                f"model: expected a {type(module).__name__} with a method `{name}`, which it has not in transformers "
                f"{transformers.__version__}"
            )
        refuse_replaced(module, name)
        module.__dict__[_slot(module, name)] = types.MethodType(function, module)
        self._methods.append((module, name, function))

    def wrap_forward(self, module: nn.Module, function: Callable[..., Any]) -> None:
        """Let `function(module, forward, ...)` run in place of the forward that this instance has, somebody's or stock.

        Accelerate's hooks stay outside, as with `set_method`.
        """
        slot = _slot(module, "forward")
        around = _Around(module, function, module.__dict__.get(slot) or module.forward)
        module.__dict__[slot] = around
        self._arounds.append(around)

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Let the plain attribute `module.name` be `value`."""
        self._attributes.append((module, name, name in module.__dict__, module.__dict__.get(name)))
        module.__dict__[name] = value

    def refuse_changed(self) -> None:
        """Raise ValueError if a method that was set here was replaced since."""
        for module, name, function in self._methods:
            if getattr(module.__dict__.get(_slot(module, name)), "__func__", None) is not function:
                refuse_replaced(module, name)

    def undo(self) -> None:
        """Bring everything back. Accelerate's hooks may have come or gone since, so our methods are looked for."""
        for module, name, existed, value in reversed(self._attributes):
            if existed:
                module.__dict__[name] = value
            else:
                del module.__dict__[name]
        for module, name, function in self._methods:
            for slot in (name, "_old_forward"):
                if getattr(module.__dict__.get(slot), "__func__", None) is function:
                    _restore(module, slot)
        for around in self._arounds:
            around.retired = True
            for slot in ("forward", "_old_forward"):
                if around.module.__dict__.get(slot) is around:
                    _restore(around.module, slot)
        for record in (self._attributes, self._methods, self._arounds):
            record.clear()


def _slot(module: nn.Module, name: str) -> str:
    return "_old_forward" if name == "forward" and hasattr(module, "_hf_hook") else name


def _restore(module: nn.Module, slot: str) -> None:
    """Put what was there before in the place of a method of ours."""
    present = module.__dict__.pop(slot)
    stock = types.MethodType(type(module).forward, module)
    before = present.forward if isinstance(present, _Around) else stock
    if slot == "_old_forward" or before != stock:
        module.__dict__[slot] = before


def refuse_replaced(module: nn.Module, name: str) -> None:
    """Raise ValueError if a method of this instance was replaced."""
    present = module.__dict__.get(_slot(module, name))
    if present is not None and getattr(present, "__func__", None) is not getattr(type(module), name, None):
        raise ValueError(
            f"model: expected the stock `{name}` on {type(module).__name__}, but this instance carries a "
            f"replacement ({present!r}); remove it first"
        )


def clear_methods(root: nn.Module) -> None:
    """Take our methods off copies of patched modules, as PEFT makes them, which no record of edits knows."""
    for module in root.modules():
        for slot, present in list(module.__dict__.items()):
            owner = getattr(getattr(present, "__func__", None), "__module__", None) or ""
            if isinstance(present, _Around) or owner.split(".")[0] == _PACKAGE:
                _restore(module, slot)
