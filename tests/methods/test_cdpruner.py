"""CDPruner by its definition: the greedy set of a determinantal point process; on random numbers and on tiny models."""

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
from hiprune_kernels import CDPruner
from hiprune_kernels.methods import Needs, Seen, Stage
from hiprune_kernels.methods.cdpruner import greedy_dpp


def units(rows: Tensor) -> Tensor:
    return rows.double() / rows.double().norm(dim=-1, keepdim=True).clamp(min=1e-12)


def greedy(kernel: Tensor, quality: list[float], count: int) -> list[int]:
    """Whoever makes the determinant of the chosen ones' kernel largest: by what it has of its own, given them."""
    chosen, least = [], 1e-12 * float(kernel.diagonal().max())
    while len(chosen) < count:
        rest = [i for i in range(len(kernel)) if i not in chosen]
        own = {i: float(kernel[i, i]) for i in rest}
        if chosen:
            inverse = torch.linalg.pinv(kernel[chosen][:, chosen])
            own = {i: own[i] - float(kernel[i, chosen] @ inverse @ kernel[chosen, i]) for i in rest}
        best = max(rest, key=lambda i: (own[i], -i))
        if own[best] <= least:
            best = max(rest, key=lambda i: (quality[i], -i))
        chosen.append(best)
    return chosen


def reference(method: CDPruner, seen: Seen, relevance: list[Tensor | None] | None = None) -> list[dict[int, int]]:
    """`relevance` of each image's tokens, where it is CLIP's."""
    layout, found = seen.layout, []
    for image, ((where, tokens), tiles) in enumerate(zip(layout.images(), tiles_of(layout))):
        everyone, sizes = [t for tile in tiles for t in tile], layout.sizes[where]
        if relevance is not None:
            u = relevance[image]
        elif len(seen.text[image]):
            u = (units(seen.features[tokens]) @ units(seen.text[image]).T).mean(dim=1)
        else:
            u = None
        quality = dict.fromkeys(everyone, 1.0)
        if u is not None:
            values = {t: float(u[t - tokens.start]) for t in everyone}
            low, high = min(values.values()), max(values.values())
            if high > low:
                quality = {t: (values[t] - low + 1e-6) / (high - low) for t in everyone}
            if method.relevance_weight is not None:
                theta = method.relevance_weight
                quality = {t: math.exp(theta / (2 * (1 - theta)) * q) for t, q in quality.items()}
        kept = []
        for size, own in zip(sizes, tiles):
            share = (
                max(1, round(size * method.retention)) if method.budget is None else method.budget * size // sum(sizes)
            )
            q = torch.tensor([quality[t] for t in own], dtype=torch.float64)
            rows = units(seen.features[own])
            if own:
                own_cosines = rows.norm(dim=1).round()  # 0 of a row of zeros
                kernel = q[:, None] * (rows @ rows.T).diagonal_scatter(own_cosines) * q
                kept += [own[i] for i in greedy(kernel, q.tolist(), min(share, size, len(own)))]
        found.append(dict.fromkeys(sorted(kept), 1))
    return found


def wide(method: CDPruner, layout, encoder=CLIP, seed: int = 0) -> Seen:
    """Features of more dimensions than there are tokens: no rounding decides."""
    generator = torch.Generator().manual_seed(seed)
    seen = seen_of(method, layout, encoder, seed=seed)
    text = [torch.randn(3 + i, 64, generator=generator) for i in range(len(layout.tiles))]
    return seen._replace(features=torch.randn(sum(layout.sizes), 64, generator=generator), text=text)


# ------------------------------------------------------------------------------------------------- on random numbers


def dpp(features, quality, count: int) -> list[int]:
    """Of one tile, in the order of choice."""
    return greedy_dpp(features, quality, layout_of([(1, len(features))]), [count])[1].tolist()


def test_by_hand():
    """First 0; then 3, of which .36 - .6^2 / 2 = .18 is its own. Two dimensions have no more, and the first fills up."""
    features = torch.tensor([[1.0, 0], [1, 0], [0, 1], [1, 1]])
    quality = torch.tensor([1.0, 1e-6, 1e-6, 0.6])
    assert dpp(features, quality, 3) == [0, 3, 1]
    assert dpp(features, torch.ones(4), 2) == [0, 2]
    assert dpp(features * torch.tensor([[3.0], [1], [9], [0.1]]), quality, 2) == [0, 3]


def test_what_fills_up():
    """Five directions; of what is left the most relevant ones, the lowest of equals, and none twice."""
    features = torch.eye(5).repeat(3, 1)
    quality = torch.tensor([0.5] * 5 + [0.4, 0.4, 0.3, 0.4, 0.4] + [0.25] * 5)
    assert dpp(features, quality, 9) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    assert sorted(dpp(features, quality, 15)) == list(range(15))
    assert dpp(torch.zeros(4, 3), torch.tensor([0.1, 0.4, 0.4, 0.2]), 3) == [1, 2, 3]


