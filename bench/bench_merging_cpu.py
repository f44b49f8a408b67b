"""Budgets on the device, and merging of tokens, on the CPU, one thread, against what they stand for in PyTorch.

pytest bench/bench_merging_cpu.py        (or `make bench`)
"""

import pytest
import torch

import hiprune_kernels as hk

SEGMENTS = {  # images, tiles of each, grid side, budget of an image
    "LLaVA-NeXT, 5 tiles": (1, 5, 24, 640),
    "LLaVA-NeXT, 5 tiles, batch 4": (4, 5, 24, 640),
    "32 frames of 729": (1, 32, 27, 3000),
    "one tile of 4096": (1, 1, 64, 1365),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_segments(side_by_side, name):
    """Beside the selection with budgets of the host, the same in PyTorch, which asks the tensor for each budget."""
    torch.set_num_threads(1)
    images, tiles, side, total = SEGMENTS[name]
    count, size = images * tiles, side * side
    scores, weights = torch.rand(count * size), torch.rand(count)
    call = {"sizes": [size] * count, "tiles": [tiles] * images, "totals": [total] * images}
    budgets = hk.shares(weights, call["totals"], call["sizes"], tiles=call["tiles"])
    on_host, grids = budgets.tolist(), [(side, side)] * count

    def ours():
        return hk.select_top_segments(scores, budgets, **call)[0]

    def with_budgets_of_the_host():
        return hk.select_tokens_varlen(scores, scores, grids=grids, budgets=on_host, keep_roles=("register",))[0]

    def topk():
        parts = zip(scores.split(size), budgets.tolist())
        return torch.cat([part.topk(k).indices.sort().values + i * size for i, (part, k) in enumerate(parts)])

    def on_avx2():
        return torch.ops.hiprune._cpu_select_top_segments(scores, budgets, None, *call.values(), 1)[0]

    alternatives = {"budgets of the host": with_budgets_of_the_host, "torch chain": topk, "ours on AVX2": on_avx2}
    for function in alternatives.values():
        assert torch.equal(ours(), function())
    side_by_side(ours, alternatives, 301)


@pytest.mark.parametrize("tiles", [5, 32])
def test_shares(side_by_side, tiles):
    torch.set_num_threads(1)
    weights, caps = torch.rand(tiles), torch.full((tiles,), 576)

    def ours():
        return hk.shares(weights, [128 * tiles], caps, tiles=[tiles])

    def on_the_host():
        return torch.tensor(hk.budget.shares(weights.tolist(), 128 * tiles, caps.tolist()))

    assert torch.equal(ours(), on_the_host())
    side_by_side(ours, {"on the host": on_the_host}, 301)


MERGING = {  # images, tokens, kept besides, targets, channels, dtype
    "CLIP-L/14-336, 54 and 10": (1, 576, 54, 10, 1024, torch.float32),
    "CLIP-L/14-336, 54 and 10, bfloat16": (1, 576, 54, 10, 1024, torch.bfloat16),
    "CLIP-L/14-336, 162 and 30": (1, 576, 162, 30, 1024, torch.float32),
    "LLaVA-NeXT, 5 tiles, 108 and 20": (5, 576, 108, 20, 1024, torch.float32),
    "4096 tokens, 600 and 100": (1, 4096, 600, 100, 1280, torch.float32),
}


def released_chain(features, keys, targets, sources):
    """The merging of VisionZip's released code; targets and sources as indices, which all images share."""
    keys = keys / keys.norm(dim=-1, keepdim=True)
    similarity = torch.bmm(keys[:, sources], keys[:, targets].transpose(1, 2))
    assigned = similarity.argmax(dim=2).unsqueeze(-1)
    one_hot = torch.zeros(*similarity.shape, dtype=features.dtype).scatter_(2, assigned, 1)
    counts = one_hot.sum(dim=1).clamp(min=1).unsqueeze(-1)
    return features[:, targets] + torch.bmm(one_hot.transpose(1, 2), features[:, sources]) / counts


def draw_merging(images, tokens, kept, count, channels, dtype):
    """Features, keys in their dtype, targets [count] and sources [S], which all images share."""
    features, keys = torch.randn(images, tokens, channels).to(dtype), torch.randn(images, tokens, 64)
    rest = torch.randperm(tokens)[kept:].sort().values
    targets = rest[:: len(rest) // count][:count]
    return features, keys.to(dtype), targets, rest[~torch.isin(rest, targets)]


def merging_call(features, keys, targets, sources):
    """What `merge_tokens` takes behind the features."""
    images, tokens, _ = features.shape
    marked = torch.zeros(tokens, dtype=torch.bool)
    marked[sources] = True
    return keys, targets.expand(images, -1).contiguous(), marked.expand(images, -1).contiguous()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("name", MERGING)
def test_merging(side_by_side, name, whole):
    """The targets' rows, as the chain gives them; or all features with these rows replaced, which both copy."""
    torch.set_num_threads(1)
    features, keys, targets, sources = draw_merging(*MERGING[name])
    call = merging_call(features, keys, targets, sources)

    def ours():
        return hk.merge_tokens(features, *call, rows_only=not whole)[0]

    def chain(features=features, keys=keys):
        rows = released_chain(features, keys, targets, sources)
        return features.index_copy(1, targets, rows) if whole else rows

    if features.dtype == torch.float32:
        torch.testing.assert_close(ours(), chain())
    else:  # the chain's cosines are rounded to bfloat16, and go elsewhere where two are close
        expected = chain(features.float(), keys.float())
        torch.testing.assert_close(ours().float(), expected, rtol=2e-2, atol=2e-2)

    def on_avx2():
        return torch.ops.hiprune._cpu_merge_tokens(features, *call, [], [], not whole, 1)[0]

    torch.testing.assert_close(ours(), on_avx2())
    alternatives = {"released chain": chain, "ours on AVX2": on_avx2}
    if whole:
        alternatives["copy alone"] = features.clone
    side_by_side(ours, alternatives, 151)
