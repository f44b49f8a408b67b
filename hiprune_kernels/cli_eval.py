"""`hiprune eval`: benchmarks by lmms-eval, the whole model first, then each method with each number of tokens.

The model is loaded once. What lmms-eval reports is printed in the form of the HiPrune paper's tables, for the paper's
models beside the paper's figures.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .cli_common import DTYPES, aligned, check_writable, checked_device, method_from, progress, replacing
from .evaluation import paper
from .evaluation.models import STOCK, GenerationError, model_class
from .methods import METHODS, Method

_INSTALL = "pip install 'hiprune-kernels[eval]'"
_WHOLE = "all tokens"


def add_arguments(evaluate: argparse.ArgumentParser) -> None:
    types = ", ".join(model_type for stock in STOCK.values() for model_type in stock.model_types)
    evaluate.add_argument(
        "--model", required=True, metavar="DIR_OR_ID", help=f"checkpoint of type {types}; or digits, the small LLaVA"
    )
    evaluate.add_argument("--tasks", required=True, metavar="NAMES", help="of lmms-eval, with commas in between")
    evaluate.add_argument(
        "--methods",
        metavar="NAMES",
        default="hiprune",
        help=f"with commas in between, of {', '.join(METHODS)}; options behind colons, as in hiprune:alpha=0.2 "
        "(default: hiprune)",
    )
    amount = evaluate.add_mutually_exclusive_group(required=True)
    amount.add_argument("--budgets", metavar="N,M", help="tokens to keep (of each tile: InternVL), as in 192,128,64")
    amount.add_argument("--retentions", metavar="R,S", help="shares of the tokens to keep, as in 0.333,0.222,0.111")
    evaluate.add_argument("--text-encoder", metavar="DIR_OR_ID", help="CLIP checkpoint, for the methods that take one")
    evaluate.add_argument("--limit", type=int, metavar="N", help="questions of each task (default: all)")
    evaluate.add_argument("--include-path", type=Path, metavar="DIR", help="of tasks of your own (YAML files)")
    evaluate.add_argument("--batch-size", type=int, default=1, metavar="N", help="questions at once (default: 1)")
    evaluate.add_argument("--device", default="cpu", help="as PyTorch writes it, e.g. cuda:0 (default: cpu)")
    evaluate.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's)")
    evaluate.add_argument(
        "--paper",
        choices=tuple(table.model for table in paper.TABLES),
        help="whose figures to print beside (default: by the name of the checkpoint)",
    )
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="write eval.json there, with all that lmms-eval says")
    evaluate.add_argument("--json", action="store_true", help="print JSON rather than tables")
    evaluate.set_defaults(run=evaluate_methods)


@dataclass(frozen=True)
class Entry:
    """One run of lmms-eval: a method, and how much it keeps; the whole model without one."""

    label: str = ""
    method: Method | None = None

    @property
    def amount(self) -> int | float | None:
        if self.method is None:
            return None
        return self.method.retention if self.method.budget is None else self.method.budget


@dataclass(frozen=True)
class Done:
    """What an entry reached."""

    entry: Entry
    figures: dict[str, float]  # by column, in the paper's scale
    seconds: float
    results: dict[str, Any]  # lmms-eval's


def evaluate_methods(args: argparse.Namespace) -> None:
    for option in ("limit", "batch_size"):
        value = getattr(args, option)
        if value is not None and value < 1:
            raise ValueError(f"{option.replace('_', '-')}: expected at least 1, got {value}")
    entries = [Entry(), *_entries(args)]
    if args.include_path is not None and not args.include_path.is_dir():
        raise ValueError(f"include-path: expected a directory, got {str(args.include_path)!r}")
    if args.out is not None:
        check_writable("out", args.out / "eval.json", ())
    checked_device(args.device)
    source, name, options = _model(args, entries)
    with _lmms_eval() as lmms_eval:
        manager = _tasks(args)
        model: Any = model_class(name)(pretrained=source, **options)
        model.stays_loaded = True
        done = _run(args, entries, model, lmms_eval, manager)
    table = paper.table_of(args.model)
    if args.paper is not None:
        (table,) = (each for each in paper.TABLES if each.model == args.paper)
    result = _as_json(args, done, table)
    if args.json:
        print(json.dumps(result))
    else:
        _print(args, done, table)
    if args.out is not None:
        with replacing(args.out / "eval.json") as beside:
            beside.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.out / 'eval.json'}", file=sys.stderr if args.json else sys.stdout)


# ------------------------------------------------------------------------------------------------- what is asked for


def _entries(args: argparse.Namespace) -> list[Entry]:
    given: dict[str, Any] = {}
    labels = [label.strip() for label in args.methods.split(",")]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"methods: expected each method once, got {label} twice")
    amounts = _amounts(args)
    for label in labels:
        if label.split(":")[0] != "trim":  # which cannot be made without a text encoder
            method_from(label, amounts[0])
    if args.text_encoder is not None:
        from .loading import load_clip_text

        given["text_encoder"] = load_clip_text(args.text_encoder, args.model)
    return [Entry(label, method_from(label, {**amount, **given})) for amount in amounts for label in labels]


def _amounts(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The largest first, as in the paper."""
    name, kind = ("budgets", int) if args.budgets is not None else ("retentions", float)
    text = getattr(args, name)
    try:
        found = [kind(part) for part in text.split(",")]
        if len(set(found)) < len(found):
            raise ValueError("a number comes twice")
        for value in found:
            Method(**dict[str, Any]({name[:-1]: value}))
    except ValueError as error:
        wanted = "whole numbers above 0" if kind is int else "numbers above 0 and at most 1"
        raise ValueError(f"{name}: expected different {wanted} with commas between, got {text!r}") from error
    return [{name[:-1]: value} for value in sorted(found, reverse=True)]


