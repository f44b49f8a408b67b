"""`hiprune compare IMAGE...`: what several methods keep of the same pictures, side by side, with overlaps and times.

Each method picks in a forward of the patched model, as in `hiprune prune`. Then the vision side is timed, in rounds: in
each round the model without a method, then each method, so that all meet the same machine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .cli_common import (
    DTYPES,
    PICTURES,
    aligned,
    check_writable,
    checked_device,
    has_random_weights,
    method_from,
    open_image,
    progress_bar,
    replacing,
)
from .cli_prune import Look, candidates_of, look_at, shapes_of
from .methods import METHODS, Method, options_of
from .visualize import draw_methods, optional_import

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import PreTrainedModel

    from .loading import LoadedModel

_DEFAULT = ("hiprune", "ptp", "visionzip", "fastervlm", "divprune", "cdpruner")


def add_arguments(compare: argparse.ArgumentParser) -> None:
    compare.add_argument("image", nargs="+", metavar="IMAGE", help="image files that pillow can read")
    compare.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="local directory or hub id of a checkpoint of a type in `hiprune info --models`; without it, "
        "CLIP-L/14-336 at its real size with random weights, so that the choice of tokens means nothing",
    )
    compare.add_argument(
        "--methods",
        metavar="NAMES",
        help=f"with commas in between, of {', '.join(METHODS)}; options behind colons, as in hiprune:alpha=0.2 "
        f"(default: those of {', '.join(_DEFAULT)} that the model allows)",
    )
    amount = compare.add_mutually_exclusive_group()
    amount.add_argument("--budget", type=int, metavar="N", help="tokens to keep (of each tile: InternVL)")
    amount.add_argument("--retention", type=float, metavar="R", help="share of the tokens to keep (default: 1/3)")
    compare.add_argument(
        "--question", metavar="TEXT", help="for methods that read the prompt's text (default: Describe the image.)"
    )
    compare.add_argument(
        "--text-encoder",
        metavar="DIR_OR_ID",
        help="CLIP checkpoint whose vision tower the model has, for all methods that take one",
    )
    compare.add_argument(
        "--rounds",
        type=int,
        default=5,
        metavar="N",
        help="times that each method is timed per image; 0: not at all (default: 5)",
    )
    compare.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    compare.add_argument("--device", default="cpu", help="as PyTorch writes it, e.g. cuda:0 (default: cpu)")
    compare.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    compare.add_argument("--seed", type=int, default=0, metavar="S", help="of the random weights used without --model")
    compare.add_argument(
        "--out",
        type=Path,
        metavar="PATH",
        help="picture to write, for several images the directory to write them into "
        "(default: IMAGE's stem + .compare.png)",
    )
    compare.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write everything as JSON (without FILE: print it); no pictures then, unless --out",
    )
    compare.set_defaults(run=compare_methods)


@dataclass(frozen=True)
class Entry:
    """A method in the comparison."""

    label: str
    method: Method


@dataclass
class Times:
    """Seconds of each round."""

    vision: list[float] = field(default_factory=list)  # from the inputs up to the language model, selection included
    selection: list[float] = field(default_factory=list)  # of it, the method's own `select` and `merge`


@dataclass(frozen=True)
class Compared:
    """What all methods made of one image."""

    path: str
    image: Image
    looks: list[Look]
    unpruned: Times
    times: list[Times]
    picture: Path | None

    def overlaps(self) -> list[list[float]]:
        """Intersection over union of the kept places, of each method with each."""
        kept = [set(look.indices.tolist()) for look in self.looks]
        return [[len(a & b) / len(a | b) for b in kept] for a in kept]


def compare_methods(args: argparse.Namespace) -> int:
    entries, pictures = _entries(args), _pictures(args)
    if args.rounds < 0:
        raise ValueError(f"rounds: expected at least 0, got {args.rounds}")
    if args.json not in (None, "-"):
        check_writable("json", Path(args.json), ())
    if len(args.image) == 1:
        open_image(args.image[0])  # rather now than after the model is loaded

    import torch

    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {args.threads}")
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        return _compare(args, entries, pictures)
    finally:
        torch.set_num_threads(threads)


def _compare(args: argparse.Namespace, entries: list[Entry], pictures: list[Path] | None) -> int:
    loaded, entries, left_out = _load(args, entries)
    report = sys.stderr if args.json == "-" else sys.stdout
    done: list[Compared] = []
    failed: dict[str, str] = {}
    steps = len(args.image) * (len(entries) * (1 + args.rounds) + args.rounds)
    with progress_bar(steps, "comparing") as step:
        for i, path in enumerate(args.image):
            try:
                found = _compared(loaded, entries, path, args, None if pictures is None else pictures[i], step)
            except (ValueError, OSError) as error:
                if len(args.image) == 1:
                    raise
                failed[path] = " ".join(str(error).split())
                print(f"hiprune compare: {path}: {failed[path]}", file=sys.stderr)
                continue
            if not done:  # not before something went well: one line is all that an error prints
                _print_head(loaded, left_out, args, report)
            done.append(found)
            if found.picture is not None:
                print(f"wrote {found.picture}", file=report)
    if done:
        _print_tables(entries, done, report)
    if args.json is not None:
        text = json.dumps(_as_json(loaded, entries, left_out, done, failed, args))
        if args.json == "-":
            print(text)
        else:
            with replacing(Path(args.json)) as beside:
                beside.write_text(text + "\n")
            print(f"wrote {args.json}", file=report)
    return 2 if failed else 0


# ------------------------------------------------------------------------------------------------- what is asked for


def _entries(args: argparse.Namespace) -> list[Entry]:
    """The methods that were asked for, or the default ones."""
    given: dict[str, Any] = {"retention": 1 / 3 if args.budget is None and args.retention is None else args.retention}
    given |= {"budget": args.budget}
    Method(**given)  # errors of the amount are of no method
    if args.text_encoder is not None:
        from .loading import load_clip_text

        given["text_encoder"] = load_clip_text(args.text_encoder, args.model)
    labels = list(_DEFAULT) if args.methods is None else [label.strip() for label in args.methods.split(",")]
    entries = [Entry(label, method_from(label, given)) for label in labels]
    for i, entry in enumerate(entries):
        for other in entries[:i]:
            if entry.method == other.method:
                same = f"{other.label} and {entry.label}" if entry.label != other.label else f"{entry.label} twice"
                raise ValueError(f"methods: expected each method once, got {same}")
    if args.text_encoder is not None and not any("text_encoder" in options_of(type(e.method)) for e in entries):
        raise ValueError(f"text-encoder: expected a method that takes one, got {args.methods}")
    return entries


def _pictures(args: argparse.Namespace) -> list[Path] | None:
    """Where each image's picture goes; None where none is wanted."""
    if args.json is not None and args.out is None:
        return None
    optional_import("matplotlib")  # rather now than after the work
    names = [f"{Path(path).stem}.compare.png" for path in args.image]
    if len(names) == 1:
        paths = [args.out or Path(names[0])]
        if paths[0].is_dir():
            paths = [paths[0] / names[0]]
    else:
        folder = args.out or Path()
        if not folder.is_dir():
            raise ValueError(f"out: expected a directory for the pictures of {len(names)} images, got {str(folder)!r}")
        for i, name in enumerate(names):
            if name in names[:i]:
                first = args.image[names.index(name)]
                raise ValueError(f"image: {first!r} and {args.image[i]!r} would both be drawn into {name!r}")
        paths = [folder / name for name in names]
    for path in paths:
        check_writable("out", path, PICTURES)
    return paths


