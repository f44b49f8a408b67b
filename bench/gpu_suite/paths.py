"""Sections "paths" and "tune": what `hiprune_kernels/kernels/table.py` chooses from, timed launch by launch.

"paths" takes every path with the table's blocks; "tune" (asked for by --tune) takes every kernel with other blocks too.
Together they say what the table should be.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hiprune_kernels.kernels.attention import compute, launch_kernel
from hiprune_kernels.kernels.paths import LENDERS, PATHS, Blocks, Launch, LaunchPlan, Problem
from hiprune_kernels.kernels.table import choose

from . import attention, ways
from .attention import SCORE_TOLERANCE, SHAPES, exact, inputs, relative_error
from .context import Case, Context, Row, UnavailableError

MOST_KEYS = {"strip": 256}  # of paths that have a limit
PATH_SHAPES = (
    "CLIP-L B=1",
    "CLIP-L B=8",
    "CLIP-L B=64",
    "Qwen 4096",
    "SigLIP B=32",
    "DeiT B=64",
    "V-JEPA2 B=8",
    "Qwen 16384",
    "CLIP-B/32 B=64",
    "Qwen 1024",
)
TUNE_SHAPES = ("CLIP-L B=8", "Qwen 4096", "SigLIP B=32", "CLIP-L B=1", "V-JEPA2 B=8", "DeiT B=64", "CLIP-B/32 B=64")

# block_m, block_n, warps, stages. The attention kernel chains products: block_m >= 16 warps.
ATTENTION_BLOCKS = (
    *((64, 64, 4, stages) for stages in (2, 3, 4)),
    *((128, 64, 8, stages) for stages in (2, 3, 4)),
    (128, 64, 4, 3),
    (64, 128, 4, 2),
    (128, 128, 8, 2),
    (64, 32, 4, 3),
)
SCORES_BLOCKS = (
    *((64, 64, 4, stages) for stages in (2, 3, 4)),
    *((64, 128, 8, stages) for stages in (2, 3, 4)),
    (64, 128, 4, 3),
    (128, 64, 4, 3),
    (128, 64, 8, 3),
    (128, 128, 8, 3),
    (32, 64, 4, 4),
)
STRIP_BLOCKS = tuple((rows, warps) for rows in (16, 32, 64, 128) for warps in (2, 4, 8))
OUTPUT_TOLERANCE = 0.02  # of 16-bit outputs, over the largest


class Recorded(NamedTuple):
    """One kernel launch of a call, to be repeated."""

    name: str
    blocks: Blocks
    again: Callable[[], object]


def recorded(call: Callable[[Launch], Any]) -> tuple[Any, list[Recorded]]:
    """What `call(launch)` returns, and the launches it made."""
    launches = []

    def launch(kernel: Any, *rest: Any) -> None:
        def again() -> None:
            launch_kernel(kernel, *rest)

        again()
        launches.append(Recorded(kernel.__name__, rest[-1], again))

    return call(launch), launches


class _Trials:
    """One shape, and calls of our kernels on it."""

    def __init__(self, context: Context, name: str) -> None:
        shape = attention.quick(SHAPES[name]) if context.quick else SHAPES[name]
        self.context, self.shape = context, shape
        self.tensors = inputs(context, shape, torch.Generator(context.device).manual_seed(0))
        major, minor = (9, 0) if context.device.type == "cpu" else torch.cuda.get_device_capability(context.device)
        self.architecture = 10 * major + minor
        self.problem = Problem.of(*self.tensors, None, None, None, None)
        self.truth = exact(*(x[:1] for x in self.tensors))
        self.calls: dict[str, list[Callable[[], object]]] = {}
        self.rows: dict[str, Row] = {}

    def plan(self, path: str | None = None) -> LaunchPlan:
        return choose(self.problem, self.architecture, path)

    def fits(self, path: str) -> bool:
        return MOST_KEYS.get(path, self.shape.N) >= self.shape.N

    def run(
        self, plan: LaunchPlan, launch: Launch = launch_kernel, output: bool = True
    ) -> tuple[Tensor | None, Tensor]:
        problem = self.problem if output else self.problem._replace(value=None)
        return compute(problem, plan, False, 1 / problem.heads, launch)

    def add(self, name: str, plan: LaunchPlan, wanted: str | None = None, output: bool = True) -> list[Recorded]:
        """Check a plan; time it as a whole, or of its launches the kernel called `wanted`. Gives the launches."""
        row = self.rows[name] = {"way": name}
        try:
            (found, scores), launches = recorded(lambda launch: self.run(plan, launch, output))
            errors = [relative_error(scores[:1], self.truth[1])]
            errors += [] if found is None else [relative_error(found[:1], self.truth[0])]
        except Exception as error:  # blocks that do not compile or do not fit are an answer too
            row["failure"] = self.context.failure(name, error)
            return []
        row["score error"] = errors[0]
        if not (errors[0] <= SCORE_TOLERANCE and errors[-1] <= OUTPUT_TOLERANCE):
            row["failure"] = f"wrong: errors {', '.join(f'{error:.1e}' for error in errors)}"
            return []
        chosen = [launch.again for launch in launches if launch.name == wanted]
        self.calls[name] = chosen if wanted else [lambda: self.run(plan, output=output)]
        return launches

    def timed(self) -> list[Row]:
        measured = self.context.compare(self.calls, self.rows, prepare=self.context.prepare)
        for name, times in measured.items():
            row = self.rows[name]
            row |= {"us": times.launched.median * 1e6, "samples": times.launched.samples}
            if times.graph is not None:
                row["graph us"] = times.graph.median * 1e6
            elif times.note:
                row["no graph"] = times.note
        return list(self.rows.values())

    def compile_all(self, plans: list[tuple[LaunchPlan, bool]]) -> None:
        """Compile the plans' kernels in threads: one after the other they would take most of the time there is."""
        jobs = []
        for plan, output in plans:
            with contextlib.suppress(Exception):  # `add` meets and reports it again
                self.run(plan, lambda *launch: jobs.append(launch), output)

        def warm(kernel: Any, programs: int, arguments: dict, constants: dict, blocks: Blocks) -> None:
            with contextlib.suppress(Exception):
                options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
                kernel.warmup(**arguments, **constants, **options, grid=(programs,))

        if self.context.device.type == "cuda":
            with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda job: warm(*job), jobs))


