"""How bench/gpu_suite runs its sections: time limits, crashes, results, and the command."""

import itertools
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")


# -------------------------------------------------------------------------------------------- one section in a process


def scripted(suite, monkeypatch, cases):
    monkeypatch.setattr(suite.selection, "cases", lambda context: cases)


def test_what_a_case_raises_is_reported_and_the_next_one_runs(suite, context, monkeypatch):
    def raises(error):
        def rows():
            raise error

        return rows

    Case = suite.context.Case
    scripted(
        suite,
        monkeypatch,
        [
            Case("broken", 1.0, raises(KeyError("x"))),
            Case("memory", 1.0, raises(torch.OutOfMemoryError("need 3 GiB\nmore"))),
            Case("absent", 1.0, raises(suite.context.UnavailableError("needs a GPU"))),
            Case("seen", 1.0, raises(AssertionError("skipped cases do not run"))),
            Case("fine", 1.0, lambda: [{"way": "ours", "us": 1.23456789, "bad": float("nan"), "n": [float("inf")]}]),
        ],
    )
    events = []
    suite.worker.run_section("selection", context, events.append, ["seen"])
    found = {event["case"]: event for event in events if event.get("status") not in (None, "running")}
    assert {name: event["status"] for name, event in found.items()} == {
        "broken": "failed",
        "memory": "failed",
        "absent": "skipped",
        "fine": "done",
    }
    assert found["broken"]["reason"] == "KeyError: 'x'"
    assert found["memory"]["reason"] == "out of memory: need 3 GiB"
    assert found["absent"]["reason"] == "needs a GPU"
    assert found["fine"]["rows"] == [{"way": "ours", "us": 1.2346, "bad": "nan", "n": ["inf"]}]


def test_a_case_that_does_not_fit_is_skipped_and_a_shorter_one_runs(suite, monkeypatch):
    Case = suite.context.Case
    scripted(suite, monkeypatch, [Case("long", 50.0, list), Case("short", 1.0, list)])
    context, events = suite.context.Context(CPU, suite.timing.HostClock(), quick=False), []
    suite.worker.run_section("selection", context, events.append, seconds=20.0)
    skipped, running, done = events[1:]
    assert skipped["status"] == "skipped" and "takes about 50 s, and 20 s of" in skipped["reason"]
    assert running == {"case": "short", "status": "running", "limit": 24.0} and done["status"] == "done"


def test_a_device_that_answers_no_more_ends_the_process(suite, monkeypatch):
    def dead():
        raise RuntimeError("an illegal memory access\nmore")

    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    context = suite.context.Context(torch.device("cuda", 0), suite.timing.HostClock(), quick=True)
    with pytest.raises(suite.context.PoisonedError, match=r"^flash: ValueError: first$"):
        context.failure("flash", ValueError("first\nsecond"))
    scripted(suite, monkeypatch, [suite.context.Case("a", 1.0, list), suite.context.Case("b", 1.0, list)])
    events = []
    with pytest.raises(suite.context.PoisonedError, match=r"^an illegal memory access$"):
        suite.worker.run_section("selection", context, events.append)
    assert [event["case"] for event in events if event.get("status") == "done"] == ["a"]


# ----------------------------------------------------------------------------------------------------------- conductor


def python(suite, code, seconds=20.0):
    deadline = suite.conductor.Deadline(time.monotonic() + seconds)
    return list(suite.conductor.stream([sys.executable, "-c", code], deadline))


def test_stream_gives_lines_and_exit_status(suite):
    found = python(suite, "import sys; print('one'); print('two', file=sys.stderr); sys.exit(4)")
    assert found[-1] == 4
    assert sorted(found[:-1]) == [("one", False), ("two", True)]


def test_stream_kills_at_the_deadline_children_too(suite, tmp_path):
    child = "import time, pathlib, sys; time.sleep(2); pathlib.Path(sys.argv[1]).write_text('alive')"
    code = (
        f"import subprocess, sys; print(1); subprocess.run([sys.executable, '-c', {child!r}, {str(tmp_path / 'x')!r}])"
    )
    began = time.monotonic()
    assert python(suite, code, seconds=1.0)[-1] == -signal.SIGKILL
    assert time.monotonic() - began < 2.0
    time.sleep(max(0.0, began + 3.5 - time.monotonic()))
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("device", "kept"), [("cuda", False), ("cpu", True)])
def test_the_interpreter_never_times_a_gpu(suite, monkeypatch, device, kept):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    code = "import os; print(os.environ.get('TRITON_INTERPRET'))"
    deadline = suite.conductor.Deadline(time.monotonic() + 20.0)
    line, _ = suite.conductor.stream([sys.executable, "-c", code, device], deadline)
    assert line.text == ("1" if kept else "None")