def _model(args: argparse.Namespace, entries: Sequence[Entry]) -> tuple[str, str, dict[str, Any]]:
    """The checkpoint, lmms-eval's name for its kind of model, and what to hand that over."""
    from .loading import checkpoint_config, refusals

    source, config = checkpoint_config(args.model)
    name = next((name for name, stock in STOCK.items() if config.model_type in stock.model_types), None)
    if name is None:
        types = ", ".join(model_type for stock in STOCK.values() for model_type in stock.model_types)
        raise ValueError(f"model: expected one of type {types}, got {config.model_type!r} in {args.model!r}")
    if args.batch_size > 1 and not STOCK[name].batches:
        raise ValueError(f"batch-size: expected 1, as lmms-eval's {name} takes no more, got {args.batch_size}")
    if args.dtype is not None and not STOCK[name].takes_dtype:
        raise ValueError(f"dtype: expected none, as lmms-eval's {name} takes the checkpoint's, got {args.dtype}")
    pruned = [(entry.label, entry.method) for entry in entries if entry.method is not None]
    for (label, _), reason in zip(pruned, refusals(source, [method for _, method in pruned])):
        if reason:
            raise ValueError(f"methods: {label}: {reason}")
    if config.model_type == "llava":  # whose images all have the same number of tokens
        tokens = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        most = max(method.budget or 1 for _, method in pruned)
        if most > tokens:
            raise ValueError(f"budgets: expected 1 to {tokens}, the tokens of an image, got {most}")
    options: dict[str, Any] = {"device": args.device, "device_map": args.device, "batch_size": args.batch_size}
    return source, name, options if args.dtype is None else {**options, "dtype": args.dtype}


@contextlib.contextmanager
def _lmms_eval() -> Iterator[Any]:
    """lmms-eval's evaluator; what it prints meanwhile goes to stderr, and its bars nowhere if that is no terminal."""
    with contextlib.ExitStack() as quiet:
        quiet.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not sys.stderr.isatty():
            quiet.enter_context(contextlib.redirect_stderr(io.StringIO()))
        try:
            import lmms_eval.evaluator as evaluator
        except ImportError as error:
            missing = (
                "is not installed" if (error.name or "").startswith("lmms_eval") else f"cannot be imported: {error}"
            )
            raise ImportError(f"lmms-eval (0.7 or newer) {missing}; {_INSTALL}") from error
        yield evaluator


def _tasks(args: argparse.Namespace) -> Any:
    """lmms-eval's index of tasks, which has those that were asked for; their data can be read."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    names = [name.strip() for name in args.tasks.split(",")]
    with progress("indexing lmms-eval's tasks"):
        include = None if args.include_path is None else str(args.include_path)
        manager = TaskManager("WARNING", include_path=include)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            raise ValueError(f"tasks: lmms-eval has no {name!r}" + (f"; near: {', '.join(near)}" if near else ""))
    with progress("loading the tasks' data"):
        try:
            tasks = list(_flat(get_task_dict(names, manager, "chat")))
        except Exception as error:  # files, network, formats: whatever data sets raise
            cause = error.__cause__ or error  # lmms-eval tries again and again, and then raises that it did
            raise ValueError(f"tasks: {args.tasks}: {type(cause).__name__}: {cause}") from error
    for name, task in tasks:
        kind = task.get_config("output_type")
        if kind != "generate_until":
            raise ValueError(f"tasks: expected tasks whose output_type is generate_until, got {kind} of {name}")
    return manager


def _flat(tasks: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, task in tasks.items():
        if isinstance(task, dict):
            yield from _flat(task)
        else:
            yield str(name), task


def _run(args: argparse.Namespace, entries: Sequence[Entry], model: Any, lmms_eval: Any, manager: Any) -> list[Done]:
    done = []
    for i, entry in enumerate(entries):
        begun = time.perf_counter()
        model.prune(entry.method)
        with _errors_of_input(entry), progress(f"{i + 1} of {len(entries)}: {_title(entry)} {entry.label}"):
            results = lmms_eval.simple_evaluate(
                model=model,
                tasks=[name.strip() for name in args.tasks.split(",")],
                task_manager=manager,
                batch_size=args.batch_size,
                device=args.device,
                limit=args.limit,
                log_samples=False,
                bootstrap_iters=0,
            )
        done.append(Done(entry, _figures(results), time.perf_counter() - begun, results))
    return done


@contextlib.contextmanager
def _errors_of_input(entry: Entry) -> Iterator[None]:
    """What a method refuses of an image, such as a budget below its number of tiles, is wrong input."""
    try:
        yield
    except GenerationError as error:
        if isinstance(error.__cause__, ValueError):
            raise ValueError(f"{_title(entry)} {entry.label}: {error.__cause__}") from error
        raise


# ----------------------------------------------------------------------------------------------------------- figures


def _figures(results: dict[str, Any]) -> dict[str, float]:
    """One figure of each task: the paper's for its benchmarks, of others the first that lmms-eval reports."""
    found = {}
    for task, values in results["results"].items():
        metrics = {
            key.split(",")[0]: float(value)
            for key, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and "," in key and "_stderr" not in key
        }
        benchmark = paper.BENCHMARKS.get(task)
        if benchmark is not None and all(metric in metrics for metric in benchmark.metrics):
            found[benchmark.column] = benchmark.scale * sum(metrics[metric] for metric in benchmark.metrics)
        elif metrics:
            found[task] = next(iter(metrics.values()))
    return found