def _load(args: argparse.Namespace, entries: list[Entry]) -> tuple[LoadedModel, list[Entry], dict[str, str]]:
    """The model, the methods that it serves, and why it does not serve others of the default ones."""
    import torch

    from . import loading

    device, dtype = checked_device(args.device), getattr(torch, args.dtype)
    methods = [entry.method for entry in entries]
    if has_random_weights(args):
        loaded = loading.load_encoder(dtype=dtype, device=device, seed=args.seed).up_to_features()
        reasons = [loading.refusal(loaded.model, method) for method in methods]
    else:
        reasons = loading.refusals(args.model, methods)
    left_out = {entry.label: reason for entry, reason in zip(entries, reasons) if reason}
    served = [entry for entry, reason in zip(entries, reasons) if not reason]
    if left_out and (args.methods is not None or not served):
        label, reason = next(iter(left_out.items()))
        raise ValueError(f"methods: {label}: {reason}")
    if not has_random_weights(args):
        loaded = loading.load_model(args.model, [entry.method for entry in served], dtype=dtype, device=device)
    if args.question is not None:
        from .processing import answers_text

        if not answers_text(loaded.processor):
            raise ValueError(f"question: {loaded.name} has no tokenizer to read it with")
    return loaded, [Entry(entry.label, loaded.fitted(entry.method)) for entry in served], left_out


# ------------------------------------------------------------------------------------------------ looking and timing


