"""`hiprune prune` of every family, through files and processors: what it says is what the patched model keeps."""

import json
import math

import numpy as np
import pytest
import torch
from checkpoints import PARTS, assemble, photograph, save
from cli_helpers import error_of, prune_json
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

import hiprune_kernels as hk
from hiprune_kernels import cli, loading, processing
from hiprune_kernels.methods import METHODS
from hiprune_kernels.views import views_of
from hiprune_kernels.visualize import OTHER_COLORS, ROLE_COLORS

VLMS = tuple(PARTS)
ENCODERS = ("siglip_vision_model", "vit", "deit", "dinov2", "dinov2_with_registers", "vjepa2")
TILED = ("llava_next", "llava_onevision", "internvl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def picture(folder):
    return str(photograph(folder / "photo.png"))


@pytest.fixture(scope="module")
def saved(folder):
    """Checkpoints, made when they are first asked for."""

    def path(model_type, **options):
        place = folder / "-".join([model_type, *options])
        return str(place if place.exists() else save(model_type, place, **options))

    return path


def kept_by(model, method, inputs):
    """Indices and roles through all images, as the patched model itself reports them."""
    hk.apply_method(model, method)
    with torch.no_grad():
        model(**inputs)
    indices, roles = [], []
    for selection in hk.last_selection(model):
        indices += (selection.indices + len(roles)).tolist()
        roles += selection.roles.tolist()
    return indices, roles


def stock_inputs(model_type, picture):
    """A whole model's inputs, from a processor that its class made."""
    parts = PARTS[model_type]()
    image = Image.open(picture).convert("RGB")
    inputs = dict(assemble(parts)(images=[image], text=[f"w5 {parts.mark} w6 w7"], return_tensors="pt"))
    inputs.pop("num_patches", None)
    return inputs


# ------------------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("model_type", VLMS)
def test_prune_says_what_the_patched_model_keeps(capsys, saved, picture, tmp_path, model_type):
    path, drawn = saved(model_type), tmp_path / "kept.png"
    found = prune_json(capsys, picture, "--model", path, "--retention", "0.3", "--out", str(drawn))
    model = AutoModelForImageTextToText.from_pretrained(path)
    indices, roles = kept_by(model, hk.HiPrune(retention=0.3), stock_inputs(model_type, picture))
    assert (found["indices"], found["roles"]) == (indices, roles)
    assert found["method"] == "hiprune" and found["role_names"] == ["anchor", "buffer", "register"]
    assert found["budget"] == len(indices) and found["deep_layer"] == found["feature_layer"]
    assert ("tiles" in found) == (model_type in TILED)
    if model_type in TILED:
        first, counted = 0, []
        for tile in found["tiles"]:
            size = math.prod(tile["grid"])
            assert tile["roles"] == found["roles"][first : first + size]
            counted += [first + index for index in tile["indices"]]
            first += size
        assert counted == found["indices"] and first == len(roles)
    else:
        assert math.prod(found["grid"]) == len(roles)
    colors = set(map(tuple, np.array(Image.open(drawn)).reshape(-1, 3).tolist()))
    assert {ROLE_COLORS[role] for role in roles if role} <= colors


@pytest.mark.parametrize("name", ["fastervlm", "divprune", "random", "uniform-grid"])
@pytest.mark.parametrize("model_type", ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "internvl"])
def test_every_method(capsys, saved, picture, tmp_path, model_type, name):
    path, drawn = saved(model_type), tmp_path / "kept.png"
    found = prune_json(capsys, picture, "--model", path, "--method", name, "--retention", "0.3", "--out", str(drawn))
    model = AutoModelForImageTextToText.from_pretrained(path)
    indices, roles = kept_by(model, METHODS[name](retention=0.3), stock_inputs(model_type, picture))
    assert (found["indices"], found["roles"]) == (indices, roles)
    assert found["method"] == name and found["role_names"] == ["kept"] and "alpha" not in found
    assert ("seed" in found) == (name == "random")
    colors = set(map(tuple, np.array(Image.open(drawn)).reshape(-1, 3).tolist()))
    assert OTHER_COLORS[0] in colors and ROLE_COLORS[2] not in colors


