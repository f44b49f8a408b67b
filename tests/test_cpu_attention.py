"""The C++ CPU attention kernel against float64, for every instruction set that this processor has."""

from __future__ import annotations

import ctypes
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hiprune_kernels.ops.library import CPU_KERNELS
from hiprune_kernels.reference import attention_probabilities

pytestmark = pytest.mark.skipif(not CPU_KERNELS, reason="the C++ extension is not built")

SETS = torch.ops.hiprune._cpu_instruction_sets() if CPU_KERNELS else 1
ISAS = [isa for isa in range(SETS.bit_length()) if SETS >> isa & 1]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OUTPUT_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}

each_isa = pytest.mark.parametrize("isa", ISAS, ids=lambda isa: ["base", "avx2", "avx512", "avx512_bf16"][isa])


def attend(q, k, v, *, scale=None, causal=False, key_mask=None, query_mask=None, isa=-1, **options):
    """Output and scores of the dense operator; options: want_scores, per_head, score_scale."""
    options = {"want_scores": True, "per_head": True, "score_scale": 1.0} | options
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return torch.ops.hiprune._cpu_attention(q, k, v, key_mask, query_mask, scale, causal, isa=isa, **options)


def attend_varlen(q, k, v, cu_q, cu_k, *, causal=False, key_mask=None, query_mask=None, isa=-1, **options):
    options = {"want_scores": True, "per_head": True, "score_scale": 1.0} | options
    return torch.ops.hiprune._cpu_attention_varlen(
        q, k, v, cu_q, cu_k, key_mask, query_mask, q.shape[-1] ** -0.5, causal, isa=isa, **options
    )


def oracle(q, k, v, *, query_mask=None, **options):
    """Output and per-head scores in float64."""
    p = attention_probabilities(q.double(), k.double(), **options)
    output = p @ v.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    counted = p if query_mask is None else p * query_mask[:, None, :, None]
    return output, counted.sum(dim=2)


