"""FastV by its definition, and that position ids stay the original ones."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from method_views import (
    CLIP,
    LAYOUTS,
    assert_images_alone,
    assert_logits,
    assert_model_prunes,
    assert_scale_is_nothing,
    best,
    expected_rows,
    expected_tokens,
    forward,
    generated,
    layout_of,
    of_images,
    placeholder_tokens,
    row_logits,
    seen_of,
    selected,
    tiles_of,
    tiny,
)
from models import VLM_CASES, batch, encoder_inputs, images, prompt, tiny_encoder

import hiprune_kernels as hk
from hiprune_kernels import FastV
from hiprune_kernels.methods import Needs, Seen, Stage
from hiprune_kernels.patch.language import CACHE
from hiprune_kernels.patch.selfcheck import _extended


def reference(method: FastV, seen: Seen) -> list[dict[int, int]]:
    found = []
    for tiles in tiles_of(seen.layout):
        everyone = [token for tile in tiles for token in tile]
        count = len(everyone)
        count = min(method.budget, count) if method.retention is None else max(1, round(count * method.retention))
        found.append(dict.fromkeys(sorted(best(seen.text_scores, everyone, count)), 1))
    return found


# ------------------------------------------------------------------------------------------------- on random numbers


def test_by_hand():
    """Four visual tokens in a prompt of six; its last row looks at them with .05 .2 .1 .05."""
    seen = Seen(layout_of([(2, 2)]), text_scores=torch.tensor([0.05, 0.2, 0.1, 0.05]))
    assert FastV(budget=2).select(seen).indices.tolist() == [1, 2]
    assert FastV(budget=3).select(seen).indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_definition(layout):
    for share in (0.05, 0.3, 0.7, 0.97):
        method = FastV(retention=share)
        seen = seen_of(method, layout, seed=int(100 * share))
        assert selected(method, seen) == reference(method, seen)
    assert_images_alone(method, seen)
    assert_scale_is_nothing(FastV(retention=0.3), seen, 2.0**-12)


@pytest.mark.parametrize("budget", [1, 2, 79, 80])
def test_budgets_from_one_to_all(budget):
    method = FastV(budget=budget)
    seen = seen_of(method, LAYOUTS["tiles"])
    found = selected(method, seen)
    assert [len(image) for image in found] == [budget, min(budget, 48)] and found == reference(method, seen)


def test_equal_tokens_and_numbers_that_are_none():
    seen = Seen(layout_of([(4, 4)] * 3), text_scores=torch.ones(48))
    assert sorted(selected(FastV(budget=5), seen)[0]) == [0, 1, 2, 3, 4]
    seen.text_scores[[1, 30]] = torch.nan
    assert sorted(selected(FastV(budget=5), seen)[0]) == [0, 2, 3, 4, 5]
    assert sorted(selected(FastV(budget=47), seen)[0]) == [i for i in range(48) if i != 30]


def test_what_is_read():
    assert FastV(budget=1).needs(CLIP) == Needs(text_attention=(2, "last"))
    assert FastV(budget=1, layer=3).needs(CLIP) == Needs(text_attention=(3, "last"))
    assert FastV(budget=1).needs(CLIP._replace(attention_layers=(1, 4, 8))).text_attention == (4, "last")
    assert FastV(budget=1).needs(CLIP).stage(CLIP) is Stage.LANGUAGE
    with pytest.raises(ValueError, match="layer: expected a decoder layer with softmax attention, one of 1, 4, got 2"):
        FastV(budget=1, layer=2).needs(CLIP._replace(attention_layers=(1, 4)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": 0}, ValueError, "layer: expected at least 1, got 0"),
        ({"layer": "2"}, TypeError, "layer: expected an int, got str"),
        ({"layer": True}, TypeError, "layer: expected an int, got bool"),
        ({"budget": -1}, ValueError, "budget: expected at least 1, got -1"),
        ({"alpha": 0.5}, TypeError, "FastV: expected options among budget, retention, layer, by name, got alpha"),
    ],
    ids=str,
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        FastV(**{"budget": 5, **options})


# ---------------------------------------------------------------------------------------------------- on tiny models


@pytest.mark.parametrize("name", VLM_CASES)
def test_models(name):
    model, inputs = tiny(name)
    assert_model_prunes(model, FastV(retention=0.3), inputs, reference)


@pytest.mark.parametrize("layer", [1, 3])
def test_attention_from_stock_code(layer):
    """That of the last row of each prompt, whatever its padding and however many images it has."""
    model, _ = tiny("llava")
    rows = [prompt(5, "image", 7), prompt(2, "image", 3, "image", seed=1), prompt("image", 1, seed=2)]
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for side in ("left", "right"):
        inputs = batch(rows, images(4), side=side)
        made = forward(model, FastV(budget=9, layer=layer), inputs)
        [seen], [picks] = made.seen, made.picks
        with torch.no_grad():
            weights = eager(**inputs, output_attentions=True).attentions[layer - 1].mean(dim=1)
        [(places, _)] = placeholder_tokens(model, inputs, [seen.layout])
        lasts = [int(mask.nonzero().max()) for mask in inputs["attention_mask"]]
        scores = torch.stack([weights[row, last] for row, last in enumerate(lasts)])[places]
        torch.testing.assert_close(seen.text_scores, scores, rtol=0, atol=1e-5)
        assert of_images(picks, seen.layout) == reference(FastV(budget=9), seen._replace(text_scores=scores))
        assert_logits(model, made.logits, expected_rows(model, inputs, made, original=True), inputs)


def test_positions_stay():
    """The same tokens with positions that move up give other logits; HiPrune's kept tokens have such."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Compact(FastV):
        original_positions = False

    model, inputs = tiny("llava")
    made, compact = forward(model, FastV(budget=9), inputs), forward(model, Compact(budget=9), inputs)
    assert [s.indices.tolist() for s in made.selections] == [s.indices.tolist() for s in compact.selections]
    assert_logits(model, compact.logits, expected_rows(model, inputs, made), inputs)
    assert float((made.logits - compact.logits)[:, -1].abs().max()) > 0.05 * float(made.logits.abs().max())


