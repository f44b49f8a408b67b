"""What the commands share: options of methods, pictures from disk, how a method is watched."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .budget import CLUSTER_SIZES, ROLE_NAMES
from .methods import METHODS, HiPrune, Method, Picks, Seen, TokenLayout, options_of
from .visualize import optional_import, to_rgb

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

DTYPES = ("float32", "bfloat16", "float16")
RULES = ("paper", "official", "grid")  # "official" is the released code of the model's family
_AMOUNT = ("budget", "retention")
_SEED = "seed"  # also of random weights
_TEXT_ENCODER = "text_encoder"  # is loaded
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def layer_or_file(text: str) -> int | str:
    return int(text) if text.lstrip("-").isdecimal() else text


_DESCRIBED: dict[str, dict[str, Any]] = {  # option of some method -> what argparse is told of it
    "alpha": {"help": "share of anchors and buffers; PTP: weight of the instruction; HiRED: the thumbnail's share"},
    "object_layer": {
        "type": layer_or_file,
        "metavar": "L_OR_FILE",
        "help": "1-based layer that chooses the anchors, or the file of `hiprune calibrate`",
    },
    "rule": {"choices": RULES, "help": "rule of selection"},
    "neighborhood": {"choices": tuple(CLUSTER_SIZES), "help": "which neighbours of an anchor are buffers"},
    "score_queries": {"choices": ("all", "cls"), "help": "rows of attention that are summed into scores"},
    "text_budget": {"help": "share of the budget for tokens that are like the text"},
    "additive": {"help": "the tokens that are like the text come on top"},
    "text_encoder": {"metavar": "DIR_OR_ID", "help": "CLIP checkpoint whose vision tower the model has"},
    "saliency_layer": {"metavar": "L", "help": "1-based encoder layer of the tokens' saliency"},
    "region": {"choices": ("features", "attention"), "help": "what tiles are weighed by"},
    "region_layer": {"metavar": "L", "help": "1-based encoder layer of the tiles' features"},
    "temperature": {"help": "of the tiles' weights"},
    "instruction_layer": {"metavar": "L", "help": "1-based decoder layer of the text's attention"},
    "scale_instruction": {"help": "bring the text's attention to 0..1"},
    "contextual_share": {"help": "share of the budget for merged tokens"},
    "important_share": {"help": "share of the budget for important tokens"},
    "relevance_weight": {"help": "of relevance against diversity, below 1"},
    "layer": {"metavar": "L", "help": "1-based decoder layer whose attention counts"},
    "keep_roles": {"nargs": "+", "choices": ROLE_NAMES, "metavar": "ROLE", "help": "which roles are kept"},
}


# ------------------------------------------------------------------------------------------------- options of methods


def add_method_options(parser: argparse.ArgumentParser, *, seed_help: str, amount_needed: bool) -> None:
    """--method, --budget or --retention, and every option that a method of `METHODS` has."""
    group = parser.add_argument_group("method")
    group.add_argument("--method", choices=tuple(METHODS), default=_name_of(HiPrune), help="default: %(default)s")
    amount = group.add_mutually_exclusive_group(required=amount_needed)
    amount.add_argument("--budget", type=int, metavar="N", help="tokens to keep (of each tile: InternVL)")
    share = "share of the tokens to keep" + ("" if amount_needed else " (default: 1/3)")
    amount.add_argument("--retention", type=float, metavar="R", help=share)
    owners: dict[str, list[type[Method]]] = {}
    for cls in METHODS.values():
        for option in options_of(cls):
            if option not in (*_AMOUNT, _SEED):
                owners.setdefault(option, []).append(cls)
    for option, classes in owners.items():
        told = _type_of(classes[0], option) | _DESCRIBED.get(option, {"help": ""})
        defaults = {cls.__name__: _shown(options_of(cls)[option]) for cls in classes}
        if len(set(defaults.values())) == 1:
            names = f"{', '.join(defaults)}; default: {next(iter(defaults.values()))}"
        else:
            names = "; ".join(f"{name}: {default}" for name, default in defaults.items())
        told["help"] = f"{told['help']} ({names})".strip()
        group.add_argument(f"--{option.replace('_', '-')}", default=None, **told)
    group.add_argument("--seed", type=int, metavar="S", help=seed_help)


def _type_of(cls: type[Method], option: str) -> dict[str, Any]:
    """What argparse is told of an option's type, by the annotation of its field."""
    if "type" in _DESCRIBED.get(option, {}):
        return {"type": _DESCRIBED[option]["type"]}
    (field,) = (field for field in dataclasses.fields(cls) if field.name == option)
    kind = str(field.type).removesuffix(" | None")
    if kind == "bool":
        return {"action": argparse.BooleanOptionalAction}
    return {"type": {"int": int, "float": float}.get(kind, str)}


