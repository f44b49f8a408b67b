"""What a method sees, of random numbers or of a tiny model, and what stock code computes on what it keeps."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
import transformers
from models import VIDEO_TOKEN, VLM_CASES
from torch import Tensor

import hiprune_kernels as hk
from hiprune_kernels.facts import ENCODERS, EncoderFacts
from hiprune_kernels.methods import Method, Picks, Seen, TokenLayout
from hiprune_kernels.patch import FAMILIES
from hiprune_kernels.patch.selfcheck import _NEW_TOKENS, _extended, _prefill, _Row

CLIP = EncoderFacts(
    "clip_vision_model",
    ENCODERS["clip_vision_model"],
    depth=24,
    feature_layer=23,
    num_prefix_tokens=1,
    decoder_layers=8,
    attention_layers=tuple(range(1, 9)),
)
TILED = CLIP._replace(tiled=True, **({"places_tiles": True} if "places_tiles" in EncoderFacts._fields else {}))
SIGLIP = TILED._replace(
    model_type="siglip_vision_model",
    kind=ENCODERS["siglip_vision_model"],
    depth=26,
    feature_layer=26,
    num_prefix_tokens=0,
)
INTERN = CLIP._replace(
    model_type="internvl_vision", kind=ENCODERS["internvl_vision"], feature_layer=24, tiled=True, class_name="InternVL"
)
QWEN = CLIP._replace(
    model_type="qwen2_vl_vision",
    kind=ENCODERS["qwen2_vl_vision"],
    depth=32,
    feature_layer=32,
    num_prefix_tokens=0,
)

# ------------------------------------------------------------------------------------------------- of random numbers


def layout_of(*images: list[tuple[int, ...]], padding: list[int] | None = None, **others) -> TokenLayout:
    """Images given as the grids of their tiles; `padding` are tokens that never reach the prompt."""
    layout = TokenLayout(tuple(grid for image in images for grid in image), tuple(map(len, images)), **others)
    if padding is None:
        return layout
    candidates = torch.ones(sum(layout.sizes), dtype=torch.bool)
    candidates[padding] = False
    return layout.with_candidates(candidates)


_TILED = {"thumbnail": 0, "tile_grids": ((2, 2), (1, 2))}
LAYOUTS = {
    "one image": layout_of([(6, 6)]),
    "images of several sizes": layout_of([(4, 5)], [(2, 3)], [(6, 2)]),
    "a video": layout_of([(3, 3, 4)], [(3, 3)]),
    "tiles": layout_of([(4, 4)] * 5, [(4, 4)] * 3, **_TILED),
    "thumbnail last": layout_of([(4, 4)] * 3, [(4, 4)], [(4, 4)] * 7, thumbnail=-1),
    "padding": layout_of(
        [(4, 4)] * 5, [(4, 4)] * 3, padding=[*range(16, 24), *range(32, 40), 66, 67, 99, 103, 107], **_TILED
    ),
    "a tile of padding alone": layout_of([(3, 3)] * 3, padding=[*range(9, 18), 20], thumbnail=0, tile_grids=((1, 2),)),
    "one-token tiles": layout_of([(1, 1)] * 3, [(1, 1)], thumbnail=0, tile_grids=((2, 1), (1, 1))),
    "mixed tiles": layout_of(
        [(4, 4), (5, 7)], [(4, 4)], thumbnail=0, tile_grids=((2, 3), (1, 1)), encoder_tiles=(7, 1)
    ),
}


def seen_of(method: Method, layout: TokenLayout, encoder: EncoderFacts = CLIP, seed: int = 0, **changes) -> Seen:
    """What a method asks for, of random numbers."""
    generator = torch.Generator().manual_seed(seed)
    needs, total, images = method.needs(encoder), sum(layout.sizes), len(layout.tiles)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    seen = {"scores": {layer: noise(total).exp() for layer in needs.scores}}
    seen["keys"] = noise(total, 8) if needs.keys else None
    seen["features"] = noise(total, 16) if needs.features != "none" else None
    seen["encoder_features"] = noise(total, 12) if needs.features == "both" else None
    seen["regions"] = noise(sum(layout.encoder_tiles or layout.tiles), 6) if needs.region_features else None
    if needs.text:
        seen["text"] = [noise(3 + i, 16) for i in range(images)]
        seen["text_ids"] = [torch.arange(5 + 3 * i, 8 + 4 * i) for i in range(images)]
    seen["text_scores"] = noise(total).exp() if needs.text_attention else None
    return Seen(layout, **{**seen, **changes}, encoder=encoder)


def tiles_of(layout: TokenLayout) -> list[list[list[int]]]:
    """The candidates of each tile of each image, counted in T."""
    first, found = 0, []
    candidates = [True] * sum(layout.sizes) if layout.candidates is None else layout.candidates.tolist()
    for tiles, _ in layout.images():
        image = []
        for size in layout.sizes[tiles]:
            image.append([token for token in range(first, first + size) if candidates[token]])
            first += size
        found.append(image)
    return found


def best(scores, places: list[int], count: int) -> list[int]:
    """The places with the highest scores, best first; the lowest of equals."""
    return sorted(places, key=lambda place: (-float(scores[place]), place))[:count]


def by_shares(weights: list[float], total: int, caps: list[int]) -> list[int]:
    """Exact shares: whoever would get his cap has it; then whole parts; then one each to the largest fractions."""
    found, open_, total = [0] * len(caps), list(range(len(caps))), min(total, sum(caps))
    while open_:
        left, scale = total - sum(found), sum(weights[i] for i in open_)
        quota = {i: left * weights[i] / scale if scale else left / len(open_) for i in open_}
        if not (full := [i for i in open_ if quota[i] >= caps[i]]):
            break
        for i in full:
            found[i] = caps[i]
        open_ = [i for i in open_ if i not in full]
    left = total - sum(found)
    for i in open_:
        found[i] = int(quota[i])
    rest = left - sum(found[i] for i in open_)
    for i in sorted(open_, key=lambda i: (-(quota[i] - int(quota[i])), i))[:rest]:
        found[i] += 1
    return found


def of_images(picks: Picks, layout: TokenLayout) -> list[dict[int, int]]:
    """What is kept of each image: token, counted in T, -> role."""
    found, row = [], 0
    for tiles, tokens in layout.images():
        count = sum(picks.host_counts()[tiles])
        indices = [index for index in picks.indices[row : row + count].tolist() if index >= 0]
        roles = picks.roles[tokens].tolist()
        assert indices == [tokens.start + i for i, role in enumerate(roles) if role]
        found.append({index: roles[index - tokens.start] for index in indices})
        row += count
    assert row == len(picks.indices) and next(reversed([0, *picks.host_counts()])) >= 0
    return found


def selected(method: Method, seen: Seen) -> list[dict[int, int]]:
    """`of_images` of picks that hold what a method promises: from sizes alone as many as there are, in each tile."""
    layout = seen.layout
    picks = method.select(seen)
    bare = TokenLayout(layout.grids, layout.tiles, candidate_counts=layout.candidate_counts, thumbnail=layout.thumbnail)
    assert method.kept(bare) == [sum(picks.host_counts()[tiles]) for tiles, _ in layout.images()]
    assert picks.indices.dtype == torch.int64 and picks.roles.dtype == torch.uint8
    assert all(type(count) is int and count >= 0 for count in picks.host_counts())
    assert picks.fills or not bool((picks.indices < 0).any())
    first = 0
    for own, size in zip(picks.indices.split(picks.host_counts()), layout.sizes):
        real = own[own >= 0]
        assert torch.equal(own[: len(real)], real) and bool((real.diff() > 0).all())
        assert bool(((real >= first) & (real < first + size)).all())
        first += size
    assert len(picks.roles) == first and int(picks.roles.max()) <= len(method.roles)
    found = of_images(picks, layout)
    for image, tiles in zip(found, tiles_of(layout)):
        assert set(image) <= {token for tile in tiles for token in tile}
    return found


def image_of(seen: Seen, image: int) -> Seen:
    """What is seen of one image alone."""
    layout = seen.layout
    tiles, tokens = list(layout.images())[image]
    rows = layout.encoder_tiles or layout.tiles
    own = TokenLayout(
        layout.grids[tiles],
        (layout.tiles[image],),
        thumbnail=layout.thumbnail,
        tile_grids=None if layout.tile_grids is None else layout.tile_grids[image : image + 1],
        encoder_tiles=None if layout.encoder_tiles is None else layout.encoder_tiles[image : image + 1],
    )
    if layout.candidates is not None:
        own = own.with_candidates(layout.candidates[tokens])

    def part(value, where):
        return None if value is None else value[where]

    one = slice(image, image + 1)
    return seen._replace(
        layout=own,
        scores={layer: scores[tokens] for layer, scores in seen.scores.items()},
        keys=part(seen.keys, tokens),
        features=part(seen.features, tokens),
        encoder_features=part(seen.encoder_features, tokens),
        regions=part(seen.regions, slice(sum(rows[:image]), sum(rows[: image + 1]))),
        text=part(seen.text, one),
        text_ids=part(seen.text_ids, one),
        text_scores=part(seen.text_scores, tokens),
    )


def assert_images_alone(method: Method, seen: Seen) -> None:
    """What is kept of an image does not depend on its neighbours; a second run gives the same."""
    found = selected(method, seen)
    assert selected(method, seen) == found
    for image, (_, tokens) in enumerate(seen.layout.images()):
        alone = selected(method, image_of(seen, image))[0]
        if len(alone) == tokens.stop - tokens.start:  # then the method is not asked: all have the last role
            alone = dict.fromkeys(alone, len(method.roles))
        assert {tokens.start + token: role for token, role in alone.items()} == found[image]


def assert_scale_is_nothing(method: Method, seen: Seen, scale: float) -> None:
    """Positive factors of scores, features and keys."""

    def scaled(value):
        return None if value is None else value * scale

    other = seen._replace(
        scores={layer: scores * scale for layer, scores in seen.scores.items()},
        **{name: scaled(getattr(seen, name)) for name in ("keys", "features", "encoder_features", "text_scores")},
    )
    assert selected(method, other) == selected(method, seen)


# --------------------------------------------------------------------------------------------------- of a tiny model


@functools.cache
def tiny(name: str):
    """A stock model of a family, and inputs of two prompts; whoever patches it takes the patch off."""
    model, inputs = VLM_CASES[name]()
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)  # installs transformers' own hooks, once and for all
    return model, inputs


@dataclasses.dataclass
class Forward:
    """A forward of a pruned model: what its method saw of each run, and what it picked."""

    seen: list[Seen]
    picks: list[Picks]
    logits: Tensor
    selections: list


@contextlib.contextmanager
def watched(method: Method) -> Iterator[list[tuple[Seen, Picks]]]:
    """What `select` of this class is given, and gives."""
    record, select = [], type(method).select

    def recording(self, seen):
        picks = select(self, seen)
        record.append((seen, picks))
        return picks

    with mock.patch.object(type(method), "select", recording):
        yield record


def forward(model, method: Method, inputs: dict, **options) -> Forward:
    with hk.applied(model, method, **options), watched(method) as record, torch.no_grad():
        logits = model(**inputs).logits
        selections = hk.last_selection(model)
    assert not hk.is_patched(model)
    return Forward([seen for seen, _ in record], [picks for _, picks in record], logits, selections)


def placeholder_tokens(model, inputs: dict, layouts: list[TokenLayout]) -> list[tuple[Tensor, Tensor]]:
    """Of each run: where its placeholders are, [B, L], and which token each is for, -1 for newlines and CLS rows."""
    ids, found = inputs["input_ids"], []
    for number, layout in enumerate(layouts):
        videos = "pixel_values_videos" in inputs and number == len(layouts) - 1
        places = ids == (VIDEO_TOKEN if videos else model.config.image_token_id)
        total, tokens = sum(layout.sizes), layout.placeholders
        if tokens is None:
            tokens = torch.arange(total)
            if int(places.sum()) == total + len(layout.grids):  # a CLS row leads each tile
                tokens = torch.nn.functional.pad(tokens.view(len(layout.grids), -1), (1, 0), value=-1).flatten()
        assert int(places.sum()) == len(tokens)
        found.append((places, tokens))
    return found


def expected_rows(
    model, inputs: dict, made: Forward, original: bool = False, changed: Callable | None = None
) -> list[_Row]:
    """The prompts as the language model is to see them: stock embeddings without those of dropped tokens.

    `changed` says what stands for the tokens of a run, from the stock embeddings [T, C] of them: [T, C].
    """
    with torch.no_grad():
        _, embeds, arguments = _prefill(model, FAMILIES[model.config.model_type].host(model), inputs)
    keep, embeds = inputs["attention_mask"].bool().clone(), embeds.clone()
    for number, (places, tokens) in enumerate(placeholder_tokens(model, inputs, [s.layout for s in made.seen])):
        kept = torch.cat([made.picks[number].roles > 0, torch.tensor([True])])
        keep[places] = kept[tokens]
        if changed is not None:
            own = embeds.new_zeros(len(made.picks[number].roles), embeds.shape[-1])
            own[tokens[tokens >= 0]] = embeds[places][tokens >= 0]
            rows = changed(number, own)
            embeds[places] = torch.where((tokens >= 0)[:, None], rows[tokens], embeds[places])
    visual = arguments.get("visual_pos_masks")
    visual = torch.zeros_like(keep) if visual is None else visual
    deepstack = [
        torch.zeros_like(embeds).masked_scatter(visual[..., None], level)
        for level in arguments.get("deepstack_visual_embeds") or ()
    ]
    rows = []
    for i, here in enumerate(keep):
        positions = torch.arange(int(here.sum()))[None]
        if original:
            positions = (inputs["attention_mask"][i].cumsum(dim=0) - 1)[here][None]
        if FAMILIES[model.config.model_type].multimodal_positions:
            positions = torch.cat([torch.arange(int(here.sum()))[None], arguments["position_ids"][-3:, i, here]])
        own = visual[i, here]
        rows.append(_Row(embeds[i, here], positions, own, [level[i, here][own] for level in deepstack]))
    return rows


def row_logits(model, row: _Row) -> Tensor:
    """Stock logits [K, V] of one prompt. With a mask: without, stock code takes gaps in positions for ends of texts."""
    arguments = {"inputs_embeds": row.embeds[None], "position_ids": row.positions[:, None]}
    if len(row.positions) == 1:
        arguments["position_ids"] = row.positions
    if row.deepstack and bool(row.visual.any()):
        arguments |= {"visual_pos_masks": row.visual[None], "deepstack_visual_embeds": row.deepstack}
    arguments |= {"attention_mask": torch.ones(1, len(row.embeds), dtype=torch.long), "use_cache": False}
    return model.lm_head(model.model.language_model(**arguments).last_hidden_state)[0]


def assert_logits(model, found: Tensor, rows: list[_Row], inputs: dict) -> None:
    """Logits of each row are those of stock code, at the columns that they have counted from the end."""
    length = inputs["input_ids"].shape[1]
    for logits, row, mask in zip(found, rows, inputs["attention_mask"], strict=True):
        end = logits.shape[0] - (length - int(mask.nonzero().max()) - 1)
        with torch.no_grad():
            expected = row_logits(model, row)
        error, largest = (logits[end - len(row.embeds) : end] - expected).abs().max(), expected.abs().max()
        assert float(error) <= 1e-3 * float(largest)
        assert float((expected - expected.roll(1, dims=0)).abs().max()) > 1e-2 * float(largest)


def generated(model, inputs: dict, **options) -> list[list[int]]:
    """The tokens that `generate` adds."""
    if options.get("num_beams", 1) > 1 and transformers.__version__ < "5.18":
        pytest.skip("beams of transformers before 5.18 take images of a batch for those of others; all before passed")
    sequences = model.generate(**inputs, **_options(model), **options)
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def _options(model) -> dict:
    return {"do_sample": False, "max_new_tokens": _NEW_TOKENS, "suppress_tokens": sorted(_forbidden(model))}


def _forbidden(model) -> set[int]:
    return {getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")} - {None}


def expected_tokens(model, rows: list[_Row], width: int = 1) -> list[list[int]]:
    """The same by stock code on these rows, one full forward a token."""
    with torch.no_grad():
        return [_beam_search(model, row, width) for row in rows]


def _beam_search(model, row: _Row, width: int) -> list[int]:
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(_NEW_TOKENS):
        candidates = []
        for score, tokens in beams:
            scores = row_logits(model, _extended(model, row, tokens))[-1].log_softmax(dim=-1)
            scores[sorted(_forbidden(model))] = -torch.inf
            found = scores.topk(width)
            candidates += [(score + float(step), [*tokens, int(token)]) for step, token in zip(*found)]
        beams = sorted(candidates, reverse=True)[:width]
    return beams[0][1]


def assert_model_prunes(
    model, method: Method, inputs: dict, reference: Callable, changed: Callable | None = None, **options
) -> Forward:
    """The picks are those of the reference for what is seen, logits and greedy tokens those of stock code on them.

    `reference` is handed the method and what is seen, and gives for each image the kept tokens and their roles.
    `changed`, of methods that merge, is handed the forward, the number of the run, and stock rows [T, C].
    """
    made = forward(model, method, inputs, **options)
    for seen, picks in zip(made.seen, made.picks, strict=True):
        assert of_images(picks, seen.layout) == reference(method, seen)
    kept = [image for seen, picks in zip(made.seen, made.picks) for image in of_images(picks, seen.layout)]
    assert [len(image) for image in kept] == [len(selection.indices) for selection in made.selections]
    change = None if changed is None else functools.partial(changed, made)
    rows = expected_rows(model, inputs, made, original=method.original_positions, changed=change)
    assert_logits(model, made.logits, rows, inputs)
    with hk.applied(model, method, **options):
        assert generated(model, inputs) == expected_tokens(model, rows)
    return made


def stock_towers(model, inputs: dict) -> list[tuple[Tensor, Tensor]]:
    """Of each CLIP or SigLIP tower that runs: the feature layer's output, and its keys averaged over heads, [B, N, ...]."""
    states, keys, hooks = [], [], []
    index = model.config.vision_feature_layer
    for name in ("vision_tower", "image_tower", "video_tower"):
        if not hasattr(model.model, name):
            continue
        tower = getattr(model.model, name)
        layers = getattr(tower, "vision_model", tower).encoder.layers
        layer = layers[index if index < 0 else index - 1]
        heads = layer.self_attn.num_heads
        hooks.append(layer.register_forward_hook(lambda _, args, output: states.append(output)))
        hooks.append(
            layer.self_attn.k_proj.register_forward_hook(
                lambda _, args, output, heads=heads: keys.append(output.unflatten(-1, (heads, -1)).mean(dim=-2))
            )
        )
    with torch.no_grad():
        model(**inputs)
    for hook in hooks:
        hook.remove()
    return [(s[0] if isinstance(s, tuple) else s, k) for s, k in zip(states, keys, strict=True)]