class Script:
    """Stands in for `stream`: each process plays the next list of events, and ends with its last entry."""

    def __init__(self, suite, monkeypatch, *processes):
        self.processes, self.commands, self.deadlines = list(processes), [], []
        self._conductor = suite.conductor
        monkeypatch.setattr(suite.conductor, "stream", self.stream)

    def stream(self, command, deadline):
        self.commands.append(command)
        for entry in self.processes.pop(0):
            if isinstance(entry, dict):
                yield self._conductor.Line(self._conductor.EVENT + json.dumps(entry), False)
                self.deadlines.append(deadline.at)
            elif isinstance(entry, str):
                yield self._conductor.Line(entry, True)
            else:
                yield entry


def a_suite(suite, tmp_path, budget=500.0, **options):
    said = []
    options = {"device": "cuda", "quick": False, "flush": False, "command": "x", "commit": "c0ffee"} | options
    made = suite.conductor.Suite(tmp_path, budget=budget, say=said.append, **options)
    return made, said


def running(name, limit=44.0):
    return {"case": name, "status": "running", "limit": limit}


def done(name, rows=()):
    return {"case": name, "status": "done", "seconds": 1.0, "rows": list(rows)}


def test_a_crash_costs_one_case(suite, tmp_path, monkeypatch):
    cases = {"cases": ["a", "b", "c", "d"]}
    script = Script(
        suite,
        monkeypatch,
        [{"machine": {"platform": "Linux"}}, cases, running("a"), done("a"), running("b"), "Segmentation fault", -11],
        [cases, running("c"), {"case": "c", "status": "failed", "reason": "PoisonedError", "seconds": 1.0}, 3],
        [cases, running("d"), done("d"), 0],
    )
    made, said = a_suite(suite, tmp_path, flush=True)
    assert made.run(["selection"]) is False
    section = made.results["sections"]["selection"]
    assert section["status"] == "done"
    assert [(case["case"], case["status"]) for case in section["cases"]] == [
        ("a", "done"),
        ("b", "failed"),
        ("c", "failed"),
        ("d", "done"),
    ]
    assert section["cases"][1]["reason"] == "the process ended with status -11: Segmentation fault"
    assert script.commands[0][2:5] == ["bench.gpu_suite.worker", "selection", "--device"]
    assert "--flush-l2" in script.commands[0] and "--quick" not in script.commands[0]
    assert script.commands[2][-4:] == ["--skip", "a", "b", "c"]
    assert sum("another process goes on" in line for line in said) == 2
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == made.results and written["machine"] == {"platform": "Linux"} and written["commit"] == "c0ffee"
    assert "Segmentation fault" in (tmp_path / "log.txt").read_text()
    assert "status -11: Segmentation fault" in (tmp_path / "results.md").read_text()


def test_a_case_that_hangs_is_stopped_at_its_own_limit(suite, tmp_path, monkeypatch):
    cases = {"cases": ["a", "b"]}
    script = Script(
        suite,
        monkeypatch,
        [cases, running("a"), done("a"), running("b", None), done("b"), running("c"), -9],
        [cases, 0],
    )
    made, _ = a_suite(suite, tmp_path)
    began = time.monotonic()
    made.run(["selection"])
    start, first, after, unlimited, *_ = (round(at - began) for at in script.deadlines)
    assert first == 44 and start == after == unlimited == 517  # 500, less the reserve, more the grace
    assert made.results["sections"]["selection"]["cases"][-1]["reason"] == "stopped after 0 s"


def test_a_section_that_cannot_start_says_so_once(suite, tmp_path, monkeypatch):
    script = Script(suite, monkeypatch, [{"fatal": "PyTorch finds no CUDA device"}, 1])
    made, _ = a_suite(suite, tmp_path)
    assert made.run(["attention"]) is False
    reason = "the process ended with status 1: PyTorch finds no CUDA device"
    assert made.results["sections"]["attention"] | {"seconds": 0} == {
        "status": "failed",
        "reason": reason,
        "cases": [],
        "seconds": 0,
    }
    assert len(script.commands) == 1
    assert suite.report.failures(made.results) == [f"attention: {reason}"]


