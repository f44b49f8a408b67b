"""The selection operators on a GPU: bit for bit the reference's results, in streams, graphs and compiled functions."""

import random

import pytest
import torch
from test_ops_selection import draw_case
from torch.library import opcheck

import hiprune_kernels as hk
from hiprune_kernels import reference
from hiprune_kernels.budget import RULES, plan_selection
from hiprune_kernels.ops import kernel_status

pytestmark = pytest.mark.gpu


def on_gpu(value, device="cuda"):
    return value.to(device) if isinstance(value, torch.Tensor) else value


def run_gpu(features, objects, deeps, options, device="cuda"):
    prune = hk.prune_tokens_varlen if "grids" in options else hk.prune_tokens
    options = {name: on_gpu(value, device) for name, value in options.items()}
    return prune(on_gpu(features, device), on_gpu(objects, device), on_gpu(deeps, device), **options)


def run_reference(features, objects, deeps, options):
    prune = reference.prune_tokens_varlen if "grids" in options else reference.prune_tokens
    return prune(features, objects, deeps, **options)


def assert_same(result, expected, context=None):
    for name, x, y in zip(("kept", "indices", "roles"), result, expected, strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert torch.equal(x.cpu(), y.cpu()), (name, context)


def test_status():
    (status,) = [s for s in kernel_status() if (s.device, s.operators) == ("cuda", "selection")]
    assert (status.implementation, status.reason) == ("Triton", "")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(6))
def test_random_calls(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        objects, deeps, options = draw_case(rng)
        features = torch.randn(*objects.shape, rng.choice([1, 7, 64]))
        expected = run_reference(features, objects, deeps, options)
        assert_same(run_gpu(features, objects, deeps, options), expected, options)
        select = hk.select_tokens_varlen if "grids" in options else hk.select_tokens
        options = {name: on_gpu(value) for name, value in options.items()}
        assert_same((expected[0], *select(objects.cuda(), deeps.cuda(), **options)), expected, options)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grid", [(24, 24), (32, 32), (8, 16, 16), (64, 64), (4, 32, 64), (128, 128), (127, 129)])
def test_large_grids(grid, rule):
    count = torch.Size(grid).numel()
    objects, deeps = torch.rand(2, count), torch.randint(0, 50, (2, count)).float() / 50
    options = {"grid": grid, "budget": count // 5, "rule": rule, "neighborhood": "square", "alpha": 0.3}
    features = torch.randn(2, count, 40).bfloat16()
    assert_same(run_gpu(features, objects, deeps, options), run_reference(features, objects, deeps, options))
    doubles = objects.double(), deeps.double()
    assert_same(run_gpu(features, *doubles, options), run_reference(features, *doubles, options))


def test_larger_than_the_kernel():
    objects, deeps, features = torch.rand(1, 16385), torch.rand(1, 16385), torch.randn(1, 16385, 8)
    options = {"grid": (5, 3277), "budget": 900}
    assert_same(run_gpu(features, objects, deeps, options), run_reference(features, objects, deeps, options))


def test_more_images_than_a_grid_axis_holds():
    scores, features = torch.rand(70000, 6), torch.randn(70000, 6, 4)
    kept, indices, roles = run_gpu(features, scores, scores, {"grid": (2, 3), "budget": 2, "alpha": 0.0})
    best = scores.topk(2).indices.sort(dim=1).values
    assert torch.equal(indices.cpu(), best)
    assert torch.equal(kept.cpu(), features.gather(1, best[..., None].expand(-1, -1, 4)))
    assert torch.equal((roles.cpu() == reference.REGISTER).sum(1), torch.full((70000,), 2))


@pytest.mark.parametrize("images", [3, 16, 50])
def test_packed_images(images):
    rng = random.Random(images)
    grids = [(rng.randint(1, 70), rng.randint(1, 70)) for _ in range(images)]
    budgets = [rng.randint(1, h * w) for h, w in grids]
    total = sum(h * w for h, w in grids)
    options = {"grids": grids, "budgets": budgets, "candidate_mask": torch.rand(total) < 0.9}
    objects, deeps, features = torch.rand(total), torch.rand(total), torch.randn(total, 1280).half()
    result = run_gpu(features, objects, deeps, options)
    assert_same(result, run_reference(features, objects, deeps, options))
    present = result[1] >= 0
    assert torch.equal(result[0][present], features.cuda()[result[1][present]])


DTYPES = (torch.bool, torch.uint8, torch.bfloat16, torch.int32, torch.float64, torch.complex64, torch.complex128)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 1024])
def test_features_of_any_dtype(dtype, channels):
    random_bytes = torch.randint(0, 256, (2, 577, channels * dtype.itemsize), dtype=torch.uint8)
    features = random_bytes.remainder(2).bool() if dtype == torch.bool else random_bytes.view(dtype)
    scores, options = torch.rand(2, 577), {"grid": (24, 24), "budget": 192, "num_prefix_tokens": 1}
    kept, indices, _ = run_gpu(features, scores, scores, options)
    expected = torch.stack([features[b, 1 + indices[b].cpu()] for b in range(2)])
    assert torch.equal(kept.cpu().view(torch.uint8), expected.view(torch.uint8))