# ------------------------------------------------------------------------------------------------------ CLIP's text

_BOS, _EOS = 198, 199


class Words:
    """The tokenizer of a tiny model: token 7 is the word "w7"."""

    def decode(self, ids: Tensor, skip_special_tokens: bool = False) -> str:
        assert skip_special_tokens
        return " ".join(f"w{token}" for token in ids.tolist())


def clip_words(text: str) -> dict[str, list[int]]:
    """CLIP's tokenizer, which knows other numbers for words, and ends a text with its highest."""
    return {"input_ids": [_BOS, *(1 + int(word[1:]) * 7 % 190 for word in text.split()), _EOS]}


@functools.cache
def tiny_with_clip(name: str):
    """A tiny model whose vision towers are a CLIP's, its inputs, and the text side of that CLIP."""
    model, inputs = VLM_CASES[name]()
    torch.manual_seed(3)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 200, "bos_token_id": _BOS, "eos_token_id": _EOS, "pad_token_id": 0}
    text["initializer_factor"] = 10.0
    config = transformers.CLIPConfig(
        text_config=text, vision_config=model.config.vision_config.to_dict(), projection_dim=24
    )
    clip = transformers.CLIPModel._from_config(config).eval()
    clip.visual_projection.weight.data.normal_()
    clip.text_projection.weight.data.normal_()
    norm = clip.vision_model.post_layernorm  # norms of a new model are all alike
    norm.weight.data.add_(torch.randn_like(norm.weight) / 4)
    for tower in ("vision_tower", "image_tower", "video_tower"):
        if hasattr(model.model, tower):
            tower = getattr(model.model, tower)
            getattr(tower, "vision_model", tower).load_state_dict(clip.vision_model.state_dict())
    return model, inputs, hk.ClipText(clip=clip, clip_tokenizer=clip_words, tokenizer=Words())


