"""How operators fare on the CPU over numbers of tokens, batches and budgets; `bench/plots.py` draws it.

pytest bench/sweeps.py --benchmark-json out/sweeps.json && python -m bench.plots out/sweeps.json --out out/sweeps

Beside it stands what is inside: the two matrix products by PyTorch, into memory that is there already, and the gather.
In float32 these products alone are slower than the fused kernel, which keeps its strip of the matrix in the L2 cache.
"""

import pytest
import torch

import hiprune_kernels as hk
from bench.bench_attention_cpu import alternatives, check, inputs
from bench.bench_selection_cpu import torch_chain
from hiprune_kernels.budget import anchor_count

HEADS, WIDTH, CHANNELS = 16, 64, 1024  # CLIP-L/14-336's
TOKENS = (64, 128, 256, 577, 1024, 2048)
BATCHES = (1, 2, 4, 8)
SELECTED_TOKENS = (144, 576, 1024, 2304, 4096)
BUDGETS = (32, 64, 128, 192, 320)


@pytest.fixture(autouse=True)
def threads(request):
    torch.set_num_threads(request.config.getoption("--threads"))


def products(query, key, value):
    """The two matrix products of attention into memory that is there already, without softmax."""
    logits = torch.empty(*query.shape[:-1], key.shape[-2], dtype=query.dtype)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    query, transposed, value = query.contiguous(), key.transpose(-1, -2).contiguous(), value.contiguous()

    def run():
        torch.matmul(query, transposed, out=logits)
        torch.matmul(logits, value, out=output)

    return run


def measure_attention(side_by_side, benchmark, shape, dtype, sweep):
    query, key, value = inputs(shape, dtype)
    check(query, key, value, *hk.attention_with_scores(query, key, value))
    others = alternatives(query, key, value, str(dtype).removeprefix("torch."))
    others["products alone"] = products(query, key, value)
    benchmark.extra_info["sweep"] = sweep
    side_by_side(lambda: hk.attention_with_scores(query, key, value), others, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_over_tokens(side_by_side, benchmark, tokens, dtype):
    sweep = {"figure": f"attention with scores, {str(dtype)[6:]}, 1 x 16 x N x 64", "of": "tokens N", "at": tokens}
    measure_attention(side_by_side, benchmark, (1, HEADS, tokens, WIDTH), dtype, sweep)


@pytest.mark.parametrize("batch", BATCHES)
def test_attention_over_batches(side_by_side, benchmark, batch):
    sweep = {"figure": "attention with scores, float32, B x 16 x 577 x 64", "of": "images B", "at": batch}
    measure_attention(side_by_side, benchmark, (batch, HEADS, 577, WIDTH), torch.float32, sweep)


def measure_selection(side_by_side, benchmark, side, budget, sweep):
    torch.set_num_threads(1)
    features, (objects, deeps) = torch.randn(1, side**2, CHANNELS), torch.rand(2, 1, side**2) * 0.9
    options = {"budget": budget, "grid": (side, side), "rule": "official"}
    indices = hk.select_tokens(objects, deeps, **options)[0]
    rows = indices[0]

    def ours():
        return hk.prune_tokens(features, objects, deeps, **options)[0]

    def chain():
        return torch_chain(features, objects, deeps, budget, side, anchor_count(budget, rule="official"))

    assert torch.equal(ours(), chain()) and torch.equal(ours()[0], features[0, rows])
    benchmark.extra_info["sweep"] = sweep
    side_by_side(ours, {"torch chain": chain, "gather alone": lambda: features[0].index_select(0, rows)}, 101)


@pytest.mark.parametrize("tokens", SELECTED_TOKENS)
def test_selection_over_tokens(side_by_side, benchmark, tokens):
    sweep = {"figure": "selection with its gather, a third of N kept, 1024 channels", "of": "tokens N", "at": tokens}
    measure_selection(side_by_side, benchmark, round(tokens**0.5), tokens // 3, sweep)


@pytest.mark.parametrize("budget", BUDGETS)
def test_selection_over_budgets(side_by_side, benchmark, budget):
    sweep = {"figure": "selection with its gather, of 576 tokens, 1024 channels", "of": "budget", "at": budget}
    measure_selection(side_by_side, benchmark, 24, budget, sweep)
