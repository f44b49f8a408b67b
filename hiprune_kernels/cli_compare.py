"""`hiprune compare IMAGE...`: what several methods keep of the same pictures, side by side, and what they cost."""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .cli_common import (
    DTYPES,
    add_method_options,
    as_subclass,
    check_directory,
    checked_device,
    has_random_weights,
    method_of,
    open_image,
    tracked,
)
from .cli_prune import Look, candidates_of, look_at, views_of_look
from .methods import METHODS, Method, options_of
from .visualize import draw_methods, optional_import

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from .loading import LoadedModel
    from .patch.edits import StockModule

DEFAULT = ("hiprune", "ptp", "visionzip", "fastervlm", "vispruner", "divprune", "cdpruner", "random")


def add_arguments(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("images", nargs="+", metavar="IMAGE", help="image files that pillow can read")
    compare.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="as of `hiprune prune`; without it, CLIP-L/14-336 at its real size with random weights",
    )
    compare.add_argument(
        "--methods",
        metavar="A,B",
        help=f"methods, of {', '.join(METHODS)}; options behind colons: hiprune:alpha=0.2:rule=official,ptp (default: "
        f"those of {', '.join(DEFAULT)} that the model can have)",
    )
    amount = compare.add_mutually_exclusive_group()
    amount.add_argument("--budget", type=int, metavar="N", help="tokens to keep (of each tile: InternVL)")
    amount.add_argument("--retention", type=float, metavar="R", help="share of the tokens to keep (default: 1/3)")
    compare.add_argument(
        "--text-encoder", metavar="DIR_OR_ID", help="CLIP checkpoint whose vision tower the model has (trim needs it)"
    )
    compare.add_argument("--question", metavar="TEXT", help='for methods that read it (default: "Describe the image.")')
    compare.add_argument("--repeats", type=int, default=5, metavar="N", help="timed runs of each (default: 5)")
    compare.add_argument("--seed", type=int, metavar="S", help="of random, and of random weights (default: 0)")
    compare.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    compare.add_argument("--device", default="cpu", help="as PyTorch writes it, e.g. cuda:0 (default: cpu)")
    compare.add_argument("--out", type=Path, metavar="DIR", help="for the pictures STEM.compare.png (default: .)")
    compare.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write everything as JSON (without FILE: print it); no pictures then, unless --out",
    )
    compare.set_defaults(run=compare_methods)


def compare_methods(args: argparse.Namespace) -> int:
    named, repeats = _methods(args), args.repeats
    if repeats < 1:
        raise ValueError(f"repeats: expected at least 1, got {repeats}")
    wants_pictures = args.json is None or args.out is not None
    folder = args.out or Path(".")
    if wants_pictures:
        optional_import("matplotlib")
        check_directory("out", folder)
    if args.json not in (None, "-"):
        check_directory("json", Path(args.json).parent)
    report = sys.stderr if args.json == "-" else sys.stdout
    images, broken = _opened(args.images)
    if not images:
        raise ValueError(f"images: expected at least one that can be read, got {len(broken)} that cannot")
    loaded, named = _loaded(args, named)

    compared = Compared(named)
    for path, image in tracked(list(images.items()), "comparing"):
        compared.add(loaded, path, image, args.question, repeats)

    _print(loaded, compared, args, report)
    if args.json is not None:
        text = json.dumps(compared.as_json(loaded, args) | {"unreadable": broken})
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n")
            print(f"wrote {args.json}", file=report)
    if wants_pictures:
        for path, name in zip(images, _names(list(images))):
            compared.drawn(loaded, path, images[path]).save(folder / name)
            print(f"wrote {folder / name}", file=report)
    return 2 if broken else 0


def _opened(paths: Sequence[str]) -> tuple[dict[str, Image], list[str]]:
    """The pictures, and which cannot be read: of these each has been reported."""
    opened = {path: _opened_or_none(path) for path in dict.fromkeys(paths)}
    return {path: image for path, image in opened.items() if image}, [path for path in opened if not opened[path]]


