"""Public selection operators on the CPU: the C++ kernel against the reference, bad input, gradients, compilation."""

import math
import random

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

import hiprune_kernels as hk
from hiprune_kernels import reference
from hiprune_kernels.budget import CLUSTER_SIZES, ROLE_NAMES, RULES, SelectionPlan, plan_selection
from hiprune_kernels.ops.library import CPU_KERNELS

needs_cpu_kernels = pytest.mark.skipif(not CPU_KERNELS, reason="the C++ extension is not built")
ROLE_CHOICES = [ROLE_NAMES, ("anchor", "register"), ("register",), ("anchor", "buffer"), ("anchor",)]


def draw_scores(rng, kind, *size):
    if kind == "normal":
        return torch.randn(*size)
    if kind == "ties":
        return torch.randint(-1, 3, size).float()
    if kind == "equal":
        return torch.full(size, 0.25)
    scores = torch.randn(*size)
    pick = torch.rand(*size)
    for i, value in enumerate((float("nan"), float("inf"), -float("inf"), 0.0, -0.0)):
        scores[(pick > 0.15 * i) & (pick < 0.15 * (i + 1))] = value
    return scores


def draw_case(rng):
    """Arguments of one random call of prune_tokens or, packed, of prune_tokens_varlen."""
    kind = rng.choice(["normal", "ties", "equal", "special"])
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
    options = {
        "alpha": rng.choice([0.0, 0.1, 0.5, 0.9, 1.0]),
        "rule": rng.choice(RULES),
        "neighborhood": rng.choice(list(CLUSTER_SIZES)),
        "keep_roles": rng.choice(ROLE_CHOICES),
    }
    if rng.random() < 0.6:
        batch, prefix, frames = rng.choice([0, 1, 2, 3]), rng.choice([0, 0, 1, 5]), rng.choice([1, 1, 3])
        h, w = rng.randint(1, 9), rng.randint(1, 9)
        count = frames * h * w
        size, mask_size = (batch, prefix + count), (batch, count)
        grid = (h, w) if frames == 1 and rng.random() < 0.5 else (frames, h, w)
        options |= {"grid": grid, "budget": rng.randint(1, count), "num_prefix_tokens": prefix}
    else:
        grids = [(rng.randint(1, 6), rng.randint(1, 6)) for _ in range(rng.randint(0, 4))]
        size = mask_size = (sum(map(math.prod, grids)),)
        options |= {"grids": grids, "budgets": [rng.randint(1, math.prod(grid)) for grid in grids]}
    objects, deeps = (draw_scores(rng, kind, *size).to(dtype) for _ in range(2))
    if rng.random() < 0.3:  # every other column of a wider tensor
        objects = objects.repeat_interleave(2, dim=-1)[..., ::2]
    if rng.random() < 0.4:
        options["candidate_mask"] = torch.rand(*mask_size) < 0.7
    return objects, deeps, options


