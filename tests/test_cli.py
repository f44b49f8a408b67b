"""The `hiprune` command: results against independent ones, and every error as one line."""

import functools
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from models import GRID, tiny_clip, tiny_clip_config, tiny_llava, tiny_llava_next, tiny_onevision
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

import hiprune_kernels
from hiprune_kernels import cli, loading, patch, reference
from hiprune_kernels.patch import selfcheck
from hiprune_kernels.patch.encoders import ENCODERS
from hiprune_kernels.visualize import ROLE_COLORS

DEEP = 4  # of the tiny tower's 5 layers: the hidden state -2, as in LLaVA
OBJECT = 2  # round(9 / 24 * 5)


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    generator = np.random.default_rng(0)
    small = Image.fromarray(generator.integers(0, 256, (8, 12, 3), dtype=np.uint8))
    small.resize((150, 100), Image.Resampling.BICUBIC).save(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A CLIP vision checkpoint with its image processor, as `save_pretrained` writes them."""
    path = tmp_path_factory.mktemp("checkpoint")
    encoder = tiny_clip()
    encoder.save_pretrained(path)
    loading._default_processor(encoder.config).save_pretrained(path)
    return str(path)


@pytest.fixture
def tiny_default(monkeypatch):
    """Without --model, a tower of the tiny size instead of CLIP-L's; the code is the same."""
    monkeypatch.setattr(loading, "load_tower", functools.partial(loading.load_tower, config=tiny_clip_config()))


def prune_json(capsys, *arguments):
    capsys.readouterr()
    assert cli.main(["prune", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def eager_scores(encoder, photo, layers, rows=slice(None), reduction="sum"):
    """Column scores [1, 1 + N] from the attention matrices themselves."""
    processor = loading._default_processor(encoder.config)
    pixels = processor(images=Image.open(photo), return_tensors="pt")["pixel_values"]
    encoder = CLIPVisionModel.from_pretrained(encoder.name_or_path, attn_implementation="eager").double()
    with torch.no_grad():
        attentions = encoder(pixels.double(), output_attentions=True).attentions
    maps = [attentions[layer - 1].mean(dim=1)[:, rows] for layer in layers]
    return [getattr(attention, reduction)(dim=1) for attention in maps]


# --------------------------------------------------------------------------------------------------------------- prune


@pytest.mark.parametrize(
    ("arguments", "layers", "rows", "reduction", "options"),
    [
        ([], (OBJECT, DEEP), slice(None), "sum", {"budget": 12}),
        (["--budget", "7", "--alpha", "0.8"], (OBJECT, DEEP), slice(None), "sum", {"budget": 7, "alpha": 0.8}),
        (["--retention", "0.5", "--object-layer", "3"], (3, DEEP), slice(None), "sum", {"budget": 18}),
        (["--score-queries", "cls"], (OBJECT, DEEP), slice(0, 1), "sum", {"budget": 12}),
        (  # most tokens are kept, so that taking 1 off sums instead of means would pick some of them twice
            ["--rule", "official", "--retention", "0.8", "--alpha", "0.5"],
            (OBJECT, DEEP),
            slice(None),
            "mean",
            {"budget": 29, "rule": "official", "alpha": 0.5},
        ),
        (
            ["--rule", "grid", "--neighborhood", "square", "--alpha", "1", "--object-layer", "4"],
            (4, DEEP),
            slice(None),
            "sum",
            {"budget": 12, "rule": "grid", "neighborhood": "square", "alpha": 1.0},
        ),
    ],
)
def test_prune_keeps_what_the_attention_matrices_say(
    capsys, photo, checkpoint, arguments, layers, rows, reduction, options
):
    found = prune_json(capsys, photo, "--model", checkpoint, *arguments)
    encoder = CLIPVisionModel.from_pretrained(checkpoint)
    scores = eager_scores(encoder, photo, layers, rows, reduction)
    indices, roles = reference.select_tokens(*scores, grid=GRID, num_prefix_tokens=1, **options)
    assert found["indices"] == indices[0].tolist()
    assert found["roles"] == roles[0].tolist()
    assert (found["object_layer"], found["deep_layer"], found["budget"]) == (*layers, options["budget"])
    assert found["grid"] == list(GRID) and found["model"] == checkpoint and not found["random_weights"]


def test_prune_draws_what_it_kept(capsys, photo, checkpoint, tmp_path):
    picture, listing = tmp_path / "kept.png", tmp_path / "kept.json"
    arguments = ["prune", photo, "--model", checkpoint, "--out", str(picture), "--json", str(listing)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    assert f"wrote {picture}" in printed.out and f"wrote {listing}" in printed.out and printed.err == ""
    roles = json.loads(listing.read_text())["roles"]
    counts = [roles.count(role) for role in range(4)]
    assert f"12 of 36 tokens kept: {counts[1]} anchors (layer 2), {counts[2]} buffers, {counts[3]}" in printed.out
    pixels = np.array(Image.open(picture))
    side, margin = 192, 6  # 48 pixels enlarged four times
    assert pixels.shape[1] == 4 * side + 5 * margin
    cyan_rows = np.flatnonzero((pixels == ROLE_COLORS[3]).all(axis=2).any(axis=1))
    first_row = next(i for i, role in enumerate(roles) if role) // GRID[1]
    top = cyan_rows[0] - 32 * first_row if roles[first_row * 6 : first_row * 6 + 6].count(3) else None
    if top is None:
        pytest.fail("the fixture's first row of kept tokens needs a register; choose another seed")
    left = 3 * side + 4 * margin
    for index, role in enumerate(roles):
        y, x = divmod(index, GRID[1])
        border = tuple(pixels[top + 32 * y, left + 32 * x + 16])
        assert (border == ROLE_COLORS[role]) if role else (max(border) < 110)
    # The first panel is the image as the model sees it: its middle square, at the model's resolution.
    seen = np.array(Image.fromarray(pixels[top : top + side, margin : margin + side]).resize((48, 48))).astype(int)
    square = np.array(Image.open(photo).crop((25, 0, 125, 100)).resize((48, 48), Image.Resampling.BICUBIC)).astype(int)
    assert np.abs(seen - square).mean() < 4 and np.abs(seen - square[::-1]).mean() > 20


def test_prune_without_a_checkpoint_says_that_the_choice_means_nothing(
    capsys, photo, tiny_default, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prune", photo, "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "weights are random" in printed and "means nothing" in printed and "seed 3" in printed
    assert Image.open("photo.hiprune.png").format == "PNG"
    kept = [prune_json(capsys, photo, "--seed", seed)["indices"] for seed in ("3", "3", "4")]
    assert kept[0] == kept[1] != kept[2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photo.hiprune.png"]  # --json alone draws nothing


def test_json_leaves_standard_output_to_the_json(capsys, photo, checkpoint):
    assert cli.main(["prune", photo, "--model", checkpoint, "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("\n") == 1 and json.loads(printed.out)["rule"] == "paper"
    assert "12 of 36 tokens kept" in printed.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_prune_in_half_precision(capsys, photo, checkpoint, dtype):
    exact, rounded = (prune_json(capsys, photo, "--model", checkpoint, "--dtype", x) for x in ("float32", dtype))
    assert rounded["dtype"] == dtype and len(rounded["indices"]) == 12
    assert len(set(rounded["indices"]) & set(exact["indices"])) >= 8


@pytest.mark.parametrize("naming", ["saved", "hub"])
def test_only_the_tower_of_a_llava_checkpoint_is_loaded(capsys, photo, tmp_path, naming):
    llava = tiny_llava()
    llava.save_pretrained(tmp_path)
    if naming == "hub":  # the published LLaVA-1.5 checkpoints have this level in their names
        weights = load_file(tmp_path / "model.safetensors")
        renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in weights.items()}
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tower = loading.load_tower(str(tmp_path))
    stock = llava.model.vision_tower.state_dict()
    assert stock.keys() == tower.encoder.state_dict().keys()
    assert all(torch.equal(stock[name], x) for name, x in tower.encoder.state_dict().items())
    assert cli.main(["prune", photo, "--model", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["deep_layer"] == DEEP
    assert f"note: {tmp_path} has no image processor: images are prepared as for CLIP at 48 px" in printed.err


def tiny_siglip():
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4}
    siglip = SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=48, patch_size=8)).eval()
    for layer in siglip.encoder.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.weight, std=0.7)
    return siglip


def test_a_siglip_has_no_cls_token(capsys, photo, tmp_path):
    """By itself, with the pooling head that checkpoints have; the picture is drawn too."""
    siglip = tiny_siglip()
    siglip.save_pretrained(tmp_path)
    found = prune_json(capsys, photo, "--model", str(tmp_path), "--retention", "0.4")
    processor = loading._default_processor(siglip.config)
    siglip.set_attn_implementation("eager")
    with torch.no_grad():
        pixels = processor(images=Image.open(photo), return_tensors="pt")["pixel_values"]
        attentions = siglip.double()(pixels.double(), output_attentions=True).attentions
    scores = [attentions[layer - 1].mean(dim=1).sum(dim=1) for layer in (OBJECT, 5)]
    indices, roles = reference.select_tokens(*scores, budget=14, grid=GRID)
    assert (found["indices"], found["roles"]) == (indices[0].tolist(), roles[0].tolist())
    assert (found["object_layer"], found["deep_layer"]) == (OBJECT, 5)
    assert cli.main(["prune", photo, "--model", str(tmp_path), "--out", str(tmp_path / "kept.png")]) == 0
    assert Image.open(tmp_path / "kept.png").width == 4 * 192 + 5 * 6
    message = error_of(capsys, "prune", photo, "--model", str(tmp_path), "--score-queries", "cls")
    assert "score-queries: expected all, as" in message and "has no CLS token" in message
    with pytest.raises(ValueError, match=r"expected a CLIP vision model, .* got model_type 'siglip_vision_model'"):
        loading.load_tower(str(tmp_path))  # the demo's ways need a CLS token


@pytest.mark.parametrize(("build", "deep_layer"), [(tiny_llava_next, DEEP), (tiny_onevision, 5)])
def test_a_view_of_the_whole_stands_for_tiles(capsys, photo, tmp_path, build, deep_layer):
    model = build()
    model.save_pretrained(tmp_path)
    assert cli.main(["prune", photo, "--model", str(tmp_path), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    assert found["grid"] == [side, side] and found["deep_layer"] == deep_layer
    assert f"note: a {model.config.model_type} model cuts images into tiles" in printed.err
    tower = loading.load_tower(str(tmp_path), kinds=tuple(loading.TOWERS))
    stock = model.model.vision_tower.state_dict()
    assert stock.keys() == tower.encoder.state_dict().keys()
    assert all(torch.equal(stock[name], x) for name, x in tower.encoder.state_dict().items())


def test_llava_s_own_feature_layer_is_the_deep_layer(tmp_path):
    llava = tiny_llava()
    for state, layer in ((-1, 5), (3, 3), (-3, 3)):
        llava.config.vision_feature_layer = state
        llava.save_pretrained(tmp_path)
        assert loading.load_tower(str(tmp_path)).deep_layer == layer


def test_the_vision_part_of_a_whole_clip_is_loaded(tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(vision_config=tiny_clip_config().to_dict(), text_config={**text, "vocab_size": 50}))
    clip.save_pretrained(tmp_path)
    stock = clip.vision_model.state_dict()
    assert all(
        torch.equal(stock[name], x) for name, x in loading.load_tower(str(tmp_path)).encoder.state_dict().items()
    )


def test_exif_orientation_and_transparency(capsys, photo, checkpoint, tmp_path):
    upright = Image.open(photo)
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    upright.convert("RGBA").save(tmp_path / "rgba.png")
    expected = prune_json(capsys, photo, "--model", checkpoint)["roles"]
    for name in ("turned.png", "rgba.png"):
        assert prune_json(capsys, str(tmp_path / name), "--model", checkpoint)["roles"] == expected


def test_sixteen_bits_and_transparency(capsys, photo, checkpoint, tmp_path):
    """Of the same picture with 8 bits, and of one whose transparent half is white."""
    gray = np.array(Image.open(photo).convert("L"))
    Image.fromarray(gray).save(tmp_path / "8.png")
    wide = Image.frombytes("I;16", gray.shape[::-1], (gray.astype("<u2") * 257).tobytes())
    for name in ("16.png", "16.tif"):
        wide.save(tmp_path / name)
        assert Image.open(tmp_path / name).mode == "I;16"
    expected = prune_json(capsys, str(tmp_path / "8.png"), "--model", checkpoint)["roles"]
    for name in ("16.png", "16.tif"):
        assert prune_json(capsys, str(tmp_path / name), "--model", checkpoint)["roles"] == expected

    tower = loading.load_tower(checkpoint)
    assert torch.equal(tower.pixel_values(wide), tower.pixel_values(Image.fromarray(gray)))

    picture, mask = Image.open(photo), Image.new("L", (150, 100), 255)
    mask.paste(0, (75, 0, 150, 100))
    white = Image.composite(picture, Image.new("RGB", (150, 100), "white"), mask)
    white.save(tmp_path / "white.png")
    picture.putalpha(mask)
    picture.save(tmp_path / "transparent.png")
    roles = [
        prune_json(capsys, str(tmp_path / x), "--model", checkpoint)["roles"] for x in ("white.png", "transparent.png")
    ]
    assert roles[0] == roles[1]


def gray_tiff(bits, sample_format, ink):
    """A TIFF of two grey pixels: the tags that pillow needs, then the pixels."""
    tags = [
        (256, 2),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, ink),
        (273, 8),
        (277, 1),
        (278, 1),
        (279, 8),
        (339, sample_format),
    ]
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    return struct.pack("<2sHI8xH", b"II", 42, 16, len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "12.tif",
            gray_tiff(12, 1, 1),
            "cannot be read: expected 16 unsigned bits with 0 for black, got 12 unsigned",
        ),
        ("signed.tif", gray_tiff(16, 2, 1), "cannot be read: expected 16 unsigned bits .* got 16 signed"),
        ("32.tif", gray_tiff(32, 1, 1), "cannot be read: expected 16 unsigned bits .* got 32 unsigned"),
        (
            "inverted.tif",
            gray_tiff(16, 1, 0),
            "cannot be read: expected 16 unsigned bits .* with the largest value for black",
        ),
        ("float.tif", gray_tiff(32, 3, 1), "image: expected integer pixels, got mode F"),
        ("float.pfm", b"Pf\n2 1\n-1.0\n" + bytes(8), "image: expected integer pixels, got mode F"),
    ],
)
def test_pictures_whose_range_is_not_known(capsys, tmp_path, monkeypatch, name, content, message):
    monkeypatch.chdir(tmp_path)  # where a picture would be drawn
    (tmp_path / name).write_bytes(content)
    assert re.search(message, error_of(capsys, "prune", str(tmp_path / name)))


def test_help_says_what_becomes_of_deep_and_transparent_pictures(capsys):
    with pytest.raises(SystemExit):
        cli.main(["prune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "16 bits a channel become 8, what is transparent becomes white" in text


def test_random_towers_do_not_disturb_the_callers_random_numbers():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    loading.load_tower(config=tiny_clip_config())
    assert torch.equal(torch.rand(3), expected)


# -------------------------------------------------------------------------------------------------------------- errors


def error_of(capsys, *arguments):
    """The one line on stderr of a command that must fail with exit code 2."""
    capsys.readouterr()
    try:
        code = cli.main(list(arguments))
    except SystemExit as stop:  # argparse exits
        code = stop.code
    printed = capsys.readouterr()
    assert code == 2 and printed.out == ""
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n") and "Traceback" not in printed.err
    return printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: {info,check,prune,demo}"),
        (["prune"], "required: IMAGE"),
        (["draw"], "invalid choice: 'draw'"),
        (["prune", "PHOTO", "--budget", "many"], "--budget: invalid int value: 'many'"),
        (["prune", "PHOTO", "--budget", "3", "--retention", "0.5"], "not allowed with"),
        (["prune", "PHOTO", "--rule", "official_qwen"], "--rule: invalid choice"),
        (["prune", "PHOTO", "--dtype", "int8"], "--dtype: invalid choice"),
        (["prune", "nowhere.png"], "image: there is no file 'nowhere.png'"),
        (["prune", "PHOTO", "--budget", "0"], "budget: expected 1 to 36 (6 x 6 tokens), got 0"),
        (["prune", "PHOTO", "--budget", "-5"], "budget: expected 1 to 36"),
        (["prune", "PHOTO", "--budget", "37"], "budget: expected 1 to 36"),
        (["prune", "PHOTO", "--retention", "0"], "retention: expected a share in (0, 1], got 0.0"),
        (["prune", "PHOTO", "--retention", "1.5"], "retention: expected a share"),
        (["prune", "PHOTO", "--seed", "-1"], "seed: expected 0 to"),
        (["prune", "PHOTO", "--alpha", "nan"], "alpha: expected a share in [0, 1], got nan"),
        (["prune", "PHOTO", "--object-layer", "0"], "object-layer: expected 1 to 4, the deep layer, got 0"),
        (["prune", "PHOTO", "--object-layer", "5"], "object-layer: expected 1 to 4"),
        (["prune", "PHOTO", "--device", "toaster"], "device: 'toaster' cannot be used here"),
        (["prune", "PHOTO", "--device", "cuda:99"], "device: 'cuda:99' cannot be used here"),
        (["prune", "PHOTO", "--out", "no/such/place.png"], "out: there is no directory 'no/such'"),
        (["prune", "PHOTO", "--out", "picture.txt"], "out: expected a name that ends in .png"),
        (["prune", "PHOTO", "--json", "no/such/place.json"], "json: there is no directory 'no/such'"),
        (["prune", "PHOTO", "--model", "no/such/model"], "model: there is no directory 'no/such/model'"),
        (["prune", "PHOTO", "--model", "PHOTO"], "model: expected a directory or a hub id, got the file"),
        (["info", "--markdown"], "markdown: only the tables of --models"),
        (["info", "--models", "--json", "--markdown"], "not allowed with"),
        (["demo", "--threads", "0"], "threads: expected at least 1, got 0"),
    ],
)
def test_wrong_input_is_one_line(capsys, photo, tiny_default, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *(photo if argument == "PHOTO" else argument for argument in arguments))


def test_broken_images(capsys, photo, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(Path(photo).read_bytes()[:2000])
    assert "is not an image that pillow can read" in error_of(capsys, "prune", str(tmp_path / "text.png"))
    assert "cannot be read: " in error_of(capsys, "prune", str(tmp_path / "cut.png"))
    assert "there is no file" in error_of(capsys, "prune", str(tmp_path))


def edited(checkpoint, tmp_path, **changes):
    copy = tmp_path / "edited"
    shutil.copytree(checkpoint, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    return copy


def test_unusable_checkpoints(capsys, photo, checkpoint, tmp_path):
    def error(directory):
        return error_of(capsys, "prune", photo, "--model", str(directory))

    (tmp_path / "empty").mkdir()
    assert "model: the configuration of" in error(tmp_path / "empty")
    assert "got model_type 'bert'" in error(edited(checkpoint, tmp_path / "1", model_type="bert"))
    assert "model: the configuration of" in error(edited(checkpoint, tmp_path / "2", model_type="unheard_of"))
    assert "cannot be loaded" in error(edited(checkpoint, tmp_path / "3", hidden_size=32))

    incomplete = edited(checkpoint, tmp_path / "4")
    weights = load_file(incomplete / "model.safetensors")
    name = next(name for name in weights if "layers.3.mlp.fc1.weight" in name)
    del weights[name]
    save_file(weights, incomplete / "model.safetensors", metadata={"format": "pt"})
    assert "lacks 1 weights of the vision tower, first encoder.layers.3.mlp.fc1.weight" in error(incomplete)

    broken = edited(checkpoint, tmp_path / "5")
    (broken / "model.safetensors").write_bytes(b"\x08")
    assert "cannot be loaded" in error(broken)

    llava = tiny_llava()
    llava.config.vision_feature_layer = [-2, -3]
    llava.save_pretrained(tmp_path / "6")
    assert "expected one vision_feature_layer" in error(tmp_path / "6")
    config = json.loads((tmp_path / "6" / "config.json").read_text())
    config["vision_config"]["model_type"] = "dinov2"
    (tmp_path / "6" / "config.json").write_text(json.dumps(config))
    assert "got model_type 'llava' with a dinov2 tower" in error(tmp_path / "6")

    weights = load_file(edited(checkpoint, tmp_path / "7") / "model.safetensors")
    weights["post_layernorm.bias"].fill_(1.0)
    weights["encoder.layers.0.self_attn.q_proj.bias"].fill_(float("nan"))
    save_file(weights, tmp_path / "7" / "edited" / "model.safetensors", metadata={"format": "pt"})
    assert "object_scores: expected finite values" in error(tmp_path / "7" / "edited")


def test_hub_ids(capsys, photo, monkeypatch):
    from huggingface_hub import HfApi, errors

    class Answer:
        headers, request = {}, None

    def unreachable(self, *args, **kwargs):
        raise OSError("Name or service not known")

    def unknown(self, *args, **kwargs):
        raise errors.RepositoryNotFoundError("404", response=Answer())

    monkeypatch.setattr(HfApi, "model_info", unreachable)
    message = error_of(capsys, "prune", photo, "--model", "some-owner/some-model-that-is-not-cached")
    assert "not in the local cache, and the hub cannot be reached" in message
    monkeypatch.setattr(HfApi, "model_info", unknown)
    assert "no such (public) model on the hub" in error_of(capsys, "prune", photo, "--model", "some-owner/no-model")


def test_missing_packages(capsys, photo, checkpoint, monkeypatch, tmp_path):
    for module in ("PIL.Image", "matplotlib"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            assert f"{module}: pip install 'hiprune-kernels[images]'" in error_of(capsys, "prune", photo)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "rich.progress", None)
        assert "pip install 'hiprune-kernels[demo]'" in error_of(capsys, "demo", "--out", str(tmp_path))


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="there is no file"):
        cli.main(["prune", "nowhere.png", "--debug"])


def test_interrupt_is_quiet(capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_info", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == ""


def test_a_bug_is_one_line_with_another_exit_code(capsys, monkeypatch):
    def buggy(args):
        raise RuntimeError("first\nsecond")

    monkeypatch.setattr(cli, "_info", buggy)
    assert cli.main(["info"]) == 1
    assert capsys.readouterr().err == "hiprune info: unexpected RuntimeError: first second (--debug shows where)\n"


# ---------------------------------------------------------------------------------------------------- info and process


def test_info(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["hiprune-kernels"] == hiprune_kernels.__version__
    cpu = [kernel for kernel in found["kernels"] if kernel["device"] == "cpu"]
    assert {kernel["operators"] for kernel in cpu} == {"attention", "selection"}
    for kernel in found["kernels"]:
        line = next(x for x in text.splitlines() if x.split()[:2] == [kernel["device"], kernel["operators"]])
        assert kernel["implementation"] in line and kernel["reason"] in line
    assert all(device in text for device in found["devices"])


MARKERS = "<!-- hiprune info --models --markdown -->\n", "<!-- end -->"  # around the tables in README.md
UPDATE = """hiprune info --models --markdown > /tmp/t && sed -i -e '/^<!-- hiprune info/,/^<!-- end/{//!d}' -e '/^<!-- hiprune info/r /tmp/t' README.md"""


def paragraphs(lines):
    """The notes, which stand below their lines, put together again."""
    groups = itertools.groupby(lines, key=lambda line: line.startswith(" " * 6))
    return [" ".join(line.strip() for line in group) for indented, group in groups if indented]


def test_models_are_those_of_the_tables(capsys):
    assert cli.main(["info", "--models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["model_type"] for row in found["models"]] == list(patch.FAMILIES)
    assert [row["model_type"] for row in found["encoders"]] == list(ENCODERS)
    rows = {row["model_type"]: row for row in found["models"]}
    llava = {"name": patch.FAMILIES["llava"].name, "budget_per": "image", "notes": patch.FAMILIES["llava"].notes}
    layers = {"object_layer": 9, "feature_layer": 23, "layers": 24}  # the paper's, of CLIP-L
    assert rows["llava"] == {**llava, **layers, "model_type": "llava"}
    assert cli.main(["info", "--models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    line = next(line for line in lines if " llava " in line)
    assert line.split() == f"{llava['name']} llava image 9 of 24 23 of 24".split()
    assert {row["notes"] for table in found.values() for row in table} - {""} <= set(paragraphs(lines))
    clip = next(row for row in found["encoders"] if row["model_type"] == "clip_vision_model")
    assert (clip["prefix_tokens"], clip["object_share"]) == (1, 0.375)
    assert sum(line.startswith("  CLIP ") and "0.375 of the depth" in line for line in lines) == 1


def test_readme_has_the_table_of_models(capsys):
    assert cli.main(["info", "--models", "--markdown"]) == 0
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    _, start, rest = readme.partition(MARKERS[0])
    table, end, _ = rest.partition(MARKERS[1])
    assert start and end and table == capsys.readouterr().out, f"update it by: {UPDATE}"


def test_check(capsys, monkeypatch):
    assert cli.main(["check", "llava", "vit"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"stock code of transformers {transformers.__version__}") and len(lines) == 4
    for line, model_type in zip(lines[1:], ("llava", "vit")):
        assert re.fullmatch(rf"  {model_type} +right  \([0-9.]+ s\)", line)
    assert lines[3] == "2 of 2 right"
    difference = {"deit": "features that are off by 3", "vit": ""}
    monkeypatch.setattr(selfcheck, "check_model", lambda name: selfcheck.Verdict(name, difference.get(name, "")))
    monkeypatch.setitem(sys.modules, "rich.progress", None)  # the bar is not needed
    assert cli.main(["check"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(patch.FAMILIES)
    assert lines[-1] == f"{len(patch.FAMILIES) - 1} of {len(patch.FAMILIES)} right"
    assert [line.split("  (")[0].split(maxsplit=1)[1] for line in lines if "deit" in line] == [difference["deit"]]
    assert cli.main(["check", "lava"]) == 2
    assert "hiprune check: model_type: expected one of llava, " in capsys.readouterr().err


def test_the_bar_of_check(capsys, monkeypatch):
    """Over the families, where there is a terminal; it goes away at the end."""
    from rich import console

    monkeypatch.setattr(selfcheck, "check_model", lambda name: selfcheck.Verdict(name, ""))
    for terminal in (True, False):
        monkeypatch.setattr(console, "Console", functools.partial(console.Console, force_terminal=terminal))
        assert cli.main(["check", "llava", "vit"]) == 0
        shown = capsys.readouterr().out
        assert ("checking" in shown and "100%" in shown) == terminal and "2 of 2 right" in shown


def test_a_package_that_is_not_installed_is_said_to_be(monkeypatch):
    from hiprune_kernels import environment

    assert environment._version("no-such-package-here") == "not installed"
    monkeypatch.setattr(environment.Path, "read_text", lambda self: (_ for _ in ()).throw(OSError()))
    assert environment.processor_name()  # Python's guess


def test_the_command_as_a_process():
    module = [sys.executable, "-m", "hiprune_kernels"]
    done = subprocess.run([*module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"hiprune-kernels {hiprune_kernels.__version__}\n")
    failed = subprocess.run([*module, "prune", "nowhere.png"], capture_output=True, text=True)
    assert (failed.returncode, failed.stderr) == (2, "hiprune prune: image: there is no file 'nowhere.png'\n")
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*module, "info"], **pipes, text=True, env=buffered) as closed:
        closed.stdout.close()  # as `hiprune info | head -0` does
        assert closed.stderr.read() == "" and closed.wait() == 141
