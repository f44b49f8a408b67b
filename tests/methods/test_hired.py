"""HiRED by its definition, with both of its rules; on random numbers and on tiny models."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from method_views import (
    CLIP,
    INTERN,
    LAYOUTS,
    QWEN,
    SIGLIP,
    TILED,
    assert_images_alone,
    assert_logits,
    assert_model_prunes,
    assert_scale_is_nothing,
    best,
    by_shares,
    expected_rows,
    expected_tokens,
    forward,
    generated,
    layout_of,
    of_images,
    seen_of,
    selected,
    tiles_of,
    tiny,
)
from models import VLM_CASES, anyres_batch, encoder_inputs, tiny_encoder

import hiprune_kernels as hk
from hiprune_kernels import HiRED
from hiprune_kernels.methods import Needs, Seen, Stage


def reference(method: HiRED, seen: Seen) -> list[dict[int, int]]:
    """One image at a time, in Python's floats."""
    layout, found = seen.layout, []
    for image, tiles in enumerate(tiles_of(layout)):
        where, tokens = list(layout.images())[image]
        caps, sizes = [len(tile) for tile in tiles], [math.prod(grid) for grid in layout.grids[where]]
        total = sum(caps)
        total = min(method.budget, total) if method.retention is None else max(1, round(total * method.retention))
        if len(tiles) == 1 or layout.thumbnail is None:
            budgets = by_shares(sizes, total, caps)
        else:
            whole = 0 if layout.thumbnail == 0 else len(tiles) - 1
            others = [i for i in range(len(tiles)) if i != whole]
            n, first = sizes[whole], tokens.start + sum(sizes[:whole])
            early = [float(seen.scores[1][first + i]) for i in range(n)]
            mixed = layout.encoder_tiles is not None and layout.encoder_tiles[image] != layout.tiles[image]
            budgets = [0] * len(tiles)
            budgets[whole] = min(int(total * method.alpha), caps[whole])
            rest = total - budgets[whole]
            if method.rule == "official":
                hot = best(early, list(range(n)), int(n * (1 - method.alpha)))
                band = max(1, n // len(others))
                counts = [sum(1 for token in hot if token // band == k) for k in range(len(others))]
                for k, i in enumerate(others):
                    budgets[i] = min(int(counts[k] / max(1, sum(counts)) * rest), caps[i])
            else:
                rows, columns = (1, 1) if mixed else layout.tile_grids[image]
                height, width = layout.grids[where][whole]
                weights = [0.0] * (rows * columns)
                for i in range(height):
                    for j in range(width):
                        weights[i * rows // height * columns + j * columns // width] += early[i * width + j]
                room = [caps[i] for i in others]
                budgets[whole] = max(budgets[whole], total - sum(room))
                for i, share in zip(others, by_shares(weights, total - budgets[whole], room)):
                    budgets[i] = share
        deep = seen.scores[seen.encoder.feature_layer]
        kept = [token for tile, budget in zip(tiles, budgets) for token in best(deep, tile, budget)]
        found.append(dict.fromkeys(sorted(kept), 1))
    return found


# ------------------------------------------------------------------------------------------------- on random numbers


def hand_seen() -> Seen:
    """The early layer looks at the left half of a 4 x 4 thumbnail of four sub-images."""
    layout = layout_of([(4, 4)] * 5, thumbnail=0, tile_grids=((2, 2),))
    early, deep = torch.zeros(80), torch.arange(80.0)
    early[:16] = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(4)
    return Seen(layout, {1: early, 23: deep}, encoder=TILED)


def test_by_hand():
    official = HiRED(budget=20, rule="official").select(hand_seen())
    assert [sum(1 for i in official.indices.tolist() if 16 * t <= i < 16 * t + 16) for t in range(5)] == [
        10,
        2,
        2,
        2,
        2,
    ]
    assert official.indices.tolist()[-2:] == [-1, -1] and official.fills  # two tokens are lost
    assert official.indices[:10].tolist() == list(range(6, 16))
    paper = HiRED(budget=20).select(hand_seen())
    assert paper.host_counts() == [10, 5, 0, 5, 0] and not paper.fills
    assert paper.indices.tolist() == [*range(6, 16), *range(27, 32), *range(59, 64)]


def test_shares_of_the_thumbnail():
    for alpha, whole in ((0.0, 0), (0.25, 5), (0.99, 16), (1.0, 16)):
        assert HiRED(budget=20, alpha=alpha).select(hand_seen()).counts[0] == whole
    everything_hot = HiRED(budget=20, alpha=0.0, rule="official").select(hand_seen())
    assert everything_hot.host_counts()[:4] == [0, 5, 5, 5] and int(everything_hot.indices.min()) >= 0
    nothing_hot = selected(HiRED(budget=20, alpha=1.0, rule="official"), hand_seen())
    assert sorted(nothing_hot[0]) == list(range(16))


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 0.2}, {"rule": "official"}, {"rule": "official", "alpha": 0.8}], ids=str
)
@pytest.mark.parametrize("encoder", [TILED, SIGLIP, CLIP], ids=["cls", "no cls", "untiled"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_definition(layout, encoder, options):
    if encoder is CLIP:
        layout = layout._replace(thumbnail=None)
    if layout.thumbnail == -1:
        layout = layout._replace(tile_grids=((1, 2), (1, 1), (2, 3)))
    for share in (0.05, 0.3, 0.7, 0.97):
        method = HiRED(retention=share, **options)
        seen = seen_of(method, layout, encoder, seed=int(100 * share))
        assert selected(method, seen) == reference(method, seen)


@pytest.mark.parametrize("rule", ["paper", "official"])
@pytest.mark.parametrize("budget", [1, 2, 4, 5, 79, 80])
def test_budgets_from_one_to_all(budget, rule):
    """Rounding down may leave nothing at all."""
    method = HiRED(budget=budget, rule=rule)
    seen = seen_of(method, LAYOUTS["tiles"], TILED)
    found = selected(method, seen)
    assert found == reference(method, seen)
    if rule == "paper":
        assert [len(image) for image in found] == [budget, min(budget, 48)]
    elif budget == 1:
        assert found[0] == {}


def test_more_sub_images_than_tokens_of_the_thumbnail():
    layout = layout_of([(2, 2)] * 7, thumbnail=0, tile_grids=((2, 3),))
    for rule in ("paper", "official"):
        method = HiRED(budget=12, rule=rule)
        seen = seen_of(method, layout, TILED)
        assert selected(method, seen) == reference(method, seen)


@pytest.mark.parametrize("rule", ["paper", "official"])
@pytest.mark.parametrize("layout", [x for x in LAYOUTS.values() if x.thumbnail != -1])
def test_what_does_not_matter(layout, rule):
    method = HiRED(retention=0.4, rule=rule)
    seen = seen_of(method, layout, TILED)
    assert_images_alone(method, seen)
    for scale in (2.0**-10, 3.0):
        assert_scale_is_nothing(method, seen, scale)


def test_regions_in_another_order_have_the_same_budgets():
    """With rectangles; bands do not know where sub-images lie."""
    layout = layout_of([(4, 4)] * 5, thumbnail=0, tile_grids=((2, 2),))
    method, order = HiRED(budget=37), [3, 1, 0, 2]
    seen = seen_of(method, layout, TILED)
    deep = seen.scores[23].view(5, 16)
    early = seen.scores[1].clone()
    early[:16] = (
        early[:16].view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)[order].view(2, 2, 2, 2).transpose(1, 2).flatten()
    )
    turned = seen._replace(scores={1: early, 23: torch.cat([deep[:1], deep[1:][order]]).flatten()})
    here, there = method.select(seen), method.select(turned)
    assert there.host_counts()[1:5] == [here.host_counts()[1 + order[i]] for i in range(4)]
    assert len(set(here.host_counts())) > 3


def test_equal_tokens():
    layout = layout_of([(4, 4)] * 5, thumbnail=0, tile_grids=((2, 2),))
    seen = Seen(layout, {1: torch.zeros(80), 23: torch.ones(80)}, encoder=TILED)
    assert sorted(selected(HiRED(budget=9), seen)[0]) == [0, 1, 2, 3, 16, 17, 32, 48, 64]


def test_numbers_that_are_none():
    """Tokens without a number come last; an area without one gets nothing, or is not hot."""
    layout = layout_of([(4, 4)] * 5, thumbnail=0, tile_grids=((2, 2),))
    seen = seen_of(HiRED(budget=9), layout, TILED)
    seen.scores[23][[3, 20]] = torch.nan
    (kept,) = selected(HiRED(budget=60, alpha=0.2), seen)
    assert 3 not in kept and 20 not in kept
    seen.scores[1][:4] = torch.nan
    without = seen._replace(scores=seen.scores | {1: seen.scores[1].nan_to_num(nan=0.0)})
    without.scores[1][:16].view(4, 4)[:2] = 0  # the rest of the upper two areas, which have the NaN
    counts = [HiRED(budget=9).select(each).host_counts() for each in (seen, without)]
    assert counts[0] == counts[1] and counts[0][1:3] == [0, 0] and min(counts[0][3:]) > 0
    picks = HiRED(budget=20, rule="official").select(seen)
    seen.scores[1][:4] = -1.0
    assert torch.equal(HiRED(budget=20, rule="official").select(seen).indices, picks.indices)


def test_what_is_read():
    assert HiRED(budget=1).needs(CLIP) == Needs(scores={23: "cls"})
    assert HiRED(budget=1).needs(TILED) == Needs(scores={1: "cls", 23: "cls"})
    assert HiRED(budget=1).needs(SIGLIP) == Needs(scores={1: "mean", 26: "mean"})
    assert HiRED(budget=1, rule="official").needs(INTERN) == Needs(scores={1: "cls", 24: "cls"})
    assert HiRED(budget=1).needs(TILED).stage(TILED) is Stage.FEATURE_LAYER
    notes = HiRED(budget=5).select(seen_of(HiRED(budget=5), LAYOUTS["tiles"], SIGLIP)).notes
    assert notes == ["no CLS token: the mean over all queries stands for its attention"] * 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"alpha": -0.1}, ValueError, r"alpha: expected a share in \[0, 1\], got -0.1"),
        ({"alpha": None}, TypeError, "alpha: expected a float, got NoneType"),
        ({"rule": "bands"}, ValueError, 'rule: expected "paper" or "official", got \'bands\''),
        ({"rule": ["paper"]}, ValueError, 'rule: expected "paper" or "official"'),
        ({"budget": True}, TypeError, "budget: expected an int, got bool"),
        ({"layer": 2}, TypeError, "HiRED: expected options among budget, retention, alpha, rule, by name, got layer"),
    ],
    ids=str,
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        HiRED(**{"budget": 5, **options})


