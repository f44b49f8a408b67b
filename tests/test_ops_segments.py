"""Budgets on the device: the best tokens of segments, and shares, on the CPU against references of their own."""

import itertools
import math
import random
from fractions import Fraction

import pytest
import torch
from torch.library import opcheck

import hiprune_kernels as hk
from hiprune_kernels import budget, reference
from hiprune_kernels.ops.library import CPU_KERNELS

needs_cpu_kernels = pytest.mark.skipif(not CPU_KERNELS, reason="the C++ extension is not built")
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]


def draw_scores(rng, count):
    kind = rng.choice(["normal", "ties", "equal", "special"])
    if kind == "equal":
        return torch.full((count,), 0.25)
    scores = torch.randn(count) if kind != "ties" else torch.randint(-1, 3, (count,)).float()
    if kind == "special":
        values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0])
        scores = torch.where(torch.rand(count) < 0.7, values[torch.randint(0, 6, (count,))], scores)
    return scores


def draw_images(rng, most=40):
    """sizes, tiles, totals"""
    tiles = [rng.randint(1, 5) for _ in range(rng.choice([0, 1, 2, 3]))]
    sizes = [rng.randint(1, most) for _ in range(sum(tiles))]
    if rng.random() < 0.4:
        sizes = [rng.randint(1, most)] * len(sizes)
    parts = iter(sizes)
    return sizes, tiles, [rng.randint(0, sum(itertools.islice(parts, count))) for count in tiles]


def draw_call(rng, most=40):
    sizes, tiles, totals = draw_images(rng, most)
    scores = draw_scores(rng, sum(sizes)).to(rng.choice(DTYPES))
    mask = rng.choice([None, torch.rand(sum(sizes)) < 0.6])
    fair = torch.tensor([size // 3 for size in sizes], dtype=torch.int64)
    wild = torch.randint(-(2**62), 2**62, (len(sizes),))
    budgets = rng.choice([fair, fair.int(), fair + torch.randint(-2, 4, fair.shape), 0 * fair, wild])
    if rng.random() < 0.3:  # every other element of a longer tensor
        scores, budgets = scores.repeat_interleave(2)[::2], budgets.repeat_interleave(2)[::2]
        mask = None if mask is None else mask.repeat_interleave(2)[::2]
    return scores, budgets, {"sizes": sizes, "tiles": tiles, "totals": totals, "candidate_mask": mask}


def plain(scores, budgets, sizes, tiles, totals, candidate_mask=None):
    """The definition, in lists of Python numbers."""
    scores, budgets = scores.double().tolist(), budgets.tolist()
    mask = [True] * len(scores) if candidate_mask is None else candidate_mask.tolist()
    roles, indices, token, segment = [0] * len(scores), [], 0, 0
    for count, total in zip(tiles, totals):
        chosen = []
        for size in sizes[segment : segment + count]:
            here = [i for i in range(token, token + size) if mask[i]]
            here.sort(key=lambda i: (math.isnan(scores[i]), 0.0 if math.isnan(scores[i]) else -scores[i]))
            chosen += here[: max(0, min(budgets[segment], total - len(chosen)))]
            token, segment = token + size, segment + 1
        for i in chosen:
            roles[i] = 1
        indices += sorted(chosen) + [-1] * (total - len(chosen))
    return torch.tensor(indices, dtype=torch.int64), torch.tensor(roles, dtype=torch.uint8)


def assert_same(result, expected, context=None):
    for x, y in zip(result, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y), context


# ------------------------------------------------------------------------------------------------------ best tokens


def test_hand_case():
    scores = torch.tensor([1.0, 3, 2, 5, 4, 6, 9, 8, 7])
    call = {"sizes": [3, 3, 3], "tiles": [2, 1], "totals": [3, 2]}
    indices, roles = hk.select_top_segments(scores, torch.tensor([1, 2, 2]), **call)
    assert indices.tolist() == [1, 3, 5, 6, 7]
    assert roles.tolist() == [0, 1, 0, 1, 0, 1, 1, 1, 0]
    indices, _ = hk.select_top_segments(scores, torch.tensor([0, 3, 0]), **call)  # budgets of 0, and of all
    assert indices.tolist() == [3, 4, 5, -1, -1]


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        ([2, 2], [0, 1, 3, 4]),
        ([4, 2], [0, 1, 2, 3]),  # 4 are more than a segment's 3, and leave one of the total
        ([9, 9], [0, 1, 2, 3]),
        ([-5, 2], [3, 4, -1, -1]),
        ([1, 1], [0, 3, -1, -1]),
        ([2**62, -(2**62)], [0, 1, 2, -1]),
    ],
)
def test_budgets_that_do_not_fit_are_cut(budgets, expected):
    """And the roles say the same as the indices."""
    scores = torch.tensor([3.0, 2, 1, 3, 2, 1])
    indices, roles = hk.select_top_segments(scores, torch.tensor(budgets), sizes=[3, 3], tiles=[2], totals=[4])
    assert indices.tolist() == expected
    assert roles.nonzero()[:, 0].tolist() == [i for i in expected if i >= 0]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(6))
