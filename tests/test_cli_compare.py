"""`hiprune compare`: overlaps against those of the patched model itself, pictures, times, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch
from checkpoints import photograph, save, save_clip
from cli_helpers import error_of
from PIL import Image
from transformers import AutoModel, AutoModelForImageTextToText

import hiprune_kernels as hk
from hiprune_kernels import cli, cli_compare, processing
from hiprune_kernels.methods import METHODS
from hiprune_kernels.visualize import OTHER_COLORS, ROLE_COLORS, View, draw_methods

NAMES = ("hiprune", "ptp", "visionzip", "divprune", "cdpruner", "fastv", "hired", "vispruner", "random")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def pictures(folder):
    return [str(photograph(folder / "photo.png")), str(photograph(folder / "wide.png", (200, 90)))]


@pytest.fixture(scope="module")
def saved(folder):
    """Checkpoints, made when they are first asked for."""

    def path(model_type):
        place = folder / model_type
        return str(place if place.exists() else save(model_type, place))

    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Where pictures without a name go."""
    monkeypatch.chdir(tmp_path)


def compare_json(capsys, *arguments, code=0):
    capsys.readouterr()
    assert cli.main(["compare", *arguments, "--json"]) == code
    return json.loads(capsys.readouterr().out)


def kept_by(model, processor, path, method):
    """What the patched model itself reports, of a prompt with the default question."""
    inputs = processing.prompt_inputs(model, processor, Image.open(path).convert("RGB"), "Describe the image.")
    with torch.no_grad(), hk.applied(model, method):
        model(**inputs)
        selections = hk.last_selection(model)
    indices, roles = [], []
    for selection in selections:  # InternVL's tiles are images of their own
        indices += (selection.indices + len(roles)).tolist()
        roles += selection.roles.tolist()
    return indices, roles, selections[0].note


