"""What a method may ask for, on every family: that it gets what stock code computes, in float64 and with eager attention."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from family_cases import (
    _TOKEN,
    SHARE,
    FamilyCase,
    _extended,
    assert_close,
    copied,
    family_case,
    kept_tokens,
    right_padded,
)
from models import (
    ENCODER_CASES,
    IMAGE_TOKEN,
    anyres_batch,
    encoder_inputs,
    qwen_batch,
    tiny_encoder,
    tiny_onevision,
    video_llava_batch,
)
from patch_reference import seen_features
from spies import Doubler, Spy, doubled

import hiprune_kernels as hk
from hiprune_kernels.methods import DivPrune, Needs, Picks
from hiprune_kernels.patch import FAMILIES
from hiprune_kernels.patch.encoders import find_encoder
from hiprune_kernels.patch.language import CACHE
from hiprune_kernels.patch.selfcheck import _beams_are_right, _row_logits


def spied(family, wanted, model=None, **options):
    """What a method that wants this sees of each run, and which tokens it keeps."""
    model, spy = family.stock if model is None else model, Spy(retention=SHARE, wanted=wanted, **options)
    with hk.applied(model, spy):
        logits = family.logits(model)
        kept = kept_tokens(model, family.view)
    assert len(spy.log) == len(family.view.runs)
    return spy.log, kept, logits


def assert_only(seen, *names):
    """A method gets what it asked for, and nothing else."""
    for name in ("scores", "keys", "features", "regions", "text", "text_scores"):
        value = getattr(seen, name)
        assert (value is not None and len(value) > 0) == (name in names)


def decoder_layers(family):
    """Two that have softmax attention."""
    return (1, 3) if family.name.startswith("qwen3_5") else (1, 2)


# ------------------------------------------------------------------------------------------------- of the encoder


def test_facts_of_the_encoder(family):
    log, *_ = spied(family, Needs())
    view = family.view
    for seen in log:
        assert seen.encoder.feature_layer == view.feature_layer and seen.encoder.depth == view.depth
        assert seen.encoder.has_cls == view.has_cls and seen.encoder.decoder_layers == 3
        assert seen.encoder.tiled == (family.name in ("llava_next", "llava_onevision"))
        assert seen.device == torch.device("cpu")
        assert_only(seen)


def test_layouts(family):
    """Grids, tiles and padding, as sizes alone tell them."""
    log, *_ = spied(family, Needs())
    for seen, run in zip(log, family.view.runs):
        assert list(seen.layout.grids) == run.grids and list(seen.layout.tiles) == run.tiles
        missing = set(range(sum(run.sizes))) - set(run.placeholders)
        assert (seen.layout.candidates is None) == (not missing)
        if missing:
            assert (~seen.layout.candidates).nonzero()[:, 0].tolist() == sorted(missing)
    assert family.name != "llava_next" or missing


@pytest.mark.parametrize("queries", ["all", "mean", "cls"])
def test_scores(family, queries):
    """Of the first layer, one in the middle, and the feature layer."""
    last = family.view.feature_layer
    wanted = Needs(scores=dict.fromkeys((1, 3, last), queries))
    if queries == "cls" and not family.view.has_cls:
        with pytest.raises(ValueError, match=r'Spy: expected scores of "all" or "mean", as .* has no CLS token'):
            hk.apply_method(family.stock, Spy(retention=SHARE, wanted=wanted))
        assert not hk.is_patched(family.stock)
        return
    log, kept, logits = spied(family, wanted)
    for seen, run in zip(log, family.view.runs):
        assert list(seen.scores) == list(dict.fromkeys((1, 3, last)))
        for layer, scores in seen.scores.items():
            assert scores.dtype == torch.float32
            assert_close(scores, run.scores(layer, queries))
        assert_only(seen, "scores")
    assert_same_logits(family, kept, logits)


def assert_same_logits(family, kept, logits):
    """Logits of a pruned prefill are stock code's on the rows that were kept."""
    for found, row in zip(logits, family.rows(kept), strict=True):
        with torch.no_grad():
            assert_close(found[-len(row.embeds) :], _row_logits(family.stock, row), 1e-3)


def test_scores_of_several_kinds(family):
    last = family.view.feature_layer
    log, *_ = spied(family, Needs(scores={2: "mean", last: "all"}))
    for seen, run in zip(log, family.view.runs):
        assert_close(seen.scores[2], run.scores(2, "mean"))
        assert_close(seen.scores[last], run.scores(last, "all"))


def test_keys(family):
    """Before any rotation, the mean over heads and over the rows of a token, in raster order."""
    log, kept, logits = spied(family, Needs(keys=True))
    for seen, run in zip(log, family.view.runs):
        assert_close(seen.keys, run.keys(family.view.feature_layer))
        assert_only(seen, "keys")
    assert_same_logits(family, kept, logits)