def test_against_the_plain_definition(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(100):
        scores, budgets, call = draw_call(rng)
        expected = plain(scores, budgets, **call)
        assert_same(hk.select_top_segments(scores, budgets, **call), expected, (budgets, call))
        parts = (call[name] for name in ("candidate_mask", "sizes", "tiles", "totals"))
        assert_same(reference.select_top_segments(scores, budgets, *parts), expected, (budgets, call))


@needs_cpu_kernels
@pytest.mark.parametrize("isa", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set(dtype, isa):
    """Segments wide enough for whole vectors and a rest behind them."""
    rng = random.Random(isa)
    for _ in range(20):
        scores, budgets, call = draw_call(rng, most=600)
        parts = [call[name] for name in ("candidate_mask", "sizes", "tiles", "totals")]
        result = torch.ops.hiprune._cpu_select_top_segments(scores.to(dtype), budgets, *parts, isa)
        assert_same(result, plain(scores.to(dtype), budgets, **call))


def test_equals_the_selection_with_budgets_of_the_host():
    sizes, budgets = [576] * 5, [100, 7, 300, 1, 92]
    scores = torch.randint(0, 50, (5 * 576,)).float()
    indices, roles = hk.select_tokens_varlen(
        scores, scores, grids=[(24, 24)] * 5, budgets=budgets, keep_roles=("register",)
    )
    result = hk.select_top_segments(scores, torch.tensor(budgets), sizes=sizes, tiles=[5], totals=[500])
    assert_same(result, (indices, (roles > 0).to(torch.uint8)))


def test_same_bits_for_any_number_of_threads_and_neighbours():
    scores, budgets = torch.randint(0, 50, (12 * 300,)).float(), torch.randint(0, 40, (12,))
    budgets[5] = 300
    call = {"sizes": [300] * 12, "tiles": [4, 4, 4], "totals": [100, 330, 120]}
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(hk.select_top_segments(scores, budgets, **call))
    torch.set_num_threads(1)
    assert_same(*results)
    alone = hk.select_top_segments(scores[1200:2400], budgets[4:8], sizes=[300] * 4, tiles=[4], totals=[330])
    assert torch.equal(results[0][0][100:430], torch.where(alone[0] < 0, -1, alone[0] + 1200))
    assert torch.equal(results[0][1][1200:2400], alone[1])


def test_permuted_segments_keep_the_same_tokens():
    scores, sizes, order = torch.rand(100), [10, 20, 30, 40], [2, 0, 3, 1]
    budgets = torch.tensor([3, 0, 7, 5])
    _, roles = hk.select_top_segments(scores, budgets, sizes=sizes, tiles=[4], totals=[15])
    moved = torch.cat([scores.split(sizes)[i] for i in order])
    sizes_there = [sizes[i] for i in order]
    _, there = hk.select_top_segments(moved, budgets[order], sizes=sizes_there, tiles=[4], totals=[15])
    assert torch.equal(there, torch.cat([roles.split(sizes)[i] for i in order]))


@needs_cpu_kernels
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": [3, 4]}, "scores: expected 7"),
        ({"sizes": [3, 0, 3], "tiles": [3]}, "sizes: expected 1"),
        ({"tiles": [1]}, "tiles: expected a sum of 2, got 1"),
        ({"tiles": [2, 0], "totals": [3, 0]}, "tiles, totals: expected"),
        ({"totals": [-1]}, "tiles, totals: expected"),
        ({"totals": [3, 3]}, "totals: expected 1"),
        ({"budgets": torch.ones(3, dtype=torch.int64)}, "budgets: expected 2"),
        ({"budgets": torch.ones(2)}, "budgets: expected int64 or int32"),
        ({"candidate_mask": torch.ones(5, dtype=torch.bool)}, "candidate_mask: expected bool"),
    ],
)
def test_kernel_refuses_what_does_not_fit(change, message):
    call = {"scores": torch.rand(6), "budgets": torch.tensor([1, 2]), "candidate_mask": None, "sizes": [3, 3],
            "tiles": [2], "totals": [3]}  # fmt: skip
    torch.ops.hiprune.select_top_segments(**call)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.hiprune.select_top_segments(**{**call, **change})


