"""A patched InternVL: tokens are squares of 2 by 2 patches, and every tile has the budget."""

from __future__ import annotations

import copy

import pytest
import torch
from encoder_models import eager_columns
from models import DEPTH, GRID, IMAGE_TOKEN, NUM_TOKENS, batch, images, prompt, tiny_clip_config, tiny_internvl
from models import tiny_text_config as text_config
from patch_reference import (
    GREEDY,
    WAYS,
    assert_decodes_by_hand,
    assert_generates,
    assert_prefill,
    assert_second_turn,
    new_tokens,
    one_thread,  # noqa: F401
    pruned_rows,
    row_logits,
    seen_features,
    stock_generate,
)
from transformers import CLIPVisionModel, GemmaConfig, Qwen2Config, Qwen3Config

from hiprune_kernels import reference
from hiprune_kernels.patch import apply_hiprune, last_selection, record_scores, remove_hiprune

BUDGET, LAYERS = 10, (2, DEPTH)
PROMPTS = {
    "one tile": [prompt(5, "image", 7)],
    "tiles": [prompt(3, "image", "image", "image", 4)],
    "two images": [prompt(3, "image", 4, "image", 2)],
    "batch": [prompt(5, "image", 7), prompt(2, "image", 3, seed=1)],
    "mixed": [prompt(5, "image", 7), prompt(9, seed=1), prompt(3, "image", "image", 2, "image", 6, seed=2)],
    "long text-only": [prompt(5, "image", 7), prompt(60, seed=1)],
}


def inputs_for(name, side="left"):
    count = sum(row.count(IMAGE_TOKEN) for row in PROMPTS[name]) // NUM_TOKENS
    return batch(PROMPTS[name], images(count, size=96), side)


@pytest.fixture(scope="module")
def stock():
    return tiny_internvl()


@pytest.fixture(scope="module")
def patched(stock):
    return apply_hiprune(copy.deepcopy(stock), budget=BUDGET)


def run(model, inputs, **changes):
    with torch.no_grad():
        return model(**{**inputs, **changes})


def stock_features(stock, pixel_values, **options):
    """[tiles, N, C]"""
    with torch.no_grad():
        return stock.get_image_features(pixel_values, **options, return_dict=True).pooler_output


def expected_selection(stock, pixel_values, layers=LAYERS, **options):
    """Indices [tiles, K] and roles by the reference implementation; a token's score is the mean of its four patches'."""
    columns = eager_columns(stock.model.vision_tower, {"pixel_values": pixel_values})
    scores = [columns[layer - 1][:, 1:].unflatten(1, (6, 2, 6, 2)).mean(dim=(2, 4)).flatten(1) for layer in layers]
    return reference.select_tokens(*scores, grid=GRID, **{"budget": BUDGET, **options})


def reference_rows(stock, inputs, layers=LAYERS, **options):
    indices, _ = expected_selection(stock, inputs["pixel_values"], layers, **options)
    features = stock_features(stock, inputs["pixel_values"])
    features = features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))
    return pruned_rows(stock, inputs, features, indices)


# ---------------------------------------------------------------------------------------------------------- selection