def _opened_or_none(path: str) -> Image | None:
    try:
        return open_image(path)
    except ValueError as error:
        print(f"hiprune compare: {error}", file=sys.stderr)
        return None


def _names(paths: Sequence[str]) -> list[str]:
    """File names of the pictures; those of images with the same stem are numbered."""
    stems, names = [Path(path).stem for path in paths], []
    for i, stem in enumerate(stems):
        number = f"-{1 + stems[:i].count(stem)}" if stems.count(stem) > 1 else ""
        names.append(f"{stem}{number}.compare.png")
    return names


# ------------------------------------------------------------------------------------------------------------- methods


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"methods: {message}")


def _methods(args: argparse.Namespace) -> dict[str, Method]:
    """What --methods asks for (or the default), by what they are called there.

    Raises:
        ValueError: if a method or an option of one is not known, or one is asked for twice.
    """
    texts = DEFAULT if args.methods is None else [text.strip() for text in args.methods.split(",")]
    parser = _Options(add_help=False, prog="methods")
    add_method_options(parser, seed_help="", amount_needed=False)
    found: dict[str, Method] = {}
    for text in texts:
        name, *options = text.split(":")
        if name not in METHODS:
            raise ValueError(f"methods: expected names among {', '.join(METHODS)}, got {name!r}")
        if text in found:
            raise ValueError(f"methods: expected each once, got {text!r} twice")
        known = options_of(METHODS[name])
        words = ["--method", name, *(word for option in options for word in _words(text, option))]
        common = {"budget": args.budget, "retention": args.retention, "text_encoder": args.text_encoder}
        common["seed"] = args.seed
        for option, value in common.items():
            if value is not None and option in known:
                words.append(f"--{option.replace('_', '-')}={value}")
        given = parser.parse_args(words)
        given.model = args.model
        found[text] = method_of(given)
    return found


def _words(text: str, option: str) -> Iterator[str]:
    """`alpha=0.2` as the command line's words."""
    name, mark, value = option.partition("=")
    if not mark:
        raise ValueError(f"methods: expected option=value behind a colon, got {option!r} in {text!r}")
    flag = name.replace("_", "-")
    if value in ("true", "false"):
        yield f"--{'no-' * (value == 'false')}{flag}"
    elif name == "keep_roles":
        yield from (f"--{flag}", *value.split("+"))
    else:
        yield f"--{flag}={value}"


def _loaded(args: argparse.Namespace, named: dict[str, Method]) -> tuple[LoadedModel, dict[str, Method]]:
    """The model, and the methods that it can have: if these were not asked for, others are left out, which is said."""
    import torch

    from . import loading

    device, dtype = checked_device(args.device), getattr(torch, args.dtype)
    if args.methods is None:
        refused = loading.refusals(args.model, list(named.values()))
        for name, reason in zip(list(named), refused):
            if reason is not None:
                print(f"note: without {name}, which this model cannot have: {reason}", file=sys.stderr)
                del named[name]
    methods = list(named.values())
    if has_random_weights(args):
        for reason in filter(None, loading.refusals(None, methods)):
            raise ValueError(f"methods: {reason}")
        return loading.load_encoder(dtype=dtype, device=device, seed=args.seed or 0).up_to_features(), named
    return loading.load_model(args.model, methods, dtype=dtype, device=device), named


# ---------------------------------------------------------------------------------------------------------- comparing


