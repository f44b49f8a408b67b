"""What each method keeps, without a model: cases by hand, the definitions in plain loops, and what holds for all."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from pathlib import Path

import pytest
import torch
from method_cases import CLIP, LAYOUTS, METHOD_CASES, SIGLIP, images_of, layout_of, of_images, random_seen

from hiprune_kernels import methods
from hiprune_kernels.facts import ENCODERS
from hiprune_kernels.methods import DivPrune, FasterVLM, HiPrune, Needs, Random, Seen, Stage, UniformGrid, picks_of
from hiprune_kernels.methods.base import checked_picks
from hiprune_kernels.methods.divprune import farthest_points

SHARES = (0.1, 0.34, 0.5, 0.9)


def test_no_method_is_missing():
    """A method that is added comes with a case here, or with a file of its own."""
    files = {path.stem.removeprefix("test_") for path in Path(__file__).parent.glob("test_*.py")}
    others = set(methods.METHODS) - set(METHOD_CASES)
    assert {name.replace("++", "_pp").replace("-", "_") for name in others} <= files
    assert all(case.cls is methods.METHODS[name] for name, case in METHOD_CASES.items())
    assert {method.__name__ for method in methods.METHODS.values()} <= set(methods.__all__)


@pytest.fixture(params=METHOD_CASES)
def case(request):
    return METHOD_CASES[request.param]


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def selected(method, seen):
    """Picks that hold what `Picks` promises."""
    picks = method.select(seen)
    return checked_picks(dataclasses.replace(method), picks, seen.layout, method.kept(seen.layout), seen.device)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected):
        for one, other in zip(ours, theirs):
            assert torch.equal(one, other)


# ------------------------------------------------------------------------------------------------------ by definition


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("encoder", [CLIP, SIGLIP], ids=["cls", "no cls"])
def test_definition(case, layout, share, encoder):
    method = case.make(retention=share)
    seen = random_seen(method, layout, encoder=encoder)
    expected = [case.expected(method, image) for image in images_of(seen)]
    assert_same(of_images(selected(method, seen), layout), expected)


@pytest.mark.parametrize("neighborhood", ["cross", "square", "row", "none"])
@pytest.mark.parametrize("rule", ["paper", "grid"])
def test_definition_of_hiprune_s_options(layout, rule, neighborhood):
    case = METHOD_CASES["hiprune"]
    for alpha in (0.0, 0.3, 1.0):
        method = HiPrune(retention=0.5, alpha=alpha, rule=rule, neighborhood=neighborhood)
        seen = random_seen(method, layout, seed=1)
        expected = [case.expected(method, image) for image in images_of(seen)]
        assert_same(of_images(selected(method, seen), layout), expected)


@pytest.mark.parametrize("budget", range(1, 16))
def test_definition_at_every_budget(case, budget):
    method, layout = case.make(budget=budget), layout_of([(4, 4)], [(4, 4)])
    seen = random_seen(method, layout, seed=budget)
    picks = selected(method, seen)
    assert method.kept(layout) == [budget, budget] == [len(indices) for indices, _ in of_images(picks, layout)]
    assert_same(of_images(picks, layout), [case.expected(method, image) for image in images_of(seen)])


def test_fastervlm_by_hand():
    """Means over heads of (.1 .6 .3) and (.5 .2 .3): tokens 0 and 2 are equal, and the lower one stays."""
    scores = torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]], dtype=torch.float64).mean(dim=0).float()
    assert scores[0] == scores[2]
    picks = FasterVLM(budget=2).select(Seen(layout_of([(1, 3)]), {23: scores}, encoder=CLIP))
    assert picks.indices.tolist() == [0, 1] and picks.roles.tolist() == [1, 1, 0]


def test_divprune_by_hand():
    """Directions of 0, 10, 90 and 180 degrees: first the last one, then the opposite one, then the one between."""
    angles = torch.tensor([0.0, 10.0, 90.0, 180.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert farthest_points(features, 3).tolist() == [3, 0, 2]
    lengths = torch.tensor([[0.1], [30.0], [2.0], [1.0]])  # which do not count
    seen = Seen(layout_of([(2, 2)]), features=features * lengths)
    assert DivPrune(budget=3).select(seen).indices.tolist() == [0, 2, 3]
    assert DivPrune(budget=1).select(seen).indices.tolist() == [3]


def test_hiprune_by_hand():
    """One anchor in the middle of a 3 x 3 grid, its four neighbours, and the best of the corners."""
    anchors = torch.tensor([0.0, 0, 0, 0, 9, 0, 0, 0, 0])
    registers = torch.tensor([1.0, 9, 3, 9, 9, 9, 2, 9, 4])
    seen = Seen(layout_of([(3, 3)]), {9: anchors, 23: registers}, encoder=CLIP)
    picks = HiPrune(budget=7, alpha=0.5).select(seen)
    assert picks.roles.tolist() == [0, 2, 3, 2, 1, 2, 0, 2, 3]
    assert picks.indices.tolist() == [1, 2, 3, 4, 5, 7, 8]
    wrapped = HiPrune(budget=4, alpha=1.0, neighborhood="row")
    seen = seen._replace(scores={9: torch.tensor([0.0, 0, 9, 0, 0, 0, 0, 0, 0]), 23: registers})
    assert wrapped.select(seen).roles.tolist() == [0, 2, 1, 2, 3, 0, 0, 0, 0]


def test_uniform_grid_by_hand():
    def places(grid, budget, **options):
        return UniformGrid(budget=budget).select(Seen(layout_of([grid], **options))).indices.tolist()

    assert places((4, 4), 4) == [5, 7, 13, 15]
    assert places((2, 2), 1) == [3]
    assert places((1, 6), 3) == [1, 3, 5]
    assert places((6, 1), 2) == [1, 4]
    assert places((4, 4), 16) == list(range(16))
    border = [0, 1, 2, 3, 4, 7, 8, 11, 12, 13, 14, 15]
    assert places((4, 4), 2, padding=border) == [9, 10]
    assert places((4, 4), 2, padding=[*border, 6]) == [5, 10]


def test_random_by_hand():
    """The numbers are part of what is promised: the same seed keeps the same tokens in every version."""
    seen = Seen(layout_of([(4, 4)]))
    assert Random(budget=5).select(seen).indices.tolist() == [6, 9, 10, 11, 12]
    assert Random(budget=5, seed=1).select(seen).indices.tolist() != [6, 9, 10, 11, 12]


def test_random_is_fair():
    """Over many seeds each of the candidates is kept equally often."""
    layout, counts, seeds = layout_of([(2, 5)], padding=[3, 7]), torch.zeros(10), 2000
    for seed in range(seeds):
        counts += Random(budget=3, seed=seed).select(Seen(layout)).roles
    expected = seeds * 3 / 8
    deviation = math.sqrt(seeds * 3 / 8 * 5 / 8)
    fair = counts[layout.candidates]
    assert counts[~layout.candidates].sum() == 0 and counts.sum() == 3 * seeds
    assert bool(((fair - expected).abs() < 4 * deviation).all()) and fair.std() > 0


# ---------------------------------------------------------------------------------------------- what holds for all


@pytest.mark.parametrize("share", SHARES)
def test_as_many_as_promised_ascending_and_no_padding(case, layout, share):
    method = case.make(retention=share)
    seen = random_seen(method, layout)
    picks, promised = method.select(seen), method.kept(layout)
    counts = [sum(picks.host_counts()[tiles]) for tiles, _ in layout.images()]
    assert counts == promised and len(picks.indices) == sum(promised)
    for (indices, roles), count, (tiles, tokens) in zip(of_images(picks, layout), promised, layout.images()):
        assert bool((indices.diff() > 0).all()) and torch.equal(indices, roles.nonzero()[:, 0])
        empty = 0 if layout.candidate_counts is None else layout.candidate_counts[tiles].count(0)
        assert len(indices) == count - (empty if case.cls is not DivPrune else 0)
        if layout.candidates is not None:
            assert bool(layout.candidates[tokens][indices].all())
    assert picks.fills or not bool((picks.indices < 0).any())


def test_a_second_run_gives_the_same_bits(case, layout):
    method = case.make(retention=0.4)
    seen = random_seen(method, layout)
    first, second = method.select(seen), copy.deepcopy(method).select(copy.deepcopy(seen))
    assert torch.equal(first.indices, second.indices) and torch.equal(first.roles, second.roles)


def alone(seen, image):
    """What is seen of one image."""
    layout = seen.layout
    tiles, tokens = list(layout.images())[image]
    own = layout_of(list(layout.grids[tiles]))
    if layout.candidates is not None:
        own = own.with_candidates(layout.candidates[tokens])
    features = None if seen.features is None else seen.features[tokens]
    return seen._replace(
        layout=own, scores={layer: score[tokens] for layer, score in seen.scores.items()}, features=features
    )


def test_neighbours_in_the_batch_change_nothing(case, layout):
    method = case.make(retention=0.4)
    seen = random_seen(method, layout)
    expected = [
        of_images(method.select(one), one.layout)[0] for one in (alone(seen, i) for i in range(len(layout.tiles)))
    ]
    assert_same(of_images(method.select(seen), layout), expected)


def test_images_in_another_order_are_selected_alike(case, layout):
    method = case.make(retention=0.4)
    seen = random_seen(method, layout)
    order = list(reversed(range(len(layout.tiles))))
    parts = [alone(seen, image) for image in order]
    other = layout_of(*(list(part.layout.grids) for part in parts))
    if layout.candidates is not None:
        other = other.with_candidates(torch.cat([part.layout.candidates for part in parts]))
    turned = seen._replace(
        layout=other,
        scores={layer: torch.cat([part.scores[layer] for part in parts]) for layer in seen.scores},
        features=None if seen.features is None else torch.cat([part.features for part in parts]),
    )
    here, there = of_images(method.select(seen), layout), of_images(method.select(turned), other)
    assert_same(there, [here[image] for image in order])


@pytest.mark.parametrize("scale", [2.0**-20, 0.3, 7.0, 2.0**20])
def test_scores_and_features_of_another_scale_change_nothing(case, layout, scale):
    method = case.make(retention=0.4)
    seen = random_seen(method, layout)
    scaled = seen._replace(
        scores={layer: score * scale for layer, score in seen.scores.items()},
        features=None if seen.features is None else seen.features * scale,
    )
    assert_same(of_images(method.select(scaled), layout), of_images(method.select(seen), layout))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_tokens_are_never_kept_twice(case, layout, value):
    """Of tokens that are all alike; those of features of length zero too, which have no direction."""
    for share in (0.3, 0.95):
        method = case.make(retention=share)
        seen = random_seen(method, layout)
        seen = seen._replace(
            scores={layer: torch.full_like(score, value) for layer, score in seen.scores.items()},
            features=None if seen.features is None else torch.full_like(seen.features, value),
        )
        for indices, _ in of_images(selected(method, seen), layout):
            assert len(set(indices.tolist())) == len(indices) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_features_of_other_dtypes(dtype):
    """Distances are computed in float32 or better."""
    method, layout = DivPrune(retention=0.5), layout_of([(4, 4)])
    seen = random_seen(method, layout)
    seen = seen._replace(features=seen.features.to(dtype))
    expected = [METHOD_CASES["divprune"].expected(method, image) for image in images_of(seen)]
    assert_same(of_images(method.select(seen), layout), expected)


@pytest.mark.parametrize("size", [2, 5, 9])
def test_the_first_token_of_divprune_is_the_lower_one_of_a_pair(size):
    """Two tokens that are each other's nearest are equally far from it, whichever way their distance is rounded."""
    pairs = 0
    for seed in range(300):
        features = torch.randn(size, 7, generator=torch.Generator().manual_seed(seed))
        rows = features.double() / features.double().norm(dim=1, keepdim=True)
        nearest = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(9).amin(dim=1)
        best = (nearest >= nearest.max() - 1e-12).nonzero()[:, 0].tolist()
        pairs += len(best) == 2
        assert DivPrune(budget=1).select(Seen(layout_of([(1, size)]), features=features)).indices.tolist() == best[:1]
    assert pairs > 0


