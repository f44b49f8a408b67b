"""Methods that are used or made wrongly: an error that names the method, before the language model runs, and no damage."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

import pytest
import torch
from family_cases import SHARE, copied, family_case
from models import encoder_inputs, tiny_encoder
from spies import Doubler, Spy

import hiprune_kernels as hk
from hiprune_kernels.methods import (
    METHODS,
    DivPrune,
    FasterVLM,
    HiPrune,
    Method,
    Needs,
    Picks,
    Random,
    UniformGrid,
    base,
)


@pytest.fixture(scope="module", params=["llava_next", "video_llava", "qwen2_5_vl"])
def family(request):
    """Tiles with padding, frames with CLS tokens, and one packed sequence."""
    return family_case(request.param)


@pytest.fixture(scope="module")
def encoder():
    return tiny_encoder("siglip")


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize("name", METHODS)
def test_options_of_other_methods(name):
    method = METHODS[name]
    own = set(hk.methods.options_of(method))
    others = {option for cls in METHODS.values() for option in hk.methods.options_of(cls)} - own
    assert others or method is HiPrune
    for option in {*others, "budgett"}:
        with pytest.raises(TypeError, match=f"{method.__name__}: expected options among budget, .*, got {option}$"):
            method(budget=5, **{option: 1})
    with pytest.raises(TypeError, match=rf"{method.__name__}: expected options among .*, by name, got 5$"):
        method(5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    ("budget", "error"),
    [
        ({}, "budget: expected exactly one of budget and retention"),
        ({"budget": 3, "retention": 0.5}, "budget: expected exactly one of budget and retention"),
        ({"budget": 0}, "budget: expected at least 1, got 0"),
        ({"budget": 2.0}, "budget: expected an int, got float"),
        ({"budget": True}, "budget: expected an int, got bool"),
        ({"retention": 0.0}, r"retention: expected a share in \(0, 1\], got 0.0"),
        ({"retention": math.nan}, r"retention: expected a share in \(0, 1\], got nan"),
        ({"retention": "half"}, "retention: expected a float, got str"),
    ],
    ids=str,
)
def test_wrong_budgets(name, budget, error):
    with pytest.raises((TypeError, ValueError), match=error):
        METHODS[name](**budget)


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, None, "0", True])
def test_wrong_seeds(seed):
    with pytest.raises((TypeError, ValueError), match="seed: expected"):
        Random(budget=1, seed=seed)


@pytest.mark.parametrize(
    ("method", "got"),
    [
        (HiPrune, "the class HiPrune, without options"),
        ("hiprune", "str"),
        (None, "NoneType"),
        ({"budget": 5}, "dict"),
        (int, "the class int, without options"),
        (hk.apply_hiprune, "function"),
    ],
)
@pytest.mark.parametrize("door", [hk.apply_method, hk.applied])
def test_what_is_no_method(encoder, door, method, got):
    error = rf"method: expected a Method, such as HiPrune\(budget=192\), got {got}"
    with pytest.raises(TypeError, match=error), door(encoder, method):
        pass
    assert not hk.is_patched(encoder)


def test_a_method_without_select(encoder):
    @dataclass(frozen=True, kw_only=True)
    class Empty(Method):
        pass

    error = "Empty: expected a method `select`, got none"
    with hk.applied(encoder, Empty(budget=3)), torch.no_grad(), pytest.raises(NotImplementedError, match=error):
        encoder(**encoder_inputs("siglip"))


# -------------------------------------------------------------------------------------------------------------- needs

TOO_MUCH = [  # of an encoder without CLS and without a language model
    (
        Needs(scores={2: "cls"}),
        r'expected scores of "all" or "mean", as SiglipVisionModel has no CLS token, got \'cls\'',
    ),
    (
        Needs(features="language"),
        "needs features of the language model, expected a model with a language model, got SiglipVisionModel",
    ),
    (Needs(text=True), "needs text, expected a model with a language model, got SiglipVisionModel alone"),
    (
        Needs(text_attention=(1, "max")),
        "needs text, expected a model with a language model, got SiglipVisionModel alone",
    ),
]
WRONG = [
    (None, "expected Needs from `needs`, got NoneType"),
    ({"scores": {1: "all"}}, "expected Needs from `needs`, got dict"),
    ((), "expected Needs from `needs`, got tuple"),
    *((Needs(scores={layer: "all"}), f"expected scores of layers 1 to 5 .*, got {layer!r}") for layer in (0, -1, 6, 1.0, True, "1", None)),
    *((Needs(scores={1: queries}), r"expected scores of one of \('all', 'cls', 'mean'\), got") for queries in ("ALL", None, 1, ["all"])),
    *((Needs(scores=scores), "expected scores to be a mapping") for scores in (None, 3, [1], "all")),
    *((Needs(features=name), r"expected features to be one of \('none', 'encoder', 'language', 'both'\), got") for name in ("Encoder", None, True, [])),
    *((Needs(region_features=layer), f"expected region_features of layers 1 to 5 .*, got {layer!r}") for layer in (0, 6, True, "1", 2.0)),
]  # fmt: skip
WRONG_TEXT = [
    *((Needs(text_attention=(layer, "max")), f"expected text_attention of decoder layers 1 to 3, got {layer!r}") for layer in (0, 4, -1, True, "1", None)),
    *((Needs(text_attention=(1, name)), r"expected text_attention reduced by one of \('max', 'mean', 'last'\), got") for name in ("sum", None, 1, ["max"])),
    *((Needs(text_attention=pair), r"expected text_attention to be \(decoder layer, reduction\), got") for pair in (1, "max", (1,), (1, "max", 2), True)),
]  # fmt: skip


@pytest.mark.parametrize(("wanted", "error"), [*TOO_MUCH, *WRONG], ids=str)
def test_wrong_needs_of_an_encoder(encoder, wanted, error):
    with pytest.raises((TypeError, ValueError), match=f"^Spy: {error}"):
        hk.apply_method(encoder, Spy(budget=3, wanted=lambda facts: wanted))
    assert not hk.is_patched(encoder)


@pytest.mark.parametrize(("wanted", "error"), WRONG_TEXT, ids=str)
def test_wrong_needs_of_text(family, wanted, error):
    before = set(family.stock.model.__dict__)
    with pytest.raises((TypeError, ValueError), match=f"^Spy: {error}"):
        hk.apply_method(family.stock, Spy(budget=3, wanted=wanted))
    assert not hk.is_patched(family.stock) and set(family.stock.model.__dict__) == before


@pytest.mark.parametrize("wanted", [Needs(), Needs(keys=True), Needs(text=True)])
def test_merging_without_features(family, wanted):
    with pytest.raises(
        ValueError, match=r'^Doubler: expected features to be "encoder" or "language", as it merges them'
    ):
        hk.apply_method(family.stock, Doubler(budget=3, wanted=wanted))
    assert not hk.is_patched(family.stock)


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_5_moe"])
def test_a_layer_of_linear_attention(name):
    case = family_case(name)
    error = r"Spy: expected text_attention of a decoder layer with softmax attention, one of \[1, 3\], got 2"
    with pytest.raises(ValueError, match=error):
        hk.apply_method(case.stock, Spy(budget=3, wanted=Needs(text_attention=(2, "max"))))
    assert not hk.is_patched(case.stock)


def test_a_prompt_longer_than_a_layer_s_window(family):
    """Text attention of a layer with a sliding window is that of whole prompts no longer."""
    case = copied(family)
    attention = case.stock.model.language_model.layers[0].self_attn
    attention.sliding_window = length = case.inputs["input_ids"].shape[1]
    method = Spy(retention=SHARE, wanted=Needs(text_attention=(1, "max")))
    with hk.applied(case.stock, method):
        case.logits(case.stock)
        attention.sliding_window = length - 1
        with pytest.raises(
            ValueError, match=f"Spy: expected a prompt of at most {length - 1} tokens, the sliding window"
        ):
            case.logits(case.stock)
        attention.sliding_window = None
        case.logits(case.stock)


def test_a_wrong_method_leaves_the_one_before(family):
    good = FasterVLM(retention=SHARE)
    with hk.applied(family.stock, good):
        before = family.logits()
        for wrong in (Spy(budget=1, wanted=Needs(scores={99: "all"})), Spy(budget=1, wanted=None), "random"):
            with pytest.raises((TypeError, ValueError)):
                hk.apply_method(family.stock, wrong)
        assert torch.equal(family.logits(), before) and family.host(family.stock)._hiprune.method is good
    assert not hk.is_patched(family.stock)


# -------------------------------------------------------------------------------------------------------------- picks


@dataclass(frozen=True, kw_only=True)
class Rogue(Spy):
    """A method whose picks, or whose promise, can be spoiled."""

    spoil: dict = field(default_factory=dict, compare=False)

    def kept(self, layout):
        return self.spoil.get("kept", lambda kept, layout: kept)(super().kept(layout), layout)

    def select(self, seen):
        return self.spoil.get("picks", lambda picks, layout: picks)(super().select(seen), seen.layout)


def with_index(place, value):
    """Picks where one of the indices is another."""

    def spoil(picks, layout):
        indices = picks.indices.clone()
        indices[place] = value(indices, layout) if callable(value) else value
        roles = torch.zeros_like(picks.roles)
        inside = indices[(indices >= 0) & (indices < len(roles))]
        roles[inside] = 1
        return picks._replace(indices=indices, roles=roles)

    return spoil


def with_role(kept, role):
    """Picks where the first kept, or the first dropped token has this role."""

    def spoil(picks, layout):
        roles = picks.roles.clone()
        roles[(roles > 0).nonzero()[0] if kept else (roles == 0).nonzero()[0]] = role
        return picks._replace(roles=roles)

    return spoil


def swapped(picks, layout):
    indices = picks.indices.clone()
    indices[:2] = indices[:2].flip(0)
    return picks._replace(indices=indices)


def moved_count(picks, layout):
    """One token more of the first image, and one less of the last."""
    counts = list(picks.counts)
    counts[0] += 1
    counts[-1] -= 1
    return picks._replace(counts=counts)


BAD_PICKS = {
    "none": (lambda p, _: None, "expected Picks, got NoneType"),
    "a tuple": (lambda p, _: tuple(p), "expected Picks, got tuple"),
    "a tensor": (lambda p, _: p.indices, "expected Picks, got Tensor"),
    "indices in a list": (lambda p, _: p._replace(indices=p.indices.tolist()), "expected indices to be a tensor, got list"),
    "roles missing": (lambda p, _: p._replace(roles=None), "expected roles to be a tensor, got NoneType"),
    "int32": (lambda p, _: p._replace(indices=p.indices.int()), r"expected indices \[n\] of torch.int64, got .* of torch.int32"),
    "floats": (lambda p, _: p._replace(indices=p.indices.double()), r"expected indices \[n\] of torch.int64, got"),
    "roles as bool": (lambda p, _: p._replace(roles=p.roles.bool()), r"expected roles \[n\] of torch.uint8, got"),
    "a batch": (lambda p, _: p._replace(indices=p.indices[None]), r"expected indices \[n\] of torch.int64, got \[1, \d+\]"),
    "another device": (lambda p, _: p._replace(indices=p.indices.to("meta")), "expected indices on cpu, got indices on meta"),
    "roles on another": (lambda p, _: p._replace(roles=p.roles.to("meta")), "expected roles on cpu, got roles on meta"),
    "too few roles": (lambda p, _: p._replace(roles=p.roles[:-1]), r"expected roles of \d+ tokens, got \d+"),
    "counts of too few tiles": (lambda p, _: p._replace(counts=list(p.counts)[:-1]), r"expected counts of \d+ tiles, got"),
    "no counts": (lambda p, _: p._replace(counts=None), r"expected counts of \d+ tiles, got None"),
    "one count": (lambda p, _: p._replace(counts=3), r"expected counts of \d+ tiles, got 3"),
    "counts as a tensor of floats": (lambda p, _: p._replace(counts=torch.tensor(p.counts).float()), r"expected counts \[\d+\] of torch.int64 on cpu, got \[\d+\] of torch.float32"),
    "counts as a tensor, too few": (lambda p, _: p._replace(counts=torch.tensor(p.counts)[:-1]), r"expected counts \[\d+\] of torch.int64 on cpu, got"),
    "counts as a tensor, wrong": (lambda p, _: p._replace(counts=torch.tensor(p.counts) + 1), r"expected \[.*\] tokens of each image, as `kept` says, got counts of"),
    "counts as floats": (lambda p, _: p._replace(counts=[float(c) for c in p.counts]), r"expected counts of \d+ tiles, got"),
    "counts below zero": (lambda p, _: p._replace(counts=[-1, *p.counts[1:]]), r"expected counts of \d+ tiles, got"),
    "counts of others": (moved_count, r"expected \[.*\] tokens of each image, as `kept` says, got counts of"),
    "too few": (lambda p, _: p._replace(indices=p.indices[:-1]), r"expected \[.*\] tokens of each image, as `kept` says, got"),
    "none at all": (lambda p, _: p._replace(indices=p.indices[:0]), r"expected \[.*\] tokens of each image, as `kept` says, got"),
    "too large": (with_index(-1, lambda i, layout: sum(layout.sizes)), r"expected indices \d+ to \d+ in tile \d+, got"),
    "of another image": (with_index(0, lambda i, layout: i[-1]), r"expected indices 0 to \d+ in tile 0, got"),
    "twice": (with_index(1, lambda i, layout: i[0]), r"expected ascending indices, each once, in tile 0, got (\d+), \1"),
    "descending": (swapped, r"expected ascending indices, each once, in tile 0, got"),
    "fill in front": (with_index(0, -1), "expected fill at the end of tile 0's indices, got -1 before others"),
    "no role of a kept one": (with_role(True, 0), "expected roles above 0 for the kept tokens alone, got 0 for a kept"),
    "a role of a dropped one": (with_role(False, 1), "expected roles above 0 for the kept tokens alone, got 1 for a dropped"),
    "a role without a name": (with_role(True, 2), "expected roles up to 1, as the method has names for, got 2"),
}  # fmt: skip
BAD_KEPT = {
    "none": (lambda k, _: None, "got None"),
    "a number": (lambda k, _: 3, "got 3"),
    "a tensor": (lambda k, _: torch.tensor(k), "got tensor"),
    "too few": (lambda k, _: k[:-1], r"got \["),
    "too many": (lambda k, _: [*k, 1], r"got \["),
    "zero": (lambda k, _: [0, *k[1:]], r"got \[0"),
    "more than there are": (lambda k, layout: [sum(layout.sizes) + 1, *k[1:]], r"got \["),
    "floats": (lambda k, _: [float(count) for count in k], r"got \["),
    "bools": (lambda k, _: [True, *k[1:]], r"got \[True"),
}
STAGES = {"feature layer": Needs(), "encoder": Needs(keys=True), "language": Needs(features="language")}


@pytest.fixture(params=STAGES)
def rogue(request, family):
    """A patched model whose method works, what it computes, and the calls of its language model's layers."""
    method, calls = Rogue(retention=SHARE, wanted=STAGES[request.param]), []
    before = family.logits()
    hk.apply_method(family.stock, method)
    handle = family.stock.model.language_model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    good = family.logits()
    assert calls == [1] and good.shape[1] < before.shape[1]
    yield method, good, calls
    handle.remove()
    hk.remove_method(family.stock)
    assert torch.equal(family.logits(), before)


