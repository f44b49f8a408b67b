"""PTP by its definition: budgets of regions, saliency, instruction; on random numbers and on tiny models."""

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
    placeholder_tokens,
    seen_of,
    selected,
    tiles_of,
    tiny,
)
from models import VLM_CASES, anyres_batch, batch, encoder_inputs, images, prompt, tiny_encoder, tiny_onevision
from torch import Tensor

import hiprune_kernels as hk
from hiprune_kernels import PTP
from hiprune_kernels.methods import Needs, Seen, Stage
from hiprune_kernels.patch.language import CACHE


def total_of(method, tokens: int) -> int:
    return min(method.budget, tokens) if method.retention is None else max(1, round(tokens * method.retention))


def minmax(values: dict[int, float]) -> dict[int, float]:
    low, high = min(values.values()), max(values.values())
    return {token: (value - low) / (high - low) if high > low else 0.0 for token, value in values.items()}


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one.double() @ other.double() / (one.double().norm() * other.double().norm()))


def reference(method: PTP, seen: Seen) -> list[dict[int, int]]:
    """The six steps, one image at a time, in Python's floats."""
    layout, found, region = seen.layout, [], 0
    saliency_layer = method.saliency_layer or max(1, round(seen.encoder.depth * 11 / 24))
    for image, tiles in enumerate(tiles_of(layout)):
        count = (layout.encoder_tiles or layout.tiles)[image]
        rows, region = range(region, region + count), region + count
        everyone = [token for tile in tiles for token in tile]
        fused = minmax({t: float(seen.scores[saliency_layer][t]) for t in everyone})
        importance = {t: float(seen.text_scores[t]) for t in everyone} if method.alpha > 0 else {}
        if any(importance.values()):  # else no text is behind the image
            importance = minmax(importance) if method.scale_instruction else importance
            fused = {t: (1 - method.alpha) * fused[t] + method.alpha * importance[t] for t in everyone}
        total, caps = total_of(method, len(everyone)), [len(tile) for tile in tiles]
        if len(tiles) == 1 or layout.thumbnail is None:
            budgets = by_shares([math.prod(g) for g in layout.grids[list(layout.images())[image][0]]], total, caps)
        else:
            where = list(layout.images())[image][0]
            sizes = layout.sizes[where]
            whole = 0 if layout.thumbnail == 0 else len(tiles) - 1
            others = [i for i in range(len(tiles)) if i != whole]
            if len(others) == 1:
                weights = [1.0]
            elif method.region == "features":
                thumb = rows[0] if layout.thumbnail == 0 else rows[-1]
                likeness = [
                    cosine(seen.regions[row], seen.regions[thumb]) / method.temperature for row in rows if row != thumb
                ]
                weights = [math.exp(x - max(likeness)) for x in likeness]
            else:
                weights = areas(seen, image, whole)
            own = min(total * sizes[whole] // sum(sizes), caps[whole])
            own = max(own, total - sum(caps[i] for i in others))
            shared = by_shares(weights, total - own, [caps[i] for i in others])
            budgets = [0] * len(tiles)
            budgets[whole] = own
            for i, share in zip(others, shared):
                budgets[i] = share
        kept = [token for tile, budget in zip(tiles, budgets) for token in best(fused, tile, budget)]
        found.append(dict.fromkeys(sorted(kept), 1))
    return found


def areas(seen: Seen, image: int, whole: int) -> list[float]:
    """The thumbnail's CLS attention in the feature layer to the area of each sub-image."""
    where, tokens = list(seen.layout.images())[image]
    height, width = seen.layout.grids[where][whole]
    first = tokens.start + sum(seen.layout.sizes[where][:whole])
    rows, columns = seen.layout.tile_grids[image]
    sums = [0.0] * (rows * columns)
    for i in range(height):
        for j in range(width):
            score = float(seen.scores[seen.encoder.feature_layer][first + i * width + j])
            sums[(i * rows // height) * columns + j * columns // width] += score
    return sums


# ------------------------------------------------------------------------------------------------- on random numbers


def hand_case(**options) -> list[int]:
    layout = layout_of([(2, 2)] * 3, thumbnail=0, tile_grids=((1, 2),))
    b = torch.tensor([0.4, 0.1, 0.2, 0.3, 0.1, 0.3, 0.2, 0.2, 0.1, 0.2, 0.3, 0.2])
    c = torch.full((12,), 0.001)
    c[9] = 0.02
    regions = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    method = PTP(budget=7, **options)
    seen = Seen(layout, {11: b}, regions=regions, text_scores=c if method.alpha else None, encoder=TILED)
    return method.select(seen).indices.tolist()


def test_by_hand():
    """Softmax of 1 and 0 over the sub-images: of 7 tokens the thumbnail has 2, they 4 and 1."""
    assert hand_case(alpha=0.0) == [0, 3, 4, 5, 6, 7, 10]
    assert hand_case() == [0, 3, 4, 5, 6, 7, 9]  # .5 * .333 + .5 = .667 against .333 of token 10
    assert hand_case(alpha=1.0) == [0, 1, 4, 5, 6, 7, 9]
    assert hand_case(scale_instruction=False) == [0, 3, 4, 5, 6, 7, 10]
    assert hand_case(alpha=0.0, temperature=1e6) == [0, 3, 5, 6, 7, 9, 10]  # equal shares: 2.5, and the lower has 3
    assert hand_case(alpha=0.0, temperature=0.1) == [0, 3, 4, 5, 6, 7, 10]  # all 5, but it has only 4 tokens


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {}, {"alpha": 1.0, "temperature": 0.2}], ids=str)
@pytest.mark.parametrize("encoder", [TILED, SIGLIP, CLIP], ids=["cls", "no cls", "untiled"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_definition(layout, encoder, options):
    if encoder is CLIP:
        layout = layout._replace(thumbnail=None, encoder_tiles=None)
    for share in (0.05, 0.3, 0.7, 0.97):
        method = PTP(retention=share, **options)
        seen = seen_of(method, layout, encoder, seed=int(100 * share))
        assert selected(method, seen) == reference(method, seen)


@pytest.mark.parametrize(
    "options",
    [
        {"region": "attention", "alpha": 0.0},
        {"region": "attention", "saliency_layer": 23},
        {"saliency_layer": 3, "region_layer": 5, "instruction_layer": 4},
        {"scale_instruction": False, "alpha": 0.9},
    ],
    ids=str,
)
def test_definition_of_options(options):
    for name in ("tiles", "padding", "a tile of padding alone", "one-token tiles", "mixed tiles"):
        for budget in (1, 2, 5, 20):
            method = PTP(budget=budget, **options)
            seen = seen_of(method, LAYOUTS[name], TILED, seed=budget)
            assert selected(method, seen) == reference(method, seen)


@pytest.mark.parametrize("budget", [1, 2, 4, 5, 79, 80])
def test_budgets_from_one_to_all(budget):
    """Fewer tokens than regions leave some regions none; the thumbnail too, whose even share is less than one."""
    method, layout = PTP(budget=budget), LAYOUTS["tiles"]
    seen = seen_of(method, layout, TILED)
    first, second = selected(method, seen)
    assert len(first) == budget and len(second) == min(budget, 48)
    assert [first, second] == reference(method, seen)
    if budget < 5:
        assert min(first) >= 16  # nothing of the thumbnail


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_does_not_matter(layout):
    for options in ({}, {"alpha": 0.0}):
        seen = seen_of(PTP(retention=0.4, **options), layout, TILED)
        assert_images_alone(PTP(retention=0.4, **options), seen)
        for scale in (2.0**-10, 3.0):
            assert_scale_is_nothing(PTP(retention=0.4, **options), seen, scale)


@pytest.mark.parametrize("region", ["features", "attention"])
def test_regions_in_another_order_have_the_same_budgets(region):
    layout = layout_of([(4, 4)] * 5, thumbnail=0, tile_grids=((2, 2),))
    method = PTP(budget=23, alpha=0.0, region=region, temperature=0.3)
    seen = seen_of(method, layout, TILED)
    order = [3, 1, 0, 2]  # place i has what was at order[i]

    def moved(values):
        parts = values.view(5, -1)
        return torch.cat([parts[:1], parts[1:][order]]).view(values.shape)

    other = {layer: moved(scores) for layer, scores in seen.scores.items()}
    if region == "attention":  # what the thumbnail says of the areas goes with them
        thumb = seen.scores[23][:16].view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)[order]
        other[23] = other[23].clone()
        other[23][:16] = thumb.view(2, 2, 2, 2).transpose(1, 2).flatten()
    turned = seen._replace(scores=other, regions=None if seen.regions is None else moved(seen.regions))
    here, there = method.select(seen), method.select(turned)
    assert there.host_counts()[1:5] == [here.host_counts()[1 + order[i]] for i in range(4)]
    assert len(set(here.host_counts())) > 2 and torch.equal(moved(here.roles), there.roles)


def test_equal_tokens():
    """Of equals the first stay, each once; what is constant does not count."""
    layout = LAYOUTS["tiles"]
    seen = seen_of(PTP(budget=9), layout, TILED)
    flat = seen._replace(scores={11: torch.ones(128)}, text_scores=torch.zeros(128), regions=torch.ones(8, 6))
    first, second = selected(PTP(budget=9), flat)
    assert sorted(first) == [0, 16, 17, 32, 33, 48, 49, 64, 65] and len(second) == 9
    assert sorted(second) == [80, 81, 82, 96, 97, 98, 112, 113, 114]


def test_numbers_that_are_none():
    """Tokens without a number come last; regions without one have no weight."""
    layout, method = layout_of([(4, 4)] * 3, thumbnail=0), PTP(budget=30)
    seen = seen_of(method, layout, TILED)
    seen.scores[11][[2, 19]] = torch.nan
    (kept,) = selected(method, seen)
    (without,) = reference(method, seen._replace(scores={11: seen.scores[11].nan_to_num(nan=1.0)}))
    assert 2 not in kept and 19 not in kept and len(kept) == 30 and len(set(kept) & set(without)) > 25
    seen.regions[1] = torch.nan
    assert method.select(seen).host_counts() == [10, 4, 16]  # 20 for region 2, which has 16
    seen.regions[2] = torch.nan
    assert method.select(seen).host_counts() == [10, 10, 10]


def test_notes():
    seen = seen_of(PTP(budget=3), layout_of([(3, 3)], [(3, 3)] * 3, thumbnail=0), SIGLIP)
    zero = seen.text_scores.clone()
    zero[9:] = 0
    one, other = PTP(budget=3).select(seen._replace(text_scores=zero)).notes
    cls = "no CLS token: the mean over all queries stands for its attention"
    assert one == f"{cls}; one region" and other == f"{cls}; no text behind the image: saliency alone"
    assert PTP(budget=3).select(seen_of(PTP(budget=3), LAYOUTS["thumbnail last"], TILED)).notes == [
        "",
        "one region",
        "",
    ]


def test_what_is_read():
    assert PTP(budget=1).needs(CLIP) == Needs(scores={11: "cls"}, text_attention=(2, "max"))
    assert PTP(budget=1).needs(TILED) == Needs(scores={11: "cls"}, region_features=23, text_attention=(2, "max"))
    assert PTP(budget=1, alpha=0).needs(SIGLIP) == Needs(scores={12: "mean"}, region_features=26)
    assert PTP(budget=1, alpha=0).needs(QWEN) == Needs(scores={15: "mean"})
    shallow = TILED._replace(depth=2, feature_layer=1)
    assert PTP(budget=1, alpha=0).needs(shallow) == Needs(scores={1: "cls"}, region_features=1)
    linear = TILED._replace(attention_layers=(1, 4, 8))
    assert PTP(budget=1).needs(linear).text_attention == (4, "max")
    options = {"alpha": 0, "region": "attention", "saliency_layer": 4}
    assert PTP(budget=1, **options).needs(TILED) == Needs(scores={4: "cls", 23: "cls"})
    assert PTP(budget=1, alpha=0).needs(TILED).stage(TILED) is Stage.FEATURE_LAYER
    assert PTP(budget=1, alpha=0).needs(SIGLIP).stage(SIGLIP) is Stage.ENCODER
    assert PTP(budget=1).needs(TILED).stage(TILED) is Stage.LANGUAGE


WRONG = [
    ({"alpha": 1.5}, ValueError, r"alpha: expected a share in \[0, 1\], got 1.5"),
    ({"alpha": math.nan}, ValueError, r"alpha: expected a share in \[0, 1\], got nan"),
    ({"alpha": "x"}, TypeError, "alpha: expected a float, got str"),
    ({"region": "mean"}, ValueError, 'region: expected "features" or "attention", got \'mean\''),
    ({"region": ["features"]}, ValueError, 'region: expected "features" or "attention"'),
    ({"temperature": 0}, ValueError, "temperature: expected a number above 0, got 0"),
    ({"temperature": math.inf}, ValueError, "temperature: expected a number above 0, got inf"),
    ({"temperature": "1"}, TypeError, "temperature: expected a float, got str"),
    ({"temperature": True}, TypeError, "temperature: expected a float, got bool"),
    ({"saliency_layer": 0}, ValueError, "saliency_layer: expected at least 1, got 0"),
    ({"region_layer": 2.0}, TypeError, "region_layer: expected an int, got float"),
    ({"instruction_layer": -1}, ValueError, "instruction_layer: expected at least 1, got -1"),
    ({"scale_instruction": 1}, TypeError, "scale_instruction: expected a bool, got int"),
    ({"budget": 0}, ValueError, "budget: expected at least 1, got 0"),
    ({"retention": 0.5}, ValueError, "budget: expected exactly one of budget and retention"),
]


@pytest.mark.parametrize(("options", "error", "message"), WRONG, ids=str)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        PTP(**{"budget": 5, **options})


@pytest.mark.parametrize(
    ("options", "encoder", "message"),
    [
        ({"saliency_layer": 24}, CLIP, "saliency_layer: expected 1 to 23 .* got 24"),
        ({"region_layer": 24}, CLIP, "region_layer: expected 1 to 23 .* got 24"),
        (
            {"instruction_layer": 9},
            CLIP,
            "instruction_layer: expected a decoder layer with softmax attention, one of 1, ",
        ),
        ({"instruction_layer": 2}, CLIP._replace(attention_layers=(1, 4)), "one of 1, 4, got 2"),
        (
            {"region": "attention"},
            INTERN,
            'region: expected "features", as InternVL does not tell where tiles lie, got',
        ),
    ],
    ids=str,
)
def test_options_that_an_encoder_cannot_serve(options, encoder, message):
    with pytest.raises(ValueError, match=message):
        PTP(budget=5, **options).needs(encoder)


# ---------------------------------------------------------------------------------------------------- on tiny models


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("name", VLM_CASES)
def test_models(name, alpha):
    model, inputs = tiny(name)
    made = assert_model_prunes(model, PTP(retention=0.3, alpha=alpha), inputs, reference)
    assert all((seen.text_scores is None) == (alpha == 0) for seen in made.seen)


def as_stock(model, inputs: dict, method: PTP, layout) -> Seen:
    """What PTP is to see, from stock code with eager attention: towers with a CLS token, and one run."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    pixels = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: pixels.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True
    )
    with torch.no_grad():
        language = model(**inputs, output_attentions=True, use_cache=False).attentions
        hook.remove()
        tower = model.model.vision_tower(pixels[0], output_hidden_states=True, output_attentions=True)
    depth, feature_layer = len(tower.attentions), model.config.vision_feature_layer % (len(tower.attentions) + 1)

    def cls_row(layer: int) -> Tensor:
        rows = tower.attentions[layer - 1].mean(dim=1)[:, 0, 1:]
        if layout.unit_rows is None:
            return rows.flatten()
        return rows.view(len(rows), 6, 2, 6, 2).mean(dim=(2, 4)).flatten()

    saliency = method.saliency_layer or round(11 / 24 * depth)
    region = method.region_layer or feature_layer
    weights = language[(method.instruction_layer or 2) - 1].mean(dim=1)  # [B, L, L]
    [(places, tokens)] = placeholder_tokens(model, inputs, [layout])
    text = inputs["attention_mask"].bool() & ~places
    scores, where = torch.zeros(sum(layout.sizes)), places.nonzero().tolist()
    for _, own in layout.images():
        here = [(i, t) for i, t in enumerate(tokens.tolist()) if own.start <= t < own.stop]
        row, column = where[here[-1][0]]
        behind = [q for q in range(column + 1, text.shape[1]) if text[row, q]]
        for i, token in here:
            scores[token] = max((float(weights[row, q, where[i][1]]) for q in behind), default=0.0)
    encoder = (INTERN if layout.thumbnail == -1 else TILED)._replace(depth=depth, feature_layer=feature_layer)
    return Seen(
        layout,
        {layer: cls_row(layer) for layer in (saliency, feature_layer)},
        regions=tower.hidden_states[region][:, 0],
        text_scores=scores,
        encoder=encoder,
    )


def next_inputs(model) -> dict:
    """Text before, between and behind images; one prompt ends with its image; one has three."""
    return anyres_batch(model, [[(90, 40)], [4, (96, 90), 3], [(40, 90), 2, (90, 50), (96, 90), 1]])


def internvl_inputs() -> dict:
    """Pictures of 3, 1 and 4 tiles in one prompt, of 3 in another, which ends with it."""
    rows = [prompt(4, *["image"] * 3, 2, "image", 3, *["image"] * 4, 2), prompt(3, *["image"] * 3, seed=1)]
    return batch(rows, images(11, size=96))


STOCK_OPTIONS = [
    {"alpha": 0.0},
    {},
    {"alpha": 1.0},
    {"scale_instruction": False, "alpha": 0.9},
    {"saliency_layer": 1, "temperature": 0.05},
    {"region_layer": 2, "temperature": 0.05, "instruction_layer": 3},
    {"region": "attention"},
    {"region": "attention", "alpha": 0.0, "saliency_layer": 4},
]


@pytest.mark.parametrize("options", STOCK_OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["llava_next", "internvl"])
def test_everything_from_stock_code(name, options):
    model, _ = tiny(name)
    inputs = next_inputs(model) if name == "llava_next" else internvl_inputs()
    method = PTP(budget=31, **options)
    if name == "internvl" and method.region == "attention":
        with pytest.raises(ValueError, match='region: expected "features", as InternVLVisionModel does not tell where'):
            hk.apply_method(model, method)
        assert not hk.is_patched(model)
        return
    made = forward(model, method, inputs)
    [seen], [picks] = made.seen, made.picks
    assert seen.layout.tiles == ((3, 5, 3, 5, 5) if name == "llava_next" else (3, 1, 4, 3))
    stock = as_stock(model, inputs, method, seen.layout)
    if method.region == "features":
        torch.testing.assert_close(seen.regions, stock.regions, rtol=0, atol=1e-4)
    if method.alpha > 0:
        torch.testing.assert_close(seen.text_scores, stock.text_scores, rtol=0, atol=1e-5)
        last = 0 if name == "llava_next" else 3
        assert [bool(seen.text_scores[own].any()) for _, own in seen.layout.images()] == [
            i != last for i in range(len(seen.layout.tiles))
        ]
        assert [("no text behind the image" in note) for note in picks.notes] == [
            i == last for i in range(len(seen.layout.tiles))
        ]
    assert of_images(picks, seen.layout) == reference(method, stock)
    assert [s.note for s in made.selections] == list(picks.notes)
    assert [len(s.indices) for s in made.selections] == [31] * len(seen.layout.tiles)
    assert_logits(model, made.logits, expected_rows(model, inputs, made), inputs)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("name", ["llava_next", "internvl", "llava_onevision", "llava", "video_llava"])
def test_ways_to_generate(name, alpha):
    """Beams, a static cache, twice in a row, and both paddings."""
    model, inputs = tiny(name)
    inputs = {"llava_next": lambda: next_inputs(model), "internvl": internvl_inputs}.get(name, lambda: inputs)()
    method = PTP(retention=0.3, alpha=alpha)
    made = forward(model, method, inputs)
    rows = expected_rows(model, inputs, made)
    greedy = expected_tokens(model, rows)
    with hk.applied(model, method):
        assert generated(model, inputs) == greedy == generated(model, inputs)
        assert generated(model, inputs, cache_implementation="static") == greedy
        assert generated(model, inputs, num_beams=2) == expected_tokens(model, rows, width=2)
        found = hk.last_selection(model)
    assert [s.indices.tolist() for s in found] == [s.indices.tolist() for s in made.selections]


@pytest.mark.parametrize("aspect_ratio", ["anyres_max_9", "anyres_max_2"], ids=["plain", "interpolated"])
@pytest.mark.parametrize("options", [{"alpha": 0.0, "temperature": 0.1}, {"temperature": 0.1}, {"region": "attention"}])
def test_onevision(aspect_ratio, options):
    """Tiles as they are, or mixed into one region beside the thumbnail."""
    model = tiny_onevision(vision_aspect_ratio=aspect_ratio)
    inputs = anyres_batch(model, [[5, (96, 90), 7], [2, (90, 40), 3]])
    method = PTP(retention=0.4, **options)
    made = assert_model_prunes(model, method, inputs, reference)
    counts = [len(set(picks.host_counts()[tiles])) for picks in made.picks for tiles, _ in made.seen[0].layout.images()]
    assert made.seen[0].layout.tiles == ((5, 3) if aspect_ratio == "anyres_max_9" else (2, 3))
    assert made.seen[0].layout.encoder_tiles == (5, 3) and max(counts) > 1


def test_a_picture_s_tiles_are_found_in_the_prompt():
    """The same tiles as one picture of four, or as four pictures with text between them."""
    model, _ = tiny("internvl")
    together = batch([prompt(2, *["image"] * 4, 3)], images(4, size=96))
    apart = batch([prompt(2, "image", 1, "image", 1, "image", 1, "image", 3)], images(4, size=96))
    one = forward(model, PTP(budget=30, alpha=0.0), together)
    four = forward(model, PTP(budget=30, alpha=0.0), apart)
    assert [len(s.indices) for s in one.selections] == [30]
    assert [len(s.indices) for s in four.selections] == [30] * 4
    assert one.selections[0].grid == (4, 6, 6) and four.selections[0].grid == (6, 6)
    embeds = model.get_input_embeddings()(together["input_ids"])
    embedded = {**together, "inputs_embeds": embeds.detach(), "input_ids": None}
    same = forward(model, PTP(budget=30, alpha=0.0), embedded)
    assert torch.equal(same.selections[0].indices, one.selections[0].indices)


def test_a_later_turn_with_a_picture_of_several_tiles():
    """Pictures are those of this turn; text attention would need the whole prompt."""
    model, _ = tiny("internvl")
    first = batch([prompt(2, *["image"] * 3, 3)], images(3, size=96))
    second = prompt(2, *["image"] * 4, 3, seed=5)
    with hk.applied(model, PTP(budget=30, alpha=0.0)):
        made = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([made.sequences, torch.tensor([second])], dim=1)
        turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images(4, seed=9, size=96)}
        model.generate(**turn, **{CACHE: made[CACHE]}, max_new_tokens=2, do_sample=False)
        assert [(len(s.indices), s.grid) for s in hk.last_selection(model)] == [(30, (4, 6, 6))]
    with hk.applied(model, PTP(budget=30)):
        made = model.generate(**first, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        with pytest.raises(ValueError, match="PTP: text attention needs the whole prompt"):
            model.generate(**turn, **{CACHE: made[CACHE]}, max_new_tokens=2, do_sample=False)


def test_encoders_alone():
    """There is no text, and there are no tiles: the salient tokens of the saliency layer."""
    model, inputs = tiny_encoder("clip b"), encoder_inputs("clip b")
    with pytest.raises(
        ValueError, match="PTP: needs text, expected a model with a language model, got CLIPVisionModel"
    ):
        hk.apply_method(model, PTP(budget=7))
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        stock = model(**inputs).last_hidden_state
        weights = eager(**inputs, output_attentions=True).attentions[round(11 / 24 * 12) - 1].mean(dim=1)[:, 0, 1:]
        with hk.applied(model, PTP(budget=7, alpha=0)):
            states = model(**inputs).last_hidden_state
    rows = torch.cat([torch.zeros(2, 1, dtype=torch.long), weights.topk(7).indices.sort().values + 1], dim=1)
    expected = stock.gather(1, rows[..., None].expand(-1, -1, stock.shape[-1]))
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-4 * float(stock.abs().max()))
