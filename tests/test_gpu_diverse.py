"""Diverse selection on a GPU: the definition in float64, ties, same bits, graphs and compiled functions."""

import random

import pytest
import torch
from test_ops_diverse import call, check_call, draw_case, signs
from torch.library import opcheck

import hiprune_kernels as hk
from hiprune_kernels import reference

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def on_gpu(value):
    return value.cuda() if isinstance(value, torch.Tensor) else value


def run_gpu(features, quality, options):
    options = {name: on_gpu(value) for name, value in options.items()}
    return [x.cpu() for x in call(hk, features.cuda(), on_gpu(quality), options)]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("seed", range(3))
def test_random_calls_are_greedy(seed, dtype):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(30):
        features, quality, options = draw_case(rng)
        check_call(run_gpu(features.to(dtype), quality, options), features.to(dtype), quality, options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 576, 2000])
def test_ties(tokens, dtype):
    """Cosines are exact here: farthest points equal the reference, whatever ties."""
    features, mask = signs(2, tokens, 64).to(dtype), torch.rand(2, tokens) < 0.7
    for m in (None, mask):
        options = {"count": min(tokens, 100), "candidate_mask": m}
        for x, y in zip(run_gpu(features, None, options), reference.select_diverse(features, **options)):
            assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_equal_tokens_the_lowest_index_wins(dtype):
    """From either side of the diagonal a cosine has the same bits."""
    unique, copies = torch.randn(200, 300).to(dtype), torch.arange(200).repeat(3)[torch.randperm(600)]
    first = torch.stack([(copies == i).nonzero()[0, 0] for i in range(200)])
    quality = torch.rand(200) + 0.5
    order = run_gpu(unique[None], quality[None], {"count": 100})[1][0]
    result = run_gpu(unique[copies][None], quality[copies][None], {"count": 100})[1][0]
    assert torch.equal(result, first[order])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quality", [False, True])
def test_same_bits_run_to_run_and_whatever_is_beside(quality, dtype):
    """Beyond the rank, every bit decides."""
    features, q = torch.randn(576, 50).to(dtype), torch.rand(576) if quality else None
    alone = run_gpu(features[None], None if q is None else q[None], {"count": 200})[1][0]
    batch = torch.stack([torch.randn(576, 50).to(dtype), features] * 40)
    qs = None if q is None else torch.stack([torch.rand(576), q] * 40)
    for order in run_gpu(batch, qs, {"count": 200})[1][1::2]:
        assert torch.equal(order, alone)
    packed = torch.cat([torch.randn(7, 50).to(dtype), features, torch.randn(3000, 50).to(dtype)])
    q = None if q is None else torch.cat([torch.rand(7), q, torch.rand(3000)])
    order = run_gpu(packed, q, {"sizes": [7, 576, 3000], "counts": [2, 200, 3]})[1]
    assert torch.equal(order[2:202] - 7, alone)


def test_larger_than_the_kernel():
    features = signs(1, 8193, 16)
    for x, y in zip(run_gpu(features, None, {"count": 4}), reference.select_diverse(features, count=4)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_whatever_comes_in_candidates_come_out(value):
    for share in (0.01, 1.0):
        features, quality, mask = torch.randn(2, 100, 16), torch.rand(2, 100), torch.rand(2, 100) < 0.8
        features[torch.rand(features.shape) < share] = value
        for q in (None, quality, torch.full_like(quality, value)):
            order = run_gpu(features, q, {"count": 50, "candidate_mask": mask})[1]
            for row in range(2):
                assert len(order[row].unique()) == 50
                assert mask[row, order[row]].all()


@pytest.mark.parametrize("quality", [False, True])
def test_in_a_graph(quality):
    features, q = torch.randn(2, 576, 64, device="cuda"), torch.rand(2, 576, device="cuda") if quality else None
    hk.select_diverse(features, count=64, quality=q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = hk.select_diverse(features, count=64, quality=q)
    features.copy_(torch.randn_like(features))
    graph.replay()
    for x, y in zip(result, hk.select_diverse(features, count=64, quality=q)):
        assert torch.equal(x, y)


def test_opcheck_and_compilation():
    features, quality = torch.randn(2, 30, 5, device="cuda"), torch.rand(2, 30, device="cuda")
    opcheck(torch.ops.hiprune.select_diverse.default, (features, quality, quality > 0.3, [], [9]))
    opcheck(torch.ops.hiprune.select_diverse.default, (features[0], None, None, [20, 10], [3, 4]))

    def select(features):
        return hk.select_diverse(features, count=9)

    for x, y in zip(torch.compile(select, fullgraph=True)(features), select(features)):
        assert torch.equal(x, y)