def _relative(figures: dict[str, float], whole: dict[str, float]) -> float | None:
    """Mean over the columns that both have, in percent."""
    shares = [figures[name] / whole[name] for name in figures if whole.get(name)]
    return 100 * sum(shares) / len(shares) if shares else None


def _title(entry: Entry) -> str:
    if entry.method is None:
        return _WHOLE
    amount = entry.amount
    return f"{amount} tokens" if isinstance(amount, int) else f"{100 * (amount or 0):.1f}% of the tokens"


def _same(row: paper.Row, entry: Entry) -> bool:
    """Whether a row of the paper is of as many tokens."""
    if entry.method is None:
        return row.method == ""
    if row.method == "":
        return False
    if entry.method.budget is not None:
        return row.tokens == entry.method.budget
    return math.isclose(100 * (entry.method.retention or 0), row.percent, abs_tol=0.06)


def _print(args: argparse.Namespace, done: Sequence[Done], table: paper.Table | None) -> None:
    whole = done[0].figures
    columns = list(whole)
    if table is not None:
        columns.sort(key=lambda column: table.columns.index(column) if column in table.columns else len(columns) + 9)
    rows: list[tuple[str, ...]] = [("", *columns, "average")]
    title = ""
    for i, each in enumerate(done):
        if _title(each.entry) != title:
            title = _title(each.entry)
            rows.append((title, *("" for _ in columns), ""))
        rows.append(
            (f"  {each.entry.label or 'reached'}", *_cells(columns, each.figures, _relative(each.figures, whole)))
        )
        last = i + 1 == len(done) or _title(done[i + 1].entry) != title
        if last and table is not None:
            base = _of_paper(table, table.rows[0])
            for row in table.rows:
                if _same(row, each.entry):
                    values = _of_paper(table, row)
                    average = row.average if set(table.columns) <= set(columns) else None
                    shown = {name: value for name, value in values.items() if name in columns}
                    average = _relative(shown, base) if average is None else average
                    rows.append((f"  paper: {row.method or table.model}", *_cells(columns, values, average)))
    print(f"{args.model}, lmms-eval{'' if args.limit is None else f', the first {args.limit} questions of each task'}")
    aligned(rows)
    print("average: mean over the columns, in percent of the whole model")
    if table is not None:
        print(f"paper: table {table.number} of {paper.SOURCE!r}; nothing in those rows was measured here")


def _of_paper(table: paper.Table, row: paper.Row) -> dict[str, float]:
    return {name: value for name, value in zip(table.columns, row.values) if value is not None}


def _cells(columns: Sequence[str], figures: dict[str, float], average: float | None) -> list[str]:
    cells = [_shown(figures[column]) if column in figures else "-" for column in columns]
    return [*cells, "-" if average is None else f"{average:.1f}%"]


def _shown(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.4g}"


def _as_json(args: argparse.Namespace, done: Sequence[Done], table: paper.Table | None) -> dict[str, Any]:
    whole = done[0].figures
    rows = []
    for each in done:
        method = each.entry.method
        rows.append(
            {
                "method": each.entry.label or None,
                "budget": None if method is None else method.budget,
                "retention": None if method is None else method.retention,
                "figures": each.figures,
                "average_percent": _relative(each.figures, whole),
                "seconds": each.seconds,
                "lmms_eval": json.loads(json.dumps(each.results, default=str)),
            }
        )
    found: dict[str, Any] = {"model": args.model, "tasks": args.tasks, "limit": args.limit, "results": rows}
    if table is not None:
        quoted = [row._asdict() for row in table.rows]
        found["paper"] = {"source": paper.SOURCE, "table": table.number, "columns": table.columns, "rows": quoted}
    return found
