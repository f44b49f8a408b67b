"""Public attention-score operators on the CPU: against float64, what goes where, bad input, gradients, compilation."""

import itertools
import random

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

import hiprune_kernels as hk
from hiprune_kernels import reference
from hiprune_kernels.ops import attention
from hiprune_kernels.ops.library import CPU_KERNELS

needs_cpu_kernels = pytest.mark.skipif(not CPU_KERNELS, reason="the C++ extension is not built")
OUTPUT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


CU = int32(0, 4, 4, 9)


def double(*tensors):
    return [None if x is None else x.double() if x.is_floating_point() else x for x in tensors]


def check_scores(scores, expected):
    """Scores are float32 sums of probabilities: relative rounding, far below what a wrong key or query would change."""
    assert scores.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(scores.double(), expected, rtol=2e-5, atol=2e-6)


def draw_dense(rng, dtype=None):
    """One random call: query, key, value and options; strides as models make them, as slices, or contiguous."""
    dtype = dtype or rng.choice([torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64])
    B, Hk, group = rng.randint(1, 3), rng.randint(1, 3), rng.choice([1, 1, 2, 4])
    M, N, D = rng.choice([1, 2, 17, 50]), rng.choice([1, 3, 17, 65]), rng.choice([1, 5, 16, 33, 64, 72, 80, 128, 256])

    def draw(heads, length):
        layout = rng.choice(["model", "contiguous", "slice"])
        if layout == "model":
            return torch.randn(B, length, heads, D).to(dtype).transpose(1, 2)
        if layout == "slice":
            return torch.randn(B, heads, 2 * length, D + 3).to(dtype)[:, :, ::2, :D]
        return torch.randn(B, heads, length, D).to(dtype)

    options = {"causal": rng.random() < 0.3}
    if rng.random() < 0.3:
        options["scale"] = rng.choice([0.3, 0.05, -0.2])
    if rng.random() < 0.4:
        options["key_mask"] = torch.rand(B, N) < 0.7
    if rng.random() < 0.4:
        options["query_mask"] = torch.rand(B, M) < 0.7
    return draw(Hk * group, M) * 2, draw(Hk, N), draw(Hk, N), options


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(10))
def test_dense_against_float64(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(25):
        query, key, value, options = draw_dense(rng)
        output, scores = hk.attention_with_scores(query, key, value, **options)
        expected, expected_scores = reference.attention_with_scores(*double(query, key, value), **options)
        assert output.dtype == query.dtype
        assert output.transpose(1, 2).is_contiguous()
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=OUTPUT_TOLERANCE[query.dtype])
        check_scores(scores, expected_scores)
        reductions = {"query_reduction": rng.choice(["sum", "mean", "max"])}
        check_scores(
            hk.attention_scores_per_head(query, key, **reductions, **options),
            reference.attention_scores_per_head(*double(query, key), **reductions, **options),
        )
        reductions["head_reduction"] = rng.choice(["sum", "mean", "max"])
        check_scores(
            hk.attention_scores(query, key, **reductions, **options),
            reference.attention_scores(*double(query, key), **reductions, **options),
        )


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(6))
def test_packed_against_float64(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(20):
        segments, Hk, group, D = rng.randint(1, 4), rng.randint(1, 2), rng.choice([1, 2]), rng.choice([8, 64, 80])
        lengths = torch.randint(0, 20, (2, segments))
        lengths[0, rng.randrange(segments)] += 1
        cu_q, cu_k = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).int()
        if rng.random() < 0.5:
            cu_k = cu_q
        query, key, value = (torch.randn(int(n[-1]), h, D) * 2 for n, h in ((cu_q, Hk * group), (cu_k, Hk), (cu_k, Hk)))
        options = {"cu_seqlens_q": cu_q, "causal": rng.random() < 0.5, "max_seqlen_q": rng.choice([None, 32])}
        if cu_k is not cu_q:
            options["cu_seqlens_k"] = cu_k
        if rng.random() < 0.5:
            options |= {"key_mask": torch.rand(len(key)) < 0.7, "query_mask": torch.rand(len(query)) < 0.7}
        output, scores = hk.attention_with_scores_varlen(query, key, value, **options)
        expected, expected_scores = reference.attention_with_scores_varlen(*double(query, key, value), **options)
        torch.testing.assert_close(output.double(), expected, rtol=0, atol=2e-5)
        check_scores(scores, expected_scores)
        reductions = {"query_reduction": rng.choice(["sum", "mean", "max"])}
        check_scores(
            hk.attention_scores_per_head_varlen(query, key, **reductions, **options),
            reference.attention_scores_per_head_varlen(*double(query, key), **reductions, **options),
        )
        reductions["head_reduction"] = rng.choice(["sum", "mean", "max"])
        check_scores(
            hk.attention_scores_varlen(query, key, **reductions, **options),
            reference.attention_scores_varlen(*double(query, key), **reductions, **options),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_clip_size(dtype):
    """CLIP-L/14-336: the error is at most twice that of PyTorch's own attention in the same dtype."""
    query, key, value = (torch.randn(1, 577, 16, 64).to(dtype).transpose(1, 2) for _ in range(3))
    output, scores = hk.attention_with_scores(2 * query, key, value)
    expected, expected_scores = reference.attention_with_scores(*double(2 * query, key, value))
    plain = torch.nn.functional.scaled_dot_product_attention(2 * query, key, value)
    assert (output - expected).abs().max() <= 2 * (plain - expected).abs().max()
    check_scores(scores, expected_scores)
    assert abs(float(scores.double().sum()) - 577) < 1e-3
    check_scores(hk.attention_scores(2 * query, key), expected_scores)
    cls = hk.attention_scores(2 * query[:, :, :1], key)
    check_scores(cls, reference.attention_scores(*double(2 * query[:, :, :1], key)))


def test_same_bits_for_any_number_of_threads_and_neighbours():
    query, key, value = torch.randn(3, 5, 3, 130, 64)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append((*hk.attention_with_scores(query, key, value), hk.attention_scores(query, key)))
    for x, y in zip(*results):
        assert torch.equal(x, y)
    alone = (
        *hk.attention_with_scores(*(x[2:3] for x in (query, key, value))),
        hk.attention_scores(query[2:3], key[2:3]),
    )
    for x, y in zip(results[0], alone):
        assert torch.equal(x[2:3], y)


@pytest.mark.parametrize(("B", "M", "N"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(B, M, N):
    query, key = torch.randn(B, 4, M, 8), torch.randn(B, 2, N, 8)
    output, scores = hk.attention_with_scores(query, key, key)
    assert output.shape == (B, 4, M, 8)
    assert scores.shape == (B, N)
    assert not output.any()
    assert not scores.any()
    for reduction in ("sum", "mean", "max"):
        assert not hk.attention_scores_per_head(query, key, query_reduction=reduction).any()


def test_empty_packed():
    empty = torch.zeros(0, 2, 8)
    for cu_seqlens in (int32(0), int32(0, 0, 0)):
        output, scores = hk.attention_with_scores_varlen(empty, empty, empty, cu_seqlens_q=cu_seqlens)
        assert output.shape == (0, 2, 8)
        assert scores.shape == (0,)


# ------------------------------------------------------------------------------------------------ what goes where


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("make", "reductions", "gap"),
    [
        (lambda: torch.randn(1, 2, 5, 64), {}, ""),
        (lambda: torch.randn(1, 2, 5, 64).bfloat16(), {"query_reduction": "mean"}, ""),
        (lambda: torch.randn(1, 2, 5, 256).half(), {"head_reduction": "sum"}, ""),
        (lambda: torch.randn(1, 2, 5, 64, dtype=torch.float64), {}, "float64"),
        (lambda: torch.randn(1, 2, 5, 257), {}, "a head dimension of 257, above 256"),
        (lambda: torch.randn(1, 2, 64, 5).transpose(2, 3), {}, "a last dimension that is not contiguous"),
        (lambda: torch.randn(1, 2, 5, 64), {"query_reduction": "max"}, 'the reduction "max"'),
        (lambda: torch.randn(1, 2, 5, 64), {"head_reduction": "max"}, 'the reduction "max"'),
    ],
)
def test_what_the_kernel_does_not_cover_goes_to_the_reference(monkeypatch, make, reductions, gap):
    query, key = make(), make()
    assert attention.cpu_kernel_gap(query, key, **reductions) == gap
    calls = []
    original = reference.attention_scores
    monkeypatch.setattr(reference, "attention_scores", lambda *a, **k: calls.append(1) or original(*a, **k))
    scores = hk.attention_scores(query, key, **reductions)
    assert len(calls) == bool(gap)
    check_scores(scores, original(*double(query, key), **reductions))


def test_without_the_library_everything_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(attention, "CPU_KERNELS", False)
    attention.warn_without_cpu_kernels.cache_clear()
    query, key, value = torch.randn(3, 2, 4, 9, 16)
    with pytest.warns(UserWarning, match=r"the C\+\+ kernels were not built"):
        output, scores = hk.attention_with_scores(query, key, value)
    expected = reference.attention_with_scores(query, key, value)
    assert torch.equal(output, expected[0])
    assert torch.equal(scores, expected[1])


@pytest.mark.parametrize(("M", "N"), [(5, 9), (9, 5), (6, 6), (1, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_query_counts(M, N, masked):
    query, key = torch.randn(3, 1, M, 4), torch.randn(3, 1, N, 4)
    mask = torch.rand(3, M) < 0.6 if masked else None
    for causal in (False, True):
        expected = reference.counted_queries(query, key, causal, None, mask)[:, 0]
        counts = attention.query_counts(M, N, causal, mask, query.device)
        assert torch.equal(counts.expand(expected.shape).long(), expected)


# ------------------------------------------------------------------------------------------- gradients and compilation


@pytest.mark.parametrize(
    ("M", "N", "causal", "masked"), [(9, 11, False, False), (9, 11, True, True), (11, 9, True, False)]
)
def test_gradients_against_float64(M, N, causal, masked):
    """With M > N and causal attention, and with hidden keys, some queries see nothing: their gradient is zero."""
    query, key, value = (torch.randn(2, h, n, 16, requires_grad=True) for h, n in ((4, M), (2, N), (2, N)))
    options = {"causal": causal, "key_mask": torch.rand(2, N) < 0.5 if masked else None}
    output, scores = hk.attention_with_scores(query, key, value, **options)
    assert not scores.requires_grad
    weights = torch.randn_like(output)
    gradients = torch.autograd.grad(output, (query, key, value), weights)
    doubles = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = torch.autograd.grad(reference.attention_with_scores(*doubles, **options)[0], doubles, weights.double())
    for gradient, value in zip(gradients, expected):
        torch.testing.assert_close(gradient.double(), value, rtol=1e-4, atol=1e-5)
        assert value.abs().max() > 0.1


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("D", "dtype"), [(8, torch.float32), (8, torch.bfloat16), (8, torch.float64), (264, torch.float32)]
)
def test_what_a_mask_hides_is_never_read(D, dtype, packed, causal, poison):
    """Neither by the kernel nor by the reference, which serves float64 and D > 256, nor for the gradients."""
    key_mask, query_mask = (
        torch.tensor([[True, False, True, True, False], [False] * 5]),
        torch.tensor([[True, False, True]] * 2),
    )
    clean = [torch.randn(2, h, n, D).to(dtype) for h, n in ((4, 3), (2, 5), (2, 5))]
    poisoned = [x.clone() for x in clean]
    for x in poisoned[1:]:
        x.transpose(1, 2)[~key_mask] = poison
    options = {"causal": causal, "key_mask": key_mask, "query_mask": query_mask}
    function = hk.attention_with_scores
    if packed:
        clean, poisoned = ([x.transpose(1, 2).flatten(0, 1) for x in tensors] for tensors in (clean, poisoned))
        options |= {"key_mask": key_mask.flatten(), "query_mask": query_mask.flatten()}
        options |= {"cu_seqlens_q": int32(0, 3, 6), "cu_seqlens_k": int32(0, 5, 10)}
        function = hk.attention_with_scores_varlen
    results = []
    for tensors in (clean, poisoned):
        tensors = [x.requires_grad_() for x in tensors]
        output, scores = function(*tensors, **options)
        gradients = torch.autograd.grad(output.square().sum(), tensors, retain_graph=True)
        (again,) = torch.autograd.grad(output.square().sum(), tensors[0], create_graph=True)
        results.append((output, scores, *gradients, again, *torch.autograd.grad(again.square().sum(), tensors)))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)
        assert x.any()


def test_a_query_that_does_not_count_may_be_nan():
    query, key, value = (torch.randn(2, h, n, 8) for h, n in ((4, 3), (2, 5), (2, 5)))
    query_mask = torch.tensor([[True, False, True]] * 2)
    for dtype in (torch.float32, torch.float64):
        poisoned = query.to(dtype)
        poisoned[:, :, 1] = float("nan")
        tensors = key.to(dtype), value.to(dtype)
        expected, expected_scores = hk.attention_with_scores(query.to(dtype), *tensors, query_mask=query_mask)
        output, scores = hk.attention_with_scores(poisoned, *tensors, query_mask=query_mask)
        assert torch.equal(scores, expected_scores)
        assert torch.equal(output[:, :, ::2], expected[:, :, ::2])
        assert output[:, :, 1].isnan().all()


@pytest.mark.parametrize("causal", [False, True])
def test_packed_gradients_against_float64(causal):
    query, key, value = (torch.randn(9, h, 16, requires_grad=True) for h in (4, 2, 2))
    options = {"cu_seqlens_q": CU, "causal": causal, "key_mask": torch.arange(9) != 6}
    output, _ = hk.attention_with_scores_varlen(query, key, value, **options)
    weights = torch.randn_like(output)
    gradients = torch.autograd.grad(output, (query, key, value), weights)
    doubles = [x.detach().double().requires_grad_() for x in (query, key, value)]
    expected = torch.autograd.grad(
        reference.attention_with_scores_varlen(*doubles, **options)[0], doubles, weights.double()
    )
    for gradient, value in zip(gradients, expected):
        torch.testing.assert_close(gradient.double(), value, rtol=1e-4, atol=1e-5)


def dense_call(module, dtype):
    """The output as a function of the query, and the query; every option that hides something is in use."""
    query, key, value = (torch.randn(2, h, n, 8).to(dtype) for h, n in ((4, 5), (2, 7), (2, 7)))
    options = {"causal": True, "key_mask": torch.arange(7).expand(2, -1) != 3}
    return lambda query: module.attention_with_scores(query, key, value, **options), query


def packed_call(module, dtype):
    query, key, value = (torch.randn(9, h, 8).to(dtype) for h in (4, 2, 2))
    options = {"cu_seqlens_q": CU, "causal": True, "key_mask": torch.arange(9) != 6}
    return lambda query: module.attention_with_scores_varlen(query, key, value, **options), query


def gradient_penalty(function, query):
    query = query.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(query)[0].square().sum(), query, create_graph=True)
    return torch.autograd.grad(gradient.square().sum(), query)


def dual_numbers(function, query):
    with forward_ad.dual_level():
        return [forward_ad.unpack_dual(x).tangent for x in function(forward_ad.make_dual(query, torch.cos(query)))]


DERIVATIVES = {
    "gradient penalty": gradient_penalty,
    "dual numbers": dual_numbers,
    "jvp": lambda function, query: torch.func.jvp(function, (query,), (torch.cos(query),))[1],
    "grad": lambda function, query: torch.func.grad(lambda x: function(x)[0].square().sum())(query)[None],
    "grad of scores": lambda function, query: torch.func.grad(lambda x: function(x)[1].square().sum())(query)[None],
    "jacrev": lambda function, query: torch.func.jacrev(function)(query),
    "hessian": lambda function, query: torch.func.hessian(lambda x: function(x)[0].square().sum())(query)[None],
    "grad of vmap": lambda function, query: torch.func.grad(
        lambda x: torch.vmap(lambda y: function(y)[0])(x).square().sum()
    )(torch.stack([query, 2 * query])),
    "vmap of grad": lambda function, query: torch.vmap(torch.func.grad(lambda x: function(x)[0].square().sum()))(
        torch.stack([query, 2 * query])
    ),
}


@pytest.mark.parametrize("call", [dense_call, packed_call])
@pytest.mark.parametrize("derivative", DERIVATIVES)
def test_other_derivatives_against_float64(derivative, call):
    """They are right or raise; a custom operator by itself would drop tangents, and lack second derivatives."""
    torch.manual_seed(1)
    found = DERIVATIVES[derivative](*call(hk, torch.float32))
    torch.manual_seed(1)
    expected = DERIVATIVES[derivative](*call(reference, torch.float64))
    for x, y in zip(found, expected, strict=True):
        assert y.abs().max() > 0.01
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-5)


def test_derivatives_within_a_compiled_function():
    function, query = dense_call(hk, torch.float32)
    gradient = torch.func.grad(lambda x: function(x)[0].square().sum())
    compiled = torch.compile(gradient, fullgraph=True, backend="aot_eager")(query)
    torch.testing.assert_close(compiled, gradient(query))


def test_scores_alone_have_no_gradient():
    query, key = torch.randn(2, 1, 2, 5, 8, requires_grad=True)
    scores = hk.attention_scores(query, key)
    assert not scores.requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        scores.sum().backward()


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    query, key, value = (torch.randn(2, h, 9, 16, requires_grad=requires_grad) for h in (4, 2, 2))
    masks = (torch.rand(2, 9) < 0.7, torch.rand(2, 9) < 0.7)
    options = {"max_seqlen_q": None, "scale": None, "causal": True}
    reductions = {"query_reduction": "mean", "head_reduction": "none"}
    scores, with_scores = torch.ops.hiprune.attention_scores.default, torch.ops.hiprune.attention_with_scores.default
    opcheck(with_scores, (query, key, value, None, None, *masks), options)
    opcheck(scores, (query, key, None, None, *masks), options | reductions)
    query, key, value = (torch.randn(9, h, 16, requires_grad=requires_grad) for h in (4, 2, 2))
    opcheck(with_scores, (query, key, value, CU, None, None, None), options)
    opcheck(scores, (query, key, CU, CU, None, None), options | reductions)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_without_graph_breaks(requires_grad):
    dense = [torch.randn(2, h, 9, 16, requires_grad=requires_grad) for h in (4, 2, 2)]
    packed = [torch.randn(9, h, 16, requires_grad=requires_grad) for h in (4, 2, 2)]
    for function, tensors in (
        (lambda q, k, v: hk.attention_with_scores(q, k, v, causal=True), dense),
        (lambda q, k, v: hk.attention_with_scores_varlen(q, k, v, cu_seqlens_q=CU, causal=True), packed),
    ):
        output, scores = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors)
        expected, expected_scores = function(*tensors)
        assert torch.equal(output, expected)
        assert torch.equal(scores, expected_scores)
        if requires_grad:
            gradients = torch.autograd.grad(output.square().sum(), tensors)
            for x, y in zip(gradients, torch.autograd.grad(expected.square().sum(), tensors)):
                torch.testing.assert_close(x, y)

    def all_scores(query, key):
        return hk.attention_scores(query, key), hk.attention_scores_per_head(query, key, query_reduction="max")

    compiled = torch.compile(all_scores, fullgraph=True, backend="aot_eager")(*dense[:2])
    for x, y in zip(compiled, all_scores(*dense[:2])):
        assert torch.equal(x, y)


