"""`hiprune quality`: how many answers of a small trained LLaVA stay right, by method and number of tokens."""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .cli_common import aligned, check_writable, method_from, progress_bar, replacing
from .methods import METHODS
from .visualize import optional_import

if TYPE_CHECKING:
    from collections.abc import Callable

    from .methods import Method
    from .quality import Answers

DEFAULT = tuple(name for name in METHODS if name != "trim")  # which needs a CLIP's text tower
BUDGETS = (48, 32, 16, 8)
TOKENS = 144
_COLORS = [f"C{i}" for i in (0, 1, 2, 3, 4, 5, 6, 8, 9)] + ["black", "navy", "olive", "teal"]


def add_arguments(quality: argparse.ArgumentParser) -> None:
    quality.add_argument(
        "--methods",
        metavar="NAMES",
        default=",".join(DEFAULT),
        help=f"with commas in between, of {', '.join(DEFAULT)}; options behind colons, as in hiprune:alpha=0.2 "
        "(default: all)",
    )
    default = ",".join(map(str, BUDGETS))
    quality.add_argument("--budgets", default=default, metavar="N,M", help="tokens kept of 144 (default: %(default)s)")
    quality.add_argument("--scenes", type=int, default=30, metavar="S", help="nine questions each (default: 30)")
    quality.add_argument("--seed", type=int, default=0, help="of the scenes (default: 0)")
    quality.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    quality.add_argument("--out", type=Path, metavar="DIR", help="write quality.png and quality.json there")
    quality.add_argument("--json", action="store_true", help="print JSON rather than tables")
    quality.set_defaults(run=measure_quality)


def measure_quality(args: argparse.Namespace) -> None:
    budgets = _budgets(args.budgets)
    for name, least in (("scenes", 2), ("seed", 0), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    methods = _methods(args.methods, budgets)
    optional_import("sklearn.datasets", "quality")
    if args.out is not None:
        optional_import("matplotlib")
        for name in ("quality.png", "quality.json"):
            check_writable("out", args.out / name, ())

    import torch

    from .quality import compare, scenes_of

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    scenes, begun = scenes_of(args.scenes, args.seed), time.perf_counter()
    with progress_bar(args.scenes * (1 + len(methods) * len(budgets)), "answering") as step:
        found = compare(methods, budgets, scenes, step)
    result = _as_json(found, args) | {"seconds": time.perf_counter() - begun}
    if args.json:
        print(json.dumps(result))
    else:
        _print(found, args)
    if args.out is not None:
        with replacing(args.out / "quality.json") as beside:
            beside.write_text(json.dumps(result, indent=1) + "\n")
        with replacing(args.out / "quality.png") as beside:
            draw(found).savefig(beside, dpi=110)
        print(f"wrote {args.out / 'quality.png'} and quality.json", file=sys.stderr if args.json else sys.stdout)


def _budgets(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and 1 <= int(part) <= TOKENS for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"budgets: expected different numbers from 1 to {TOKENS} with commas between, got {text!r}")
    return sorted(map(int, parts), reverse=True)


def _methods(text: str, budgets: list[int]) -> dict[str, Callable[[int], Method]]:
    """By label, what makes a method with a budget.

    Raises:
        ValueError: for a method or option that is not known, or a label that comes twice.
    """
    labels = [label.strip() for label in text.split(",")]
    for label in labels:
        method_from(label, {"budget": budgets[0]})
        if labels.count(label) > 1:
            raise ValueError(f"methods: expected each method once, got {label} twice")
    return {label: functools.partial(_with_budget, label) for label in labels}


def _with_budget(label: str, budget: int) -> Method:
    return method_from(label, {"budget": budget})


def _print(found: dict[str, dict[int, Answers]], args: argparse.Namespace) -> None:
    ((tokens, whole),) = found[""].items()
    accuracy, error = whole.accuracy
    budgets = list(next(iter(others.values()))) if (others := {k: v for k, v in found.items() if k}) else []
    questions = whole.right.size
    print(f"a LLaVA of 1M parameters, {args.scenes} scenes (seed {args.seed}), {questions} questions, right in percent")
    print(f"all {tokens} tokens: {100 * accuracy:.1f} +- {100 * error:.1f}\n")
    shares = [f"{budget} ({100 * budget / tokens:.0f}%)" for budget in budgets]
    rows = [("method", *shares)]
    for name, each in others.items():
        pairs = (answers.accuracy for answers in each.values())
        rows.append((name, *(f"{100 * mean:.1f} +- {100 * error:.1f}" for mean, error in pairs)))
    aligned(rows)
    print("\nof the kept tokens on digits, in percent")
    rows = [("method", *shares)]
    rows += [(name, *(f"{100 * _share(answers):.0f}" for answers in each.values())) for name, each in others.items()]
    aligned(rows)
    print(
        "\n+- is one standard error. This shows whether pruning works, not how methods rank on photographs: between "
        "trainings\nof this model their order changes."
    )


def _share(answers: Answers) -> float:
    return math.nan if answers.share_on_digits is None else float(answers.share_on_digits.mean())


def _as_json(found: dict[str, dict[int, Answers]], args: argparse.Namespace) -> dict[str, Any]:
    rows = []
    for name, each in found.items():
        for budget, answers in each.items():
            mean, error = answers.accuracy
            row = {"method": name or None, "tokens": budget, "accuracy": mean, "standard_error": error}
            if answers.share_on_digits is not None:
                row["share_on_digits"] = _share(answers)
            rows.append(row | {"by_question": answers.right.mean(axis=0).tolist()})
    from .quality.scenes import QUESTIONS

    return {"scenes": args.scenes, "seed": args.seed, "questions": QUESTIONS, "results": rows}


def draw(found: dict[str, dict[int, Answers]]) -> Any:
    """A figure: accuracy against the number of tokens, and the share of kept tokens on digits."""
    optional_import("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    ((tokens, whole),) = found[""].items()
    accuracy, _ = whole.accuracy
    left.axhline(100 * accuracy, color="black", linewidth=1, linestyle=":", label=f"all {tokens} tokens")
    baselines = ("random", "uniform-grid")
    for i, (name, each) in enumerate(pair for pair in found.items() if pair[0]):
        style = {"color": "gray", "linestyle": "--"} if name in baselines else {"color": _COLORS[i % len(_COLORS)]}
        marker = "osD^vP*Xdh<>"[i % 12]
        means, errors = np.array([answers.accuracy for answers in each.values()]).T * 100
        left.errorbar(list(each), means, errors, capsize=2, marker=marker, label=name, **style)
        right.plot(list(each), [100 * _share(answers) for answers in each.values()], marker=marker, **style)
    for axes, title in ((left, "right answers, %"), (right, "kept tokens that are on digits, %")):
        axes.set_xscale("log")
        ticks = sorted({budget for name, each in found.items() if name for budget in each})
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.set_xlabel(f"tokens kept, of {tokens}")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure
