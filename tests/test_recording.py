"""Recorded column scores of every supported encoder: those of eager attention, with the outputs left alone."""

from __future__ import annotations

import threading

import pytest
import torch
from encoder_models import CASES, as_dtype, eager_columns, encoder_inputs, tiny_encoder
from models import qwen_batch, tiny_clip, tiny_qwen
from patch_reference import one_thread  # noqa: F401
from qwen_reference import eager_row_scores, raster_order
from transformers import AttentionInterface, VJEPA2ForVideoClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hiprune_kernels.patch import record_scores

QWEN = ("qwen2", "qwen2.5", "qwen3", "qwen3 moe")
CLOSE = {"rtol": 2e-5, "atol": 2e-5}  # neighbouring scores differ by more than 0.5


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs).last_hidden_state


# ------------------------------------------------------------------------------------------------- batches [B, N, C]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", CASES)
def test_scores_are_those_of_eager_attention(name, implementation):
    model, inputs, case = tiny_encoder(name, implementation), encoder_inputs(name), CASES[name]
    plain = run(model, inputs)
    with record_scores(model) as scores:
        assert torch.equal(run(model, inputs), plain)
        run(model, encoder_inputs(name, count=1, seed=1))
    expected = eager_columns(model, inputs)
    assert list(scores) == list(range(1, case.depth + 1)) and len(expected) == case.depth
    assert scores.num_prefix_tokens == case.prefix
    for (first, second), exact in zip(scores.values(), expected):
        assert (first.dtype, first.shape, second.shape) == (torch.float32, exact.shape, exact[:1].shape)
        assert (exact - exact.roll(1, dims=1)).abs().max() > 1
        torch.testing.assert_close(first.double(), exact, **CLOSE)
    with record_scores(model, layers=[case.depth]) as last:
        run(model, inputs)
    assert list(last) == [case.depth] and torch.equal(last[case.depth][0], scores[case.depth][0])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_has_no_part_in_scores(implementation):
    """Columns of padding are exactly 0, and each real query hands out a weight of 1."""
    model, inputs = tiny_encoder("siglip 2", implementation), encoder_inputs("siglip 2", count=3)
    with record_scores(model) as scores:
        run(model, inputs)
    mask = inputs["pixel_attention_mask"].bool()
    assert mask.sum(dim=1).tolist() == [35, 16, 40]
    for [score] in scores.values():
        assert bool((score[~mask] == 0).all()) and bool((score[mask] > 0).all())
        torch.testing.assert_close(score.sum(dim=1), mask.sum(dim=1).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name != "siglip 2"])
def test_half_precision_adds_no_rounding_of_its_own(name, dtype):
    """For the queries and keys that the encoder has in its dtype, scores are the exact ones within float32 rounding."""
    expected = []

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        logits = query.double() @ key.double().transpose(2, 3) * scaling
        expected.append(logits.softmax(dim=-1).mean(dim=1).sum(dim=1))
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)

    AttentionInterface.register("test_columns", attention)
    model, inputs = tiny_encoder(name, "test_columns").to(dtype), as_dtype(encoder_inputs(name), dtype)
    with record_scores(model) as scores:
        run(model, inputs)
    assert len(expected) == len(scores)
    for [score], exact in zip(scores.values(), expected):
        assert score.dtype == torch.float32
        torch.testing.assert_close(score.double(), exact, rtol=2e-6, atol=0)
    exact = eager_columns(model, inputs)[-1]  # of a model that rounds nowhere
    assert 1e-4 < float((scores[len(scores)][0] - exact).norm() / exact.norm()) < 0.05


def test_v_jepa_predictor_is_no_encoder():
    model, inputs = tiny_encoder("v-jepa 2"), encoder_inputs("v-jepa 2")
    exact = eager_columns(model, inputs)
    del inputs["skip_predictor"]
    for part in (model, model.encoder):
        with record_scores(part) as scores:
            assert run(model, inputs).shape == (2, 48, 64)
        assert [len(calls) for calls in scores.values()] == [1] * 5
        torch.testing.assert_close(scores[5][0].double(), exact[4], **CLOSE)
    with record_scores(VJEPA2ForVideoClassification(model.config)) as classifier:
        pass
    assert list(classifier) == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="found no supported vision encoder"), record_scores(model.predictor):
        pass


