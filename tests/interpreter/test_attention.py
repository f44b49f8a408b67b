"""The attention kernels in Triton's interpreter, against float64. (Its bfloat16 products are wrong: see the GPU tests.)"""

import functools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from attention_cases import check_output, check_scores, draw, draw_mask, draw_packed, expected

from hiprune_kernels import reference
from hiprune_kernels.kernels import attention as launcher
from hiprune_kernels.kernels import paths, table
from hiprune_kernels.kernels.paths import LENDERS, PATHS, Problem
from hiprune_kernels.ops import attention as ops

OWN_PATHS = [path for path in PATHS if path not in LENDERS]
each_path = pytest.mark.parametrize("path", OWN_PATHS)
each_half = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def attend(
    query,
    key,
    value=None,
    *,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    key_mask=None,
    query_mask=None,
    scale=None,
    causal=False,
    per_head=False,
    path=None,
    architecture=90,
):
    """The launcher with the arguments of the public functions. Scores are means over the heads, unless per head."""
    tensors = (query, key, value, cu_seqlens_q, cu_seqlens_k, key_mask, query_mask)
    factor = 1.0 if per_head else 1 / query.shape[1]
    return launcher.attention(*tensors, scale, causal, per_head, factor, architecture=architecture, path=path)


def check(query, key, value, path=None, **options):
    """With and without output, against float64."""
    wanted = expected(query, key, value, **options)
    output, scores = attend(query, key, value, path=path, **options)
    check_output(output, wanted[0], query.dtype)
    check_scores(scores, wanted[1])
    no_output, scores = attend(query, key, path=path, **options)
    assert no_output is None
    check_scores(scores, wanted[1])


@each_half
@pytest.mark.parametrize("D", [1, 8, 16, 40, 64, 72, 80, 96, 128, 256])
def test_head_dimensions(D, dtype):
    path = OWN_PATHS[D // 8 % len(OWN_PATHS)]
    check(*draw(1, 2, 1, 20, 70, D, dtype=dtype), path=path)


@each_path
@pytest.mark.parametrize("dtype, N", [(torch.float16, n) for n in (1, 63, 64, 65, 128, 130)] + [(torch.float32, 33)])
def test_edges_of_blocks(N, dtype, path):
    check(*draw(1, 1, 1, max(1, N - 1), N, 16, dtype=dtype), path=path)


@each_path
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", ["key", "query", "both", ""])
@pytest.mark.parametrize("M, N", [(70, 100), (130, 66)])
def test_masks_and_causality(M, N, masked, causal, path):
    masks = {}
    if masked in ("key", "both"):
        masks["key_mask"] = draw_mask(2, N)
    if masked in ("query", "both"):
        masks["query_mask"] = draw_mask(2, M)
    check(*draw(2, 2, 1, M, N, 24, dtype=torch.float16), path=path, causal=causal, **masks)


@each_path
def test_a_causal_block_whose_last_key_begins_a_tile(path):
    check(*draw(1, 1, 1, 130, 131, 16, dtype=torch.float16), path=path, causal=True)


@each_path
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-30, 1.0])
def test_any_scale(scale, path):
    check(*draw(1, 2, 2, 30, 50, 40), path=path, scale=scale, key_mask=draw_mask(1, 50))