def test_one_token_and_all_but_one(case):
    layout = layout_of([(3, 4)], [(3, 4)])
    for budget in (1, 11):
        method = case.make(budget=budget)
        seen = random_seen(method, layout)
        picks = selected(method, seen)
        assert picks.host_counts() == [budget, budget]
        assert_same(of_images(picks, layout), [case.expected(method, image) for image in images_of(seen)])


def test_an_image_that_loses_nothing_beside_one_that_does(case):
    method, layout = case.make(budget=6), layout_of([(2, 3)], [(4, 4)], [(1, 1)])
    picks = selected(method, random_seen(method, layout))
    found = of_images(picks, layout)
    assert [len(indices) for indices, _ in found] == method.kept(layout) == [6, 6, 1]
    last = len(method.roles)
    assert bool((found[0][1] == last).all()) and bool((found[2][1] == last).all())


def test_a_budget_too_small_for_an_image_s_tiles(case):
    """Methods that look at an image as a whole have no such limit."""
    method, layout = case.make(budget=2), layout_of([(3, 3)] * 3)
    if case.cls is DivPrune:
        assert method.kept(layout) == [2]
        return
    with pytest.raises(ValueError, match="budget: expected at least 3, one token for each tile"):
        method.kept(layout)


def test_methods_promise_from_sizes_alone(case, layout):
    """`kept` gets a layout that has nothing but grids, tiles and how many candidates there are."""
    method = case.make(retention=0.4)
    bare = layout_of(*(list(layout.grids[tiles]) for tiles, _ in layout.images()))
    bare = bare._replace(candidate_counts=layout.candidate_counts)
    assert method.kept(bare) == method.kept(layout)


