"""VisionZip by its definition: dominant tokens, the CLS row, and merged ones; on random numbers and on tiny models."""

from __future__ import annotations

import copy

import pytest
import torch
from method_views import (
    CLIP,
    INTERN,
    LAYOUTS,
    QWEN,
    SIGLIP,
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
    seen_of,
    selected,
    stock_towers,
    tiles_of,
    tiny,
)
from models import VLM_CASES, anyres_batch, encoder_inputs, tiny_clip_config, tiny_encoder, tiny_onevision
from torch import Tensor

import hiprune_kernels as hk
from hiprune_kernels import VisionZip
from hiprune_kernels.methods import Needs, Seen, Stage

CLS, CONTEXTUAL, DOMINANT = 1, 2, 3
ENCODERS = {"cls": CLIP, "no cls": SIGLIP, "internvl": INTERN, "qwen": QWEN}


def budgets_of(method, layout) -> list[int]:
    """Of each tile: its part of the budget, rounded down, or the share; at most its candidates."""
    found = []
    for (tiles, _), candidates in zip(layout.images(), tiles_of(layout)):
        sizes = layout.sizes[tiles]
        for size, own in zip(sizes, candidates):
            share = (
                max(1, round(size * method.retention)) if method.budget is None else method.budget * size // sum(sizes)
            )
            found.append(min(share, size, len(own)))
    return found