def method_of(args: argparse.Namespace) -> Method:
    """The method that was asked for.

    Raises:
        ValueError, TypeError: for an option of another method, or a value that is out of range.
    """
    cls = METHODS[args.method]
    own = options_of(cls)
    every = {option for each in METHODS.values() for option in options_of(each)}
    given = {option: getattr(args, option) for option in every if getattr(args, option, None) is not None}
    if args.seed is not None and _SEED not in own and has_random_weights(args):
        del given[_SEED]
    for option in given:
        if option not in own:
            flag = option.replace("_", "-")
            raise ValueError(f"{flag}: {cls.__name__} has no such option; it has {', '.join(own).replace('_', '-')}")
    if _TEXT_ENCODER in given:
        from .loading import load_clip_text

        given[_TEXT_ENCODER] = load_clip_text(given[_TEXT_ENCODER], args.model)
    if not any(option in given for option in _AMOUNT):
        given["retention"] = 1 / 3
    return cls(**given)


def method_from(text: str, given: dict[str, Any]) -> Method:
    """A method as `--methods` has it, NAME or NAME:OPTION=VALUE:OPTION=VALUE, with `given` options where it has them.

    Raises:
        ValueError: for an unknown name or option, or a value that is out of range.
    """
    name, *settings = text.split(":")
    if name not in METHODS:
        raise ValueError(f"methods: expected names among {', '.join(METHODS)}, got {name!r}")
    cls = METHODS[name]
    options: dict[str, Any] = {}
    own = [option for option in options_of(cls) if option not in (*_AMOUNT, _TEXT_ENCODER)]
    for setting in settings:
        option, equals, value = setting.partition("=")
        option = option.replace("-", "_")
        if not equals or option not in own:
            raise ValueError(
                f"methods: expected {name}:OPTION=VALUE with an option among {', '.join(own) or 'none'}, got {text!r}"
            )
        options[option] = _parsed(cls, option, value, text)
    options |= {option: value for option, value in given.items() if option in options_of(cls)}
    try:
        return cls(**options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"methods: {text}: {error}") from error


def _parsed(cls: type[Method], option: str, value: str, text: str) -> Any:
    if _DESCRIBED.get(option, {}).get("nargs"):
        return tuple(value.split("+"))
    kind = _type_of(cls, option).get("type", {"true": True, "false": False}.__getitem__)
    try:
        return kind(value)
    except (ValueError, KeyError) as error:
        wanted = kind.__name__ if isinstance(kind, type) else "true or false"
        raise ValueError(f"methods: {text}: {option}: expected {wanted}, got {value!r}") from error


def has_random_weights(args: argparse.Namespace) -> bool:
    """Whether no checkpoint was given, to a command that can do without."""
    return args.model is None


def _name_of(cls: type[Method]) -> str:
    return next(name for name, each in METHODS.items() if each is cls)


def _shown(default: Any) -> str:
    if default is None:
        return "the model's"
    return " ".join(map(str, default)) if isinstance(default, (list, tuple)) else str(default)


# ------------------------------------------------------------------------------------------------- watching a method