def test_methods_are_values(case):
    """They compare, hash, copy and pickle by their options, and cannot be changed."""
    method = case.make(budget=5)
    for twin in (case.make(budget=5), copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
        assert twin == method and hash(twin) == hash(method)
    assert method != case.make(budget=6) and method != case.make(retention=0.5)
    assert repr(method).startswith(f"{case.cls.__name__}(budget=5")
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.budget = 6
    options = methods.options_of(case.cls)
    assert {"budget", "retention"} <= set(options) and set(case.options) <= set(options)


# -------------------------------------------------------------------------------------------------- needs and stages


def test_what_each_method_reads():
    assert FasterVLM(budget=1).needs(CLIP) == Needs(scores={23: "cls"})
    assert FasterVLM(budget=1).needs(SIGLIP) == Needs(scores={26: "mean"})
    assert HiPrune(budget=1).needs(CLIP) == Needs(scores={9: "all", 23: "all"})
    assert HiPrune(budget=1, score_queries="cls", object_layer=3).needs(CLIP) == Needs(scores={3: "cls", 23: "cls"})
    assert HiPrune(budget=1, rule="official").needs(CLIP) == Needs(scores={9: "mean", 23: "mean"})
    qwen = CLIP._replace(model_type="qwen2_vl_vision", kind=ENCODERS["qwen2_vl_vision"], num_prefix_tokens=0)
    assert HiPrune(budget=1, rule="official").needs(qwen._replace(depth=32, feature_layer=32)) == Needs(
        scores={16: "all", 32: "all"}
    )
    assert DivPrune(budget=1).needs(CLIP) == Needs(features="language")
    assert Random(budget=1).needs(CLIP) == UniformGrid(budget=1).needs(CLIP) == Needs()


STAGES = [
    (Needs(), Stage.FEATURE_LAYER, Stage.FEATURE_LAYER),
    (Needs(scores={1: "all", 23: "mean"}), Stage.FEATURE_LAYER, Stage.FEATURE_LAYER),
    (Needs(keys=True), Stage.ENCODER, Stage.ENCODER),
    (Needs(features="encoder"), Stage.ENCODER, Stage.ENCODER),
    (Needs(region_features=22), Stage.FEATURE_LAYER, Stage.FEATURE_LAYER),
    (Needs(region_features=23), Stage.FEATURE_LAYER, Stage.ENCODER),
    (Needs(features="language"), Stage.LANGUAGE, Stage.LANGUAGE),
    (Needs(text=True), Stage.LANGUAGE, Stage.LANGUAGE),
    (Needs(text_attention=(2, "max"), features="encoder"), Stage.LANGUAGE, Stage.LANGUAGE),
]


@pytest.mark.parametrize(("needs", "with_cls", "without"), STAGES)
def test_what_is_read_decides_when_a_method_runs(needs, with_cls, without):
    """The mean of a tile's finished rows needs all of them; its CLS row is one."""
    assert needs.stage(CLIP) is with_cls
    assert needs.stage(CLIP._replace(num_prefix_tokens=0)) is without


def test_picks_in_any_order():
    picks = picks_of(torch.tensor([7, 0, 5]), layout_of([(2, 2)], [(2, 2)]))
    assert picks.indices.tolist() == [0, 5, 7] and picks.host_counts() == [1, 2]
    assert picks.roles.tolist() == [1, 0, 0, 0, 0, 1, 0, 1] and not picks.fills and not picks.even
