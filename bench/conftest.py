"""`side_by_side`: times one implementation against its alternatives in interleaved rounds, and a table of ratios."""

import statistics
import time

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=torch.get_num_threads(), help="threads of the attention benchmarks")


@pytest.fixture
def side_by_side(benchmark):
    """side_by_side(ours, alternatives, rounds): every round runs each alternative, then ours, so all meet the same
    machine. Check the results before calling it. Medians and ratios go to the report and the table at the end."""

    def run(ours, alternatives, rounds):
        seconds = {name: [] for name in alternatives}

        def run_alternatives():
            for name, function in alternatives.items():
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)

        benchmark.pedantic(ours, setup=run_alternatives, rounds=rounds, warmup_rounds=2)
        median = benchmark.stats.stats.median
        medians = {name: statistics.median(times[2:]) for name, times in seconds.items()}
        benchmark.extra_info["median_ms"] = {"ours": median * 1e3, **{n: t * 1e3 for n, t in medians.items()}}
        benchmark.extra_info["times_ours"] = {name: t / median for name, t in medians.items()}

    return run


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [b for b in session.benchmarks if "times_ours" in b.extra_info] if session else []
    if not benchmarks:
        return
    terminalreporter.section("medians, and each alternative's time as a multiple of ours (above 1: ours is faster)")
    width = max(len(b.name) for b in benchmarks)
    for b in benchmarks:
        ratios = "  ".join(f"{name} {ratio:.2f}x" for name, ratio in b.extra_info["times_ours"].items())
        ours = b.extra_info["median_ms"]["ours"]
        shown = f"{ours:9.2f} ms" if ours >= 1 else f"{ours * 1e3:9.1f} us"
        terminalreporter.write_line(f"{b.name:{width}}  ours {shown}   {ratios}")
