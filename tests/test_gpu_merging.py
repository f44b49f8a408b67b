"""Budgets on the device and merging of tokens on a GPU: the reference's results, without a wait, in graphs."""

import random

import pytest
import torch
from test_ops_merge import draw_call as draw_merge
from test_ops_segments import assert_same, draw_call, draw_images, plain
from torch.library import opcheck

import hiprune_kernels as hk
from hiprune_kernels import reference

pytestmark = pytest.mark.gpu


def on_gpu(values):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in values]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(6))
def test_random_segments(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        scores, budgets, call = draw_call(rng, most=rng.choice([40, 700]))
        mask = call["candidate_mask"]
        there = {**call, "candidate_mask": None if mask is None else mask.cuda()}
        result = hk.select_top_segments(scores.cuda(), budgets.cuda(), **there)
        assert_same([x.cpu() for x in result], plain(scores, budgets, **call), call)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("size", [1023, 1024, 4096, 16384, 16385])
def test_large_segments(size):
    scores, budgets = torch.randint(0, 50, (3 * size + 5,)).float(), torch.tensor([size // 3, 0, size, 2])
    call = {"sizes": [size, size, size, 5], "tiles": [3, 1], "totals": [size + 100, 2]}
    result = hk.select_top_segments(scores.cuda(), budgets.cuda(), **call)
    expected = reference.select_top_segments(scores, budgets, None, *call.values())
    assert_same([x.cpu() for x in result], expected)


@pytest.mark.parametrize("seed", range(4))
def test_random_shares(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        sizes, tiles, totals = draw_images(rng)
        weights = rng.choice([torch.rand(len(sizes)), torch.randn(len(sizes)).double(), torch.rand(len(sizes)).half()])
        result = hk.shares(
            weights.cuda(), totals, rng.choice([sizes, torch.tensor(sizes, dtype=torch.int64).cuda()]), tiles=tiles
        )
        assert torch.equal(
            result.cpu(), reference.shares(weights, torch.tensor(sizes, dtype=torch.int64), totals, tiles)
        )
    weights, caps = torch.rand(1000), torch.randint(0, 600, (1000,))
    result = hk.shares(weights.cuda(), [70000], caps.cuda(), tiles=[1000])
    assert torch.equal(result.cpu(), reference.shares(weights, caps, [70000], [1000]))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(4))
def test_random_merging(seed):
    """Keys of small integers: products are exact, and ties are ties on either device."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(40):
        features, keys, targets, sources, sizes, counts = draw_merge(rng, most=rng.choice([24, 200]))
        for rows_only in (False, True):
            named = {"sizes": sizes, "counts": counts, "rows_only": rows_only}
            result = hk.merge_tokens_varlen(*on_gpu((features, keys, targets, sources)), **named)
            merged, assigned = reference.merge_tokens(features, keys, targets, sources, *named.values())
            assert torch.equal(result[1].cpu(), assigned)
            torch.testing.assert_close(result[0].cpu(), merged)


def clip_inputs(batch=3, dtype=torch.bfloat16):
    features, keys = torch.randn(batch, 576, 1024), torch.randn(batch, 576, 64)
    targets, sources = torch.stack([torch.randperm(576)[:10] for _ in range(batch)]), torch.rand(batch, 576) < 0.9
    return on_gpu((features.to(dtype), keys, targets, sources))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merging_at_the_size_of_an_encoder(dtype):
    inputs = clip_inputs(dtype=dtype)
    merged, assigned = hk.merge_tokens(*inputs, rows_only=True)
    wide = [x.cpu().double() if x.is_floating_point() else x.cpu() for x in inputs]
    expected, to = reference.merge_tokens(*wide, rows_only=True)
    assert torch.equal(assigned.cpu(), to)
    tolerance = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    assert ((merged.cpu().double() - expected).abs() / (1 + expected.abs())).max() < tolerance
    whole, _ = hk.merge_tokens(*inputs)
    assert torch.equal(reference.gather_rows(whole, inputs[2]), merged)
    for _ in range(10):
        assert_same(hk.merge_tokens(*inputs), (whole, assigned))
    alone = hk.merge_tokens(*(x[1:2] for x in inputs))
    assert_same(alone, (whole[1:2], assigned[1:2]))


def test_gradient():
    features, *call = clip_inputs(batch=2, dtype=torch.float32)
    for rows_only in (False, True):
        x, y = features.clone().requires_grad_(), features.cpu().requires_grad_()
        merged, _ = hk.merge_tokens(x, *call, rows_only=rows_only)
        expected, _ = reference.merge_tokens(y, *(z.cpu() for z in call), rows_only=rows_only)
        merged.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad.cpu(), y.grad)


def step(weights, caps, scores, features, keys, targets, sources):
    """A whole method: shares, the best of tiles, and merging."""
    budgets = hk.shares(weights, [60], caps, tiles=[3])
    indices, roles = hk.select_top_segments(scores, budgets, sizes=[576] * 3, tiles=[3], totals=[60])
    return indices, roles, *hk.merge_tokens(features, keys, targets, sources)


def test_no_synchronisation_and_graphs():
    inputs = [*on_gpu((torch.rand(3), torch.full((3,), 30), torch.rand(3 * 576))), *clip_inputs()]
    expected = step(*inputs)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same(again, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(*inputs)
    for _ in range(2):
        for x in inputs[:1] + inputs[2:5]:
            x.normal_()
        graph.replay()
        assert_same(results, step(*inputs))


def test_opcheck_and_compilation():
    inputs = [*on_gpu((torch.rand(3), torch.full((3,), 30), torch.rand(3 * 576))), *clip_inputs()]
    assert_same(torch.compile(step, fullgraph=True)(*inputs), step(*inputs))
    opcheck(torch.ops.hiprune.merge_tokens.default, (*inputs[3:], [], [], False))
    opcheck(torch.ops.hiprune.shares.default, (*inputs[:2], [60], [3]))
    opcheck(torch.ops.hiprune.select_top_segments.default, (inputs[2], inputs[1], None, [576] * 3, [3], [60]))
