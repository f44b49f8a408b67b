"""Selection on the CPU, one thread: the fused operator against the chain of PyTorch calls it stands for.

Beside it, PyTorch's gather of the same rows alone: the part of our time that is bound by memory, whatever selects.

pytest bench/bench_selection_cpu.py        (or `make bench`)
"""

import pytest
import torch

import hiprune_kernels as hk

CASES = {  # images, grid side, budget, channels
    "CLIP-L/14-336, indices": (1, 24, 192, 0),
    "CLIP-L/14-336": (1, 24, 192, 1024),
    "LLaVA-NeXT, 5 tiles": (5, 24, 128, 1024),
    "CLIP-L/14-336, batch 8": (8, 24, 192, 1024),
    "4096 tokens": (1, 64, 1365, 1280),
    "16384 tokens": (1, 128, 5461, 1280),
}


def torch_chain(features, object_scores, deep_scores, budget, width, num_anchors):
    """Algorithm 1 as the released code runs it, image by image; scores below 1, so that -1 takes tokens out."""
    kept = []
    for i in range(len(object_scores)):
        count = object_scores.shape[1]
        anchors = object_scores[i].topk(num_anchors).indices
        cluster = torch.cat([anchors, anchors - 1, anchors + 1, anchors - width, anchors + width])
        cluster = cluster.clamp(0, count - 1).unique()
        taken = torch.zeros(count).scatter_(0, cluster, 1.0)
        registers = (deep_scores[i] - taken).topk(budget - len(cluster)).indices
        index = torch.cat([cluster, registers]).sort().values
        kept.append(features[i][index] if features is not None else index)
    return torch.stack(kept)


@pytest.mark.parametrize("name", CASES)
def test_selection(side_by_side, name):
    torch.set_num_threads(1)
    images, side, budget, channels = CASES[name]
    object_scores, deep_scores = torch.rand(2, images, side * side) * 0.9
    features = torch.randn(images, side * side, channels) if channels else None
    options = {"budget": budget, "grid": (side, side), "rule": "official"}
    num_anchors = round(0.1 * budget / 5)

    def ours():
        if features is None:
            return hk.select_tokens(object_scores, deep_scores, **options)[0]
        return hk.prune_tokens(features, object_scores, deep_scores, **options)[0]

    def chain():
        return torch_chain(features, object_scores, deep_scores, budget, side, num_anchors)

    alternatives = {"torch chain": chain}
    if features is not None:
        indices = hk.select_tokens(object_scores, deep_scores, **options)[0]
        rows = (indices + side * side * torch.arange(images)[:, None]).flatten()
        table = features.flatten(0, 1)
        alternatives["gather alone"] = lambda: table.index_select(0, rows)
        assert torch.equal(alternatives["gather alone"](), ours().flatten(0, 1))
    assert torch.equal(ours(), chain())
    side_by_side(ours, alternatives, 301)
