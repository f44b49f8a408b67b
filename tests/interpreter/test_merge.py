"""The kernels of merging in Triton's interpreter, against the reference."""

import math
import random

import pytest
import torch
from test_ops_merge import FEATURES, KEYS, SOURCES, assert_same, draw_call

from hiprune_kernels import reference
from hiprune_kernels.kernels import merge
from hiprune_kernels.ops.merge import _merge_cuda, cuda_merge_gap

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(features, keys, targets, sources, sizes=(), counts=(), rows_only=False):
    """The same choice of targets; sums are added in another order than the reference's, the same in every run."""
    images = (sizes, counts)
    if features.dim() == 3:
        images = [features.shape[1]] * len(features), [targets.shape[1]] * len(features)
    merged, assigned = merge.merge_tokens(features, keys, targets, sources, *images, rows_only)
    expected, to = reference.merge_tokens(features, keys, targets, sources, sizes, counts, rows_only)
    assert assigned.dtype == to.dtype
    assert torch.equal(assigned, to)
    assert merged.is_contiguous()
    torch.testing.assert_close(merged, expected)
    return merged, assigned


@pytest.mark.parametrize("seed", range(4))
def test_random_calls(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(4):
        check(*draw_call(rng), rows_only=rng.random() < 0.5)


@pytest.mark.parametrize("targets", [[1, 3], [3, 1], [1, 3, 1], [-1, 3, 6, 1], [0, 4], [-1, 7], []])
def test_hand_cases(targets):
    targets = torch.tensor([targets], dtype=torch.int64)
    for rows_only in (False, True):
        check(FEATURES[None], KEYS[None], targets, SOURCES[None], rows_only=rows_only)


def test_ties_and_keys_like_nothing():
    """Equal targets of several blocks; NaN and infinity behind all; cosine 0 with zeros, above one that is negative."""
    features, sources = torch.randn(1, 40, 3), torch.ones(1, 40, dtype=torch.bool)
    _, assigned = check(features, torch.ones(1, 40, 3), torch.arange(33)[None], sources, rows_only=True)
    assert assigned[0].tolist() == [-1] * 33 + [0] * 7
    nan, inf = math.nan, math.inf
    keys = torch.tensor([[[1.0, 0.0], [nan, 0.0], [-1.0, 0.0], [inf, 1.0], [0.0, 0.0], [nan, nan]]])
    for targets, expected in (
        ([1, 0], [-1, -1, 1, 0, 1, 0]),
        ([3, 2], [1, 0, -1, -1, 1, 0]),
        ([2, 4], [1, 0, -1, 0, -1, 0]),
    ):
        _, assigned = check(features[:, :6], keys, torch.tensor([targets]), sources[:, :6])
        assert assigned[0].tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_several_blocks_of_everything(dtype):
    """More than 32 tokens, 16 targets, 32 channels of keys, 256 of features; a batch with any strides."""
    features = torch.randn(300, 70, 2).to(dtype).permute(2, 1, 0)
    keys = torch.randint(-2, 3, (70, 2, 40)).to(dtype).transpose(0, 1)
    targets, sources = torch.stack([torch.randperm(70)[:20] for _ in range(2)]), torch.rand(70, 2).T < 0.9
    for rows_only in (False, True):
        merged, assigned = check(features, keys, targets, sources, rows_only=rows_only)
        assert int((assigned >= 16).sum()) > 0
        alone = merge.merge_tokens(features[1:], keys[1:], targets[1:], sources[1:], [70], [20], rows_only)
        assert_same(alone, (merged[1:], assigned[1:]))


def test_several_launches():
    sizes, counts = [3 + k % 4 for k in range(18)], [k % 3 for k in range(18)]
    starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
    targets = torch.tensor([int(start) + j for start, count in zip(starts, counts) for j in range(count)])
    features, keys = torch.randn(sum(sizes), 5), torch.randn(sum(sizes), 3)
    assert [chunk.number for chunk in merge._chunks(tuple(sizes), tuple(counts))] == [16, 2]
    for rows_only in (False, True):
        check(features, keys, targets, torch.ones(sum(sizes), dtype=torch.bool), sizes, counts, rows_only)
    assert merge._chunks((), ()) == []
    assert [chunk.number for chunk in merge._chunks((576,) * 90, (10,) * 90)] == [90]


def test_dispatch():
    """What the CUDA operator calls: the kernels, or the reference for what they do not cover."""
    features, keys = torch.randn(2, 9, 4), torch.randint(-1, 2, (2, 9, 3)).float()
    assert cuda_merge_gap(features.double(), keys, [9], [2]) == "features of torch.float64"
    assert cuda_merge_gap(features, keys.double(), [9], [2]) == "keys of torch.float64"
    assert cuda_merge_gap(features, keys, [9], [65536]) == "an image of 65536 targets, above 65535"
    assert cuda_merge_gap(features, keys, [1 << 24], [2]) == "an image of 16777216 tokens, not below 16777216"
    assert cuda_merge_gap(features.half(), keys.bfloat16(), [], []) == ""
    targets, sources = torch.tensor([[1, 3], [0, 8]]), torch.rand(2, 9) < 0.8
    for x in (features, features.double()):
        result = _merge_cuda(x, keys, targets, sources, [], [], False)
        expected = reference.merge_tokens(x, keys, targets, sources)
        torch.testing.assert_close(result, expected)
    packed = features.flatten(0, 1), keys.flatten(0, 1), torch.tensor([1, 3, 9]), sources.flatten(), [9, 9], [2, 1]
    torch.testing.assert_close(_merge_cuda(*packed, True), reference.merge_tokens(*packed, True))