def assert_refused(family, rogue, what, spoil, error):
    """An error before the language model runs, from forward and `generate`; then the method is as good as before."""
    method, good, calls = rogue
    method.spoil[what] = spoil
    calls.clear()
    for run in (family.logits, family.tokens):
        with pytest.raises((TypeError, ValueError), match=error):
            run()
    assert calls == []
    method.spoil.clear()
    assert torch.equal(family.logits(), good)


@pytest.mark.parametrize("wrong", BAD_PICKS)
def test_wrong_picks(family, rogue, wrong):
    spoil, error = BAD_PICKS[wrong]
    assert_refused(family, rogue, "picks", spoil, rf"^Rogue\.select: {error}")


@pytest.mark.parametrize("wrong", BAD_KEPT)
def test_wrong_promises(family, rogue, wrong):
    spoil, error = BAD_KEPT[wrong]
    assert_refused(family, rogue, "kept", spoil, rf"^Rogue\.kept: expected a list of \d+ ints, from 1 to .*{error}")


def test_padding_is_not_to_be_picked():
    """It never reaches the prompt: fewer tokens than promised would be left."""
    case = family_case("llava_next")
    (run,) = case.view.runs
    padding = sorted(set(range(sum(run.sizes))) - set(run.placeholders))
    tile = padding[0] // 36

    def spoil(picks, layout):
        indices, first = picks.indices.clone(), sum(picks.counts[:tile])
        own = slice(first, first + picks.counts[tile])
        indices[own] = torch.tensor(sorted({*indices[own].tolist()[1:], padding[0]}))
        roles = torch.zeros_like(picks.roles)
        roles[indices] = 1
        return picks._replace(indices=indices, roles=roles)

    for wanted in STAGES.values():
        method = Rogue(retention=SHARE, wanted=wanted, spoil={"picks": spoil})
        with hk.applied(case.stock, method):
            with pytest.raises(ValueError, match=rf"Rogue\.select: expected no padding, got token {padding[0]}"):
                case.logits()
            method.spoil.clear()
            case.logits()
        with hk.applied(case.stock, Rogue(retention=SHARE, wanted=wanted, spoil={"picks": spoil}), unpad="after"):
            case.logits()  # here a method does not know what is padding
            assert bool(torch.cat([selection.roles for selection in hk.last_selection(case.stock)])[padding[0]])