@needs_cpu_kernels
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(12))
def test_kernel_equals_reference(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(100):
        objects, deeps, options = draw_case(rng)
        packed = "grids" in options
        features = torch.randn(*objects.shape, 7)
        if rng.random() < 0.2:
            features = torch.randn(7, *objects.shape).movedim(0, -1)  # last dimension not contiguous
        prune, select = (
            (hk.prune_tokens_varlen, hk.select_tokens_varlen) if packed else (hk.prune_tokens, hk.select_tokens)
        )
        expected = (reference.prune_tokens_varlen if packed else reference.prune_tokens)(
            features, objects, deeps, **options
        )
        result = prune(features, objects, deeps, **options)
        for x, y in zip((*result, *select(objects, deeps, **options)), (*expected, *expected[1:])):
            assert x.dtype == y.dtype
            assert torch.equal(x, y), options


ISAS = [0, 1, 2]  # any processor, AVX2, AVX-512; what a processor lacks falls back to the next one below


@needs_cpu_kernels
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "ties", "equal", "special"])
def test_every_instruction_set_equals_reference(kind, dtype, isa):
    """Grids wide enough for whole vectors and a rest behind them."""
    rng = random.Random(0)
    for rule in RULES:
        for keep_roles in ROLE_CHOICES:
            grid = rng.choice([(24, 24), (7, 13), (2, 9, 11)])
            count = math.prod(grid)
            objects, deeps = (draw_scores(rng, kind, 2, count + 1).to(dtype) for _ in range(2))
            mask = rng.choice([None, torch.rand(2, count) < 0.7])
            options = rng.randint(1, count), rng.choice([0.1, 0.9]), rule, rng.choice(list(CLUSTER_SIZES)), keep_roles
            plan = SelectionPlan.from_flat(flat := plan_selection([(1, *grid)[-3:]], [options[0]], *options[1:], 1))
            result = torch.ops.hiprune._cpu_select_tokens(objects, deeps, mask, flat, isa)
            for x, y in zip(result, reference.select_planned(objects, deeps, mask, plan)):
                assert x.device == y.device
                assert torch.equal(x, y), (grid, options)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_at_the_ends_of_their_range(dtype):
    """The bisection's range is then as wide as its integers; 1 and its neighbours differ in the last bit alone."""
    limits, one = torch.finfo(dtype), torch.ones((), dtype=dtype)
    values = [limits.max, limits.min, math.inf, -math.inf, math.nan, limits.smallest_normal, 0.0, -0.0, 1.0]
    scores = torch.tensor(values, dtype=dtype)
    scores = torch.cat([scores, one.nextafter(2 * one)[None], one.nextafter(0 * one)[None], scores[:1]])
    for budget in range(1, 13):
        options = {"budget": budget, "grid": (1, 12), "keep_roles": ("register",)}
        for x, y in zip(
            hk.select_tokens(scores[None], scores[None], **options),
            reference.select_tokens(scores[None], scores[None], **options),
        ):
            assert torch.equal(x, y), budget


