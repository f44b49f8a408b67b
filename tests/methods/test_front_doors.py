"""Ways to a patched model, in and out: HiPrune's own and the general ones, copies, and what importing them loads."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import importlib
import inspect
import pickle
import subprocess
import sys

import pytest
import torch
from family_cases import SHARE, copied, family_case, kept_tokens
from method_cases import METHOD_CASES
from spies import Doubler, Spy

import hiprune_kernels as hk
from hiprune_kernels import facts, methods
from hiprune_kernels.methods import (
    DivPrune,
    FasterVLM,
    HiPrune,
    Method,
    Needs,
    Random,
    Selection,
    UniformGrid,
    options_of,
)
from hiprune_kernels.patch import FAMILIES
from hiprune_kernels.patch.encoders import ENCODERS


def keywords(function):
    """Names and defaults of a function's keyword arguments."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


def test_hiprune_s_front_doors_have_its_options():
    """In the same order, with the same defaults; `hiprune` hands its own on."""
    options = keywords(hk.apply_hiprune)
    assert options.pop("unpad") is None
    assert list(options.items()) == list(options_of(HiPrune).items()) == list(keywords(HiPrune.__init__).items())
    assert keywords(hk.hiprune) == {"unpad": None}
    assert keywords(hk.apply_method) == keywords(hk.applied) == {"unpad": None}
    annotations = {field.name: field.type for field in dataclasses.fields(HiPrune)}
    parameters = inspect.signature(hk.apply_hiprune).parameters
    assert {name: parameters[name].annotation for name in options} == annotations