def test_gaps_in_positions_are_no_ends_of_texts():
    """Stock code takes them for such where there is neither a mask nor a cache."""
    model, _ = tiny("llava")
    inputs = batch([prompt(5, "image", 7)], images(1))
    method = FastV(budget=9)
    rows = expected_rows(model, inputs, forward(model, method, inputs), original=True)
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with hk.applied(model, method), torch.no_grad():
        for use_cache in (False, True):
            assert_logits(model, model(**bare, use_cache=use_cache).logits, rows, inputs)
        cache = model(**bare, use_cache=True)[CACHE]
        step = model(input_ids=torch.tensor([[7]]), **{CACHE: cache}).logits
    with torch.no_grad():
        [expected] = [row_logits(model, _extended(model, row, [7]))[-1:] for row in rows]
    torch.testing.assert_close(step[0], expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llava", "llava_next", "internvl", "qwen2_5_vl", "qwen3_5"])
def test_ways_to_generate(name):
    model, inputs = tiny(name)
    method = FastV(retention=0.3)
    rows = expected_rows(model, inputs, forward(model, method, inputs), original=True)
    greedy = expected_tokens(model, rows)
    with hk.applied(model, method):
        assert generated(model, inputs) == greedy == generated(model, inputs)
        assert generated(model, inputs, cache_implementation="static") == greedy
        assert generated(model, inputs, num_beams=2) == expected_tokens(model, rows, width=2)


def test_encoders_alone():
    model = tiny_encoder("clip b")
    with pytest.raises(
        ValueError, match="FastV: needs text, expected a model with a language model, got CLIPVisionModel"
    ):
        hk.apply_method(model, FastV(budget=7))
    with torch.no_grad():
        assert model(**encoder_inputs("clip b")).last_hidden_state.shape == (2, 50, 64)