@each_path
@pytest.mark.parametrize("factor, scale", [(2.5e10, 1.0), (1e-36, 1e38), (1e-36, 3e38)])
def test_extreme_logits(factor, scale, path):
    """The largest is far ahead, in logits of 1e10 and with a scale that log2(e) times is no float32."""
    query = torch.full((1, 1, 1, 1), factor)
    key = torch.tensor([1.0, 0.5, -1.0, 0.9])[None, None, :, None]
    output, scores = attend(query, key, key, scale=scale, path=path)
    assert torch.equal(scores.isnan(), torch.zeros(1, 4, dtype=torch.bool))
    assert torch.equal(scores.round(), torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert output.round() == 1.0


@each_path
def test_large_logits(path):
    """Logits of some hundreds: exp2(logit - log-sum-exp) would be ten times as far off as PyTorch's softmax.

    The sweeps take Q K^T and K Q^T, which NumPy's product, here, rounds each in its own way.
    """
    query, key, value = draw(1, 1, 1, 40, 70, 32)
    query, key = 6 * query, 6 * key
    wanted = expected(query, key, value)
    eager = reference.attention_with_scores(query, key, value)
    slack = 1e-4 if path == "sweeps" else 2e-6
    for x, y, z in zip(attend(query, key, value, path=path), eager, wanted):
        assert (x - z).abs().max() <= 2 * (y - z).abs().max() + slack


@each_path
def test_per_head(path):
    query, key, value = draw(2, 4, 2, 70, 40, 16, dtype=torch.float16)
    masks = {"query_mask": draw_mask(2, 70)}
    scores = attend(query, key, value, per_head=True, path=path, **masks)[1]
    assert scores.shape == (2, 4, 40)
    check_scores(scores, expected(query, key, value, per_head=True, **masks)[1])


@each_path
@each_half
def test_any_strides(dtype, path):
    query, key, value = draw(2, 4, 2, 40, 70, 24, dtype=dtype)
    masks = {"key_mask": draw_mask(2, 70), "query_mask": draw_mask(2, 40)}
    wanted = attend(query, key, value, path=path, **masks)
    odd = torch.zeros(3, 40, 4, 31, dtype=dtype)[1:, :, :, 5:29].transpose(1, 2).copy_(query)
    spaced = torch.zeros(2, 2, 140, 24, dtype=dtype)[:, :, ::2].copy_(key)
    views = {
        "key_mask": torch.zeros(70, 2, dtype=torch.bool).t().copy_(masks["key_mask"]),
        "query_mask": torch.zeros(2, 80, dtype=torch.bool)[:, ::2].copy_(masks["query_mask"]),
    }
    for result in (
        attend(odd, spaced, value.contiguous(), path=path, **views),
        attend(query.contiguous(), key.contiguous(), value, path=path, **masks),
    ):
        assert torch.equal(result[0], wanted[0])
        assert torch.equal(result[1], wanted[1])
        assert result[0].transpose(1, 2).is_contiguous()
    broadcast = (query[:1, :1].expand(2, 4, -1, -1), key[:1].expand(2, -1, -1, -1), value[:, :1].expand(-1, 2, -1, -1))
    check(*broadcast, path=path)


# ---------------------------------------------------------------------------------------- rows without keys, NaN, empty


@each_path
def test_rows_without_keys_are_zero(path):
    query, key, value = draw(2, 2, 2, 90, 5, 8)
    value[:, :, 0] = math.nan  # a row that sees no key must not meet it
    output, scores = attend(query, key, value, causal=True, path=path)
    assert torch.equal(output[:, :, :85], torch.zeros(2, 2, 85, 8))
    assert output[:, :, 85:].isnan().all()
    check_scores(scores, expected(query, key, value, causal=True)[1])

    key_mask = torch.tensor([[False] * 5, [True] * 5])
    output, scores = attend(query, key, value.nan_to_num(), key_mask=key_mask, path=path)
    assert output[0].abs().sum() == 0
    assert scores[0].abs().sum() == 0
    assert (scores[1] > 0).all()


@each_path
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_nonfinite_queries_and_keys_reach_the_rows_that_see_them(causal, poison, path):
    query, key, value = (x.clone() for x in draw(2, 2, 2, 70, 80, 12, dtype=torch.float16))
    query[0, 0, 3], key[1, 1, 7] = poison, poison
    query_mask = torch.ones(2, 70, dtype=torch.bool)
    query_mask[0, 3] = False  # the poisoned query does not count
    options = {"causal": causal, "query_mask": query_mask}
    output = attend(query, key, value, path=path, **options)[0]
    scores = attend(query, key, value, per_head=True, path=path, **options)[1]
    wanted, wanted_scores = expected(query, key, value, per_head=True, **options)
    assert torch.equal(output.isnan(), wanted.isnan())
    finite = ~wanted.isnan()
    torch.testing.assert_close(output[finite].double(), wanted[finite], rtol=0, atol=2e-3)
    assert scores[1, 1, :11].isnan().all()
    check_scores(scores[0], wanted_scores[0])
    check_scores(scores[1, 0], wanted_scores[1, 0])
    key_mask = torch.arange(80).expand(2, -1) < 70
    scores = attend(query, key, path=path, key_mask=key_mask, **options)[1]
    assert torch.equal(scores[:, 70:], torch.zeros(2, 10))  # hidden keys, even in rows of NaN


@each_path
def test_nonfinite_values_reach_their_column(path):
    query, key, value = draw(1, 2, 2, 30, 70, 21)
    value[0, 1, 7, 20] = math.nan
    output, scores = attend(query, key, value, path=path)
    wanted = torch.zeros(1, 2, 30, 21, dtype=torch.bool)
    wanted[0, 1, :, 20] = True
    assert torch.equal(output.isnan(), wanted)
    assert scores.isfinite().all()


@each_path
def test_hidden_keys_are_never_read(path):
    query, key, value = (x.clone() for x in draw(2, 2, 2, 30, 70, 12))
    key_mask = draw_mask(2, 70)
    clean = attend(query, key, value, key_mask=key_mask, path=path)
    hidden = ~key_mask[:, None, :].expand(-1, 2, -1)
    key[hidden], value[hidden] = math.nan, math.inf
    poisoned = attend(query, key, value, key_mask=key_mask, path=path)
    assert torch.equal(clean[0], poisoned[0])
    assert torch.equal(clean[1], poisoned[1])
    assert poisoned[1][~key_mask].abs().sum() == 0


@pytest.mark.parametrize("B, M, N", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(B, M, N):
    query, key, value = draw(B, 2, 1, M, N, 8)
    output, scores = attend(query, key, value)
    assert torch.equal(output, torch.zeros(B, 2, M, 8))
    assert torch.equal(scores, torch.zeros(B, N))
    assert torch.equal(attend(query, key, per_head=True)[1], torch.zeros(B, 2, N))


# ---------------------------------------------------------------------------------------------------- packed sequences

LENGTHS_Q = (0, 5, 0, 65, 130, 7, 1, 64, 0)
LENGTHS_K = (0, 9, 4, 65, 33, 0, 1, 70, 0)


@each_half
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_packed(masked, causal, dtype):
    query, key, value, cu_q, cu_k = draw_packed(LENGTHS_Q, LENGTHS_K, 2, 1, 40, dtype=dtype)
    masks = {"key_mask": draw_mask(len(key)), "query_mask": draw_mask(len(query))} if masked else {}
    check(query, key, value, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=causal, **masks)


def test_packed_per_head_from_one_projection():
    query, key, value, cu, _ = draw_packed((40, 70, 3), (40, 70, 3), 2, 1, 80, dtype=torch.float16)
    scores = attend(query, key, value, cu_seqlens_q=cu, per_head=True)[1]
    assert scores.shape == (2, 113)
    check_scores(scores, expected(query, key, value, per_head=True, cu_seqlens_q=cu)[1])


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_packed_empty(lengths):
    query, key, value, cu, _ = draw_packed(lengths, lengths, 2, 1, 8)
    output, scores = attend(query, key, value, cu_seqlens_q=cu)
    assert output.shape == (0, 2, 8)
    assert scores.shape == (0,)


def test_packed_with_keys_on_one_side_only():
    query, key, value, cu_q, cu_k = draw_packed((0, 0), (3, 4), 2, 1, 8)
    output, scores = attend(query, key, value, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    assert output.shape == (0, 2, 8)
    assert torch.equal(scores, torch.zeros(7))
    output, scores = attend(key.expand(-1, 2, -1), query, query, cu_seqlens_q=cu_k, cu_seqlens_k=cu_q)
    assert torch.equal(output, torch.zeros(7, 2, 8))


@pytest.mark.parametrize("bounds", [(0, 5, 3, 100), (-9, 4, 4, 70), (2, 130, -60, 69), (70, 60, 50, 0)])
def test_bad_lengths_never_leave_the_tensors(monkeypatch, bounds):
    """NaN stands around the sequences: an offset that is not clamped brings it in."""
    around = torch.full((3 * 70, 1, 16), math.nan)
    around[70:140] = torch.randn(70, 1, 16)
    query = around[70:140]
    lengths = torch.tensor(bounds, dtype=torch.int32)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # rows that bad lengths leave out
    output, scores = attend(query, query, query, cu_seqlens_q=lengths, causal=True)
    assert output.isfinite().all()
    assert scores.isfinite().all()


# ------------------------------------------------------------------------------------------------------- the same bits


@each_path
def test_neighbours_in_the_batch_change_nothing(path):
    query, key, value = draw(3, 2, 1, 70, 100, 24, dtype=torch.float16)
    masks = {"key_mask": draw_mask(3, 100), "query_mask": draw_mask(3, 70)}
    together = attend(query, key, value, path=path, **masks)
    for b in range(3):
        alone = attend(
            *(x[b : b + 1] for x in (query, key, value)), path=path, **{n: m[b : b + 1] for n, m in masks.items()}
        )
        assert torch.equal(alone[0][0], together[0][b])
        assert torch.equal(alone[1][0], together[1][b])


def test_neighbours_in_the_pack_change_nothing():
    lengths = (5, 65, 0, 70, 1)
    query, key, value, cu, _ = draw_packed(lengths, lengths, 2, 1, 24, dtype=torch.float16)
    together = attend(query, key, value, cu_seqlens_q=cu, causal=True)
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        lone = torch.tensor([0, length], dtype=torch.int32)
        alone = attend(query[part], key[part], value[part], cu_seqlens_q=lone, causal=True)
        assert torch.equal(alone[0], together[0][part])
        assert torch.equal(alone[1], together[1][part])
        start += length


# ----------------------------------------------------------------------------------------------- the table, the launches


def problem_of(M, N, heads, D, dtype=torch.float16, packed=False, scale=None, causal=False, key_mask=None):
    """A call without data."""
    shapes = [(n, heads, D) if packed else (1, heads, n, D) for n in (M, N, N)]
    tensors = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta") if packed else None
    return Problem.of(*tensors, cu_seqlens, None, key_mask, None, scale, causal)


def test_shares_of_the_queries():
    """Few keys and many queries: several programs share the queries of one block of keys."""
    assert table.choose(problem_of(1100, 20, 1, 16), 90, "passes").splits == 2
    check(*draw(1, 1, 1, 1100, 20, 16, dtype=torch.float16), path="passes")
    check(*draw(1, 1, 1, 1100, 20, 16, dtype=torch.float16), path="passes", causal=True)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_borrowed_attention(monkeypatch, causal):
    """Another's output, and its natural LSE at any strides."""
    query, key, value = draw(2, 2, 2, 70, 70, 16, dtype=torch.float16)
    wanted = expected(query, key, value, causal=causal)

    def lender(query, key, value, scale, causal):
        logits = query.double() @ key.double().transpose(2, 3) * scale
        if causal:
            logits = logits.masked_fill(~torch.ones(70, 70, dtype=torch.bool).tril(), -math.inf)
        lse = torch.zeros(2, 3, 80)[:, 1:, :70]
        return wanted[0].to(query.dtype), lse.copy_(logits.logsumexp(-1))

    monkeypatch.setitem(PATHS, "flash", paths.behind(lender))
    output, scores = attend(query, key, value, causal=causal, query_mask=None, path="flash")
    check_output(output, wanted[0], torch.float16)
    check_scores(scores, wanted[1])


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("M, N", [(70, 100), (100, 70)])
def test_the_flash_attn_package(monkeypatch, M, N, causal):
    """[B, M, H, D], fewer key heads, the causal diagonal in the last corner; rows without keys have an LSE of inf."""
    query, key, value = draw(2, 4, 2, M, N, 16, dtype=torch.float16)

    def flash_attn_func(q, k, v, softmax_scale, causal, return_attn_probs):
        assert return_attn_probs and q.shape == (2, M, 4, 16) and k.shape == v.shape == (2, N, 2, 16)
        q, k, v = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(2, dim=1) for x in (k, v))
        visible = torch.ones(M, N, dtype=torch.bool).tril(N - M if causal else N)
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=softmax_scale).nan_to_num()
        logits = (q.double() @ k.double().transpose(2, 3) * softmax_scale).masked_fill(~visible, -math.inf)
        lse = torch.where(visible.any(1), logits.logsumexp(-1), math.inf)
        return output.transpose(1, 2).contiguous(), lse.float(), None

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func=flash_attn_func))
    wanted = expected(query, key, value, scale=0.4, causal=causal)
    output, scores = attend(query, key, value, scale=0.4, causal=causal, path="flash_attn")
    check_output(output, wanted[0], torch.float16)
    check_scores(scores, wanted[1])
    assert output.transpose(1, 2).is_contiguous()


