"""A patched Video-LLaVA: images and videos, each kind with a vision tower of its own, CLS tokens of frames stay."""

from __future__ import annotations

import copy

import pytest
import torch
from models import IMAGE_TOKEN, NUM_TOKENS, VIDEO_TOKEN, tiny_video_llava, video_llava_batch
from patch_reference import (
    GREEDY,
    assert_a_wrong_token_shows,
    assert_decodes_by_hand,
    assert_generates,
    assert_prefill,
    assert_second_turn,
    expected_selection,
    new_tokens,
    one_thread,  # noqa: F401
    seen_features,
    stock_generate,
    visual_rows,
)

from hiprune_kernels.patch import apply_hiprune, last_selection, record_scores, remove_hiprune

BUDGET, OBJECT_LAYER, FEATURE_LAYER, FRAMES = 20, 2, 4, 2

PROMPTS = {
    "image": [[5, "image", 7]],
    "video": [[5, "video", 7]],
    "both": [[3, "image", 4, "video", 2]],
    "several": [[3, "video", 4, "image", 2, "video", 1, "image", 3]],
    "batch": [[5, "video", 7], [2, "video", 3]],
    "mixed": [[5, "image", 7], [9], [3, "video", 2, "image", 6], [4, "video", 5]],
}


@pytest.fixture(scope="module")
def stock():
    return tiny_video_llava()


@pytest.fixture(scope="module")
def patched(stock):
    return apply_hiprune(copy.deepcopy(stock), budget=BUDGET)


def expected(stock, inputs, budget=BUDGET, retention=None, **options):
    """Roles of each image and video, and which placeholders of each kind stay."""
    layers, roles, keep = (OBJECT_LAYER, FEATURE_LAYER), [], {}
    if "pixel_values_images" in inputs:
        share = min(NUM_TOKENS, budget) if retention is None else round(NUM_TOKENS * retention)
        _, of_images = expected_selection(
            stock.model.image_tower, inputs["pixel_values_images"], share, *layers, **options
        )
        roles += list(of_images)
        keep[IMAGE_TOKEN] = of_images.flatten() > 0
    if "pixel_values_videos" in inputs:
        videos = inputs["pixel_values_videos"]
        share = budget // FRAMES if retention is None else round(NUM_TOKENS * retention)
        _, of_frames = expected_selection(stock.model.video_tower, videos.flatten(0, 1), share, *layers, **options)
        roles += list(of_frames.view(len(videos), -1))
        with_cls = torch.cat([torch.ones(len(of_frames), 1, dtype=torch.bool), of_frames > 0], dim=1)
        keep[VIDEO_TOKEN] = with_cls.flatten()
    return roles, keep


def stock_features(stock, inputs):
    features = {}
    with torch.no_grad():
        if "pixel_values_images" in inputs:
            images = stock.get_image_features(inputs["pixel_values_images"]).pooler_output
            features[IMAGE_TOKEN] = images.flatten(0, 1)
        if "pixel_values_videos" in inputs:
            videos = stock.model.get_video_features(inputs["pixel_values_videos"]).pooler_output
            features[VIDEO_TOKEN] = videos.flatten(0, 1)
    return features


def reference_rows(stock, inputs, **options):
    keep = expected(stock, inputs, **options)[1]
    return visual_rows(stock, inputs, {token: (f, keep[token]) for token, f in stock_features(stock, inputs).items()})


# ------------------------------------------------------------------------------------------------------- what is kept

