"""A patched LLaVA-NeXT: a budget for each image, tiles, padding that is cut away, newlines that stay."""

from __future__ import annotations

import copy

import pytest
import torch
from models import (
    GRID,
    IMAGE_TOKEN,
    NUM_TOKENS,
    PINPOINTS,
    anyres_batch,
    anyres_lengths,
    tiny_clip_config,
    tiny_llava_next,
    tiny_text_config,
)
from patch_reference import (
    GREEDY,
    WAYS,
    assert_a_wrong_token_shows,
    assert_decodes_by_hand,
    assert_generates,
    assert_prefill,
    assert_second_turn,
    eager_scores,
    new_tokens,
    one_thread,  # noqa: F401
    seen_features,
    stock_generate,
    visual_rows,
)
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration, MistralConfig, SiglipVisionConfig
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

from hiprune_kernels import reference
from hiprune_kernels.budget import kept_anyres_tokens, tile_budgets
from hiprune_kernels.patch import apply_hiprune, last_selection, remove_hiprune

BUDGET, OBJECT_LAYER, FEATURE_LAYER = 40, 2, 4
WIDE, TALL, SQUARE, SLIM = (40, 90), (90, 50), (96, 90), (150, 40)  # 3, 5, 5 and 10 tiles; of SLIM's 6 are all padding

PROMPTS = {
    "one image": [[5, WIDE, 7]],
    "two images": [[3, TALL, 4, WIDE, 2]],
    "batch": [[5, SQUARE, 7], [2, WIDE, 3]],
    "mixed": [[5, WIDE, 7], [9], [3, SLIM, 2, TALL, 6]],
}


@pytest.fixture(scope="module")
def stock():
    return tiny_llava_next()


@pytest.fixture(scope="module")
def patched(stock):
    return apply_hiprune(copy.deepcopy(stock), budget=BUDGET)


def packed(stock, inputs, features):
    """Features [tiles, N, C] of each image in the order of the prompt, -1 for newlines."""
    newline = torch.full(features[0].shape[-1:], -1.0)
    return torch.cat(stock.model.pack_image_features(features, inputs["image_sizes"], "default", newline)[0])


def expected(stock, inputs, budget=BUDGET, retention=None, unpad="before", rule="paper"):
    """Roles [tiles, N] of each image, and which placeholders stay, tile by tile from float64 eager attention."""
    roles = []
    counts = [image_size_to_num_patches(size, PINPOINTS, 48) for size in inputs["image_sizes"]]
    numbers = [torch.arange(n * NUM_TOKENS).view(n, -1, 1).float() for n in counts]
    for i, count in enumerate(counts):
        tower, pixels = stock.model.vision_tower, inputs["pixel_values"][i, :count]
        scores = [eager_scores(tower, pixels, layer)[:, 1:] / 37 for layer in (OBJECT_LAYER, FEATURE_LAYER)]
        reaches = packed(stock, {"image_sizes": inputs["image_sizes"][i : i + 1]}, numbers[i : i + 1]).flatten().long()
        eligible = torch.zeros(count * NUM_TOKENS, dtype=torch.bool)
        eligible[reaches[reaches >= 0]] = True
        eligible = eligible.view(count, -1) if unpad == "before" else torch.ones(count, NUM_TOKENS, dtype=torch.bool)
        share = budget // count if retention is None else round(retention * NUM_TOKENS)
        of_tiles = []
        for t in range(count):
            options = {"budget": max(1, min(share, int(eligible[t].sum()))), "grid": GRID, "rule": rule}
            parts = [score[t : t + 1] for score in scores]
            of_tiles.append(reference.select_tokens(*parts, candidate_mask=eligible[t : t + 1], **options)[1])
        roles.append(torch.cat(of_tiles))
    keep = packed(stock, inputs, [(part > 0)[..., None].float() for part in roles]).flatten() != 0
    return roles, keep


def stock_features(stock, inputs):
    with torch.no_grad():
        return torch.cat(stock.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output)


def reference_rows(stock, inputs, **options):
    visual = {}
    if "pixel_values" in inputs:
        visual[IMAGE_TOKEN] = stock_features(stock, inputs), expected(stock, inputs, **options)[1]
    return visual_rows(stock, inputs, visual)


# ---------------------------------------------------------------------------------------------- what is kept of a tile

OPTIONS = [
    {},
    {"budget": 70},
    {"budget": 10},
    {"retention": 0.25},
    {"unpad": "after"},
    {"unpad": "after", "rule": "official"},
    {"rule": "official"},
    {"rule": "grid", "budget": 100},
]