def test_fill_at_the_end_is_right(family):
    """Where a method promised more than it finds."""

    def spoil(picks, layout):
        return with_index(picks.counts[0] - 1, -1)(picks, layout)

    for wanted in STAGES.values():
        method = Rogue(retention=SHARE, wanted=wanted, spoil={"picks": spoil})
        with hk.applied(family.stock, method):
            family.logits()
            selection = hk.last_selection(family.stock)[0]
        counts = method.kept(method.log[0].layout)
        assert len(selection.indices) == counts[0] - 1 == int((selection.roles > 0).sum())


# ------------------------------------------------------------------------------------------------- who is believed


@dataclass(frozen=True, kw_only=True)
class Crooked(HiPrune):
    """HiPrune that keeps the first token twice."""

    def select(self, seen):
        picks = super().select(seen)
        indices = picks.indices.clone()
        indices[1] = indices[0]
        return Picks(indices, picks.roles, picks.counts)


@dataclass(frozen=True, kw_only=True)
class Shallow(HiPrune):
    """HiPrune with another layer."""

    def needs(self, encoder):
        return super().needs(encoder)._replace(scores={1: "all", encoder.feature_layer: "all"})


@dataclass(frozen=True, kw_only=True)
class Straight(HiPrune):
    """HiPrune whose own `select` is vouched for."""

    guaranteed = True

    def select(self, seen):
        return super().select(seen)