OPTIONS = [
    {},
    {"budget": 30},
    {"retention": 0.25},
    {"rule": "official"},
    {"rule": "grid"},
    {"score_queries": "cls"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_selection_and_prefill(stock, options):
    inputs = video_llava_batch(PROMPTS["mixed"])
    options = {"budget": None if "retention" in options else BUDGET, "alpha": 0.5, **options}
    model = apply_hiprune(copy.deepcopy(stock), **options)
    assert_prefill(model, stock, inputs, reference_rows(stock, inputs, **options))
    roles, _ = expected(stock, inputs, **options)
    assert [s.grid for s in last_selection(model)] == [(6, 6), (6, 6), (2, 6, 6), (2, 6, 6)]
    for selection, of_one in zip(last_selection(model), roles):
        assert torch.equal(selection.roles, of_one)
        assert torch.equal(selection.indices, selection.roles.nonzero()[:, 0])


def test_options_change_the_selection(stock):
    inputs = video_llava_batch(PROMPTS["mixed"])
    kept = {str([r.tolist() for r in expected(stock, inputs, alpha=0.5, **options)[0]]) for options in OPTIONS}
    assert len(kept) == len(OPTIONS)


def test_features_are_the_kept_stock_features(stock, patched):
    for name in ("mixed", "video", "image"):
        inputs = video_llava_batch(PROMPTS[name])
        with torch.no_grad():
            output = patched(**inputs)
        features, (_, keep) = stock_features(stock, inputs), expected(stock, inputs)
        states = {IMAGE_TOKEN: seen_features(output), VIDEO_TOKEN: seen_features(output, "video")}
        assert {token for token in states if states[token] is not None} == set(keep)
        for token, kept in keep.items():
            torch.testing.assert_close(states[token], features[token][kept], rtol=0, atol=1e-4)


def test_a_wrong_token_would_show(stock, patched):
    """What the tolerance of the prefill is worth, for an image and for a video."""
    inputs = video_llava_batch(PROMPTS["both"])
    features, (_, keep) = stock_features(stock, inputs), expected(stock, inputs)
    assert_a_wrong_token_shows(patched, stock, inputs, features, keep, 0.1)


# ---------------------------------------------------------------------------------------------- every way of running it


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PROMPTS)
def test_prefill(stock, patched, name, side):
    inputs = video_llava_batch(PROMPTS[name], side=side)
    assert_prefill(patched, stock, inputs, reference_rows(stock, inputs))


@pytest.mark.parametrize("way", ["dynamic", "no cache", "static"])
@pytest.mark.parametrize("name", PROMPTS)
def test_generate(stock, patched, name, way):
    inputs = video_llava_batch(PROMPTS[name])
    assert_generates(patched, stock, inputs, reference_rows(stock, inputs), way)


@pytest.mark.parametrize("name", ["image", "video", "both", "batch"])
def test_beams(stock, patched, name):
    inputs = video_llava_batch(PROMPTS[name])
    assert_generates(patched, stock, inputs, reference_rows(stock, inputs), "beams")


def test_lookup_and_assistant(stock, patched):
    inputs = video_llava_batch(PROMPTS["both"])
    rows = reference_rows(stock, inputs)
    assert_generates(patched, stock, inputs, rows, "lookup")
    tokens = new_tokens(patched, inputs, **GREEDY, assistant_model=copy.deepcopy(stock))
    assert torch.equal(tokens, stock_generate(stock, rows, **GREEDY))


@pytest.mark.parametrize("name", ["video", "mixed"])
def test_decode_loop(stock, patched, name):
    inputs = video_llava_batch(PROMPTS[name])
    assert_decodes_by_hand(patched, stock, inputs, reference_rows(stock, inputs))


@pytest.mark.parametrize("second", [[5], [4, "image", 3], [2, "video", 3]], ids=["text", "image", "video"])
def test_second_turn(stock, patched, second):
    inputs = video_llava_batch(PROMPTS["video"])
    shown = video_llava_batch([second], seed=9)
    ids = shown.pop("input_ids")[0].tolist()
    del shown["attention_mask"]
    new = {name: value for name, value in shown.items() if name not in inputs}
    assert_second_turn(patched, stock, inputs, ids, shown, lambda both: reference_rows(stock, {**both, **new}))


def test_text_only_is_stock(stock, patched):
    inputs = video_llava_batch([[9], [4]])
    with torch.no_grad():
        assert torch.equal(patched(**inputs).logits, stock(**inputs).logits)


def test_inputs_embeds(stock, patched):
    inputs = video_llava_batch(PROMPTS["mixed"])
    with torch.no_grad():
        logits = patched(**inputs).logits
        embeds = stock.get_input_embeddings()(inputs.pop("input_ids"))
        assert torch.equal(patched(inputs_embeds=embeds, **inputs).logits, logits)


# -------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("share", [{"budget": 72}, {"budget": 1000}, {"retention": 1.0}], ids=str)
def test_what_keeps_everything_is_stock(stock, share):
    model, inputs = apply_hiprune(copy.deepcopy(stock), **share), video_llava_batch(PROMPTS["mixed"])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    assert [len(selection.indices) for selection in last_selection(model)] == [36, 36, 72, 72]


def test_images_keep_everything_and_videos_not(stock):
    model, inputs = apply_hiprune(copy.deepcopy(stock), budget=40), video_llava_batch(PROMPTS["mixed"])
    assert_prefill(model, stock, inputs, reference_rows(stock, inputs, budget=40))


def test_images_keep_their_cls_token_where_asked(stock):
    rows = [[5, [IMAGE_TOKEN] * (NUM_TOKENS + 1), 7]]
    inputs = video_llava_batch(rows) | {"pixel_values_images": video_llava_batch([["image"]])["pixel_values_images"]}
    _, keep = expected(stock, inputs)
    keep = torch.cat([torch.ones(1, dtype=torch.bool), keep[IMAGE_TOKEN]])
    full = {"vision_feature_select_strategy": "full"}
    with torch.no_grad():
        features = stock.get_image_features(inputs["pixel_values_images"], **full).pooler_output[0]
    model = apply_hiprune(copy.deepcopy(stock), budget=BUDGET)
    assert_prefill(model, stock, {**inputs, **full}, visual_rows(stock, inputs, {IMAGE_TOKEN: (features, keep)}))


def test_bad_input(stock, patched):
    inputs = video_llava_batch(PROMPTS["both"])
    with pytest.raises(ValueError, match="budget: expected at least 2, one token for each tile of the image, got 1"):
        apply_hiprune(copy.deepcopy(stock), budget=1)(**inputs)
    with pytest.raises(ValueError, match="vision_feature_layer: pruning needs the features of one layer"):
        patched(**inputs, vision_feature_layer=[2, 3])
    with pytest.raises(ValueError, match="unpad: expected None for a VideoLlavaForConditionalGeneration"):
        apply_hiprune(copy.deepcopy(stock), budget=20, unpad="before")
    with pytest.raises(ValueError, match="encoder: it is patched"), record_scores(patched):
        pass


def test_removing(stock, patched):
    model, inputs = copy.deepcopy(patched), video_llava_batch(PROMPTS["mixed"])
    remove_hiprune(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
