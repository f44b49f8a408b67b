"""Inputs, float64 oracle and tolerances for the Triton attention kernels, in the interpreter and on a GPU."""

import torch

from hiprune_kernels import reference

OUTPUT_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def draw(B, Hq, Hk, M, N, D, *, dtype=torch.float32, device="cpu"):
    """Query, key and value as models make them: [B, M, H, D] with heads and rows swapped. Logits deviate by about 2."""
    shapes = ((B, M, Hq, D), (B, N, Hk, D), (B, N, Hk, D))
    query, key, value = (torch.randn(shape, device=device).to(dtype).transpose(1, 2) for shape in shapes)
    return 2 * query, key, value


def draw_mask(*shape, device="cpu"):
    return torch.rand(shape, device=device) < 0.6


def draw_packed(lengths_q, lengths_k, Hq, Hk, D, *, dtype=torch.float32, device="cpu"):
    """Query, key, value [T, H, D] as slices of one projection where lengths agree, and `cu_seqlens` of both sides."""
    cu_q, cu_k = (torch.tensor([0, *n], device=device).cumsum(0).int() for n in (lengths_q, lengths_k))
    if lengths_q == lengths_k:
        packed = torch.randn(sum(lengths_q), Hq + 2 * Hk, D, device=device).to(dtype)
        query, key, value = packed.split([Hq, Hk, Hk], dim=1)
    else:
        query = torch.randn(sum(lengths_q), Hq, D, device=device).to(dtype)
        key, value = torch.randn(2, sum(lengths_k), Hk, D, device=device).to(dtype)
    return 2 * query if lengths_q != lengths_k else query, key, value, cu_q, cu_k


def expected(query, key, value, per_head=False, **options):
    """Output and scores of the reference in float64."""
    query, key, value = query.double(), key.double(), value.double()
    packed = "_varlen" if "cu_seqlens_q" in options else ""
    output, scores = getattr(reference, "attention_with_scores" + packed)(query, key, value, **options)
    if per_head:
        scores = getattr(reference, "attention_scores_per_head" + packed)(query, key, **options)
    return output, scores


def check_output(output, wanted, dtype):
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), wanted, rtol=0, atol=OUTPUT_TOLERANCE[dtype])


def check_scores(scores, wanted):
    """Float32 sums of probabilities, whatever the dtype of the inputs: a key or query more or less shows."""
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), wanted, rtol=3e-5, atol=3e-6)
