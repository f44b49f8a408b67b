"""`hiprune bench`: what pruning saves in your model, on your device, part by part."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_common import (
    DTYPES,
    aligned,
    check_writable,
    checked_device,
    method_from,
    open_image,
    progress_bar,
    replacing,
    watched,
)
from .sizes import CONFIGS
from .visualize import optional_import

if TYPE_CHECKING:
    from PIL.Image import Image

    from .efficiency import Measured
    from .methods import Method

UNPRUNED = "all tokens"
RETENTIONS = (1 / 3, 2 / 9, 1 / 9)  # of the paper's tables
# The paper's table 6: LLaVA-NeXT-7B, bfloat16, eager attention, one A100-PCIE of 40 GB.
PAPER = {
    "hardware": "A100-PCIE (40G), bfloat16, eager attention; HiPrune, table 6",
    "columns": ("tokens", "FLOPs (T)", "prefill (ms)", "decode (ms)", "VRAM (GB)", "tokens/s"),
    "rows": (
        (2880, 40.57, 272.0, 26.4, 16.5, 40.8),
        (640, 10.97, 62.8, 23.9, 14.6, 41.2),
        (320, 6.74, 36.3, 23.9, 14.6, 41.3),
        (160, 4.63, 29.7, 23.4, 14.6, 42.4),
    ),
}


def add_arguments(bench: argparse.ArgumentParser) -> None:
    source = bench.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR_OR_ID", help="a checkpoint, as of `hiprune run`")
    source.add_argument("--config", metavar="NAME", help=f"random weights at the published size: {', '.join(CONFIGS)}")
    amount = bench.add_mutually_exclusive_group()
    amount.add_argument("--budgets", metavar="N,M", help="tokens to keep, with commas in between")
    amount.add_argument(
        "--retentions", metavar="R,S", help="shares of the tokens to keep (default: 0.333, 0.222, 0.111)"
    )
    bench.add_argument(
        "--methods", default="hiprune", metavar="NAMES", help="as of `hiprune compare` (default: %(default)s)"
    )
    bench.add_argument("--image", metavar="FILE", help="default: noise, 768 x 768 pixels")
    bench.add_argument("--question", metavar="TEXT", help="where there is a tokenizer; else 48 random words")
    bench.add_argument("--batch", type=int, default=1, metavar="B", help="equal prompts at once (default: 1)")
    bench.add_argument("--new-tokens", type=int, default=8, metavar="N", help="to generate (default: 8)")
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="timed runs of each way (default: 5)")
    bench.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    bench.add_argument("--device", default="cpu", help="as PyTorch writes it, e.g. cuda:0 (default: cpu)")
    bench.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's choice)")
    bench.add_argument("--out", type=Path, metavar="DIR", help="write NAME.json, NAME.md and NAME.png there")
    bench.add_argument("--json", action="store_true", help="print JSON rather than tables")
    bench.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> None:
    for name in ("batch", "new_tokens", "rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{name.replace('_', '-')}: expected at least 1, got {value}")
    ways = _ways(args)
    if args.config is not None and args.config not in CONFIGS:
        raise ValueError(f"config: expected one of {', '.join(CONFIGS)}, got {args.config!r}")
    if args.question is not None and args.config is not None:
        raise ValueError("question: expected none with --config, which has no tokenizer")
    files = {}
    if args.out is not None:
        optional_import("matplotlib")
        stem = args.config or Path(args.model).name
        files = {suffix: args.out / f"{stem}.{suffix}" for suffix in ("json", "md", "png")}
        for file in files.values():
            check_writable("out", file, ())
    image = None if args.image is None else open_image(args.image)

    import torch

    from .efficiency import measure
    from .processing import quiet_transformers

    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        model, inputs, name = _load(args, ways, _noise() if image is None else image)
        with progress_bar((args.rounds + 1) * (len(ways) + 1), "measuring") as step, quiet_transformers():
            found = measure(model, inputs, ways, rounds=args.rounds, new_tokens=args.new_tokens, step=step)
        result = _result(found, args, name, inputs)
    finally:
        torch.set_num_threads(threads)
    if args.json:
        print(json.dumps(result))
    else:
        print("\n".join(_lines(result)))
        aligned(_table(result))
        print(*_remarks(result), sep="\n")
    if files:
        for suffix, text in (("json", json.dumps(result, indent=1)), ("md", _markdown(result))):
            with replacing(files[suffix]) as beside:
                beside.write_text(text + "\n")
        with replacing(files["png"]) as beside:
            _figure(result).savefig(beside, dpi=100)
        print(f"wrote {', '.join(map(str, files.values()))}", file=sys.stderr if args.json else sys.stdout)


# ------------------------------------------------------------------------------------------------- what is asked for


def _ways(args: argparse.Namespace) -> dict[str, Method | None]:
    """By name: the model as it is, and each method with each budget."""
    labels = [label.strip() for label in args.methods.split(",")]
    if len(set(labels)) < len(labels):
        raise ValueError(f"methods: expected each method once, got {args.methods!r}")
    if args.budgets is not None:
        amounts = [{"budget": number} for number in _numbers("budgets", args.budgets, int)]
    elif args.retentions is not None:
        amounts = [{"retention": number} for number in _numbers("retentions", args.retentions, float)]
    else:
        amounts = [{"retention": number} for number in RETENTIONS]
    ways: dict[str, Method | None] = {UNPRUNED: None}
    for label in labels:
        for amount in amounts:
            ((kind, number),) = amount.items()
            shown = number if kind == "budget" else f"{number:.3g}"
            ways[f"{label} {shown}"] = watched(method_from(label, amount))  # which refuses budgets above the tokens
    return ways


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    right = all(number >= 1 if kind is int else 0 < number <= 1 for number in numbers)
    if not numbers or not right or len(set(numbers)) < len(numbers):
        wanted = "whole numbers from 1" if kind is int else "shares above 0, at most 1,"
        raise ValueError(f"{option}: expected different {wanted} with commas in between, got {text!r}")
    return numbers


def _noise() -> Image:
    import numpy as np

    pixels = np.random.default_rng(0).integers(0, 256, (768, 768, 3), dtype=np.uint8)
    return optional_import("PIL.Image").fromarray(pixels)


def _load(args: argparse.Namespace, ways: dict[str, Method | None], image: Image) -> tuple[Any, dict[str, Any], str]:
    """The model, its inputs and its name; every method has been applied to it once."""
    import torch

    from .efficiency import with_text
    from .loading import LoadedModel, load_model, refusal
    from .processing import answers_text, default_image_processor, prompt_inputs, quiet_transformers, vision_inputs
    from .sizes import random_model

    device, dtype = checked_device(args.device), getattr(torch, args.dtype)
    methods = [method for method in ways.values() if method is not None]
    if args.config is not None:
        model = random_model(args.config, dtype=dtype, device=device)
        for name, method in ways.items():
            reason = "" if method is None else refusal(model, method)
            if reason:
                raise ValueError(f"methods: {name}: {reason}")
        with quiet_transformers():
            processor = default_image_processor(model.config)
        loaded = LoadedModel(model, processor, f"{args.config}, random weights", True, ())
    else:
        loaded = load_model(args.model, methods, dtype=dtype, device=device, answers=True)
    if answers_text(loaded.processor):
        inputs = prompt_inputs(loaded.model, loaded.processor, image, args.question or "Describe the image.")
        inputs = {name: _repeated(value, args.batch) for name, value in inputs.items()}
    else:
        inputs = vision_inputs(loaded.model, loaded.processor, image, language=True)
        inputs = with_text(inputs, min(30000, loaded.model.config.text_config.vocab_size), args.batch)
    return loaded.model, inputs, loaded.name


def _repeated(value: Any, batch: int) -> Any:
    return value.repeat(batch, *[1] * (value.ndim - 1)) if hasattr(value, "repeat") else value


# ---------------------------------------------------------------------------------------------------------- reporting


def _result(found: dict[str, Measured], args: argparse.Namespace, name: str, inputs: dict[str, Any]) -> dict[str, Any]:
    import torch

    from .efficiency import RELEASED
    from .environment import environment

    released = found.pop(RELEASED)
    rows = []
    first = found[UNPRUNED].times.medians()["first_token"]
    for way, measured in found.items():
        medians = measured.times.medians()
        rows.append(
            {
                "way": way,
                "prompt_tokens": measured.prompt_tokens,
                **{f"{part}_seconds": value for part, value in medians.items()},
                "first_token_ratio": (medians["first_token"] or 0.0) / (first or 1.0),
                "tokens_per_second": None if not medians["decode"] else args.batch / medians["decode"],
                "tflops": measured.flops / 1e12,
                "peak_mib": measured.peak_mib,
                "cache_mib": measured.cache_mib,
                "first_token_samples": measured.times.first_token,
            }
        )
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "model": name,
        "config": args.config,
        "dtype": args.dtype,
        "device": args.device,
        "threads": torch.get_num_threads(),
        "batch": args.batch,
        "prompt": inputs["input_ids"].shape[1],
        "new_tokens": args.new_tokens,
        "rounds": args.rounds,
        "environment": environment(),
        "rows": rows,
        "released_encoder_seconds": released.times.medians()["encoder"],
        "released_encoder_peak_mib": released.peak_mib,
    }


_PARTS = ("encoder", "scores", "selection", "connector", "prefill")
_COLUMNS = ("way", "prompt", "first token ms", "ratio", *_PARTS, "decode ms", "TFLOPs", "peak MiB", "cache MiB")


def _table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [_COLUMNS]
    for row in result["rows"]:
        times = {part: row[f"{part}_seconds"] for part in ("first_token", *_PARTS)}
        shown = {part: "" if value is None else f"{1e3 * value:.1f}" for part, value in times.items()}
        rows.append(
            (
                row["way"],
                str(row["prompt_tokens"]),
                shown["first_token"],
                f"{row['first_token_ratio']:.2f}",
                *(shown[part] for part in _PARTS),
                "" if row["decode_seconds"] is None else f"{1e3 * row['decode_seconds']:.1f}",
                f"{row['tflops']:.3g}",
                "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}",
                f"{row['cache_mib']:.1f}",
            )
        )
    return rows


def _lines(result: dict[str, Any]) -> list[str]:
    found = result["environment"]
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("torch", "transformers"))
    return [
        f"{result['model']}, {result['dtype']} on {result['device']} ({'; '.join(found['devices'])}), "
        f"{result['threads']} threads, {versions}",
        f"{result['batch']} prompt{'s' * (result['batch'] > 1)} of {result['prompt']} tokens; medians of "
        f"{result['rounds']} rounds, in milliseconds",
    ]


def _remarks(result: dict[str, Any]) -> list[str]:
    from .efficiency import Gain, without_gain

    whole, *pruned = result["rows"]
    gains = {
        row["way"]: Gain(
            row["first_token_ratio"],
            (row["first_token_seconds"] - row["prefill_seconds"])
            - (whole["first_token_seconds"] - whole["prefill_seconds"]),
            whole["prefill_seconds"] - row["prefill_seconds"],
            whole["prompt_tokens"] - row["prompt_tokens"],
        )
        for row in pruned
    }
    lines = [
        "Encoder: with scores, and selection where that is inside. Scores: the calls that compute them, with the "
        "object layer's attention, as one kernel does both. Connector: what lies between the encoder and the language "
        "model, the reading of text's attention included. Prefill: from there to the first token. Peak: above what is "
        "held before, of one prefill.",
        f"The released codes' vision side, eager with the attention matrices of all layers: {_released(result)}.",
        *without_gain(gains),
    ]
    if result["config"] in ("llava-next-7b", "llava-next-13b") or "llava_next" in str(result["model"]):
        lines.append(f"The paper's own figures ({PAPER['hardware']}):")
        lines.append("  " + ", ".join(str(column) for column in PAPER["columns"]))
        lines += ["  " + ", ".join(map(str, row)) for row in PAPER["rows"]]
    return lines


def _released(result: dict[str, Any]) -> str:
    """Its time, and beside what it stands; its memory."""
    seconds, peak = result["released_encoder_seconds"], result["released_encoder_peak_mib"]
    ours = [row["encoder_seconds"] + row["connector_seconds"] for row in result["rows"]]
    ratios = ", ".join(f"{seconds / own:.2f} times that of {row['way']}" for own, row in zip(ours, result["rows"]))
    return f"{1e3 * seconds:.1f} ms, {ratios}" + ("" if peak is None else f"; peak {peak:.0f} MiB")


def _markdown(result: dict[str, Any]) -> str:
    table = [f"| {' | '.join(row)} |" for row in _table(result)]
    table.insert(1, "|---" + "|---:" * (len(_COLUMNS) - 1) + "|")
    return "\n".join(
        [f"# {result['model']}", "", result["date"], "", *_lines(result), "", *table, "", *_remarks(result)]
    )


def _figure(result: dict[str, Any]) -> Any:
    """Stacked bars of the parts of the time to the first token."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    figure = Figure(figsize=(8, 1.6 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(rows)
    for part, color in (("encoder", "#4c72b0"), ("connector", "#55a868"), ("prefill", "#dd8452")):
        values = [1e3 * row[f"{part}_seconds"] for row in rows]
        axes.barh([row["way"] for row in rows], values, left=left, color=color, label=part)
        left = [a + b for a, b in zip(left, values)]
    for i, row in enumerate(rows):
        axes.text(left[i], i, f" {row['first_token_ratio']:.2f}", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(left))
    axes.set_xlabel("milliseconds to the first token")
    axes.set_title(f"{result['model']}, {result['dtype']} on {result['device']}", fontsize=11)
    axes.legend(loc="lower right")
    return figure
