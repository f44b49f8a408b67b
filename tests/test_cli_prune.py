"""`hiprune prune` of encoders by themselves: results against independent ones; pictures of every kind; loading."""

import json
import re
import struct

import numpy as np
import pytest
import torch
from cli_helpers import error_of, prune_json
from models import GRID, tiny_clip_config, tiny_llava, tiny_llava_next, tiny_onevision
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from hiprune_kernels import cli, loading, processing, reference
from hiprune_kernels.visualize import ROLE_COLORS

DEEP = 4  # of the tiny encoder's 5 layers: the hidden state -2, as in LLaVA
OBJECT = 2  # round(9 / 24 * 5)


def eager_scores(encoder, photo, layers, rows=slice(None), reduction="sum"):
    """Column scores [1, 1 + N] from the attention matrices themselves."""
    processor = processing.default_image_processor(encoder.config)
    pixels = processor(images=Image.open(photo), return_tensors="pt")["pixel_values"]
    encoder = CLIPVisionModel.from_pretrained(encoder.name_or_path, attn_implementation="eager").double()
    with torch.no_grad():
        attentions = encoder(pixels.double(), output_attentions=True).attentions
    maps = [attentions[layer - 1].mean(dim=1)[:, rows] for layer in layers]
    return [getattr(attention, reduction)(dim=1) for attention in maps]


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
    assert counts[1] == 1
    assert f"12 of 36 tokens kept: {counts[1]} anchor (layer 2), {counts[2]} buffers, {counts[3]}" in printed.out
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
def test_only_the_encoder_of_a_llava_checkpoint_is_loaded(capsys, photo, tmp_path, naming):
    llava = tiny_llava()
    llava.save_pretrained(tmp_path)
    if naming == "hub":  # the published LLaVA-1.5 checkpoints have this level in their names
        weights = load_file(tmp_path / "model.safetensors")
        renamed = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in weights.items()}
        save_file(renamed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = loading.load_encoder(str(tmp_path))
    stock = llava.model.vision_tower.state_dict()
    assert stock.keys() == loaded.encoder.state_dict().keys()
    assert all(torch.equal(stock[name], x) for name, x in loaded.encoder.state_dict().items())
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
    processor = processing.default_image_processor(siglip.config)
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
    assert 'score_queries: expected "all", as SiglipVisionModel has no CLS token, got "cls"' in message
    with pytest.raises(ValueError, match=r"expected a CLIP vision model, .* got model_type 'siglip_vision_model'"):
        loading.load_encoder(str(tmp_path))  # the demo's ways need a CLS token


def test_a_view_of_the_whole_stands_for_tiles(tmp_path):
    """In the demo, which takes the encoder alone."""
    model = tiny_llava_next()
    model.save_pretrained(tmp_path)
    loaded = loading.load_encoder(str(tmp_path))
    assert loaded.grid == (6, 6) and loaded.feature_layer == DEEP
    assert "a llava_next model cuts images into tiles; here one view of the image is all of them" in loaded.remarks
    stock = model.model.vision_tower.state_dict()
    assert stock.keys() == loaded.encoder.state_dict().keys()
    assert all(torch.equal(stock[name], x) for name, x in loaded.encoder.state_dict().items())
    tiny_onevision().save_pretrained(tmp_path)
    message = "got model_type 'llava_onevision' with a siglip_vision_model inside"
    with pytest.raises(ValueError, match=message):
        loading.load_encoder(str(tmp_path))


def test_llava_s_own_feature_layer_is_taken(tmp_path):
    llava = tiny_llava()
    for state, layer in ((-1, 5), (3, 3), (-3, 3)):
        llava.config.vision_feature_layer = state
        llava.save_pretrained(tmp_path)
        assert loading.load_encoder(str(tmp_path)).feature_layer == layer


def test_the_vision_part_of_a_whole_clip_is_loaded(tmp_path):
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    clip = CLIPModel(CLIPConfig(vision_config=tiny_clip_config().to_dict(), text_config={**text, "vocab_size": 50}))
    clip.save_pretrained(tmp_path)
    stock = clip.vision_model.state_dict()
    assert all(
        torch.equal(stock[name], x) for name, x in loading.load_encoder(str(tmp_path)).encoder.state_dict().items()
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

    loaded = loading.load_encoder(checkpoint)
    assert torch.equal(loaded.pixel_values(wide), loaded.pixel_values(Image.fromarray(gray)))

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


def test_random_encoders_do_not_disturb_the_callers_random_numbers():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    loading.load_encoder(config=tiny_clip_config())
    assert torch.equal(torch.rand(3), expected)
