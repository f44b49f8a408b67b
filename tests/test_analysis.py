"""Layers of encoders: metrics by hand and by definition, scores against eager float64 attention, masks, calibration."""

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
from checkpoints import photograph, save
from cli_helpers import error_of
from PIL import Image, ImageDraw
from transformers import AutoModel, AutoModelForImageTextToText

from hiprune_kernels import analysis, cli
from hiprune_kernels.loading import load_model
from hiprune_kernels.masks import load_masks
from hiprune_kernels.methods import HiPrune, HiPrunePlusPlus, UniformGrid
from hiprune_kernels.patch import FAMILIES, apply_method


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("analysis")


@pytest.fixture(scope="module")
def saved(folder):
    made = {}

    def path(model_type):
        if model_type not in made:
            made[model_type] = str(save(model_type, folder / model_type))
        return made[model_type]

    return path


@pytest.fixture(scope="module")
def photos(folder):
    inside = folder / "photos"
    inside.mkdir()
    for name, size in {"a": (150, 100), "b": (90, 160), "c": (100, 100)}.items():
        photograph(inside / f"{name}.png", size)
    return inside


# -------------------------------------------------------------------------------------------------------------- metrics


def test_dispersion_is_the_mean_distance():
    """Against a loop over pairs in float64; rows and columns have their own lengths; rescaling changes nothing."""
    scores = torch.randn(6 * 10, generator=torch.Generator().manual_seed(0))
    top = sorted(range(60), key=lambda i: -float(scores[i]))[:9]
    places = [((i // 10 + 0.5) / 6, (i % 10 + 0.5) / 10) for i in top]
    pairs = [math.dist(a, b) for k, a in enumerate(places) for b in places[:k]]
    assert analysis.dispersion(scores, (6, 10), 0.15) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert analysis.dispersion(3 * scores + 1, (6, 10), 0.15) == analysis.dispersion(scores, (6, 10), 0.15)
    even = torch.rand(200, 200, generator=torch.Generator().manual_seed(1)).flatten()
    assert analysis.dispersion(even, (200, 200), 0.05) == pytest.approx(analysis.EVEN_DISTANCE, abs=0.01)
    with pytest.raises(ValueError, match=r"scores: expected \[60\] for a 6 x 10 grid, got \[59\]"):
        analysis.dispersion(scores[1:], (6, 10))
    with pytest.raises(ValueError, match="share: expected at least two tokens of 60"):
        analysis.dispersion(scores, (6, 10), 0.01)
    with pytest.raises(ValueError, match="share: expected above 0, at most 1"):
        analysis.top_tokens(scores, 1.5)


def test_auc_is_the_share_of_pairs():
    generator = torch.Generator().manual_seed(0)
    scores, mask = torch.randint(8, (50,), generator=generator).float(), torch.rand(50, generator=generator) < 0.4
    inside, outside = scores[mask].tolist(), scores[~mask].tolist()
    pairs = [(a > b) + (a == b) / 2 for a in inside for b in outside]
    assert analysis.auc(scores, mask) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert math.isnan(analysis.auc(scores, torch.ones(50, dtype=torch.bool)))


def test_iou_ranks_and_ties():
    scores = torch.tensor([2.0, 5.0, 5.0, 1.0])
    assert analysis.top_tokens(scores, 0.25).tolist() == [1] and analysis.ranks(scores).tolist() == [2, 0, 1, 3]
    mask = torch.tensor([True, True, False, False])
    assert analysis.iou_of_top(scores, mask, 0.5) == 1 / 3 and analysis.iou_of_top(scores, mask, 1.0) == 0.5


def test_phases_fit_best():
    curve = [0.50, 0.49, 0.51, 0.31, 0.30, 0.29, 0.33, 0.61, 0.60]
    assert analysis.phases(curve) == (4, 8)
    with pytest.raises(ValueError, match="curve: expected at least 3 layers, got 2"):
        analysis.phases([0.1, 0.2])


# --------------------------------------------------------------------------------------------------------------- scores


def eager_scores(model, inputs):
    """Column sums of stock eager attention in float64, layer by layer: [L, B, N] without prefix tokens."""
    config = model.config
    double = type(model)._from_config(config, attn_implementation="eager").double().eval()
    double.load_state_dict(model.state_dict())
    vision = double if not hasattr(double, "model") else FAMILIES[config.model_type].host(double).vision_tower
    with torch.no_grad():
        pixels = (
            inputs["pixel_values"].double().flatten(0, -4)
            if inputs["pixel_values"].ndim == 5
            else inputs["pixel_values"].double()
        )
        attentions = vision(pixels, output_attentions=True).attentions
    return torch.stack([a.mean(dim=1).sum(dim=1) for a in attentions])


@pytest.mark.parametrize("model_type", ["vit", "llava", "llava_next"])
def test_scores_of_all_layers(saved, photos, model_type):
    """Of the view of the whole; against eager attention in float64."""
    auto = AutoModel if model_type == "vit" else AutoModelForImageTextToText
    model = auto.from_pretrained(saved(model_type), dtype=torch.float32).eval()
    loaded = load_model(saved(model_type), UniformGrid(retention=0.5))
    image = Image.open(photos / "b.png").convert("RGB")
    found = analysis.analyze_image(loaded, image, layers=(1, 2))
    from hiprune_kernels.processing import image_processor_of

    pixels = image_processor_of(loaded.processor)(images=[image], return_tensors="pt")
    expected = eager_scores(model, pixels)[:, 0, 1:]
    assert found.scores.shape == expected.shape and found.view.grid[0] * found.view.grid[1] == expected.shape[1]
    torch.testing.assert_close(found.scores.double(), expected, rtol=1e-4, atol=1e-5)
    assert list(found.states) == [1, 2] and found.states[1].shape[0] == expected.shape[1]
    assert len(found.dispersions) == len(expected)


def test_scores_of_merged_patches(saved, photos):
    """Qwen-VL: a token's score is the mean of its four patches', as the patched model reads it."""
    import hiprune_kernels as hk
    from hiprune_kernels.cli_prune import look_at

    loaded = load_model(saved("qwen2_5_vl"), UniformGrid(retention=0.5))
    image = Image.open(photos / "a.png").convert("RGB")
    found = analysis.analyze_image(loaded, image)
    look = look_at(loaded, hk.HiPrune(retention=0.3, object_layer=1), image)
    for layer, scores in look.seen.scores.items():
        torch.testing.assert_close(found.scores[layer - 1], scores.cpu(), rtol=1e-4, atol=1e-6)
    assert found.states == {} and found.view.grid == look.layout.grids[0][-2:]


# ---------------------------------------------------------------------------------------------------------------- masks


def test_masks_of_a_folder_and_of_coco(tmp_path):
    """PNG, polygon, run lengths as numbers and compressed: the same rectangle."""
    images = {str(tmp_path / f"{n}.jpg"): Image.new("RGB", (20, 12)) for n in "abcd"}
    mask = np.zeros((12, 20), dtype=np.uint8)
    mask[3:9, 5:15] = 1
    (tmp_path / "masks").mkdir()
    Image.fromarray(mask * 200).save(tmp_path / "masks" / "a.png")
    found = load_masks(tmp_path / "masks", images)
    assert list(found) == [str(tmp_path / "a.jpg")] and (np.asarray(found[str(tmp_path / "a.jpg")]) > 0).sum() == 60

    flat = mask.T.flatten()
    borders = [0, *(np.nonzero(np.diff(flat))[0] + 1).tolist(), 240]
    runs = np.diff(borders).tolist()
    text = ""
    for i, run in enumerate(runs):
        value, more = run - (runs[i - 2] if i > 2 else 0), True
        while more:
            bits, value = value & 31, value >> 5
            more = value != -1 if bits & 16 else value != 0
            text += chr((bits | 32 * more) + 48)
    segments = {
        "a": [[5, 3, 14, 3, 14, 8, 5, 8]],
        "b": {"counts": runs, "size": [12, 20]},
        "c": {"counts": text, "size": [12, 20]},
    }
    coco = {
        "images": [{"id": i, "file_name": f"{n}.jpg"} for i, n in enumerate("abcd")],
        "annotations": [{"image_id": i, "segmentation": segments[n]} for i, n in enumerate("abc")],
    }
    (tmp_path / "coco.json").write_text(json.dumps(coco))
    found = load_masks(tmp_path / "coco.json", images)
    assert len(found) == 3
    for own in found.values():
        assert np.array_equal(np.asarray(own) > 0, mask > 0)


def test_a_mask_in_tokens():
    """What the processor cut off is cut off of the mask too: the shorter side is kept, and the middle."""
    original, mask = Image.new("RGB", (200, 100)), Image.new("L", (200, 100))
    ImageDraw.Draw(mask).rectangle((50, 0, 99, 99), fill=255)  # the left half of the middle square
    seen = analysis.View(Image.new("RGB", (48, 48)), (4, 4))
    found = analysis.token_mask(mask, seen, original).view(4, 4)
    assert found.tolist() == [[True, True, False, False]] * 4
    with pytest.raises(ValueError, match="mask: expected 200 x 100 pixels as of the image"):
        analysis.token_mask(Image.new("L", (20, 10)), seen, original)


# ---------------------------------------------------------------------------------------------------------- calibration


def curves_of(shape, images=12, noise=0.01):
    return torch.tensor([shape]) + noise * torch.randn(images, len(shape), generator=torch.Generator().manual_seed(0))


def test_a_clear_layer_is_proposed():
    curve = [0.5, 0.5, 0.48, 0.38, 0.5, 0.5, 0.30]
    found = analysis.calibrate(curves_of(curve), curves_of([0.5] * 7), last=7)
    assert found.object_layer == 4 and found.confident and found.reasons == [] and found.share == 1
    assert found.drop == pytest.approx(0.10, abs=0.02) and found.images == 12  # the last layer is none to propose


@pytest.mark.parametrize(
    ("curve", "control", "images", "reason"),
    [
        ([0.5, 0.5, 0.4, 0.5, 0.5], [0.5] * 5, 3, "3 images; 5 at least"),
        ([0.5, 0.5, 0.46, 0.5, 0.5], [0.5, 0.46, 0.5, 0.5, 0.5], 12, "below its neighbours, a layer of an untrained"),
        ([0.5, 0.497, 0.495, 0.497, 0.5], [0.5] * 5, 12, "below its neighbours"),
    ],
)
def test_weak_evidence_is_said(curve, control, images, reason):
    found = analysis.calibrate(curves_of(curve, images, 0.002), curves_of(control, images, 0.001), last=5)
    assert not found.confident and any(reason in text for text in found.reasons), found.reasons


def test_images_that_disagree():
    halves = torch.tensor([[0.5, 0.4, 0.5, 0.5, 0.5]] * 6 + [[0.5, 0.5, 0.5, 0.4, 0.5]] * 6)
    found = analysis.calibrate(halves, curves_of([0.5] * 5, 12, 0.001), last=5)
    assert found.object_layer == 2 and 0.4 < found.share < 0.7 and not found.confident
    assert f"only {found.share:.0%} of resamples of the images propose layer 2" in found.reasons


def test_the_file_of_a_calibration(tmp_path, saved, photos, capsys):
    path = tmp_path / "calibration.json"
    assert cli.main(["calibrate", str(photos), "--model", saved("vit"), "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["encoder"] == "vit" and found["images"] == 3 and len(found["curve"]) == found["layers"]
    assert not found["confident"]
    method = HiPrune(retention=0.5, object_layer=path)
    assert (
        method.object_layer == found["object_layer"] == HiPrunePlusPlus(budget=9, object_layer=str(path)).object_layer
    )
    for copied in (
        pickle.loads(pickle.dumps(method)),
        copy.deepcopy(method),
        dataclasses.replace(method, retention=0.2),
    ):
        with pytest.raises(ValueError, match=r"object_layer: expected a calibration of a dinov2 of \d+ layers"):
            apply_method(load_model(saved("dinov2"), UniformGrid(retention=0.5)).model, copied)
    prune = ["prune", str(photos / "a.png"), "--model", saved("vit"), "--object-layer", str(path), "--json"]
    capsys.readouterr()
    assert cli.main(prune) == 0 and json.loads(capsys.readouterr().out)["object_layer"] == found["object_layer"]
    other = load_model(saved("llava"), UniformGrid(retention=0.5)).model
    with pytest.raises(ValueError, match=r"a clip_vision_model of \d+ layers, got one of a vit of"):
        apply_method(other, method)
    for text in ("", "{}", '{"object_layer": 9, "encoder": "vit", "layers": 3}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="object_layer: expected"):
            HiPrune(budget=9, object_layer=path)
    with pytest.raises(ValueError, match="last: expected 3 to 5, got 2"):
        analysis.calibrate(torch.zeros(2, 5), torch.zeros(2, 5), last=2)


# --------------------------------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("model_type", ["vit", "llava_next", "qwen2_5_vl", "internvl"])
def test_analyze(capsys, saved, photos, tmp_path, model_type):
    """The report, its pictures and figures; IoU and AUC from masks are those of the functions."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for name, size in {"a": (150, 100), "c": (100, 100)}.items():
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).rectangle((size[0] // 3, size[1] // 3, 2 * size[0] // 3, 2 * size[1] // 3), fill=255)
        mask.save(masks / f"{name}.png")
    out = tmp_path / "out"
    arguments = [str(photos), "--model", saved(model_type), "--masks", str(masks), "--out", str(out), "--json"]
    assert cli.main(["analyze", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "analysis.json").read_text()) and found["masks"] == 2
    loaded = load_model(saved(model_type), UniformGrid(retention=0.5))
    image = Image.open(photos / "a.png").convert("RGB")
    own = analysis.analyze_image(loaded, image)
    (row,) = (row for row in found["images"] if row["image"].endswith("a.png"))
    mask = analysis.token_mask(Image.open(masks / "a.png"), own.view, image)
    assert row["dispersion"] == own.dispersions
    assert row["iou"] == [analysis.iou_of_top(scores, mask) for scores in own.scores]
    assert row["auc"] == [analysis.auc(scores, mask) for scores in own.scores]
    assert found["dispersion"][0] == pytest.approx(np.mean([each["dispersion"][0] for each in found["images"]]))
    page = (out / "report.html").read_text()
    names = ["dispersion.png", "embedding.png", *(f"{kind}-{i}.png" for kind in ("layers", "kept") for i in (1, 2, 3))]
    assert page.count("data:image/png;base64,") == len(names) and "src='http" not in page
    for name in names:
        with Image.open(out / name) as picture:
            assert picture.width > 150
    assert sorted(path.name for path in out.iterdir()) == sorted([*names, "analysis.json", "report.html"])


def test_an_unreadable_image_is_reported_and_the_rest_goes_on(capsys, saved, photos, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    capsys.readouterr()
    assert cli.main(["analyze", str(broken), str(photos), "--model", saved("vit"), "--out", str(tmp_path / "o")]) == 2
    printed = capsys.readouterr()
    assert f"hiprune analyze: image: {str(broken)!r} is not an image" in printed.err and "vit, 3 images" in printed.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["EMPTY"], "images: expected pictures in the folder"),
        (["none.png"], "image: there is no file 'none.png'"),
        (["PHOTOS", "--masks", "none"], "masks: there is no folder or file 'none'"),
        (["PHOTOS", "--masks", "EMPTY"], "masks: expected at least one for the images, got none in"),
        (["PHOTOS", "--masks", "BAD.json"], "masks: expected COCO's images and annotations in"),
        (["PHOTOS", "--masks", "SMALL"], "masks: expected 150 x 100 pixels for"),
        (["PHOTOS", "--out", "BAD.json"], "out: expected a directory, got the file"),
        (["PHOTOS", "--out", "BAD.json/inside"], "out: "),
        (["PHOTOS", "--model", "nowhere"], "model: 'nowhere' is no local directory"),
        (["PHOTOS", "--device", "nope"], "device: 'nope' cannot be used here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(capsys, saved, photos, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for name in ("EMPTY", "SMALL"):
        (tmp_path / name).mkdir()
    Image.new("L", (10, 10), 255).save(tmp_path / "SMALL" / "a.png")
    (tmp_path / "BAD.json").write_text("[]")
    given = [str(photos) if each == "PHOTOS" else each for each in arguments]
    model = [] if "--model" in given else ["--model", saved("vit")]
    capsys.readouterr()
    assert cli.main(["analyze", *given, *model]) == 2
    printed = capsys.readouterr()
    assert message in printed.err and "Traceback" not in printed.err and not printed.out
    assert not (tmp_path / "out").exists()


def test_calibrate_bad_input(capsys, saved, photos):
    assert "out: expected a name that ends in .json" in error_of(
        capsys, "calibrate", str(photos), "--model", saved("vit"), "--out", "calibration.txt"
    )
