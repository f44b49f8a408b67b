"""The small LLaVA and its scenes: what it gets right, and that the check catches mistakes planted into the selection."""

import itertools
import json

import numpy as np
import pytest
import torch
from cli_helpers import error_of
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

import hiprune_kernels as hk
from bench.quality.mistakes import MISTAKES
from hiprune_kernels import cli
from hiprune_kernels.quality import QUESTIONS, ask, checkpoint, load, scenes, scenes_of

FLOOR, SHARES = 0.90, (0.83, 0.86)  # of right answers and of kept tokens on digits, HiPrune, 16 of 144 tokens


@pytest.fixture(scope="module")
def loaded():
    return load()


@pytest.fixture(scope="module")
def sixty():
    return scenes_of(60)


# -------------------------------------------------------------------------------------------------------------- scenes


def test_a_seed_gives_the_same_scene_everywhere():
    first = scenes.scene(7)
    assert [(t.digit, t.color, t.left, t.top) for t in first.things] == [
        (t.digit, t.color, t.left, t.top) for t in scenes.scene(7).things
    ]
    assert np.array_equal(first.pixels, scenes.scene(7).pixels)
    assert int(first.pixels.astype(np.int64).sum()) == 2591501
    assert not np.array_equal(first.pixels, scenes.scene(8).pixels)


def test_what_is_drawn_is_what_is_told():
    """Pixels on a digit have its color, digits are apart, ordered from left to right, and tokens belong to them."""
    for seed in range(20):
        made = scenes.scene(seed)
        assert 2 <= len(made.things) <= 4 and len({t.color for t in made.things}) == len(made.things)
        assert len({t.digit for t in made.things}) == len(made.things)
        middles = [2 * t.left + t.side for t in made.things]
        assert middles == sorted(middles) and all(b - a >= 12 for a, b in itertools.pairwise(middles))
        for i, thing in enumerate(made.things):
            color = np.median(made.pixels[made.owner == i].astype(int), axis=0)
            nearest = min(scenes.COLORS, key=lambda name: np.abs(color - scenes.COLORS[name]).sum())
            assert nearest == thing.color, (seed, thing)
            rows, columns = np.nonzero(made.owners == i)
            assert len(rows) and (rows * 8 + 8 > thing.top).all() and (columns * 8 < thing.left + thing.side).all()


def test_questions_have_their_answers():
    made = scenes.scene(3)
    asked = made.questions(np.random.default_rng(0))
    assert len(asked) == len(QUESTIONS) == 9
    answers = dict(asked)
    first, last = made.things[0], made.things[-1]
    assert answers["how many digits"] == scenes.NUMBERS[len(made.things)]
    assert answers["what digit is leftmost"] == scenes.NUMBERS[first.digit]
    assert answers["what color is rightmost"] == last.color
    assert answers["what color is background"] == made.background
    (about,) = (thing for thing in made.things if asked[0][0] == f"what digit is {thing.color}")
    assert asked[0][1] == scenes.NUMBERS[about.digit]
    there = asked[7][0].removeprefix("is there a ") in {scenes.NUMBERS[t.digit] for t in made.things}
    assert asked[7][1] == ("yes" if there else "no")


def test_digits_for_training_are_others():
    drawn = [{d.tobytes() for digits in scenes._digits(training) for d in digits} for training in (True, False)]
    assert len(drawn[1]) > 400 and not drawn[0] & drawn[1]


# ------------------------------------------------------------------------------------------------------------- answers


def test_all_tokens_and_a_ninth(loaded, sixty):
    """93% of answers are right with all tokens; with 16 of 144 far more by HiPrune than at random, none lost at 48."""
    whole = ask(*loaded, sixty)
    assert whole.accuracy[0] >= 0.93 and whole.kept is None
    third = ask(*loaded, sixty, hk.HiPrune(budget=48))
    assert third.accuracy[0] >= whole.accuracy[0] - 0.02 and {len(kept) for kept in third.kept} == {48}
    ninth, random = (ask(*loaded, sixty, method(budget=16)) for method in (hk.HiPrune, hk.Random))
    assert ninth.accuracy[0] >= FLOOR > 0.88 > random.accuracy[0]
    assert SHARES[0] < ninth.share_on_digits.mean() < SHARES[1] and random.share_on_digits.mean() < 0.2
    assert not hk.is_patched(loaded[0])
    assert ninth.accuracy[1] == pytest.approx(ninth.right.mean(axis=1).std(ddof=1) / 60**0.5)