@pytest.mark.parametrize("model_type", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl"])
def test_it_says_what_the_patched_model_keeps(capsys, saved, pictures, model_type):
    path = saved(model_type)
    names = [name for name in NAMES if name != "hired" or model_type in ("llava", "llava_next")]
    asked = ["--methods", ",".join(names), "--retention", "0.4", "--rounds", "0"]
    found = compare_json(capsys, *pictures, "--model", path, *asked)
    model = AutoModelForImageTextToText.from_pretrained(path)
    processor, _ = processing.load_processor(path, model.config, answers=True)
    overlaps = []
    for picture, image in zip(pictures, found["images"]):
        kept = []
        for name in names:
            indices, roles, note = kept_by(model, processor, picture, METHODS[name](retention=0.4))
            method = image["methods"][name]
            assert (method["indices"], method["roles"]) == (indices, roles)
            assert method["kept"] == len(indices) < image["tokens"] <= len(roles) and note in method["note"]
            kept.append(torch.zeros(len(roles)).index_fill(0, torch.tensor(indices), 1.0))
        kept = torch.stack(kept)
        both = kept @ kept.T
        overlaps.append(both / (kept.sum(dim=1)[:, None] + kept.sum(dim=1) - both))
        torch.testing.assert_close(torch.tensor(image["overlap"]), overlaps[-1])
    mean = torch.stack(overlaps).mean(dim=0)
    torch.testing.assert_close(torch.tensor(found["mean"]["overlap"]), mean)
    assert len(mean.unique()) > len(names)  # they do differ
    assert found["left_out"] == found["failed"] == {} and found["retention"] == 0.4


def test_the_picture_has_a_panel_for_each_method(capsys, saved, pictures):
    asked = [
        "--methods",
        "hiprune,visionzip",
        "--budget",
        "12",
        "--out",
        "kept.png",
        "--rounds",
        "0",
        "--json",
        "x.json",
    ]
    assert cli.main(["compare", pictures[0], "--model", saved("llava"), *asked]) == 0
    printed = capsys.readouterr().out
    assert "wrote kept.png" in printed and "wrote x.json" in printed and "overlap of the kept tokens" in printed
    with open("x.json") as file:
        (image,) = json.load(file)["images"]
    pixels = np.array(Image.open("kept.png"))
    side, margin = 192, 6  # 48 pixels enlarged four times
    assert pixels.shape[1] == 3 * side + 4 * margin and image["picture"] == "kept.png"
    looks = {"hiprune": ROLE_COLORS, "visionzip": (ROLE_COLORS[0], *OTHER_COLORS)}
    head = _top_of_panels(pixels, side, margin)
    for panel, (name, colors) in enumerate(looks.items(), 1):
        roles, left = image["methods"][name]["roles"], margin + panel * (side + margin)
        assert set(roles) == {0, 1, 2, 3}
        for index, role in enumerate(roles):
            y, x = divmod(index, 6)
            token = pixels[head + 32 * y : head + 32 * y + 32, left + 32 * x : left + 32 * x + 32]
            assert tuple(token[0, 16]) == colors[role] if role else token.max() < 110
            lines = (token[6:-6, 6:-6] == colors[role]).all(axis=2).mean() if role else 0
            merged = name == "visionzip" and role in (1, 2)  # CLS and contextual
            assert (0.15 < lines < 0.5) if merged else lines == 0


def _top_of_panels(pixels, side, margin):
    """Where the panels begin: the first one shows the picture, which the second dims, below the titles."""
    rows = (pixels[:, margin : margin + side].min(axis=2) > 60).mean(axis=1) > 0.9
    return int(np.flatnonzero(rows)[0])


@pytest.mark.parametrize("model_type", ["llava_next", "llava_onevision", "qwen2_5_vl", "internvl"])
def test_pictures_of_tiles_and_merged_patches(capsys, saved, pictures, model_type):
    asked = ["--methods", "hiprune,divprune,fastv", "--retention", "0.3", "--rounds", "0", "--out", "."]
    assert cli.main(["compare", *pictures, "--model", saved(model_type), *asked]) == 0
    assert "means over 2 images" in capsys.readouterr().out
    for name in ("photo", "wide"):
        colors = set(map(tuple, np.array(Image.open(f"{name}.compare.png")).reshape(-1, 3).tolist()))
        assert {ROLE_COLORS[1], ROLE_COLORS[3], OTHER_COLORS[0]} <= colors


def test_many_panels_make_rows():
    image, kept = Image.new("RGB", (700, 500)), (torch.ones(4, dtype=torch.uint8), ("kept",), ())
    sizes = [draw_methods([View(image, (2, 2))], [kept] * n, titles=["t"] * (n + 1)).size for n in (2, 5, 11)]
    assert [round(width / 725) for width, _ in sizes] == [3, 3, 4]
    assert [round(height / 570) for _, height in sizes] == [1, 2, 3]


def test_times_of_all_methods_in_one_run(capsys, saved, pictures, monkeypatch):
    """The forward ends where the language model would begin, also of methods that run its layers to read them."""
    ran = []
    forward = cli_compare.timed_forward

    def noted(model, method, *args, **options):
        layers = model.model.language_model.layers
        handle = layers[-1].mlp.register_forward_hook(lambda *_: ran.append(type(method).__name__))
        forward(model, method, *args, **options)
        handle.remove()

    monkeypatch.setattr(cli_compare, "timed_forward", noted)
    asked = ["--methods", "hiprune,visionzip,fastv,ptp:alpha=0", "--budget", "12", "--rounds", "3"]
    found = compare_json(capsys, pictures[0], "--model", saved("llava"), *asked)
    assert set(ran) == {"FastV"} and len(ran) == 3
    (image,) = found["images"]
    assert image["unpruned"]["vision_ms"] > 0 and image["unpruned"]["selection_ms"] == 0
    for method in image["methods"].values():
        assert 0 < method["selection_ms"] < method["vision_ms"]
    assert found["mean"]["methods"]["fastv"] == {k: image["methods"]["fastv"][k] for k in ("vision_ms", "selection_ms")}
    assert cli.main(["compare", pictures[0], "--model", saved("llava"), *asked]) == 0
    lines = capsys.readouterr().out.splitlines()
    (head,) = (line.split() for line in lines if line.startswith("method "))
    assert head == ["method", "tokens", "of", "all", "vision", "ms", "of", "unpruned", "selection", "ms"]
    row, _ = (line.split() for line in lines if line.startswith("ptp:alpha=0  "))  # the other is of overlaps
    assert row[1:3] == ["12", "0.33"]


def test_a_budget_that_is_all_there_is(capsys, saved, pictures):
    """No method is asked, and each keeps all."""
    asked = ["--methods", "hiprune,fastv", "--budget", "36", "--rounds", "1", "--out", "all.png"]
    found = compare_json(capsys, pictures[0], "--model", saved("llava"), *asked)
    assert found["mean"]["overlap"] == [[1.0, 1.0], [1.0, 1.0]]
    assert found["images"][0]["methods"]["fastv"]["selection_ms"] == 0
    assert Image.open("all.png").width == 3 * 192 + 4 * 6


def test_what_an_encoder_cannot_serve_is_left_out(capsys, saved, pictures):
    path = saved("dinov2")
    found = compare_json(capsys, pictures[0], "--model", path, "--budget", "12", "--rounds", "1")
    assert [method["label"] for method in found["methods"]] == ["hiprune", "visionzip", "fastervlm"]
    assert list(found["left_out"]) == ["ptp", "divprune", "cdpruner"]
    assert "expected a model with a language model" in found["left_out"]["divprune"]
    with torch.no_grad(), hk.applied(model := AutoModel.from_pretrained(path), hk.FasterVLM(budget=12)):
        processor = processing.default_image_processor(model.config)
        model(**processor(images=Image.open(pictures[0]), return_tensors="pt"))
        assert found["images"][0]["methods"]["fastervlm"]["indices"] == hk.last_selection(model)[0].indices.tolist()
    message = error_of(capsys, "compare", pictures[0], "--model", path, "--methods", "hiprune,fastv", "--out", "x.png")
    assert "methods: fastv: FastV: needs text, expected a model with a language model, got Dinov2Model" in message
    message = error_of(capsys, "compare", pictures[0], "--model", path, "--question", "why", "--out", "x.png")
    assert f"question: {path} has no tokenizer" in message


def test_random_weights_and_threads(capsys, pictures, tiny_default):
    threads = torch.get_num_threads()
    asked = ["--methods", "hiprune,fastervlm", "--threads", "1", "--rounds", "0"]
    assert cli.main(["compare", pictures[0], *asked]) == 0
    assert "weights are random, so the choice of tokens means nothing" in capsys.readouterr().out
    found = [compare_json(capsys, pictures[0], *asked, "--seed", seed)["images"] for seed in ("0", "0", "1")]
    assert found[0] == found[1] != found[2] and torch.get_num_threads() == threads
    assert Image.open("photo.compare.png").format == "PNG"


def test_options_of_single_methods(capsys, saved, pictures):
    specs = ["hiprune", "hiprune:alpha=0.8:keep-roles=anchor+buffer", "ptp:alpha=0:region=attention", "random:seed=7"]
    specs += ["hiprune++:additive=true"]
    found = compare_json(
        capsys, pictures[0], "--model", saved("llava"), "--methods", ",".join(specs), "--budget", "8", "--rounds", "0"
    )
    assert [method["label"] for method in found["methods"]] == specs
    options = [method["options"] for method in found["methods"]]
    assert options[1]["alpha"] == 0.8 and options[1]["keep_roles"] == ["anchor", "buffer"]
    assert (options[2]["alpha"], options[2]["region"]) == (0.0, "attention")
    assert options[3]["seed"] == 7 and options[4]["additive"] is True
    roles = found["images"][0]["methods"][specs[1]]["roles"]
    assert 3 not in roles and 1 in roles


def test_a_text_encoder_is_for_those_that_take_one(capsys, folder, saved, pictures):
    asked = [pictures[0], "--model", saved("llava"), "--budget", "12", "--rounds", "1", "--methods"]
    clip = ["--text-encoder", str(save_clip(folder / "clip", saved("llava")))]
    found = compare_json(capsys, *asked, "hiprune,trim,cdpruner", *clip)["images"][0]["methods"]
    assert sorted(set(found["trim"]["roles"])) == [0, 1, 2] and found["trim"]["selection_ms"] > 0
    without = compare_json(capsys, *asked, "hiprune,cdpruner")["images"][0]["methods"]
    assert found["hiprune"]["indices"] == without["hiprune"]["indices"]
    assert found["cdpruner"]["indices"] != without["cdpruner"]["indices"]
    message = error_of(capsys, "compare", *asked, "hiprune,ptp", *clip, "--out", "x.png")
    assert "text-encoder: expected a method that takes one, got hiprune,ptp" in message


def test_a_question_is_asked(capsys, saved, pictures):
    """Those that read text see it; the tiny vocabulary has the words w0 to w99."""
    asked = [pictures[0], "--model", saved("llava"), "--methods", "hiprune,fastv", "--rounds", "0", "--budget", "6"]
    plain, other = (compare_json(capsys, *asked, *more) for more in ([], ["--question", "w40 w41 w42 w43 w44"]))
    plain, other = (found["images"][0]["methods"] for found in (plain, other))
    assert plain["hiprune"] == other["hiprune"] and plain["fastv"] != other["fastv"]


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("hiprune,nothing", "methods: expected names among hiprune, .*, ptp, .*, got 'nothing'"),
        ("hiprune,,ptp", "methods: expected names among .*, got ''"),
        ("ptp,ptp", "methods: expected each method once, got ptp twice"),
        ("ptp,ptp:alpha=0.5", "methods: expected each method once, got ptp and ptp:alpha=0.5"),
        ("ptp:beta=1", r"methods: expected ptp:OPTION=VALUE with an option among alpha, .*, got 'ptp:beta=1'"),
        ("fastervlm:budget=3", "methods: expected fastervlm:OPTION=VALUE with an option among none, got"),
        ("ptp:alpha", "methods: expected ptp:OPTION=VALUE with an option among"),
        ("hiprune:alpha=x", "methods: hiprune:alpha=x: alpha: expected float, got 'x'"),
        ("hiprune:alpha=2", "methods: hiprune:alpha=2: alpha: expected"),
        ("hiprune++:additive=1", r"methods: hiprune\+\+:additive=1: additive: expected true or false, got '1'"),
        ("hiprune,trim", "methods: trim: text_encoder: expected a ClipText"),
        ("hiprune:object_layer=9", "methods: hiprune:object_layer=9: object_layer: expected 1 to"),
    ],
)
def test_wrong_methods(capsys, saved, pictures, methods, message):
    error = error_of(capsys, "compare", pictures[0], "--model", saved("llava"), "--methods", methods)
    assert error.startswith("hiprune compare: ")
    assert re.search(message, error)