def clip_inputs(batch=5):
    features = torch.randn(batch, 577, 1024, device="cuda", dtype=torch.bfloat16)
    objects, deeps = torch.rand(2, batch, 577, device="cuda")
    return features, objects, deeps


CLIP = {"grid": (24, 24), "budget": 192, "num_prefix_tokens": 1}


def test_same_bits_twenty_times_and_in_any_batch():
    features, objects, deeps = clip_inputs()
    deeps = (deeps * 20).round()  # ties
    first = hk.prune_tokens(features, objects, deeps, **CLIP)
    for _ in range(20):
        assert_same(hk.prune_tokens(features, objects, deeps, **CLIP), first)
    for b in range(5):
        alone = hk.prune_tokens(*(x[b : b + 1] for x in (features, objects, deeps)), **CLIP)
        assert_same(alone, [x[b : b + 1] for x in first])


def test_no_synchronisation():
    features, objects, deeps = clip_inputs()
    packed = {"grids": [(20, 20), (8, 22)], "budgets": [100, 31]}
    hk.prune_tokens(features, objects, deeps, **CLIP)
    hk.prune_tokens_varlen(features[0, 1:], objects[0, 1:], deeps[0, 1:], **packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        hk.prune_tokens(features, objects, deeps, **{**CLIP, "budget": 64})
        packed = {"grids": [(19, 20), (14, 14)], "budgets": [90, 32]}  # sizes not seen before
        result = hk.prune_tokens_varlen(features[0, 1:], objects[0, 1:], deeps[0, 1:], **packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(result[1]) == 122


def test_graph_capture_of_sizes_not_seen_before():
    features, objects, deeps = clip_inputs()
    rows, images = (x[0, 1:] for x in (features, objects, deeps)), {"grids": [(20, 20), (8, 22)], "budgets": [100, 31]}
    rows = tuple(rows)
    hk.prune_tokens(features, objects, deeps, **CLIP)  # compiles; nothing else is kept of it
    hk.prune_tokens_varlen(*rows, **images)
    torch.cuda.synchronize()
    dense, packed = {**CLIP, "budget": 64}, {"grids": [(19, 20), (14, 14)], "budgets": [90, 32]}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = hk.prune_tokens(features, objects, deeps, **dense), hk.prune_tokens_varlen(*rows, **packed)
    for _ in range(3):
        objects.uniform_()
        deeps.uniform_()
        features.normal_()
        graph.replay()
        inputs = [x.cpu() for x in (features, objects, deeps)]
        assert_same(results[0], run_reference(*inputs, dense))
        assert_same(results[1], run_reference(*(x[0, 1:] for x in inputs), packed))


def test_another_stream():
    features, objects, deeps = clip_inputs()
    expected = run_reference(*(x.cpu() for x in (features, -objects, deeps)), CLIP)
    hk.prune_tokens(features, objects, deeps, **CLIP)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # a launch on any other stream would run before the scores below are there
        objects.neg_()
        result = hk.prune_tokens(features, objects, deeps, **CLIP)
    stream.synchronize()
    assert_same(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device only")
def test_another_device():
    inputs = [x.cpu() for x in clip_inputs()]
    assert_same(run_gpu(*inputs, CLIP, device="cuda:1"), run_reference(*inputs, CLIP))


def test_compiled_in_one_graph():
    def step(features, objects, deeps):
        kept, indices, roles = hk.prune_tokens(features * 2, objects, deeps, **CLIP)
        return kept + 1, indices, roles

    inputs = clip_inputs()
    assert_same(torch.compile(step, fullgraph=True)(*inputs), step(*inputs))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    features, objects, deeps = (x[0, 1:] if packed else x for x in clip_inputs())
    images = ([(1, 20, 20), (1, 8, 22)], [100, 31]) if packed else ([(1, 24, 24)], [192])
    plan = plan_selection(*images, num_prefix_tokens=0 if packed else 1)
    arguments = (objects, deeps, None, plan)
    opcheck(torch.ops.hiprune.select_tokens.default, arguments)
    opcheck(torch.ops.hiprune.prune_tokens.default, (features, *arguments))


def test_gradient_of_the_features():
    features, objects, deeps = clip_inputs(batch=2)
    features = features.float().requires_grad_()
    kept, indices, _ = hk.prune_tokens(features, objects, deeps, **CLIP)
    weight = torch.randn_like(kept)
    (kept * weight).sum().backward()
    expected = torch.zeros_like(features)
    for b in range(2):
        expected[b, 1 + indices[b]] = weight[b]
    assert torch.equal(features.grad, expected)


def test_tensors_on_different_devices():
    features, objects, deeps = clip_inputs(batch=1)
    with pytest.raises(ValueError, match="deep_scores: expected device cuda:0"):
        hk.prune_tokens(features, objects, deeps.cpu(), **CLIP)
    with pytest.raises(ValueError, match="features: expected device cuda:0"):
        hk.prune_tokens(features.cpu(), objects, deeps, **CLIP)