def _compared(
    loaded: LoadedModel,
    entries: Sequence[Entry],
    path: str,
    args: argparse.Namespace,
    picture: Path | None,
    step: Callable[[], None],
) -> Compared:
    from .processing import vision_inputs

    image = open_image(path)
    asked = {} if args.question is None else {"question": args.question}
    inputs = vision_inputs(loaded.model, loaded.processor, image, language=True, **asked)
    looks = []
    for entry in entries:
        try:
            looks.append(look_at(loaded, entry.method, image, inputs))
        except ValueError as error:
            raise ValueError(f"{entry.label}: {error}") from error
        step()
    unpruned, times = Times(), [Times() for _ in entries]
    if args.rounds:
        timed_forward(loaded.model, None, inputs, Times())  # the methods have warmed up
    for _ in range(args.rounds):
        timed_forward(loaded.model, None, inputs, unpruned)
        step()
        for entry, look, own in zip(entries, looks, times):
            timed_forward(loaded.model, entry.method, inputs, own, asked=look.seen is not None)
            step()
    found = Compared(path, image, looks, unpruned, times, picture)
    if picture is not None:
        drawn = _draw(loaded, entries, found)
        with replacing(picture) as beside:
            drawn.save(beside)
    return found


class _Reached(Exception):
    """Ends a forward: the language model's layers would begin."""