# ------------------------------------------------------------------------------------------------------------ shares


def exact_shares(weights, total, caps):
    """The definition, in fractions."""
    weights, given, parts = [Fraction(w) for w in weights], [0] * len(caps), set(range(len(caps)))
    left = min(total, sum(caps))
    while parts:
        scale = sum(weights[i] for i in parts)
        quotas = {i: left * weights[i] / scale if scale else Fraction(left, len(parts)) for i in parts}
        full = {i for i in parts if quotas[i] >= caps[i]}
        if not full:
            break
        for i in full:
            given[i], left = caps[i], left - caps[i]
        parts -= full
    for i in parts:
        given[i] = math.floor(quotas[i])
    order = sorted(parts, key=lambda i: (given[i] - quotas[i], i))
    for i in order[: left - sum(given[i] for i in parts)]:
        given[i] += 1
    return given


@pytest.mark.parametrize(
    ("weights", "total", "caps", "expected"),
    [
        ([0.7, 0.1, 0.1, 0.1], 40, [16] * 4, [16, 8, 8, 8]),
        ([3.0, 5.0], 4, [9, 9], [2, 2]),  # 1.5 and 2.5: the first one of equal fractions
        ([1.0, 1.0, 1.0], 8, [9, 9, 9], [3, 3, 2]),
        ([0.0, 0.0], 5, [9, 9], [3, 2]),  # no weights at all: equal
        ([1.0, 0.0, 0.0], 9, [5, 9, 9], [5, 2, 2]),  # none left but zeros
        ([4.0, 2.0, 1.0, 1.0], 80, [20, 20, 40, 9], [20, 20, 31, 9]),  # full in three rounds
        ([1.0, 2.0], 50, [9, 9], [9, 9]),
        ([1.0, 2.0], 5, [0, 9], [0, 5]),
        ([1.0, 2.0], 0, [9, 9], [0, 0]),
        ([7.0], 5, [9], [5]),
        ([1.0, 2.0] * 20, 70, [9] * 40, [1, 3] * 10 + [1, 2] * 10),  # more parts than get sorted stably by chance
    ],
)
def test_shares_by_hand(weights, total, caps, expected):
    assert budget.shares(weights, total, caps) == exact_shares(weights, total, caps) == expected
    given = torch.tensor(weights)
    assert hk.shares(given, [total], caps, tiles=[len(caps)]).tolist() == expected
    assert reference.shares(given, torch.tensor(caps), [total], [len(caps)]).tolist() == expected


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(4))
def test_shares_of_random_images(seed):
    """Kernel, reference and host agree to the last token; whole numbers are shared out as fractions are."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(100):
        sizes, tiles, totals = draw_images(rng)
        count = len(sizes)
        weights = rng.choice(
            [
                torch.rand(count),
                torch.rand(count).double(),
                torch.randint(0, 5, (count,)).float(),
                torch.rand(count).bfloat16(),
            ]
        )
        caps = torch.tensor([rng.choice([size, size, size // 2, 0]) for size in sizes], dtype=torch.int64)
        totals = [total + rng.choice([0, 0, 50]) for total in totals]
        result = hk.shares(weights, totals, rng.choice([caps, caps.int(), caps.tolist()]), tiles=tiles)
        assert torch.equal(result, reference.shares(weights, caps, totals, tiles))
        for given, w, cap, total in zip(result.split(tiles), weights.split(tiles), caps.split(tiles), totals):
            assert given.tolist() == budget.shares(w.double().tolist(), total, cap.tolist())
            assert int(given.sum()) == min(total, int(cap.sum()))
            assert bool((given <= cap).all())
            if weights.dtype == torch.float32:
                assert given.tolist() == exact_shares(w.tolist(), total, cap.tolist())


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_shares_of_weights_that_are_none(kind):
    """They count as 0, whatever they are, and the sum stays right."""
    weights = torch.tensor([math.nan, 1.0, -math.inf, 3.0, -2.0, math.inf], dtype=kind)
    expected = [0, 2, 0, 6, 0, 0]
    assert hk.shares(weights, [8], [9] * 6, tiles=[6]).tolist() == expected
    assert reference.shares(weights, torch.tensor([9] * 6), [8], [6]).tolist() == expected
    assert hk.shares(weights * math.nan, [8], [9] * 6, tiles=[6]).tolist() == [2, 2, 1, 1, 1, 1]
    assert hk.shares(weights, [8], torch.tensor([9, -4, 9, 5, 9, 9]), tiles=[6]).tolist() == [1, 0, 1, 5, 1, 0]
    caps = torch.full((6,), 2**62)  # their sum is no int64
    assert hk.shares(weights, [8], caps, tiles=[6]).tolist() == expected
    assert reference.shares(weights, caps, [8], [6]).tolist() == expected
    if kind == torch.float64:
        huge = torch.tensor([1e300, 1e-300, 1e-320, 1e279, 1e279], dtype=kind)
        result = hk.shares(huge, [2**20], [2**20] * 5, tiles=[5])
        assert result.tolist() == [0, 0, 0, 2**19, 2**19]
        assert torch.equal(reference.shares(huge, torch.full((5,), 2**20), [2**20], [5]), result)


def test_shares_to_the_best_tokens():
    """Budgets by data, as HiRED's: with no step on the host in between."""
    weights, scores = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.rand(64)
    call = {"sizes": [16] * 4, "tiles": [4], "totals": [40]}
    budgets = hk.shares(weights, [40], torch.full((4,), 16), tiles=[4])
    hk.check_inputs(scores=scores, weights=weights, budgets=budgets, **call)
    indices, roles = hk.select_top_segments(scores, budgets, **call)
    assert int(indices.min()) >= 0
    assert [int(part.sum()) for part in roles.split(16)] == [16, 8, 8, 8]


