"""VisPruner by its definition: important tokens, and the thinning of the others; on random numbers and tiny models."""

from __future__ import annotations

import pytest
import torch
from method_views import (
    CLIP,
    INTERN,
    LAYOUTS,
    QWEN,
    SIGLIP,
    assert_images_alone,
    assert_model_prunes,
    assert_scale_is_nothing,
    best,
    forward,
    layout_of,
    of_images,
    seen_of,
    selected,
    stock_towers,
    tiles_of,
    tiny,
)
from models import VLM_CASES, encoder_inputs, tiny_encoder
from torch import Tensor

import hiprune_kernels as hk
from hiprune_kernels import VisPruner
from hiprune_kernels.methods import Needs, Seen, Stage
from hiprune_kernels.methods.vispruner import thinned

IMPORTANT, DIVERSE = 1, 2


def cosines(features: Tensor) -> Tensor:
    features = features.double()
    return (features @ features.T) / (features.norm(dim=1)[:, None] * features.norm(dim=1))


def thin(order: list[int], likeness: Tensor, count: int) -> list[int]:
    """The released rule where the list is even; else its even places are one more."""
    while len(order) > count:
        a, b = order[::2], order[1::2]
        worth = [max((float(likeness[i, j]) for j in b), default=0.0) for i in a]
        ranked = sorted(range(len(a)), key=lambda k: -worth[k])
        order = [a[k] for k in ranked[min(8, len(order) - count, len(a)) :]] + b
    return order


def reference(method: VisPruner, seen: Seen) -> list[dict[int, int]]:
    (scores,) = seen.scores.values()
    likeness, found = cosines(seen.features), []
    for (where, _), tiles in zip(seen.layout.images(), tiles_of(seen.layout)):
        image, sizes = {}, seen.layout.sizes[where]
        for size, own in zip(sizes, tiles):
            share = (
                max(1, round(size * method.retention)) if method.budget is None else method.budget * size // sum(sizes)
            )
            share = min(share, size, len(own))
            if share == len(own):
                image |= dict.fromkeys(own, DIVERSE)
                continue
            order = best(scores, own, len(own))
            important = order[: int(share * method.important_share)]
            diverse = thin(order[len(important) :], likeness, share - len(important))
            image |= dict.fromkeys(important, IMPORTANT) | dict.fromkeys(diverse, DIVERSE)
        found.append(dict(sorted(image.items())))
    return found


# ------------------------------------------------------------------------------------------------- on random numbers


def test_by_hand():
    """Attention ranks 3 0 5 1 4 2: 3 and 0 are important; of 5 1 4 2 both at even places go, whatever the features."""
    scores = torch.tensor([5.0, 3, 1, 6, 2, 4])
    for seed in range(5):
        features = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))
        picks = VisPruner(budget=4).select(Seen(layout_of([(2, 3)]), {23: scores}, features=features, encoder=CLIP))
        assert picks.roles.tolist() == [IMPORTANT, DIVERSE, DIVERSE, IMPORTANT, 0, 0]