OPTIONS = [
    {},
    {"budget": 1},
    {"budget": 35},
    {"alpha": 0.9},
    {"alpha": 0.9, "rule": "grid"},
    {"alpha": 0.9, "neighborhood": "square"},
    {"keep_roles": ("register",)},
    {"object_layer": 4},
    {"object_layer": DEPTH},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_selection_and_prefill(stock, options):
    inputs = inputs_for("tiles")
    model = apply_hiprune(copy.deepcopy(stock), **{"budget": BUDGET, **options})
    layers = options.get("object_layer", 2), DEPTH
    options = {name: value for name, value in options.items() if name != "object_layer"}
    assert_prefill(model, stock, inputs, reference_rows(stock, inputs, layers, **options))
    indices, roles = expected_selection(stock, inputs["pixel_values"], layers, **options)
    assert torch.equal(torch.stack([s.indices for s in last_selection(model)]), indices)
    assert torch.equal(torch.stack([s.roles for s in last_selection(model)]), roles)
    assert [selection.grid for selection in last_selection(model)] == [GRID] * 3


def test_patches_alone_would_show(stock, patched):
    """What the prefill's tolerance is worth, and that the mean over a token's patches matters."""
    inputs = inputs_for("one tile")
    indices, _ = expected_selection(stock, inputs["pixel_values"])
    columns = eager_columns(stock.model.vision_tower, {"pixel_values": inputs["pixel_values"]})
    first = [columns[layer - 1][:, 1:].unflatten(1, (6, 2, 6, 2))[:, :, 0, :, 0].flatten(1) for layer in LAYERS]
    by_first, _ = reference.select_tokens(*first, grid=GRID, budget=BUDGET)
    assert not torch.equal(by_first, indices)
    wrong = indices.clone()
    wrong[0, -1] = next(token for token in range(NUM_TOKENS) if token not in indices and token > indices[0, -2])
    logits, features = run(patched, inputs).logits[0], stock_features(stock, inputs["pixel_values"])
    for other in (wrong, by_first):
        kept = features.gather(1, other[..., None].expand(-1, -1, features.shape[-1]))
        [(embeds, _)] = pruned_rows(stock, inputs, kept, other)
        assert (row_logits(stock, embeds) - logits).abs().max() > 0.1


def test_only_kept_squares_are_computed(stock):
    """Four patches of each kept token and CLS; the projector sees kept tokens."""
    model, seen = apply_hiprune(copy.deepcopy(stock), budget=BUDGET), []
    for module in (*(layer.mlp for layer in model.model.vision_tower.encoder.layer), model.model.multi_modal_projector):
        part = getattr(module, "linear_1", module)
        part.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    run(model, inputs_for("one tile"))
    assert seen == [145] * 4 + [1 + 4 * BUDGET, BUDGET]


@pytest.mark.parametrize("index", [-2, 3, DEPTH])
def test_feature_layer_of_the_config(index):
    stock = tiny_internvl(vision_feature_layer=index)
    inputs, deep = inputs_for("batch"), index if index > 0 else DEPTH + 1 + index
    model = apply_hiprune(copy.deepcopy(stock), budget=BUDGET)
    assert_prefill(model, stock, inputs, reference_rows(stock, inputs, (2, deep)))


def test_features_are_the_kept_stock_features(stock, patched):
    inputs = inputs_for("tiles")
    indices, _ = expected_selection(stock, inputs["pixel_values"])
    features = stock_features(stock, inputs["pixel_values"])
    expected = features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1])).flatten(0, 1)
    torch.testing.assert_close(seen_features(run(patched, inputs)), expected, rtol=0, atol=1e-4)


# ---------------------------------------------------------------------------------------------- every way of running it


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PROMPTS)
def test_prefill(stock, patched, name, side):
    inputs = inputs_for(name, side)
    assert_prefill(patched, stock, inputs, reference_rows(stock, inputs))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PROMPTS)
def test_generate(stock, patched, name, way):
    """Stock repeats images, not prompts, for beams, so there each prompt has one image."""
    if way == "beams" and name in ("tiles", "two images", "mixed"):
        name = "batch"
    if way == "lookup":
        name = "one tile"  # stock looks up in batches of one
    inputs = inputs_for(name)
    assert_generates(patched, stock, inputs, reference_rows(stock, inputs), way)


@pytest.mark.parametrize("name", ["one tile", "mixed"])
def test_decode_loop(stock, patched, name):
    inputs = inputs_for(name)
    assert_decodes_by_hand(patched, stock, inputs, reference_rows(stock, inputs))


@pytest.mark.parametrize("new_image", [False, True], ids=["text", "new image"])
def test_second_turn(stock, patched, new_image):
    inputs = inputs_for("tiles")
    second = prompt(4, *["image"] * new_image, 3, seed=9)
    shown = {"pixel_values": images(1, seed=9, size=96)} if new_image else {}
    assert_second_turn(patched, stock, inputs, second, shown, lambda both: reference_rows(stock, both))


def test_assistant_model(stock, patched):
    inputs = inputs_for("tiles")
    tokens = stock_generate(stock, reference_rows(stock, inputs), **GREEDY)
    assert torch.equal(new_tokens(patched, inputs, **GREEDY, assistant_model=copy.deepcopy(stock)), tokens)


@pytest.mark.parametrize("text", [Qwen2Config, Qwen3Config])
def test_text_models(text):
    config = text(**{**text_config(head_dim=16).to_dict(), "model_type": text.model_type})
    stock, inputs = tiny_internvl(text=config), inputs_for("mixed")
    assert stock.config.text_config.model_type == text.model_type
    model, rows = apply_hiprune(copy.deepcopy(stock), budget=BUDGET), reference_rows(stock, inputs)
    assert_prefill(model, stock, inputs, rows)
    assert_generates(model, stock, inputs, rows, "dynamic")


def test_text_only_is_stock(stock, patched):
    inputs = batch([prompt(9), prompt(4, seed=1)])
    assert torch.equal(run(patched, inputs).logits, run(stock, inputs).logits)
    assert torch.equal(patched.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))


def test_inputs_embeds(stock, patched):
    inputs = inputs_for("mixed")
    embeds = stock.get_input_embeddings()(inputs["input_ids"]).detach()
    from_embeds = run(patched, {**inputs, "input_ids": None, "inputs_embeds": embeds})
    assert torch.equal(from_embeds.logits, run(patched, inputs).logits)