@needs_cpu_kernels
def test_kernel_refuses_plans_that_do_not_fit():
    scores = torch.rand(1, 36)
    for plan, message in (
        ([0, 0, 0, 1, 1, 1, 6, 6, 37, 0], r"expected a budget of 1\.\.36"),
        ([0, 0, 0, 1, 1, 1, 6, 6, 9, 10], "0 to that many anchors, got 9 and 10"),
        ([0, 0, 0, 1, 1, 1, 6, 6, 9, -1], "0 to that many anchors, got 9 and -1"),
        ([0, 4, 0, 1, 1, 1, 6, 6, 9, 1], "no such prefix, rule or neighborhood"),
        ([0, 0, 0, 1, 1, 1, 6, 6, 9], "expected 5 numbers and 5 for each image, got 9"),
        ([0, 0, 0, 1, 1, 1, 6, 7, 9, 1], "expected 42 columns, got 36"),
        ([0, 0, 0, 1, 1, 1, 6, 6, 9, 1, 1, 6, 6, 9, 1], "expected one image for a batch, got 2"),
        ([0, 0, 0, 1, 1, 1, 2**16, 2**15, 9, 1], r"fewer than 2\*\*31 tokens an image, got 2147483648"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.hiprune.select_tokens(scores, scores, None, plan)


@needs_cpu_kernels
@pytest.mark.parametrize("count", [4096, 16384, 65536])
def test_large_grids(count):
    side = math.isqrt(count)
    objects, deeps = torch.rand(2, count), torch.randint(0, 50, (2, count)).float()
    options = {"budget": count // 5, "grid": (side, side)}
    for x, y in zip(hk.select_tokens(objects, deeps, **options), reference.select_tokens(objects, deeps, **options)):
        assert torch.equal(x, y)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_features_of_any_dtype(dtype):
    features, scores = torch.randint(0, 2, (2, 36, 5)).to(dtype), torch.rand(2, 36)
    kept, indices, _ = hk.prune_tokens(features, scores, scores, budget=11, grid=(6, 6))
    assert torch.equal(kept, torch.stack([features[b, indices[b]] for b in range(2)]))
    assert 0 < int(kept.real.to(torch.float32).sum()) < 2 * 11 * 5


def test_features_without_channels():
    """They have no memory: under UBSan the kernel once handed null pointers to memcpy and memset."""
    scores, few = torch.rand(2, 37), torch.arange(36).expand(2, -1) < 5
    options = {"budget": 9, "grid": (6, 6), "num_prefix_tokens": 1, "candidate_mask": few}
    kept, *chosen = hk.prune_tokens(torch.randn(2, 37, 0), scores, scores, **options)
    assert kept.shape == (2, 9, 0)
    for x, y in zip(chosen, hk.select_tokens(scores, scores, **options)):
        assert torch.equal(x, y)
    packed = {"grids": [(6, 6), (1, 1)], "budgets": [9, 1]}
    kept, *chosen = hk.prune_tokens_varlen(torch.randn(37, 0), scores[0], scores[0], **packed)
    assert kept.shape == (10, 0)
    for x, y in zip(chosen, hk.select_tokens_varlen(scores[0], scores[0], **packed)):
        assert torch.equal(x, y)


def test_same_bits_for_any_number_of_threads_and_neighbours():
    scores, features = torch.rand(7, 576), torch.randn(7, 576, 64)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(hk.prune_tokens(features, scores, scores, budget=192, grid=(24, 24)))
    for x, y in zip(*results):
        assert torch.equal(x, y)
    alone = hk.prune_tokens(features[3:4], scores[3:4], scores[3:4], budget=192, grid=(24, 24))
    for x, y in zip(results[0], alone):
        assert torch.equal(x[3:4], y)


# ------------------------------------------------------------------------------------------- gradients and compilation


def test_gradient_of_the_gather():
    features, scores = torch.randn(2, 40, 3, requires_grad=True), torch.rand(2, 40)
    mask = torch.arange(36).expand(2, -1) < 5  # fewer candidates than the budget: -1 at the end
    kept, indices, roles = hk.prune_tokens(
        features, scores, scores, budget=9, grid=(6, 6), num_prefix_tokens=4, candidate_mask=mask
    )
    assert not indices.requires_grad
    assert not roles.requires_grad
    weights = torch.randn_like(kept)
    (gradient,) = torch.autograd.grad(kept, features, weights)
    expected = torch.zeros_like(features)
    expected[:, 4:9] = weights[:, :5]
    assert torch.equal(gradient, expected)
    with torch.no_grad():
        assert not hk.prune_tokens(features, scores, scores, budget=9, grid=(4, 10))[0].requires_grad


@pytest.mark.parametrize("packed", [False, True])
def test_forward_derivatives_of_the_gather(packed):
    features, tangent, scores = torch.randn(2, 40, 3), torch.randn(2, 40, 3), torch.rand(2, 40)
    options = {"budget": 9, "grid": (6, 6), "num_prefix_tokens": 4}
    function = hk.prune_tokens
    if packed:
        features, tangent, scores = features[0], tangent[0], scores[0]
        options = {"budgets": [9, 2], "grids": [(6, 6), (2, 2)]}
        function = hk.prune_tokens_varlen
    expected = function(tangent, scores, scores, **options)[0]

    def kept(features):
        return function(features, scores, scores, **options)[0]

    value, derivative = torch.func.jvp(kept, (features,), (tangent,))
    assert torch.equal(value, kept(features))
    assert torch.equal(derivative, expected)
    with forward_ad.dual_level():
        assert torch.equal(forward_ad.unpack_dual(kept(forward_ad.make_dual(features, tangent))).tangent, expected)
    gradient = torch.func.grad(lambda x: (kept(x) * expected).sum())(features)
    assert torch.equal(kept(gradient), expected)
    assert gradient.count_nonzero() == expected.count_nonzero()
    both = torch.stack([features, tangent]).requires_grad_()
    mapped = torch.vmap(kept)(both)
    assert torch.equal(mapped[1], expected)
    (gradients,) = torch.autograd.grad((mapped * expected).sum(), both)
    assert torch.equal(gradients, torch.stack([gradient, gradient]))


PLAN = plan_selection([(1, 6, 6)], [9], 0.1, "paper", "cross", ROLE_NAMES, 1)


def test_opcheck():
    scores, features = torch.rand(2, 37), torch.randn(2, 37, 5)
    mask = torch.rand(2, 36) < 0.7
    opcheck(torch.ops.hiprune.select_tokens.default, (scores, scores, None, PLAN))
    opcheck(torch.ops.hiprune.prune_tokens.default, (features, scores, scores, mask, PLAN))
    packed = plan_selection([(1, 6, 6), (2, 3, 4)], [9, 5], 0.1, "grid", "square", ROLE_NAMES)
    opcheck(torch.ops.hiprune.prune_tokens.default, (torch.randn(60, 5), torch.rand(60), torch.rand(60), None, packed))


@pytest.mark.filterwarnings("error:Dynamo detected")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_without_graph_breaks(requires_grad):
    features, scores = torch.randn(2, 37, 5, requires_grad=requires_grad), torch.rand(2, 37)

    def prune(features, scores):
        return hk.prune_tokens(features, scores, scores, budget=9, grid=(6, 6), num_prefix_tokens=1)

    def select_packed(scores):
        return hk.select_tokens_varlen(scores, scores, grids=[(6, 6), (1, 1)], budgets=[9, 1])

    compiled = torch.compile(prune, fullgraph=True, backend="aot_eager")(features, scores)
    expected = prune(features, scores)
    for x, y in zip(compiled, expected):
        assert torch.equal(x, y)
    if requires_grad:
        gradients = [torch.autograd.grad(kept.square().sum(), features)[0] for kept in (compiled[0], expected[0])]
        assert torch.equal(*gradients)
        assert gradients[0].abs().sum() > 0
    compiled = torch.compile(select_packed, fullgraph=True, backend="aot_eager")(scores[0])
    for x, y in zip(compiled, select_packed(scores[0])):
        assert torch.equal(x, y)


def test_devices_without_a_kernel_go_to_the_reference(monkeypatch):
    """The composite kernel is what a pure-Python install, or a device without kernels, runs."""
    calls = []
    original = reference.select_planned
    monkeypatch.setattr(reference, "select_planned", lambda *a, **k: calls.append(1) or original(*a, **k))
    monkeypatch.setattr(hk.ops.selection, "warn_without_cpu_kernels", lambda: calls.append("warned"))
    scores = torch.rand(2, 37)
    result = hk.ops.selection._select_reference(scores, scores, None, PLAN)
    assert calls == ["warned", 1]
    for x, y in zip(result, hk.select_tokens(scores, scores, budget=9, grid=(6, 6), num_prefix_tokens=1)):
        assert torch.equal(x, y)


# ----------------------------------------------------------------------------------------------------------- bad input

DENSE = {"object_scores": torch.rand(2, 37), "deep_scores": torch.rand(2, 37), "features": torch.randn(2, 37, 5),
         "budget": 9, "grid": (6, 6), "num_prefix_tokens": 1}  # fmt: skip
PACKED = {"object_scores": torch.rand(45), "deep_scores": torch.rand(45), "features": torch.randn(45, 5),
          "grids": [(6, 6), (3, 3)], "budgets": [9, 2]}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget": 0}, ValueError, r"budget: expected 1\.\.36 for a grid of \(1, 6, 6\), got 0"),
        ({"budget": 37}, ValueError, r"budget: expected 1\.\.36"),
        ({"budget": 9.0}, TypeError, "budget: expected an int, got float"),
        ({"grid": (6, 7)}, ValueError, r"object_scores: expected 43 columns \(prefix and grid\), got shape \(2, 37\)"),
        ({"grid": (36,)}, ValueError, r"grid: expected \(h, w\) or \(t, h, w\)"),
        ({"grid": (6, -6)}, ValueError, r"grid: expected \(h, w\) or \(t, h, w\)"),
        ({"grid": (1.5, 24)}, ValueError, r"grid: expected \(h, w\) or \(t, h, w\)"),
        ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens: expected an int, at least 0, got -1"),
        ({"num_prefix_tokens": 0}, ValueError, "object_scores: expected 36 columns"),
        ({"alpha": 2.0}, ValueError, "alpha: expected a share"),
        ({"rule": "official-qwen"}, ValueError, "rule: expected one of"),
        ({"neighborhood": "hexagon"}, ValueError, "neighborhood: expected one of"),
        ({"keep_roles": ("buffer",)}, ValueError, 'keep_roles: "buffer" needs "anchor"'),
        ({"object_scores": [1.0]}, TypeError, r"object_scores: expected a tensor \[B P\+N\], got list"),
        ({"object_scores": torch.rand(37)}, ValueError, r"object_scores: expected \[B P\+N\], got shape \(37,\)"),
        ({"object_scores": torch.ones(2, 37, dtype=torch.int64)}, TypeError, "object_scores: expected float32"),
        ({"object_scores": torch.ones(2, 37, dtype=torch.int64), "deep_scores": torch.ones(2, 37, dtype=torch.int64)},
         TypeError, "object_scores: expected float32"),
        ({"object_scores": torch.rand(37), "deep_scores": torch.rand(37), "features": torch.randn(37, 5)},
         ValueError, r"object_scores: expected \[B P\+N\], got shape \(37,\)"),
        ({"deep_scores": None}, TypeError, r"deep_scores: expected a tensor \[B P\+N\], got NoneType"),
        ({"features": [1.0]}, TypeError, r"features: expected a tensor \[B P\+N C\], got list"),
        ({"budget": [9]}, TypeError, "budget: expected an int, got list"),
        ({"rule": ["paper"]}, ValueError, r"rule: expected one of .* got \['paper'\]"),
        ({"deep_scores": torch.rand(2, 36)}, ValueError, r"deep_scores: expected \[B P\+N\] = \(2, 37\)"),
        ({"deep_scores": torch.rand(2, 37).double()}, TypeError, "deep_scores: expected dtype torch.float32"),
        ({"deep_scores": torch.empty(2, 37, device="meta")}, ValueError, "deep_scores: expected device cpu"),
        ({"features": torch.randn(2, 36, 5)}, ValueError, r"features: expected \[B P\+N C\] = \(2, 37, 5\)"),
        ({"features": torch.empty(2, 37, 5, device="meta")}, ValueError, "features: expected device cpu"),
        ({"candidate_mask": torch.ones(2, 37, dtype=torch.bool)}, ValueError, r"candidate_mask: expected \[B N\] = \(2, 36\)"),
        ({"candidate_mask": torch.ones(2, 36)}, TypeError, "candidate_mask: expected bool"),
    ],
)  # fmt: skip
def test_bad_dense_input(change, error, message):
    hk.prune_tokens(**DENSE)
    with pytest.raises(error, match=message):
        hk.prune_tokens(**{**DENSE, **change})


def test_checks_do_not_take_for_known_what_only_equals_it():
    """Plans are kept from call to call; 9.0 equals 9, and True equals 1, but neither is a number of tokens."""
    hk.prune_tokens(**DENSE)
    hk.prune_tokens(**{**DENSE, "budget": 1})
    for change, error in (
        ({"budget": 9.0}, TypeError),
        ({"budget": True}, TypeError),
        ({"grid": (6.0, 6)}, ValueError),
        ({"num_prefix_tokens": 1.0}, ValueError),
        ({"num_prefix_tokens": True}, ValueError),
    ):
        with pytest.raises(error, match=next(iter(change))) as raised:
            hk.prune_tokens(**{**DENSE, **change})
        assert raised.value.__context__ is None


def test_options_that_no_cache_can_hold():
    expected = hk.prune_tokens(**{**DENSE, "alpha": 1.0, "keep_roles": ("anchor", "register")})
    for change in (
        {"alpha": 1, "keep_roles": ["anchor", "register"]},
        {"alpha": 1.0, "keep_roles": {"anchor", "register"}, "grid": [6, 6]},
        {"alpha": 1.0, "keep_roles": ("anchor", "register"), "grid": torch.Size((6, 6))},
    ):
        for x, y in zip(hk.prune_tokens(**{**DENSE, **change}), expected):
            assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budgets": [9]}, ValueError, "budgets: expected 2, one per grid, got 1"),
        ({"budgets": [9, 10]}, ValueError, r"budgets\[1\]: expected 1\.\.9"),
        ({"grids": [(6, 6), (3,)]}, ValueError, r"grids\[1\]: expected \(h, w\) or \(t, h, w\)"),
        ({"grids": [(6, 6), (3, 4)]}, ValueError, "object_scores: expected 48 columns"),
        ({"features": torch.randn(45)}, ValueError, r"features: expected \[T C\], got shape \(45,\)"),
        ({"candidate_mask": torch.ones(44, dtype=torch.bool)}, ValueError, r"candidate_mask: expected \[T\] = \(45,\)"),
    ],
)
def test_bad_packed_input(change, error, message):
    hk.prune_tokens_varlen(**PACKED)
    with pytest.raises(error, match=message):
        hk.prune_tokens_varlen(**{**PACKED, **change})


