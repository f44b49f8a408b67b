"""How operators fare on the CPU over numbers of tokens, batches and budgets; `bench/plots.py` draws it.

pytest bench/sweeps.py --benchmark-json out/sweeps.json && python -m bench.plots out/sweeps.json --out out/sweeps

Beside it stands what is inside: the two matrix products by PyTorch, into memory that is there already, and the gather.
In float32 these products alone are slower than the fused kernel, which keeps its strip of the matrix in the L2 cache.
The floor is one product of square matrices with as many operations: the rate that the processor reaches at its best.
"""

import pytest
import torch

import hiprune_kernels as hk
from bench.bench_attention_cpu import alternatives, check, inputs, two_passes
from bench.bench_diverse_cpu import LOOPS, cosines_of
from bench.bench_merging_cpu import draw_merging, merging_call, released_chain
from bench.bench_selection_cpu import torch_chain
from hiprune_kernels.budget import anchor_count

HEADS, WIDTH, CHANNELS = 16, 64, 1024  # CLIP-L/14-336's
TOKENS = (64, 128, 256, 577, 1024, 2048)
BATCHES = (1, 2, 4, 8)
SELECTED_TOKENS = (144, 576, 1024, 2304, 4096)
BUDGETS = (32, 64, 128, 192, 320)
DIVERSE_TOKENS = (144, 576, 1152, 2304)
TILES = (1, 2, 5, 16, 32)


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


def square_product(operations, dtype):
    """One product of square matrices with so many operations, into memory that is there already."""
    side = round((operations / 2) ** (1 / 3))
    left, right = torch.randn(2, side, side).to(dtype)
    out = torch.empty_like(left)
    return lambda: torch.matmul(left, right, out=out)


def measure_attention(side_by_side, benchmark, shape, dtype, sweep):
    query, key, value = inputs(shape, dtype)
    check(query, key, value, *hk.attention_with_scores(query, key, value))
    others = alternatives(query, key, value, str(dtype).removeprefix("torch."))
    others["products alone"] = products(query, key, value)
    others["square product alone"] = square_product(4 * query.shape[0] * HEADS * query.shape[2] ** 2 * WIDTH, dtype)
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


@pytest.mark.parametrize("tokens", TOKENS)
def test_scores_over_tokens(side_by_side, benchmark, tokens):
    query, key, value = inputs((1, HEADS, tokens, WIDTH), torch.float32)
    check(query, key, value, None, hk.attention_scores(query, key))
    others = {
        "sdpa, without scores": lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value),
        "two passes": lambda: two_passes(query, key, value)[1],
        "square product alone": square_product(2 * HEADS * tokens**2 * WIDTH, torch.float32),
    }
    figure = "scores alone, float32, 1 x 16 x N x 64"
    benchmark.extra_info["sweep"] = {"figure": figure, "of": "tokens N", "at": tokens}
    side_by_side(lambda: hk.attention_scores(query, key), others, 9)


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


def measure_diverse(side_by_side, benchmark, form, tokens, count, sweep):
    torch.set_num_threads(1)
    features = torch.randn(1, tokens, CHANNELS)
    quality = torch.rand(1, tokens) if form == "determinant" else None

    def ours():
        return hk.select_diverse(features, count=count, quality=quality)[1]

    def chain():
        return LOOPS[form](cosines_of(features[0]), None if quality is None else quality[0], count)

    assert torch.equal(ours()[0], chain())
    benchmark.extra_info["sweep"] = sweep
    side_by_side(ours, {"torch chain": chain, "product alone": lambda: features @ features.mT}, 9)


@pytest.mark.parametrize("form", LOOPS)
@pytest.mark.parametrize("tokens", DIVERSE_TOKENS)
def test_diverse_over_tokens(side_by_side, benchmark, tokens, form):
    figure = f"diverse selection, {form}, a ninth of N kept, 1024 channels"
    measure_diverse(
        side_by_side, benchmark, form, tokens, tokens // 9, {"figure": figure, "of": "tokens N", "at": tokens}
    )


@pytest.mark.parametrize("form", LOOPS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_diverse_over_budgets(side_by_side, benchmark, budget, form):
    figure = f"diverse selection, {form}, of 576 tokens, 1024 channels"
    measure_diverse(side_by_side, benchmark, form, 576, budget, {"figure": figure, "of": "budget", "at": budget})


@pytest.mark.parametrize("tokens", SELECTED_TOKENS)
def test_merging_over_tokens(side_by_side, benchmark, tokens):
    torch.set_num_threads(1)
    kept, targets = tokens // 11, max(1, tokens // 58)  # VisionZip's shares of 576: 54 and 10
    drawn = draw_merging(1, tokens, kept, targets, CHANNELS, torch.float32)
    features, call = drawn[0], merging_call(*drawn)

    def ours():
        return hk.merge_tokens(features, *call, rows_only=True)[0]

    torch.testing.assert_close(ours(), released_chain(*drawn))
    figure = "merging, VisionZip's shares of N, 1024 channels"
    benchmark.extra_info["sweep"] = {"figure": figure, "of": "tokens N", "at": tokens}
    side_by_side(ours, {"torch chain": lambda: released_chain(*drawn)}, 51)


@pytest.mark.parametrize("tiles", TILES)
def test_tiles(side_by_side, benchmark, tiles):
    """The best of each tile, with budgets that are shared out by weights on the device."""
    torch.set_num_threads(1)
    size = 576
    scores, weights = torch.rand(tiles * size), torch.rand(tiles)
    call = {"sizes": [size] * tiles, "tiles": [tiles], "totals": [128 * tiles]}
    budgets = hk.shares(weights, call["totals"], call["sizes"], tiles=call["tiles"])

    def ours():
        return hk.select_top_segments(scores, budgets, **call)[0]

    def chain():
        parts = zip(scores.split(size), budgets.tolist())
        return torch.cat([part.topk(k).indices.sort().values + i * size for i, (part, k) in enumerate(parts)])

    assert torch.equal(ours(), chain())
    figure = "the best of each tile of 576 tokens, 128 a tile on average"
    benchmark.extra_info["sweep"] = {"figure": figure, "of": "tiles", "at": tiles}
    side_by_side(ours, {"torch chain": chain}, 101)