# -------------------------------------------------------------------------------------------------------------- limits


def test_qk_norm_and_final_norm():
    """The variants of the larger checkpoints: normalised queries and keys, a norm behind the last layer."""
    stock = tiny_internvl()
    vision = copy.deepcopy(stock.config.vision_config)
    vision.use_qk_norm, vision.use_mean_pooling, vision.norm_type = True, False, "rms_norm"
    config = copy.deepcopy(stock.config)
    config.vision_config = vision
    stock = type(stock)(config).eval()
    stock.load_state_dict(tiny_internvl().state_dict(), strict=False)
    tower, inputs = stock.model.vision_tower, inputs_for("batch")
    assert isinstance(tower.layernorm, torch.nn.LayerNorm)
    torch.nn.init.normal_(tower.layernorm.bias)  # of rows that were dropped, the norm is not zero
    for layer in tower.encoder.layer:
        torch.nn.init.constant_(layer.attention.q_norm.weight, 3)
    model = apply_hiprune(copy.deepcopy(stock), budget=BUDGET)
    assert_prefill(model, stock, inputs, reference_rows(stock, inputs))


def test_removing(stock, patched):
    inputs = inputs_for("mixed")
    model = remove_hiprune(copy.deepcopy(patched))
    assert torch.equal(run(model, inputs).logits, run(stock, inputs).logits)


def test_what_keeps_everything_is_stock(stock):
    inputs = inputs_for("mixed")
    model = apply_hiprune(copy.deepcopy(stock), budget=NUM_TOKENS)
    assert torch.equal(run(model, inputs).logits, run(stock, inputs).logits)
    assert [len(selection.indices) for selection in last_selection(model)] == [NUM_TOKENS] * 4


def test_tiles_that_are_not_square_are_stock_where_nothing_is_pruned(stock):
    """4 by 16 patches, which stock code takes for 8 by 8."""
    inputs = batch([prompt(5, "image", 7, image_tokens=16)], torch.randn(1, 3, 32, 128))
    model = apply_hiprune(copy.deepcopy(stock), retention=1.0)
    assert torch.equal(run(model, inputs).logits, run(stock, inputs).logits)
    assert [len(selection.indices) for selection in last_selection(model)] == [16]
    with pytest.raises(ValueError, match="expected square tiles of a multiple of 2 patches, got tiles of 4 by 16"):
        run(apply_hiprune(model, budget=BUDGET), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_norms_of_queries_and_keys_under_autocast(dtype):
    """They give float32, beside values in half precision."""
    stock = tiny_internvl(use_qk_norm=True)
    assert type(stock.model.vision_tower.encoder.layer[0].attention.q_norm).__name__ == "InternVLVisionRMSNorm"
    inputs = inputs_for("batch")
    expected = run(apply_hiprune(copy.deepcopy(stock), budget=BUDGET), inputs).logits[:, -1]
    with torch.autocast("cpu", dtype=dtype):
        with record_scores(stock, layers=[1]) as scores:
            run(stock, inputs)
        logits = run(apply_hiprune(copy.deepcopy(stock), budget=BUDGET), inputs).logits[:, -1]
    assert logits.dtype == dtype and float((logits.float() - expected).norm() / expected.norm()) < 0.5
    exact = eager_columns(stock.model.vision_tower, {"pixel_values": inputs["pixel_values"]})[0]
    assert float((scores[1][0] - exact).norm() / exact.norm()) < 0.05


def test_bad_input(stock, patched):
    inputs = inputs_for("one tile")
    with pytest.raises(ValueError, match='vision_feature_select_strategy: expected "default", as CLS has no place'):
        run(patched, inputs, vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match="vision_feature_layer: the model was patched for features of layer 5"):
        run(patched, inputs, vision_feature_layer=3)
    for size, grid in (((96, 80), "12 by 10"), ((88, 88), "11 by 11")):
        pixels = torch.randn(1, 3, *size)
        with pytest.raises(ValueError, match=f"expected square tiles of a multiple of 2 patches, got tiles of {grid}"):
            run(patched, inputs, pixel_values=pixels)


def test_unsupported_parts():
    text = GemmaConfig(**{**text_config(head_dim=16).to_dict(), "model_type": "gemma"})
    with pytest.raises(ValueError, match=r"model: expected a text model of type .*qwen3, got 'gemma'"):
        apply_hiprune(tiny_internvl(text=text), budget=BUDGET)
    model = tiny_internvl()
    model.config.vision_config = tiny_clip_config()
    model.model.vision_tower = CLIPVisionModel(model.config.vision_config)
    with pytest.raises(ValueError, match="expected a vision tower of type internvl_vision, got 'clip_vision_model'"):
        apply_hiprune(model, budget=BUDGET)