@pytest.mark.parametrize("weight", [None, 0.0, 0.5, 0.9])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_definition(layout, weight):
    for retention in (0.05, 0.3, 0.7, 0.97):
        method = CDPruner(retention=retention, relevance_weight=weight)
        seen = wide(method, layout, seed=int(100 * retention))
        assert selected(method, seen) == reference(method, seen)


def test_relevance_decides():
    """Another text keeps others; without weight released qualities reach from one millionth to 1."""
    layout = layout_of([(6, 6)])
    seen = wide(CDPruner(budget=6), layout)
    other = seen._replace(text=[-seen.text[0]])
    assert selected(CDPruner(budget=6), seen) != selected(CDPruner(budget=6), other)
    flat = CDPruner(budget=6, relevance_weight=0.0)
    assert selected(flat, seen) == selected(flat, other)


def test_no_text():
    """Diversity alone, which a note says; beside an image that has text."""
    method, layout = CDPruner(budget=6), layout_of([(4, 4)], [(4, 4)])
    seen = wide(method, layout)
    seen = seen._replace(text=[seen.text[0][:0], seen.text[1]])
    assert selected(method, seen) == reference(method, seen)
    assert method.select(seen).notes == ["no text in the prompt: diversity alone", ""]
    assert selected(method, seen)[0] == selected(CDPruner(budget=6, relevance_weight=0.0), seen)[0]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_does_not_matter(layout):
    method = CDPruner(retention=0.4)
    seen = wide(method, layout)
    assert_images_alone(method, seen)
    for scale in (0.3, 8.0):
        assert_scale_is_nothing(method, seen, scale)


def test_quality_is_scaled_over_the_tiles_of_one_image():
    """A tile of irrelevant tokens keeps the least irrelevant, by the image's scale; other images do not count."""
    layout = layout_of([(2, 2), (2, 2)], [(2, 2)])
    eye = torch.eye(12)
    text = [
        torch.cat([torch.arange(1.0, 9), torch.zeros(4)])[None],
        torch.cat([torch.zeros(8), torch.full((4,), 99.0)])[None],
    ]
    seen = Seen(layout, features=eye, text=text, encoder=CLIP)
    assert [sorted(x) for x in selected(CDPruner(budget=2), seen)] == [[3, 7], [8, 9]]


def test_padding_does_not_scale_quality():
    """The least relevant token has no quality, though a row of padding is less relevant still."""
    features = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0.9, 0.436, 0], [0, 0, 0, 0]])
    text = torch.tensor([[0.5, 0.7, -0.069, 0.505]])  # relevance .5 .7 .6 and 0
    seen = Seen(layout_of([(2, 2)], padding=[3]), features=features, text=[text], encoder=CLIP)
    assert sorted(selected(CDPruner(budget=2), seen)[0]) == [1, 2]
    assert sorted(selected(CDPruner(budget=2), seen._replace(layout=layout_of([(2, 2)])))[0]) == [0, 1]


def test_numbers_that_are_none():
    """Picks are as many, and each once, whatever they are."""
    method, layout = CDPruner(budget=6), layout_of([(4, 4)])
    seen = wide(method, layout)
    seen.features[[0, 5]] = torch.nan
    assert len(selected(method, seen)[0]) == 6
    seen.features[:] = torch.nan
    assert len(selected(method, seen)[0]) == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    """Cosines and what follows are computed in float32."""
    method, layout = CDPruner(budget=12), layout_of([(6, 6)])
    seen = wide(method, layout)
    seen = seen._replace(features=seen.features.to(dtype), text=[t.to(dtype) for t in seen.text])
    assert selected(method, seen) == reference(method, seen)


def test_what_is_read():
    text = tiny_with_clip("llava")[2]
    assert CDPruner(budget=1).needs(QWEN) == Needs(features="language", text=True)
    assert CDPruner(budget=1, text_encoder=text).needs(CLIP) == Needs(features="both", text=True)
    assert CDPruner(budget=1).needs(CLIP).stage(CLIP) is Stage.LANGUAGE
    for encoder in (SIGLIP, INTERN, QWEN):
        with pytest.raises(
            ValueError, match="text_encoder: expected a model with CLIP's vision tower for a ClipText, got"
        ):
            CDPruner(budget=1, text_encoder=text).needs(encoder)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"relevance_weight": 1}, ValueError, "relevance_weight: expected a share below 1, got 1"),
        ({"relevance_weight": -0.5}, ValueError, r"relevance_weight: expected a share in \[0, 1\], got -0.5"),
        ({"relevance_weight": "0"}, TypeError, "relevance_weight: expected a float, got str"),
        ({"text_encoder": "clip"}, TypeError, "text_encoder: expected a ClipText, got str"),
        ({"budget": 0}, ValueError, "budget: expected at least 1, got 0"),
        (
            {"theta": 0.5},
            TypeError,
            "CDPruner: expected options among budget, retention, text_encoder, relevance_weight",
        ),
    ],
    ids=str,
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        CDPruner(**{"budget": 5, **options})


