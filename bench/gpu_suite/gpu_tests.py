"""Section "tests": the `gpu`-marked tests, in several processes of pytest's.

`python -m bench.gpu_suite.gpu_tests` starts them and prints what they print; in each, this module is a plugin.
"""

from __future__ import annotations

import concurrent.futures
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
PROCESSES = min(12, os.cpu_count() or 1)  # most of the time goes into compiling some 1300 kernels, on the host
NO_TESTS = 5  # pytest's exit status where it collected none

_KINDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
_OUTCOME = re.compile(rf"^(?P<test>tests/\S+?::.+?) (?P<kind>{_KINDS})\b")
_SUMMARY = re.compile(r"^(?:FAILED|ERROR) (tests/\S.*)$")


def command(python: str, quick: bool) -> list[str]:
    """Verbose, so that a run that is stopped has said which tests it had finished; `quick` only lists them."""
    return [python, "-m", "bench.gpu_suite.gpu_tests", *(["--collect-only", "-q"] if quick else ["-v"])]


def run(options: list[str], processes: int = PROCESSES) -> int:
    """Run the tests, each process its share. Gives pytest's exit status: the worst that there was."""
    # Only the files with such tests: one that needs a package that is not here would keep pytest from running any.
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text()]
    tests = [str(file.relative_to(ROOT)) for file in sorted(files)]
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "--tb=short", "--color=no", "-p", "no:cacheprovider"]

    def share(i: int) -> int:
        part = ["-p", __spec__.name, "--part", str(i), "--parts", str(processes)]
        process = subprocess.Popen(
            [*pytest, *part, *options, *tests], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            print(line, end="", flush=True)
        return process.wait()

    with concurrent.futures.ThreadPoolExecutor(processes) as pool:
        found = set(pool.map(share, range(processes)))
    return max(found - {0, NO_TESTS}, default=min(found))  # with more processes than tests, some have none


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--part", type=int, default=0)
    parser.addoption("--parts", type=int, default=1)


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Takes turns, so that every process gets some of the tests that compile much."""
    items[:] = items[config.option.part :: config.option.parts]


class Counts:
    """Outcomes, read off pytest's output line by line."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.failed: list[str] = []
        self._last = ""

    def read(self, line: str) -> str | None:
        """A line worth showing: a failure, or every twentieth test."""
        if line.strip():
            self._last = line.strip()
        if (summary := _SUMMARY.match(line)) is not None:  # the summary at the end repeats a failure, with its reason
            test = summary[1].partition(" - ")[0]
            self.failed = [name for name in self.failed if name != test] + [summary[1][:300]]
            return None
        outcome = _OUTCOME.match(line)
        if outcome is None:
            return None
        test, kind = outcome["test"], outcome["kind"].lower()
        self.outcomes[kind] += 1
        if kind in ("failed", "error"):
            self.failed.append(test)
            return f"{kind} {test}"
        count = self.outcomes.total()
        return f"{count} tests done" if count % 20 == 0 else None

    def summary(self, status: int) -> dict[str, Any]:
        """What the results say about the section, given pytest's exit status (negative: killed)."""
        text = ", ".join(f"{count} {kind}" for kind, count in sorted(self.outcomes.items())) or "no outcomes"
        record = {"outcomes": dict(self.outcomes), "failed tests": self.failed, "reason": text}
        if status == 0:
            return record | {"status": "done"}
        if importlib.util.find_spec("pytest") is None:
            return record | {"status": "skipped", "reason": "pytest is not installed"}
        if status < 0:
            return record | {"status": "failed", "reason": f"stopped before the end ({text})"}
        if status == NO_TESTS:
            return record | {"status": "skipped", "reason": "there are no tests marked gpu"}
        return record | {"status": "failed", "reason": text if self.failed else f"{text}; {self._last}"}


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