# --------------------------------------------------------------------------------------------- compilation, dispatch


def test_opcheck():
    scores, budgets, mask = torch.rand(50), torch.tensor([3, 5, 0]), torch.rand(50) < 0.7
    opcheck(torch.ops.hiprune.select_top_segments.default, (scores, budgets, None, [10, 20, 20], [2, 1], [9, 4]))
    opcheck(torch.ops.hiprune.select_top_segments.default, (scores, budgets.int(), mask, [10, 20, 20], [3], [9]))
    opcheck(torch.ops.hiprune.shares.default, (torch.rand(3), budgets, [6, 2], [2, 1]))


@pytest.mark.filterwarnings("error:Dynamo detected")
def test_compiles_without_graph_breaks():
    def function(weights, caps, scores):
        budgets = hk.shares(weights, [40, 9], caps, tiles=[3, 1])
        return hk.select_top_segments(scores, budgets, sizes=[25] * 4, tiles=[3, 1], totals=[40, 9])

    arguments = torch.rand(4), torch.full((4,), 25), torch.rand(100)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
    assert_same(compiled, function(*arguments))


def test_devices_without_a_kernel_go_to_the_reference(monkeypatch):
    calls = []
    monkeypatch.setattr(hk.ops.segments, "warn_without_cpu_kernels", lambda: calls.append("warned"))
    arguments = torch.rand(6), torch.tensor([1, 2]), None, [3, 3], [2], [3]
    assert_same(hk.ops.segments._select_reference(*arguments), torch.ops.hiprune.select_top_segments(*arguments))
    arguments = torch.rand(2), torch.tensor([9, 9]), [7], [2]
    assert torch.equal(hk.ops.segments._shares_reference(*arguments), torch.ops.hiprune.shares(*arguments))
    built = bool(hk.ops.library.CPU_KERNELS)  # or else the operators go there too
    assert calls == ["warned"] * (2 if built else 4)


# --------------------------------------------------------------------------------------------------------- bad input