def watched(
    method: Method,
    then: Callable[[Seen, Picks], None] | None = None,
    whole: Callable[[TokenLayout], None] | None = None,
) -> Method:
    """The same method, which also refuses a budget above what an image has, and tells what it saw and picked.

    Args:
        method: of any class.
        then: called with what it saw, which must be finite, and what it picked.
        whole: called with the layout where every token stays, and the method is not asked.
    """
    cls: Any = type(method)

    class Watched(cls):
        def kept(self, layout: TokenLayout) -> list[int]:
            for tiles, tokens in layout.images():
                _check_budget(self.budget, tokens.stop - tokens.start, layout.grids[tiles])
            kept = super().kept(layout)
            if whole is not None and sum(kept) == sum(layout.sizes):
                whole(layout)
            return kept

        def select(self, seen: Seen) -> Picks:
            if then is None:  # nothing that takes time: somebody may be measuring
                return super().select(seen)
            _check_finite(seen)
            picks = super().select(seen)
            then(seen, picks)
            return picks

    Watched.__name__ = Watched.__qualname__ = cls.__name__  # errors name the method by its class
    return Watched(**{option: getattr(method, option) for option in options_of(cls)})


def _check_budget(budget: int | None, tokens: int, grids: tuple[tuple[int, ...], ...]) -> None:
    if budget is not None and budget > tokens:
        shapes = list(dict.fromkeys(" x ".join(map(str, grid)) for grid in grids))
        tiles = f"{len(grids)} tiles of " if len(grids) > 1 and len(shapes) == 1 else ""
        raise ValueError(f"budget: expected 1 to {tokens} ({tiles}{' and '.join(shapes)} tokens), got {budget}")


def _check_finite(seen: Seen) -> None:
    """Scores of a broken checkpoint would be picked from all the same."""
    read = {f"scores of layer {layer}": scores for layer, scores in seen.scores.items()}
    read |= {name: getattr(seen, name) for name in ("keys", "features", "regions", "text_scores")}
    for name, values in read.items():
        wrong = 0 if values is None else int((~values.isfinite()).sum())
        if wrong:
            raise ValueError(f"{name}: expected finite values, got {wrong} that are not; are the weights broken?")


# ------------------------------------------------------------------------------------- images, devices and progress


def check_writable(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Raise ValueError unless a file of this name can be written."""
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option}: expected a name that ends in {', '.join(suffixes)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no directory {str(path.parent)!r} to write {path.name!r} into")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option}: {str(path)!r} cannot be written")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place at the end: nothing half-written is ever there."""
    beside = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield beside
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def aligned(rows: Sequence[Sequence[str]], report: TextIO | None = None) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *cells in rows:
        line = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]
        print("  ".join(line).rstrip(), file=report)


@contextlib.contextmanager
def progress_bar(steps: int, text: str) -> Iterator[Callable[[], None]]:
    """A bar on a terminal's stderr, if rich is there to draw it; what it gives is called once a step."""
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ImportError:
        yield lambda: None
        return
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=steps)
        yield lambda: bar.advance(task)


@contextlib.contextmanager
def progress(text: str) -> Iterator[None]:
    """A line on a terminal's stderr, which goes away at the end."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"{text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def open_image(path: str) -> Image:
    """The picture in a file, upright and with 8 bits a channel."""
    pil, image_ops = optional_import("PIL.Image"), optional_import("PIL.ImageOps")
    if not os.path.isfile(path):
        raise ValueError(f"image: there is no file {path!r}")
    try:
        with pil.open(path) as image:
            _check_tiff(image)
            upright = image_ops.exif_transpose(image)
    except pil.UnidentifiedImageError as error:
        raise ValueError(f"image: {path!r} is not an image that pillow can read") from error
    except Exception as error:  # a damaged file can raise OSError, SyntaxError, struct.error, ...
        raise ValueError(f"image: {path!r} cannot be read: {error}") from error
    return to_rgb(upright)


def _check_tiff(image: Any) -> None:
    """Refuse grey TIFFs whose numbers pillow hands over without what they mean."""
    if image.format == "TIFF" and image.mode.startswith("I"):
        bits, sample_format, ink = image.tag_v2[258], image.tag_v2.get(339, (1,)), image.tag_v2[262]
        if (bits, sample_format, ink) != ((16,), (1,), 1):
            kind = "signed" if sample_format != (1,) else "unsigned"
            black = 0 if ink == 1 else "the largest value"
            raise ValueError(f"expected 16 unsigned bits with 0 for black, got {bits[0]} {kind} with {black} for black")


def checked_device(name: str) -> torch.device:
    """A device that can be used here."""
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here: {reason}") from error
    return device
