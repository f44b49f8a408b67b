"""Runs the sections in turn, each in its process and within its share of the time, and keeps what they report.

Imports nothing heavy: it must outlive whatever happens in the sections.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from . import gpu_tests, report

ROOT = Path(__file__).parent.parent.parent
EVENT = "@event "  # begins the lines by which worker.py reports
GRACE = 20.0  # seconds that a case may run over its section's share before it is stopped
RESERVE = 3.0  # seconds kept for the end


class Section(NamedTuple):
    share: float  # of the time, among the sections still to come
    least: float  # seconds below which it is not begun


SECTIONS = {  # most important first
    "tests": Section(0.34, 20.0),
    "attention": Section(0.22, 25.0),
    "encoder": Section(0.11, 25.0),
    "selection": Section(0.03, 10.0),
    "operators": Section(0.04, 15.0),
    "llava": Section(0.24, 40.0),
    "paths": Section(0.09, 20.0),
    "sanitizer": Section(0.10, 30.0),
    "tune": Section(0.20, 30.0),
}


class Line(NamedTuple):
    text: str
    error: bool  # from standard error


@dataclass
class Deadline:
    """A moment of `time.monotonic()` that may be moved while it is waited for."""

    at: float


def stream(command: Sequence[str], deadline: Deadline) -> Iterator[Line | int]:
    """Lines that a command prints, as they come, and last its exit status; it is killed at the deadline (-9 then)."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET" or _on_cpu(command)}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment | {"PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # so that its children can be killed with it
    )
    lines: queue.Queue[Line | None] = queue.Queue()

    def read(pipe: Any, error: bool) -> None:
        for text in pipe:
            lines.put(Line(text.rstrip("\n"), error))
        lines.put(None)

    for pipe, error in ((process.stdout, False), (process.stderr, True)):
        threading.Thread(target=read, args=(pipe, error), daemon=True).start()
    open_pipes = 2
    try:
        while open_pipes:
            try:
                line = lines.get(timeout=max(0.0, deadline.at - time.monotonic()))
            except queue.Empty:
                break
            if line is None:
                open_pipes -= 1
            else:
                yield line
        if open_pipes == 0:
            yield process.wait()
        else:
            yield -signal.SIGKILL
    finally:
        with contextlib.suppress(ProcessLookupError):  # also what it started itself, if it is gone
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _on_cpu(command: Sequence[str]) -> bool:
    """Whether Triton's interpreter may be asked for: it would make every figure of a GPU run meaningless."""
    return "cpu" in command