OPTIONS = [
    {"retention": SHARE},
    {"budget": 9, "alpha": 0.4, "object_layer": 1, "rule": "grid", "neighborhood": "square"},
    {"retention": SHARE, "rule": "official", "keep_roles": ("anchor", "register"), "score_queries": "all"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_hiprune_s_front_doors_do_the_same(family, options):
    """Bit for bit."""
    model = family.stock
    if family.name == "llava_next" and "budget" in options:
        options = {**options, "budget": 45}
    doors = [
        lambda: hk.applied(model, HiPrune(**options)),
        lambda: hk.hiprune(model, **options),
        lambda: _Applied(model, options),
    ]
    found = []
    for door in doors:
        with door():
            found.append((family.logits(), family.tokens(), hk.last_selection(model)))
        assert not hk.is_patched(model)
    logits, tokens, selections = found[0]
    for other_logits, other_tokens, others in found[1:]:
        assert torch.equal(other_logits, logits) and other_tokens == tokens
        for one, other in zip(selections, others, strict=True):
            assert torch.equal(one.indices, other.indices) and torch.equal(one.roles, other.roles)
            assert one.role_names == other.role_names == ("anchor", "buffer", "register")


class _Applied:
    """`apply_hiprune` and `remove_hiprune` for a `with` block."""

    def __init__(self, model, options):
        self.model, self.options = model, options

    def __enter__(self):
        assert hk.apply_hiprune(self.model, **self.options) is self.model

    def __exit__(self, *_):
        assert hk.remove_hiprune(self.model) is self.model


@pytest.mark.parametrize("unpad", [None, "before", "after"])
def test_unpad_is_handed_on(family, unpad):
    """By every door; models that cut no tiles take none."""
    tiled = family.name in ("llava_next", "llava_onevision")
    doors = [
        lambda: hk.applied(family.stock, HiPrune(retention=SHARE), unpad=unpad),
        lambda: hk.hiprune(family.stock, retention=SHARE, unpad=unpad),
        lambda: _Applied(family.stock, {"retention": SHARE, "unpad": unpad}),
    ]
    lengths = []
    for door in doors:
        if unpad is not None and not tiled:
            with pytest.raises(ValueError, match=r"unpad: expected None for a \w+, got"), door():
                pass
            assert not hk.is_patched(family.stock)
            continue
        with door():
            lengths.append(family.logits().shape[1])
            assert family.host(family.stock)._hiprune.unpad == unpad
    assert len(set(lengths)) <= 1 and (lengths or unpad is not None)


AFTERWARDS = [Needs(), Needs(features="encoder"), Needs(features="language"), Needs(text_attention=(1, "max"))]


@pytest.mark.parametrize("wanted", AFTERWARDS, ids=["nothing", "encoder", "language", "text attention"])
def test_padding_that_is_taken_out_afterwards(wanted):
    """With `unpad="after"` tokens of padding are picked like others, and the model drops them."""
    family = family_case("llava_next")
    method, model = Spy(retention=SHARE, wanted=wanted), family.stock
    with hk.applied(model, method, unpad="after"):
        family.logits()
        kept = kept_tokens(model, family.view)
        rows = family.rows(kept)
        family.assert_prefill(model, rows)
        family.assert_generates(model, rows)
    (run,) = family.view.runs
    padding = torch.ones(sum(run.sizes), dtype=torch.bool)
    padding[[token for token in run.placeholders if token >= 0]] = False
    assert bool((kept[0] & padding).any())
    assert all(seen.layout.candidates is None for seen in method.log)
    if wanted.features == "language":
        assert torch.equal(method.log[0].features.abs().sum(dim=1) == 0, padding)
    if wanted.text_attention:
        assert torch.equal(method.log[0].text_scores == 0, padding)


# --------------------------------------------------------------------------------------------- one method after another

ALL = [case.make(retention=SHARE) for case in METHOD_CASES.values()]
ALL += [Doubler(retention=SHARE, wanted=lambda encoder: Needs(features="language"))]


def test_one_method_after_another(family):
    """Each replaces the one before; the last one that is taken off leaves the stock model."""
    model, stock = family.stock, family.logits()
    alone = []
    for method in ALL:
        with hk.applied(model, method):
            alone.append(family.logits())
    for method, expected in zip(ALL, alone):
        hk.apply_method(model, method)
        assert torch.equal(family.logits(), expected)
        assert family.host(model)._hiprune.method is method
    hk.remove_method(model)
    assert torch.equal(family.logits(), stock)
    assert not any("hiprune" in key for module in model.modules() for key in module.__dict__)


def test_applied_restores_the_method_before(family):
    """With its `unpad`; in blocks within blocks; and where a block raises."""
    model, stock = family.stock, family.logits()
    unpad = "after" if family.name in ("llava_next", "llava_onevision") else None
    hk.apply_method(model, FasterVLM(retention=0.5), unpad=unpad)
    before = family.logits()
    with hk.applied(model, DivPrune(retention=SHARE)):
        inner = family.logits()
        with pytest.raises(KeyError), hk.applied(model, Random(retention=0.2)):
            assert family.logits().shape[1] < inner.shape[1]
            raise KeyError
        assert torch.equal(family.logits(), inner)
        with hk.hiprune(model, retention=0.9):
            assert family.logits().shape[1] > inner.shape[1]
        assert torch.equal(family.logits(), inner)
    patch = family.host(model)._hiprune
    assert torch.equal(family.logits(), before) and patch.method == FasterVLM(retention=0.5) and patch.unpad == unpad
    with hk.applied(model, UniformGrid(retention=SHARE)):
        hk.remove_method(model)
    assert torch.equal(family.logits(), before)
    hk.remove_method(model)
    with hk.applied(model, UniformGrid(retention=SHARE)):
        hk.remove_method(model)
    assert not hk.is_patched(model) and torch.equal(family.logits(), stock)


@pytest.mark.parametrize("method", [ALL[0], ALL[2], ALL[-1]], ids=lambda method: type(method).__name__)
def test_deep_copies(family, method):
    """A copy of a patched model is patched by itself."""
    stock = family.logits()
    case = copied(family)
    hk.apply_method(case.stock, method)
    expected = case.logits()
    twin = copy.deepcopy(case.stock)
    assert hk.is_patched(twin) and family.host(twin)._hiprune is not case.host(case.stock)._hiprune
    hk.remove_method(case.stock)
    assert torch.equal(family.logits(twin), expected) and torch.equal(case.logits(), stock)
    assert len(hk.last_selection(twin)) == sum(len(run.tiles) for run in family.view.runs)
    third = copy.deepcopy(twin)
    hk.remove_method(twin)
    assert torch.equal(family.logits(twin), stock) and torch.equal(family.logits(third), expected)


def test_selections_are_values():
    """They unpack, copy and pickle."""
    selection = Selection(torch.tensor([1, 2]), torch.tensor([0, 1, 1], dtype=torch.uint8), (1, 3), ("kept",))
    for twin in (copy.copy(selection), copy.deepcopy(selection), pickle.loads(pickle.dumps(selection))):
        indices, roles, grid = twin
        assert torch.equal(indices, selection.indices) and torch.equal(roles, selection.roles) and grid == (1, 3)
        assert twin.role_names == ("kept",)


def test_what_is_told_of_a_model_that_is_not_patched(family):
    for function in (hk.remove_method, hk.remove_hiprune, hk.last_selection):
        with pytest.raises(ValueError, match="model: expected a patched model"):
            function(family.stock)
    with hk.applied(family.stock, DivPrune(retention=SHARE)):
        assert hk.last_selection(family.stock) == []


# -------------------------------------------------------------------------------------------------- the package itself


def loaded(code, *names):
    code = f"import sys; {code}; print([name for name in {names} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


HEAVY = ("transformers", "PIL", "matplotlib", "rich", "skimage")


def test_methods_load_nothing_heavy():
    code = "from hiprune_kernels.methods import HiPrune, DivPrune; HiPrune(budget=3), DivPrune(budget=3)"
    assert loaded(code, *HEAVY) == "[]"


def test_facts_load_nothing():
    """Not even torch, nor the package around them: the file is read by itself."""
    code = (
        "import importlib.util as u; "
        f"spec = u.spec_from_file_location('facts', {facts.__file__!r}); module = u.module_from_spec(spec); "
        "sys.modules['facts'] = module; spec.loader.exec_module(module); assert len(module.MODELS) > 20"
    )
    assert loaded(code, "torch", "numpy", "hiprune_kernels", *HEAVY) == "[]"


def test_facts_cover_what_can_be_patched():
    """Every family has its entry, and is the one that the patch works with."""
    assert set(facts.MODELS) == set(FAMILIES) and set(facts.ENCODERS) == set(ENCODERS)
    assert all(FAMILIES[name].kind is facts.MODELS[name] for name in FAMILIES)
    assert all(ENCODERS[name].kind is facts.ENCODERS[name] for name in ENCODERS)


def test_public_names():
    names = {cls.__name__ for cls in methods.METHODS.values()} | {"Method", "Needs", "Picks", "Seen", "TokenLayout"}
    assert names | {"apply_method", "applied", "remove_method", "methods"} <= set(hk.__all__)
    assert all(getattr(hk, name) is getattr(methods, name) for name in names)
    assert hk.remove_hiprune is hk.remove_method
    assert all(issubclass(cls, Method) and cls.__doc__ for cls in methods.METHODS.values())
    assert all(getattr(methods, name).__doc__ for name in methods.__all__ if name != "METHODS")


@pytest.mark.parametrize("name", ["base", "baselines", "divprune", "fastervlm", "hiprune"])
def test_docstring_examples(name):
    module = importlib.import_module(f"hiprune_kernels.methods.{name}")
    results = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0 and results.failed == 0