def borrowed(architecture, *, keys=2048, D=64, **options):
    """Whose attention a call of 2048 queries borrows."""
    path = table.choose(problem_of(2048, keys, 16, D, **options), architecture).path
    return path if path in LENDERS else None


@pytest.mark.parametrize("scale, lent", [(None, True), (0.2, True), (0.0, False), (1e-31, False), (-0.2, False)])
def test_only_positive_scales_are_borrowed(scale, lent):
    assert borrowed(80, scale=scale) == ("flash" if lent else None)


def test_cudnn_is_borrowed_where_pytorch_lets_it(monkeypatch):
    asked = []

    def can_use(parameters):
        asked.append(parameters)
        return len(asked) > 1

    monkeypatch.setattr(paths, "can_use_cudnn_attention", can_use)
    assert borrowed(90) is None
    assert borrowed(90) == "cudnn"
    assert len(asked) == 2


@pytest.mark.parametrize(
    "D, flash, cudnn", [(32, True, False), (128, True, True), (256, True, False), (60, False, False)]
)
def test_head_dimensions_that_are_borrowed(monkeypatch, D, flash, cudnn):
    monkeypatch.setattr(paths, "can_use_cudnn_attention", lambda parameters: True)
    assert borrowed(90, D=D) == ("cudnn" if cudnn else None)
    assert borrowed(80, D=D) == ("flash" if flash else None)