def test_features_of_the_encoder(family):
    """Finished rows; those that make one token stand side by side."""
    log, kept, logits = spied(family, Needs(features="encoder"))
    for seen, run in zip(log, family.view.runs):
        assert_close(seen.features, run.features(family.view.feature_layer))
        assert_only(seen, "features")
    assert_same_logits(family, kept, logits)


def test_features_of_the_language_model(family):
    """What stock code puts at the placeholders."""
    log, kept, logits = spied(family, Needs(features="language"))
    for seen, run in zip(log, family.view.runs):
        assert_close(seen.features, run.language())
        assert_only(seen, "features")
    assert_same_logits(family, kept, logits)


@pytest.mark.parametrize("back", [0, 1, 2])
def test_regions(family, back):
    """The CLS row of each tile, or the mean of its rows, behind the feature layer and behind earlier ones."""
    layer = family.view.feature_layer - back
    log, kept, logits = spied(family, Needs(region_features=layer))
    for seen, run in zip(log, family.view.runs):
        assert len(seen.regions) == len(run.grids)
        assert_close(seen.regions, run.regions(layer))
        assert_only(seen, "regions")
    assert_same_logits(family, kept, logits)


def test_everything_of_the_encoder_at_once(family):
    last = family.view.feature_layer
    wanted = Needs(scores={1: "all", last: "mean"}, keys=True, features="encoder", region_features=last)
    log, kept, logits = spied(family, wanted)
    for seen, run in zip(log, family.view.runs):
        assert_close(seen.scores[last], run.scores(last, "mean"))
        assert_close(seen.keys, run.keys(last))
        assert_close(seen.features, run.features(last))
        assert_close(seen.regions, run.regions(last))
        assert_only(seen, "scores", "keys", "features", "regions")
    assert_same_logits(family, kept, logits)


def test_needs_of_the_encoder_and_of_the_text_at_once(family):
    """A method that runs in front of the language model gets what the encoder has as well."""
    last = family.view.feature_layer
    wanted = Needs(
        scores={last: "all"}, keys=True, features="language", region_features=last, text=True, text_attention=(1, "max")
    )
    log, kept, logits = spied(family, wanted)
    for seen, run in zip(log, family.view.runs):
        assert_close(seen.scores[last], run.scores(last, "all"))
        assert_close(seen.keys, run.keys(last))
        assert_close(seen.features, run.language())
        assert_close(seen.regions, run.regions(last))
        assert_close(seen.text_scores, run.text_scores(1, "max"))
        for found, expected in zip(seen.text, run.text(), strict=True):
            assert_close(found, expected)
    assert_same_logits(family, kept, logits)


# ------------------------------------------------------------------------------------------------------- of the text


@pytest.mark.parametrize("side", ["left", "right"])
def test_text(family, side):
    """Of each image the text of its own prompt, in order, without padding and placeholders."""
    family = family if side == "left" else family.with_inputs(**right_padded(family.inputs))
    log, kept, logits = spied(family, Needs(text=True))
    assert int(family.inputs["attention_mask"].sum(dim=1).diff()) != 0
    for seen, run in zip(log, family.view.runs):
        assert len(seen.text) == len(run.tiles)
        for found, expected in zip(seen.text, run.text(), strict=True):
            assert_close(found, expected)
        assert_only(seen, "text")
    if side == "left":
        assert_same_logits(family, kept, logits)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction", ["max", "mean", "last"])
def test_text_attention(family, reduction, side):
    """Of two decoder layers, as eager attention over the whole prompts has it, causal and without padding."""
    family = family if side == "left" else family.with_inputs(**right_padded(family.inputs))
    for layer in decoder_layers(family):
        if side == "right" and reduction == "last":
            continue
        log, kept, logits = spied(family, Needs(text_attention=(layer, reduction)))
        for seen, run in zip(log, family.view.runs):
            assert seen.text_scores.dtype == torch.float32
            assert_close(seen.text_scores, run.text_scores(layer, reduction))
            assert_only(seen, "text_scores")
        if side == "left":
            assert_same_logits(family, kept, logits)


def test_the_last_row_of_right_padded_prompts(family):
    """It is the last one that is no padding."""
    inputs = right_padded(family.inputs)
    layer, lengths = decoder_layers(family)[1], inputs["attention_mask"].sum(dim=1).tolist()
    case = family.with_inputs(**inputs)
    log, *_ = spied(case, Needs(text_attention=(layer, "last")))
    for seen, run in zip(log, case.view.runs):
        where, expected = run.places.nonzero().tolist(), torch.zeros(sum(run.sizes), dtype=torch.float64)
        for (row, column), token in zip(where, run.placeholders):
            if token >= 0:
                expected[token] = case.view.maps[layer][row, :, lengths[row] - 1, column].double().mean()
        assert_close(seen.text_scores, expected)


