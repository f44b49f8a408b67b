"""The Triton attention kernels on a GPU, through the public operators and path by path, against float64."""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from attention_cases import check_output, check_scores, draw, draw_mask, draw_packed, expected
from torch.library import opcheck

import hiprune_kernels as hk
from hiprune_kernels import reference
from hiprune_kernels.ops.attention import cuda_kernel_gap
from hiprune_kernels.ops.library import kernel_status

launcher = pytest.importorskip("hiprune_kernels.kernels.attention", reason="Triton is not installed")
paths = pytest.importorskip("hiprune_kernels.kernels.paths")

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OWN_PATHS = [path for path in paths.PATHS if path not in paths.LENDERS]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
each_path = pytest.mark.parametrize("path", OWN_PATHS)
CUDA = {"device": "cuda"}

SHAPES = [  # B, Hq, Hk, M, N, D
    (4, 12, 12, 50, 50, 64),
    (2, 12, 12, 198, 198, 64),
    (3, 16, 16, 577, 577, 64),
    (2, 16, 16, 729, 729, 72),
    (1, 16, 16, 2048, 2048, 64),
    (1, 16, 4, 1500, 1500, 80),
    (1, 8, 2, 1100, 1300, 128),
    (2, 4, 2, 300, 1100, 96),
    (1, 2, 1, 1, 577, 64),
    (1, 2, 2, 1, 3000, 64),
    (1, 4, 4, 9000, 40, 64),
    (1, 4, 2, 200, 333, 256),
    (1, 2, 2, 129, 255, 33),
    (2, 3, 3, 17, 5, 8),
    (1, 1, 1, 1, 1, 1),
]


