"""Every method on every family: what is kept, what the language model computes of it, and the stock bits afterwards."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from family_cases import SHARE, assert_close, expected_of, kept_tokens
from method_cases import METHOD_CASES
from models import ENCODER_CASES, encoder_inputs, tiny_encoder

import hiprune_kernels as hk
from hiprune_kernels.methods import DivPrune, Random, UniformGrid
from hiprune_kernels.patch import FAMILIES
from hiprune_kernels.patch.models import bare


@pytest.fixture(params=METHOD_CASES)
def case(request):
    return METHOD_CASES[request.param]


def test_every_method_on_every_family(family, case):
    """The kept set is the definition's; logits and greedy tokens are stock code's on the embeddings that are left."""
    method, model = case.make(retention=SHARE), family.stock
    before = family.logits()
    expected = [image for run in expected_of(case, method, family.view) for image in run]
    hk.apply_method(model, method)
    try:
        family.logits(model)
        selections, kept = hk.last_selection(model), kept_tokens(model, family.view)
        assert len(selections) == len(expected)
        for selection, (indices, roles) in zip(selections, expected):
            assert torch.equal(selection.indices, indices) and torch.equal(selection.roles, roles)
            assert selection.role_names == method.roles
            assert len(roles) == torch.tensor(selection.grid).prod()
        pruned = family.logits(model)
        generated = family.tokens(model)
        again = family.logits(model)
    finally:
        hk.remove_method(model)
    assert torch.equal(pruned, again) and pruned.shape[1] < before.shape[1]
    assert torch.equal(family.logits(), before)
    rows = family.rows(kept)
    with hk.applied(model, method):
        family.assert_prefill(model, rows)
        family.assert_generates(model, rows)
        assert family.tokens(model) == generated
    assert torch.equal(family.logits(), before)


def recorded_scores(family):
    """What `record_scores` gives of the feature layer of the stock model, brought from patches to tokens: of each run."""
    layer, model, found = family.view.feature_layer, family.stock, []
    with ExitStack() as stack:
        encoders = FAMILIES[family.name].encoders(family.host(model))
        recordings = [stack.enter_context(hk.record_scores(encoder, layers=[layer])) for encoder in encoders]
        family.logits(model)
    recorded = [scores for recording in recordings for scores in recording[layer]]
    for run, scores in zip(family.view.runs, recorded, strict=True):
        scores = (scores if run.packed else scores[:, recordings[0].num_prefix_tokens :].flatten()).double()
        if run.pool is not None:
            found.append(run.pool(scores.view(len(run.grids), -1, 1)).flatten())
            continue
        side = 2 if run.packed or family.name == "internvl" else 1  # patches to a side of a token
        frames = [grid[-2:] for grid in run.grids for _ in range(grid[0] if len(grid) == 3 else 1)]
        parts = scores.split([side * side * height * width for height, width in frames])
        squares = (part.view(h, side, w, side).mean(dim=(1, 3)) for part, (h, w) in zip(parts, frames))
        found.append(torch.cat([square.flatten() for square in squares]))
    return found


def test_scores_are_those_that_recording_gives(family):
    for run, scores in zip(family.view.runs, recorded_scores(family), strict=True):
        assert_close(scores, run.scores(family.view.feature_layer, "all"))


def test_neighbours_in_the_batch_change_nothing(family, case):
    """The same prompts twice: the same tokens twice."""
    method, model = case.make(retention=SHARE), family.stock
    doubled = {name: torch.cat([value, value]) for name, value in family.inputs.items()}
    with hk.applied(model, method):
        once = family.logits(model)
        single = iter(hk.last_selection(model))
        with torch.no_grad():
            twice = model(**doubled).logits
        double = iter(hk.last_selection(model))
    for run in family.view.runs:
        expected = [next(single) for _ in run.tiles]
        for one, other in zip(expected * 2, [next(double) for _ in run.tiles * 2], strict=True):
            assert torch.equal(one.indices, other.indices) and torch.equal(one.roles, other.roles)
    assert next(single, None) is None and next(double, None) is None
    assert_close(twice.flatten(0, 1), torch.cat([once, once]).flatten(0, 1))


def test_half_precision(family, case):
    """As many tokens as in float32, of the same images; which ones may differ where scores are within rounding."""
    dtype = torch.bfloat16
    model, method = copy.deepcopy(family.stock).to(dtype), case.make(retention=SHARE)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in family.inputs.items()}
    with hk.applied(model, method), torch.no_grad():
        logits = model(**inputs).logits
        found = hk.last_selection(model)
    with hk.applied(family.stock, method):
        expected = family.logits()
        selections = hk.last_selection(family.stock)
    assert logits.dtype == dtype and logits.shape == expected.shape and bool(logits.isfinite().all())
    assert [len(s.indices) for s in found] == [len(s.indices) for s in selections]
    if case.cls in (Random, UniformGrid):
        assert all(torch.equal(one.indices, other.indices) for one, other in zip(found, selections))


# --------------------------------------------------------------------------------------------------- encoders alone

BARE = {
    "clip_vision_model": "clip b",
    "siglip_vision_model": "siglip",
    "vit": "vit",
    "deit": "deit",
    "dinov2": "dinov2",
}
BARE |= {"dinov2_with_registers": "dinov2 registers", "vjepa2": "v-jepa 2"}


@pytest.fixture(scope="module", params=BARE)
def encoder(request):
    name = BARE[request.param]
    model, inputs = tiny_encoder(name), encoder_inputs(name)
    with torch.no_grad():
        return ENCODER_CASES[name], model, inputs, model(**inputs).last_hidden_state


def test_every_encoder_is_here():
    assert set(BARE) == set(bare.FAMILIES)


def test_methods_on_encoders_alone(encoder, case):
    """Prefix rows and the kept rows of the stock output; what needs a language model is refused by name."""
    about, model, inputs, stock = encoder
    method = case.make(budget=7)
    if case.cls is DivPrune:
        with pytest.raises(
            ValueError, match=r"DivPrune: needs features of the language model, expected a model with a"
        ):
            hk.apply_method(model, method)
        assert not hk.is_patched(model)
        return
    with hk.applied(model, method), torch.no_grad():
        states = model(**inputs).last_hidden_state
        selections = hk.last_selection(model)
    indices = torch.stack([selection.indices for selection in selections])
    assert indices.shape == (len(stock), 7)
    rows = torch.cat([torch.arange(about.prefix).expand(len(stock), -1), about.prefix + indices], dim=1)
    expected = stock.gather(1, rows[..., None].expand(-1, -1, stock.shape[-1]))
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-4 * float(stock.abs().max()))
    if case.cls in (Random, UniformGrid):
        assert torch.equal(indices[0], indices[1])
    else:
        assert not torch.equal(indices[0], indices[1])
    with torch.no_grad():
        assert torch.equal(model(**inputs).last_hidden_state, stock)