def test_an_image_with_no_text_behind_it(family):
    """Nothing attends to it: its scores are zero, those of images in front of it are not."""
    places = functools.reduce(torch.logical_or, (run.places for run in family.view.runs))
    length = int(places[0].nonzero()[-1]) + 1
    if bool(places[1, length:].any()):
        length = int(places[1].nonzero()[-1]) + 1
    texts = {name: family.inputs[name] for name in TEXTS if name in family.inputs}
    assert length < family.inputs["input_ids"].shape[1]
    case = family.with_inputs(**{name: value[:, :length] for name, value in texts.items()})
    log, *_ = spied(case, Needs(text_attention=(1, "mean")))
    alone, others = [], []
    for seen, run in zip(log, case.view.runs):
        assert torch.allclose(seen.text_scores.double(), run.text_scores(1, "mean"), atol=1e-5)
        for (row, column), (_, tokens) in zip(run.in_prompts(), run.images()):
            behind = bool(case.view.text[row, column:].any())
            (others if behind else alone).append(seen.text_scores[tokens])
    assert alone and not any(bool(scores.any()) for scores in alone)
    assert others and all(bool((scores > 0).any()) for scores in others)


TEXTS = ("input_ids", "attention_mask", "mm_token_type_ids")


def test_the_probe_leaves_no_trace(family):
    """Hooks on the language model's layers, caches and collected states see one forward, the pruned one."""
    layer = decoder_layers(family)[1]
    case, calls = copied(family), []
    for each in case.stock.model.language_model.layers:
        each.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    attributes = {name: set(module.__dict__) for name, module in case.stock.named_modules()}
    with hk.applied(case.stock, Spy(retention=SHARE, wanted=Needs(text_attention=(layer, "mean")))), torch.no_grad():
        output = case.stock(**case.inputs, output_hidden_states=True, use_cache=True)
    length = output.logits.shape[1]
    assert length < case.inputs["input_ids"].shape[1]
    assert [states.shape[1] for states in output.hidden_states] == [length] * 4
    assert output[CACHE].get_seq_length() == length
    assert calls[-3:] == [length] * 3
    assert {name: set(module.__dict__) for name, module in case.stock.named_modules()} == attributes


@pytest.fixture
def eager_compilation():
    """Wrappers of torch.compile are there, and nothing is traced."""
    torch._dynamo.reset()
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


@pytest.mark.parametrize("change", ["compiled", "compiled in place", "accelerate"])
def test_the_probe_runs_changed_layers(family, change, eager_compilation):
    """Decoder layers behind torch.compile's wrapper, compiled in place, and with accelerate's hooks."""
    case, counts = copied(family), []
    layers = case.stock.model.language_model.layers
    if change == "compiled":
        for i in range(len(layers)):
            layers[i] = torch.compile(layers[i], backend="eager")
    elif change == "compiled in place":
        for layer in layers:
            layer.compile(backend="eager")
    else:

        class Counting(ModelHook):
            def pre_forward(self, module, *args, **kwargs):
                counts.append(module)
                return args, kwargs

        for layer in layers:
            for module in (layer, layer.mlp, getattr(layer, "self_attn", layer.input_layernorm)):
                add_hook_to_module(module, Counting())
    last = decoder_layers(family)[1]
    log, kept, logits = spied(family, Needs(text_attention=(last, "max")), model=case.stock)
    for seen, run in zip(log, family.view.runs):
        assert_close(seen.text_scores, run.text_scores(last, "max"))
    assert_same_logits(family, kept, logits)
    if change == "accelerate":  # of the probe's layers, and of all of the prefill's
        assert len(counts) == 3 * (last + 3)


@pytest.mark.parametrize("in_place", [False, True])
def test_the_probe_runs_layers_that_are_really_compiled(in_place):
    torch._dynamo.reset()
    case = family_case("llava")
    model = copied(case).stock
    layers = model.model.language_model.layers
    if in_place:
        layers[1].compile(backend="eager")
    else:
        layers[1] = torch.compile(layers[1], backend="eager")
    log, kept, logits = spied(case, Needs(text_attention=(2, "max")), model=model)
    assert_close(log[0].text_scores, case.view.runs[0].text_scores(2, "max"))
    assert_same_logits(case, kept, logits)


