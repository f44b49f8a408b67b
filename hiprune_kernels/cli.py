"""The `hiprune` command: `info`, `check`, `prune IMAGE`, `compare IMAGE...`, `run IMAGE QUESTION`,
`bench`, `analyze IMAGES...`, `calibrate IMAGES...`, `quality`, `eval`, `demo`.

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
from typing import NoReturn

from . import __version__, cli_analyze, cli_bench, cli_compare, cli_eval, cli_prune, cli_quality, cli_run


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hiprune", description="Visual-token pruning: answers, pictures, kernels, a demonstration.")
    parser.add_argument("--version", action="version", version=f"hiprune-kernels {__version__}")
    names = "{info,check,prune,compare,run,bench,analyze,calibrate,quality,eval,demo}"
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    common = _Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
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
    cli_prune.add_arguments(prune)
    compare = commands.add_parser("compare", parents=[common], help="what several methods keep, side by side")
    cli_compare.add_arguments(compare)
    run = commands.add_parser(
        "run", parents=[common], help="answer a question about an image from a part of its tokens"
    )
    cli_run.add_arguments(run)

    bench = commands.add_parser("bench", parents=[common], help="what pruning saves in a model, part by part")
    cli_bench.add_arguments(bench)
    analyze = commands.add_parser(
        "analyze", parents=[common], help="what the layers of a vision encoder attend to: pictures and a report"
    )
    cli_analyze.add_analyze_arguments(analyze)
    calibrate = commands.add_parser(
        "calibrate", parents=[common], help="propose an object layer for a vision encoder, from images alone"
    )
    cli_analyze.add_calibrate_arguments(calibrate)
    quality = commands.add_parser(
        "quality", parents=[common], help="right answers of a small trained LLaVA, by method and number of tokens"
    )
    cli_quality.add_arguments(quality)
    evaluate = commands.add_parser("eval", parents=[common], help="benchmarks by lmms-eval, beside the paper's figures")
    cli_eval.add_arguments(evaluate)

    demo = commands.add_parser("demo", parents=[common], help="measure and draw HiPrune on real photographs")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="default: out/demo")
    demo.add_argument("--quick", action="store_true", help="one photograph, fewer repetitions")
    demo.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help=(
            "local directory or hub id of a checkpoint with a CLIP vision encoder: the encoder itself, or LLaVA-1.5, "
            "-NeXT or -OneVision; without it, CLIP-L/14-336 at its real size with random weights"
        ),
    )
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
    models: list[tuple[str, ...]] = [("model", "model type", "budget per", "object layer", "feature layer", "notes")]
    for row in found["models"]:
        layers = (f"{row[name]} of {row['layers']}" for name in ("object_layer", "feature_layer"))
        models.append((row["name"], row["model_type"], row["budget_per"], *layers, row["notes"]))
    encoders: list[tuple[str, ...]] = [("encoder", "model type", "prefix tokens", "object layer", "notes")]
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