def _blocks_text(blocks: Blocks) -> str:
    return f"{blocks.block_m}x{blocks.block_n} w{blocks.warps} s{blocks.stages}"


def _paths(context: Context, name: str) -> list[Row]:
    trials = _Trials(context, name)
    paths = [path for path in PATHS if trials.fits(path)]
    plans = [(f"table: {trials.plan().path}", trials.plan(), True)]
    plans += [(path, trials.plan(path), True) for path in paths]
    plans += [(f"scores only, {path}", trials.plan(path), False) for path in paths if path not in LENDERS]
    trials.compile_all([(plan, output) for _, plan, output in plans])
    for title, plan, output in plans:
        launches = trials.add(title, plan, output=output)
        for i, launch in enumerate(launches):
            part = f"{title}, launch {i + 1}: {launch.name} {_blocks_text(launch.blocks)}"
            trials.rows[part] = {"way": part}
            trials.calls[part] = [launch.again]
    _add_peer(trials)
    return trials.timed()


def _add_peer(trials: _Trials) -> None:
    """FlagAttention's scores pass, with the log-sum-exp given, as our scores_kernel has it."""
    query, key, _ = trials.tensors
    row = trials.rows["FlagAttention, scores pass"] = {"way": "FlagAttention, scores pass"}
    try:
        total = ways.flag_total_attention(trials.shape.D)
        _, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*trials.tensors)
        row["score error"] = relative_error(total(query, key, lse).mean(dim=1)[:1], trials.truth[1])
    except Exception as error:
        row["failure"] = trials.context.failure(row["way"], error)
        return
    trials.calls[row["way"]] = [lambda: total(query, key, lse)]


def _tune(context: Context, name: str) -> list[Row]:
    trials = _Trials(context, name)
    few = 2 if context.quick else None
    sweeps, passes = trials.plan("sweeps"), trials.plan("passes")
    plans = []  # title, plan, the kernel to time, with output
    for blocks in [Blocks(*entry) for entry in ATTENTION_BLOCKS[:few]]:
        text = _blocks_text(blocks)
        plans.append((f"sweeps {text}", sweeps._replace(attention=blocks), "attention_kernel", True))
        plans.append((f"output and LSE {text}", passes._replace(attention=blocks), "attention_kernel", True))
        plans.append((f"LSE alone {text}", passes._replace(attention=blocks), "attention_kernel", False))
    for blocks in [Blocks(*entry) for entry in SCORES_BLOCKS[:few]]:
        for splits in sorted({1, passes.splits, 4}):
            plan = passes._replace(scores=blocks, splits=splits)
            plans.append((f"scores pass {_blocks_text(blocks)}, {splits} splits", plan, "scores_kernel", False))
    if trials.fits("strip"):
        strip = trials.plan("strip")
        for block_m, warps in STRIP_BLOCKS[:few]:
            blocks = strip.attention._replace(block_m=block_m, warps=warps)
            plans.append((f"strip {_blocks_text(blocks)}", strip._replace(attention=blocks), "strip_kernel", True))
    trials.compile_all([(plan, output) for _, plan, _, output in plans])
    for title, plan, kernel, output in plans:
        trials.add(title, plan, kernel, output)
    return trials.timed()


def _needs_kernels(context: Context) -> None:
    if context.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnavailableError("the Triton kernels need a GPU (or TRITON_INTERPRET=1, which times nothing)")


def _case(context: Context, rows: Callable[[Context, str], list[Row]], name: str, seconds: float) -> Case:
    def run() -> list[Row]:
        _needs_kernels(context)
        return rows(context, name)

    return Case(name, seconds, run)


def path_cases(context: Context) -> list[Case]:
    names = ("CLIP-L B=1", "Qwen 4096") if context.quick else PATH_SHAPES
    return [_case(context, _paths, name, 4.0) for name in names]


def tune_cases(context: Context) -> list[Case]:
    return [_case(context, _tune, name, 15.0) for name in TUNE_SHAPES[: 1 if context.quick else None]]