def test_wrong_arguments_leave_nothing_behind(capsys, saved, pictures, tmp_path):
    def error(*arguments):
        message = error_of(capsys, "compare", *arguments, "--model", saved("llava"), "--methods", "hiprune,fastervlm")
        assert list(tmp_path.iterdir()) == []
        return message

    assert "budget: expected 1 to 36 (6 x 6 tokens), got 37" in error(pictures[0], "--budget", "37")
    assert "budget: expected" in error(pictures[0], "--budget", "0")
    assert "rounds: expected at least 0, got -1" in error(pictures[0], "--rounds", "-1")
    assert "threads: expected at least 1, got 0" in error(pictures[0], "--threads", "0")
    assert "image: there is no file 'none.png'" in error("none.png")
    assert "out: expected a name that ends in" in error(pictures[0], "--out", "kept.txt")
    assert "out: there is no directory 'nowhere'" in error(pictures[0], "--out", "nowhere/kept.png")
    assert "out: expected a directory for the pictures of 2 images, got 'a.png'" in error(*pictures, "--out", "a.png")
    assert "would both be drawn into 'photo.compare.png'" in error(pictures[0], pictures[0])
    assert "json: there is no directory" in error(pictures[0], "--json", "nowhere/x.json")
    assert "json: '.' cannot be written" in error(pictures[0], "--json", ".")
    assert "text-encoder: expected a model of type clip" in error(pictures[0], "--text-encoder", saved("llava"))


