"""TRIM by its definition, its row of the mean, and the text side that it shares with others: ClipText."""

from __future__ import annotations

import types

import pytest
import torch
from method_views import (
    CLIP,
    INTERN,
    LAYOUTS,
    QWEN,
    SIGLIP,
    Words,
    assert_images_alone,
    assert_logits,
    assert_model_prunes,
    best,
    clip_sides,
    clip_words,
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
from models import anyres_batch, batch, images, prompt, qwen_batch, tiny_clip_config, tiny_llava
from torch import Tensor

import hiprune_kernels as hk
from hiprune_kernels import TRIM, CDPruner, ClipText, HiPrunePlusPlus
from hiprune_kernels.methods import Needs, Seen, Stage

MEAN, LIKE = 1, 2


class Plain:
    """A text encoder of any kind: the space is that of the rows, and the text says which channel counts."""

    sign = -1

    def embeddings(self, ids: Tensor, *, truncated: bool = False) -> Tensor:
        assert truncated
        return torch.nn.functional.one_hot(ids[:1] % 4, 64).float()

    def patches(self, rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows.float(), (0, 64 - rows.shape[-1])) if rows.shape[-1] < 64 else rows[:, :64]


def reference(method: TRIM, seen: Seen, relevance: list[Tensor | None]) -> list[dict[int, int]]:
    """By the relevance of each image's tokens; the mean's place is the first dropped token's."""
    found = []
    for (_, tokens), tiles, u in zip(seen.layout.images(), tiles_of(seen.layout), relevance):
        everyone = [t for tile in tiles for t in tile]
        n = len(everyone)
        rows = min(method.budget, n) if method.retention is None else min(int(method.retention * n) + 1, n)
        if rows == n:
            found.append(dict.fromkeys(everyone, LIKE))
            continue
        scores = {t: 0.0 if u is None else float(u[t - tokens.start]) for t in everyone}
        like = best(scores, everyone, rows - 1)
        place = next(t for t in everyone if t not in like)
        found.append(dict(sorted((dict.fromkeys(like, LIKE) | {place: MEAN}).items())))
    return found


def plain_relevance(seen: Seen) -> list[Tensor | None]:
    return [
        -seen.features[tokens, int(ids[0]) % 4] if len(ids) else None
        for (_, tokens), ids in zip(seen.layout.images(), seen.text_ids)
    ]


# ------------------------------------------------------------------------------------------------- on random numbers


def test_by_hand():
    """Dot products 2, -1, .5, -3: tokens 1 and 3, then the mean of 0 and 2."""
    features = torch.tensor([[2.0, 10], [-1, 20], [0.5, 30], [-3, 40]])
    seen = Seen(layout_of([(2, 2)]), features=features, text=[features], text_ids=[torch.tensor([4])])
    for method in (TRIM(budget=3, text_encoder=Plain()), TRIM(retention=0.5, text_encoder=Plain())):
        picks = method.select(seen)
        assert picks.indices.tolist() == [0, 1, 3] and picks.roles.tolist() == [MEAN, LIKE, 0, LIKE]
        assert method.kept(seen.layout) == [3]
        assert method.merge(features, seen, picks)[picks.indices].tolist() == [[-1, 20], [-3, 40], [1.25, 20]]
    assert [method.roles[role - 1] for role in (MEAN, LIKE)] == ["mean of the others", "like the text"]
    one = TRIM(budget=1, text_encoder=Plain())
    picks = one.select(seen)
    assert picks.roles.tolist() == [MEAN, 0, 0, 0]
    assert one.merge(features, seen, picks)[0].tolist() == features.mean(dim=0).tolist()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_definition(layout):
    for options in ({"retention": 0.05}, {"retention": 0.3}, {"retention": 0.97}, {"budget": 1}, {"budget": 6}):
        method = TRIM(**options, text_encoder=Plain())
        seen = seen_of(method, layout)
        found = selected(method, seen)
        assert found == reference(method, seen, plain_relevance(seen))
        picks = method.select(seen)
        merged = method.merge(seen.features, seen, picks)
        for image, tiles in zip(found, tiles_of(layout)):
            dropped = [t for tile in tiles for t in tile if image.get(t) != LIKE]
            rows = [seen.features[t].double() for t, role in image.items() if role == LIKE]
            rows += [seen.features[dropped].double().mean(dim=0)] * (MEAN in image.values())
            torch.testing.assert_close(merged[sorted(image)].double(), torch.stack(rows), rtol=1e-5, atol=1e-5)
    assert_images_alone(TRIM(retention=0.3, text_encoder=Plain()), seen_of(method, layout))


def test_no_text_equal_tokens_and_numbers_that_are_none():
    method, layout = TRIM(budget=4, text_encoder=Plain()), layout_of([(3, 3)], [(3, 3)])
    seen = seen_of(method, layout)
    seen = seen._replace(text_ids=[torch.zeros(0, dtype=torch.long), torch.tensor([0])])
    picks = method.select(seen)
    assert picks.notes == ["no text in the prompt: the first tokens stay", ""]
    assert picks.roles[:9].tolist() == [LIKE] * 3 + [MEAN] + [0] * 5
    flat = seen._replace(features=torch.ones(18, 16))
    assert selected(method, flat)[1] == {9: LIKE, 10: LIKE, 11: LIKE, 12: MEAN}
    flat.features[[9, 10]] = torch.nan
    assert selected(method, flat)[1] == {9: MEAN, 11: LIKE, 12: LIKE, 13: LIKE}


def test_what_is_read():
    text = tiny_with_clip("llava")[2]
    method = TRIM(budget=1, text_encoder=text)
    assert method.needs(CLIP) == Needs(features="encoder", text=True)
    assert method.needs(CLIP).stage(CLIP) is Stage.LANGUAGE
    for encoder in (SIGLIP, INTERN, QWEN):
        with pytest.raises(
            ValueError, match="text_encoder: expected a model with CLIP's vision tower for a ClipText, got"
        ):
            method.needs(encoder)
    assert TRIM(budget=1, text_encoder=Plain()).needs(QWEN) == Needs(features="encoder", text=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text_encoder": None}, ValueError, "text_encoder: expected a ClipText, as TRIM compares patches with text"),
        ({"text_encoder": 3}, TypeError, "text_encoder: expected a ClipText, got int"),
        (
            {"text_encoder": types.SimpleNamespace(embeddings=0, patches=0)},
            TypeError,
            "text_encoder: expected a ClipText",
        ),
        ({"budget": None}, ValueError, "budget: expected exactly one of budget and retention"),
        ({"ratio": 0.2}, TypeError, "TRIM: expected options among budget, retention, text_encoder, by name, got ratio"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        TRIM(**{"budget": 5, "text_encoder": Plain(), **options})


# --------------------------------------------------------------------------------------------------------- CLIP's text


def clip_parts() -> dict:
    text = tiny_with_clip("llava")[2]
    return {"clip": text.clip, "clip_tokenizer": clip_words, "tokenizer": Words()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": "openai/clip"}, "clip: expected a transformers.CLIPModel, got str"),
        ({"clip": torch.nn.Linear(1, 1)}, "clip: expected a transformers.CLIPModel, got Linear"),
        ({"clip_tokenizer": None}, "clip_tokenizer: expected a callable, got NoneType"),
        ({"tokenizer": clip_words}, "tokenizer: expected a tokenizer with `decode`, got function"),
        ({"instruction": "USER"}, "instruction: expected a callable, got str"),
    ],
)
def test_wrong_options_of_clip_text(options, message):
    with pytest.raises(TypeError, match=message):
        ClipText(**{**clip_parts(), **options})


def test_embeddings_of_text():
    """Segments of 77; only the part of a prompt that `instruction` cuts out of it."""
    text = tiny_with_clip("llava")[2]
    for words in ([3, 5], list(range(2, 77)), list(range(2, 78)), list(range(2, 80)) * 3):
        _, expected = clip_sides(text, torch.zeros(1, 64), words)
        found = text.embeddings(torch.tensor(words))
        assert found.shape == expected.shape == (-(-(len(words) + 2) // 77), 24) and found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
        short = text.embeddings(torch.tensor(words), truncated=True)
        _, expected = clip_sides(text, torch.zeros(1, 64), words[:75])  # what follows is cut off, its end is not
        torch.testing.assert_close(short.double(), expected, rtol=1e-4, atol=1e-4)
    last = ClipText(**clip_parts(), instruction=lambda prompt: prompt.split()[-1])
    assert torch.equal(last.embeddings(torch.tensor([3, 9, 5])), text.embeddings(torch.tensor([5])))
    assert not torch.allclose(last.embeddings(torch.tensor([3, 9, 5])), text.embeddings(torch.tensor([3, 9, 5])))


def test_patches():
    text = tiny_with_clip("llava")[2]
    rows = torch.randn(5, 64)
    expected, _ = clip_sides(text, rows, [3])
    torch.testing.assert_close(text.patches(rows).double(), expected, rtol=1e-4, atol=1e-4)
    half = text.patches(rows.bfloat16())
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), clip_sides(text, rows.bfloat16(), [3])[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="text_encoder: expected a CLIP whose vision tower is 48 wide, got one of 64"):
        text.patches(torch.randn(5, 48))


def test_a_clip_of_another_width_is_an_error_that_says_so():
    model = tiny_llava(vision=tiny_clip_config(hidden_size=48))
    inputs = batch([prompt(5, "image", 7)], images(1))
    text = tiny_with_clip("llava")[2]
    for cls in (TRIM, CDPruner, HiPrunePlusPlus):
        with pytest.raises(
            ValueError, match="text_encoder: expected a CLIP whose vision tower is 48 wide, got one of 64"
        ):
            forward(model, cls(budget=5, text_encoder=text), inputs)
        assert not hk.is_patched(model)


# ---------------------------------------------------------------------------------------------------- on tiny models


def assert_trims(model, method: TRIM, inputs: dict, relevance_of, **applied) -> None:
    """Rows kept and the mean of the others are of stock hidden states, and go through the stock projector."""
    towers = stock_towers(model, inputs)

    def expected(method, seen):
        number = next(
            i for i, (states, _) in enumerate(towers) if states[:, 1:].flatten(0, 1).shape[0] == len(seen.features)
        )
        rows = towers[number][0][:, 1:].flatten(0, 1)
        torch.testing.assert_close(seen.features, rows, rtol=0, atol=1e-4 * float(rows.abs().max()))
        return reference(method, seen, relevance_of(seen, rows))

    def changed(made, number: int, own: Tensor) -> Tensor:
        rows, places, stack = towers[number][0][:, 1:].flatten(0, 1), [], []
        for image, tiles in zip(expected(method, made.seen[number]), tiles_of(made.seen[number].layout)):
            everyone = [t for tile in tiles for t in tile]
            places += sorted(image)
            stack += [rows[t] for t in sorted(image) if image[t] == LIKE]
            stack += [rows[[t for t in everyone if image.get(t) != LIKE]].mean(dim=0)] * (MEAN in image.values())
        with torch.no_grad():
            projected = model.model.multi_modal_projector(torch.stack(stack)[None])[0]
        return own.index_copy(0, torch.tensor(places), projected)

    assert_model_prunes(model, method, inputs, expected, changed, **applied)


@pytest.mark.parametrize("options", [{"retention": 0.3}, {"budget": 4}, {"budget": 35}])
@pytest.mark.parametrize(
    ("name", "applied"), [("llava", {}), ("llava_next", {}), ("llava_next", {"unpad": "after"})], ids=str
)
def test_models(name, applied, options):
    model, inputs, text = tiny_with_clip(name)
    if name == "llava_next":
        inputs = anyres_batch(model, [[5, (40, 90), 7], [2, (96, 50), 3, (96, 90), 80]])

    def relevance(seen, rows):
        found = []
        for (_, tokens), words in zip(seen.layout.images(), texts_of_images(model, inputs, [seen])[0], strict=True):
            patches, segments = clip_sides(text, rows[tokens], words[:75])
            found.append(-(patches @ segments[0]))
        return found

    assert_trims(model, TRIM(**options, text_encoder=text), inputs, relevance, **applied)


def test_video_llava():
    """Two towers; a video is one image of several frames."""
    model, inputs, text = tiny_with_clip("video_llava")

    def relevance(seen, rows):
        videos = len(seen.layout.tiles) == 1
        words = texts_of_images(model, inputs, made.seen)[int(videos)]
        found = []
        for (_, tokens), own in zip(seen.layout.images(), words, strict=True):
            patches, segments = clip_sides(text, rows[tokens], own)
            found.append(-(patches @ segments[0]))
        return found

    made = forward(model, TRIM(budget=9, text_encoder=text), inputs)
    assert [len(s.indices) for s in made.selections] == [9, 9, 9]
    towers = stock_towers(model, inputs)
    sizes = [len(seen.features) for seen in made.seen]
    assert sizes == [72, 72] and len(towers) == 2
    for seen, picks, (states, _) in zip(made.seen, made.picks, towers, strict=True):
        rows = states[:, 1:].flatten(0, 1)
        expected = reference(TRIM(budget=9, text_encoder=text), seen, relevance(seen, rows))
        assert of_images(picks, seen.layout) == expected


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "llava_onevision"])
def test_another_text_encoder(name):
    """With one of another kind more models will do; tokens of several rows are merged before the merger."""
    model, inputs = tiny(name)
    method = TRIM(retention=0.4, text_encoder=Plain())
    made = forward(model, method, inputs)
    for seen, picks in zip(made.seen, made.picks):
        assert of_images(picks, seen.layout) == reference(method, seen, plain_relevance(seen))
    if name == "llava_onevision":
        return
    with torch.no_grad(), hk.applied(model, method):
        once, again = generated(model, inputs), generated(model, inputs, cache_implementation="static")
    assert once == again


def test_packed_rows_go_through_the_merger_together():
    """Qwen-VL: the mean is one of patches, place by place in the merge group, in front of the merger."""
    model, _ = tiny("qwen2_vl")
    method = TRIM(retention=0.4, text_encoder=Plain())
    inputs = qwen_batch("qwen2", [(3, (4, 6), 2, (3, 3), 5), (4, (3, 3), 6)])
    made = forward(model, method, inputs)

    def changed(number: int, own: Tensor) -> Tensor:
        seen, picks = made.seen[number], made.picks[number]
        places, stack = [], []
        for _, tokens in seen.layout.images():
            roles = picks.roles[tokens]
            rows = seen.features[tokens]
            places += [tokens.start + int(i) for i in roles.nonzero()[:, 0]]
            stack += [*rows[roles == LIKE], rows[roles != LIKE].mean(dim=0)]
        with torch.no_grad():
            merged = model.model.visual.merger(torch.stack(stack).view(-1, 64))
        return own.index_copy(0, torch.tensor(places), merged)

    rows = expected_rows(model, inputs, made, changed=changed)
    assert_logits(model, made.logits, rows, inputs)
    with hk.applied(model, method):
        assert generated(model, inputs) == expected_tokens(model, rows)


def test_models_that_mix_rows_in_front_of_the_connector():
    model, _ = tiny("internvl")
    with pytest.raises(
        ValueError, match="TRIM: expected features of the language model, as rows of InternVLVisionModel"
    ):
        hk.apply_method(model, TRIM(budget=5, text_encoder=Plain()))
    assert not hk.is_patched(model)


def test_prompts_without_text_and_as_embeddings():
    model, _, text = tiny_with_clip("llava")
    inputs = batch([prompt("image"), prompt("image", seed=1)], images(2))
    made = forward(model, TRIM(budget=6, text_encoder=text), inputs)
    assert [s.note for s in made.selections] == ["no text in the prompt: the first tokens stay"] * 2
    assert made.selections[0].indices.tolist() == list(range(6))
    embedded = {
        **inputs,
        "input_ids": None,
        "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach(),
    }
    with pytest.raises(ValueError, match="text_encoder: expected prompts as input_ids, got embeddings"):
        forward(model, TRIM(budget=6, text_encoder=text), embedded)