@pytest.mark.parametrize("part", ["layer", "attention"])
def test_the_probe_refuses_a_replaced_forward(family, part):
    case = copied(family)
    layer = case.stock.model.language_model.layers[0]
    module = layer if part == "layer" else layer.self_attn
    stock = module.forward
    method = Spy(retention=SHARE, wanted=Needs(text_attention=(1, "max")))
    hk.apply_method(case.stock, method)
    module.forward = lambda *args, **kwargs: stock(*args, **kwargs)
    with pytest.raises(ValueError, match=f"expected the stock `forward` on {type(module).__name__}"):
        case.logits(case.stock)
    del module.__dict__["forward"]
    case.logits(case.stock)
    assert len(method.log) == len(family.view.runs)


# ---------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("space", ["encoder", "language"])
def test_merging(family, space):
    """Logits and tokens are stock code's where the kept tokens' features are replaced."""
    method, model, view = Doubler(retention=SHARE, wanted=Needs(features=space)), family.stock, family.view
    hk.apply_method(model, method)
    try:
        family.logits(model)
        kept = kept_tokens(model, view)
    finally:
        hk.remove_method(model)
    embeds = merged_embeds(family, space)
    rows = family.rows(kept, embeds)
    plain = family.rows(kept)
    assert all(float((one.embeds - other.embeds).abs().max()) > 0.1 for one, other in zip(rows, plain))
    with hk.applied(model, method):
        family.assert_prefill(model, rows)
        family.assert_generates(model, rows)
        with torch.no_grad():
            output = model(**family.inputs)
    for run, tokens in zip(view.runs, kept):
        assert len(tokens) == sum(run.sizes)
    assert output.logits.isfinite().all()


def merged_embeds(family, space):
    """Stock embeddings [B, L, C] with merged features of all tokens in place of the images' own."""
    _, embeds, _ = family.prefill
    embeds = embeds.clone()
    runs = iter(family.view.runs)
    if space == "encoder":  # stock code goes on with the encoder's rows replaced
        case = copied(family)
        for encoder in FAMILIES[family.name].encoders(case.host(case.stock)):
            layer = find_encoder(encoder)[2][family.view.feature_layer - 1]
            # in front of the hook that collects hidden states
            layer.register_forward_hook(lambda _, args, output: merged_rows(next(runs), output), prepend=True)
        _, embeds, _ = case.prefill_of(case.stock, case.inputs)
    for run in family.view.runs:
        if space == "language" or run.pool is not None:
            merged, own = doubled(run.language().float()), embeds[run.places]
            tokens = torch.tensor(run.placeholders)
            own[tokens >= 0] = merged[tokens[tokens >= 0]]
            embeds[run.places] = own
    return embeds


def merged_rows(run, output):
    """An encoder's rows with each token's replaced; those that are interpolated stay."""
    if run.pool is not None:
        return None
    states = output[0] if isinstance(output, tuple) else output
    states = states.clone()
    merged = doubled(torch.cat([part.flatten(1) for part in run._of_tokens(states)]))
    parts = merged.unflatten(1, (-1, states.shape[-1])).split(run.sizes)
    for tile, (part, own) in enumerate(zip(parts, run.rows)):
        if run.packed:
            states[own] = part
        else:
            states[tile, run.prefix + own] = part
    return (states, *output[1:]) if isinstance(output, tuple) else states


@pytest.mark.parametrize("result", ["shape", "dtype", "type"])
@pytest.mark.parametrize("space", ["encoder", "language"])
def test_merging_into_something_else_is_refused(space, result):
    family = family_case("qwen2_5_vl")

    @dataclass(frozen=True, kw_only=True)
    class Wrong(Spy):
        def merge(self, features, seen, picks):
            return {"shape": features[:-1], "dtype": features.double(), "type": features.tolist()}[result]

    before = family.logits()
    method = Wrong(retention=SHARE, wanted=Needs(features=space))
    error = r"Wrong\.merge: expected \[\d+, \d+\] of torch.float32, got"
    with hk.applied(family.stock, method), pytest.raises(ValueError, match=error):
        family.logits()
    assert torch.equal(family.logits(), before)


# ------------------------------------------------------------------------------------- numbers that differ by image

WANTED = [Needs(), Needs(keys=True), Needs(features="language")]
STAGES = ["feature layer", "encoder", "language"]


@dataclass(frozen=True, kw_only=True)
class Uneven(Spy):
    """Keeps one token more of each tile than of the one before, and fills up where `fill` says so."""

    fill: bool = False

    def counts(self, layout):
        return [1 + i % 3 for i in range(len(layout.grids))]

    def kept(self, layout):
        counts = self.counts(layout)
        return [sum(counts[tiles]) for tiles, _ in layout.images()]

    def select(self, seen):
        self.log.append(seen)
        layout, indices, first = seen.layout, [], 0
        counts = self.counts(layout)
        candidates = layout.candidates
        candidates = torch.ones(sum(layout.sizes), dtype=torch.bool) if candidates is None else candidates
        for size, count in zip(layout.sizes, counts):
            own = (first + candidates[first : first + size].nonzero()[:, 0])[-count:]
            own = own[1:] if self.fill and count > 1 else own
            indices += [own, own.new_full((count - len(own),), -1)]
            first += size
        indices = torch.cat(indices)
        roles = torch.zeros(sum(layout.sizes), dtype=torch.uint8)
        roles[indices[indices >= 0]] = 1
        return Picks(indices, roles, counts)