def timed_forward(
    model: PreTrainedModel,
    method: Method | None,
    inputs: dict[str, Any],
    times: Times,
    *,
    asked: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> None:
    """Time a forward up to the language model's first layer, where that begins; of a bare encoder, all of it.

    Args:
        model: stock; the method is applied, and taken off again, outside the time.
        method: None: none.
        inputs: of the model's forward.
        times: what this adds to.
        asked: whether the method will be asked to select, which it is not where nothing has to go.
        clock: in seconds.
    """
    import torch

    from .efficiency import clocked
    from .patch import applied
    from .processing import quiet_transformers

    spent: list[float] = []

    def now() -> float:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
        return clock()

    def reached(module: Any, arguments: Any) -> None:
        if (
            spent or method is None or not asked
        ):  # else the layer reads the whole prompt for the method, which is then asked
            raise _Reached

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        stack.enter_context(quiet_transformers())
        if method is not None:
            stack.enter_context(applied(model, clocked(method, spent, now)))
        layer = _first_layer(model)
        if layer is not None:
            stack.callback(layer.register_forward_pre_hook(reached).remove)
        begun = now()
        with contextlib.suppress(_Reached):
            model(**(inputs | {"use_cache": False} if "input_ids" in inputs else inputs))
        times.vision.append(now() - begun)
        times.selection.append(sum(spent))


def _first_layer(model: Any) -> Any:
    """Of the language model; None where there is none."""
    from .patch import FAMILIES

    if not hasattr(model.config, "text_config"):
        return None
    family = FAMILIES[model.config.model_type]
    language_model: Any = family.language_model(family.host(model))
    return language_model.layers[0]


# --------------------------------------------------------------------------------------------------------- reporting


def _print_head(loaded: LoadedModel, left_out: dict[str, str], args: argparse.Namespace, report: TextIO) -> None:
    print(f"{loaded.name}, {args.dtype} on {args.device}", file=report)
    for remark in loaded.remarks:
        print(f"note: {remark}", file=report)
    if loaded.random:
        print(
            "note: the weights are random, so the choice of tokens means nothing; --model takes real ones", file=report
        )
    for label, reason in left_out.items():
        print(f"note: {label} is left out: {reason}", file=report)


def _draw(loaded: LoadedModel, entries: Sequence[Entry], found: Compared) -> Image:
    from .processing import image_processor_of
    from .views import views_of

    first, image = found.looks[0], found.image
    size = image.height, image.width
    views = views_of(first.inputs, first.layout, loaded.model.config, image_processor_of(loaded.processor), size)
    selections, titles = [], ["what the model sees"]
    for entry, look in zip(entries, found.looks):
        selections.append((look.roles, look.method.roles, look.method.merged_roles))
        titles.append(f"{_title(entry)}: {len(look.indices)} of {candidates_of(look)} tokens")
    return draw_methods(views, selections, titles=titles, candidates=first.layout.candidates)


def _title(entry: Entry) -> str:
    """The class's name, with the options that were given."""
    _, *settings = entry.label.split(":")
    return " ".join([type(entry.method).__name__.replace("PlusPlus", "++"), *settings])


def _milliseconds(found: Sequence[Times]) -> tuple[float, float]:
    """Of images the means of the rounds' medians: the vision side, and the selection in it."""
    vision, selection = (
        statistics.mean(statistics.median(getattr(times, part)) for times in found) * 1e3
        for part in ("vision", "selection")
    )
    return vision, selection


def _mean_overlaps(done: Sequence[Compared]) -> list[list[float]]:
    every = [found.overlaps() for found in done]
    return [[statistics.mean(cells) for cells in zip(*rows)] for rows in zip(*every)]


def _print_tables(entries: Sequence[Entry], done: Sequence[Compared], report: TextIO) -> None:
    timed = bool(done[0].unpruned.vision)
    several = f"; means over {len(done)} images" if len(done) > 1 else ""
    tokens = [candidates_of(found.looks[0]) for found in done]
    head = ["method", "tokens", "of all"]
    rows = [["unpruned", f"{statistics.mean(tokens):.4g}", "1.00"]]
    if timed:
        head += ["vision ms", "of unpruned", "selection ms"]
        whole, _ = _milliseconds([found.unpruned for found in done])
        rows[0] += [f"{whole:.1f}", "1.00", ""]
    for i, entry in enumerate(entries):
        kept = [len(found.looks[i].indices) for found in done]
        share = statistics.mean(k / n for k, n in zip(kept, tokens))
        rows.append([entry.label, f"{statistics.mean(kept):.4g}", f"{share:.2f}"])
        if timed:
            vision, selection = _milliseconds([found.times[i] for found in done])
            rows[-1] += [f"{vision:.1f}", f"{vision / whole:.2f}", f"{selection:.2f}"]
    grids = dict.fromkeys(
        f"{len(look.layout.grids)} views of " * (len(look.layout.grids) > 1) + f"{shapes_of(look.layout)} tokens"
        for look in (found.looks[0] for found in done)
    )
    print(f"\n{'; '.join(grids)}{several}", file=report)
    aligned([head, *rows], report)
    if len(entries) > 1:
        print(f"\noverlap of the kept tokens, intersection over union{several}", file=report)
        labels = [entry.label for entry in entries]
        cells = [[f"{value:.2f}" for value in row] for row in _mean_overlaps(done)]
        aligned([["", *labels], *([label, *row] for label, row in zip(labels, cells))], report)
    for i, entry in enumerate(entries):
        for note in dict.fromkeys(found.looks[i].note for found in done if found.looks[i].note):
            print(f"note: {entry.label}: {note}", file=report)


def _as_json(
    loaded: LoadedModel,
    entries: Sequence[Entry],
    left_out: dict[str, str],
    done: Sequence[Compared],
    failed: dict[str, str],
    args: argparse.Namespace,
) -> dict[str, Any]:
    def timing(times: Sequence[Times]) -> dict[str, float]:
        if not args.rounds:
            return {}
        vision, selection = _milliseconds(times)
        return {"vision_ms": vision, "selection_ms": selection}

    def described(entry: Entry) -> dict[str, Any]:
        skipped = ("budget", "retention", "text_encoder")
        options = {name: getattr(entry.method, name) for name in options_of(type(entry.method)) if name not in skipped}
        name = next(name for name, cls in METHODS.items() if cls is type(entry.method))
        return {"label": entry.label, "method": name, "options": options, "role_names": entry.method.roles}

    images = []
    for found in done:
        methods = {
            entry.label: {
                "kept": len(look.indices),
                "indices": look.indices.tolist(),
                "roles": look.roles.tolist(),
                "note": look.note,
                **timing([times]),
            }
            for entry, look, times in zip(entries, found.looks, found.times)
        }
        images.append(
            {
                "image": found.path,
                "picture": None if found.picture is None else str(found.picture),
                "grids": found.looks[0].layout.grids,
                "tokens": candidates_of(found.looks[0]),
                "unpruned": timing([found.unpruned]),
                "methods": methods,
                "overlap": found.overlaps(),
            }
        )
    mean: dict[str, Any] = {}
    if done:
        mean = {
            "unpruned": timing([found.unpruned for found in done]),
            "methods": {entry.label: timing([x.times[i] for x in done]) for i, entry in enumerate(entries)},
            "overlap": _mean_overlaps(done),
        }
    return {
        "model": loaded.name,
        "random_weights": loaded.random,
        "dtype": args.dtype,
        "device": args.device,
        "question": args.question,
        "rounds": args.rounds,
        "budget": entries[0].method.budget,
        "retention": entries[0].method.retention,
        "methods": [described(entry) for entry in entries],
        "left_out": left_out,
        "images": images,
        "failed": failed,
        "mean": mean,
    }