def test_encoders_that_it_cannot_serve():
    with pytest.raises(ValueError, match="HiRED: expected an encoder with a CLS token, or tiles, got Qwen2-VL"):
        HiRED(budget=1).needs(QWEN)
    with pytest.raises(
        ValueError, match='rule: expected "official", as InternVL does not tell where tiles lie, got "pa'
    ):
        HiRED(budget=1).needs(INTERN)


# ---------------------------------------------------------------------------------------------------- on tiny models


@pytest.mark.parametrize("rule", ["paper", "official"])
@pytest.mark.parametrize("name", VLM_CASES)
def test_models(name, rule):
    model, inputs = tiny(name)
    method = HiRED(retention=0.3, rule=rule)
    if name.startswith(("qwen", "glm")) or (name, rule) == ("internvl", "paper"):
        message = (
            "rule: expected" if name == "internvl" else "HiRED: expected an encoder with a CLS token, or tiles, got "
        )
        with pytest.raises(ValueError, match=message):
            hk.apply_method(model, method)
        assert not hk.is_patched(model)
        return
    assert_model_prunes(model, method, inputs, reference)


@pytest.mark.parametrize("rule", ["paper", "official"])
@pytest.mark.parametrize("budget", [1, 3, 60])
def test_few_tokens(budget, rule):
    """Sub-images, and by the released code's rounding whole images, that keep nothing; in the ways to generate."""
    model, _ = tiny("llava_next")
    inputs = anyres_batch(model, [[(90, 40), 5], [4, (96, 90), 3, (40, 90), 2]])
    method = HiRED(budget=budget, rule=rule)
    made = forward(model, method, inputs)
    [seen], [picks] = made.seen, made.picks
    assert of_images(picks, seen.layout) == reference(method, seen)
    if budget == 1:
        assert [len(s.indices) for s in made.selections] == ([0] * 3 if rule == "official" else [1] * 3)
    rows = expected_rows(model, inputs, made)
    assert_logits(model, made.logits, rows, inputs)
    with hk.applied(model, method):
        assert generated(model, inputs) == expected_tokens(model, rows)
        assert generated(model, inputs, num_beams=2) == expected_tokens(model, rows, width=2)