@pytest.mark.parametrize("fill", [False, True], ids=["uneven", "with fill"])
@pytest.mark.parametrize("wanted", WANTED, ids=STAGES)
def test_tiles_that_keep_different_numbers(family, wanted, fill):
    method, model = Uneven(budget=1, wanted=wanted, fill=fill), family.stock
    with hk.applied(model, method):
        logits = family.logits(model)
        selections, kept = hk.last_selection(model), kept_tokens(model, family.view)
        rows = family.rows(kept)
        family.assert_prefill(model, rows)
        family.assert_generates(model, rows)
        with torch.no_grad():
            output = model(**family.inputs)
    assert logits.isfinite().all()
    expected = [1 + i % 3 - (fill and i % 3 > 0) for run in family.view.runs for i in range(len(run.grids))]
    assert sum(len(selection.indices) for selection in selections) <= sum(expected)
    assert all(torch.equal(s.indices, s.roles.nonzero()[:, 0]) for s in selections)
    for kind, run, tokens in zip(("image", "video"), family.view.runs, kept):
        features = seen_features(output, kind)
        if features is not None and run.pool is None:
            stays = torch.tensor([token < 0 or bool(tokens[token]) for token in run.placeholders])
            assert len(features) == int(stays.sum())
            assert_close(features, family.view.embeds[run.places][stays], 1e-3)


# -------------------------------------------------------------------------------- ways to run methods of the language side

LATE = [Needs(features="language"), Needs(text=True), Needs(text_attention=(1, "max"))]
LATE_IDS = ["features", "text", "text attention"]


@pytest.mark.parametrize("wanted", LATE, ids=LATE_IDS)
def test_generation(family, wanted):
    """Twice, with a static cache, and with two beams."""
    method, model = Spy(retention=SHARE, wanted=wanted), family.stock
    with hk.applied(model, method):
        family.logits(model)
        rows = family.rows(kept_tokens(model, family.view))
        family.assert_generates(model, rows)
        family.assert_generates(model, rows)
        family.assert_generates(model, rows, cache_implementation="static")
        runs = len(family.view.runs)
        assert len(method.log) == 4 * runs
        patch = family.host(model)._hiprune
        if _beams_are_right(patch, family.stock):
            family.assert_generates(model, rows, width=2)
            first, last = method.log[0], method.log[-runs]
            assert len(method.log) == 5 * runs
            for one, other in ((first.features, last.features), (first.text_scores, last.text_scores)):
                assert one is None or torch.allclose(one, other, atol=1e-5)


def test_beams_with_merging(family):
    """All beams of a prompt get its merged features."""
    method, model = Doubler(retention=SHARE, wanted=Needs(features="language")), family.stock
    with hk.applied(model, method):
        if not _beams_are_right(family.host(model)._hiprune, family.stock):
            pytest.skip("the beams of transformers itself are wrong")
        family.logits(model)
        kept = kept_tokens(model, family.view)
    rows = family.rows(kept, merged_embeds(family, "language"))
    with hk.applied(model, method):
        family.assert_generates(model, rows, width=2)