@pytest.mark.parametrize(
    "call",
    [
        {"dtype": torch.float32},
        {"causal": True, "keys": 2100},
        {"key_mask": torch.ones(1, 2048, dtype=torch.bool, device="meta")},
    ],
    ids=["float32", "causal of unequal lengths", "masked"],
)
@pytest.mark.parametrize("architecture", [80, 90])
def test_what_is_never_borrowed(monkeypatch, architecture, call):
    monkeypatch.setattr(paths, "can_use_cudnn_attention", lambda parameters: True)
    assert borrowed(architecture) is not None
    assert borrowed(architecture, **call) is None


def test_scores_alone_are_never_borrowed(monkeypatch):
    monkeypatch.setattr(paths, "can_use_cudnn_attention", lambda parameters: True)
    problem = problem_of(577, 577, 16, 64)
    assert table.choose(problem, 90).path == "cudnn"
    assert table.choose(problem._replace(value=None), 90).path == "passes"


def test_every_path_has_a_row():
    assert {row.path for row in table.TABLE} == set(PATHS)
    for path in PATHS:
        assert table.choose(problem_of(70, 70, 2, 64), 90, path).path == path


def test_the_table(monkeypatch):
    def path(N, heads, D, dtype, architecture, M=None, lent=False, packed=False):
        monkeypatch.setattr(table, "lends", lambda path, problem: lent)
        return table.choose(problem_of(M or N, N, heads, D, dtype, packed), architecture).path

    half, full = torch.bfloat16, torch.float32
    assert path(50, 12, 64, half, 80) == "strip"
    assert path(50, 12, 80, half, 80) == "sweeps"  # 80 is no power of two
    assert path(198, 12, 64, half, 90) == "sweeps"
    assert path(50, 12, 64, full, 90) == "sweeps"
    assert path(577, 16, 64, half, 80) == "sweeps"
    assert path(577, 16, 64, half, 90) == "passes"
    assert path(50, 12, 64, half, 90, lent=True) == "strip"
    assert path(198, 12, 64, half, 90, lent=True) == "cudnn"
    assert path(198, 12, 40, half, 90, lent=True) == "sweeps"
    assert path(577, 16, 64, half, 90, lent=True) == "cudnn"
    assert path(577, 16, 72, full, 90) == "passes"
    assert path(577, 16, 72, full, 80) == "passes"  # sweeps are for head dimensions of up to 64 there
    assert path(4096, 16, 64, half, 90, M=1) == "passes"
    assert path(2048, 16, 64, half, 80) == "passes"
    assert path(577, 16, 64, half, 80, lent=True) == "sweeps"
    assert path(2048, 16, 64, half, 80, lent=True) == "flash"
    assert path(2048, 4, 64, half, 80, lent=True) == "passes"  # one image does not fill the GPU
    assert path(2048, 16, 64, half, 90, lent=True) == "cudnn"
    assert path(2048, 16, 64, half, 100, lent=True) == "passes"
    assert path(577, 16, 64, half, 100, lent=True) == "sweeps"
    assert path(50, 12, 64, half, 90, packed=True) == "passes"
    for D in range(1, 129):
        for M in (1, 64, 129, 577, 5000):
            blocks = table.choose(problem_of(M, 5000, 2, D), 90).attention
            assert blocks.block_m == 16 * blocks.warps  # chained products