def draw(B, H, Hk, M, N, D, dtype=torch.float32, seed=0):
    """q, k, v as a model makes them: heads are a transposed view. Logits have a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, n, h, D, generator=generator) for n, h in ((M, H), (N, Hk), (N, Hk)))
    return tuple(x.to(dtype).transpose(1, 2) for x in (2 * q, k, v))


def draw_mask(*size, seed=1):
    return torch.rand(*size, generator=torch.Generator().manual_seed(seed)) > 0.4


def check(result, expected, dtype):
    output, scores = result
    assert output.dtype == dtype and scores.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected[0], rtol=0, atol=OUTPUT_TOLERANCE[dtype])
    torch.testing.assert_close(scores.double(), expected[1], rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and lose much where other processes keep the cores busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------- against float64

SHAPES = [  # B, Hq, Hk, M, N, D
    (2, 4, 2, 37, 53, 64),
    (1, 2, 2, 1, 1, 1),
    (1, 3, 1, 5, 200, 3),
    (2, 2, 2, 17, 17, 16),
    (1, 2, 1, 100, 70, 80),
    (1, 1, 1, 7, 129, 63),
    (1, 2, 2, 50, 97, 72),
    (3, 1, 1, 97, 13, 128),
    (1, 2, 2, 29, 31, 200),
    (1, 1, 1, 130, 1000, 256),
    (1, 2, 2, 577, 577, 64),
    (1, 1, 1, 13, 3001, 24),  # a strip of fewer rows than the largest
    (1, 1, 1, 7001, 9, 4),  # chunks of more rows than usual
]


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(shape, dtype, isa):
    q, k, v = draw(*shape, dtype)
    check(attend(q, k, v, isa=isa), oracle(q, k, v), dtype)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("M, N", [(100, 100), (40, 131), (131, 40), (300, 1), (1, 300), (200, 900)])
def test_masks_and_causality(M, N, masked, causal, dtype, isa):
    q, k, v = draw(2, 4, 2, M, N, 20, dtype)
    masks = {"key_mask": draw_mask(2, N), "query_mask": draw_mask(2, M)} if masked else {}
    check(attend(q, k, v, causal=causal, isa=isa, **masks), oracle(q, k, v, causal=causal, **masks), dtype)


@each_isa
@pytest.mark.parametrize("scale", [1.0, -0.3, 0.0, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_scale(dtype, scale, isa):
    q, k, v = draw(1, 2, 1, 45, 67, 9, dtype)
    check(attend(q, k, v, scale=scale, isa=isa), oracle(q, k, v, scale=scale), dtype)


@each_isa
def test_every_exponential_is_accurate(isa):
    k = torch.linspace(-20, 0, 5001).view(1, 1, -1, 1)
    scores = attend(torch.ones(1, 1, 1, 1), k, None, isa=isa)[1]  # of one query: its probabilities
    torch.testing.assert_close(scores.double(), k[..., 0].double().softmax(-1), rtol=1.5e-6, atol=0)


@each_isa
@pytest.mark.parametrize("magnitude", [1.0, -1.0])
def test_large_logits(magnitude, isa):
    q, k, v = draw(1, 1, 1, 30, 50, 32)
    q, k = q * 30, k * 30 + magnitude * 40  # logits of some thousands, most of them on one side of zero
    output, scores = attend(q, k, v, isa=isa)
    eager = attention_probabilities(q, k)
    expected_output, expected_scores = oracle(q, k, v)
    assert (scores - expected_scores).abs().max() <= 2 * (eager.sum(2) - expected_scores).abs().max() + 1e-6
    assert (output - expected_output).abs().max() <= 2 * (eager @ v - expected_output).abs().max() + 1e-6


EXTREMES = [  # the largest query, the largest key, scale
    (1e10, 1, 1.0),  # logits whose product with log2(e) is rounded by hundreds
    (6e4, 6e4, 1.0),
    (3e38, 1, 1.0),  # logits further apart than the largest float
    (1, 1, 1e30),
    (1, 1, -1e30),
    (1e-18, 1e-18, 3e38),  # |scale| log2(e) is infinite, the logits are not
    (1e19, 1e19, 1e-38),  # |scale| log2(e), a normal number still
    (1e19, 1e19, 1e-39),  # a subnormal one
    (1e19, 1e19, 0.0),
]


@each_isa
@pytest.mark.parametrize(
    "query, key, scale, dtype",
    [
        (*case, dtype)
        for case in EXTREMES
        for dtype in DTYPES
        if torch.tensor(case[:2]).to(dtype).log().isfinite().all()
    ],
)
def test_every_finite_logit(query, key, scale, dtype, isa):
    q = (torch.tensor([1.0, -0.5, 0.3]) * query).view(1, 1, 3, 1).to(dtype)
    k = (torch.linspace(-0.8, 1, 41) * key).view(1, 1, 41, 1).to(dtype)
    v = torch.randn(1, 1, 41, 1).to(dtype)
    assert (q.float() @ k.float().mT * scale).isfinite().all()
    check(attend(q, k, v, scale=scale, isa=isa), oracle(q, k, v, scale=scale), dtype)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, D", [(577, 64), (900, 80)])
def test_error_is_at_most_twice_that_of_pytorch(N, D, dtype, isa):
    q, k, v = draw(1, 4, 4, N, N, D, dtype)
    output, scores = attend(q, k, v, isa=isa)
    expected_output, expected_scores = oracle(q, k, v)

    def error(x, expected):
        return (x.double() - expected).square().mean().sqrt(), (x.double() - expected).abs().max()

    for ours, torchs in (
        (error(output, expected_output), error(F.scaled_dot_product_attention(q, k, v), expected_output)),
        (error(scores, expected_scores), error(attention_probabilities(q.float(), k.float()).sum(2), expected_scores)),
    ):
        assert ours[0] <= 2 * torchs[0] and ours[1] <= 2 * torchs[1]


# -------------------------------------------------------------------------------------------------- forms of the result


def test_heads_are_summed_and_scaled():
    q, k, v = draw(2, 6, 3, 40, 50, 16)
    per_head = attend(q, k, v)[1]
    total = attend(q, k, v, per_head=False, score_scale=1 / 6)[1]
    assert per_head.shape == (2, 6, 50) and total.shape == (2, 50)
    torch.testing.assert_close(total, per_head.mean(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(attend(q, k, v, score_scale=0.25)[1], per_head / 4, rtol=1e-6, atol=0)


def test_what_is_not_asked_for_is_empty_and_changes_nothing():
    q, k, v = draw(2, 4, 2, 40, 50, 16)
    output, scores = attend(q, k, v)
    only_scores = attend(q, k, None)
    only_output = attend(q, k, v, want_scores=False)
    assert only_scores[0].shape == (0,) and only_output[1].shape == (0,)
    assert torch.equal(only_scores[1], scores) and torch.equal(only_output[0], output)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_memory_order(dtype):
    q, k, v = draw(2, 4, 2, 40, 50, 16, dtype)
    output = attend(q, k, v)[0]
    assert output.shape == (2, 4, 40, 16) and output.transpose(1, 2).is_contiguous()


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, isa):
    q, k, v = draw(2, 4, 2, 40, 50, 18, dtype)
    key_mask, query_mask = draw_mask(2, 50), draw_mask(2, 40)
    expected = attend(q, k, v, key_mask=key_mask, query_mask=query_mask, isa=isa)
    wide = torch.zeros(3, 40, 4, 30, dtype=dtype)[1:, :, :, 5:23].transpose(1, 2).copy_(q)  # rows at odd offsets
    strided = torch.zeros(2, 2, 100, 18, dtype=dtype)[:, :, ::2].copy_(k)
    masks = {
        "key_mask": torch.zeros(50, 2, dtype=torch.bool).t().copy_(key_mask),
        "query_mask": torch.zeros(2, 80, dtype=torch.bool)[:, ::2].copy_(query_mask),
    }
    for q_like, k_like, v_like in ((q.contiguous(), k.contiguous(), v.contiguous()), (wide, strided, v.contiguous())):
        result = attend(q_like, k_like, v_like, isa=isa, **masks)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])

    broadcast = (q[:1, :1].expand(2, 4, -1, -1), k[:1].expand(2, -1, -1, -1), v[:, :1].expand(-1, 2, -1, -1))
    result, expected = attend(*broadcast, isa=isa), attend(*(x.contiguous() for x in broadcast), isa=isa)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


@pytest.mark.parametrize("B, M, N", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (2, 0, 0)])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_empty_inputs(B, M, N, masked):
    q, k, v = draw(B, 2, 1, M, N, 8)
    masks = {"key_mask": draw_mask(B, N), "query_mask": draw_mask(B, M)} if masked else {}
    output, scores = attend(q, k, v, per_head=False, **masks)
    assert torch.equal(output, torch.zeros(B, 2, M, 8)) and torch.equal(scores, torch.zeros(B, N))
    assert torch.equal(attend(q, k, v, **masks)[1], torch.zeros(B, 2, N))


@each_isa
def test_rows_without_keys_are_zero(isa):
    q, k, v = draw(2, 2, 2, 20, 5, 8)
    v = v.clone()
    v[:, :, 0] = math.nan  # a row that sees no key must not meet it
    output, scores = attend(q, k, v, causal=True, isa=isa)
    assert torch.equal(output[:, :, :15], torch.zeros(2, 2, 15, 8)) and output[:, :, 15:].isnan().all()
    torch.testing.assert_close(scores, oracle(q, k, v, causal=True)[1].float(), rtol=1e-5, atol=1e-6)

    key_mask = torch.tensor([[False] * 5, [True] * 5])
    output, scores = attend(q, k, v, key_mask=key_mask, isa=isa)
    assert output[0].abs().sum() == 0 and scores[0].abs().sum() == 0 and (scores[1] > 0).all()


# ----------------------------------------------------------------------------------------------------- NaN and infinity


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nonfinite_queries_and_keys_reach_the_rows_that_see_them(poison, dtype, isa):
    q, k, v = (x.clone() for x in draw(2, 2, 2, 30, 40, 12, dtype))
    q[0, 0, 3], k[1, 1, 7] = poison, poison
    query_mask = torch.ones(2, 30, dtype=torch.bool)
    query_mask[0, 3] = False
    for causal in (False, True):
        output, scores = attend(q, k, v, causal=causal, query_mask=query_mask, isa=isa)
        expected_output, expected_scores = oracle(q, k, v, causal=causal)
        assert torch.equal(output.isnan(), expected_output.isnan())
        assert scores[0].isfinite().all()  # the poisoned query does not count
        assert scores[1, 0].isfinite().all() and scores[1, 1, :11].isnan().all()
        finite = ~expected_output.isnan()
        torch.testing.assert_close(
            output[finite].double(), expected_output[finite], rtol=0, atol=OUTPUT_TOLERANCE[dtype]
        )
        torch.testing.assert_close(scores[1, 0].double(), expected_scores[1, 0], rtol=1e-5, atol=1e-6)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nonfinite_values_reach_their_column(dtype, isa):
    q, k, v = (x.clone() for x in draw(1, 2, 2, 30, 40, 21, dtype))
    v[0, 1, 7, 20] = math.nan
    output, scores = attend(q, k, v, isa=isa)
    expected = torch.zeros(1, 2, 30, 21, dtype=torch.bool)
    expected[0, 1, :, 20] = True
    assert torch.equal(output.isnan(), expected) and scores.isfinite().all()


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_keys_are_never_read(dtype, isa):
    q, k, v = (x.clone() for x in draw(2, 2, 2, 30, 40, 12, dtype))
    key_mask = draw_mask(2, 40)
    clean = attend(q, k, v, key_mask=key_mask, isa=isa)
    hidden = ~key_mask[:, None, :].expand(-1, 2, -1)
    k[hidden], v[hidden] = math.nan, math.inf
    poisoned = attend(q, k, v, key_mask=key_mask, isa=isa)
    assert torch.equal(clean[0], poisoned[0]) and torch.equal(clean[1], poisoned[1])
    assert poisoned[1][hidden].abs().sum() == 0


@each_isa
def test_nan_payloads_stay_nan(isa):
    q, k, v = (x.contiguous() for x in draw(1, 1, 1, 30, 40, 16))
    patterns = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00001, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    for pattern in patterns:
        k[0, 0, 5, 3] = pattern
        output, scores = attend(q, k, v, isa=isa)
        assert output.isnan().all() and scores.isnan().all()
    half = torch.tensor(0x7FFF, dtype=torch.int16).view(torch.bfloat16)
    q, k, v = draw(1, 1, 1, 30, 40, 16, torch.bfloat16)
    assert attend(q, k, torch.full_like(v, half.item()), isa=isa)[0].isnan().all()


# ------------------------------------------------------------------------------------------------------- packed batches

LENGTHS = [(0, 0), (5, 9), (0, 4), (65, 65), (130, 33), (7, 0), (1, 1), (64, 300), (0, 0)]


def bounds(lengths, dtype=torch.int32):
    return torch.tensor([0, *lengths]).cumsum(0).to(dtype)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_varlen_is_dense_attention_of_every_segment(masked, causal, dtype, isa):
    cu_q, cu_k = bounds([m for m, _ in LENGTHS]), bounds([n for _, n in LENGTHS], torch.int64)
    Tq, Tk = int(cu_q[-1]), int(cu_k[-1])
    q, k, v = (x[0].transpose(0, 1) for x in draw(1, 4, 2, Tq, Tk, 20, dtype))
    masks = {"key_mask": draw_mask(Tk), "query_mask": draw_mask(Tq)} if masked else {}
    output, scores = attend_varlen(q, k, v, cu_q, cu_k, causal=causal, isa=isa, **masks)
    assert output.shape == (Tq, 4, 20) and output.is_contiguous() and scores.shape == (4, Tk)
    for s in range(len(LENGTHS)):
        rows, keys = slice(cu_q[s], cu_q[s + 1]), slice(cu_k[s], cu_k[s + 1])
        dense = [x[None].transpose(1, 2) for x in (q[rows], k[keys], v[keys])]
        masks_s = {name: mask[None, keys if name == "key_mask" else rows] for name, mask in masks.items()}
        expected = attend(*dense, causal=causal, isa=isa, **masks_s)
        check(expected, oracle(*dense, causal=causal, **masks_s), dtype)
        assert torch.equal(output[rows], expected[0][0].transpose(0, 1))
        assert torch.equal(scores[:, keys], expected[1][0])
    total = attend_varlen(q, k, None, cu_q, cu_k, causal=causal, isa=isa, per_head=False, score_scale=0.25, **masks)
    assert total[0].shape == (0,)
    torch.testing.assert_close(total[1], scores.mean(0), rtol=1e-6, atol=1e-12)


def test_varlen_of_nothing():
    q, k = torch.zeros(0, 2, 8), torch.zeros(3, 2, 8)
    zero = torch.tensor([0], dtype=torch.int32)
    output, scores = attend_varlen(q, k[:0], k[:0], zero, zero)
    assert output.shape == (0, 2, 8) and scores.shape == (2, 0)
    output, scores = attend_varlen(q, k, k, bounds([0]), bounds([3]), per_head=False)
    assert output.shape == (0, 2, 8) and torch.equal(scores, torch.zeros(3))


# -------------------------------------------------------------------------------------------------------- same bits


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_threads_and_repeats_give_the_same_bits(per_head, dtype, isa):
    q, k, v = draw(1, 16, 16, 300, 577, 64, dtype)  # more packed panels than one group of heads may take
    results = []
    for threads in (1, 2, 2, 5):
        torch.set_num_threads(threads)
        results.append(attend(q, k, v, per_head=per_head, isa=isa))
    for output, scores in results[1:]:
        assert torch.equal(output, results[0][0]) and torch.equal(scores, results[0][1])


@each_isa
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_batch_neighbours_change_nothing(causal, dtype, isa):
    q, k, v = draw(5, 4, 2, 100, 577, 64, dtype)
    key_mask = draw_mask(5, 577)
    output, scores = attend(q, k, v, key_mask=key_mask, causal=causal, per_head=False, isa=isa)
    for b in range(5):
        one = attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], key_mask=key_mask[b : b + 1], causal=causal,
                     per_head=False, isa=isa)  # fmt: skip
        assert torch.equal(one[0][0], output[b]) and torch.equal(one[1][0], scores[b])


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extra_memory(dtype):
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def resident(name):  # MiB
        return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1]) / 1024

    torch.set_num_threads(2)
    q, k, v = draw(1, 16, 16, 4096, 4096, 80, dtype)
    attend(*(x[:, :, :64] for x in (q, k, v)))
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the peak starts anew
    before = resident("VmRSS")
    output, _ = attend(q, k, v, per_head=False)
    extra = resident("VmHWM") - before - output.nbytes / 2**20
    assert resident("VmRSS") - before > output.nbytes / 2**20 / 2  # the measure sees the output at least
    assert extra <= 10


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "values, message",
    [
        ([1, 4], "first value to be 0, got 1"),
        ([0, 3], "last value to be 4, the number of rows, got 3"),
        ([0, 5], "last value to be 4, the number of rows, got 5"),
        ([0, 3, 2, 4], "never decrease, got 3 and then 2"),
        ([], r"tensor \[S \+ 1\]"),
    ],
)
@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_bad_cu_seqlens(name, values, message):
    x = torch.zeros(4, 1, 8)
    both = {"cu_seqlens_q": bounds([4]), "cu_seqlens_k": bounds([4]), name: torch.tensor(values, dtype=torch.int32)}
    with pytest.raises(RuntimeError, match=f"{name}: expected .*{message}"):
        attend_varlen(x, x, x, *both.values())


def test_cu_seqlens_of_different_lengths():
    x = torch.zeros(4, 1, 8)
    with pytest.raises(RuntimeError, match="cu_seqlens_k: expected 2 values, as many as cu_seqlens_q has, got 3"):
        attend_varlen(x, x, x, bounds([4]), bounds([2, 2]))
    with pytest.raises(RuntimeError, match="cu_seqlens_q: expected an int32 or int64 tensor"):
        attend_varlen(x, x, x, bounds([4]).float(), bounds([4]))


Q = torch.zeros(1, 4, 5, 8)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((Q[0], Q, Q), "query: expected 4 dimensions .* got 3"),
        ((Q, Q[0], Q), "key: expected 4 dimensions, got 3"),
        ((Q.double(), Q.double(), Q.double()), "query: expected float32, bfloat16 or float16"),
        ((Q, Q.half(), Q), "key: expected the dtype of query"),
        ((Q, Q[:, :3], Q[:, :3]), "query: expected a multiple of key's 3 heads, got 4"),
        ((Q, Q[:, :0], Q[:, :0]), "query: expected a multiple of key's 0 heads, got 4"),
        ((Q, Q[..., :4], Q), "key: expected size 8 in dimension 3, got 4"),
        ((Q, Q, Q[:, :, :4]), "value: expected size 5 in dimension 2, got 4"),
        ((Q, Q.expand(2, -1, -1, -1), Q.expand(2, -1, -1, -1)), "key: expected size 1 in dimension 0, got 2"),
        ((Q.mT.contiguous().mT, Q, Q), "query: expected a contiguous last dimension, got stride 5"),
        ((torch.zeros(1, 1, 2, 257),) * 3, "query: expected a head dimension of 1 to 256, got 257"),
        ((Q[..., :0],) * 3, "query: expected a head dimension of 1 to 256, got 0"),
    ],
)
def test_bad_tensors(arguments, message):
    with pytest.raises(RuntimeError, match=message):
        attend(*arguments, scale=1.0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"key_mask": torch.ones(1, 5)}, "key_mask: expected a bool tensor"),
        ({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, "key_mask: expected size 5 in dimension 1, got 4"),
        ({"query_mask": torch.ones(5, dtype=torch.bool)}, "query_mask: expected 2 dimensions, got 1"),
        ({"isa": 4}, "isa: expected .* got 4"),
        ({"isa": -2}, "isa: expected .* got -2"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(RuntimeError, match=message):
        attend(Q, Q, Q, **options)


def test_a_last_dimension_of_one_may_have_any_stride():
    x = torch.ones(1, 1, 5, 2)[..., :1].as_strided((1, 1, 5, 1), (10, 10, 2, 7))
    output, scores = attend(x, x, x)
    assert torch.equal(output, torch.ones(1, 1, 5, 1))
    torch.testing.assert_close(scores, torch.ones(1, 1, 5))