@pytest.mark.parametrize("name", ["indices of another image", "features in another order", "scores off by one"])
def test_planted_mistakes_are_caught(loaded, sixty, name):
    found = ask(*loaded, sixty, MISTAKES[name](budget=16))
    share = float(found.share_on_digits.mean())
    assert found.accuracy[0] < FLOOR or not SHARES[0] < share < SHARES[1]


def test_kept_tokens_on_digits_are_counted_by_hand(loaded):
    made = scenes_of(2)
    found = ask(*loaded, made, hk.FasterVLM(budget=9))
    for own, kept, share in zip(made, found.kept, found.share_on_digits):
        assert share == sum(own.owners[i // 12, i % 12] >= 0 for i in kept.tolist()) / 9


def test_the_files_are_those_of_a_stock_checkpoint():
    """Auto classes and a pipeline load them; the processor splits questions into known words."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoint())
    assert type(model).__name__ == "LlavaForConditionalGeneration" and model.dtype == torch.float16
    assert sum(p.numel() for p in model.parameters()) == 1_044_576
    processor, made = AutoProcessor.from_pretrained(checkpoint()), scenes.scene(1)
    question, answer = made.questions(np.random.default_rng(0))[2]
    words = processor.tokenizer(f"{question} ?")["input_ids"]
    assert processor.tokenizer.unk_token_id not in words and len(words) == 1 + 3 + 1
    asked = pipeline("image-text-to-text", model=checkpoint(), dtype=torch.float32)
    content = [{"type": "image", "image": Image.fromarray(made.pixels)}, {"type": "text", "text": question}]
    (found,) = asked(text=[{"role": "user", "content": content}], return_full_text=False)
    assert found["generated_text"].strip() == answer


# ------------------------------------------------------------------------------------------------------- command line


def test_command(capsys, tmp_path):
    """Its figures are those of `ask`; the picture and the file are written."""
    arguments = [
        "--methods",
        "hiprune:object_layer=2,random",
        "--budgets",
        "16",
        "--scenes",
        "4",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(["quality", *arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {(row["method"], row["tokens"]): row for row in found["results"]}
    assert list(rows) == [(None, 144), ("hiprune:object_layer=2", 16), ("random", 16)]
    again = ask(*load(), scenes_of(4), hk.HiPrune(budget=16, object_layer=2))
    row = rows["hiprune:object_layer=2", 16]
    assert (row["accuracy"], row["standard_error"]) == again.accuracy
    assert row["share_on_digits"] == again.share_on_digits.mean() and len(row["by_question"]) == 9
    assert json.loads((tmp_path / "quality.json").read_text())["results"] == found["results"]
    with Image.open(tmp_path / "quality.png") as picture:
        assert picture.width > 800
    assert cli.main(["quality", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "4 scenes (seed 0), 36 questions" in printed and "+- is one standard error" in printed
    assert f"{100 * again.accuracy[0]:.1f} +- {100 * again.accuracy[1]:.1f}" in printed


def test_the_name_of_the_shipped_model(capsys, tmp_path, monkeypatch):
    """Every command takes it; a folder of that name comes first."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(scenes.scene(0).pixels).save("scene.png")
    assert (
        cli.main(["run", "scene.png", "how many digits", "--model", "digits", "--budget", "16", "--dtype", "float32"])
        == 0
    )
    assert capsys.readouterr().out.strip() == scenes.NUMBERS[len(scenes.scene(0).things)]
    (tmp_path / "digits").mkdir()
    assert "model: the configuration of 'digits'" in error_of(
        capsys, "run", "scene.png", "how many digits", "--model", "digits", "--budget", "16"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budgets", "16,0"], "budgets: expected different numbers from 1 to 144 with commas between, got '16,0'"),
        (["--budgets", "16,16"], "budgets: expected different numbers from 1 to 144"),
        (["--budgets", "x"], "budgets: expected different numbers from 1 to 144"),
        (["--budgets", "145"], "budgets: expected different numbers from 1 to 144"),
        (["--methods", "nope"], "methods: expected names among hiprune"),
        (["--methods", "random,random"], "methods: expected each method once, got random twice"),
        (["--methods", "trim"], "text_encoder: expected a ClipText"),
        (["--scenes", "1"], "scenes: expected at least 2, got 1"),
        (["--seed", "-1"], "seed: expected at least 0, got -1"),
        (["--threads", "0"], "threads: expected at least 1, got 0"),
        (["--out", "nowhere"], "out: there is no directory 'nowhere'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, "quality", *arguments)
    assert not list(tmp_path.iterdir())