def test_a_subclass_that_selects_otherwise_is_checked(family):
    error = r"Crooked\.select: expected ascending indices, each once"
    with hk.applied(family.stock, Crooked(retention=SHARE)), pytest.raises(ValueError, match=error):
        family.logits()
    with hk.applied(family.stock, HiPrune(retention=SHARE)):
        family.logits()


@pytest.mark.parametrize(
    ("method", "checked"),
    [
        (HiPrune, False),
        (FasterVLM, False),
        (DivPrune, False),
        (Random, False),
        (UniformGrid, False),
        (Spy, True),
        (Crooked, True),
        (Shallow, False),
        (Straight, False),
    ],
)
def test_whose_picks_are_looked_at(monkeypatch, method, checked):
    """Looking at them waits for the device, so the package's own are believed."""
    case, looked = family_case("llava"), []
    look = base._checked_values

    def listening(name, *args):
        looked.append(name)
        return look(name, *args)

    monkeypatch.setattr(base, "_checked_values", listening)
    with hk.applied(case.stock, method(retention=SHARE)):
        try:
            case.logits()
        except ValueError as error:
            assert re.match("Crooked", str(error))
    assert looked == [f"{method.__name__}.select"] * checked


def test_budgets_that_leave_a_tile_without_a_token():
    case = family_case("llava_next")
    before, error = case.logits(), "budget: expected at least 5, one token for each tile of the image"
    for method in (FasterVLM(budget=4), HiPrune(budget=4), Random(budget=4), UniformGrid(budget=4), Spy(budget=4)):
        with hk.applied(case.stock, method), pytest.raises(ValueError, match=error):
            case.logits()
    with hk.applied(case.stock, DivPrune(budget=4)):
        assert case.logits().shape[1] < before.shape[1]
        assert [len(selection.indices) for selection in hk.last_selection(case.stock)] == [4, 4, 4]
    assert torch.equal(case.logits(), before)