def test_cases_that_were_not_reached_are_listed(suite, tmp_path, monkeypatch):
    Script(suite, monkeypatch, [{"cases": ["a", "b", "c"]}, running("a"), "late", -9])
    made, _ = a_suite(suite, tmp_path)
    monkeypatch.setattr(made, "end", time.monotonic() + 9.0)
    monkeypatch.setattr(suite.conductor, "SECTIONS", {"selection": suite.conductor.Section(1.0, 1.0)})
    made.run(["selection"])
    cases = made.results["sections"]["selection"]["cases"]
    assert [(case["case"], case["status"], case["reason"]) for case in cases[1:]] == [
        ("b", "skipped", "not reached"),
        ("c", "skipped", "not reached"),
    ]


def test_time_is_shared_by_weight_and_what_is_left_over_is_passed_on(suite, tmp_path, monkeypatch):
    Section = suite.conductor.Section
    sections = {"attention": Section(0.2, 5.0), "selection": Section(0.1, 5.0), "llava": Section(0.1, 300.0)}
    monkeypatch.setattr(suite.conductor, "SECTIONS", sections)
    made, said = a_suite(suite, tmp_path, budget=403.0)
    given = []

    def measure(name, record, deadline):
        given.append((name, round(deadline - time.monotonic())))
        record["status"] = "done"

    monkeypatch.setattr(made, "_measure", measure)
    assert made.run(list(sections)) is True
    assert given == [("attention", 200), ("selection", 200), ("llava", 400)]
    sections["llava"] = Section(0.1, 500.0)
    made.run(list(sections))
    assert made.results["sections"]["llava"]["status"] == "skipped"
    assert "llava: skipped, needs 500 s; its share of the time left is 400 s" in said[-1]