def test_of_several_encoders_the_first_is_recorded():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = tiny_encoder("dinov2"), tiny_clip()

    both, inputs = Two(), encoder_inputs("dinov2")
    with record_scores(both, [1]) as scores:
        run(both.first, inputs)
        run(both.second, inputs)
    assert len(scores[1]) == 1
    torch.testing.assert_close(scores[1][0].double(), eager_columns(both.first, inputs)[0], **CLOSE)


# -------------------------------------------------------------------------------------------------- packed sequences


def patch_scores(model, pixels, grid_thw, layer):
    """Exact scores of the patches in raster order, from where each of them lies in the encoder's rows."""
    rows, places = eager_row_scores(model, pixels, grid_thw, layer), raster_order(model, grid_thw).tolist()
    scores, token = [], 0
    for t, h, w in grid_thw.tolist():
        for frame in range(t):
            for y in range(h):
                for x in range(w):
                    group = places[token + (frame * h // 2 + y // 2) * (w // 2) + x // 2]
                    scores.append(rows[4 * group + 2 * (y % 2) + x % 2])
        token += t * h * w // 4
    return torch.stack(scores)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", QWEN)
def test_packed_scores_are_those_of_eager_attention_in_raster_order(kind, implementation):
    """Images of several sizes, and a video in a call of its own."""
    model = tiny_qwen(kind, implementation=implementation)
    inputs = qwen_batch(kind, [(3, (4, 6), 2, (3, 5), 5), (1, (2, 3, 4), 2)])
    with torch.no_grad():
        plain = model(**inputs).logits
        with record_scores(model) as scores:
            assert torch.equal(model(**inputs).logits, plain)
    assert list(scores) == [1, 2, 3, 4] and scores.num_prefix_tokens == 0
    for layer, calls in scores.items():
        for score, kinds in zip(calls, (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))):
            exact = patch_scores(model, *(inputs[name] for name in kinds), layer)
            assert score.dtype == torch.float32 and (exact - exact.roll(1)).abs().max() > 0.5
            torch.testing.assert_close(score.double(), exact, **CLOSE)
        assert len(calls) == 2
    assert not model.model.visual._forward_pre_hooks


@pytest.mark.parametrize("kind", ["qwen2.5", "qwen3"])
def test_packed_encoder_by_itself(kind):
    """Called with positional arguments as well as with keywords."""
    model, inputs = tiny_qwen(kind), qwen_batch(kind, [(1, (4, 6), (2, 3), 1)])
    visual, pixels, grid_thw = model.model.visual, inputs["pixel_values"], inputs["image_grid_thw"]
    with torch.no_grad(), record_scores(visual, [2]) as scores:
        visual(pixels, grid_thw)
        visual(hidden_states=pixels, grid_thw=grid_thw)
    exact = patch_scores(model, pixels, grid_thw, 2)
    for score in scores[2]:
        torch.testing.assert_close(score.double(), exact, **CLOSE)


def test_packed_recording_is_of_one_thread():
    """Another thread's images, of other sizes, pass through the encoder in the middle of a recorded forward."""
    model = tiny_qwen("qwen2.5")
    visual, ours, theirs = model.model.visual, *(qwen_batch("qwen2.5", [(1, size, 1)]) for size in ((4, 6), (3, 3)))
    outputs = []

    def other(*_):
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(
                target=lambda: outputs.append(visual(theirs["pixel_values"], grid_thw=theirs["image_grid_thw"]))
            )
            thread.start()
            thread.join()

    visual.blocks[0].register_forward_pre_hook(other)
    with torch.no_grad(), record_scores(visual, [1, 4]) as scores:
        visual(ours["pixel_values"], grid_thw=ours["image_grid_thw"])
    assert len(outputs) == 1
    for layer, calls in scores.items():
        exact = patch_scores(model, ours["pixel_values"], ours["image_grid_thw"], layer)
        assert len(calls) == 1
        torch.testing.assert_close(calls[0].double(), exact, **CLOSE)
