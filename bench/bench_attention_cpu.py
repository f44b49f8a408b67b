"""Attention with column scores on the CPU: fused, against eager, SDPA without scores, and two passes in PyTorch.

pytest bench/bench_attention_cpu.py        (or `make bench`)
"""

import pytest
import torch
import torch.nn.functional as F

import hiprune_kernels as hk
from hiprune_kernels import reference

SHAPES = {  # B, H, N, D
    "CLIP-B/32": (1, 12, 50, 64),
    "DeiT-B": (1, 12, 198, 64),
    "CLIP-L/14-336": (1, 16, 577, 64),
    "CLIP-L/14-336 x4": (4, 16, 577, 64),
    "SigLIP-so400m": (1, 16, 729, 72),
    "V-JEPA2": (1, 16, 2048, 64),
    "Qwen2.5-VL 4096": (1, 16, 4096, 80),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SLOW_EAGER = {"float16": 0, "float32": 4096, "bfloat16": 1024}  # eager above this N takes minutes or gigabytes


def eager(query, key, value):
    """As the released HiPrune code scores: the N x N matrix of every head, softmax in float32, mean, sum."""
    logits = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    probabilities = logits.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return probabilities @ value, probabilities.mean(dim=1).sum(dim=1)


def two_passes(query, key, value, rows=128):
    """PyTorch's fused attention for output and log-sum-exp, then the scores in blocks of rows: no N x N matrix."""
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)
    scores = query.new_zeros(query.shape[0], query.shape[2], dtype=torch.float32)
    scaled, transposed = query * query.shape[-1] ** -0.5, key.transpose(-1, -2)
    for m in range(0, query.shape[2], rows):
        logits = (scaled[:, :, m : m + rows] @ transposed).float()
        scores += (logits - lse[:, :, m : m + rows, None].float()).exp_().sum(dim=(1, 2))
    return output, scores / query.shape[1]


def sdpa(query, key, value):
    return F.scaled_dot_product_attention(query, key, value)


def inputs(shape, dtype):
    B, H, N, D = shape
    return tuple(torch.randn(B, N, H, D).to(dtype).transpose(1, 2) for _ in range(3))


def check(query, key, value, output, scores):
    expected = reference.attention_scores(query[:1].double(), key[:1].double())
    torch.testing.assert_close(scores[:1].double(), expected, rtol=1e-4, atol=1e-5)
    if output is not None:
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-3}[query.dtype]
        torch.testing.assert_close(output, sdpa(query, key, value), rtol=tolerance, atol=tolerance)


def rounds(shape):
    B, _, N, _ = shape
    return 9 if B * N > 2000 else 31


def alternatives(query, key, value, dtype):
    every = {"sdpa": lambda: sdpa(query, key, value), "two passes": lambda: two_passes(query, key, value)}
    if query.shape[2] <= SLOW_EAGER[dtype]:
        every["eager"] = lambda: eager(query, key, value)
    return every


@pytest.fixture(autouse=True)
def threads(request):
    torch.set_num_threads(request.config.getoption("--threads"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_output_and_scores(side_by_side, name, dtype):
    query, key, value = inputs(SHAPES[name], DTYPES[dtype])
    check(query, key, value, *hk.attention_with_scores(query, key, value))
    others = alternatives(query, key, value, dtype)
    side_by_side(lambda: hk.attention_with_scores(query, key, value), others, rounds(SHAPES[name]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["CLIP-L/14-336", "SigLIP-so400m", "Qwen2.5-VL 4096"])
def test_scores_only(side_by_side, name, dtype):
    query, key, value = inputs(SHAPES[name], DTYPES[dtype])
    check(query, key, value, None, hk.attention_scores(query, key))
    others = {"sdpa": lambda: sdpa(query, key, value)}
    side_by_side(lambda: hk.attention_scores(query, key), others, rounds(SHAPES[name]))
