"""`hiprune compare`: what methods keep is what the patched model keeps; overlaps, notes, timing, pictures and bad input."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import PARTS, assemble, photograph, save
from cli_helpers import error_of
from PIL import Image
from test_cli_families import kept_by, stock_inputs
from transformers import AutoModelForImageTextToText

import hiprune_kernels as hk
from hiprune_kernels import cli, cli_compare
from hiprune_kernels.methods import METHODS
from hiprune_kernels.visualize import OTHER_COLORS, View, draw_methods

NAMED = "hiprune:alpha=0.3:neighborhood=row,visionzip:contextual_share=0.4,divprune,fastv:layer=1,random"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def pictures(folder):
    sizes = {"wide": (150, 100), "high": (90, 160)}
    return [str(photograph(folder / f"{name}.png", size)) for name, size in sizes.items()]


@pytest.fixture(scope="module")
def saved(folder):
    made = {}

    def path(model_type):
        if model_type not in made:
            made[model_type] = str(save(model_type, folder / model_type))
        return made[model_type]

    return path


def compared(capsys, *arguments, code=0):
    capsys.readouterr()
    assert cli.main(["compare", *arguments, "--repeats", "1", "--json"]) == code
    printed = capsys.readouterr()
    return json.loads(printed.out), printed.err


def asked(model_type, path):
    """What the template of the checkpoint makes of the question, by a processor that its class made."""
    parts = PARTS[model_type]()
    text = f"w1 w2 {parts.mark} w40 w41 w8 w9"
    inputs = dict(assemble(parts)(images=[Image.open(path).convert("RGB")], text=[text], return_tensors="pt"))
    inputs.pop("num_patches", None)
    return inputs


@pytest.mark.parametrize("model_type", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_is_what_the_model_keeps(saved, pictures, capsys, model_type):
    """Kept sets and overlaps, computed again from `apply_method`, `last_selection` and the stock processor."""
    arguments = ["--methods", NAMED, "--retention", "0.3", "--question", "w40 w41"]
    found, _ = compared(capsys, *pictures, "--model", saved(model_type), *arguments)
    model = AutoModelForImageTextToText.from_pretrained(saved(model_type), dtype=torch.float32).eval()
    methods = {
        "hiprune:alpha=0.3:neighborhood=row": hk.HiPrune(retention=0.3, alpha=0.3, neighborhood="row"),
        "visionzip:contextual_share=0.4": hk.VisionZip(retention=0.3, contextual_share=0.4),
        "divprune": hk.DivPrune(retention=0.3),
        "fastv:layer=1": hk.FastV(retention=0.3, layer=1),
        "random": hk.Random(retention=0.3),
    }
    assert [each["name"] for each in found["methods"]] == list(methods)
    overlaps = torch.zeros(len(pictures), len(methods), len(methods), dtype=torch.float64)
    for i, (path, image) in enumerate(zip(pictures, found["images"], strict=True)):
        kept = []
        for name, method in methods.items():
            indices, roles = kept_by(model, method, asked(model_type, path))
            hk.remove_method(model)
            assert image["methods"][name] == {"indices": indices, "roles": roles}, name
            kept.append(set(indices))
        for a, own in enumerate(kept):
            for b, other in enumerate(kept):
                overlaps[i, a, b] = len(own & other) / len(own | other)
        assert image["image"] == path and sum(map(math.prod, image["grids"])) == len(roles)
    torch.testing.assert_close(torch.tensor(found["iou"], dtype=torch.float64), overlaps.mean(dim=0))
    assert float(overlaps.mean(dim=0)[0, 4]) < 0.9  # else nothing was compared
    for each in found["methods"]:
        assert 0 < each["selection_seconds"] < each["seconds"]
        assert each["ratio"] == each["seconds"] / found["stock_seconds"]


def test_time_stops_where_the_language_model_begins(saved, pictures, monkeypatch):
    """Its layers do not run, but for those that are probed; the model comes back unpatched, without a hook."""
    model = AutoModelForImageTextToText.from_pretrained(saved("llava"), dtype=torch.float32).eval()
    inputs, layers = stock_inputs("llava", pictures[0]), model.model.language_model.layers
    ran = []
    for i, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, i=i: ran.append(i))
    methods = {"hiprune": hk.HiPrune(budget=5), "fastv": hk.FastV(budget=5, layer=2)}
    seconds = cli_compare.measured(model, methods, inputs, repeats=2)
    assert list(seconds) == ["", "hiprune", "fastv"] and seconds[""][1] == 0 < seconds["hiprune"][1]
    assert ran == [0, 1] * 3  # the probe of layer 2, once to warm up and twice on the clock
    assert not hk.is_patched(model) and not layers[0]._forward_pre_hooks
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()
    assert len(ran) == 6 + len(layers)


def test_notes_and_what_is_left_out(saved, pictures, capsys):
    found, printed = compared(capsys, pictures[0], "--model", saved("qwen2_5_vl"))
    names = [each["name"] for each in found["methods"]]
    assert names == [name for name in cli_compare.DEFAULT if name in names] and "hiprune" in names
    for name in set(cli_compare.DEFAULT) - set(names):
        assert f"note: without {name}, which this model cannot have: " in printed
    assert found["methods"][names.index("fastervlm")]["notes"] == [
        "no CLS token: the mean over all queries stands for its attention"
    ]
    assert "note: fastervlm: no CLS token" in printed


def test_an_encoder_by_itself(saved, pictures, capsys, folder):
    found, printed = compared(capsys, *pictures, "--model", saved("vit"), "--budget", "3")
    assert [each["name"] for each in found["methods"]] == ["hiprune", "visionzip", "fastervlm", "vispruner", "random"]
    assert "without divprune, which this model cannot have: DivPrune: needs features of the language model" in printed
    assert all(each["kept"] == 3 for each in found["methods"])


def test_pictures(saved, pictures, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "sub"
    copy.mkdir()
    again = copy / "wide.png"
    again.write_bytes(Path(pictures[0]).read_bytes())
    arguments = ["--model", saved("llava"), "--methods", "hiprune,visionzip", "--budget", "9", "--repeats", "1"]
    assert cli.main(["compare", *pictures, str(again), *arguments]) == 0
    printed = capsys.readouterr().out
    for name in ("wide-1", "high", "wide-2"):
        assert f"wrote {name}.compare.png" in printed
        with Image.open(f"{name}.compare.png") as picture:
            assert picture.width > 3 * 170
    assert "(not pruned)" in printed and "overlap of what is kept" in printed
    assert [line.split()[0] for line in printed.splitlines() if line.startswith("  hiprune")] == ["hiprune"] * 2


def test_merged_tokens_have_a_cross():
    """A cross in the color of the role reaches the middle of the token, an outline does not."""
    image = Image.new("RGB", (112, 112), (200, 200, 200))
    drawn = {}
    for merged in ((), ("b",)):
        picture = draw_methods([View(image, (2, 2))], [([1, 2, 0, 0], ("a", "b"), merged)], titles=("seen", "kept"))
        drawn[merged] = picture
    plain, crossed = (list(map(tuple, np.asarray(drawn[m]).reshape(-1, 3).tolist())) for m in ((), ("b",)))
    changed = [new for old, new in zip(plain, crossed) if old != new]
    assert changed and changed.count(OTHER_COLORS[1]) > 20
    with pytest.raises(ValueError, match="titles: expected 2 lines"):
        draw_methods([View(image, (2, 2))], [([1, 2, 0, 0], ("a", "b"), ())], titles=("seen",))
    with pytest.raises(ValueError, match="roles: expected integers from 0 to 2"):
        draw_methods([View(image, (2, 2))], [([1, 3, 0, 0], ("a", "b"), ())], titles=("seen", "kept"))


def test_an_unreadable_image_is_reported_and_the_rest_goes_on(saved, pictures, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    arguments = ["--model", saved("llava"), "--methods", "random", "--budget", "4"]
    found, printed = compared(capsys, str(broken), pictures[0], *arguments, code=2)
    assert [each["image"] for each in found["images"]] == [pictures[0]] and found["unreadable"] == [str(broken)]
    assert f"hiprune compare: image: {str(broken)!r} is not an image that pillow can read" in printed


BAD = {
    "an unknown method": (["--methods", "hiprune,nope"], "methods: expected names among hiprune, .*, got 'nope'"),
    "a method twice": (["--methods", "ptp,ptp"], "methods: expected each once, got 'ptp' twice"),
    "an option without a value": (
        ["--methods", "ptp:alpha"],
        "methods: expected option=value behind a colon, got 'alpha'",
    ),
    "an unknown option": (["--methods", "ptp:nope=1"], "methods: unrecognized arguments: --nope=1"),
    "another method's option": (["--methods", "ptp:rule=paper"], "rule: PTP has no such option"),
    "a value of another type": (["--methods", "ptp:alpha=x"], "methods: argument --alpha: invalid float value: 'x'"),
    "a value out of range": (["--methods", "ptp:alpha=2"], r"alpha: expected a share in \[0, 1\], got 2"),
    "a budget above the tokens": (["--methods", "random", "--budget", "99999"], "budget: expected 1 to .*, got 99999"),
    "a budget of zero": (["--methods", "random", "--budget", "0"], "budget: expected"),
    "no repeats": (["--repeats", "0"], "repeats: expected at least 1, got 0"),
    "no directory": (["--out", "nowhere/at/all"], "out: there is no directory 'nowhere/at/all' to write into"),
    "a method that needs more": (["--methods", "trim"], "text_encoder: expected a ClipText, as TRIM compares"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(saved, pictures, capsys, monkeypatch, tmp_path, name):
    arguments, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    error = error_of(capsys, "compare", pictures[0], "--model", saved("llava"), *arguments)
    assert error.startswith("hiprune compare: ")
    assert re.search(message, error), error
    assert not list(tmp_path.iterdir())


def test_every_method_has_a_name_that_it_takes(saved, pictures, capsys):
    names = [name for name in METHODS if name != "trim"]
    found, _ = compared(capsys, pictures[0], "--model", saved("llava_next"), "--methods", ",".join(names))
    assert [each["method"] for each in found["methods"]] == names


def test_no_image_can_be_read(saved, tmp_path, capsys):
    capsys.readouterr()
    assert cli.main(["compare", str(tmp_path / "none.png"), "--model", saved("llava")]) == 2
    printed = capsys.readouterr()
    assert "images: expected at least one that can be read, got 1 that cannot" in printed.err and not printed.out