def test_scores_from_stock_code():
    """The thumbnail's layer 1 and the feature layer of eager attention give the same picks."""
    model, _ = tiny("llava_next")
    inputs = anyres_batch(model, [[3, (96, 90), 3], [(40, 90), 2]])
    for rule in ("paper", "official"):
        method = HiRED(budget=41, rule=rule)
        made = forward(model, method, inputs)
        [seen], [picks] = made.seen, made.picks
        tower = copy.deepcopy(model.model.vision_tower).double()
        tower.set_attn_implementation("eager")
        pixels = torch.cat([own[:count] for own, count in zip(inputs["pixel_values"], seen.layout.tiles)])
        with torch.no_grad():
            maps = tower(pixels.double(), output_attentions=True).attentions
        scores = {layer: maps[layer - 1].mean(dim=1)[:, 0, 1:].flatten() for layer in (1, 4)}
        assert of_images(picks, seen.layout) == reference(method, seen._replace(scores=scores))


def test_encoders_alone():
    model, inputs = tiny_encoder("clip b"), encoder_inputs("clip b")
    with torch.no_grad():
        stock = model(**inputs).last_hidden_state
        with hk.applied(model, HiRED(budget=7)), hk.applied(model, hk.FasterVLM(budget=7)):
            expected = model(**inputs).last_hidden_state
        with hk.applied(model, HiRED(budget=7)):
            found = model(**inputs).last_hidden_state
    assert found.shape == (2, 8, 64) and torch.equal(found, expected) and not torch.equal(found, stock[:, :8])