def test_head_dimension_in_two_parts():
    known = {8: (16, 0), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 120: (128, 0), 256: (256, 0)}
    assert {D: paths.split_head_dim(D) for D in known} == known
    for D in range(1, 257):
        first, second = paths.split_head_dim(D)
        assert D <= first + second < 2 * max(D, 16)
        assert all(n == 0 or (n >= 16 and n & (n - 1) == 0) for n in (first, second))


@pytest.mark.parametrize("head_reduction", ["mean", "none"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_mean_over_queries(masked, causal, head_reduction):
    """What the CUDA implementation of the operator does around the launcher."""
    kernel = functools.partial(launcher.attention, architecture=90)
    options = {"scale": None, "causal": causal, "query_reduction": "mean"}
    query, key, _ = draw(2, 2, 1, 20, 30, 8)
    masks = {"key_mask": None, "query_mask": draw_mask(2, 20) if masked else None}
    per_head = "_per_head" if head_reduction == "none" else ""
    scores = ops._scores_of(kernel, query, key, None, None, *masks.values(), head_reduction=head_reduction, **options)
    wanted = getattr(reference, f"attention_scores{per_head}")(query.double(), key.double(), **masks, **options)
    check_scores(scores, wanted)

    query, key, _, cu_q, cu_k = draw_packed(LENGTHS_Q, LENGTHS_K, 2, 1, 8)
    masks["query_mask"] = draw_mask(len(query)) if masked else None
    tensors = (query, key, cu_q, cu_k, *masks.values())
    scores = ops._scores_of(kernel, *tensors, head_reduction=head_reduction, **options)
    packed = getattr(reference, f"attention_scores{per_head}_varlen")
    wanted = packed(query.double(), key.double(), cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **masks, **options)
    check_scores(scores, wanted)
