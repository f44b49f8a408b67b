"""Models of lmms-eval that prune: `lmms_eval --model hiprune_llava_hf --model_args pretrained=...,budget=192`.

lmms-eval finds them by the entry point `lmms_eval.models`, which asks for `manifests`. A class is made when it is asked
for, from lmms-eval's own, which load the classes of transformers that can be patched.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..methods import METHODS, Method, options_of

_TEXT_ENCODER = "text_encoder"


class Stock(NamedTuple):
    """A chat model of lmms-eval."""

    class_name: str  # in the module of its name
    model_types: tuple[str, ...]  # that it loads
    batches: bool = True  # whether it takes more than one question at once
    takes_dtype: bool = False  # rather than always the checkpoint's


STOCK: dict[str, Stock] = {
    "llava_hf": Stock("LlavaHf", ("llava", "llava_next", "llava_onevision"), batches=False, takes_dtype=True),
    "qwen2_5_vl": Stock("Qwen2_5_VL", ("qwen2_5_vl",)),
    "qwen3_vl": Stock("Qwen3_VL", ("qwen3_vl", "qwen3_vl_moe")),
    "qwen3_5": Stock("Qwen3_5", ("qwen3_5", "qwen3_5_moe")),
    "internvl_hf": Stock("InternVLHf", ("internvl",), batches=False),
}


class GenerationError(RuntimeError):
    """`generate` failed; lmms-eval by itself would log that and count an empty answer."""


class _Failed(BaseException):
    """Carries an error past lmms-eval's `except Exception`."""


def manifests() -> list[Any]:
    """What lmms-eval registers: each model of `STOCK`, with "hiprune_" before its name."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(f"hiprune_{name}", chat_class_path=f"{__name__}.{stock.class_name}")
        for name, stock in STOCK.items()
    ]


def model_class(name: str) -> type:
    """The class that prunes, of a model of `STOCK`; lmms-eval must be there."""
    class_name = STOCK[name].class_name
    if class_name not in globals():
        stock = getattr(importlib.import_module(f"lmms_eval.models.chat.{name}"), class_name)
        globals()[class_name] = _pruning(stock, name)
    return globals()[class_name]


def __getattr__(attribute: str) -> type:
    for name, stock in STOCK.items():
        if stock.class_name == attribute:
            return model_class(name)
    raise AttributeError(f"module {__name__!r} has no attribute {attribute!r}")


def split_options(options: dict[str, Any]) -> tuple[Method | None, dict[str, Any]]:
    """A method and the remaining options, from what lmms-eval read of `--model_args`.

    Args:
        options: `method` (default: hiprune) by its name on the command line, `budget` or `retention`, and options of
            that method; roles with "+" between; `text_encoder` is a checkpoint. Without any of them nothing is pruned.

    Raises:
        ValueError, TypeError: for an unknown method, an option of another one, or a value that is out of range.

    Example:
        >>> split_options({"pretrained": "digits", "budget": 48})[1]
        {'pretrained': 'digits'}
    """
    name = options.get("method", "hiprune")
    if name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    own = options_of(METHODS[name])
    every = {option for cls in METHODS.values() for option in options_of(cls)}
    given = {option: value for option, value in options.items() if option in every}
    rest = {option: value for option, value in options.items() if option not in every and option != "method"}
    for option in given:
        if option not in own:
            raise ValueError(f"{option}: {name} has no such option; it has {', '.join(own)}")
    if not given and "method" not in options:
        return None, rest
    if isinstance(given.get("keep_roles"), str):
        given["keep_roles"] = tuple(given["keep_roles"].split("+"))
    if isinstance(given.get(_TEXT_ENCODER), str):
        from ..loading import load_clip_text

        given[_TEXT_ENCODER] = load_clip_text(given[_TEXT_ENCODER], options.get("pretrained"))
    return METHODS[name](**given), rest


def _pruning(stock: Any, name: str) -> type:
    class Pruning(stock):
        stays_loaded = False  # lmms-eval drops the model at the end of a run, unless this is set

        def __init__(self, **options: Any) -> None:
            method, rest = split_options(options)
            super().__init__(**rest)
            self.prune(method)

        def prune(self, method: Method | None) -> None:
            """Prune by this method from now on; None: not at all."""
            from ..patch import apply_method, is_patched, remove_method

            if method is not None:
                apply_method(self.model, method)
            elif is_patched(self.model):
                remove_method(self.model)

        def clean(self) -> None:
            if not self.stays_loaded:
                super().clean()

        def generate_until(self, requests: list[Any]) -> list[Any]:
            """As lmms-eval's, but an error ends the run."""
            with _errors_raised(self.model):
                return super().generate_until(requests)

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            from ..patch import is_patched

            if is_patched(self.model):
                raise ValueError(
                    "loglikelihood: expected tasks of output_type generate_until; a pruned model has no logits where "
                    "tokens were dropped, and lmms-eval counts them from the left"
                )
            return super().loglikelihood(requests)

    Pruning.__name__ = Pruning.__qualname__ = stock.__name__
    Pruning.__doc__ = f"lmms-eval's {name}, which prunes if `budget` or `retention` is given: see `split_options`."
    return Pruning


@contextlib.contextmanager
def _errors_raised(model: Any) -> Iterator[None]:
    """What goes wrong meanwhile in `model.generate`, or is only logged by lmms-eval, is raised at once."""
    from loguru import logger

    def log(message: Any) -> None:
        raise GenerationError(f"lmms-eval: {message.record['message']}")

    def is_of_models(record: Any) -> bool:
        return record["name"].startswith("lmms_eval.models.")

    before, generate = model.__dict__.get("generate"), model.generate

    def raising(*args: Any, **kwargs: Any) -> Any:
        try:
            return generate(*args, **kwargs)
        except Exception as error:
            raise _Failed from error

    model.generate = raising
    sink = logger.add(log, level="ERROR", filter=is_of_models, catch=False)
    try:
        yield
    except _Failed as failed:
        raise GenerationError(f"generate: {type(failed.__cause__).__name__}: {failed.__cause__}") from failed.__cause__
    finally:
        logger.remove(sink)
        if before is None:
            del model.generate
        else:
            model.generate = before
