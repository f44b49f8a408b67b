"""Section "tests": the `gpu`-marked tests, in pytest's own process."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent

_KINDS = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
_OUTCOME = re.compile(rf"^(?P<test>tests/\S+?::.+?) (?P<kind>{_KINDS})\b")
_OUTCOME_OF_WORKER = re.compile(rf"^\[gw\d+\] \[ *\d+%\] (?P<kind>{_KINDS}) (?P<test>tests/.+?)\s*$")
_SUMMARY = re.compile(r"^(?:FAILED|ERROR) (tests/\S.*)$")
NO_TESTS = 5  # pytest's exit status where it collected none
PROCESSES = 6  # where pytest-xdist is installed: most of the time goes into compiling, on the host


def command(python: str, quick: bool) -> list[str]:
    """Verbose, so that a run that is stopped has said which tests it had finished."""
    # Only the files with such tests: one that needs a package that is not here would keep pytest from running any.
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in file.read_text()]
    tests = [str(file.relative_to(ROOT)) for file in sorted(files)]
    chosen = ["--collect-only", "-q"] if quick else ["-v"]
    if not quick and importlib.util.find_spec("xdist") is not None:
        chosen += ["-n", str(PROCESSES)]
    return [python, "-m", "pytest", *tests, "-m", "gpu", *chosen, "--tb=short", "--color=no", "-p", "no:cacheprovider"]


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
        outcome = _OUTCOME.match(line) or _OUTCOME_OF_WORKER.match(line)
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