# ----------------------------------------------------------------------------------------------------------- bad input

DENSE = {"query": torch.randn(2, 4, 5, 8), "key": torch.randn(2, 2, 7, 8), "value": torch.randn(2, 2, 7, 8)}
PACKED = {"query": torch.randn(9, 4, 8), "key": torch.randn(9, 2, 8), "value": torch.randn(9, 2, 8), "cu_seqlens_q": CU}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.randn(4, 5, 8)}, ValueError, r"query: expected \[B Hq M D\], got shape \(4, 5, 8\)"),
        ({"query": 3}, TypeError, r"query: expected a tensor \[B Hq M D\], got int"),
        ({"query": torch.ones(2, 4, 5, 8).int()}, TypeError, "query: expected float32, bfloat16, float16 or float64"),
        ({"key": torch.randn(2, 3, 7, 8)}, ValueError, "key: expected a number of heads that divides the query's 4, got 3"),
        ({"key": torch.randn(2, 2, 7, 9)}, ValueError, r"key: expected \[B Hk N D\] with D = 8, got shape"),
        ({"key": torch.randn(3, 2, 7, 8)}, ValueError, r"key: expected \[B Hk N D\] with B = 2, got shape"),
        ({"key": torch.randn(2, 2, 7, 8).half()}, TypeError, "key: expected dtype torch.float32 as query, got torch.float16"),
        ({"key": torch.empty(2, 2, 7, 8, device="meta")}, ValueError, "key: expected device cpu as query, got meta"),
        ({"value": torch.randn(2, 2, 6, 8)}, ValueError, r"value: expected \[B Hk N D\] = \(2, 2, 7, 8\)"),
        ({"value": torch.randn(2, 2, 7, 8).double()}, TypeError, "value: expected dtype torch.float32 as query"),
        ({"key_mask": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"key_mask: expected \[B N\] = \(2, 7\)"),
        ({"query_mask": torch.ones(2, 7, dtype=torch.bool)}, ValueError, r"query_mask: expected \[B M\] = \(2, 5\)"),
        ({"key_mask": torch.ones(2, 7)}, TypeError, "key_mask: expected bool"),
        ({"scale": "1"}, TypeError, "scale: expected a number, got str"),
    ],
)  # fmt: skip
def test_bad_dense_input(change, error, message):
    hk.attention_with_scores(**DENSE)
    with pytest.raises(error, match=message):
        hk.attention_with_scores(**{**DENSE, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.randn(1, 9, 4, 8)}, ValueError, r"query: expected \[Tq Hq D\]"),
        ({"cu_seqlens_q": CU.long()}, TypeError, "cu_seqlens_q: expected int32, got torch.int64"),
        ({"cu_seqlens_q": None}, TypeError, r"cu_seqlens_q: expected a tensor \[S\+1\], got NoneType"),
        ({"cu_seqlens_k": int32(0, 9)}, ValueError, r"cu_seqlens_k: expected \[S\+1\] with S >= 0, as cu_seqlens_q"),
        ({"cu_seqlens_q": int32(1, 4, 4, 9)}, ValueError, r"cu_seqlens_q: expected to start at 0, .* got \[1, 4, 4, 9\]"),
        ({"cu_seqlens_q": int32(0, 4, 3, 9)}, ValueError, "cu_seqlens_q: expected to start at 0, never decrease"),
        ({"cu_seqlens_q": int32(0, 4, 4, 8)}, ValueError, "cu_seqlens_q: expected to start at 0, .* and end at 9"),
        ({"cu_seqlens_k": int32(0, 4, 4, 10)}, ValueError, "cu_seqlens_k: expected to start at 0, .* and end at 9"),
        ({"key_mask": torch.ones(2, 9, dtype=torch.bool)}, ValueError, r"key_mask: expected \[Tk\]"),
    ],
)  # fmt: skip
def test_bad_packed_input(change, error, message):
    hk.attention_with_scores_varlen(**PACKED)
    with pytest.raises(error, match=message):
        hk.attention_with_scores_varlen(**{**PACKED, **change})