def clip_sides(text: hk.ClipText, rows: Tensor, words: list[int]) -> tuple[Tensor, Tensor]:
    """In float64: patches [T, D] of rows that left the feature layer, and the embeddings of the text's segments [S, D]."""
    clip = copy.deepcopy(text.clip).double()
    with torch.no_grad():
        patches = clip.visual_projection(clip.vision_model.post_layernorm(rows.double()))
        ids = clip_words(" ".join(f"w{word}" for word in words))["input_ids"]
        segments = [ids[i : i + 77] for i in range(0, len(ids), 77)]
        segments[-1] += [0] * (77 - len(segments[-1]))
        pooled = [clip.text_model(input_ids=torch.tensor([segment])).pooler_output for segment in segments]
        return patches, clip.text_projection(torch.cat(pooled))


def texts_of_images(model, inputs: dict, seen: list[Seen]) -> list[list[list[int]]]:
    """Of each image of each run the ids of its prompt's text."""
    visual = sorted(_forbidden(model))
    found = []
    for (places, tokens), one in zip(placeholder_tokens(model, inputs, [s.layout for s in seen]), seen):
        where, own = places.nonzero()[:, 0].tolist(), []
        for _, image in one.layout.images():
            row = next(r for r, t in zip(where, tokens.tolist()) if image.start <= t < image.stop)
            ids, mask = inputs["input_ids"][row].tolist(), inputs["attention_mask"][row].tolist()
            own.append([token for token, real in zip(ids, mask) if real and token not in visual])
        found.append(own)
    return found