def test_a_wrong_image_does_not_stop_the_others(capsys, saved, pictures, tmp_path):
    (tmp_path / "broken.png").write_text("no picture")
    asked = ["--model", saved("llava"), "--methods", "hiprune,fastervlm", "--rounds", "0", "--budget", "9"]
    capsys.readouterr()  # transformers' bars, where the checkpoint was made just now
    assert cli.main(["compare", pictures[0], "broken.png", pictures[1], *asked]) == 2
    printed = capsys.readouterr()
    assert printed.err == "hiprune compare: broken.png: image: 'broken.png' is not an image that pillow can read\n"
    assert "means over 2 images" in printed.out
    names = {"broken.png", "photo.compare.png", "wide.compare.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    found = compare_json(capsys, "broken.png", pictures[1], *asked, code=2)
    assert list(found["failed"]) == ["broken.png"] and [image["image"] for image in found["images"]] == pictures[1:]
    found = compare_json(capsys, "broken.png", "none.png", *asked, code=2)
    assert len(found["failed"]) == 2 and found["images"] == [] and found["mean"] == {}


def test_nothing_half_written(saved, pictures, tmp_path, monkeypatch, capsys):
    (tmp_path / "kept.png").write_text("of before")

    def save_half(self, path):
        path.write_text("half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", save_half)
    asked = ["--model", saved("llava"), "--methods", "hiprune", "--rounds", "0", "--out", "kept.png"]
    assert cli.main(["compare", pictures[0], *asked]) == 2
    assert "disk full" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"] and (
        tmp_path / "kept.png"
    ).read_text() == "of before"