@pytest.mark.parametrize("name", ["hiprune", "divprune"])
@pytest.mark.parametrize("model_type", VLMS)
def test_without_a_processor(capsys, saved, picture, model_type, name):
    """A default one makes the pixels, and a prompt of nothing but the image serves."""
    path = saved(model_type, processor=False)
    arguments = ["prune", picture, "--model", path, "--method", name, "--retention", "0.3", "--json"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert f"note: {path} has no image processor: images are prepared as for " in printed.err
    model = AutoModelForImageTextToText.from_pretrained(path)
    processor, _ = processing.load_processor(path, AutoConfig.from_pretrained(path))
    inputs = processing.vision_inputs(model, processor, Image.open(picture).convert("RGB"), language=True)
    indices, roles = kept_by(model, METHODS[name](retention=0.3), inputs)
    assert (found["indices"], found["roles"]) == (indices, roles)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_encoders_by_themselves(capsys, saved, picture, tmp_path, model_type):
    path = saved(model_type)
    found = prune_json(capsys, picture, "--model", path, "--budget", "5", "--out", str(tmp_path / "kept.png"))
    options = {"vision_use_head": False} if model_type == "siglip_vision_model" else {}
    model = AutoModel.from_pretrained(path, **options)
    pixels = processing.default_image_processor(model.config)(images=Image.open(picture), return_tensors="pt")
    inputs = {"pixel_values": pixels["pixel_values"]}
    if model_type == "vjepa2":
        inputs = {"pixel_values_videos": inputs["pixel_values"][:, None].repeat(1, 2, 1, 1, 1), "skip_predictor": True}
    indices, roles = kept_by(model, hk.HiPrune(budget=5), inputs)
    assert (found["indices"], found["roles"]) == (indices, roles) and len(indices) == 5
    message = error_of(capsys, "prune", picture, "--model", path, "--method", "divprune")
    assert "DivPrune: needs features of the language model, expected a model with a language model" in message


def test_a_budget_that_is_all_there_is(capsys, saved, picture, tmp_path):
    """Nothing is chosen; the picture has no scores."""
    path, drawn = saved("llava"), tmp_path / "kept.png"
    assert cli.main(["prune", picture, "--model", path, "--budget", "36", "--out", str(drawn), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["indices"] == list(range(36)) and set(found["roles"]) == {3}
    assert "nothing was chosen and no scores were read" in printed.err
    assert Image.open(drawn).width == 2 * 192 + 3 * 6
    message = error_of(capsys, "prune", picture, "--model", path, "--budget", "37")
    assert "budget: expected 1 to 36 (6 x 6 tokens), got 37" in message
    message = error_of(capsys, "prune", picture, "--model", saved("llava_next"), "--budget", "361")
    assert "budget: expected 1 to 360 (10 tiles of 6 x 6 tokens), got 361" in message
    message = error_of(capsys, "prune", picture, "--model", saved("llava_next"), "--budget", "9")
    assert "budget: expected at least 10, one token for each tile of the image, got 9" in message


def test_the_language_model_stays_out(capsys, saved, picture, monkeypatch):
    """But for the features that DivPrune reads no layer of it is run, and only the first is loaded."""
    loaded = []
    load = loading.load_model

    def noted(*args, **kwargs):
        loaded.append(load(*args, **kwargs))
        layers = loaded[-1].model.model.language_model.layers
        layers[0].register_forward_pre_hook(lambda module, args: pytest.fail("the language model ran"))
        return loaded[-1]

    monkeypatch.setattr(loading, "load_model", noted)
    for name in ("hiprune", "divprune"):
        prune_json(capsys, picture, "--model", saved("qwen2_5_vl"), "--method", name)
        model = loaded[-1].model
        assert len(model.model.language_model.layers) == 1 and not hk.is_patched(model)


def test_a_random_choice_has_a_seed(capsys, saved, picture):
    arguments = [picture, "--model", saved("llava"), "--method", "random"]
    found = [prune_json(capsys, *arguments, "--seed", seed) for seed in ("0", "0", "7")]
    assert found[0] == found[1] and found[0]["indices"] != found[2]["indices"] and found[2]["seed"] == 7
    assert prune_json(capsys, *arguments)["indices"] == found[0]["indices"]


def test_options_of_methods_are_those_of_their_fields(capsys):
    with pytest.raises(SystemExit):
        cli.main(["prune", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for cls in METHODS.values():
        for option in hk.methods.options_of(cls):
            assert f"--{option.replace('_', '-')} " in text
    assert "(HiPrune: 0.1; HiPrunePlusPlus: 0.1; PTP: 0.5; HiRED: 0.5)" in text
    assert "(HiPrune, HiPrunePlusPlus; default: the model's)" in text


# ----------------------------------------------------------------------------------------------- what the model sees


def views(path, picture):
    image = Image.open(picture).convert("RGB")
    loaded = loading.load_model(path, hk.UniformGrid(retention=0.3))
    from hiprune_kernels.cli_prune import look_at

    look = look_at(loaded, hk.UniformGrid(retention=0.3), image)
    processor = processing.image_processor_of(loaded.processor)
    return views_of(look.inputs, look.layout, loaded.model.config, processor, (image.height, image.width)), image


def difference(found, expected):
    """Of two pictures, the mean over their pixels, of 255."""
    expected = expected.resize(found.size, Image.Resampling.BICUBIC)
    return np.abs(np.array(found).astype(float) - np.array(expected)).mean()


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_vl", "glm4v"])
def test_patches_become_the_picture_again(saved, picture, model_type):
    ((seen, grid, place),), image = views(saved(model_type), picture)
    assert seen.size == (72, 48) and grid == (6, 9) and place is None
    assert difference(seen, image) < 3 < 20 < difference(seen.transpose(Image.Transpose.FLIP_LEFT_RIGHT), image)


@pytest.mark.parametrize(("model_type", "rows", "columns", "side"), [("llava_next", 3, 3, 48), ("internvl", 2, 3, 96)])
def test_tiles_lie_where_they_were_cut(saved, picture, model_type, rows, columns, side):
    found, image = views(saved(model_type), picture)
    whole = [view for view in found if view.place is None]
    assert len(whole) == 1 and whole[0] is found[0 if model_type == "llava_next" else -1]
    assert difference(whole[0].image, image) < 8  # squeezed into a square
    canvas = Image.new("RGB", (columns * side, rows * side))
    for view in found:
        if view.place is not None:
            canvas.paste(view.image, (view.place[1] * side, view.place[0] * side))
    assert sorted(view.place for view in found if view.place) == [(y, x) for y in range(rows) for x in range(columns)]
    if model_type == "llava_next":  # 150 by 100 pixels in a square of 144
        canvas = canvas.crop((0, 24, 144, 120))
    assert difference(canvas, image) < 4


def test_tiles_that_are_brought_to_one_grid_are_one_view(saved, picture):
    found, image = views(saved("llava_onevision"), picture)
    assert [view.grid for view in found] == [(5, 5), (8, 11)] and [view.place for view in found] == [None, (0, 0)]
    assert found[1].image.size == (round(11 * 48 / 5), round(8 * 48 / 5))
    assert difference(found[1].image, image) < 5


@pytest.mark.parametrize(("size", "shape"), [((300, 100), (1, 3)), ((100, 400), (4, 1)), ((90, 90), None)])
def test_internvl_s_tiles_have_the_image_s_shape(saved, tmp_path, size, shape):
    found, _ = views(saved("internvl"), photograph(tmp_path / "photo.png", size))
    places = [view.place for view in found if view.place is not None]
    if shape is None:  # one tile is the whole
        assert places == [] and len(found) == 1
    else:
        assert (1 + max(y for y, _ in places), 1 + max(x for _, x in places)) == shape
