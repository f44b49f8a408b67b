"""Patched models on a GPU keep the tokens, and give the answers, that they do on a CPU."""

import copy

import pytest
import torch
from models import IMAGE_TOKEN, VIDEO_TOKEN, VLM_CASES, clip_l_336

from hiprune_kernels.patch import apply_hiprune, last_selection, record_scores

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
GREEDY = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]}


def on_device(inputs, dtype=None):
    return {
        name: value.to(DEVICE, dtype if value.is_floating_point() else None) if dtype else value.to(DEVICE)
        for name, value in inputs.items()
    }


@torch.no_grad()
def run(model, inputs):
    return model(**inputs).logits.float().cpu(), last_selection(model)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """By default cuDNN rounds the patch embedding's float32 to TF32, and other tokens may be kept than on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=VLM_CASES)
def case(request):
    model, inputs = VLM_CASES[request.param]()
    return apply_hiprune(model, retention=0.3), inputs


def test_as_on_a_cpu(case):
    """Float32: scores of these models differ by far more than its rounding."""
    model, inputs = case
    logits, selections = run(model, inputs)
    tokens = model.generate(**inputs, **GREEDY)
    model.to(DEVICE)
    found, found_selections = run(model, on_device(inputs))
    for selection, expected in zip(found_selections, selections, strict=True):
        assert selection.grid == expected.grid
        assert torch.equal(selection.indices.cpu(), expected.indices)
        assert torch.equal(selection.roles.cpu(), expected.roles)
    torch.testing.assert_close(found, logits, rtol=0, atol=2e-3)  # logits are of order 10
    assert torch.equal(model.generate(**on_device(inputs), **GREEDY).cpu(), tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(case, dtype):
    model, inputs = case
    logits, selections = run(model, inputs)
    found, found_selections = run(model.to(DEVICE, dtype), on_device(inputs, dtype))
    assert found.shape == logits.shape and bool(found.isfinite().all())
    assert [len(s.indices) for s in found_selections] == [len(s.indices) for s in selections]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_encoder_of_real_size(dtype):
    """CLIP-L/14-336: kept features are the dense ones, and tokens are kept by the recorded scores."""
    stock = clip_l_336(dtype=dtype).to(DEVICE)
    pixels = torch.randn(2, 3, 336, 336, device=DEVICE, dtype=dtype)
    model = apply_hiprune(copy.deepcopy(stock), budget=192)
    with torch.no_grad():
        with record_scores(stock, layers=[24]) as scores:
            dense = stock(pixels).last_hidden_state
        kept = model(pixels).last_hidden_state
    assert kept.shape == (2, 193, 1024)
    assert scores[24][0].sum().item() == pytest.approx(2 * 577, rel=1e-3)
    for i, selection in enumerate(last_selection(model)):
        rows = torch.cat([torch.zeros(1, dtype=torch.int64, device=DEVICE), selection.indices + 1])
        error = (kept[i] - dense[i][rows]).float().norm() / dense[i][rows].float().norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 1e-4)
        registers = scores[24][0][i, 1:][selection.roles == 3]
        dropped = scores[24][0][i, 1:][selection.roles == 0]
        assert registers.min() >= dropped.max() * (1 - 1e-2)  # the recorded scores are of a layer's own rounding
