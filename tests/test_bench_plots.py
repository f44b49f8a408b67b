"""The pictures and the page of benchmarks, from a report as pytest-benchmark writes it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from bench import plots

ROOT = Path(__file__).parent.parent


def row(name, median_ms, sweep=None):
    ours = median_ms["ours"]
    info = {"median_ms": median_ms, "times_ours": {k: v / ours for k, v in median_ms.items() if k != "ours"}}
    return {
        "name": f"test_{name}",
        "fullname": f"bench/bench_{name[0]}.py::test_{name}",
        "extra_info": info | ({"sweep": sweep} if sweep else {}),
    }


@pytest.fixture
def report(tmp_path):
    sweep = {"figure": "attention over N", "of": "tokens N"}
    rows = [row("a[x]", {"ours": 2.0, "sdpa": 3.0}), row("a[y]", {"ours": 4.0, "eager": 40.0})]
    rows += [row(f"b[{n}]", {"ours": n / 64, "products alone": n / 128}, sweep | {"at": n}) for n in (256, 64)]
    found = {
        "machine_info": {"cpu": {"brand_raw": "A processor"}},
        "commit_info": {"id": "0123456789abcdef"},
        "datetime": "2030-01-02T03:04:05",
        "benchmarks": [*rows, {"name": "plain", "fullname": "x::plain", "extra_info": {}}],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(found))
    return path


def test_page_and_pictures(report, tmp_path):
    """A picture for the sweep, one for the file; every figure in a table, with machine and commit."""
    paths = plots.write(plots.read(report), tmp_path / "out")
    assert [path.name for path in paths] == ["01.png", "02.png", "README.md"]
    text = paths[-1].read_text()
    assert "A processor; 2030-01-02T03:04:05; commit 0123456789ab; " in text and "torch 2." in text
    assert "## attention over N\n\n![attention over N](01.png)" in text and "## bench_a.py" in text
    assert "| a[y] | 4 |  | 40 |" in text and "| b[256] | 4 | 2 |" in text and "plain" not in text
    for path in paths[:-1]:
        with Image.open(path) as picture:
            assert picture.width > 400


def test_lines_of_a_sweep_are_in_order(report):
    found = [each for each in plots.read(report)["benchmarks"] if "sweep" in each["extra_info"]]
    (axes,) = plots.sweep_figure("attention over N", found).axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert list(lines["ours"].get_xdata()) == [64, 256] and list(lines["ours"].get_ydata()) == [1.0, 4.0]
    assert lines["products alone"].get_linestyle() == ":"


def test_other_files_are_refused(report, tmp_path):
    for text, message in (
        ("{", "expected a report of pytest-benchmark"),
        ('{"benchmarks": []}', "with ratios, got none"),
    ):
        report.write_text(text)
        with pytest.raises(ValueError, match=message):
            plots.read(report)
    command = [sys.executable, "-m", "bench.plots", str(report), "--out", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("bench.plots: ") and not (tmp_path / "none").exists()