def parts_of(method: VisionZip, seen: Seen) -> list[tuple[list[int], list[int], list[int], bool]]:
    """Of each tile dominant tokens, targets, all others, and whether its CLS row stays."""
    (scores,) = seen.scores.values()
    keeps = seen.encoder.has_cls and not seen.encoder.kind.merges_rows and seen.layout.pool is None
    found = []
    tiles = [tile for image in tiles_of(seen.layout) for tile in image]
    for own, budget in zip(tiles, budgets_of(method, seen.layout)):
        if budget == len(own):
            found.append((own, [], [], False))
            continue
        c = min(round(method.contextual_share * budget), budget - 1)
        dominant = sorted(best(scores, own, budget - c - keeps))
        rest = [token for token in own if token not in dominant]
        targets = rest[:: max(1, len(rest) // c)][:c] if c else []
        found.append((dominant, targets, [token for token in rest if token not in targets], keeps))
    return found


def reference(method: VisionZip, seen: Seen) -> list[dict[int, int]]:
    """The CLS row has the place of the first token that is neither dominant nor a target."""
    tiles = []
    for dominant, targets, others, keeps in parts_of(method, seen):
        roles = dict.fromkeys(dominant, DOMINANT) | dict.fromkeys(targets, CONTEXTUAL)
        tiles.append(roles | ({others[0]: CLS} if keeps else {}))
    found, tiles = [], iter(tiles)
    for count in seen.layout.tiles:
        image = {token: role for _ in range(count) for token, role in next(tiles).items()}
        found.append(dict(sorted(image.items())))
    return found


def merged_rows(method: VisionZip, seen: Seen, features: Tensor, keys: Tensor, cls: Tensor | None) -> dict[int, Tensor]:
    """What stands at each kept place, in float64: loops over tokens."""
    features, keys, found = features.double(), keys.double(), {}
    for tile, (dominant, targets, others, keeps) in enumerate(parts_of(method, seen)):
        groups = {target: [] for target in targets}
        for token in others if targets else []:
            cosines = [float(keys[token] @ keys[t] / (keys[token].norm() * keys[t].norm())) for t in targets]
            groups[targets[cosines.index(max(cosines))]].append(token)
        contextual = {
            target: features[target] + (features[group].mean(dim=0) if group else 0) for target, group in groups.items()
        }
        if not keeps:
            found |= {token: features[token] for token in dominant} | contextual
            continue
        places = sorted([*dominant, *targets, others[0]])
        rows = [cls[tile].double(), *(features[t] for t in dominant), *(contextual[t] for t in targets)]
        found |= dict(zip(places, rows, strict=True))
    return found


# ------------------------------------------------------------------------------------------------- on random numbers


def hand_seen() -> Seen:
    keys = torch.tensor([[1.0, 0], [1, 0], [1, 2], [0, 1], [1, 1], [1, 0.2]])
    scores = {23: torch.tensor([0.30, 0.05, 0.20, 0.10, 0.25, 0.10])}
    features = torch.tensor([[0.0], [10], [20], [30], [40], [50]])
    return Seen(layout_of([(2, 3)]), scores, keys, features, torch.tensor([[-1.0]]), encoder=CLIP)


def test_by_hand():
    """Released with dominant 3, the CLS row among them, and contextual 2."""
    seen, method = hand_seen(), VisionZip(budget=5, contextual_share=0.4)
    picks = method.select(seen)
    assert picks.roles.tolist() == [DOMINANT, CONTEXTUAL, CLS, CONTEXTUAL, DOMINANT, 0]
    assert [method.roles[role - 1] for role in (CLS, CONTEXTUAL, DOMINANT)] == ["CLS", "contextual", "dominant"]
    assert method.merge(seen.features, seen, picks)[picks.indices].flatten().tolist() == [-1, 0, 40, 60, 50]
    assert picks.notes == ["the CLS row is kept"]
    assert torch.equal(seen.features, hand_seen().features)
    in_place = seen._replace(encoder=INTERN)
    picks = method.select(in_place)  # dominant 0, 2, 4; others 1, 3, 5; targets 1, 3
    assert picks.roles.tolist() == [DOMINANT, CONTEXTUAL, DOMINANT, CONTEXTUAL, DOMINANT, 0]
    assert method.merge(seen.features, in_place, picks)[picks.indices].flatten().tolist() == [0, 60, 20, 30, 40]
    assert picks.notes == [""]


def test_few_rows():
    """One row is the CLS row's; a target is never the only row but for it."""
    seen = hand_seen()
    for share, budget, rows in (
        (0.4, 1, [-1]),
        (0.9, 2, [-1, 0 + 30]),  # all six are others, the first the target of all
        (0.0, 3, [-1, 0, 40]),
        (0.3, 6, [0, 10, 20, 30, 40, 50]),
    ):
        method = VisionZip(budget=budget, contextual_share=share)
        picks = method.select(seen)
        assert method.merge(seen.features, seen, picks)[picks.indices].flatten().tolist() == rows


@pytest.mark.parametrize("share", [0.0, 10 / 64, 0.5, 0.99])
@pytest.mark.parametrize("encoder", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_definition(layout, encoder, share):
    layout = layout._replace(encoder_tiles=None)
    for retention in (0.05, 0.3, 0.7, 0.97):
        method = VisionZip(retention=retention, contextual_share=share)
        seen = seen_of(method, layout, encoder, seed=int(100 * retention))
        assert selected(method, seen) == reference(method, seen)
        picks = method.select(seen)
        wide = None if seen.regions is None else seen.regions @ torch.ones(6, 16)
        merged = method.merge(seen.features, seen._replace(regions=wide), picks)
        expected = merged_rows(method, seen, seen.features, seen.keys, wide)
        assert merged.shape == seen.features.shape and merged.dtype == seen.features.dtype
        assert sorted(expected) == sorted(picks.indices[picks.indices >= 0].tolist())
        for token, row in expected.items():
            torch.testing.assert_close(merged[token].double(), row, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_does_not_matter(layout):
    for encoder in (CLIP, QWEN):
        method = VisionZip(retention=0.4)
        seen = seen_of(method, layout._replace(encoder_tiles=None), encoder)
        assert_images_alone(method, seen)
        assert_scale_is_nothing(method, seen, 5.0)


def test_an_image_that_loses_nothing_beside_one_that_does():
    """It has the last role, and is not merged."""
    method = VisionZip(budget=6)
    seen = seen_of(method, layout_of([(2, 3)], [(4, 4)], [(1, 1)]), QWEN)
    picks = method.select(seen)
    assert picks.roles[:6].tolist() == [DOMINANT] * 6 and picks.roles[-1] == DOMINANT
    merged = method.merge(seen.features, seen, picks)
    assert torch.equal(merged[:6], seen.features[:6]) and torch.equal(merged[-1], seen.features[-1])


def test_equal_tokens_and_numbers_that_are_none():
    """Of equal keys the first target has all; tokens without a number come last."""
    method, layout = VisionZip(budget=4, contextual_share=0.5), layout_of([(3, 3)])
    seen = seen_of(method, layout, QWEN)._replace(keys=torch.ones(9, 2), scores={32: torch.ones(9)})
    picks = method.select(seen)
    assert picks.roles.tolist() == [3, 3, 2, 0, 0, 2, 0, 0, 0]
    merged = method.merge(seen.features, seen, picks)
    torch.testing.assert_close(merged[2], seen.features[2] + seen.features[[3, 4, 6, 7, 8]].mean(dim=0))
    assert torch.equal(merged[5], seen.features[5])
    seen.scores[32][[0, 4]] = torch.nan
    assert method.select(seen).roles.tolist()[:4] == [2, 3, 3, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_other_dtypes(dtype):
    """Means are taken in float32."""
    method = VisionZip(budget=5, contextual_share=0.4)
    seen = seen_of(method, LAYOUTS["one image"], QWEN)
    features = seen.features.to(dtype)
    picks = method.select(seen)
    merged = method.merge(features, seen, picks)
    assert merged.dtype == dtype
    for token, row in merged_rows(method, seen, features, seen.keys, None).items():
        assert torch.allclose(merged[token].double(), row, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_what_is_read():
    common = {"keys": True, "features": "encoder"}
    assert VisionZip(budget=1).needs(CLIP) == Needs({23: "cls"}, region_features=23, **common)
    assert VisionZip(budget=1).needs(SIGLIP) == Needs({26: "mean"}, **common)
    assert VisionZip(budget=1).needs(INTERN) == Needs({24: "cls"}, keys=True, features="language")
    assert VisionZip(budget=1).needs(QWEN) == Needs({32: "mean"}, keys=True, features="language")
    stages = [VisionZip(budget=1).needs(encoder).stage(encoder) for encoder in ENCODERS.values()]
    assert stages == [Stage.ENCODER, Stage.ENCODER, Stage.LANGUAGE, Stage.LANGUAGE]
    assert [round(x * VisionZip.contextual_share) for x in (64, 128, 192)] == [10, 20, 30]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"contextual_share": 1}, ValueError, "contextual_share: expected a share below 1, got 1"),
        ({"contextual_share": -0.1}, ValueError, r"contextual_share: expected a share in \[0, 1\], got -0.1"),
        ({"contextual_share": "a"}, TypeError, "contextual_share: expected a float, got str"),
        ({"retention": 0.3}, ValueError, "budget: expected exactly one of budget and retention"),
        ({"dominant": 54}, TypeError, "VisionZip: expected options among budget, retention, contextual_share, by name"),
    ],
    ids=str,
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        VisionZip(**{"budget": 5, **options})


# ---------------------------------------------------------------------------------------------------- on tiny models


def assert_merges(model, method, inputs: dict, **options) -> None:
    """CLS and contextual rows from stock hidden states and keys, through the stock projector."""
    towers = stock_towers(model, inputs) if model.config.model_type.startswith(("llava", "video")) else None

    def changed(made, number: int, own: Tensor) -> Tensor:
        seen = made.seen[number]
        if towers is None or seen.layout.pool is not None:
            rows, project = merged_rows(method, seen, own, seen.keys, None), None
        else:
            states, keys = towers[number]
            prefix = seen.encoder.num_prefix_tokens
            keys = keys[:, prefix:].flatten(0, 1)
            torch.testing.assert_close(seen.keys, keys, rtol=0, atol=1e-4 * float(keys.abs().max()))
            rows = merged_rows(method, seen, states[:, prefix:].flatten(0, 1), keys, states[:, 0])
            project = model.model.multi_modal_projector
        places = sorted(rows)
        stack = torch.stack([rows[place] for place in places]).float()
        with torch.no_grad():
            stack = stack if project is None else project(stack[None])[0]
        return own.index_copy(0, torch.tensor(places), stack)

    assert_model_prunes(model, method, inputs, reference, changed, **options)


@pytest.mark.parametrize("name", VLM_CASES)
def test_models(name):
    model, inputs = tiny(name)
    assert_merges(model, VisionZip(retention=0.3, contextual_share=0.4), inputs)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_padding_that_is_taken_out_afterwards(name):
    model, inputs = tiny(name)
    assert_merges(model, VisionZip(retention=0.3, contextual_share=0.4), inputs, unpad="after")


@pytest.mark.parametrize(
    "options", [{"budget": 3}, {"budget": 35}, {"retention": 0.5, "contextual_share": 0.0}], ids=str
)
@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl"])
def test_few_and_many_rows(name, options):
    model, inputs = tiny(name)
    if name == "qwen2_5_vl" and options == {"budget": 35}:  # images of 24 and 9 tokens
        options = {"budget": 8}
    assert_merges(model, VisionZip(**options), inputs)


def test_llava_next_with_padding_and_one_row_a_tile():
    model, _ = tiny("llava_next")
    inputs = anyres_batch(model, [[5, (40, 140), 7], [2, (96, 50), 3]])
    for options in ({"budget": 10}, {"retention": 0.6, "contextual_share": 0.5}):
        assert_merges(model, VisionZip(**options), inputs)


@pytest.mark.parametrize("clip", [False, True], ids=["siglip", "clip"])
def test_mixed_features(clip):
    """Where tokens are mixtures of the encoder's rows they are merged in the language model's space, without CLS."""
    options = {"vision_aspect_ratio": "anyres_max_2"}
    model = tiny_onevision(**options)
    if clip:
        config = copy.deepcopy(model.config)
        config.vision_config, config.vision_feature_select_strategy = tiny_clip_config(patch_size=9), "default"
        config.vision_feature_layer = -2
        torch.manual_seed(0)
        model = type(model)._from_config(config).eval()
    inputs = anyres_batch(model, [[5, (96, 90), 7], [2, (90, 40), 3]])
    model(**inputs)
    method = VisionZip(retention=0.4, contextual_share=0.3)
    assert_merges(model, method, inputs)
    notes = {s.note for s in forward(model, method, inputs).selections}
    assert notes == {"" if clip else "no CLS token: the mean over all queries stands for its attention"}


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen3_vl", "internvl"])
def test_ways_to_generate(name):
    model, inputs = tiny(name)
    method = VisionZip(retention=0.3)
    made = forward(model, method, inputs)
    with hk.applied(model, method), torch.no_grad():
        greedy = generated(model, inputs)
        assert greedy == generated(model, inputs)
        assert generated(model, inputs, cache_implementation="static") == greedy
        assert generated(model, inputs, use_cache=False) == greedy
        beams = generated(model, inputs, num_beams=2)
        assert [s.indices.tolist() for s in hk.last_selection(model)] == [s.indices.tolist() for s in made.selections]
    if name == "qwen3_vl":  # the second way to the same: merged rows in stock code
        towers = None

        def changed(number, own):
            seen = made.seen[number]
            rows = merged_rows(method, seen, own, seen.keys, towers)
            return own.index_copy(0, torch.tensor(sorted(rows)), torch.stack([rows[p] for p in sorted(rows)]).float())

        rows = expected_rows(model, inputs, made, changed=changed)
        assert beams == expected_tokens(model, rows, width=2)


def test_encoders_alone():
    """The CLS row leads as a prefix row, and stands once more for itself among the kept."""
    model, inputs = tiny_encoder("clip b"), encoder_inputs("clip b")
    method = VisionZip(budget=7, contextual_share=0.3)
    with torch.no_grad():
        stock = model(**inputs, output_hidden_states=True)
        with hk.applied(model, method):
            found = model(**inputs).last_hidden_state
            assert hk.last_selection(model)[0].note == "the CLS row is kept"
    assert found.shape == (2, 8, 64)
    close = {"rtol": 0, "atol": 1e-4 * float(stock.last_hidden_state.abs().max())}
    torch.testing.assert_close(found[:, 0], stock.last_hidden_state[:, 0], **close)
    torch.testing.assert_close(found[:, 1], stock.last_hidden_state[:, 0], **close)
    assert not torch.allclose(found[:, 2], stock.last_hidden_state[:, 0], **close)


def test_a_wrong_merge_shows():
    """What the comparison with stock code is worth: without the merge, logits are far off."""
    model, inputs = tiny("llava")
    made = forward(model, VisionZip(retention=0.3), inputs)
    with pytest.raises(AssertionError):
        assert_logits(model, made.logits, expected_rows(model, inputs, made), inputs)