def test_commit_from_git_files(suite, tmp_path):
    commit_of, git = suite.conductor.commit_of, tmp_path / ".git"
    assert commit_of(tmp_path) == "unknown"
    (git / "refs" / "heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    assert commit_of(tmp_path) == "unknown"
    (git / "packed-refs").write_text("# pack\nbbbb refs/heads/other\naaaa refs/heads/main\n")
    assert commit_of(tmp_path) == "aaaa"
    (git / "refs" / "heads" / "main").write_text("cccc\n")
    assert commit_of(tmp_path) == "cccc"
    (git / "HEAD").write_text("dddd\n")
    assert commit_of(tmp_path) == "dddd"


# --------------------------------------------------------------------------------------------------------------- tests

PYTEST_OUTPUT = """\
tests/test_gpu_a.py::test_one[bf16 x] PASSED                             [ 10%]
tests/test_gpu_a.py::test_two SKIPPED (no second GPU)                    [ 20%]
tests/test_gpu_a.py::test_three FAILED                                   [ 30%]
tests/test_gpu_a.py::test_four ERROR                                     [ 40%]
tests/test_gpu_b.py::test_five[a b] PASSED                               [ 50%]
tests/test_gpu_b.py::test_six FAILED                                     [ 60%]
tests/test_gpu_b.py::test_seven
=================================== FAILURES ===================================
FAILED tests/test_gpu_a.py::test_three - AssertionError: scores differ
ERROR tests/test_gpu_a.py::test_four - RuntimeError: CUDA
FAILED tests/test_gpu_b.py::test_six - ValueError
"""


def test_outcomes_are_read_off_pytest(suite):
    counts = suite.gpu_tests.Counts()
    shown = [counts.read(line) for line in PYTEST_OUTPUT.splitlines()]
    assert [text for text in shown if text] == [
        "failed tests/test_gpu_a.py::test_three",
        "error tests/test_gpu_a.py::test_four",
        "failed tests/test_gpu_b.py::test_six",
    ]
    found = counts.summary(1)
    assert found["outcomes"] == {"passed": 2, "skipped": 1, "failed": 2, "error": 1}
    assert found["failed tests"] == [
        "tests/test_gpu_a.py::test_three - AssertionError: scores differ",
        "tests/test_gpu_a.py::test_four - RuntimeError: CUDA",
        "tests/test_gpu_b.py::test_six - ValueError",
    ]
    assert found["status"] == "failed" and found["reason"] == "1 error, 2 failed, 2 passed, 1 skipped"


def test_every_twentieth_test_shows(suite):
    counts = suite.gpu_tests.Counts()
    shown = [counts.read(f"tests/test_a.py::test_{i} PASSED [ 1%]") for i in range(45)]
    assert [text for text in shown if text] == ["20 tests done", "40 tests done"]
    assert counts.summary(0)["status"] == "done" and counts.summary(0)["reason"] == "45 passed"


def test_how_pytest_ended(suite, monkeypatch):
    counts = suite.gpu_tests.Counts()
    counts.read("tests/test_a.py::test_a PASSED [ 1%]")
    assert counts.summary(-9) | {"outcomes": 0} == {
        "outcomes": 0,
        "failed tests": [],
        "status": "failed",
        "reason": "stopped before the end (1 passed)",
    }
    assert counts.summary(5)["status"] == "skipped"
    counts.read("ImportError: no module")
    assert counts.summary(4)["reason"] == "1 passed; ImportError: no module"
    monkeypatch.setattr(suite.gpu_tests.importlib.util, "find_spec", lambda name: None)
    assert counts.summary(1)["reason"] == "pytest is not installed" and counts.summary(1)["status"] == "skipped"


def test_the_command_runs_the_gpu_tests_and_nothing_else(suite, tmp_path):
    made, _ = a_suite(suite, tmp_path, quick=True, device="cpu")
    record = {}
    made._tests("tests", record, time.monotonic() + 60.0)
    assert record["status"] == "done"
    listed = (tmp_path / "tests.log").read_text()
    assert "tests/test_gpu_attention.py::test_compiled" in listed
    assert "tests/gpu_suite/test_measuring.py::test_the_cuda_clock_on_a_gpu" in listed
    assert "tests/gpu_suite/test_measuring.py::test_attention_section" not in listed


def test_several_processes_run_every_gpu_test_once(suite, tmp_path, monkeypatch, capsys):
    """A file without such tests is left alone: it may need a package that is not here."""
    marks = "@pytest.mark.gpu\n@pytest.mark.parametrize('i', range(5))\n"
    files = {"test_a.py": f"import pytest\n{marks}def test_one(i):\n    assert i != 3\n", "test_b.py": "import absent"}
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu")
    for name, text in files.items():
        (tmp_path / "tests" / name).write_text(text)
    monkeypatch.setattr(suite.gpu_tests, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    options = suite.gpu_tests.command("python", quick=False)[3:]
    assert suite.gpu_tests.run(options, processes=3) == 1
    counts = suite.gpu_tests.Counts()
    for line in capsys.readouterr().out.splitlines():
        counts.read(line)
    assert counts.outcomes == {"passed": 4, "failed": 1}
    assert counts.failed == ["tests/test_a.py::test_one[3] - assert 3 != 3"]
    assert suite.gpu_tests.run([*options, "-k", "one and 2"], processes=3) == 0
    assert suite.gpu_tests.run([*options, "-k", "two"], processes=2) == 5


# -------------------------------------------------------------------------------------------------------------- report


def a_report():
    def row(way, us, graph_us=None, **more):
        return {"way": way, "us": us} | ({} if graph_us is None else {"graph us": graph_us}) | more

    fused, alone = {"computes": "output + scores"}, {"computes": "scores only"}
    clip = [
        row("ours", 30.0, 12.0, **fused),
        row("sdpa", 25.0, 10.0, **fused),
        row("sdpa cudnn", 40.0, 8.0, **fused),
        row("eager", 99.0, **fused, **{"no graph": "it waits"}),
        {"way": "flash-attn", "failure": "flash_attn cannot be imported", **fused},
        row("ours", 20.0, 5.0, **alone),
        row("flash-colreduce", 30.0, 16.0, **alone),
    ]
    paths = [
        row("passes", 50.0),
        row("passes, launch 2: scores_kernel 64x64 w4 s3", 6.0, 4.0),
        row("cudnn, launch 1: scores_kernel 64x64 w4 s3", 6.0, 3.0),
        row("FlagAttention, scores pass", 9.0, 6.0),
        {"way": "sweeps", "failure": "wrong: errors 1"},
        {"way": "strip", "failure": "OutOfResources: shared memory"},
    ]
    selection = [row("ours", 10.0, 4.0), row("fixed-size chain", 60.0, 30.0), row("released chain", 150.0)]
    encoder = [row("scored and pruned", 5000.0, 990.0), row("sdpa", 4000.0, 1000.0), row("released code", 11000.0)]
    sections = {
        "attention": [
            done("CLIP-L B=1", clip),
            done("CLIP-L B=8", clip),
            done("Qwen 16384", [row("ours", 1.0, **{"extra MiB": 100.0}, **fused)]),
            {"case": "DeiT B=64", "status": "skipped", "reason": "no time"},
        ],
        "paths": [done("CLIP-L B=8", paths)],
        "selection": [done("CLIP-L 576 to 192, B=1", selection)],
        "encoder": [done("CLIP-L/14-336 B=8", encoder), {"case": "x", "status": "failed", "reason": "out of memory"}],
        "llava": [
            done("LLaVA-1.5-7B B=8, unpruned", [{"way": "unpruned", "prefill ms": 90.0, "prefill GPU ms": 80.0}]),
            done("LLaVA-1.5-7B B=8, 64 tokens", [{"way": "64 tokens", "prefill ms": 40.0, "prefill GPU ms": 20.0}]),
            done("LLaVA-1.5-7B B=1, 64 tokens", [{"way": "64 tokens", "prefill ms": 40.0}]),
        ],
    }
    return {
        "command": "python -m bench.gpu_suite",
        "commit": "c0ffee",
        "date": "today",
        "quick": False,
        "machine": {
            "versions": {"torch": "2.11"},
            "devices": ["cuda:0: H200"],
            "rates": {"flops": 7.9e14, "bytes": 4.3e12, "exps": 4e12},
        },
        "sections": {
            **{name: {"status": "done", "cases": cases} for name, cases in sections.items()},
            "tests": {"status": "failed", "reason": "1 failed", "failed tests": ["tests/a.py::b"], "cases": []},
        },
    }


def test_goals_are_computed_from_the_rows(suite):
    values = {goal.text: (goal.value, goal.verdict) for goal in suite.report.goals(a_report())}
    measured = {text: value for text, value in values.items() if value[0] is not None}
    assert measured == {
        "CLIP-L B=1: output + scores / fastest SDPA": (1.5, "realistic"),
        "CLIP-L B=8: output + scores / fastest SDPA": (1.5, "realistic"),
        "CLIP-L B=8: flash-colreduce / scores only": (pytest.approx(3.2), "moonshot"),
        "CLIP-L B=8: FlagAttention's scores pass / ours": (2.0, "realistic"),
        "selection: the eager torch chain / ours, launched": (15.0, "realistic"),
        "selection: the torch chain without waits / ours, in CUDA graphs": (7.5, "moonshot"),
        "encoder B=8: scored and pruned / SDPA": (0.99, "realistic"),
        "encoder B=8: scored and pruned / SDPA, launched": (1.25, "missed"),
        "encoder B=8: released code / scored and pruned, launched": (2.2, "realistic"),
        "LLaVA-1.5-7B B=8: prefill, unpruned / 64 tokens": (2.25, "realistic"),
        "LLaVA-1.5-7B B=8: prefill, GPU time alone, unpruned / 64 tokens": (4.0, "moonshot"),
        "Qwen 16384: extra memory, in copies of the queries": (2.5, "moonshot"),
    }
    assert values["V-JEPA2 B=8: output + scores / fastest SDPA"] == (None, "not measured")
    assert suite.report.Goal("", 1.0, 0.9, 1.1).verdict == "missed"


def test_failures_are_defects_and_not_what_is_absent(suite):
    results = a_report()
    assert suite.report.failures(results) == [
        "paths, CLIP-L B=8, sweeps: wrong: errors 1",
        "encoder, x: out of memory",
        "tests: 1 failed",
    ]
    results["sections"]["attention"]["cases"][0]["rows"][0] = {"way": "ours", "failure": "wrong", "computes": "O"}
    assert suite.report.failures(results)[0] == "attention, CLIP-L B=1, O: wrong"


def test_markdown(suite):
    text = suite.report.markdown(a_report())
    assert "790 TFLOP/s" in text and "4.30 TB/s" in text and "commit c0ffee" in text and "- cuda:0: H200" in text
    assert "| CLIP-L B=1 | sdpa cudnn | 40 | 8 | output + scores |" in text
    assert "- flash-attn: flash_attn cannot be imported: CLIP-L B=1, CLIP-L B=8" in text
    assert "- eager, no graph: it waits: CLIP-L B=1, CLIP-L B=8" in text
    assert "- skipped: no time: DeiT B=64" in text
    assert "## tests: failed" in text and "- tests/a.py::b" in text
    assert "dry run" not in text and "dry run" in suite.report.markdown(a_report() | {"quick": True})
    lines = text.splitlines()
    for head in (i for i, line in enumerate(lines) if line.startswith("|---")):
        table = itertools.takewhile(lambda line: line.startswith("|"), lines[head - 1 :])
        assert len({line.count("|") for line in table}) == 1


def test_a_case_in_one_line(suite):
    line = suite.report.case_line(a_report()["sections"]["selection"]["cases"][0])
    assert line == "1.0 s; ours 4 us"
    rows = [{"way": "ours", "failure": "wrong"}, {"way": "sdpa", "us": 1.0, "x ours": 0.5, "x ours, graph": 0.75}]
    assert suite.report.case_line(done("a", rows)) == "1.0 s; ours FAILED, wrong, sdpa 0.75x"
    rows = [{"way": "192 tokens", "prefill ms": 12.5, "decode ms": 3.25}]
    assert suite.report.case_line(done("a", rows)).endswith("192 tokens prefill 12.5 ms, decode 3.25 ms")


# ------------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("arguments", "sections"),
    [
        ([], "tests attention encoder selection operators llava paths sanitizer"),
        (["--tune", "--skip-tests"], "attention encoder selection operators llava paths sanitizer tune"),
        (["--only", "paths", "attention"], "attention paths"),
        (["--only", "paths", "--tune"], "paths tune"),
    ],
)
def test_sections_of_a_command_in_order_of_importance(suite, tmp_path, monkeypatch, arguments, sections):
    chosen = []
    monkeypatch.setattr(suite.conductor.Suite, "run", lambda self, names: chosen.extend(names) or True)
    assert suite.__main__.main([*arguments, "--out", str(tmp_path), "--commit", "abc"]) == 0
    assert " ".join(chosen) == sections


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--budget-s", "0"], ["--only", "nothing"]])
def test_impossible_commands(suite, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        suite.__main__.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_a_dry_run_from_the_command_line(tmp_path):
    command = [sys.executable, "-m", "bench.gpu_suite", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    run = subprocess.run([*command, "--only", "selection"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    (section,) = results["sections"].values()
    assert section["status"] == "done" and len(section["cases"]) == 6
    assert all(row["us"] > 0 for case in section["cases"] for row in case["rows"])
    assert results["machine"]["versions"]["torch"] == torch.__version__
    assert results["command"].startswith("python -m bench.gpu_suite --quick --device cpu")
    assert "A dry run" in (tmp_path / "results.md").read_text()


def test_without_a_gpu_it_fails_and_says_why(suite, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "bench.gpu_suite.worker", "selection"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 1
    assert run.stdout == '@event {"fatal": "PyTorch finds no CUDA device"}\n'


def test_what_triton_lacks_to_launch_is_named(suite, monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton is not installed")

    class Active:
        @property
        def utils(self):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=Active()))
    assert suite.worker.launch_gap().endswith("C compiler and Python.h (RuntimeError: Failed to find C compiler.)")
    monkeypatch.setattr(Active, "utils", None)
    assert suite.worker.launch_gap() == ""


def test_every_path_of_the_kernels_in_tritons_interpreter():
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-c", _PATHS, str(ROOT)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={"TRITON_INTERPRET": "1"})
    assert run.returncode == 0, run.stdout + run.stderr
    paths, tuned = (json.loads(line) for line in run.stdout.splitlines())
    timed = {row["way"] for row in paths if "us" in row}
    assert {"strip", "sweeps", "passes", "scores only, sweeps", "scores only, passes"} <= timed
    assert any(way.startswith("passes, launch 2: scores_kernel") for way in timed)
    assert not any(row.get("failure", "").startswith("wrong") for row in paths + tuned)
    for kernel in ("sweeps", "output and LSE", "LSE alone", "scores pass", "strip"):
        assert any(row["way"].startswith(kernel) and row["us"] > 0 for row in tuned)


_PATHS = """
import json, sys
import torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from bench.gpu_suite import attention, context, paths, timing
attention.quick = lambda shape: shape._replace(B=1, H=1, N=20, D=16)
quick = context.Context(torch.device("cpu"), timing.HostClock(), quick=True)
for cases in (paths.path_cases, paths.tune_cases):
    print(json.dumps(cases(quick)[0].rows()))
"""
