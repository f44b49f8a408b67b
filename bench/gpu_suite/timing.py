"""Times of functions on a device: events, medians, ways side by side, CUDA graphs.

A *way* is one manner of computing something, given as a list of calls that do the same on different inputs; the calls
take turns, so that inputs larger together than the L2 cache come from memory each time.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]
MOST_CALLS = 10_000  # in one sample
HEAD_START = 100_000  # clocks, some 50 microseconds


class NotCapturableError(RuntimeError):
    """A call cannot be part of a CUDA graph; the message says why."""


class Clock(Protocol):
    """Where time is read."""

    def elapsed(self, run: Call) -> float:
        """Seconds from the start of `run`'s first work on the device to the end of its last."""
        ...

    def elapsed_after(self, prepare: Call, calls: Sequence[Call]) -> float:
        """Seconds of the calls alone, where `prepare` runs before each of them."""
        ...

    def capture(self, calls: Sequence[Call]) -> Call:
        """A function that does what the calls do in one launch. Raises NotCapturableError where that cannot be."""
        ...


class HostClock:
    """For the CPU, where a call has done its work when it returns."""

    def elapsed(self, run: Call) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def elapsed_after(self, prepare: Call, calls: Sequence[Call]) -> float:
        total = 0.0
        for call in calls:
            prepare()
            total += self.elapsed(call)
        return total

    def capture(self, calls: Sequence[Call]) -> Call:
        raise NotCapturableError("a CPU has no CUDA graphs")


class CudaClock:
    """CUDA events on the current stream. What the host does between launches counts where the GPU waits for it."""

    def elapsed(self, run: Call) -> float:
        # The GPU is kept busy until the first launch arrives, whose latency is no part of the work.
        return self.elapsed_after(lambda: torch.cuda._sleep(HEAD_START), [run])

    def elapsed_after(self, prepare: Call, calls: Sequence[Call]) -> float:
        pairs = []
        for call in calls:
            prepare()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) * 1e-3

    def capture(self, calls: Sequence[Call]) -> Call:
        # A synchronisation while capturing can leave PyTorch's stream and allocator unusable: look for one first.
        try:
            torch.cuda.set_sync_debug_mode("error")
            calls[0]()
        except RuntimeError as error:
            raise NotCapturableError(f"synchronises with the host: {first_line(error)}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")
        stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            raise NotCapturableError(f"capture failed: {first_line(error)}") from error
        return graph.replay


def clock_for(device: torch.device) -> Clock:
    return CudaClock() if device.type == "cuda" else HostClock()


def first_line(error: BaseException) -> str:
    """An error in one line of at most 200 characters, for tables."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median of the samples and their quartiles."""

    median: float
    low: float
    high: float
    samples: int
    calls: int  # in a sample

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int) -> Timing:
        low, median, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else seconds * 3
        return cls(median, low, high, len(seconds), calls)


@dataclass(frozen=True)
class Measured:
    """One way's times: launched call by call, and as a CUDA graph where it was captured."""

    launched: Timing
    graph: Timing | None
    note: str  # why there is no graph

    @property
    def best(self) -> float:
        """Seconds; the GPU's own time where launching costs more."""
        return self.launched.median if self.graph is None else min(self.graph.median, self.launched.median)


class _Sampler:
    """Takes samples of one way: enough calls in a row to last `min_sample` seconds."""

    def __init__(self, calls: Sequence[Call], clock: Clock, min_sample: float, prepare: Call | None = None) -> None:
        self._clock, self._prepare = clock, prepare
        self._length, self._turns = len(calls), itertools.cycle(calls)
        self.calls = 1
        self.sample()  # the first call in a row, and the first after a pause, take longer
        self.calls = max(1, min(len(calls), 5))
        self.calls = max(1, min(MOST_CALLS, math.ceil(min_sample / max(self.sample(), 1e-9))))

    def sample(self) -> float:
        """Seconds of one call."""
        calls = [next(self._turns) for _ in range(self.calls)]
        if self._prepare is not None:
            return self._clock.elapsed_after(self._prepare, calls) / self.calls

        def run() -> None:
            for call in calls:
                call()

        return self._clock.elapsed(run) / self.calls


def compare(
    ways: Mapping[str, Sequence[Call]],
    clock: Clock,
    *,
    samples: int = 20,
    min_sample: float = 1e-3,
    graph_below: float = 1e-3,
    prepare: Call | None = None,
    warm_up: int = 3,
    on_failure: Callable[[str, Exception], None] | None = None,
) -> dict[str, Measured]:
    """Times of several ways in one run, in interleaved rounds, so that all of them meet the same machine.

    Args:
        ways: name -> calls that do the same on different inputs, already known to be correct.
        samples: rounds; every round takes one sample of every way, another way first each time.
        min_sample: seconds that a sample lasts at least, by the number of its calls.
        graph_below: a call that takes fewer seconds is also captured in a CUDA graph: launching it may take longer
            than the GPU's work.
        prepare: runs, untimed, before each timed call (to flush the L2 cache, say); there are no graphs then.
        warm_up: rounds of all calls before anything is timed.
        on_failure: is told of a way that raises while it warms up, which is then left out. Without it the error is the
            caller's.
    """
    samplers: dict[tuple[str, bool], _Sampler] = {}
    units, notes = {}, {}
    for name, calls in ways.items():
        try:
            for _ in range(warm_up):
                for call in calls:
                    call()
            sampler = _Sampler(calls, clock, min_sample, prepare)
            seconds = sampler.sample()
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(name, error)
            continue
        samplers[name, False], units[name, False], notes[name] = sampler, 1, ""
        if prepare is not None or seconds >= graph_below:
            continue
        turns = max(1, min(100, math.ceil(min_sample / seconds)) // len(calls))
        captured = list(calls) * turns
        try:
            samplers[name, True] = _Sampler([clock.capture(captured)], clock, min_sample)
            units[name, True] = len(captured)
        except NotCapturableError as error:
            notes[name] = str(error)
    seconds_of: dict[tuple[str, bool], list[float]] = {key: [] for key in samplers}
    order = list(samplers)
    for i in range(samples if order else 0):
        for key in order[i % len(order) :] + order[: i % len(order)]:
            seconds_of[key].append(samplers[key].sample() / units[key])

    def timing(key: tuple[str, bool]) -> Timing | None:
        return Timing.of(seconds_of[key], samplers[key].calls * units[key]) if key in samplers else None

    return {name: Measured(timing((name, False)), timing((name, True)), note) for name, note in notes.items()}


def peak_extra_bytes(call: Call, device: torch.device) -> int | None:
    """The most device memory that a call takes above what is held already, its result included; None on CPUs."""
    if device.type != "cuda":
        call()
        return None
    free_memory(device)
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - held


def device_seconds(call: Call, device: torch.device) -> float | None:
    """What the GPU's kernels and copies of one call take together, whatever the host does between; None on CPUs."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) * 1e-6


def free_memory(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache; what the dry run on a CPU takes for it keeps its inputs small."""
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 2**14


def rotation(bytes_per_call: int, device: torch.device) -> int:
    """How many sets of inputs, taking turns, are together more than twice the L2 cache; 64 at most."""
    return min(64, max(2, math.ceil(2 * l2_bytes(device) / max(bytes_per_call, 1)) + 1))


def flush_l2(device: torch.device) -> Call:
    """A function that fills the L2 cache with something else."""
    buffer = torch.empty(4 * l2_bytes(device), dtype=torch.uint8, device=device)
    return buffer.zero_