@dataclass
class Compared:
    """What methods keep of pictures, and how long they take.

    Attributes:
        methods: by name.
        looks: path of an image -> name -> what the method made of it.
        seconds: path of an image -> name -> medians: until the language model begins (of an encoder by itself: of its
            forward), and of that the selection. Of "" the model is not patched, and there is no selection.
    """

    methods: dict[str, Method]
    looks: dict[str, dict[str, Look]] = field(default_factory=dict)
    seconds: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)

    def add(self, loaded: LoadedModel, path: str, image: Image, question: str | None, repeats: int) -> None:
        looks = {name: look_at(loaded, method, image, question) for name, method in self.methods.items()}
        self.looks[path] = looks
        inputs = next(iter(looks.values())).inputs
        self.seconds[path] = measured(loaded.model, self.methods, inputs, repeats)

    def overlaps(self) -> list[list[float]]:
        """Intersection over union of the kept sets, method by method, the mean over the images."""
        table = [[0.0] * len(self.methods) for _ in self.methods]
        for looks in self.looks.values():
            kept = [set(look.indices.tolist()) for look in looks.values()]
            for i, a in enumerate(kept):
                for j, b in enumerate(kept):
                    table[i][j] += len(a & b) / len(a | b) / len(self.looks)
        return table

    def mean_seconds(self, name: str) -> tuple[float, float]:
        total, selection = zip(*(each[name] for each in self.seconds.values()))
        return statistics.mean(total), statistics.mean(selection)

    def tokens(self, name: str) -> tuple[float, float]:
        """Kept tokens, and how many there were, means over the images."""
        looks = [each[name] for each in self.looks.values()]
        return statistics.mean(len(x.indices) for x in looks), statistics.mean(map(candidates_of, looks))

    def notes(self, name: str) -> list[str]:
        found = [note for looks in self.looks.values() for note in looks[name].notes]
        return list(dict.fromkeys(filter(None, found)))

    def drawn(self, loaded: LoadedModel, path: str, image: Image) -> Image:
        looks = self.looks[path]
        first = next(iter(looks.values()))
        titles = ["what the model sees"]
        titles += [f"{name}: {len(look.indices)} of {candidates_of(look)}" for name, look in looks.items()]
        kept = [(look.roles, look.method.roles, look.method.merged_roles) for look in looks.values()]
        return draw_methods(
            views_of_look(loaded, first, image), kept, titles=titles, candidates=first.layout.candidates
        )

    def as_json(self, loaded: LoadedModel, args: argparse.Namespace) -> dict[str, Any]:
        stock = self.mean_seconds("")[0]
        methods = []
        for name, method in self.methods.items():
            seconds, selection = self.mean_seconds(name)
            options = {option: getattr(method, option) for option in options_of(type(method))}
            options.pop("text_encoder", None)
            kept, tokens = self.tokens(name)
            methods.append(
                {
                    "name": name,
                    "method": next(each for each, cls in METHODS.items() if cls is type(method)),
                    "options": options,
                    "kept": kept,
                    "tokens": tokens,
                    "seconds": seconds,
                    "ratio": seconds / stock,
                    "selection_seconds": selection,
                    "notes": self.notes(name),
                }
            )
        images = [
            {
                "image": path,
                "grids": looks[next(iter(looks))].layout.grids,
                "seconds": {name or "stock": total for name, (total, _) in self.seconds[path].items()},
                "methods": {
                    name: {"indices": look.indices.tolist(), "roles": look.roles.tolist()}
                    for name, look in looks.items()
                },
            }
            for path, looks in self.looks.items()
        ]
        return {
            "model": loaded.name,
            "random_weights": loaded.random,
            "dtype": args.dtype,
            "device": args.device,
            "stock_seconds": stock,
            "methods": methods,
            "iou": self.overlaps(),
            "images": images,
        }


# ------------------------------------------------------------------------------------------------------------- timing

_TIMED: contextvars.ContextVar[bool] = contextvars.ContextVar("timed", default=False)


class _Reached(Exception):
    """Ends a forward: the language model's layers begin."""


