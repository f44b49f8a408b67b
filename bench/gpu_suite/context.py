"""What every section's cases share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .floors import Rates, measured_rates
from .timing import Call, Clock, Measured, compare, first_line, flush_l2, peak_extra_bytes

Row = dict[str, Any]  # a line of a table, ready for JSON


class Case(NamedTuple):
    """A unit of measuring: it succeeds, fails or is skipped as a whole."""

    name: str
    seconds: float  # it takes about that long, compiling included
    rows: Callable[[], list[Row]]


class UnavailableError(RuntimeError):
    """Something that this machine or shape does not offer; the message says why."""


class PoisonedError(RuntimeError):
    """After an error in a kernel the process can do nothing more on the GPU."""


@dataclass(frozen=True)
class Context:
    device: torch.device
    clock: Clock
    quick: bool  # tiny shapes: everything runs, no figure means anything
    flush: bool = False  # empty the L2 cache before every timed call of a kernel

    @property
    def samples(self) -> int:
        return 3 if self.quick else 20

    @functools.cached_property
    def rates(self) -> Rates:
        return measured_rates(self.device, self.clock)

    @functools.cached_property
    def prepare(self) -> Call | None:
        return flush_l2(self.device) if self.flush else None

    @property
    def dtype(self) -> torch.dtype:
        """Of kernels' inputs. Triton's interpreter, in a dry run, computes bfloat16 products wrongly."""
        return torch.float16 if self.quick else torch.bfloat16

    def compare(
        self, ways: Mapping[str, Sequence[Call]], rows: Mapping[str, Row], **options: Any
    ) -> dict[str, Measured]:
        """`timing.compare` in this context; a way that raises gets its failure into its row."""

        def on_failure(name: str, error: Exception) -> None:
            rows[name]["failure"] = self.failure(name, error)

        return compare(ways, self.clock, samples=self.samples, on_failure=on_failure, **options)

    def check_device(self) -> None:
        """Raises PoisonedError where the device answers no more."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.zeros(1, device=self.device).item()
            except RuntimeError as error:
                raise PoisonedError(first_line(error)) from error

    def failure(self, way: str, error: Exception) -> str:
        """The error in one line, for the table. Raises PoisonedError where work cannot go on after it."""
        text = str(error) if isinstance(error, UnavailableError) else f"{type(error).__name__}: {first_line(error)}"
        try:
            self.check_device()
        except PoisonedError as after:
            raise PoisonedError(f"{way}: {text}") from after
        return text


def extra_memory(call: Call, context: Context) -> Row:
    """The column of the memory that a call takes; nothing where the device does not tell."""
    peak = peak_extra_bytes(call, context.device)
    return {} if peak is None else {"extra MiB": peak / 2**20}


def seconds_row(times: Measured, ours: Measured | None) -> Row:
    """Times in microseconds, and as multiples of ours (above 1: ours is faster), launched and in a graph."""
    launched, graph = times.launched, times.graph
    row: Row = {
        "us": launched.median * 1e6,
        "us quartiles": [launched.low * 1e6, launched.high * 1e6],
        "samples": launched.samples,
        "calls per sample": launched.calls,
    }
    if graph is not None:
        row |= {"graph us": graph.median * 1e6, "graph us quartiles": [graph.low * 1e6, graph.high * 1e6]}
    elif times.note:
        row["no graph"] = times.note
    if ours is not None:
        row["x ours"] = launched.median / ours.launched.median
        if graph is not None and ours.graph is not None:
            row["x ours, graph"] = graph.median / ours.graph.median
    return row
