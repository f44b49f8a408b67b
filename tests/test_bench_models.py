"""The benchmark of real sizes, on tiny models: what it counts, and that it notices wrong features."""

import importlib
import re
from pathlib import Path

import pytest
import torch
from models import VLM_CASES, images, qwen_batch, tiny_clip, tiny_qwen
from patch_reference import one_thread  # noqa: F401

from hiprune_kernels.patch import Selection, vision


@pytest.fixture
def bench(monkeypatch):
    """The module, which is not installed; a single round of each model."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent)
    module = importlib.import_module("bench.bench_models_cpu")
    monkeypatch.setattr(module, "SECONDS", 0.0)
    return module


BUILDERS = {
    "clip": lambda: (tiny_clip(), {"pixel_values": images(1)}),
    "llava": VLM_CASES["llava"],
    "next": VLM_CASES["llava_next"],
    "qwen2.5": lambda: (tiny_qwen("qwen2.5"), qwen_batch("qwen2.5", [(3, (4, 6), 2, (3, 3), 2)])),
}


def tiny_case(bench, name):
    return bench.Case(name, BUILDERS[name], {"retention": 0.3})


@pytest.mark.parametrize("name", BUILDERS)
def test_counts_times_and_error(bench, name, monkeypatch):
    monkeypatch.setattr(bench, "SECONDS", 60.0)
    monkeypatch.setattr(bench, "MAX_ROUNDS", 3)
    result = bench.measure(tiny_case(bench, name))
    model, inputs = BUILDERS[name]()
    bench.hk.apply_hiprune(model, retention=0.3)
    with torch.no_grad():
        model(**inputs)
    selections = bench.hk.last_selection(model)
    assert result.tokens == sum(len(selection.roles) for selection in selections)
    assert result.kept == sum(len(selection.indices) for selection in selections) < result.tokens
    assert result.rounds == 3 and result.error < 1e-4
    assert 0 < result.last_layers_ms < result.sdpa_ms and 0 < result.last_layers_patched_ms < result.patched_ms
    assert (result.recorded_ms is None) == (name != "clip") and (result.connector_ms > 0) == (name != "clip")
    cells = bench.line(result).split("|")
    assert len(cells) == len(bench.HEADER.split("|")) + 2
    assert cells[2:4] == [f" {result.tokens} ", f" {result.kept} "]


@pytest.mark.parametrize("name", ["clip", "llava"])
def test_other_features_are_noticed(bench, name, monkeypatch):
    select = vision._select_rows

    def shifted(run):
        rows = select(run).clone()
        rows[:, 1] = rows[:, 1] % 36 + 1  # the first kept token's right neighbour
        return rows

    monkeypatch.setattr(vision, "_select_rows", shifted)
    with pytest.raises(RuntimeError, match=re.escape("the kept features differ from the stock model's by ")):
        bench.measure(tiny_case(bench, name))


def test_missing_rows_are_noticed(bench, monkeypatch):
    selection = Selection(torch.arange(10), torch.zeros(36, dtype=torch.uint8), (6, 6))
    monkeypatch.setattr(bench.hk, "last_selection", lambda model: [selection])
    stock = torch.randn(1, 36, 8)
    pruned = torch.zeros_like(stock)
    pruned[:, :9] = stock[:, :9]
    with pytest.raises(RuntimeError, match="expected features of 10 rows, got 9"):
        bench._kept_error(None, stock, pruned)


def test_tables_are_written(bench, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "models_cpu")
    monkeypatch.setattr(bench, "CASES", (tiny_case(bench, "clip"), tiny_case(bench, "llava")))
    monkeypatch.setattr("sys.argv", ["bench", "--write"])
    bench.main()
    printed = capsys.readouterr().out
    table = (tmp_path / "models_cpu.md").read_text()
    rows = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 3 and all(row in table for row in rows)
    figures = bench.json.loads((tmp_path / "models_cpu.json").read_text())
    assert (
        [result["name"] for result in figures["results"]] == ["clip", "llava"] and figures["commit"] and figures["date"]
    )
    monkeypatch.setattr("sys.argv", ["bench", "--only", "clip", "--write"])
    with pytest.raises(SystemExit):
        bench.main()
    monkeypatch.setattr("sys.argv", ["bench", "--only", "unheard of"])
    with pytest.raises(SystemExit):
        bench.main()
    errors = capsys.readouterr().err
    assert "--write: the table holds all models of one run" in errors and "contains 'unheard of'" in errors