# ---------------------------------------------------------------------------------------------------- on tiny models


@pytest.mark.parametrize("name", VLM_CASES)
def test_models(name):
    model, inputs = tiny(name)
    assert_model_prunes(model, CDPruner(retention=0.3), inputs, reference)


def test_padding_that_is_taken_out_afterwards():
    """With `unpad="after"` padding is zero in the language model's space: it has nothing of its own, and comes last."""
    model, inputs = tiny("llava_next")
    made = assert_model_prunes(model, CDPruner(retention=0.6), inputs, reference, unpad="after")
    mixed = []
    for seen, picks in zip(made.seen, made.picks):
        padding = seen.features.abs().sum(dim=1) == 0
        for own in (own for tiles in tiles_of(seen.layout) for own in tiles):
            kept = picks.roles[own] > 0
            mixed.append(bool(padding[own].any()) and bool((kept & ~padding[own]).any()))
            assert not bool((kept & padding[own]).any()) or bool(kept[~padding[own]].all())
    assert any(mixed)


def clip_relevance(model, inputs: dict, text, made) -> list[list[Tensor]]:
    """Of each run's images: minus the mean cosine with the text's segments, of stock rows."""
    texts, found = texts_of_images(model, inputs, made.seen), []
    for number, (states, _) in enumerate(stock_towers(model, inputs)):
        rows, own = states[:, 1:].flatten(0, 1), []
        for (_, tokens), words in zip(made.seen[number].layout.images(), texts[number], strict=True):
            patches, segments = clip_sides(text, rows[tokens], words)
            own.append(-(units(patches) @ units(segments).T).mean(dim=1))
        found.append(own)
    return found


@pytest.mark.parametrize("name", ["llava", "llava_next", "video_llava"])
def test_models_with_clip(name):
    """Relevance in CLIP's space, of stock hidden states; diversity in the language model's."""
    model, inputs, text = tiny_with_clip(name)
    method = CDPruner(retention=0.3, text_encoder=text)
    made = forward(model, method, inputs)
    relevance = clip_relevance(model, inputs, text, made)
    for seen, picks, own in zip(made.seen, made.picks, relevance, strict=True):
        assert of_images(picks, seen.layout) == reference(method, seen, own)
        assert of_images(picks, seen.layout) != reference(method, seen, [-u for u in own])
        assert of_images(picks, seen.layout) != reference(method, seen)
    rows = expected_rows(model, inputs, made)
    assert_logits(model, made.logits, rows, inputs)
    with hk.applied(model, method):
        assert generated(model, inputs) == expected_tokens(model, rows)
        assert generated(model, inputs, num_beams=2) == expected_tokens(model, rows, width=2)


def test_long_text():
    """More than 77 words are segments, whose cosines are averaged."""
    model, _, text = tiny_with_clip("llava")
    inputs = batch([prompt(90, "image", 75), prompt("image", 5, seed=1)], images(2))
    method = CDPruner(budget=11, text_encoder=text)
    made = forward(model, method, inputs)
    [own] = clip_relevance(model, inputs, text, made)
    assert len(texts_of_images(model, inputs, made.seen)[0][0]) == 165
    assert of_images(made.picks[0], made.seen[0].layout) == reference(method, made.seen[0], own)


def test_prompts_without_text_and_as_embeddings():
    model, _, text = tiny_with_clip("llava")
    inputs = batch([prompt("image"), prompt("image", seed=1)], images(2))
    for method in (CDPruner(budget=11), CDPruner(budget=11, text_encoder=text)):
        made = forward(model, method, inputs)
        assert [s.note for s in made.selections] == ["no text in the prompt: diversity alone"] * 2
        assert of_images(made.picks[0], made.seen[0].layout) == reference(method, made.seen[0], [None, None])
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    embedded = {**inputs, "input_ids": None, "inputs_embeds": embeds}
    with pytest.raises(ValueError, match="text_encoder: expected prompts as input_ids, got embeddings"):
        forward(model, CDPruner(budget=11, text_encoder=text), embedded)
    assert not hk.is_patched(model)
    assert len(forward(model, CDPruner(budget=11), embedded).selections[0].indices) == 11


def test_models_that_have_no_clip_tower():
    text = tiny_with_clip("llava")[2]
    for name in ("llava_onevision", "internvl", "qwen2_vl", "glm4v"):
        model, _ = tiny(name)
        with pytest.raises(
            ValueError, match="text_encoder: expected a model with CLIP's vision tower for a ClipText, got"
        ):
            hk.apply_method(model, CDPruner(budget=5, text_encoder=text))
        assert not hk.is_patched(model)


def test_encoders_alone():
    model = tiny_encoder("clip b")
    with pytest.raises(
        ValueError, match="CDPruner: needs text, expected a model with a language model, got CLIPVisionMod"
    ):
        hk.apply_method(model, CDPruner(budget=7))
    with torch.no_grad():
        assert model(**encoder_inputs("clip b")).last_hidden_state.shape == (2, 50, 64)