@pytest.mark.parametrize("wanted", LATE, ids=LATE_IDS)
def test_a_loop_by_hand(family, wanted):
    """One token behind the prompts, with the cache of a pruned prefill: nothing is selected again."""
    method, model = Spy(retention=SHARE, wanted=wanted), family.stock
    token = torch.full_like(family.inputs["input_ids"][:, :1], _TOKEN)
    mask = torch.cat([family.inputs["attention_mask"], torch.ones_like(token)], dim=1)
    with hk.applied(model, method), torch.no_grad():
        cache = model(**family.inputs, use_cache=True)[CACHE]
        kept = kept_tokens(model, family.view)
        logits = model(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits
    assert len(method.log) == len(family.view.runs)
    for found, row in zip(logits, family.rows(kept)):
        with torch.no_grad():
            assert_close(found, _row_logits(family.stock, _extended(family.stock, row, [_TOKEN]))[-1:], 1e-3)


@pytest.mark.parametrize("wanted", LATE, ids=LATE_IDS)
def test_prompts_that_come_embedded(family, wanted):
    """Placeholders are found by their embedding; places in images are counted as stock code counts them there."""
    with torch.no_grad():
        embeds = family.stock.get_input_embeddings()(family.inputs["input_ids"])
    given = {name: value for name, value in family.inputs.items() if name != "input_ids"} | {"inputs_embeds": embeds}
    case = copy.copy(family)
    try:
        case.prefill = family.prefill_of(family.stock, given)
    except ValueError as error:
        pytest.skip(f"stock code takes no such prompts: {error}")
    method, model = Spy(retention=SHARE, wanted=wanted), family.stock
    with hk.applied(model, method), torch.no_grad():
        logits = model(**given).logits
        kept = kept_tokens(model, family.view)
    assert len(method.log) == len(family.view.runs)
    assert_same_logits(case, kept, logits)


@pytest.mark.parametrize("wanted", [*WANTED, *LATE[1:]], ids=[*STAGES, *LATE_IDS[1:]])
def test_a_share_of_everything_is_the_stock_model(family, wanted):
    method, model, before, tokens = Spy(retention=1.0, wanted=wanted), family.stock, family.logits(), family.tokens()
    with hk.applied(model, method):
        assert torch.equal(family.logits(model), before)
        assert family.tokens(model) == tokens
        assert all(bool((selection.roles == 1).all()) for selection in hk.last_selection(model))
    assert method.log == []


def test_one_image_that_stays_whole_beside_one_that_does_not(family):
    """Where a run keeps all and another does not, the first one is not selected from."""

    @dataclass(frozen=True, kw_only=True)
    class ImagesOnly(Spy):
        def kept(self, layout):
            sizes = [tokens.stop - tokens.start for _, tokens in layout.images()]
            return sizes if list(layout.tiles) == videos.tiles else super().kept(layout)

    if len(family.view.runs) == 1:
        pytest.skip("one run only")
    _, videos = family.view.runs
    for wanted in (*WANTED, *LATE):
        method, model = ImagesOnly(retention=SHARE, wanted=wanted), family.stock
        with hk.applied(model, method):
            family.logits(model)
            kept = kept_tokens(model, family.view)
            family.assert_prefill(model, family.rows(kept))
        assert len(method.log) == 2 and bool(kept[1].all()) and not bool(kept[0].all())


def test_text_alone(family):
    """A prompt without images goes through a patched model as through a stock one."""
    ids = family.inputs["input_ids"][:, -4:]
    with torch.no_grad():
        before = family.stock(input_ids=ids).logits
        for wanted in LATE:
            method = Spy(retention=SHARE, wanted=wanted)
            with hk.applied(family.stock, method):
                assert torch.equal(family.stock(input_ids=ids).logits, before)
            assert method.log == []


# -------------------------------------------------------------------------------------------------- later turns


@pytest.mark.parametrize("kind", ["qwen2_vl", "llava", "qwen3_vl", "glm4v", "internvl"])
def test_a_later_turn_with_an_image(kind):
    """Features of the language model are there; text attention would need the whole prompt, and says so."""
    case = family_case(kind)
    if kind in ("llava", "internvl"):
        from models import batch, images, prompt

        size = 96 if kind == "internvl" else 48
        first, second = prompt(5, "image", 7), prompt(3, "image", 4, seed=1)
        shown = images(2, size=size)
        whole = batch([first + second], shown)
        turn, later = batch([first], shown[:1]), {"pixel_values": shown[1:]}
    else:
        short = {"qwen2_vl": "qwen2", "qwen3_vl": "qwen3", "glm4v": "glm"}[kind]
        whole = qwen_batch(short, [(5, (4, 6), 4, 3, (3, 4), 4)])
        length = qwen_batch(short, [(5, (4, 6), 4)])["input_ids"].shape[1]
        turn = {name: value[:, :length] for name, value in whole.items() if value.ndim == 2 and name not in PIXELS}
        turn |= {"pixel_values": whole["pixel_values"][:96], "image_grid_thw": whole["image_grid_thw"][:1]}
        later = {"pixel_values": whole["pixel_values"][96:], "image_grid_thw": whole["image_grid_thw"][1:]}
    length = turn["input_ids"].shape[1]
    texts = {n: whole[n][:, length:] for n in ("input_ids", "mm_token_type_ids") if n in whole}
    for method in (DivPrune(retention=SHARE), Spy(retention=SHARE, wanted=Needs(text=True))):
        with hk.applied(case.stock, method), torch.no_grad():
            expected = case.stock(**whole).logits
            at_once = hk.last_selection(case.stock)
            cache = case.stock(**turn, use_cache=True)[CACHE]
            first = hk.last_selection(case.stock)
            found = case.stock(**texts, **later, attention_mask=whole["attention_mask"], **{CACHE: cache}).logits
            second = hk.last_selection(case.stock)
        for one, other in zip(at_once, [*first, *second], strict=True):
            assert torch.equal(one.indices, other.indices)
        if kind not in PLACED:
            assert_close(found[0], expected[0, -found.shape[1] :], 1e-3)
    method = Spy(retention=SHARE, wanted=Needs(text_attention=(1, "max")))
    with hk.applied(case.stock, method), torch.no_grad():
        cache = case.stock(**turn, use_cache=True)[CACHE]
        seen = cache.get_seq_length()
        with pytest.raises(
            ValueError, match=f"Spy: text attention needs the whole prompt, but {seen} tokens of it are"
        ):
            case.stock(**texts, **later, attention_mask=whole["attention_mask"], **{CACHE: cache})
        assert len(method.log) == 1
        assert case.stock(**whole).logits.shape == expected.shape


PIXELS = ("pixel_values", "image_grid_thw")
PLACED = ("qwen2_vl", "qwen3_vl", "glm4v")  # whose positions `generate` makes, from what the cache holds


# ------------------------------------------------------------------------------------------ encoders by themselves

BARE = ["clip b", "siglip", "deit", "dinov2", "dinov2 registers", "v-jepa 2"]


@pytest.fixture(scope="module", params=BARE)
def encoder(request):
    """An encoder, inputs, its stock output, and what its last layer makes of them in float64: keys and rows."""
    about, model = ENCODER_CASES[request.param], tiny_encoder(request.param)
    inputs, found = encoder_inputs(request.param), {}
    wide = copy.deepcopy(model).double()
    layers = find_encoder(wide)[2]
    projection = next(m for name, m in layers[-1].named_modules() if name.endswith(("k_proj", "key")))
    projection.register_forward_hook(
        lambda _, args, output: found.update(keys=output.unflatten(-1, (4, -1)).mean(dim=2))
    )
    for number, layer in enumerate(layers, 1):
        layer.register_forward_hook(
            lambda _, args, output, n=number: found.update({n: output[0] if isinstance(output, tuple) else output})
        )
    with torch.no_grad():
        wide(**{name: value.double() if torch.is_tensor(value) else value for name, value in inputs.items()})
        return about, model, inputs, model(**inputs).last_hidden_state, found


@pytest.mark.parametrize("back", [0, 1, 3])
def test_needs_of_an_encoder_alone(encoder, back):
    about, model, inputs, stock, found = encoder
    wanted = Needs(keys=True, features="encoder", region_features=about.depth - back)
    method = Spy(retention=SHARE, wanted=wanted)
    with hk.applied(model, method), torch.no_grad():
        states = model(**inputs).last_hidden_state
        kept = torch.stack([selection.indices for selection in hk.last_selection(model)])
    (seen,) = method.log
    assert seen.encoder.decoder_layers == 0 and seen.encoder.num_prefix_tokens == about.prefix
    assert_close(seen.keys, found["keys"][:, about.prefix :].flatten(0, 1))
    assert_close(seen.features, found[about.depth][:, about.prefix :].flatten(0, 1))
    rows = found[about.depth - back]
    assert_close(seen.regions, rows[:, 0] if about.prefix else rows.mean(dim=1))
    assert_close(states, rows_of(about, stock, kept))


def rows_of(about, states, kept):
    """Prefix rows, then the kept ones."""
    rows = torch.cat([torch.arange(about.prefix).expand(len(kept), -1), about.prefix + kept], dim=1)
    return states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1]))