def test_check_inputs():
    scores = torch.rand(2, 36)
    hk.check_inputs(object_scores=scores, deep_scores=scores, candidate_mask=scores > -1, budget=36)
    scores[1, 3], scores[0, 1] = float("nan"), float("inf")
    with pytest.raises(ValueError, match="deep_scores: expected finite values, got 1 NaN and 1 infinite of 72"):
        hk.check_inputs(deep_scores=scores)
    with pytest.raises(ValueError, match="candidate_mask: expected at least budget=5 candidates per image, got 4"):
        hk.check_inputs(candidate_mask=torch.arange(36).expand(2, -1) < 4, budget=5)
    cu_seqlens = torch.tensor([0, 3, 8], dtype=torch.int32)
    query = torch.randn(8, 2, 4)
    hk.check_inputs(query=query, cu_seqlens_q=cu_seqlens, max_seqlen_q=5)
    with pytest.raises(ValueError, match="max_seqlen_q: expected at least 5, the longest segment, got 4"):
        hk.check_inputs(query=query, cu_seqlens_q=cu_seqlens, max_seqlen_q=4)
    with pytest.raises(ValueError, match="cu_seqlens_k: expected to start at 0, never decrease and end at 9"):
        hk.check_inputs(key=torch.randn(9, 2, 4), cu_seqlens_k=cu_seqlens)
    with pytest.raises(ValueError, match="query: expected the packed tensor that cu_seqlens_q cuts, got None"):
        hk.check_inputs(cu_seqlens_q=cu_seqlens)
    for name, wrong in (("query", scores.int()), ("deep_scores", scores > 0), ("key", scores.to(torch.complex64))):
        with pytest.raises(TypeError, match=rf"{name}: expected float32, .* got {wrong.dtype}"):
            hk.check_inputs(**{name: wrong})
    for wrong in (cu_seqlens.long(), cu_seqlens[None], cu_seqlens[:0]):
        with pytest.raises(TypeError, match=rf"cu_seqlens_q: expected int32 \[S\+1\], got {wrong.dtype}"):
            hk.check_inputs(query=query, cu_seqlens_q=wrong)
    with pytest.raises(ValueError, match=r"query: expected \[T H D\], as cu_seqlens_q cuts it, got shape \(8, 8\)"):
        hk.check_inputs(query=query.flatten(1), cu_seqlens_q=cu_seqlens)
    for wrong in (torch.ones(2, 36), torch.ones(2, 3, 4, dtype=torch.bool)):
        with pytest.raises(TypeError, match=r"candidate_mask: expected bool \[B N\] or \[N\], got"):
            hk.check_inputs(candidate_mask=wrong)
    hk.check_inputs(features=torch.zeros(2, 3, 4, dtype=torch.float8_e4m3fn))
    with pytest.raises(ValueError, match="features: expected finite values, got 24 NaN"):
        hk.check_inputs(features=torch.full((2, 3, 4), float("nan")).to(torch.float8_e4m3fn))
