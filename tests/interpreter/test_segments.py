"""The kernels of segments and shares in Triton's interpreter, bit for bit against the reference."""

import math
import random

import pytest
import torch
from test_ops_segments import assert_same, draw_call, plain

from hiprune_kernels import reference
from hiprune_kernels.kernels import segments
from hiprune_kernels.ops.segments import _select_cuda, _shares_cuda, cuda_segments_gap, cuda_shares_gap

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check(scores, budgets, sizes, tiles, totals, candidate_mask=None):
    result = segments.select_top_segments(scores, budgets, candidate_mask, sizes, tiles, totals)
    expected = plain(scores, budgets, sizes, tiles, totals, candidate_mask)
    assert_same(result, expected, (budgets, sizes, tiles, totals))
    return result


def check_shares(weights, caps, totals, tiles):
    result = segments.shares(weights, caps, totals, tiles)
    assert torch.equal(result, reference.shares(weights, caps, totals, tiles)), (weights, caps, totals, tiles)
    return result


@pytest.mark.parametrize("seed", range(4))
def test_random_calls(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(6):
        scores, budgets, call = draw_call(rng)
        check(scores, budgets, **call)


def test_images_of_one_kind_share_an_entry():
    scores, budgets = torch.randint(0, 9, (3 * 2 * 17,)).float(), torch.tensor([4, 30, 0, 5, 17, 17])
    call = [17] * 6, [2] * 3, [20] * 3
    assert [len(chunk.sizes) for chunk in segments._chunks(*map(tuple, call))] == [3]
    check(scores, budgets, *call)
    check(scores, budgets, *call, candidate_mask=torch.rand(102) < 0.5)


def test_launches():
    """Whole images, of 16 runs of equal segments together at most."""

    def programs(sizes, tiles, totals):
        return [(chunk.programs, len(chunk.sizes)) for chunk in segments._chunks(sizes, tiles, totals)]

    assert programs((576,) * 50, (5,) * 10, (640,) * 10) == [(50, 3)]
    assert programs((576,) * 8, (5, 3), (640, 640)) == [(8, 48)]
    assert programs((576,) * 64, (64,), (640,)) == [(64, 3)]
    assert programs((729, 6480) * 9, (2,) * 9, (640,) * 9) == [(16, 48), (2, 48)]
    assert programs((), (), ()) == []
    mixed = (5, 6) * 7 + (7,), (14, 1), (20, 3)
    assert programs(*mixed) == [(15, 48)]


def test_several_launches():
    """The second one begins in the middle of tokens, budgets and indices."""
    sizes, tiles = (3, 5, 5, 2) * 6, (4,) * 6
    scores, budgets = torch.randn(sum(sizes)), torch.tensor([1, 2, 0, 3] * 6)
    totals = [4, 6, 0, 15, 5, 9]
    assert len(segments._chunks(sizes, tiles, tuple(totals))) == 2
    check(scores, budgets, sizes, tiles, totals)
    check(scores, budgets, sizes, tiles, totals, candidate_mask=torch.rand(sum(sizes)) < 0.5)


@pytest.mark.parametrize("sizes", [[6] * 4, [6, 6, 6, 5], [5, 6, 6, 6]])
def test_candidates_of_earlier_segments_are_counted(sizes):
    """Budgets above them, so that they alone say where a segment's indices begin."""
    counts = [1, 5, 0, 3]
    mask = torch.cat([torch.arange(size) < count for size, count in zip(sizes, counts)])
    result, _ = check(torch.rand(sum(sizes)), torch.full((4,), 99), sizes, [4], [12], mask)
    assert int((result >= 0).sum()) == 9


def test_a_segment_writes_its_own_indices_alone(monkeypatch):
    """But the last one of an image, which fills the end: others could do it too late."""
    launch = segments.launch
    monkeypatch.setattr(segments, "launch", lambda kernel, grid, *rest: launch(kernel, (1,), *rest))
    for sizes in ([3, 3], [3, 5]):
        indices, _ = segments.select_top_segments(
            torch.arange(8.0)[: sum(sizes)], torch.tensor([2, 2]), None, sizes, [2], [5]
        )
        assert indices.tolist() == [1, 2, *[torch.iinfo(torch.int64).max] * 3]


def test_the_end_of_an_image_is_filled():
    """With more -1 than its last segment has tokens, too."""
    result, _ = check(torch.randn(102), torch.zeros(3, dtype=torch.int64), [50, 50, 2], [3], [102])
    assert result.tolist() == [-1] * 102
    check(torch.randn(102), torch.tensor([3, 0, 1]), [50, 50, 2], [2, 1], [100, 1])


def test_special_scores_and_dtypes():
    values = torch.tensor([math.nan, -0.0, -math.inf, 0.0, math.inf, -1.0, 1.0, math.inf])
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for budget in (1, 2, 5, 8):
            check(values.to(dtype), torch.tensor([budget], dtype=torch.int32), [8], [1], [8])


def test_wider_counts_than_ten_bits():
    scores = torch.randint(0, 4, (1024 + 7,)).float()
    check(scores, torch.tensor([1000, 3]), [1024, 7], [2], [1003])


@pytest.mark.parametrize("seed", range(2))
def test_random_shares(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(8):
        tiles = [rng.randint(1, 6) for _ in range(rng.choice([0, 1, 2, 3, 17]))]
        if rng.random() < 0.3:
            tiles = tiles[:1] * 3
        count = sum(tiles)
        totals = [rng.randint(0, 60)] * len(tiles) if rng.random() < 0.5 else [rng.randint(0, 60) for _ in tiles]
        special = torch.tensor([0.0, math.nan, math.inf, 1.0, -1.0, 1e300, 1e-300], dtype=torch.float64)
        drawn = [torch.rand(count), torch.rand(count).double(), torch.randint(0, 4, (count,)).float()]
        weights = rng.choice([*drawn, special[torch.randint(0, 7, (count,))], torch.rand(count).bfloat16()])
        caps = torch.randint(-2, 20, (count,), dtype=rng.choice([torch.int32, torch.int64]))
        check_shares(weights.repeat_interleave(2)[::2], caps, totals, tiles)


def test_shares_by_hand():
    assert check_shares(torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.full((4,), 16), [40], [4]).tolist() == [16, 8, 8, 8]
    full = check_shares(torch.tensor([4.0, 2.0, 1.0, 1.0]), torch.tensor([20, 20, 40, 9]), [80], [4])
    assert full.tolist() == [20, 20, 31, 9]


def test_dispatch():
    """What the CUDA operators call: the kernels, or the reference for what they do not cover."""
    assert cuda_segments_gap([16385], [1], [9]) == "a segment of 16385 tokens, above 16384"
    assert cuda_segments_gap([5, 6] * 9, [18], [9]) == "an image of 18 runs of equal segments, above 16"
    assert cuda_segments_gap([16384] * 1024, [1024], [1 << 24]) == "a total of 16777216, not below 16777216"
    assert cuda_segments_gap([], [], []) == cuda_segments_gap([5, 6] * 8, [16], [9]) == ""
    assert cuda_shares_gap([9], [1025]) == "an image of 1025 tiles, above 1024"
    assert cuda_shares_gap([1 << 24], [2]) == "a total of 16777216, not below 16777216"
    for sizes, tiles in (([5, 6] * 9, [18]), ([5, 6], [2])):
        scores, budgets = torch.rand(sum(sizes)), torch.ones(len(sizes), dtype=torch.int64)
        result = _select_cuda(scores, budgets, None, sizes, tiles, [len(sizes)])
        assert_same(result, plain(scores, budgets, sizes, tiles, [len(sizes)]))
    for total in (9, 1 << 24):
        arguments = torch.rand(2), torch.full((2,), 1 << 24), [total], [2]
        assert torch.equal(_shares_cuda(*arguments), reference.shares(*arguments))