@pytest.mark.parametrize("back", [0, 1, 3])
def test_regions_of_an_encoder_alone(encoder, back):
    """With nothing else: of encoders with CLS the feature layer computes its row alone."""
    about, model, inputs, stock, found = encoder
    method = Spy(retention=SHARE, wanted=Needs(region_features=about.depth - back))
    with hk.applied(model, method), torch.no_grad():
        states = model(**inputs).last_hidden_state
        kept = torch.stack([selection.indices for selection in hk.last_selection(model)])
    rows = found[about.depth - back]
    assert_close(method.log[0].regions, rows[:, 0] if about.prefix else rows.mean(dim=1))
    assert_close(states, rows_of(about, stock, kept))


def test_merging_in_an_encoder_alone(encoder):
    """The prefix rows stay what they were."""
    about, model, inputs, stock, _ = encoder
    method = Doubler(retention=SHARE, wanted=Needs(features="encoder"))
    layer = find_encoder(model)[2][-1]

    def replace(_, args, output):
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[:, about.prefix :] = doubled(states[:, about.prefix :].flatten(0, 1)).view_as(states[:, about.prefix :])
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = layer.register_forward_hook(replace, prepend=True)
    with torch.no_grad():
        expected = model(**inputs).last_hidden_state
    handle.remove()
    with hk.applied(model, method), torch.no_grad():
        states = model(**inputs).last_hidden_state
        kept = torch.stack([selection.indices for selection in hk.last_selection(model)])
    assert_close(states, rows_of(about, expected, kept))
    assert float((expected - stock).abs().max()) > 0.1