def attend(query, key, value=None, *, path=None, per_head=False, **options):
    """One path of the launcher, with the arguments of the public functions."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "key_mask", "query_mask")
    tensors = (query, key, value, *(options.get(name) for name in names))
    major, minor = torch.cuda.get_device_capability()
    factor = 1.0 if per_head else 1 / query.shape[1]
    settings = (options.get("scale"), options.get("causal", False), per_head, factor)
    return launcher.attention(*tensors, *settings, architecture=10 * major + minor, path=path)


def same_bits(result, wanted):
    return all(torch.equal(x, y) for x, y in zip(result, wanted))


def check_public(query, key, value, **options):
    """All three operators of one call."""
    packed = "_varlen" if "cu_seqlens_q" in options else ""
    assert cuda_kernel_gap(query, key, value) == ""
    wanted, wanted_scores = expected(query, key, value, **options)
    output, scores = getattr(hk, "attention_with_scores" + packed)(query, key, value, **options)
    check_output(output, wanted, query.dtype)
    check_scores(scores, wanted_scores)
    assert packed or output.transpose(1, 2).is_contiguous()
    double = query.double(), key.double()
    for name in ("attention_scores", "attention_scores_per_head"):
        for reduction in ("sum", "mean"):
            scores = getattr(hk, name + packed)(query, key, query_reduction=reduction, **options)
            wanted_scores = getattr(reference, name + packed)(*double, query_reduction=reduction, **options)
            check_scores(scores, wanted_scores)


# ------------------------------------------------------------------------------------------------------ against float64


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, dtype):
    check_public(*draw(*shape, dtype=dtype, **CUDA))


@each_dtype
@pytest.mark.parametrize("path", paths.PATHS)
@pytest.mark.parametrize("N, D", [(50, 64), (198, 64), (256, 80), (577, 64), (729, 72), (1030, 128)])
def test_paths(N, D, path, dtype):
    if path == "strip" and N > 256:
        pytest.skip("a strip holds 256 keys")
    if path == "strip" and dtype == torch.float32 and D > 64:
        pytest.skip("more shared memory than there is; the table gives float32 no strip")
    if path in paths.LENDERS and dtype == torch.float32:
        pytest.skip("borrowed attention takes half precision only")
    query, key, value = draw(2, 4, 4, N, N, D, dtype=dtype, **CUDA)
    try:
        output, scores = attend(query, key, value, path=path)
    except (RuntimeError, ImportError) as error:
        if path in OWN_PATHS:
            raise
        pytest.skip(f"not available here: {error}")
    wanted = expected(query, key, value)
    check_output(output, wanted[0], dtype)
    check_scores(scores, wanted[1])
    assert output.transpose(1, 2).is_contiguous()


@each_path
@each_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", ["", "key", "query", "both"])
@pytest.mark.parametrize("M, N", [(70, 200), (200, 70), (150, 150)])
def test_masks_and_causality(M, N, masked, causal, dtype, path):
    query, key, value = draw(2, 4, 2, M, N, 40, dtype=dtype, **CUDA)
    masks = {}
    if masked in ("key", "both"):
        masks["key_mask"] = draw_mask(2, N, **CUDA)
    if masked in ("query", "both"):
        masks["query_mask"] = draw_mask(2, M, **CUDA)
    wanted = expected(query, key, value, causal=causal, **masks)
    output, scores = attend(query, key, value, path=path, causal=causal, **masks)
    check_output(output, wanted[0], dtype)
    check_scores(scores, wanted[1])
    check_scores(attend(query, key, path=path, causal=causal, **masks)[1], wanted[1])


@pytest.mark.parametrize("seed", range(6))
def test_random_calls(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(6):
        D, dtype = rng.choice([4, 16, 40, 64, 72, 80, 96, 128, 160, 256]), rng.choice(DTYPES)
        B, Hk, group = rng.randint(1, 3), rng.randint(1, 3), rng.choice([1, 1, 2, 4])
        M, N = (rng.choice([1, 15, 64, 65, 129, 250, 600, 1100]) for _ in range(2))
        options = {"causal": rng.random() < 0.4, "scale": rng.choice([None, None, 0.05, -0.1])}
        if rng.random() < 0.4:
            options["key_mask"] = draw_mask(B, N, **CUDA)
        if rng.random() < 0.4:
            options["query_mask"] = draw_mask(B, M, **CUDA)
        query, key, value = draw(B, Hk * group, Hk, M, N, D, dtype=dtype, **CUDA)
        if rng.random() < 0.5:  # other strides: contiguous, and rows of a wider tensor at odd offsets
            wide = torch.zeros(B, Hk, 2 * N, D + 3, dtype=dtype, **CUDA)[:, :, ::2, 3:].copy_(key)
            query, key = query.contiguous(), wide
        check_public(query, key, value, **options)


LENGTHS_Q = (0, 5, 0, 65, 130, 7, 1, 300, 0, 1000)
LENGTHS_K = (0, 9, 4, 65, 33, 0, 1, 257, 0, 1100)


@each_dtype
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("D", [64, 80])
def test_packed(D, masked, causal, dtype):
    query, key, value, cu_q, cu_k = draw_packed(LENGTHS_Q, LENGTHS_K, 4, 2, D, dtype=dtype, **CUDA)
    options = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "causal": causal}
    if masked:
        options |= {"key_mask": draw_mask(len(key), **CUDA), "query_mask": draw_mask(len(query), **CUDA)}
    check_public(query, key, value, **options)


@each_dtype
def test_windows_of_one_projection(dtype):
    lengths = (64,) * 40 + (16, 48)
    query, key, value, cu, _ = draw_packed(lengths, lengths, 16, 16, 80, dtype=dtype, **CUDA)
    check_public(query, key, value, cu_seqlens_q=cu, max_seqlen_q=64)


@each_dtype
@pytest.mark.parametrize("N, D", [(577, 64), (1500, 80)])
def test_error_is_at_most_twice_that_of_pytorch(N, D, dtype):
    query, key, value = draw(1, 8, 8, N, N, D, dtype=dtype, **CUDA)
    wanted = expected(query, key, value)
    torchs = F.scaled_dot_product_attention(query, key, value)
    eager = reference.attention_probabilities(query.float(), key.float()).sum(2).mean(1)
    result = hk.attention_with_scores(query, key, value)
    for x, y, z in zip(result, (torchs, eager), wanted):
        ours, theirs = (x.double() - z).square().mean().sqrt(), (y.double() - z).square().mean().sqrt()
        assert ours <= 2 * theirs + 1e-7


# ------------------------------------------------------------------------------------------------- special rows and keys


@each_path
@each_dtype
def test_rows_without_keys_are_zero(dtype, path):
    query, key, value = draw(2, 2, 2, 90, 5, 8, dtype=dtype, **CUDA)
    value[:, :, 0] = math.nan
    output, scores = attend(query, key, value, causal=True, path=path)
    assert (output[:, :, :85] == 0).all()
    assert output[:, :, 85:].isnan().all()
    check_scores(scores, expected(query, key, value, causal=True)[1])
    key_mask = torch.tensor([[False] * 5, [True] * 5], **CUDA)
    output, scores = attend(query, key, value.nan_to_num(), key_mask=key_mask, path=path)
    assert (output[0] == 0).all()
    assert (scores[0] == 0).all()
    assert (scores[1] > 0).all()


@each_path
@each_dtype
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nonfinite_rows_stay_where_they_belong(poison, dtype, path):
    query, key, value = draw(2, 2, 2, 70, 150, 16, dtype=dtype, **CUDA)
    query[0, 0, 3], key[1, 1, 7] = poison, poison
    query_mask = torch.ones(2, 70, dtype=torch.bool, **CUDA)
    query_mask[0, 3] = False
    output = attend(query, key, value, query_mask=query_mask, path=path)[0]
    scores = attend(query, key, query_mask=query_mask, per_head=True, path=path)[1]
    wanted, wanted_scores = expected(query, key, value, per_head=True, query_mask=query_mask)
    assert torch.equal(output.isnan(), wanted.isnan())
    assert scores[1, 1].isnan().all()
    check_scores(scores[0], wanted_scores[0])
    check_scores(scores[1, 0], wanted_scores[1, 0])


@each_path
@each_dtype
def test_hidden_keys_are_never_read(dtype, path):
    query, key, value = draw(2, 2, 2, 70, 150, 24, dtype=dtype, **CUDA)
    key_mask = draw_mask(2, 150, **CUDA)
    clean = attend(query, key, value, key_mask=key_mask, path=path)
    hidden = ~key_mask[:, None, :].expand(-1, 2, -1)
    key[hidden], value[hidden] = math.nan, math.inf
    assert same_bits(attend(query, key, value, key_mask=key_mask, path=path), clean)


@pytest.mark.parametrize("B, M, N", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(B, M, N):
    query, key, value = draw(B, 2, 1, M, N, 8, dtype=torch.bfloat16, **CUDA)
    output, scores = hk.attention_with_scores(query, key, value)
    assert output.shape == (B, 2, M, 8)
    assert (output == 0).all()
    assert torch.equal(scores, torch.zeros(B, N, **CUDA))
    for reduction in ("sum", "mean"):
        assert torch.equal(hk.attention_scores(query, key, query_reduction=reduction), torch.zeros(B, N, **CUDA))


@pytest.mark.parametrize("bounds", [(0, 5, 3, 100), (-9, 4, 4, 70), (2, 130, -60, 69), (70, 60, 50, 0)])
def test_bad_lengths_never_leave_the_tensors(monkeypatch, bounds):
    around = torch.full((3 * 70, 1, 16), math.nan, dtype=torch.bfloat16, **CUDA)
    around[70:140] = torch.randn(70, 1, 16, **CUDA)
    query = around[70:140]
    lengths = torch.tensor(bounds, dtype=torch.int32, **CUDA)
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)  # rows that bad lengths leave out
    output, scores = attend(query, query, query, cu_seqlens_q=lengths)
    assert output.isfinite().all()
    assert scores.isfinite().all()
    means = hk.attention_scores_varlen(query, query, cu_seqlens_q=lengths, query_reduction="mean", causal=True)
    assert means.isfinite().all()


def test_offsets_beyond_32_bits():
    needed = 2**31 + 2**24
    if torch.cuda.mem_get_info()[0] < 3 * needed:
        pytest.skip("less than 13 GB of free memory")
    base = torch.zeros(needed, dtype=torch.bfloat16, **CUDA)
    query, key, value = (base[i:].as_strided((1, 2, 300, 64), (0, 2**31, 64, 1)) for i in (0, 2**20, 2**21))
    for x, y in zip((query, key, value), draw(1, 2, 2, 300, 300, 64, dtype=torch.bfloat16, **CUDA)):
        x.copy_(y)
    for path in OWN_PATHS:
        if path == "strip":
            continue  # 300 keys
        wanted = expected(query, key, value)
        output, scores = attend(query, key, value, path=path)
        check_output(output, wanted[0], torch.bfloat16)
        check_scores(scores, wanted[1])
    rows = base.as_strided((600, 1, 16), (3_579_152, 16, 1)).copy_(torch.randn(600, 1, 16, **CUDA))
    cu = torch.tensor([0, 100, 600], dtype=torch.int32, **CUDA)
    assert rows.stride(0) * 600 > 2**31
    check_public(rows, rows, rows, cu_seqlens_q=cu)


# ------------------------------------------------------------------------------------------------------- the same bits

PATH_CASES = [(path, 198 if path == "strip" else 577) for path in OWN_PATHS]


@each_dtype
@pytest.mark.parametrize("path, N", PATH_CASES)
def test_twenty_runs_give_the_same_bits(path, N, dtype):
    query, key, value = draw(4, 16, 16, N, N, 64, dtype=dtype, **CUDA)
    first = attend(query, key, value, path=path)
    assert all(same_bits(attend(query, key, value, path=path), first) for _ in range(19))


@each_dtype
@pytest.mark.parametrize("path, N", [*PATH_CASES, ("flash", 2048), ("cudnn", 577), ("cudnn", 2048)])
def test_neighbours_in_the_batch_change_nothing(path, N, dtype):
    if path in paths.LENDERS and dtype == torch.float32:
        pytest.skip("borrowed attention takes half precision only")
    if path == "cudnn" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("cuDNN's attention is borrowed on Hopper only")
    query, key, value = draw(9, 16, 16, N, N, 64, dtype=dtype, **CUDA)
    together = attend(query, key, value, path=path)
    for b in (0, 4, 8):
        alone = attend(*(x[b : b + 1] for x in (query, key, value)), path=path)
        assert same_bits(alone, (x[b : b + 1] for x in together))


@each_dtype
def test_neighbours_in_the_pack_change_nothing(dtype):
    lengths = (5, 577, 0, 70, 1, 1200)
    query, key, value, cu, _ = draw_packed(lengths, lengths, 4, 2, 80, dtype=dtype, **CUDA)
    together = attend(query, key, value, cu_seqlens_q=cu)
    assert all(same_bits(attend(query, key, value, cu_seqlens_q=cu), together) for _ in range(19))
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        lone = torch.tensor([0, length], dtype=torch.int32, **CUDA)
        alone = attend(query[part], key[part], value[part], cu_seqlens_q=lone)
        assert same_bits(alone, (x[part] for x in together))
        start += length


# ------------------------------------------------------------------------------------------- PyTorch around the kernels


def operators(query, key, value, packed):
    """Every operator, dense and packed, as one tuple."""
    q, k, v, cu = packed
    return (
        *hk.attention_with_scores(query, key, value),
        hk.attention_scores(query, key, query_reduction="mean", causal=True),
        hk.attention_scores_per_head(query[:, :, :1], key),
        *hk.attention_with_scores_varlen(q, k, v, cu_seqlens_q=cu),
        hk.attention_scores_varlen(q, k, cu_seqlens_q=cu, query_reduction="mean", causal=True),
    )


def draw_operators(**options):
    lengths = (100, 30, 0, 257)
    return (
        *draw(2, 4, 4, 300, 300, 64, **options, **CUDA),
        draw_packed(lengths, lengths, 4, 2, 80, **options, **CUDA)[:4],
    )


def test_captured_in_a_cuda_graph():
    inputs, others = (draw_operators(dtype=torch.bfloat16) for _ in range(2))
    operators(*inputs)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = operators(*inputs)
    for x, y in zip((*inputs[:3], *inputs[3]), (*others[:3], *others[3])):
        x.copy_(y)
    graph.replay()
    assert same_bits(captured, operators(*others))


def test_nothing_waits_for_the_host():
    inputs = draw_operators(dtype=torch.bfloat16)
    operators(*inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        operators(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_runs_on_the_current_stream():
    inputs = draw_operators(dtype=torch.bfloat16)
    wanted = operators(*inputs)
    late = [torch.zeros_like(x) for x in (*inputs[:3], *inputs[3])]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # on another stream the kernels would meet zeros
        for x, y in zip(late, (*inputs[:3], *inputs[3])):
            x.copy_(y)
        result = operators(*late[:3], late[3:])
    stream.synchronize()
    assert same_bits(result, wanted)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_runs_on_the_device_of_its_tensors():
    inputs = draw_operators(dtype=torch.bfloat16)
    there = [x.to("cuda:1") for x in (*inputs[:3], *inputs[3])]
    result = operators(*there[:3], there[3:])
    assert same_bits((x.to("cuda:0") for x in result), operators(*inputs))


def test_compiled():
    inputs = draw_operators(dtype=torch.bfloat16)
    compiled = torch.compile(operators, fullgraph=True)
    assert same_bits(compiled(*inputs), operators(*inputs))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    query, key, value = (x.requires_grad_(requires_grad) for x in draw(2, 4, 2, 20, 33, 16, **CUDA))
    masks = {"key_mask": draw_mask(2, 33, **CUDA), "query_mask": draw_mask(2, 20, **CUDA)}
    options = {"max_seqlen_q": None, "scale": None, "causal": True}
    tensors = (None, None, *masks.values())
    opcheck(torch.ops.hiprune.attention_with_scores.default, (query, key, value, *tensors), options)
    options |= {"query_reduction": "mean", "head_reduction": "none"}
    opcheck(torch.ops.hiprune.attention_scores.default, (query, key, *tensors), options)


@each_dtype
def test_gradients(dtype):
    query, key, value = (x.detach().requires_grad_() for x in draw(2, 4, 2, 70, 90, 64, dtype=dtype, **CUDA))
    grad = torch.randn(2, 4, 70, 64, **CUDA).to(dtype)
    output, scores = hk.attention_with_scores(query, key, value)
    assert not scores.requires_grad
    double = [x.detach().double().requires_grad_() for x in (query, key, value)]
    wanted = torch.autograd.grad(reference.attention_with_scores(*double)[0], double, grad.double())
    for x, y in zip(torch.autograd.grad(output, (query, key, value), grad), wanted):
        assert (x.double() - y).norm() <= {torch.float32: 1e-3}.get(dtype, 2e-2) * y.norm()


def test_what_the_kernels_do_not_cover_goes_to_the_reference():
    query, key, value = draw(1, 2, 2, 20, 30, 16, **CUDA)
    transposed = torch.randn(1, 2, 16, 30, **CUDA).transpose(2, 3)
    wide = torch.randn(1, 2, 20, 300, **CUDA)
    assert cuda_kernel_gap(query.double(), key.double()) == "float64"
    assert cuda_kernel_gap(wide, wide) == "a head dimension of 300, above 256"
    assert cuda_kernel_gap(query, transposed) == "a last dimension that is not contiguous"
    assert cuda_kernel_gap(query, key, head_reduction="max") == 'the reduction "max"'
    far = torch.empty(1, dtype=torch.float32, **CUDA).as_strided((1, 1, 1, 1), (1, 1, 2**23, 1))
    assert "2**23" in cuda_kernel_gap(far, far)
    torch.testing.assert_close(
        hk.attention_with_scores(*(x.double() for x in (query, key, value))), expected(query, key, value)
    )
    check_scores(hk.attention_scores(query, transposed), expected(query, transposed, transposed)[1])
    wanted = reference.attention_scores(query.double(), key.double(), head_reduction="max")
    check_scores(hk.attention_scores(query, key, head_reduction="max"), wanted)


def test_status_and_mixed_devices():
    assert any(line[:3] == ("cuda", "attention", "Triton") for line in kernel_status())
    query, key, value = draw(1, 2, 2, 20, 30, 16, **CUDA)
    with pytest.raises(ValueError, match="key: expected device cuda"):
        hk.attention_with_scores(query, key.cpu(), value)


def test_extra_memory_grows_with_the_length_only():
    """At N = 16384 a matrix of logits would take 4 GiB; beside the output we allow less than one copy of the query."""
    query, key, value = draw(1, 16, 16, 16384, 16384, 80, dtype=torch.bfloat16, **CUDA)
    hk.attention_with_scores(query, key, value)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = hk.attention_with_scores(query, key, value)
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in result)
    assert extra <= query.nbytes