class Suite:
    """One run: its options, its results so far, and where they are written."""

    def __init__(
        self,
        out: Path,
        *,
        budget: float,
        device: str,
        quick: bool,
        flush: bool,
        command: str,
        commit: str,
        say: Callable[[str], None] = print,
    ) -> None:
        self.out, self.device, self.quick, self.flush, self.say = out, device, quick, flush, say
        self.began = time.monotonic()
        self.end = self.began + budget - RESERVE
        self.results: dict[str, Any] = {
            "command": command,
            "commit": commit,
            "date": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
            "budget s": budget,
            "quick": quick,
            "machine": {},
            "sections": {},
        }
        out.mkdir(parents=True, exist_ok=True)

    def run(self, sections: Sequence[str]) -> bool:
        """Run these sections in order; whether nothing failed."""
        for i, name in enumerate(sections):
            now = time.monotonic()
            share = SECTIONS[name].share / sum(SECTIONS[later].share for later in sections[i:])
            seconds = (self.end - now) * (1.0 if self.quick else share)  # how long a dry run takes says nothing
            record = self.results["sections"][name] = {"status": "running", "cases": []}
            if seconds < (0.0 if self.quick else SECTIONS[name].least):
                record["status"] = "skipped"
                record["reason"] = f"needs {SECTIONS[name].least:.0f} s; its share of the time left is {seconds:.0f} s"
                self._progress(f"{name}: skipped, {record['reason']}")
            else:
                self._progress(f"{name}: at most {seconds:.0f} s")
                steps = self._tests if name == "tests" else self._measure
                steps(name, record, now + seconds)
                record["seconds"] = round(time.monotonic() - now, 1)
            self._write()
        self.results["seconds"] = round(time.monotonic() - self.began, 1)
        self._write()
        return not report.failures(self.results)

    def _progress(self, text: str) -> None:
        self.say(f"[{time.monotonic() - self.began:6.1f} s] {text}")

    def _write(self) -> None:
        """Each file is whole at any moment: a run that is killed leaves what it had."""
        texts = {"results.json": json.dumps(self.results, indent=1), "results.md": report.markdown(self.results)}
        for name, text in texts.items():
            part = self.out / f".{name}"
            part.write_text(text + "\n")
            part.replace(self.out / name)

    # ------------------------------------------------------------------------------------------------------- sections

    def _tests(self, name: str, record: dict[str, Any], deadline: float) -> None:
        counts = gpu_tests.Counts()
        with (self.out / "tests.log").open("w") as log:
            for line in stream(gpu_tests.command(sys.executable, self.quick), Deadline(deadline)):
                if isinstance(line, int):
                    record |= counts.summary(line)
                    continue
                log.write(line.text + "\n")
                log.flush()
                if (outcome := counts.read(line.text)) is not None:
                    self._progress(f"{name}: {outcome}")
        self._progress(f"{name}: {record['status']}, {record['reason']}")

    def _measure(self, name: str, record: dict[str, Any], deadline: float) -> None:
        every: list[str] = []
        seen: list[str] = []  # cases that need no further try
        while True:
            before = len(seen)
            status, running, last_words = self._attempt(name, record, deadline, every, seen)
            if running is not None:
                case, began = running
                reason = f"the process ended with status {status}: {last_words}"
                if status == -signal.SIGKILL:
                    reason = f"stopped after {time.monotonic() - began:.0f} s"
                self._keep(name, record, {"case": case, "status": "failed", "reason": reason})
                seen.append(case)
            if status == 0:
                record["status"] = "done"
                return
            if len(seen) == before or time.monotonic() + 10.0 > deadline:
                record |= {"status": "failed", "reason": f"the process ended with status {status}: {last_words}"}
                self._progress(f"{name}: failed, {record['reason']}")
                for case in every:
                    if case not in seen:
                        self._keep(name, record, {"case": case, "status": "skipped", "reason": "not reached"})
                return
            self._progress(f"{name}: another process goes on")

    def _attempt(
        self, name: str, record: dict[str, Any], deadline: float, every: list[str], seen: list[str]
    ) -> tuple[int, tuple[str, float] | None, str]:
        """One process: exit status, the case that it left unfinished and when that began, last line of its errors.

        Puts the section's cases into `every`, and adds those that were reported to `seen`.
        """
        command = [sys.executable, "-m", f"{__package__}.worker", name, "--device", self.device]
        command += ["--seconds", f"{deadline - time.monotonic():.1f}"]
        command += ["--quick"] * self.quick + ["--flush-l2"] * self.flush + (["--skip", *seen] if seen else [])
        running, errors, fatal = None, deque(maxlen=5), None
        status, limit = -signal.SIGKILL, Deadline(deadline + GRACE)
        with (self.out / "log.txt").open("a") as log:
            for line in stream(command, limit):
                if isinstance(line, int):
                    status = line
                elif line.error or not line.text.startswith(EVENT):
                    log.write(f"{name}: {line.text}\n")
                    log.flush()
                    if line.error and line.text.strip():
                        errors.append(line.text.strip())
                else:
                    event = json.loads(line.text.removeprefix(EVENT))
                    fatal = event.get("fatal", fatal)
                    if "machine" in event:
                        self.results["machine"] |= event["machine"]
                    elif "cases" in event:
                        every[:] = event["cases"]
                    elif event.get("status") == "running":
                        running = event["case"], time.monotonic()
                        limit.at = min(deadline + GRACE, running[1] + (event["limit"] or math.inf))
                    elif "case" in event:
                        self._keep(name, record, event)
                        seen.append(event["case"])
                        running, limit.at = None, deadline + GRACE
        return status, running, fatal or (errors[-1] if errors else "it printed no error")

    def _keep(self, name: str, record: dict[str, Any], event: dict[str, Any]) -> None:
        record["cases"].append(event)
        self._write()
        self._progress(f"{name}: {event['case']}: {report.case_line(event)}")


def commit_of(root: Path) -> str:
    """The checked-out commit as .git says, without git; "unknown" in a copy that has no .git."""
    try:
        head = (root / ".git" / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        loose = root / ".git" / name
        if loose.exists():
            return loose.read_text().strip()
        packed = (root / ".git" / "packed-refs").read_text().splitlines()
        return next(line.split()[0] for line in packed if line.endswith(f" {name}"))
    except (OSError, StopIteration):
        return "unknown"