# ------------------------------------------------------------------------------------------------- other inputs

OTHER_INPUTS = {
    "two images in a prompt": (
        "qwen2_5_vl",
        lambda: qwen_batch("qwen2.5", [(3, (4, 6), 2, (3, 3), 5), (4, (3, 3), 6)]),
    ),
    "two images, deepstack": ("qwen3_vl", lambda: qwen_batch("qwen3", [(3, (4, 6), 2, (3, 3), 5), (4, (3, 3), 6)])),
    "videos alone": ("qwen2_vl", lambda: qwen_batch("qwen2", [(3, (2, 3, 4), 5), (4, (3, 2, 2), 2, (2, 2, 2), 6)])),
    "videos with time stamps": ("qwen3_vl", lambda: qwen_batch("qwen3", [(3, (2, 3, 4), 5), (4, (3, 2, 2), 6)])),
    "frames of videos": ("glm4v", lambda: qwen_batch("glm", [(3, (2, 3, 4), 5), (4, (3, 2, 2), 6)])),
    "videos with CLS tokens": (
        "video_llava",
        lambda: video_llava_batch([[5, "video", 7], [2, "video", 3, "video", 2]]),
    ),
}


@pytest.fixture(scope="module", params=OTHER_INPUTS)
def other(request):
    name, inputs = OTHER_INPUTS[request.param]
    case = family_case(name)
    return FamilyCase(name, case.stock, inputs())


@pytest.mark.parametrize(
    "wanted",
    [Needs(keys=True), Needs(features="language", text=True, text_attention=(1, "mean"))],
    ids=["encoder", "late"],
)
def test_other_inputs(other, wanted):
    log, kept, logits = spied(other, wanted)
    for seen, run in zip(log, other.view.runs):
        assert list(seen.layout.grids) == run.grids and list(seen.layout.tiles) == run.tiles
        if wanted.keys:
            assert_close(seen.keys, run.keys(other.view.feature_layer))
            continue
        assert_close(seen.features, run.language())
        assert_close(seen.text_scores, run.text_scores(1, "mean"))
        for found, expected in zip(seen.text, run.text(), strict=True):
            assert_close(found, expected)
    assert_same_logits(other, kept, logits)
    method = Spy(retention=SHARE, wanted=wanted)
    with hk.applied(other.stock, method):
        other.assert_generates(other.stock, other.rows(kept))


def test_interpolated_images():
    """Of a large image LLaVA-OneVision mixes rows of its tiles: what is read of rows is mixed alike, by stock code."""
    model = tiny_onevision()
    inputs = anyres_batch(model, [[4, (130, 130), 3], [2, (40, 90), 5]])
    layer, grid = 5, (5, 5)
    with torch.no_grad():
        features = model.model.get_image_features(
            **{name: inputs[name] for name in ("pixel_values", "image_sizes", "batch_num_images")}, return_dict=True
        ).pooler_output
        embeds, mask = model.get_input_embeddings()(inputs["input_ids"]), inputs["attention_mask"].bool()
    places = inputs["input_ids"] == IMAGE_TOKEN
    embeds[places] = torch.cat(list(features))
    wanted = Needs(scores={layer: "all"}, keys=True, features="encoder")
    for needs in (wanted, Needs(features="language"), wanted._replace(features="language")):
        method = Doubler(retention=SHARE, wanted=needs)
        with hk.applied(model, method), torch.no_grad():
            logits = model(**inputs).logits
            selections = hk.last_selection(model)
        (seen,) = method.log
        sizes = seen.layout.sizes
        assert seen.layout.pool is not None and seen.layout.tiles == (2, 3) and seen.layout.grids[0] == grid
        tokens = seen.layout.placeholders
        assert tokens.shape == (int(places.sum()),)
        language = torch.zeros(sum(sizes), embeds.shape[-1])
        language[tokens[tokens >= 0]] = torch.cat(list(features))[tokens >= 0]
        if needs.features == "language":
            assert_close(seen.features, language)
        else:
            assert seen.features.shape == (sum(sizes), 64) and seen.keys.shape == (sum(sizes), 16)
        roles = torch.cat([selection.roles for selection in selections])
        merged, own = doubled(language), torch.cat(list(features))
        own[tokens >= 0] = merged[tokens[tokens >= 0]]
        replaced, keep = embeds.clone(), mask.clone()
        replaced[places] = own
        keep[places] = (tokens < 0) | (roles[tokens] > 0)
        for found, row, here in zip(logits, replaced, keep):
            with torch.no_grad():
                expected = model(inputs_embeds=row[here][None]).logits[0]
            assert_close(found[-len(expected) :], expected, 1e-3)
