"""HiPrune++ by its definition: HiPrune's tokens, then those that are like the text; on random numbers and tiny models."""

from __future__ import annotations

import math

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
    clip_sides,
    expected_rows,
    expected_tokens,
    forward,
    generated,
    layout_of,
    of_images,
    seen_of,
    selected,
    stock_towers,
    texts_of_images,
    tiles_of,
    tiny,
    tiny_with_clip,
)
from models import VLM_CASES, batch, encoder_inputs, images, prompt, tiny_encoder
from torch import Tensor

import hiprune_kernels as hk
from hiprune_kernels import HiPrune, HiPrunePlusPlus
from hiprune_kernels.methods import Needs, Seen, Stage

TEXT = 4


def hiprune(seen: Seen, own: list[int], first: int, grid: tuple[int, ...], count: int, alpha: float) -> dict[int, int]:
    """Algorithm 1 of one tile with the rule "paper" and crosses: anchors, neighbours, registers."""
    shallow, deep = seen.scores[min(seen.scores)], seen.scores[max(seen.scores)]
    anchors = best(shallow, own, min(math.ceil(alpha * count / 5 - 1e-9), count // 5))
    frame, width, buffers = math.prod(grid[-2:]), grid[-1], set()
    for anchor in anchors:
        here = (anchor - first) % frame
        buffers |= {anchor + step for step in (-width, -1, 1, width) if 0 <= here + step < frame}
    buffers = (buffers & set(own)) - set(anchors)
    rest = [token for token in own if token not in buffers and token not in anchors]
    registers = best(deep, rest, count - len(anchors) - len(buffers))
    return dict.fromkeys(anchors, 1) | dict.fromkeys(buffers, 2) | dict.fromkeys(registers, 3)


def reference(method: HiPrunePlusPlus, seen: Seen, likeness: list[Tensor | None] | None = None) -> list[dict[int, int]]:
    """`likeness` of each image's tokens to the text, where it is CLIP's."""
    found, first = [], 0
    for image, ((where, tokens), tiles) in enumerate(zip(seen.layout.images(), tiles_of(seen.layout))):
        if likeness is not None:
            r = likeness[image]
        elif len(seen.text[image]):
            t = seen.text[image].double().mean(dim=0)
            rows = seen.features[tokens].double()
            r = (rows @ t) / (rows.norm(dim=1) * t.norm()).clamp(min=1e-8)
        else:
            r = None
        kept, sizes = {}, seen.layout.sizes[where]
        for size, grid, own in zip(sizes, seen.layout.grids[where], tiles):
            base = (
                max(1, round(size * method.retention)) if method.budget is None else method.budget * size // sum(sizes)
            )
            base = min(base, size, max(1, len(own)))
            extra = round(method.text_budget * base)
            total = min(base + extra, max(1, len(own))) if method.additive else base
            if total == size:
                kept |= dict.fromkeys(own, TEXT)
            elif own:
                ours = base if method.additive else max(1, base - extra)
                roles = hiprune(seen, own, first, grid, total if r is None else ours, method.alpha)
                scores = {t: 0.0 if r is None else float(r[t - tokens.start]) for t in own}
                like = best(scores, [t for t in own if t not in roles], total - len(roles))
                kept |= roles | dict.fromkeys(like, TEXT)
            first += size
        found.append(dict(sorted(kept.items())))
    return found


# ------------------------------------------------------------------------------------------------- on random numbers


def hand_seen() -> Seen:
    """HiPrune on 3 of 6 tokens keeps 0, 2 and 5; cosines with the text are .9 -.3 .8 -.2 -.6 .7."""
    r = torch.tensor([0.9, -0.3, 0.8, -0.2, -0.6, 0.7])
    features = torch.stack([r, (1 - r**2).sqrt()], dim=1)
    deep = torch.tensor([9.0, 1, 8, 2, 0, 7])
    return Seen(
        layout_of([(2, 3)]),
        {9: torch.ones(6), 23: deep},
        features=features,
        text=[torch.tensor([[5.0, 0]])],
        encoder=CLIP,
    )


def test_by_hand():
    """Of four one is text's: the likest of those that are left, not once more the likest of all."""
    method = HiPrunePlusPlus(budget=4, text_budget=0.25, alpha=0.0)
    assert method.select(hand_seen()).roles.tolist() == [3, 0, 3, TEXT, 0, 3]
    assert method.roles[TEXT - 1] == "text"
    lone = hand_seen()._replace(text=[torch.tensor([[-5.0, 0], [-1, 0]])])  # the other way round
    assert method.select(lone).roles.tolist() == [3, 0, 3, 0, TEXT, 3]
    added = HiPrunePlusPlus(budget=3, text_budget=0.5, alpha=0.0, additive=True)
    assert added.kept(lone.layout) == [5]
    assert added.select(hand_seen()).roles.tolist() == [3, TEXT, 3, TEXT, 0, 3]


def test_how_many_are_text_s():
    """round(beta N'), half to even, within N' or on top of it; of images that are too small as many as there are."""
    layout = layout_of([(24, 24)])
    for budget, extra in ((192, 19), (128, 13), (64, 6)):
        method = HiPrunePlusPlus(budget=budget)
        roles = method.select(seen_of(method, layout)).roles
        assert int((roles == TEXT).sum()) == extra and method.kept(layout) == [budget]
        method = HiPrunePlusPlus(budget=budget, additive=True)
        roles = method.select(seen_of(method, layout)).roles
        assert int((roles == TEXT).sum()) == extra and method.kept(layout) == [budget + extra]
    assert HiPrunePlusPlus(budget=570, additive=True).kept(layout) == [576]
    assert HiPrunePlusPlus(retention=0.5, additive=True, text_budget=1.0).kept(layout_of([(4, 4)] * 2)) == [32]


@pytest.mark.parametrize(
    "options", [{}, {"text_budget": 0.0}, {"text_budget": 1.0}, {"text_budget": 0.4, "alpha": 0.6}], ids=str
)
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_definition(layout, additive, options):
    for retention in (0.05, 0.3, 0.7, 0.97):
        method = HiPrunePlusPlus(retention=retention, additive=additive, **options)
        seen = seen_of(method, layout, seed=int(100 * retention))
        assert selected(method, seen) == reference(method, seen)


@pytest.mark.parametrize("options", [{}, {"alpha": 0.7}, {"rule": "grid"}, {"keep_roles": ("register",)}])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_no_text_or_none_of_the_budget_is_hiprune_itself(layout, options):
    """Bit for bit, where tokens go; and a note."""
    method, plain = HiPrunePlusPlus(retention=0.4, **options), HiPrune(retention=0.4, **options)
    seen = seen_of(method, layout)
    expected = plain.select(seen)
    full = torch.cat([torch.full((n,), n == k) for n, k in zip(layout.sizes, expected.counts)])
    roles = torch.where(full, TEXT, expected.roles)
    silent = seen._replace(text=[text[:0] for text in seen.text])
    for one, given in ((method, silent), (HiPrunePlusPlus(retention=0.4, text_budget=0.0, **options), seen)):
        found = one.select(given)
        assert torch.equal(found.indices, expected.indices) and torch.equal(found.roles, roles)
        assert found.host_counts() == expected.host_counts() and found.fills == expected.fills
        note = "no text in the prompt: HiPrune alone" if given is silent else ""
        assert found.notes == [note] * len(layout.tiles)


def test_a_rule_that_leaves_some_of_the_budget():
    """The Qwen code may keep fewer: without text so does this; with it text has what is left."""
    method, plain = (cls(budget=10, rule="official", alpha=1.0) for cls in (HiPrunePlusPlus, HiPrune))
    seen = seen_of(method, layout_of([(4, 4)], [(4, 4)], [(4, 4)]), QWEN)
    expected = plain.select(seen)
    assert bool((expected.indices < 0).any())
    half = seen._replace(text=[seen.text[0][:0], seen.text[1], seen.text[2][:0]])
    found = method.select(half)
    assert found.fills
    for image in (0, 2):
        here, rows = slice(16 * image, 16 * image + 16), slice(10 * image, 10 * image + 10)
        assert torch.equal(found.roles[here], expected.roles[here])
        assert torch.equal(found.indices[rows], expected.indices[rows])
    assert int((found.roles[16:32] > 0).sum()) == 10 and bool((found.indices[10:20] >= 16).all())
    selected(method, half)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_does_not_matter(layout):
    method = HiPrunePlusPlus(retention=0.4, text_budget=0.3)
    seen = seen_of(method, layout)
    assert_images_alone(method, seen)
    for scale in (0.25, 3.0):
        assert_scale_is_nothing(method, seen, scale)


def test_an_image_that_loses_nothing_beside_one_that_does():
    for additive in (False, True):
        method = HiPrunePlusPlus(budget=6, additive=additive)
        roles = method.select(seen_of(method, layout_of([(2, 3)], [(4, 4)], [(1, 1)]))).roles
        assert roles[:6].tolist() == [TEXT] * 6 and int(roles[-1]) == TEXT


def test_equal_tokens_and_numbers_that_are_none():
    """Tokens without a likeness come last; what HiPrune keeps stays whatever its likeness."""
    seen = hand_seen()
    method = HiPrunePlusPlus(budget=4, text_budget=0.25, alpha=0.0)
    flat = seen._replace(features=torch.ones(6, 2))
    assert method.select(flat).roles.tolist() == [3, TEXT, 3, 0, 0, 3]
    zero = seen._replace(features=torch.zeros(6, 2))
    assert method.select(zero).roles.tolist() == [3, TEXT, 3, 0, 0, 3]
    seen.features[[0, 3]] = torch.nan
    assert method.select(seen).roles.tolist() == [3, TEXT, 3, 0, 0, 3]
    nothing = seen._replace(text=[torch.full((2, 2), torch.nan)])
    assert selected(method, nothing) == [{0: 3, 1: TEXT, 2: 3, 5: 3}]


def test_what_is_read():
    text = tiny_with_clip("llava")[2]
    scores = {9: "all", 23: "all"}
    assert HiPrunePlusPlus(budget=1).needs(CLIP) == Needs(scores, features="language", text=True)
    assert HiPrunePlusPlus(budget=1, text_encoder=text).needs(CLIP) == Needs(scores, features="encoder", text=True)
    assert HiPrunePlusPlus(budget=1).needs(QWEN).scores == {16: "all", 32: "all"}
    assert HiPrunePlusPlus(budget=1).needs(CLIP).stage(CLIP) is Stage.LANGUAGE
    for encoder in (SIGLIP, INTERN, QWEN):
        with pytest.raises(
            ValueError, match="text_encoder: expected a model with CLIP's vision tower for a ClipText, got"
        ):
            HiPrunePlusPlus(budget=1, text_encoder=text).needs(encoder)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text_budget": 1.2}, ValueError, r"text_budget: expected a share in \[0, 1\], got 1.2"),
        ({"text_budget": "a"}, TypeError, "text_budget: expected a float, got str"),
        ({"additive": 1}, TypeError, "additive: expected a bool, got int"),
        ({"text_encoder": object()}, TypeError, "text_encoder: expected a ClipText, got object"),
        ({"alpha": 2}, ValueError, r"alpha: expected a share in \[0, 1\], got 2"),
        ({"object_layer": 9.0}, TypeError, "object_layer: expected an int or a file of hiprune calibrate, got float"),
        ({"beta": 0.1}, TypeError, "HiPrunePlusPlus: expected options among budget, .*, by name, got beta"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        HiPrunePlusPlus(**{"budget": 5, **options})


# ---------------------------------------------------------------------------------------------------- on tiny models


@pytest.mark.parametrize(
    "options", [{"text_budget": 0.4, "alpha": 0.6}, {"additive": True, "text_budget": 1.0}], ids=str
)
@pytest.mark.parametrize("name", VLM_CASES)
def test_models(name, options):
    model, inputs = tiny(name)
    assert_model_prunes(model, HiPrunePlusPlus(retention=0.3, **options), inputs, reference)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl"])
def test_nothing_for_the_text_is_hiprune(name):
    model, inputs = tiny(name)
    plain = forward(model, HiPrune(retention=0.3), inputs)
    made = forward(model, HiPrunePlusPlus(retention=0.3, text_budget=0.0), inputs)
    for one, other in zip(made.selections, plain.selections, strict=True):
        assert torch.equal(one.indices, other.indices) and torch.equal(one.roles, other.roles)
    found, expected = made.logits[:, -3:], plain.logits[:, -3:]  # padding leads, and is not computed alike
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llava", "llava_next", "video_llava"])
def test_models_with_clip(name):
    """Likeness is minus the cosine of stock rows with the average of the text's segments, in CLIP's space."""
    model, inputs, text = tiny_with_clip(name)
    if name == "llava":
        inputs = batch([prompt(90, "image", 7), prompt(2, "image", 3, "image", 2, seed=1)], images(3))
    method = HiPrunePlusPlus(retention=0.4, text_budget=0.5, text_encoder=text)
    made = forward(model, method, inputs)
    texts = texts_of_images(model, inputs, made.seen)
    for number, (states, _) in enumerate(stock_towers(model, inputs)):
        seen, picks, likeness = made.seen[number], made.picks[number], []
        rows = states[:, 1:].flatten(0, 1)
        for (_, tokens), words in zip(seen.layout.images(), texts[number], strict=True):
            patches, segments = clip_sides(text, rows[tokens], words)
            likeness.append(-torch.cosine_similarity(patches, segments.mean(dim=0)[None]))
        assert of_images(picks, seen.layout) == reference(method, seen, likeness)
        assert of_images(picks, seen.layout) != reference(method, seen, [-r for r in likeness])
    rows = expected_rows(model, inputs, made)
    assert_logits(model, made.logits, rows, inputs)
    with hk.applied(model, method):
        assert generated(model, inputs) == expected_tokens(model, rows)
        assert generated(model, inputs, cache_implementation="static") == expected_tokens(model, rows)
        assert generated(model, inputs, num_beams=2) == expected_tokens(model, rows, width=2)


def test_prompts_without_text():
    model, _, text = tiny_with_clip("llava")
    inputs = batch([prompt("image"), prompt("image", 5, seed=1)], images(2))
    plain = forward(model, HiPrune(budget=11), inputs)
    for method in (HiPrunePlusPlus(budget=11), HiPrunePlusPlus(budget=11, text_encoder=text)):
        made = forward(model, method, inputs)
        assert [s.note for s in made.selections] == ["no text in the prompt: HiPrune alone", ""]
        assert torch.equal(made.selections[0].roles, plain.selections[0].roles)
        assert not torch.equal(made.selections[1].roles, plain.selections[1].roles)
        assert made.selections[0].role_names == ("anchor", "buffer", "register", "text")


def test_encoders_alone():
    model = tiny_encoder("clip b")
    with pytest.raises(
        ValueError, match="HiPrunePlusPlus: needs text, expected a model with a language model, got CLIPV"
    ):
        hk.apply_method(model, HiPrunePlusPlus(budget=7))
    with torch.no_grad():
        assert model(**encoder_inputs("clip b")).last_hidden_state.shape == (2, 50, 64)
