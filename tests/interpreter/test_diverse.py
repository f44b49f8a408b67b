"""The kernels of diverse selection in Triton's interpreter, against the definition in float64.

The interpreter's bfloat16 products are wrong: see the GPU tests.
"""

import math
import random

import pytest
import torch
from test_ops_diverse import call, check_call, draw_case, signs

from hiprune_kernels import reference
from hiprune_kernels.kernels import diverse
from hiprune_kernels.ops.diverse import _select_cuda, cuda_kernel_gap

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def run_kernel(features, quality, options):
    sizes, counts = options.get("sizes", []), options.get("counts") or [options.get("count")]
    return diverse.select_diverse(
        features, quality, options.get("candidate_mask"), sizes, counts if features.dim() == 3 or sizes else []
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_random_calls_are_greedy(seed, dtype):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(15):
        features, quality, options = draw_case(rng)
        check_call(run_kernel(features.to(dtype), quality, options), features.to(dtype), quality, options)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 130])
def test_ties_at_the_ends_of_tiles(tokens):
    """Cosines are exact here: farthest points equal the reference, whatever ties."""
    features, mask = signs(2, tokens, 16), torch.rand(2, tokens) < 0.7
    for m in (None, mask):
        expected = reference.select_diverse(features, count=tokens, candidate_mask=m)
        for x, y in zip(run_kernel(features, None, {"count": tokens, "candidate_mask": m}), expected):
            assert torch.equal(x, y)


@pytest.mark.parametrize("copies", [slice(0, 60), slice(68, 128)])
def test_who_is_no_candidate_is_near_to_nobody(copies):
    """In the same tile as a token or another one: here each has a copy among them."""
    for _ in range(4):
        features, mask = torch.randn(1, 128, 16), torch.ones(1, 128, dtype=torch.bool)
        features[:, copies], mask[:, copies] = features.flip(1)[:, copies], False
        options = {"count": 3, "candidate_mask": mask}
        check_call(run_kernel(features, None, options), features, None, options)


def test_determinant_by_hand():
    features = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]])
    for quality, order in (
        ([1.0, 1e-6, 1e-6, 0.6], [0, 3, 1, 2]),
        ([1.0, 1e-6, 2e-6, 0.6], [0, 3, 2]),
        ([1.0, 0.9, 0.5, 0.6], [0, 2, 1]),
        ([0.0, 0.0, 0.0, 0.0], [0, 1]),
    ):
        assert run_kernel(features, torch.tensor([quality]), {"count": len(order)})[1].tolist() == [order]
    axes = torch.eye(4)[[0, 0, 1, 1, 2]][None]
    result = run_kernel(axes, torch.tensor([[1.0, 0.9, 0.8, 0.7, 1e-7]]), {"count": 5})
    assert result[1].tolist() == [[0, 2, 1, 3, 4]]  # 1e-14 is below 1e-12
    assert run_kernel(torch.zeros(1, 3, 2), None, {"count": 3})[1].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("quality", [False, True])
def test_many_images_in_several_launches(quality, monkeypatch):
    """More than one launch holds, by their number or by the memory that their cosines take."""
    sizes = [random.Random(i).randint(5, 30) for i in range(19)]
    options = {"sizes": sizes, "counts": [1 + size // 5 for size in sizes]}
    features, q = torch.randn(sum(sizes), 16), torch.rand(sum(sizes)) if quality else None
    assert [chunk.number for chunk in diverse._chunks(tuple(sizes), tuple(options["counts"]))] == [16, 3]
    result = run_kernel(features, q, options)
    check_call(result, features, q, options)
    batch, batch_q = features[: 5 * 20].view(5, 20, 16), None if q is None else q[:100].view(5, 20)
    together = run_kernel(batch, batch_q, {"count": 4})
    check_call(together, batch, batch_q, {"count": 4})
    monkeypatch.setattr(diverse, "_MOST_BYTES", 4 * 2 * 20 * 20)
    diverse._chunks.cache_clear()
    assert [chunk.number for chunk in diverse._chunks((20,) * 5, (4,) * 5)] == [2, 2, 1]
    assert len(diverse._chunks(tuple(sizes), tuple(options["counts"]))) > 6
    for x, y in zip(run_kernel(features, q, options), result):
        assert torch.equal(x, y)
    for x, y in zip(run_kernel(batch, batch_q, {"count": 4}), together):
        assert torch.equal(x, y)
    diverse._chunks.cache_clear()


@pytest.mark.parametrize("quality", [False, True])
def test_same_bits_whatever_is_beside(quality):
    """Beyond the rank, every bit decides."""
    features, q = torch.randn(100, 8), torch.rand(100) if quality else None
    alone = run_kernel(features[None], None if q is None else q[None], {"count": 30})[1][0]
    beside = torch.cat([torch.randn(7, 8), features, torch.randn(300, 8)])
    q = None if q is None else torch.cat([torch.rand(7), q, torch.rand(300)])
    packed = run_kernel(beside, q, {"sizes": [7, 100, 300], "counts": [2, 30, 3]})[1]
    assert torch.equal(packed[2:32] - 7, alone)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("ignore:invalid value")  # of NumPy, which the interpreter computes with
def test_whatever_comes_in_candidates_come_out(value):
    for share in (0.01, 1.0):
        features, quality, mask = torch.randn(2, 40, 16), torch.rand(2, 40), torch.rand(2, 40) < 0.8
        features[torch.rand(features.shape) < share] = value
        quality[torch.rand(quality.shape) < share / 2] = value
        for q in (None, quality):
            for m in (None, mask):
                for row in range(2):
                    order = run_kernel(features, q, {"count": 20, "candidate_mask": m})[1][row]
                    assert len(order.unique()) == 20
                    assert m is None or m[row, order].all()


def test_any_strides():
    features, quality = torch.randn(16, 40, 2).transpose(0, 2), torch.rand(40, 2).T  # channels far apart
    mask = (torch.rand(40, 2) < 0.7).T
    options = {"count": 7, "candidate_mask": mask}
    check_call(run_kernel(features, quality, options), features, quality, options)
    options = {"sizes": [25, 15], "counts": [7, 3], "candidate_mask": mask[1]}
    check_call(run_kernel(features[1], quality[1], options), features[1], quality[1], options)


@pytest.mark.parametrize("tokens", [30, 8193])
def test_dispatch(tokens, monkeypatch):
    """What the CUDA operator calls: the kernel, or the reference for a larger image and for float64."""
    monkeypatch.setattr("hiprune_kernels.ops.diverse.gpu_gap", lambda device: "")
    launched = []
    original = diverse.select_diverse
    monkeypatch.setattr(diverse, "select_diverse", lambda *a: launched.append(1) or original(*a))
    gap = "" if tokens == 30 else "an image of 8193 tokens, above 8192"
    assert cuda_kernel_gap(torch.float32, tokens) == gap
    assert cuda_kernel_gap(torch.float64, tokens) == "features of float64"
    features = signs(1, tokens, 4)
    for dtype in (torch.float32, torch.float64) if tokens == 30 else (torch.float32,):
        launched.clear()
        expected = call(reference, features, None, {"count": 3})
        packed = _select_cuda(features[0].to(dtype), None, None, [tokens], [3])
        for x, y in zip((*_select_cuda(features.to(dtype), None, None, [], [3]), *packed), (*expected, *expected)):
            assert torch.equal(x.flatten(), y.flatten())
        assert len(launched) == (2 if dtype == torch.float32 and not gap else 0)
