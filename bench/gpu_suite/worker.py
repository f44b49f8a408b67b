"""Runs one section in a process of its own and reports each case on standard output, a line of JSON per event.

Started by `conductor.py`: a crash, or an error that leaves the GPU unusable, takes down one case and not the suite.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Collection
from typing import Any

import torch

from hiprune_kernels.environment import environment

from .conductor import EVENT
from .context import Context, PoisonedError, UnavailableError
from .timing import clock_for, first_line, free_memory

POISONED = 3  # exit status: the case was reported, another process must go on
CASES = {  # section -> module and function that list its cases
    "attention": ("attention", "cases"),
    "selection": ("selection", "cases"),
    "operators": ("operators", "cases"),
    "encoder": ("encoder", "cases"),
    "llava": ("llava", "cases"),
    "paths": ("paths", "path_cases"),
    "sanitizer": ("sanitizer", "cases"),
    "tune": ("paths", "tune_cases"),
}

Emit = Callable[[dict[str, Any]], None]


def machine(context: Context) -> dict[str, Any]:
    """Versions, device, and the rates that floors are computed from."""
    found = environment()
    if context.device.type == "cuda":
        found["cuda"] = torch.version.cuda
    return found | {"rates": {name: _jsonable(rate) for name, rate in context.rates._asdict().items()}}


def launch_gap() -> str:
    """Why Triton can launch nothing here, or nothing. It builds what passes arguments on the first use."""
    try:
        import triton

        _ = triton.runtime.driver.active.utils
    except Exception as error:  # no driver, no compiler, no headers: all are met here
        words = f"{type(error).__name__}: {first_line(error)}"
        return f"Triton cannot launch kernels; it needs a CUDA driver, a C compiler and Python.h ({words})"
    return ""


def run_section(
    section: str, context: Context, emit: Emit, skip: Collection[str] = (), seconds: float = math.inf
) -> None:
    """Run a section's cases but those in `skip`, reporting each; a case that does not fit into `seconds` is skipped.

    Raises:
        PoisonedError: after a case left the device unusable; that case was reported.
    """
    module, function = CASES[section]
    end = time.monotonic() + seconds
    cases = getattr(importlib.import_module(f"{__package__}.{module}"), function)(context)
    emit({"cases": [case.name for case in cases]})
    for case in cases:
        if case.name in skip:
            continue
        left = end - time.monotonic()
        if not context.quick and case.seconds > left:
            reason = f"takes about {case.seconds:.0f} s, and {max(left, 0):.0f} s of the section's share are left"
            emit({"case": case.name, "status": "skipped", "reason": reason})
            continue
        limit = None if context.quick else 20.0 + 4 * case.seconds  # a kernel may never end
        emit({"case": case.name, "status": "running", "limit": limit})
        began = time.monotonic()
        result: dict[str, Any] = {"case": case.name}
        try:
            result |= {"status": "done", "rows": [_jsonable(row) for row in case.rows()]}
        except UnavailableError as error:
            result |= {"status": "skipped", "reason": str(error)}
        except torch.OutOfMemoryError as error:
            result |= {"status": "failed", "reason": f"out of memory: {first_line(error)}"}
        except Exception as error:
            result |= {"status": "failed", "reason": f"{type(error).__name__}: {first_line(error)}"}
        result["seconds"] = time.monotonic() - began
        emit(result)
        context.check_device()  # a case that failed may have left it unusable
        free_memory(context.device)


def _jsonable(value: Any) -> Any:
    """Floats that JSON can hold, with as many digits as mean something."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=CASES)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=math.inf)
    parser.add_argument("--skip", nargs="*", default=[], metavar="CASE")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--flush-l2", action="store_true")
    options = parser.parse_args()

    def emit(event: dict[str, Any]) -> None:
        print(EVENT + json.dumps(event), flush=True)

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        emit({"fatal": "PyTorch finds no CUDA device"})
        return 1
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
        if gap := launch_gap():
            emit({"fatal": gap})
            return 1
    began = time.monotonic()
    context = Context(device, clock_for(device), options.quick, options.flush_l2)
    emit({"machine": machine(context)})
    try:
        left = options.seconds - (time.monotonic() - began)
        run_section(options.section, context, emit, options.skip, left)
    except PoisonedError as error:
        print(error, file=sys.stderr)
        return POISONED
    return 0


if __name__ == "__main__":
    sys.exit(main())