CALL = {"scores": torch.rand(45), "budgets": torch.tensor([9, 2]), "sizes": [36, 9], "tiles": [2], "totals": [11]}
SHARES = {"weights": torch.rand(2), "totals": [11], "caps": [36, 9], "tiles": [2]}


@pytest.mark.parametrize(
    ("function", "change", "error", "message"),
    [
        (hk.select_top_segments, {"sizes": [36, 9, 0]}, ValueError, r"sizes\[2\]: expected at least 1, got 0"),
        (hk.select_top_segments, {"sizes": [36, 9.0]}, TypeError, r"sizes\[1\]: expected an int, got float"),
        (
            hk.select_top_segments,
            {"sizes": [36, 10]},
            ValueError,
            r"scores: expected \[T\] = \(46,\), got shape \(45,\)",
        ),
        (hk.select_top_segments, {"tiles": [1]}, ValueError, "tiles: expected a sum of 2, as there are sizes, got 1"),
        (
            hk.select_top_segments,
            {"totals": [46]},
            ValueError,
            r"totals\[0\]: expected at most 45, the image's tokens, got 46",
        ),
        (hk.select_top_segments, {"totals": [5, 6]}, ValueError, "totals: expected 1, one for each image, got 2"),
        (hk.select_top_segments, {"totals": [-1]}, ValueError, r"totals\[0\]: expected at least 0, got -1"),
        (hk.select_top_segments, {"scores": torch.ones(45, dtype=torch.int64)}, TypeError, "scores: expected float32"),
        (hk.select_top_segments, {"budgets": [9, 2]}, TypeError, r"budgets: expected a tensor \[R\], got list"),
        (
            hk.select_top_segments,
            {"budgets": torch.rand(2)},
            TypeError,
            "budgets: expected int64 or int32, got torch.float32",
        ),
        (hk.select_top_segments, {"budgets": torch.tensor([9])}, ValueError, r"budgets: expected \[R\] = \(2,\)"),
        (
            hk.select_top_segments,
            {"budgets": torch.empty(2, dtype=torch.int64, device="meta")},
            ValueError,
            "budgets: expected device cpu",
        ),
        (hk.select_top_segments, {"candidate_mask": torch.ones(45)}, TypeError, "candidate_mask: expected bool"),
        (hk.shares, {"weights": torch.rand(3)}, ValueError, r"weights: expected \[R\] = \(2,\), got shape \(3,\)"),
        (hk.shares, {"caps": [36, -1]}, ValueError, r"caps\[1\]: expected at least 0, got -1"),
        (hk.shares, {"caps": [36]}, ValueError, r"caps: expected \[R\] = \(2,\), got shape \(1,\)"),
        (hk.shares, {"caps": torch.rand(2)}, TypeError, "caps: expected int64 or int32"),
    ],
)
def test_bad_input(function, change, error, message):
    call = CALL if function is hk.select_top_segments else SHARES
    function(**call)
    with pytest.raises(error, match=message):
        function(**{**call, **change})


def test_check_inputs():
    call = {name: value for name, value in CALL.items() if name != "scores"}
    hk.check_inputs(**call)
    mask = torch.arange(45) < 38
    hk.check_inputs(**call, candidate_mask=mask)
    for change, message in (
        ({"budgets": torch.tensor([-1, 2])}, r"budgets: expected 0\.\.36, the candidates of segment 0, got -1"),
        ({"budgets": torch.tensor([1, 10])}, r"budgets: expected 0\.\.9, the candidates of segment 1, got 10"),
        ({"budgets": torch.tensor([9, 3])}, "budgets: expected a sum of 11, the total of image 0, got 12"),
        (
            {"budgets": torch.tensor([8, 3]), "candidate_mask": mask},
            r"budgets: expected 0\.\.2, the candidates of segment 1",
        ),
        ({"totals": [12]}, "budgets: expected a sum of 12"),
        ({"weights": torch.tensor([1.0, -2.0])}, "weights: expected at least 0, got -2.0"),
        ({"weights": torch.tensor([1.0, math.nan])}, "weights: expected finite values, got 1 NaN"),
        ({"scores": torch.tensor([1.0, math.inf])}, "scores: expected finite values"),
    ):
        with pytest.raises(ValueError, match=message):
            hk.check_inputs(**{**call, **change})
