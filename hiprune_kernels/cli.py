"""The `hiprune` command: `info`, `check`, `prune IMAGE`, `demo`.

Exit codes: 0 done, 1 an error nobody foresaw, 2 wrong input, 3 `check` found something wrong, 130 interrupted. Errors
are one line on stderr; `--debug` shows the traceback instead. What takes long to import is imported by the command that
needs it.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from . import __version__
from .budget import CLUSTER_SIZES, ROLE_NAMES, check_selection_options, resolve_budget
from .visualize import draw_overview, optional_import, to_rgb

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from .loading import Tower

DTYPES = ("float32", "bfloat16", "float16")
RULES = ("paper", "official", "grid")  # "official" is the released code of the model's family


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hiprune", description="HiPrune visual-token pruning: kernels, pictures, a demonstration.")
    parser.add_argument("--version", action="version", version=f"hiprune-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,check,prune,demo}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    model_help = (
        "local directory or hub id of a checkpoint with a {} vision tower: the tower itself, or LLaVA-1.5, -NeXT or "
        "-OneVision; without it, CLIP-L/14-336 at its real size with random weights, so that the choice of tokens "
        "means nothing"
    )

    info = commands.add_parser("info", parents=[common], help="versions, devices, active kernels; supported models")
    info.add_argument("--models", action="store_true", help="rather: the models and encoders that are supported")
    form = info.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--markdown", action="store_true", help="with --models: print Markdown tables")
    info.set_defaults(run=_info)

    check = commands.add_parser(
        "check", parents=[common], help="whether patched models are right under the installed transformers"
    )
    check.add_argument("model_types", nargs="*", metavar="MODEL_TYPE", help="as in info --models (default: all)")
    check.set_defaults(run=_check)

    prune = commands.add_parser("prune", parents=[common], help="choose an image's tokens and draw them")
    prune.add_argument(
        "image",
        metavar="IMAGE",
        help="an image file that pillow can read; 16 bits a channel become 8, what is transparent becomes white",
    )
    prune.add_argument("--model", metavar="DIR_OR_ID", help=model_help.format("CLIP or SigLIP"))
    amount = prune.add_mutually_exclusive_group()
    amount.add_argument("--budget", type=int, metavar="N", help="tokens to keep")
    amount.add_argument("--retention", type=float, metavar="R", help="share of the tokens to keep (default: 1/3)")
    prune.add_argument("--alpha", type=float, default=0.1, help="share of anchors and buffers (default: 0.1)")
    prune.add_argument("--object-layer", type=int, metavar="L", help="1-based (default: the family's; CLIP-L: 9)")
    prune.add_argument("--rule", choices=RULES, default="paper", help="default: paper")
    prune.add_argument("--neighborhood", choices=tuple(CLUSTER_SIZES), default="cross", help="default: cross")
    prune.add_argument(
        "--score-queries", choices=("all", "cls"), default="all", help="rows that are summed into scores (default: all)"
    )
    prune.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    prune.add_argument("--device", default="cpu", help="as PyTorch writes it, e.g. cuda:0 (default: cpu)")
    prune.add_argument("--seed", type=int, default=0, help="of the random weights used without --model (default: 0)")
    prune.add_argument(
        "--out", type=Path, metavar="PNG", help="picture to write (default: IMAGE's stem + .hiprune.png)"
    )
    prune.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write indices, roles and settings as JSON (without FILE: print them); no picture then, unless --out",
    )
    prune.set_defaults(run=_prune)

    demo = commands.add_parser("demo", parents=[common], help="measure and draw HiPrune on real photographs")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: out/demo")
    demo.add_argument("--quick", action="store_true", help="one photograph, fewer repetitions")
    demo.add_argument("--model", metavar="DIR_OR_ID", help=model_help.format("CLIP"))
    demo.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    demo.set_defaults(run=_demo)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: the process's) and return the exit code; `--help` and usage errors exit."""
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe went away; Python would complain again while it closes stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if args.debug:
            raise
        message = " ".join(str(error).split())
        if isinstance(error, (ValueError, TypeError, OSError, ImportError)):
            print(f"hiprune {args.command}: {message}", file=sys.stderr)
            return 2
        name = type(error).__name__
        print(f"hiprune {args.command}: unexpected {name}: {message} (--debug shows where)", file=sys.stderr)
        return 1
    return code


# ---------------------------------------------------------------------------------------------------------------- info


def _info(args: argparse.Namespace) -> None:
    from .environment import environment

    if args.models:
        _info_models(args)
        return
    if args.markdown:
        raise ValueError("markdown: only the tables of --models have this form")
    found = environment()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    print("versions")
    for name, version in found["versions"].items():
        print(f"  {name:<16} {version}")
    print(f"devices ({found['platform']})")
    for device in found["devices"]:
        print(f"  {device}")
    print("kernels")
    for kernel in found["kernels"]:
        reason = f"  ({kernel['reason']})" if kernel["reason"] else ""
        print(f"  {kernel['device']:<6} {kernel['operators']:<10} {kernel['implementation']}{reason}")


