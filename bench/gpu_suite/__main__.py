"""Prove and measure the kernels on a GPU, in one run of less than 9 minutes.

    python -m bench.gpu_suite                            # everything, results under out/gpu
    python -m bench.gpu_suite --only attention selection # some sections
    python -m bench.gpu_suite --tune --skip-tests        # and what the launch table could be
    python -m bench.gpu_suite --quick --device cpu       # every code path at tiny sizes, without a GPU

Runs from a copy of the working tree; nothing need be installed but PyTorch, Triton and transformers (pytest for the
tests). results.json and results.md are written after every case, so that a run that is stopped leaves what it had.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from . import report
from .conductor import ROOT, SECTIONS, Suite, commit_of


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_suite", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "gpu", metavar="DIR")
    parser.add_argument("--budget-s", type=float, default=500.0, metavar="S", help="seconds for everything (500)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--tune", action="store_true", help="also time every kernel with other block shapes")
    parser.add_argument("--flush-l2", action="store_true", help="empty the L2 cache before every timed kernel call")
    parser.add_argument("--quick", action="store_true", help="tiny shapes: everything runs, no figure means anything")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu (for a dry run)")
    parser.add_argument("--commit", help="the commit to put into the results, where .git is not there to tell")
    options = parser.parse_args(arguments)
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu: a CPU can only do a dry run; add --quick")
    if options.budget_s <= 0:
        parser.error(f"--budget-s: expected a positive number of seconds, got {options.budget_s:g}")

    sections = options.only or [name for name in SECTIONS if name != "tune"]
    sections = [name for name in SECTIONS if name in sections or (options.tune and name == "tune")]
    if options.skip_tests:
        sections = [name for name in sections if name != "tests"]
    suite = Suite(
        options.out,
        budget=options.budget_s,
        device=options.device,
        quick=options.quick,
        flush=options.flush_l2,
        command=shlex.join(["python", "-m", "bench.gpu_suite", *(sys.argv[1:] if arguments is None else arguments)]),
        commit=options.commit or commit_of(ROOT),
    )
    well = suite.run(sections)
    for failure in report.failures(suite.results):
        print(f"FAILED {failure}")
    for goal in report.goals(suite.results):
        if goal.value is not None and not options.quick:
            print(f"{goal.value:8.2f}  {goal.verdict:10s} {goal.text} ({goal.realistic:g}, {goal.moonshot:g})")
    print(f"{options.out / 'results.md'}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
