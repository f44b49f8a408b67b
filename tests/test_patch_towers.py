"""Patched vision encoders of every family: which tokens they keep, that those are the stock ones, and what they refuse."""

from __future__ import annotations

import copy

import pytest
import torch
from encoder_models import CASES, as_dtype, eager_columns, encoder_inputs, tiny_encoder
from patch_reference import one_thread  # noqa: F401
from transformers import (
    DeiTForImageClassification,
    DeiTForMaskedImageModeling,
    Dinov2Backbone,
    Dinov2ForImageClassification,
    Dinov2WithRegistersBackbone,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    VJEPA2ForVideoClassification,
)

from hiprune_kernels import reference
from hiprune_kernels.patch import FAMILIES, apply_hiprune, hiprune, is_patched, last_selection, remove_hiprune
from hiprune_kernels.patch.encoders import find_encoder

BARE = [name for name in CASES if name.partition(" ")[0] not in ("internvl", "siglip") or name == "siglip"]
CLOSE = {"rtol": 0, "atol": 1e-4}  # states are of order 1; another token's differ by more than 0.1
OPTIONS = {"budget": 11, "alpha": 0.7}  # 2 anchors, their neighbours, and registers


def run(model, inputs, **changes):
    with torch.no_grad():
        return model(**{**inputs, **changes})


@pytest.fixture(scope="module", params=BARE)
def case(request):
    name = request.param
    return CASES[name], tiny_encoder(name), encoder_inputs(name)


def expected_selection(case, stock, inputs, **options):
    """Indices [B, K] and roles by the reference implementation on float64 eager scores."""
    scores = eager_columns(stock, inputs)
    object_scores, deep_scores = (scores[layer - 1] for layer in case.layers)
    options = {"grid": case.grid, "num_prefix_tokens": case.prefix, **OPTIONS, **options}
    return reference.select_tokens(object_scores, deep_scores, **options)


def kept_rows(states, indices, prefix):
    rows = torch.cat([torch.arange(prefix).expand(len(indices), -1), indices + prefix], dim=1)
    return states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1]))


@pytest.mark.parametrize(
    "options", [{}, {"rule": "grid"}, {"neighborhood": "square", "alpha": 0.9}, {"budget": 1}, {"budget": 35}], ids=str
)
def test_kept_tokens(case, options):
    case, stock, inputs = case
    model = apply_hiprune(copy.deepcopy(stock), **{**OPTIONS, **options})
    pruned = run(model, inputs, output_hidden_states=True)
    dense = run(stock, inputs, output_hidden_states=True)
    indices, roles = expected_selection(case, stock, inputs, **options)
    assert torch.equal(torch.stack([s.indices for s in last_selection(model)]), indices)
    assert torch.equal(torch.stack([s.roles for s in last_selection(model)]), roles)
    assert {s.grid for s in last_selection(model)} == {case.grid}
    expected = kept_rows(dense.last_hidden_state, indices, case.prefix)
    torch.testing.assert_close(pruned.last_hidden_state, expected, **CLOSE)
    wrong = kept_rows(dense.last_hidden_state, (indices + 1) % roles.shape[1], case.prefix)
    assert (pruned.last_hidden_state - wrong).abs().max() > 0.1
    for ours, theirs in zip(pruned.hidden_states[:-1], dense.hidden_states[:-1]):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    torch.testing.assert_close(
        pruned.hidden_states[-1], kept_rows(dense.hidden_states[-1], indices, case.prefix), **CLOSE
    )
    if getattr(dense, "pooler_output", None) is not None:
        torch.testing.assert_close(pruned.pooler_output, dense.pooler_output, **CLOSE)


def test_only_kept_rows_reach_the_last_mlp(case):
    case, stock, inputs = case
    model, seen = apply_hiprune(copy.deepcopy(stock), **OPTIONS), []
    for layer in find_encoder(model)[2]:
        layer.mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    run(model, inputs)
    tokens = case.prefix + torch.tensor(case.grid).prod().item()
    assert seen == [tokens] * (case.depth - 1) + [case.prefix + 11]