def test_thinning_by_hand():
    """Even places 0 2 4, odd 1 3: 4 is likest to one of them (3), then 0 (to 1); the likest that stay come first."""
    angles = torch.tensor([0.0, 20.0, 60.0, 100.0, 105.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    order = torch.arange(5)
    assert thinned(order, features, 4).tolist() == [0, 2, 1, 3]
    assert thinned(order, features, 3).tolist() == [2, 1, 3]
    assert thinned(order, features, 2).tolist() == [1, 3]
    assert thinned(order, features, 1).tolist() == [3]
    assert thinned(order, features, 0).tolist() == [] == thinned(order[:0], features, 0).tolist()
    assert thinned(order[:1], features, 0).tolist() == []


def test_eight_at_a_time():
    """Of 40 tokens 8 go in a round, and the list is in another order then: not the same as all at once."""
    features = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    found = thinned(torch.arange(40), features, 13).tolist()
    assert found == thin(list(range(40)), cosines(features), 13) and len(set(found)) == 13


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("encoder", [CLIP, SIGLIP, QWEN], ids=["cls", "no cls", "qwen"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_definition(layout, encoder, share):
    for retention in (0.05, 0.3, 0.7, 0.97):
        method = VisPruner(retention=retention, important_share=share)
        seen = seen_of(method, layout, encoder, seed=int(100 * retention))
        assert selected(method, seen) == reference(method, seen)


@pytest.mark.parametrize("budget", range(1, 17))
def test_every_budget(budget):
    method, layout = VisPruner(budget=budget), layout_of([(4, 4)], [(3, 5)])
    seen = seen_of(method, layout, seed=budget)
    found = selected(method, seen)
    assert found == reference(method, seen) and [len(image) for image in found] == [budget, min(budget, 15)]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_does_not_matter(layout):
    method = VisPruner(retention=0.4)
    seen = seen_of(method, layout)
    assert_images_alone(method, seen)
    for scale in (0.25, 8.0):  # products of powers of two are exact: the order hangs on every bit
        assert_scale_is_nothing(method, seen, scale)


def test_an_image_that_loses_nothing_beside_one_that_does():
    method = VisPruner(budget=6)
    picks = method.select(seen_of(method, layout_of([(2, 3)], [(4, 4)], [(1, 1)])))
    assert picks.roles[:6].tolist() == [DIVERSE] * 6 and int(picks.roles[-1]) == DIVERSE


def test_equal_tokens_and_numbers_that_are_none():
    method, layout = VisPruner(budget=5), layout_of([(4, 4)])
    seen = Seen(layout, {23: torch.ones(16)}, features=torch.ones(16, 2), encoder=CLIP)
    (kept,) = selected(method, seen)
    assert [kept[0], kept[1]] == [IMPORTANT] * 2 and len(kept) == 5
    zero = seen._replace(features=torch.zeros(16, 2))
    assert len(selected(method, zero)[0]) == 5
    seen.scores[23][[0, 3]] = torch.nan  # such tokens come last
    (kept,) = selected(VisPruner(budget=5, important_share=1.0), seen)
    assert sorted(kept) == [1, 2, 4, 5, 6]
    seen.features[7] = torch.nan
    assert len(selected(method, seen)[0]) == 5


def test_what_is_read():
    assert VisPruner(budget=1).needs(CLIP) == Needs({23: "cls"}, features="encoder")
    assert VisPruner(budget=1).needs(SIGLIP) == Needs({26: "mean"}, features="encoder")
    assert VisPruner(budget=1).needs(INTERN) == Needs({24: "cls"}, features="encoder")
    assert all(VisPruner(budget=1).needs(e).stage(e) is Stage.ENCODER for e in (CLIP, SIGLIP, INTERN, QWEN))
    notes = [
        VisPruner(budget=3).select(seen_of(VisPruner(budget=3), layout_of([(3, 3)]), e)).notes for e in (CLIP, QWEN)
    ]
    assert notes == [[""], ["no CLS token: the mean over all queries stands for its attention"]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"important_share": 1.1}, ValueError, r"important_share: expected a share in \[0, 1\], got 1.1"),
        ({"important_share": None}, TypeError, "important_share: expected a float, got NoneType"),
        ({"budget": 2.0}, TypeError, "budget: expected an int, got float"),
        ({"r": 0.5}, TypeError, "VisPruner: expected options among budget, retention, important_share, by name, got r"),
    ],
    ids=str,
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        VisPruner(**{"budget": 5, **options})


# ---------------------------------------------------------------------------------------------------- on tiny models


@pytest.mark.parametrize("name", VLM_CASES)
def test_models(name):
    model, inputs = tiny(name)
    assert_model_prunes(model, VisPruner(retention=0.3), inputs, reference)


@pytest.mark.parametrize("name", ["llava", "llava_next", "video_llava"])
def test_features_are_those_in_front_of_the_projector(name):
    model, inputs = tiny(name)
    method = VisPruner(retention=0.5, important_share=0.2)
    made = forward(model, method, inputs)
    for seen, picks, (states, _) in zip(made.seen, made.picks, stock_towers(model, inputs), strict=True):
        features = states[:, 1:].flatten(0, 1)
        torch.testing.assert_close(seen.features, features, rtol=0, atol=1e-4 * float(features.abs().max()))
        assert of_images(picks, seen.layout) == reference(method, seen._replace(features=features))


def test_encoders_alone():
    model, inputs = tiny_encoder("siglip"), encoder_inputs("siglip")
    with torch.no_grad():
        stock = model(**inputs).last_hidden_state
        with hk.applied(model, VisPruner(budget=7)):
            found = model(**inputs).last_hidden_state
            indices = torch.stack([s.indices for s in hk.last_selection(model)])
    expected = stock.gather(1, indices[..., None].expand(-1, -1, 64))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(stock.abs().max()))
