"""A patched LLaVA-OneVision: tiles of SigLIP features, images and videos whose features are interpolated."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from models import (
    IMAGE_TOKEN,
    PINPOINTS,
    VIDEO_TOKEN,
    anyres_batch,
    tiny_clip_config,
    tiny_onevision,
    tiny_text_config,
)
from patch_reference import (
    GREEDY,
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
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration
from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches, unpad_image

from hiprune_kernels import reference
from hiprune_kernels.budget import kept_anyres_tokens
from hiprune_kernels.patch import apply_hiprune, last_selection, record_scores, remove_hiprune

BUDGET, OBJECT_LAYER, FEATURE_LAYER, SIDE = 20, 2, 5, 5
WIDE, TALL, SLIM, BIG = (40, 90), (90, 50), (150, 40), (140, 130)  # 3, 5, 10 and 10 tiles; only BIG is interpolated

PROMPTS = {
    "one image": [[5, WIDE, 7]],
    "two images": [[3, TALL, 4, BIG, 2]],  # one tile each
    "interpolated": [[5, BIG, 7]],
    "batch": [[5, BIG, 7], [2, WIDE, 3]],
    "video": [[4, "video", 3]],
    "mixed": [[5, WIDE, 7, "video", 2], [9], [3, "video", BIG, 6], [TALL, 2, WIDE, 4], [2, SLIM, 3]],
}


@pytest.fixture(scope="module")
def stock():
    return tiny_onevision()


@pytest.fixture(scope="module")
def patched(stock):
    return apply_hiprune(copy.deepcopy(stock), budget=BUDGET)


def tower_scores(stock, pixels, rule):
    """Object and deep scores [tiles, 5, 5] in float64; the released code takes means."""
    scores = [eager_scores(stock.model.vision_tower, pixels, layer) for layer in (OBJECT_LAYER, FEATURE_LAYER)]
    return [score.view(-1, SIDE, SIDE) / (SIDE**2 if rule == "official" else 1) for score in scores]


def chosen(scores, budget, rule, eligible=None):
    """Roles [n] of one grid of tokens."""
    count = scores[0].numel() if eligible is None else int(eligible.sum())
    mask = None if eligible is None else eligible.reshape(1, -1)
    options = {"budget": max(1, min(budget, count)), "grid": tuple(scores[0].shape), "rule": rule}
    return reference.select_tokens(*(s.reshape(1, -1) for s in scores), candidate_mask=mask, **options)[1][0]


def assembled(tiles, size):
    """[rows, columns] of an image out of its tiles [n, 5, 5], without padding."""
    height, width = max(
        (pin for pin in PINPOINTS if math.prod(pin) == (len(tiles)) * 48**2), key=lambda p: worth(p, size)
    )
    whole = torch.cat([torch.cat(list(row), dim=1) for row in tiles.split(width // 48)], dim=0)
    assert whole.shape == (height // 48 * SIDE, width // 48 * SIDE)
    return unpad_image(whole[None], size)[0]


def worth(pinpoint, size):
    return min(pinpoint[0] / size[0], pinpoint[1] / size[1])


def roles_of_image(stock, tiles, size, budget, retention, rule, unpad):
    """Roles of an image's tokens, and which placeholders stay."""
    scores = tower_scores(stock, tiles, rule)
    if len(tiles) == 1:
        share = round(SIDE**2 * retention) if retention else budget
        roles = chosen([score[0] for score in scores], share, rule)
        return roles, torch.cat([roles > 0, torch.ones(1, dtype=torch.bool)])
    rest = [assembled(score[1:], size) for score in scores]
    rows, columns = rest[0].shape
    ratio = math.sqrt(rows * columns / (4 * SIDE**2))
    if ratio > 1.1:
        grid = [int(rows // ratio), int(columns // ratio)]
        rest = [F.interpolate(score[None, None], grid, mode="bilinear")[0, 0] for score in rest]
        total = SIDE**2 + math.prod(grid)
        shares = [round(n * retention) if retention else budget * n // total for n in (SIDE**2, math.prod(grid))]
        base = chosen([score[0] for score in scores], shares[0], rule)
        mixed = chosen(rest, shares[1], rule)
        flags, roles = (mixed > 0).view(grid), torch.cat([base, mixed])
    else:
        share = round(SIDE**2 * retention) if retention else budget // len(tiles)
        numbers = assembled(torch.arange(scores[0][1:].numel()).view(-1, SIDE, SIDE), size)
        eligible = torch.zeros(scores[0].numel(), dtype=torch.bool)
        eligible[numbers.flatten() + SIDE**2] = True
        eligible[: SIDE**2] = True
        eligible = eligible.view(-1, SIDE, SIDE) if unpad == "before" else torch.ones_like(scores[0]).bool()
        roles = torch.cat([chosen([s[t] for s in scores], share, rule, eligible[t]) for t in range(len(tiles))])
        base, flags = roles[: SIDE**2], (roles[SIDE**2 :] > 0)[numbers]
    return roles, torch.cat([base > 0, F.pad(flags, (0, 1), value=True).flatten()])


def expected(stock, inputs, budget=BUDGET, retention=None, rule="paper", unpad="before"):
    """Roles of each image and video, and which placeholders of each kind stay."""
    roles, keep = [], {IMAGE_TOKEN: [], VIDEO_TOKEN: []}
    if "pixel_values" in inputs:
        several = [count > 1 for count in inputs["batch_num_images"].tolist() for _ in range(count)]
        for pixels, size, one_tile in zip(inputs["pixel_values"], inputs["image_sizes"], several):
            count = 1 if one_tile else image_size_to_num_patches(size, PINPOINTS, 48)
            of_image, stays = roles_of_image(stock, pixels[:count], size.tolist(), budget, retention, rule, unpad)
            roles.append(of_image)
            keep[IMAGE_TOKEN].append(stays)
    for video in inputs.get("pixel_values_videos", ()):
        scores = [F.interpolate(s[None], [3, 3], mode="bilinear")[0] for s in tower_scores(stock, video, rule)]
        share = round(9 * retention) if retention else min(9, budget // len(video))
        of_video = torch.cat([chosen([s[t] for s in scores], share, rule) for t in range(len(video))])
        roles.append(of_video)
        keep[VIDEO_TOKEN].append(torch.cat([of_video > 0, torch.ones(1, dtype=torch.bool)]))
    return roles, {token: torch.cat(flags) for token, flags in keep.items() if flags}


def stock_features(stock, inputs):
    features = {}
    with torch.no_grad():
        if "pixel_values" in inputs:
            given = {name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}
            features[IMAGE_TOKEN] = torch.cat(stock.get_image_features(**given).pooler_output)
        if "pixel_values_videos" in inputs:
            videos = stock.get_video_features(inputs["pixel_values_videos"]).pooler_output
            if videos.shape[1] % 9 == 0:  # transformers before 5.18 adds the newline later
                videos = torch.cat([videos, stock.model.image_newline.expand(len(videos), 1, -1)], dim=1)
            features[VIDEO_TOKEN] = videos.flatten(0, 1).detach()
    return features


def reference_rows(stock, inputs, **options):
    keep = expected(stock, inputs, **options)[1]
    return visual_rows(stock, inputs, {token: (f, keep[token]) for token, f in stock_features(stock, inputs).items()})


# ------------------------------------------------------------------------------------------------------- what is kept

OPTIONS = [{}, {"budget": 24}, {"retention": 0.25}, {"unpad": "after"}, {"rule": "official"}, {"rule": "grid"}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_selection_and_prefill(stock, options):
    inputs = anyres_batch(stock, PROMPTS["mixed"])
    options = {"budget": None if "retention" in options else BUDGET, **options}
    model = apply_hiprune(copy.deepcopy(stock), **options)
    assert_prefill(model, stock, inputs, reference_rows(stock, inputs, **options))
    roles, _ = expected(stock, inputs, **options)
    several = [(5, 5), (5, 5), (10, 5, 5)]
    assert [s.grid for s in last_selection(model)] == [(3, 5, 5), ((5, 5), (10, 9)), *several, (3, 3, 3), (3, 3, 3)]
    for selection, of_image in zip(last_selection(model), roles):
        assert torch.equal(selection.roles, of_image)
        assert torch.equal(selection.indices, selection.roles.nonzero()[:, 0])


def test_options_change_the_selection(stock):
    inputs = anyres_batch(stock, PROMPTS["mixed"])
    kept = {str([roles.tolist() for roles in expected(stock, inputs, **options)[0]]) for options in OPTIONS}
    assert len(kept) == len(OPTIONS)


@pytest.mark.parametrize("name,rows", [("one image", 3 * 6), ("two images", 2 * 20), ("interpolated", 10 * 25)])
def test_the_encoder_finishes_kept_tokens_only_where_it_can(stock, patched, name, rows):
    seen = []
    mlp = patched.model.vision_tower.encoder.layers[-1].mlp
    handle = mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[:-1].numel()))
    with torch.no_grad():
        patched(**anyres_batch(stock, PROMPTS[name]))
    handle.remove()
    assert seen == [rows]


def test_an_image_keeps_the_same_tokens_beside_an_interpolated_one(stock, patched):
    alone, beside = anyres_batch(stock, [[2, WIDE, 3]]), anyres_batch(stock, [[2, WIDE, 3], [5, BIG, 7]])
    beside["pixel_values"][0, :3] = alone["pixel_values"][0]
    selections = []
    for inputs in (alone, beside):
        with torch.no_grad():
            patched(**inputs)
        selections.append(last_selection(patched)[0])
    assert selections[0].grid == selections[1].grid == (3, 5, 5)
    assert torch.equal(selections[0].roles, selections[1].roles)


@pytest.mark.parametrize("share", [{"budget": 20}, {"budget": 150}, {"retention": 0.4}], ids=str)
def test_the_number_kept_follows_from_sizes(stock, share):
    model = apply_hiprune(copy.deepcopy(stock), **share)
    for size in [WIDE, TALL, SLIM, BIG, (48, 96), (140, 141), (7, 300), (130, 100)]:
        inputs = anyres_batch(stock, [[2, size, 3]])
        with torch.no_grad():
            states = seen_features(model(**inputs))
        sizes = {"pinpoints": PINPOINTS, "tile_size": 48, "patch_size": 9, "max_tiles": 4}
        assert len(states) == kept_anyres_tokens(size, **sizes, **share)


def test_features_are_the_kept_stock_features(stock, patched):
    inputs = anyres_batch(stock, PROMPTS["mixed"])
    with torch.no_grad():
        output = patched(**inputs)
    features, (_, keep) = stock_features(stock, inputs), expected(stock, inputs)
    for token, kind in ((IMAGE_TOKEN, "image"), (VIDEO_TOKEN, "video")):
        torch.testing.assert_close(seen_features(output, kind), features[token][keep[token]], rtol=0, atol=1e-4)


def test_a_wrong_token_would_show(stock, patched):
    """What the tolerance of the prefill is worth, for an image and for a video."""
    inputs = anyres_batch(stock, [[5, WIDE, 7, "video", 2]])
    features, (_, keep) = stock_features(stock, inputs), expected(stock, inputs)
    assert_a_wrong_token_shows(patched, stock, inputs, features, keep, 0.05)


# ---------------------------------------------------------------------------------------------- every way of running it


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PROMPTS)
def test_prefill(stock, patched, name, side):
    inputs = anyres_batch(stock, PROMPTS[name], side)
    assert_prefill(patched, stock, inputs, reference_rows(stock, inputs))


@pytest.mark.parametrize("way", ["dynamic", "no cache", "static"])
@pytest.mark.parametrize("name", PROMPTS)
def test_generate(stock, patched, name, way):
    inputs = anyres_batch(stock, PROMPTS[name])
    assert_generates(patched, stock, inputs, reference_rows(stock, inputs), way)


@pytest.mark.parametrize("name", ["one image", "batch", "video"])
def test_beams(stock, patched, name):
    """Stock repeats images, not prompts, for beams, so each prompt has one image."""
    inputs = anyres_batch(stock, PROMPTS[name])
    assert_generates(patched, stock, inputs, reference_rows(stock, inputs), "beams")


@pytest.mark.parametrize("name", ["interpolated", "video"])
def test_lookup_and_assistant(stock, patched, name):
    inputs = anyres_batch(stock, PROMPTS[name])
    rows = reference_rows(stock, inputs)
    assert_generates(patched, stock, inputs, rows, "lookup")
    tokens = new_tokens(patched, inputs, **GREEDY, assistant_model=copy.deepcopy(stock))
    assert torch.equal(tokens, stock_generate(stock, rows, **GREEDY))


@pytest.mark.parametrize("name", ["one image", "mixed"])
def test_decode_loop(stock, patched, name):
    inputs = anyres_batch(stock, PROMPTS[name])
    assert_decodes_by_hand(patched, stock, inputs, reference_rows(stock, inputs))


@pytest.mark.parametrize("second", [[5], [4, (30, 90), 3], [2, "video", 3]], ids=["text", "image", "video"])
def test_second_turn(stock, patched, second):
    inputs = anyres_batch(stock, PROMPTS["one image"])
    shown = anyres_batch(stock, [second], seed=9)
    ids = shown.pop("input_ids")[0].tolist()
    del shown["attention_mask"]

    def rows(both):  # the reference sees a prompt with two images, which were cut as the only ones
        if "pixel_values" in shown:
            both = {**both, "batch_num_images": torch.tensor([1, 1])}
        return reference_rows(stock, {**both, **{k: v for k, v in shown.items() if k not in inputs}})

    assert_second_turn(patched, stock, inputs, ids, shown, rows)


def test_text_only_is_stock(stock, patched):
    inputs = anyres_batch(stock, [[9], [4]])
    with torch.no_grad():
        assert torch.equal(patched(**inputs).logits, stock(**inputs).logits)


def test_without_batch_num_images(stock, patched):
    """Stock then cuts every image."""
    inputs = anyres_batch(stock, PROMPTS["batch"])
    with torch.no_grad():
        logits = patched(**inputs).logits
        del inputs["batch_num_images"]
        assert torch.equal(patched(**inputs).logits, logits)


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("share", [{"budget": 400}, {"retention": 1.0}], ids=str)
def test_what_keeps_everything_is_stock(stock, share):
    model, inputs = apply_hiprune(copy.deepcopy(stock), **share), anyres_batch(stock, PROMPTS["mixed"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    assert [len(s.indices) for s in last_selection(model)] == [75, 115, 25, 25, 250, 27, 27]


@pytest.mark.parametrize("budget", [27, 74])
def test_videos_keep_everything_and_images_not(stock, budget):
    model, inputs = apply_hiprune(copy.deepcopy(stock), budget=budget), anyres_batch(stock, PROMPTS["mixed"])
    assert_prefill(model, stock, inputs, reference_rows(stock, inputs, budget=budget))


def test_bad_input(stock, patched):
    inputs = anyres_batch(stock, PROMPTS["mixed"])
    for name, least in (("one image", 3), ("interpolated", 5), ("video", 3)):
        with pytest.raises(ValueError, match=f"budget: expected at least {least}, one token for each tile"):
            apply_hiprune(copy.deepcopy(stock), budget=2)(**anyres_batch(stock, PROMPTS[name]))
    with pytest.raises(ValueError, match="vision_feature_layer: pruning needs the features of one layer"):
        patched(**inputs, vision_feature_layer=[2, 3])
    with pytest.raises(ValueError, match='vision_feature_select_strategy: expected "full" for SigLIP'):
        patched(**inputs, vision_feature_select_strategy="default")
    with pytest.raises(ValueError, match="image_sizes: expected sizes of"):
        patched(**{**inputs, "pixel_values": inputs["pixel_values"][:, :3]})
    with pytest.raises(ValueError, match='score_queries: expected "all", as SiglipVisionModel has no CLS token'):
        apply_hiprune(copy.deepcopy(stock), budget=20, score_queries="cls")


def test_a_tower_with_a_cls_token():
    config = LlavaOnevisionConfig(
        vision_config=tiny_clip_config(),
        text_config=tiny_text_config(),
        image_token_index=IMAGE_TOKEN,
        video_token_index=VIDEO_TOKEN,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    stock = LlavaOnevisionForConditionalGeneration._from_config(config).eval()
    inputs = anyres_batch(stock, [[5, "video", 7]])
    with torch.no_grad(), record_scores(stock, [2, 4]) as scores:
        features = stock_features(stock, inputs)[VIDEO_TOKEN]
    pooled = [
        F.interpolate(scores[layer][0][None, :, 1:].unflatten(2, (6, 6)), [3, 3], mode="bilinear") for layer in (2, 4)
    ]
    _, roles = reference.select_tokens(*(s[0].flatten(1) for s in pooled), budget=6, grid=(3, 3))
    model = apply_hiprune(copy.deepcopy(stock), budget=20)
    keep = torch.cat([roles.flatten() > 0, torch.ones(1, dtype=torch.bool)])
    assert_prefill(model, stock, inputs, visual_rows(stock, inputs, {VIDEO_TOKEN: (features, keep)}))
    assert torch.equal(last_selection(model)[0].roles, roles.flatten())
    with pytest.raises(ValueError, match='vision_feature_select_strategy: expected "default" for CLIP'):
        model(**inputs, vision_feature_select_strategy="full")


def test_removing(stock, patched):
    model, inputs = copy.deepcopy(patched), anyres_batch(stock, PROMPTS["mixed"])
    remove_hiprune(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