@pytest.mark.parametrize("place", ["first", "last"])
def test_object_layer(case, place):
    """Any layer up to the last one, which then gives both scores."""
    case, stock, inputs = case
    layer = 1 if place == "first" else case.depth
    model = apply_hiprune(copy.deepcopy(stock), **OPTIONS, object_layer=layer)
    run(model, inputs)
    scores = eager_columns(stock, inputs)
    options = {"grid": case.grid, "num_prefix_tokens": case.prefix, **OPTIONS}
    indices, _ = reference.select_tokens(scores[layer - 1], scores[-1], **options)
    assert torch.equal(torch.stack([s.indices for s in last_selection(model)]), indices)


def test_score_queries(case):
    """The CLS row's attention counts alone, where there is one."""
    case, stock, inputs = case
    if case.prefix == 0:
        with pytest.raises(ValueError, match=r'score_queries: expected "all", as .* has no CLS token'):
            apply_hiprune(stock, **OPTIONS, score_queries="cls")
        assert not is_patched(stock)
        return
    one = apply_hiprune(copy.deepcopy(stock), **OPTIONS, score_queries="cls")
    every = apply_hiprune(copy.deepcopy(stock), **OPTIONS)
    run(one, inputs)
    run(every, inputs)
    assert not torch.equal(last_selection(one)[0].indices, last_selection(every)[0].indices)


def test_off_again(case):
    case, stock, inputs = case
    model = copy.deepcopy(stock)
    run(model, inputs, output_hidden_states=True)  # installs transformers' own hooks
    before = {name: set(module.__dict__) for name, module in model.named_modules()}
    plain = run(stock, inputs)
    for options in ({"retention": 1.0}, {"budget": 100}):
        with hiprune(model, **options):
            assert torch.equal(run(model, inputs).last_hidden_state, plain.last_hidden_state)
            assert all(bool((selection.roles == 3).all()) for selection in last_selection(model))
    apply_hiprune(model, **OPTIONS)
    assert run(model, inputs).last_hidden_state.shape[1] == case.prefix + 11
    remove_hiprune(model)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == before
    assert torch.equal(run(model, inputs).last_hidden_state, plain.last_hidden_state)


def test_half_precision(case):
    case, stock, inputs = case
    model = apply_hiprune(copy.deepcopy(stock).bfloat16(), **OPTIONS)
    states = run(model, as_dtype(inputs, torch.bfloat16)).last_hidden_state
    dense = kept_rows(
        run(stock, inputs).last_hidden_state, torch.stack([s.indices for s in last_selection(model)]), case.prefix
    )
    assert states.dtype == torch.bfloat16
    assert float((states - dense).norm() / dense.norm()) < 0.1


# ------------------------------------------------------------------------------------------------------------- clips


