"""The demonstration at a tiny size: the same code as at CLIP-L's, with another config."""

import functools
import json
import math

import pytest
import torch
from models import tiny_clip_config
from PIL import Image

from hiprune_kernels import cli, demo, efficiency, is_patched, reference
from hiprune_kernels.demo_answers import WAYS as ANSWERED
from hiprune_kernels.loading import load_encoder

WAYS = ["released code", "eager", "sdpa", "hiprune_kernels"]


@pytest.fixture(scope="module")
def ways():
    return demo._Ways(load_encoder(config=tiny_clip_config()), budget=12, seed=0)


@pytest.fixture(scope="module")
def runs(ways):
    pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return {way: ways.run(way, pixels) for way in WAYS}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run through the command line: its directory, its report and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "new" / "out"
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "QUICK_SECONDS", 0.0)
        patch.setattr(demo, "run_demo", functools.partial(demo.run_demo, config=tiny_clip_config()))
        printed = []
        patch.setattr("builtins.print", lambda *args, sep=" ", **_: printed.append(sep.join(map(str, args))))
        assert cli.main(["demo", "--quick", "--threads", "1", "--out", str(out)]) == 0
    assert torch.get_num_threads() == threads
    return out, json.loads((out / "report.json").read_text()), "\n".join(printed)


def test_the_report_has_every_way_with_its_tokens(finished):
    _, report, _ = finished
    assert [row["way"] for row in report["rows"]] == WAYS
    assert [row["image_tokens"] for row in report["rows"]] == [12, 36, 36, 12]
    assert [row["prompt_tokens"] for row in report["rows"]] == [53, 77, 77, 53]  # and 41 of text
    assert report["rows"][0]["speedup"] == 1.0
    for row in report["rows"]:
        assert len(row["encoder_samples_ms"]) == report["rounds"] == 1
        assert 0 < row["encoder_ms"] < row["generate_ms"]
        assert row["speedup"] == pytest.approx(report["rows"][0]["encoder_ms"] / row["encoder_ms"])
    assert (report["budget"], report["tokens"], report["object_layer"], report["deep_layer"]) == (12, 36, 2, 4)
    assert report["random_weights"] and 0 < report["largest_feature_difference"] < 1e-4
    assert report["environment"]["devices"][0].endswith("1 threads in use")


def test_kept_tokens_equal_the_float64_reference(finished):
    _, report, _ = finished
    (line,) = report["agreement"]
    assert line["photo"] == "astronaut" and line["equal"] == {"released code": 12, "hiprune_kernels": 12}
    assert 0 < line["score_error"] < 1e-5 < line["gap"]


def test_report_and_pictures_are_written(finished):
    out, report, printed = finished
    text = (out / "report.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["answers.png", "astronaut.png", "report.json", "report.md", *report["trained"]["pictures"].values()]
    )
    assert report["trained"]["note"] in text and report["trained"]["note"] in printed
    assert len(report["trained"]["pictures"]) == (0 if "Nothing of a trained" in printed else 2)
    assert all(f"({name})" in text for name in report["trained"]["pictures"].values())
    answers = report["answers"]
    assert [way["way"] for way in answers["ways"]] == list(ANSWERED) and answers["questions"] == 27
    whole, *_, random = (way["accuracy"] for way in answers["ways"])
    assert 1 >= whole > 0.9 > random and "![questions, answers and kept tokens](answers.png)" in text
    assert f"| all 144 tokens | {100 * whole:.1f} +- " in text and "a third: HiPrune, 48" in printed
    with Image.open(out / "answers.png") as picture:
        assert picture.width > 1000
    assert Image.open(out / "astronaut.png").width > 4 * 168
    assert "![astronaut](astronaut.png)" in text
    assert report["command"] == f"hiprune demo --out {out} --quick --threads 1" and report["command"] in text
    for row in demo.table_rows(report):
        assert f"| {' | '.join(row)} |" in text
        assert any(line.split("  ")[0] == row[0] and line.split()[-1] == row[-1] for line in printed.splitlines())
    for fact in (*demo.notes(report), *demo.agreement_lines(report)):
        assert fact in text and fact in printed
    assert "weights are random" in printed and str(out / "report.md") in printed


def test_all_photographs_without_quick(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "SECONDS", 0.0)
    report = demo.run_demo(tmp_path, config=tiny_clip_config(image_size=32), threads=1)
    assert [line["photo"] for line in report["agreement"]] == list(demo.PHOTOS)
    assert report["rounds"] == 3
    assert all((tmp_path / f"{name}.png").is_file() for name in demo.PHOTOS)
    assert report["command"] == "hiprune demo" and report["budget"] == 5  # a third of 16


def test_every_way_gives_the_same_features(ways, runs):
    assert ways.check(runs) < 1e-5
    assert runs["eager"].kept is None and runs["sdpa"].kept is None
    assert runs["released code"].kept.tolist() == runs["hiprune_kernels"].kept.tolist()
    assert not is_patched(ways.llava)