def measured(
    model: StockModule, methods: dict[str, Method], inputs: dict[str, Any], repeats: int
) -> dict[str, tuple[float, float]]:
    """Median seconds of each method, and of the model by itself under "": in all, and of that the selection.

    All take turns, and each has run once before. The clock stops where the language model's layers begin with the
    pruned prompt; of an encoder by itself, at the end of its forward.
    """
    import torch

    from .patch import applied

    device = model.device

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ("", *methods)}
    with _stopping_at_language_model(model):
        for turn in range(repeats + 1):
            for name, method in {"": None, **methods}.items():
                selecting: list[float] = []
                timed = contextlib.nullcontext() if method is None else applied(model, _timed(method, selecting, clock))
                with timed:
                    begun = clock()
                    _run(model, inputs)
                    total = clock() - begun
                if turn:  # before, it warms up
                    times[name].append((total, sum(selecting)))
    return {name: (_median(own, 0), _median(own, 1)) for name, own in times.items()}


def _median(pairs: list[tuple[float, float]], place: int) -> float:
    return statistics.median(pair[place] for pair in pairs)


def _timed(method: Method, selecting: list[float], clock: Callable[[], float]) -> Method:
    """The same method, which notes how long it selects and merges."""

    def timing(name: str) -> Callable[..., Any]:
        function = getattr(type(method), name)

        def timed(self: Method, *args: Any) -> Any:
            begun = clock()
            result = function(self, *args)
            selecting.append(clock() - begun)
            return result

        return timed

    names = ["select"] + ["merge"] * (type(method).merge is not Method.merge)
    return as_subclass(method, **{name: timing(name) for name in names})


def _run(model: StockModule, inputs: dict[str, Any]) -> None:
    import torch

    from .processing import quiet_transformers

    token = _TIMED.set(True)
    try:
        with torch.inference_mode(), quiet_transformers():
            model(**inputs, **({"use_cache": False} if "input_ids" in inputs else {}))
    except _Reached:
        pass
    finally:
        _TIMED.reset(token)


@contextlib.contextmanager
def _stopping_at_language_model(model: StockModule) -> Iterator[None]:
    """Forwards that `_run` begins end where the language model's layers begin; a run of a part of them does not."""
    from .patch import FAMILIES

    family = FAMILIES[model.config.model_type]
    language_model: Any = family.language_model(family.host(model))
    if language_model is None:
        yield
        return

    def reached(module: torch.nn.Module, args: Any) -> None:
        if _TIMED.get():  # not in the context of its own in which text attention is probed
            raise _Reached

    handle = language_model.layers[0].register_forward_pre_hook(reached)
    try:
        yield
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------------------ a table


def _print(loaded: LoadedModel, compared: Compared, args: argparse.Namespace, report: Any) -> None:
    count = len(compared.looks)
    print(f"{loaded.name}, {args.dtype} on {args.device}, {count} image{'s' * (count > 1)}", file=report)
    for remark in loaded.remarks:
        print(f"note: {remark}", file=report)
    if loaded.random:
        print("note: the weights are random, so the choice of tokens means nothing", file=report)
    stock = compared.mean_seconds("")[0]
    rows = [("method", "kept", "of", "ms", "of stock's", "selection ms")]
    rows.append(("(not pruned)", "", "", f"{1e3 * stock:.1f}", "1.00", ""))
    for name in compared.methods:
        seconds, selection = compared.mean_seconds(name)
        kept, tokens = (f"{value:.4g}" for value in compared.tokens(name))
        rows.append((name, kept, tokens, f"{1e3 * seconds:.1f}", f"{seconds / stock:.2f}", f"{1e3 * selection:.2f}"))
    _aligned(rows, report)
    print("ms: until the language model begins, or of the encoder by itself; medians, taking turns", file=report)
    if len(compared.methods) > 1:
        print("\noverlap of what is kept (intersection over union)", file=report)
        names = list(compared.methods)
        table = [("", *names)]
        table += [(name, *(f"{x:.2f}" for x in row)) for name, row in zip(names, compared.overlaps())]
        _aligned(table, report)
    for name in compared.methods:
        for note in compared.notes(name):
            print(f"note: {name}: {note}", file=report)


def _aligned(rows: Sequence[Sequence[str]], report: Any) -> None:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *cells in rows:
        line = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]
        print("  " + "  ".join(line).rstrip(), file=report)