@pytest.mark.parametrize("name", ["mixed", "two images"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_selection_and_prefill(stock, options, name):
    inputs = anyres_batch(stock, PROMPTS[name])
    options = {"budget": None if "retention" in options else BUDGET, **options}
    model = apply_hiprune(copy.deepcopy(stock), **options)
    assert_prefill(model, stock, inputs, reference_rows(stock, inputs, **options))
    roles, _ = expected(stock, inputs, **options)
    grids = {"mixed": [(3, 6, 6), (10, 6, 6), (5, 6, 6)], "two images": [(5, 6, 6), (3, 6, 6)]}
    assert [selection.grid for selection in last_selection(model)] == grids[name]
    for selection, of_image in zip(last_selection(model), roles):
        assert torch.equal(selection.roles, of_image.flatten())
        assert torch.equal(selection.indices, selection.roles.nonzero()[:, 0])


def test_options_change_the_selection(stock):
    inputs = anyres_batch(stock, PROMPTS["mixed"])

    def kept(**options):
        return expected(stock, inputs, **options)[1].nonzero().flatten().tolist()

    assert len({str(kept(**options)) for options in OPTIONS}) == len(OPTIONS)


@pytest.mark.parametrize("share", [{"budget": 40}, {"budget": 10}, {"budget": 240}, {"retention": 0.4}], ids=str)
def test_the_number_kept_follows_from_sizes(stock, share):
    model = apply_hiprune(copy.deepcopy(stock), **share)
    sizes = [WIDE, TALL, SLIM, SQUARE, (48, 96), (7, 300), (37, 41), (96, 96), (140, 141)]
    for size in sizes:
        inputs = anyres_batch(stock, [[2, size, 3]])
        with torch.no_grad():
            states = seen_features(model(**inputs))
        count = kept_anyres_tokens(size, pinpoints=PINPOINTS, tile_size=48, patch_size=8, **share)
        assert len(states) == count


def test_the_number_of_all_tokens_follows_from_sizes(stock):
    """The same resolutions and padding as in stock code, whatever the order of the resolutions."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(10, 300, (200, 2), generator=generator).tolist()
    model = copy.deepcopy(stock)
    for pinpoints in (PINPOINTS, PINPOINTS[::-1]):
        model.config.image_grid_pinpoints = pinpoints
        tiles = [image_size_to_num_patches(size, pinpoints, 48) for size in sizes]
        options = {"pinpoints": pinpoints, "tile_size": 48, "patch_size": 8, "retention": 1.0}
        assert [kept_anyres_tokens(size, **options) for size in sizes] == anyres_lengths(model, sizes, tiles)


def test_features_are_the_kept_stock_features(stock, patched):
    inputs = anyres_batch(stock, PROMPTS["two images"])
    with torch.no_grad():
        output = patched(**inputs)
    features = stock_features(stock, inputs)[expected(stock, inputs)[1]]
    torch.testing.assert_close(seen_features(output), features, rtol=0, atol=1e-4)


def test_a_wrong_token_would_show(stock, patched):
    """What the tolerance of the prefill is worth."""
    inputs = anyres_batch(stock, PROMPTS["one image"])
    features, keep = stock_features(stock, inputs), expected(stock, inputs)[1]
    assert_a_wrong_token_shows(patched, stock, inputs, {IMAGE_TOKEN: features}, {IMAGE_TOKEN: keep}, 0.1)


# ---------------------------------------------------------------------------------------------- every way of running it


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PROMPTS)
def test_prefill(stock, patched, name, side):
    inputs = anyres_batch(stock, PROMPTS[name], side)
    assert_prefill(patched, stock, inputs, reference_rows(stock, inputs))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PROMPTS)
def test_generate(stock, patched, name, way):
    """Stock repeats images, not prompts, for beams, so there each prompt has one image."""
    if way == "beams" and name in ("two images", "mixed"):
        name = "batch"
    if way == "lookup":
        name = "one image"  # stock looks up in batches of one
    inputs = anyres_batch(stock, PROMPTS[name])
    assert_generates(patched, stock, inputs, reference_rows(stock, inputs), way)


@pytest.mark.parametrize("name", ["one image", "mixed"])
def test_decode_loop(stock, patched, name):
    inputs = anyres_batch(stock, PROMPTS[name])
    assert_decodes_by_hand(patched, stock, inputs, reference_rows(stock, inputs))


@pytest.mark.parametrize("new_image", [False, True], ids=["text", "new image"])
def test_second_turn(stock, patched, new_image):
    inputs = anyres_batch(stock, PROMPTS["one image"])
    second = anyres_batch(stock, [[4, (30, 90), 3] if new_image else [5]], seed=9)
    ids = second.pop("input_ids")[0].tolist()
    del second["attention_mask"]
    assert_second_turn(patched, stock, inputs, ids, second, lambda both: reference_rows(stock, both))


def test_mistral():
    text = MistralConfig(**{**tiny_text_config().to_dict(), "model_type": "mistral"})
    stock = tiny_llava_next(text=text)
    inputs = anyres_batch(stock, PROMPTS["mixed"])
    rows = reference_rows(stock, inputs)
    assert_generates(apply_hiprune(copy.deepcopy(stock), budget=BUDGET), stock, inputs, rows, "dynamic")


def test_text_only_is_stock(stock, patched):
    inputs = anyres_batch(stock, [[9], [4]])
    with torch.no_grad():
        assert torch.equal(patched(**inputs).logits, stock(**inputs).logits)


def test_assistant_model(stock, patched):
    inputs = anyres_batch(stock, PROMPTS["one image"])
    tokens = stock_generate(stock, reference_rows(stock, inputs), **GREEDY)
    assert torch.equal(new_tokens(patched, inputs, **GREEDY, assistant_model=copy.deepcopy(stock)), tokens)


def test_inputs_by_position_and_tiles_in_one_list(stock, patched):
    """Stock takes the tiles of all images one behind the other as well."""
    inputs = anyres_batch(stock, PROMPTS["batch"])
    tiles = [image_size_to_num_patches(size, PINPOINTS, 48) for size in inputs["image_sizes"]]
    flat = torch.cat([pixels[:count] for pixels, count in zip(inputs["pixel_values"], tiles)])
    with torch.no_grad():
        logits = patched(**inputs).logits
        by_position = patched(inputs["input_ids"], flat, inputs["image_sizes"], inputs["attention_mask"]).logits
        states = patched.model(inputs["input_ids"], flat, inputs["image_sizes"].tolist(), inputs["attention_mask"])
    assert torch.equal(by_position, logits)
    assert torch.equal(stock.lm_head(states.last_hidden_state), logits)


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("share", [{"budget": 5 * NUM_TOKENS}, {"budget": 1000}, {"retention": 1.0}], ids=str)
def test_what_keeps_everything_is_stock(stock, share):
    model, inputs = apply_hiprune(copy.deepcopy(stock), **share), anyres_batch(stock, PROMPTS["batch"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    assert [len(selection.indices) for selection in last_selection(model)] == [5 * NUM_TOKENS, 3 * NUM_TOKENS]


def test_one_image_keeps_everything_and_another_not(stock):
    model, inputs = apply_hiprune(copy.deepcopy(stock), budget=110), anyres_batch(stock, PROMPTS["mixed"])
    assert_prefill(model, stock, inputs, reference_rows(stock, inputs, budget=110))


def test_bad_input(stock, patched):
    inputs = anyres_batch(stock, PROMPTS["batch"])
    with pytest.raises(ValueError, match="budget: expected at least 5, one token for each tile of the image, got 4"):
        apply_hiprune(copy.deepcopy(stock), budget=4)(**inputs)
    with pytest.raises(ValueError, match="vision_feature_layer: pruning needs the features of one layer"):
        patched(**inputs, vision_feature_layer=[2, 3])
    with pytest.raises(ValueError, match="vision_feature_layer: the model was patched for features of layer 4"):
        patched(**inputs, vision_feature_layer=3)
    with pytest.raises(ValueError, match='vision_feature_select_strategy: expected "default" for CLIP'):
        patched(**inputs, vision_feature_select_strategy="full")
    with pytest.raises(ValueError, match=r"image_sizes: expected sizes of 6 tiles in all, got those of \[5, 3\]"):
        patched(**{**inputs, "pixel_values": inputs["pixel_values"][:, :3]})
    with pytest.raises(ValueError, match='unpad: expected "before" or "after", got "no"'.replace('"no"', "'no'")):
        apply_hiprune(copy.deepcopy(stock), budget=40, unpad="no")


def test_a_tower_without_a_cls_token():
    vision = {
        key: getattr(tiny_clip_config(), key) for key in ("hidden_size", "intermediate_size", "num_hidden_layers")
    }
    config = LlavaNextConfig(
        vision_config=SiglipVisionConfig(**vision, num_attention_heads=4, image_size=48, patch_size=8),
        text_config=tiny_text_config(),
        image_token_index=IMAGE_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_select_strategy="full",
    )
    stock = LlavaNextForConditionalGeneration._from_config(config).eval()
    model, inputs = apply_hiprune(copy.deepcopy(stock), retention=0.5), anyres_batch(stock, [[5, WIDE, 7]])
    with torch.no_grad():
        kept = seen_features(model(**inputs))
    [selection] = last_selection(model)
    keep = packed(stock, inputs, [(selection.roles > 0).view(3, -1, 1).float()]).flatten() != 0
    torch.testing.assert_close(kept, stock_features(stock, inputs)[keep], rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match='vision_feature_select_strategy: expected "full" for SigLIP'):
        model(**inputs, vision_feature_select_strategy="default")


def test_removing(stock, patched):
    model, inputs = copy.deepcopy(patched), anyres_batch(stock, PROMPTS["mixed"])
    remove_hiprune(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)


def test_shares():
    assert tile_budgets([36] * 5, budget=42) == [8] * 5
    assert tile_budgets([36, 100], budget=68) == [18, 50]
    assert tile_budgets([36, 100], budget=500) == [36, 100]
    assert tile_budgets([36, 100], retention=0.25) == [9, 25]
    with pytest.raises(ValueError, match="budget: expected at least 4, one token for each tile of the image, got 3"):
        tile_budgets([36, 100], budget=3)
    with pytest.raises(ValueError, match="expected exactly one of budget and retention"):
        tile_budgets([36, 36])