def test_wrong_features_and_wrong_lengths_are_found(ways, runs):
    ours = runs["hiprune_kernels"]
    shifted = demo.Run(ours.prompt, (ours.kept + 1).clamp(max=35), 1.0, 1.0, None)
    with pytest.raises(RuntimeError, match="hiprune_kernels: the kept image features differ"):
        ways.check({**runs, "hiprune_kernels": shifted})
    short = demo.Run(ours.prompt[:-1], ours.kept, 1.0, 1.0, None)
    with pytest.raises(RuntimeError, match="expected a prompt of 53 tokens, got 52"):
        ways.check({**runs, "hiprune_kernels": short})


@pytest.mark.parametrize(("grid", "budget"), [((6, 6), 12), ((24, 24), 192), ((5, 9), 40)])
def test_the_released_chain_is_the_official_rule(grid, budget):
    generator = torch.Generator().manual_seed(budget)
    for _ in range(20):
        scores = torch.rand(2, math.prod(grid), generator=generator) / math.prod(grid)
        expected, _ = reference.select_tokens(scores[:1], scores[1:], budget=budget, grid=grid, rule="official")
        assert torch.equal(demo._released_selection(scores[0], scores[1], budget, grid), expected[0])


def test_the_float64_scores_are_those_of_the_attention_matrices():
    tower = load_encoder(config=tiny_clip_config())
    pixels = torch.randn(2, 3, 48, 48)
    found = demo._float64_scores(tower, pixels)
    tower.encoder.set_attn_implementation("eager")
    attentions = tower.encoder.double()(pixels.double(), output_attentions=True).attentions
    for scores, layer in zip(found, (2, 4)):
        expected = attentions[layer - 1].mean(dim=1).sum(dim=1)
        assert scores.dtype == torch.float64 and (scores - expected).abs().max() < 1e-5  # eager's softmax is float32


def test_the_gap_is_the_closest_decision():
    objects = torch.tensor([[9.0, 1.0, 5.0, 8.0, 2.0, 4.0, 3.0]])  # the first column is CLS
    deeps = torch.tensor([[0.0, 6.0, 1.0, 2.0, 4.0, 10.0, 5.5]])
    # Budget 3 of a 1 x 6 grid: round(0.1 * 3 / 5) = 0 anchors; registers 10, 6, 5.5, and 4 is the first passed over.
    indices, _, gap = demo._exact_selection([objects, deeps], 3, (1, 6))
    assert indices.tolist() == [0, 4, 5] and gap == pytest.approx(0.15)
    # One anchor, 20, far ahead; with the clamped corners 0, 19, 20, 21 and 39 are taken, whatever their deep scores.
    # 25 registers are left: 38 to 22 and 18 to 11, so that 11 stays and 10 goes.
    objects, deeps = torch.arange(-1.0, 40.0)[None], torch.arange(-1.0, 40.0)[None]
    objects[0, 21], deeps[0, 21] = 50.0, 40.0
    indices, roles, gap = demo._exact_selection([objects, deeps], 30, (1, 40))
    assert (roles == 1).nonzero().tolist() == [[20]] and 11 in indices and 10 not in indices
    assert gap == pytest.approx(1 / 40)


def test_disagreement_is_reported_with_the_gap():
    line = {"photo": "cat", "equal": {"a": 12, "b": 11}, "kept": 12, "score_error": 1e-6, "gap": 2e-8}
    (text,) = demo.agreement_lines({"agreement": [line]})
    assert "a 12 of 12, b 11 of 12" in text and "closest decision was by 2.0e-08" in text
    (text,) = demo.agreement_lines({"agreement": [{**line, "equal": {"a": 12}}]})
    assert "closest" not in text


def test_memory_is_not_available_where_linux_does_not_tell(monkeypatch, finished):
    _, report, _ = finished
    assert any(row["peak_mib"] is not None for row in report["rows"]) == (efficiency.reset_peak() is not None)

    def refused(self, *args, **kwargs):
        raise OSError("no such file")

    monkeypatch.setattr(demo.Path, "write_text", refused)
    assert efficiency.reset_peak() is None
    monkeypatch.setattr(demo.Path, "read_text", refused)
    assert efficiency.memory_kib("VmRSS") is None
    row = demo._row("sdpa", {WAYS[0]: [_run()], "sdpa": [_run()]}, 36)
    assert row.peak_mib is None and demo.table_rows({"rows": [vars(row)]})[0][3] == "n/a"


def _run():
    return demo.Run(torch.zeros(77, 8), None, 1.0, 1.0, None)


def test_peak_memory_sees_what_was_held_for_a_moment():
    held = efficiency.reset_peak()
    if held is None:
        pytest.skip("this system does not let a process reset its memory high-water mark")
    block = torch.ones(64 * 2**20 // 4)  # 64 MiB
    del block
    grown = (efficiency.memory_kib("VmHWM") - held) / 1024
    assert 60 < grown < 120


def test_notes_name_kernels_that_are_missing():
    report = {"remarks": ["first"], "random_weights": False, "environment": {"kernels": []}}
    assert demo.notes(report)[0] == "first" and len(demo.notes(report)) == 2
    kernel = {"device": "cpu", "operators": "attention", "implementation": "PyTorch", "reason": "not built"}
    report["environment"]["kernels"] = [kernel, {**kernel, "device": "cuda"}, {**kernel, "reason": ""}]
    assert demo.notes(report)[2:] == ["Not at full speed: attention runs in PyTorch, not built."]