def test_bad_reductions():
    for name, function in itertools.product(
        ("query_reduction", "head_reduction"), (hk.attention_scores, hk.attention_scores_per_head)
    ):
        if name == "head_reduction" and function is hk.attention_scores_per_head:
            continue
        with pytest.raises(ValueError, match=rf"{name}: expected one of \('sum', 'mean', 'max'\), got 'none'"):
            function(DENSE["query"], DENSE["key"], **{name: "none"})


def test_where_sdpa_is_outrun(monkeypatch):
    """On CPUs with AVX2, where the kernel serves the call and nobody asks for gradients."""
    simd = CPU_KERNELS and torch.ops.hiprune._cpu_instruction_sets() > 1
    states = list(torch.randn(3, 1, 2, 9, 8))
    assert attention.outruns_sdpa(*states) == simd
    monkeypatch.setattr(attention, "_SIMD", True)
    assert attention.outruns_sdpa(*states)
    assert not attention.outruns_sdpa(*(x.double() for x in states))
    assert not attention.outruns_sdpa(*(x.to("meta") for x in states))
    states[2].requires_grad_()
    assert not attention.outruns_sdpa(*states)
    with torch.no_grad():
        assert attention.outruns_sdpa(*states)
    monkeypatch.setattr(attention, "_SIMD", False)
    assert not attention.outruns_sdpa(*states)