@pytest.mark.parametrize("frames,grid", [(8, (4, 4, 4)), (7, (3, 4, 4)), (3, (4, 4)), (1, (4, 4))])
def test_clips_of_any_length(frames, grid):
    """The last odd frame is left out by stock code, and a single one is repeated; one tubelet is an image."""
    stock = tiny_encoder("v-jepa 2")
    pixels = torch.randn(2, frames, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    inputs = {"pixel_values_videos": pixels, "skip_predictor": True}
    model = apply_hiprune(copy.deepcopy(stock), **OPTIONS)
    pruned, dense = run(model, inputs).last_hidden_state, run(stock, inputs).last_hidden_state
    assert dense.shape[1] == torch.tensor(grid).prod()
    scores = eager_columns(stock, inputs)
    indices, _ = reference.select_tokens(scores[1], scores[4], grid=grid, **OPTIONS)
    assert {selection.grid for selection in last_selection(model)} == {grid}
    assert torch.equal(torch.stack([s.indices for s in last_selection(model)]), indices)
    torch.testing.assert_close(pruned, kept_rows(dense, indices, 0), **CLOSE)
    torch.testing.assert_close(model.get_vision_features(pixels), pruned, rtol=0, atol=0)


def test_tubelets_of_more_frames():
    """A clip shorter than a tubelet is repeated as often as the tubelet has frames."""
    stock = tiny_encoder("v-jepa 2", tubelet_size=4)
    inputs = {"pixel_values_videos": torch.randn(1, 3, 3, 32, 32), "skip_predictor": True}
    model = apply_hiprune(copy.deepcopy(stock), budget=9)
    assert run(stock, inputs).last_hidden_state.shape[1] == 48
    assert run(model, inputs).last_hidden_state.shape[1] == 9
    assert last_selection(model)[0].grid == (3, 4, 4)


def test_predictor_is_refused():
    model = tiny_encoder("v-jepa 2")
    inputs = encoder_inputs("v-jepa 2")
    mask = [torch.arange(5)[None].expand(2, -1)]
    apply_hiprune(model, **OPTIONS)
    for changes, message in [
        ({"skip_predictor": False}, "skip_predictor: expected True"),
        ({"context_mask": mask, "target_mask": mask}, "context_mask: expected None"),
        ({"target_mask": mask}, "target_mask: expected None"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(model, inputs, **changes)
    apply_hiprune(model, retention=1.0)
    assert run(model, inputs, skip_predictor=False).predictor_output is not None


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "name,cls,expected",
    [
        ("vit", ViTForMaskedImageModeling, "ViTModel"),
        ("vit", ViTForImageClassification, "ViTModel"),
        ("deit", DeiTForMaskedImageModeling, "DeiTModel"),
        ("deit", DeiTForImageClassification, "DeiTModel"),
        ("dinov2", Dinov2Backbone, "Dinov2Model"),
        ("dinov2", Dinov2ForImageClassification, "Dinov2Model"),
        ("dinov2 registers", Dinov2WithRegistersBackbone, "Dinov2WithRegistersModel"),
        ("v-jepa 2", VJEPA2ForVideoClassification, "VJEPA2Model"),
    ],
)
def test_classes_that_need_dropped_tokens(name, cls, expected):
    model = cls(tiny_encoder(name).config)
    with pytest.raises(ValueError, match=f"model: expected a {expected}, .* got {cls.__name__}"):
        apply_hiprune(model, budget=5)
    assert not is_patched(model)


def test_a_class_of_ones_own_is_fine():
    class Mine(CASES["vit"].model):
        pass

    model = Mine(tiny_encoder("vit").config).eval()
    assert run(apply_hiprune(model, budget=5), encoder_inputs("vit")).last_hidden_state.shape == (2, 6, 64)


def test_siglip_head():
    """Its pooling attends to all tokens."""
    with pytest.raises(ValueError, match=r"pooling head .* load it with vision_use_head=False"):
        apply_hiprune(tiny_encoder("siglip", vision_use_head=True), budget=5)


def test_recording_only():
    with pytest.raises(ValueError, match=r"got Siglip2VisionModel of type 'siglip2_vision_model' \(recording only: "):
        apply_hiprune(tiny_encoder("siglip 2"), budget=5)
    with pytest.raises(ValueError, match=r"got InternVLVisionModel of type 'internvl_vision' \(pruned as a part of"):
        apply_hiprune(tiny_encoder("internvl"), budget=5)
    assert not {"siglip2_vision_model", "internvl_vision"} & set(FAMILIES)


@pytest.mark.parametrize("name", ["siglip", "vit", "deit"])
def test_masks_are_refused(name):
    model, inputs = apply_hiprune(tiny_encoder(name), budget=5), encoder_inputs(name)
    with pytest.raises(ValueError, match="attention_mask: expected None"):
        run(model, inputs, attention_mask=torch.ones(2, 36 + CASES[name].prefix))