def _info_models(args: argparse.Namespace) -> None:
    from .environment import supported_models

    found = supported_models()
    if args.json:
        print(json.dumps(found, indent=2))
        return
    models = [("model", "model type", "budget per", "object layer", "feature layer", "notes")]
    for row in found["models"]:
        layers = (f"{row[name]} of {row['layers']}" for name in ("object_layer", "feature_layer"))
        models.append((row["name"], row["model_type"], row["budget_per"], *layers, row["notes"]))
    encoders = [("encoder", "model type", "prefix tokens", "object layer", "notes")]
    for row in found["encoders"]:
        share = f"{row['object_share']:.3g} of the depth"
        encoders.append((row["name"], row["model_type"], str(row["prefix_tokens"]), share, row["notes"]))
    titles = (
        "Models for `apply_hiprune`; layers as in transformers' default configuration of the type:",
        "Vision encoders for `record_scores`, alone or inside a model:",
    )
    for i, (title, table) in enumerate(zip(titles, (models, encoders))):
        lines = _markdown(table) if args.markdown else _aligned(table)
        print(f"{chr(10) * (i > 0)}{title}{chr(10) * args.markdown}", *lines, sep="\n")


def _markdown(table: Sequence[Sequence[str]]) -> list[str]:
    rows = [f"| {' | '.join(row)} |" for row in table]
    return [rows[0], "|" + "---|" * len(table[0]), *rows[1:]]


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The notes, the last column, stand below their row, since they may be long."""
    cells = [row[:-1] for row in table]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for row, (*_, notes) in zip(cells, table):
        lines.append("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        if row is not cells[0]:
            lines += textwrap.wrap(notes, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return lines


# --------------------------------------------------------------------------------------------------------------- check


def _check(args: argparse.Namespace) -> int:
    import transformers

    from .patch import FAMILIES
    from .patch.selfcheck import check_model

    for model_type in args.model_types:
        if model_type not in FAMILIES:
            raise ValueError(f"model_type: expected one of {', '.join(FAMILIES)}, got {model_type!r}")
    model_types, wrong = args.model_types or list(FAMILIES), 0
    print(f"tiny random models, patched, against stock code of transformers {transformers.__version__}")
    for model_type in _with_progress(model_types):
        started = time.perf_counter()
        verdict = check_model(model_type)
        seconds = time.perf_counter() - started
        wrong += not verdict.right
        print(f"  {model_type:<24} {verdict.difference or 'right'}  ({seconds:.1f} s)", flush=True)
    print(f"{len(model_types) - wrong} of {len(model_types)} right")
    return 3 if wrong else 0


def _with_progress(items: Sequence[str]) -> Iterator[str]:
    """The items, with a bar over them on a terminal, if rich is there to draw it."""
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return iter(items)
    console = Console()
    return iter(track(items, "checking", console=console, transient=True, disable=not console.is_terminal))


# --------------------------------------------------------------------------------------------------------------- prune


def _open_image(path: str) -> Image:
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


def _check_tiff(image: Image) -> None:
    """Refuse grey TIFFs whose numbers pillow hands over without what they mean."""
    if image.format == "TIFF" and image.mode.startswith("I"):
        bits, sample_format, ink = image.tag_v2[258], image.tag_v2.get(339, (1,)), image.tag_v2[262]
        if (bits, sample_format, ink) != ((16,), (1,), 1):
            kind = "signed" if sample_format != (1,) else "unsigned"
            black = 0 if ink == 1 else "the largest value"
            raise ValueError(f"expected 16 unsigned bits with 0 for black, got {bits[0]} {kind} with {black} for black")


def _checked_device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).splitlines()[0]
        raise ValueError(f"device: {name!r} cannot be used here: {reason}") from error
    return device


def _checked_budget(args: argparse.Namespace, grid: tuple[int, int]) -> int:
    num_tokens = grid[0] * grid[1]
    if args.budget is not None and not 1 <= args.budget <= num_tokens:
        raise ValueError(f"budget: expected 1 to {num_tokens} ({grid[0]} x {grid[1]} tokens), got {args.budget}")
    retention = 1 / 3 if args.budget is None and args.retention is None else args.retention
    return resolve_budget(num_tokens, budget=args.budget, retention=retention)


def _check_writable(option: str, path: Path, suffixes: Sequence[str]) -> None:
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option}: expected a name that ends in {', '.join(suffixes)}, got {str(path)!r}")
    if not path.parent.is_dir():
        raise ValueError(f"{option}: there is no directory {str(path.parent)!r} to write {path.name!r} into")


def _scores(
    tower: Tower, pixel_values: torch.Tensor, layers: Sequence[int], score_queries: str
) -> dict[int, torch.Tensor]:
    """Column scores [1, prefix + N] of each layer."""
    import torch

    from .loading import queries_and_keys
    from .ops import attention_scores
    from .patch import record_scores

    with torch.inference_mode():
        if score_queries == "cls":
            heads = queries_and_keys(tower.encoder, pixel_values, layers)
            return {layer: attention_scores(query[:, :, :1], key) for layer, (query, key) in heads.items()}
        with record_scores(tower.encoder, layers=layers) as scores:
            tower.encoder(pixel_values)
        return {layer: recorded[0] for layer, recorded in scores.items()}


def _prune(args: argparse.Namespace) -> None:
    image = _open_image(args.image)
    wants_picture = args.json is None or args.out is not None
    picture = args.out or Path(f"{Path(args.image).stem}.hiprune.png")
    if wants_picture:
        optional_import("matplotlib")  # rather now than after the work
        _check_writable("out", picture, (".png", ".jpg", ".jpeg", ".webp"))
    if args.json not in (None, "-"):
        _check_writable("json", Path(args.json), ())
    check_selection_options(args.alpha, args.rule, args.neighborhood, ROLE_NAMES)

    import torch

    from .loading import TOWERS, load_tower
    from .ops import check_inputs, select_tokens

    device = _checked_device(args.device)
    dtype = getattr(torch, args.dtype)
    tower = load_tower(args.model, dtype=dtype, device=device, seed=args.seed, kinds=tuple(TOWERS))
    budget = _checked_budget(args, tower.grid)
    object_layer = tower.object_layer if args.object_layer is None else args.object_layer
    if not 1 <= object_layer <= tower.deep_layer:
        raise ValueError(f"object-layer: expected 1 to {tower.deep_layer}, the deep layer, got {object_layer}")

    prefix = tower.num_prefix_tokens
    if args.score_queries == "cls" and prefix == 0:
        raise ValueError(f"score-queries: expected all, as {tower.name} has no CLS token, got cls")

    pixels = tower.pixel_values(image)
    scores = _scores(tower, pixels, sorted({object_layer, tower.deep_layer}), args.score_queries)
    object_scores, deep_scores = scores[object_layer], scores[tower.deep_layer]
    check_inputs(object_scores=object_scores, deep_scores=deep_scores)
    # LLaVA's released code takes means over the queries where Eq. 2 has sums; its rule then takes 1 off kept tokens.
    divisor = object_scores.shape[1] if args.rule == "official" else 1
    indices, roles = select_tokens(
        object_scores / divisor,
        deep_scores / divisor,
        budget=budget,
        alpha=args.alpha,
        grid=tower.grid,
        rule=args.rule,
        neighborhood=args.neighborhood,
        num_prefix_tokens=prefix,
    )

    report = sys.stderr if args.json == "-" else sys.stdout
    _print_summary(tower, roles[0], object_layer, args, report)
    if args.json is not None:
        result = {
            "image": args.image,
            "model": tower.name,
            "random_weights": tower.random,
            "dtype": args.dtype,
            "device": str(device),
            "grid": tower.grid,
            "budget": budget,
            "alpha": args.alpha,
            "rule": args.rule,
            "neighborhood": args.neighborhood,
            "score_queries": args.score_queries,
            "object_layer": object_layer,
            "deep_layer": tower.deep_layer,
            "indices": indices[0].tolist(),
            "roles": roles[0].tolist(),
        }
        if args.json == "-":
            print(json.dumps(result))
        else:
            Path(args.json).write_text(json.dumps(result) + "\n")
            print(f"wrote {args.json}", file=report)
    if wants_picture:
        maps = (object_scores[0, prefix:], deep_scores[0, prefix:])
        seen, titles = tower.seen_image(pixels), tower.overview_titles(object_layer, budget)
        draw_overview(seen, *maps, roles[0], tower.grid, titles=titles).save(picture)
        print(f"wrote {picture}", file=report)


def _print_summary(
    tower: Tower, roles: torch.Tensor, object_layer: int, args: argparse.Namespace, report: TextIO
) -> None:
    dropped, anchors, buffers, registers = roles.long().bincount(minlength=4).tolist()
    print(f"{tower.name}, {args.dtype} on {args.device}", file=report)
    for remark in tower.remarks:
        print(f"note: {remark}", file=report)
    if tower.random:
        print(
            "note: the weights are random, so the choice of tokens means nothing; --model takes real ones", file=report
        )
    kept, total = len(roles) - dropped, len(roles)
    print(
        f"{kept} of {total} tokens kept: {anchors} anchors (layer {object_layer}), {buffers} buffers, "
        f"{registers} registers (layer {tower.deep_layer})",
        file=report,
    )


# ---------------------------------------------------------------------------------------------------------------- demo


def _demo(args: argparse.Namespace) -> None:
    if args.threads is not None and args.threads < 1:
        raise ValueError(f"threads: expected at least 1, got {args.threads}")

    from .demo import print_report, run_demo

    flags = f"{' --quick' * args.quick}{f' --model {shlex.quote(args.model)}' if args.model else ''}"
    flags += f" --threads {args.threads}" if args.threads else ""
    command = f"hiprune demo --out {shlex.quote(str(args.out))}{flags}"
    report = run_demo(args.out, quick=args.quick, model=args.model, threads=args.threads, command=command)
    print_report(report, args.out)
