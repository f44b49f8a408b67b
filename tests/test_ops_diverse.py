"""Diverse selection on the CPU: the C++ kernel against the definition in float64, bad input, compilation."""

import itertools
import math
import random

import pytest
import torch
from torch.library import opcheck

import hiprune_kernels as hk
from hiprune_kernels import reference
from hiprune_kernels.ops import diverse
from hiprune_kernels.ops.library import CPU_KERNELS

needs_cpu_kernels = pytest.mark.skipif(not CPU_KERNELS, reason="the C++ extension is not built")
ISAS = [0, 1, 2]  # any processor, AVX2, AVX-512; what a processor lacks falls back to the next one below
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def with_isa(features, quality=None, mask=None, *, sizes=(), counts, gram=False, isa=2):
    return torch.ops.hiprune._cpu_select_diverse(features, quality, mask, list(sizes), list(counts), gram, isa)


# ------------------------------------------------------------------------------------------------- the definition


def cosines_of(features):
    units = features.double() / features.double().norm(dim=1, keepdim=True).clamp(min=1e-12)
    return units @ units.T


def worths(cosines, quality, eligible, chosen):
    """By definition, in float64: what each token is worth as the next one behind those chosen."""
    if quality is None:
        distances = 1 - cosines
        if not chosen:
            distances.fill_diagonal_(math.inf)
        return distances[:, chosen or eligible.nonzero()[:, 0].tolist()].amin(dim=1)
    kernel = quality.double()[:, None] * cosines * quality.double()
    if not chosen:
        return kernel.diagonal()
    rest = kernel[:, chosen]  # what the variance of a Gaussian with this covariance keeps, given those chosen
    return kernel.diagonal() - (rest * torch.linalg.solve(kernel[chosen][:, chosen], rest.T).T).sum(dim=1)


def assert_greedy(result, features, quality=None, mask=None, *, count, tolerance=2e-6):
    """Each choice is worth as much as any, but for rounding; and the two results hold the same tokens."""
    indices, order = (x.tolist() for x in result)
    eligible = torch.ones(len(features), dtype=torch.bool) if mask is None else mask
    found = min(count, int(eligible.sum()))
    for listed in (indices, order):
        assert len(listed) == count
        assert listed[found:] == [-1] * (count - found)
    assert indices[:found] == sorted(set(order[:found]))
    cosines, left = cosines_of(features), eligible.clone()
    scale = 1.0 if quality is None else float(quality.double().square().where(eligible, 0.0).max())
    for step in range(found):
        worth = worths(cosines, quality, eligible, order[:step])
        assert left[order[step]]
        assert worth[order[step]] >= worth[left].max() - tolerance * scale, step
        left[order[step]] = False


def signs(*size, scale=1.0):
    """Features of +-scale, in 4^k channels: cosines are exact in every dtype, whoever adds them up, and full of ties."""
    assert math.isqrt(size[-1]) ** 2 == size[-1]
    return torch.where(torch.rand(size) < 0.5, scale, -scale)


def draw_case(rng):
    """Features, quality or None, and options of one random call; sizes make it a packed one."""
    channels, options = rng.choice([1, 5, 16, 64, 70]), {}
    if rng.random() < 0.5:
        shape = rng.choice([0, 1, 2, 3]), rng.randint(1, 70)
        options["count"] = rng.randint(1, shape[1])
    else:
        options["sizes"] = [rng.choice([1, 2, 16, rng.randint(1, 70)]) for _ in range(rng.randint(0, 4))]
        options["counts"] = [rng.randint(1, size) for size in options["sizes"]]
        shape = (sum(options["sizes"]),)
    if rng.random() < 0.4:
        options["candidate_mask"] = torch.rand(shape) < rng.choice([0.2, 0.7])
    features = torch.randn(*shape, channels)
    quality = torch.rand(shape) if rng.random() < 0.5 else None
    if rng.random() < 0.2 and shape[-1]:
        features = torch.randn(channels, *shape).movedim(0, -1)  # last dimension not contiguous
    elif rng.random() < 0.2:  # every other row of a longer tensor
        features = features.repeat_interleave(2, dim=-2)[..., ::2, :]
    if quality is not None and rng.random() < 0.3:
        quality = torch.stack([quality, 1 - quality], dim=-1)[..., 0]
    return features, quality, options


def images_of(features, quality, options, result):
    """Of each image of a call: features, quality, mask, count, and its part of the results, counted from its start."""
    mask = options.get("candidate_mask")
    if "count" in options:
        for b in range(len(features)):
            q, m = (None if x is None else x[b] for x in (quality, mask))
            yield features[b], q, m, options["count"], [x[b] for x in result]
        return
    token = row = 0
    for size, count in zip(options["sizes"], options["counts"]):
        image, rows = slice(token, token + size), slice(row, row + count)
        q, m = (None if x is None else x[image] for x in (quality, mask))
        yield features[image], q, m, count, [torch.where(x[rows] < 0, x[rows], x[rows] - token) for x in result]
        token, row = image.stop, rows.stop


def call(function, features, quality, options):
    return getattr(function, "select_diverse_varlen" if "sizes" in options else "select_diverse")(
        features, quality=quality, **options
    )


def check_call(result, features, quality, options, tolerance=2e-6):
    shape = (len(features), options["count"]) if "count" in options else (sum(options["counts"]),)
    for x in result:
        assert x.dtype == torch.int64
        assert x.shape == shape
        assert x.is_contiguous()
    for f, q, m, count, part in images_of(features, quality, options, result):
        eligible = len(f) if m is None else int(m.sum())
        if q is None or min(count, eligible) <= f.shape[1] // 2:  # beyond, rounding decides
            assert_greedy(part, f, q, m, count=count, tolerance=tolerance)
        else:
            order = part[1][part[1] >= 0].tolist()
            assert len(set(order)) == min(count, eligible)
            assert m is None or m[order].all()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("module", [hk, reference])
@pytest.mark.parametrize("seed", range(4))
def test_random_calls_are_greedy(seed, module):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(25):
        features, quality, options = draw_case(rng)
        check_call(call(module, features, quality, options), features, quality, options)


def test_wrong_orders_are_seen():
    """The tolerance tells a right order from one with two choices swapped, or a neighbour of the right one."""
    features, quality = torch.randn(100, 64), torch.rand(100) + 0.5
    for q in (None, quality):
        indices, order = (
            x[0] for x in hk.select_diverse(features[None], count=8, quality=None if q is None else q[None])
        )
        assert_greedy((indices, order), features, q, count=8)
        swapped = order.clone()
        swapped[[2, 3]] = order[[3, 2]]
        shifted = (order + 1) % 100
        for wrong in (swapped, shifted, order.flip(0), torch.arange(8)):
            with pytest.raises(AssertionError):
                assert_greedy((wrong.sort().values, wrong), features, q, count=8)


# ------------------------------------------------------------------------------------------------------ cases by hand


@pytest.fixture(params=["operator", "reference", *(f"isa {isa}" for isa in ISAS)])
def select(request):
    """Order of choice for one image, by the operator, by the reference, and with each instruction set."""

    def run(features, count, quality=None, mask=None):
        features, quality, mask = (None if x is None else torch.as_tensor(x)[None] for x in (features, quality, mask))
        if request.param.startswith("isa"):
            if not CPU_KERNELS:
                pytest.skip("the C++ extension is not built")
            indices, order = with_isa(features, quality, mask, counts=[count], isa=int(request.param[-1]))
        else:
            function = {"operator": hk, "reference": reference}[request.param].select_diverse
            indices, order = function(features, count=count, quality=quality, candidate_mask=mask)
        found = order[order >= 0]
        assert torch.equal(indices[0], torch.cat([found.sort().values, order[order < 0]]))
        return order[0].tolist()

    return run


@pytest.mark.parametrize("dtype", DTYPES)
def test_farthest_points_by_hand(select, dtype):
    """Directions of 0, 10, 90 and 180 degrees: first the last one, then the opposite one, then the one between."""
    angles = torch.tensor([0.0, 10.0, 90.0, 180.0]).deg2rad()
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert select(features.to(dtype), 3) == [3, 0, 2]
    assert select(features.to(dtype), 4) == [3, 0, 2, 1]
    assert select(features.to(dtype), 1) == [3]
    lengths = torch.tensor([[0.1], [30.0], [2.0], [1.0]])  # which do not count
    assert select((features * lengths).to(dtype), 3) == [3, 0, 2]
    # without the last one, 90 degrees is farthest from its nearest; it alone is left out as a neighbour, too
    assert select(features.to(dtype), 2, mask=[True, True, True, False]) == [2, 0]
    assert select(features.to(dtype), 4, mask=[True, True, False, False]) == [0, 1, -1, -1]
    assert select(features.to(dtype), 2, mask=[False] * 4) == [-1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_determinant_by_hand(select, dtype):
    """The best token covers its double whole, and the fourth one by half: .36 / 2 is left, more than 1e-12.

    Then nothing is left of anybody, and quality decides: the lower index of two equal ones, or the better one.
    """
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=dtype)
    assert select(features, 4, quality=[1.0, 1e-6, 1e-6, 0.6]) == [0, 3, 1, 2]
    assert select(features, 3, quality=[1.0, 1e-6, 2e-6, 0.6]) == [0, 3, 2]
    assert select(features, 3, quality=[1.0, 0.9, 0.5, 0.6]) == [0, 2, 1]  # .25 of the third one, .18 of the fourth
    assert select(features, 2, quality=[1.0, 0.9, 0.1, 0.6], mask=[False, True, True, True]) == [1, 3]
    assert select(features, 2, quality=[0.0, 0.0, 0.0, 0.0]) == [0, 1]
    assert select(features, 4, quality=[0.0, 0.0, 0.5, 0.0], mask=[True, True, True, False]) == [2, 0, 1, -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_rounding_leaves_is_not_worth_a_choice(select, dtype):
    """A token that is left with 0 exactly, or next to it, waits for one of less quality that is left with something."""
    features = torch.eye(4, dtype=dtype)[[0, 0, 1, 1, 2]]
    assert select(features, 5, quality=[1.0, 0.9, 0.8, 0.7, 1e-3]) == [0, 2, 4, 1, 3]
    assert select(features, 5, quality=[1.0, 0.9, 0.8, 0.7, 1e-7]) == [0, 2, 1, 3, 4]  # 1e-14 is below 1e-12


def test_rows_of_zeros_are_orthogonal_to_everything(select):
    features = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.8, 0.6]])
    assert select(features, 3) == [1, 0, 2]
    assert select(torch.tensor([[1.0, 0.0], [0.0, 0.0], [-1.0, 0.0]]), 3) == [0, 2, 1]  # all are 1 from their nearest
    assert select(torch.zeros(3, 2), 3) == [0, 1, 2]
    assert select(torch.zeros(3, 0), 3) == [0, 1, 2]
    assert select(torch.zeros(3, 2), 3, quality=[0.1, 0.3, 0.2]) == [1, 2, 0]
    assert select(features, 3, quality=[0.1, 1.0, 0.2]) == [2, 0, 1]  # with an L of 0, it comes last
    assert select(torch.ones(1, 2), 1) == select(torch.ones(1, 2), 1, quality=[0.0]) == [0]


# ----------------------------------------------------------------------------------------- sizes, dtypes and ties


@needs_cpu_kernels
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 9, 23, 24, 25, 47, 48, 49, 97, 200])
def test_every_instruction_set_and_every_end_of_a_panel(tokens, dtype, isa):
    """Ties and all, farthest points equal the reference; what rounds, the definition."""
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for channels in (1, 16, 64, 256, 1024):  # more than stay in a cache, from 128 on
        features, mask = signs(1, tokens, channels).to(dtype), torch.rand(1, tokens) < 0.7
        for m in (None, mask):
            expected = reference.select_diverse(features, count=tokens, candidate_mask=m)
            for x, y in zip(with_isa(features, None, m, counts=[tokens], isa=isa), expected):
                assert torch.equal(x, y)
    for channels in (67, 300):
        features, quality = torch.randn(1, tokens, channels, dtype=dtype), torch.rand(1, tokens, dtype=dtype)
        for q, m in ((None, None), (None, mask), (quality, None), (quality, mask)):
            count = min(tokens, 20)
            result = with_isa(features, q, m, counts=[count], isa=isa)
            arguments = (None if x is None else x[0] for x in (features, q, m))
            assert_greedy([x[0] for x in result], *arguments, count=count, tolerance=tolerance)


@needs_cpu_kernels
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quality", [False, True])
def test_a_given_matrix(quality, isa):
    """The private form that takes cosines in the place of features."""
    features, mask = torch.randn(2, 60, 40, dtype=torch.float64), torch.rand(2, 60) < 0.7
    q = torch.rand(2, 60, dtype=torch.float64) if quality else None
    matrix = torch.stack([cosines_of(x) for x in features])
    for m in (None, mask):
        for given in (matrix, matrix.repeat_interleave(2, dim=1)[:, ::2]):
            for x, y in zip(
                with_isa(given, q, m, counts=[19], gram=True, isa=isa),
                with_isa(features, q, m, counts=[19], isa=isa),
            ):
                assert torch.equal(x, y)
    ties = signs(1, 60, 16)
    expected = reference.select_diverse(ties, count=60)
    for x, y in zip(with_isa(ties @ ties.mT / 16, counts=[60], gram=True, isa=isa), expected):
        assert torch.equal(x, y)


@needs_cpu_kernels
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_other_token_stands_anywhere(dtype, isa):
    """In a matrix that is not even symmetric, each row's largest entry but its own decides who is first."""
    for tokens in range(2, 40):
        matrix = torch.rand(60, tokens, tokens, dtype=dtype)
        nearest = matrix.masked_fill(torch.eye(tokens, dtype=torch.bool), -1.0).amax(dim=2)
        _, order = with_isa(matrix, counts=[1], gram=True, isa=isa)
        assert torch.equal(order[:, 0], (1 - nearest).argmax(dim=1))


@needs_cpu_kernels
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("quality", [False, True])
def test_a_smaller_count_is_a_part_of_a_larger_one(quality, dtype, isa):
    """Few rows are computed one by one, many at once; the bits must be the same. 60 choices go beyond the rank."""
    features, q = torch.randn(1, 300, 40, dtype=dtype), torch.rand(1, 300, dtype=dtype) if quality else None
    orders = [with_isa(features, q, counts=[count], isa=isa)[1][0] for count in (1, 2, 20, 37, 38, 39, 60, 300)]
    for order in orders:
        assert torch.equal(order, orders[-1][: len(order)])


@needs_cpu_kernels
@pytest.mark.parametrize("isa", ISAS)
def test_of_equal_tokens_the_lowest_index_wins(isa):
    """Wherever they stand: equal tokens have equal cosines, bit for bit."""
    unique, copies = torch.randn(60, 300), torch.arange(60).repeat(4)[torch.randperm(240)]
    first = torch.stack([(copies == i).nonzero()[0, 0] for i in range(60)])
    quality = torch.rand(60) + 0.5
    for count in (5, 30, 60):  # a few rows one by one, and all at once
        order = with_isa(unique[None], quality[None], counts=[count], isa=isa)[1][0]
        result = with_isa(unique[copies][None], quality[copies][None], counts=[count], isa=isa)[1][0]
        assert torch.equal(result, first[order])


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS)
def test_half_precision_is_read_exactly(dtype, isa):
    for channels in (3, 8, 61):
        features, quality = torch.randn(2, 70, channels).to(dtype), torch.rand(2, 70).to(dtype)
        for q in (None, quality):
            expected = with_isa(features.float(), None if q is None else q.double(), counts=[30], isa=isa)
            for x, y in zip(with_isa(features, q, counts=[30], isa=isa), expected):
                assert torch.equal(x, y)
                assert x.unique().numel() > 20


@needs_cpu_kernels
def test_candidates_alone_count():
    """The others might as well not be there, and may hold anything."""
    features, quality, mask = torch.randn(1, 300, 40), torch.rand(1, 300), torch.rand(1, 300) < 0.5
    positions = mask[0].nonzero()[:, 0]
    features[~mask], quality[~mask] = math.nan, math.inf
    for q in (None, quality):
        part = None if q is None else q[:, positions]
        for count in (3, 20, 60):
            result = hk.select_diverse(features, count=count, quality=q, candidate_mask=mask)
            expected = hk.select_diverse(features[:, positions], count=count, quality=part)
            for x, y in zip(result, expected):
                assert torch.equal(x, positions[y])


@needs_cpu_kernels
@pytest.mark.parametrize("quality", [False, True])
def test_too_many_tokens_for_a_whole_matrix(quality):
    """Its 256 MiB end at 8192 float32 tokens: nearest neighbours are then found without keeping it."""
    features = signs(1, 8200, 16)
    q = torch.rand(1, 8200) if quality else None
    _, order = hk.select_diverse(features, count=4, quality=q)
    order = order[0].tolist()
    if quality:
        cosines = features[0][order] @ features[0].T / 16
        worth = q[0].double() ** 2
        chosen = []
        for step, j in enumerate(order):
            assert worth[j] >= worth.max() - 1e-6
            chosen.append(j)
            kernel = q[0][order].double()[:, None] * cosines.double() * q[0].double()
            rows, square = kernel[: step + 1], kernel[: step + 1][:, chosen]
            worth = q[0].double() ** 2 - (rows * torch.linalg.solve(square, rows)).sum(dim=0)
            worth[chosen] = -math.inf
        return
    nearest = []
    for start in range(0, 8200, 1025):
        distances = 1 - features[0, start : start + 1025] @ features[0].T / 16
        distances[torch.arange(1025), torch.arange(start, start + 1025)] = math.inf
        nearest.append(distances.amin(dim=1))
    assert order[0] == int(torch.cat(nearest).argmax())
    least = torch.full((8200,), math.inf)
    for before, j in itertools.pairwise(order):
        least = torch.minimum(least, 1 - features[0, before] @ features[0].T / 16)
        least[before] = -math.inf
        assert j == int(least.argmax())


# ---------------------------------------------------------------------------------------------------- same bits


@needs_cpu_kernels
@pytest.mark.parametrize("quality", [False, True])
def test_same_bits_for_any_number_of_threads_and_neighbours(quality):
    """One image, whose work threads share, and several, which they share out. Beyond the rank, every bit decides."""
    features, q = torch.randn(7, 300, 50), torch.rand(7, 300) if quality else None
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        alone = hk.select_diverse(features[3:4], count=120, quality=None if q is None else q[3:4])
        results.append((*hk.select_diverse(features, count=120, quality=q), *alone))
    torch.set_num_threads(1)
    for result in results:
        for x, y in zip(result, results[0]):
            assert torch.equal(x, y)
        assert torch.equal(result[1][3:4], result[3])
    sizes, packed = [5, 300, 40], torch.cat([features[0, :5], features[3], features[1, :40]])
    packed_q = None if q is None else torch.cat([q[0, :5], q[3], q[1, :40]])
    _, order = hk.select_diverse_varlen(packed, sizes=sizes, counts=[2, 120, 9], quality=packed_q)
    assert torch.equal(order[2:122] - 5, results[0][3][0])


# ---------------------------------------------------------------------------------------------- not a number


@needs_cpu_kernels
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30, 1e-30])
def test_whatever_comes_in_candidates_come_out(value, isa):
    for share in (0.01, 1.0):
        features, quality = torch.randn(3, 60, 40), torch.rand(3, 60)
        features[torch.rand(features.shape) < share] = value
        mask = torch.rand(3, 60) < 0.8
        quality[torch.rand(quality.shape) < share / 2] = value
        for q in (None, quality, torch.full_like(quality, value)):
            for m in (None, mask):
                for order in (
                    with_isa(features, q, m, counts=[40], isa=isa)[1],
                    hk.reference.select_diverse(features, count=40, quality=q, candidate_mask=m)[1],
                ):
                    for b in range(3):
                        assert len(order[b].unique()) == 40
                        assert m is None or m[b, order[b]].all()


def test_check_inputs_tells():
    features, quality = torch.randn(2, 9, 4), torch.rand(2, 9)
    hk.check_inputs(features=features, quality=quality, candidate_mask=quality > -1, budget=9)
    features[0, 3, 1] = math.nan
    with pytest.raises(ValueError, match="features: expected finite values, got 1 NaN and 0 infinite of 72"):
        hk.check_inputs(features=features)
    with pytest.raises(ValueError, match="quality: expected no negative values, got 18 of 18"):
        hk.check_inputs(quality=-1 - quality)
    quality[1, 2] = math.inf
    with pytest.raises(ValueError, match="quality: expected finite values, got 0 NaN and 1 infinite of 18"):
        hk.check_inputs(quality=quality)


# ------------------------------------------------------------------------------------------------- compilation


def test_opcheck():
    features, quality, mask = torch.randn(2, 30, 5), torch.rand(2, 30), torch.rand(2, 30) < 0.7
    op = torch.ops.hiprune.select_diverse.default
    opcheck(op, (features, None, None, [], [9]))
    opcheck(op, (features.requires_grad_(), quality, mask, [], [9]))
    opcheck(op, (torch.randn(30, 5), torch.rand(30), None, [20, 10], [3, 4]))


@pytest.mark.filterwarnings("error:Dynamo detected")
def test_compiles_without_graph_breaks():
    features, quality = torch.randn(2, 36, 5, requires_grad=True), torch.rand(2, 36)

    def batch(features, quality):
        return hk.select_diverse(features, count=9, quality=quality)

    def packed(features):
        return hk.select_diverse_varlen(features, sizes=[30, 6], counts=[9, 1])

    for dynamic in (False, True):
        compiled = torch.compile(batch, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for x, y in zip(compiled(features, quality), batch(features, quality)):
            assert torch.equal(x, y)
            assert not x.requires_grad
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(features[0]), packed(features[0])):
        assert torch.equal(x, y)


def test_devices_without_a_kernel_go_to_the_reference(monkeypatch):
    """The composite kernel is what a pure-Python install, or a device without kernels, runs."""
    calls = []
    original = reference.farthest_points
    monkeypatch.setattr(reference, "farthest_points", lambda *a: calls.append(1) or original(*a))
    monkeypatch.setattr(diverse, "warn_without_cpu_kernels", lambda: calls.append("warned"))
    features = signs(2, 30, 16)
    result = diverse._select_reference(features, None, None, [], [9])
    assert calls == ["warned", 1, 1]
    for x, y in zip(result, hk.select_diverse(features, count=9)):
        assert torch.equal(x, y)
    packed = diverse._select_reference(features.flatten(0, 1), None, None, [30, 30], [9, 9])
    assert torch.equal(packed[1].view(2, 9) - torch.tensor([[0], [30]]), result[1])


# -------------------------------------------------------------------------------------------------------- bad input

DENSE = {"features": torch.randn(2, 36, 5), "count": 9, "quality": torch.rand(2, 36)}
PACKED = {"features": torch.randn(45, 5), "sizes": [36, 9], "counts": [9, 2], "quality": torch.rand(45)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"count": 0}, ValueError, "count: expected at least 1, got 0"),
        ({"count": 37}, ValueError, r"count: expected 1\.\.36, as many as there are tokens, got 37"),
        ({"count": 9.0}, TypeError, "count: expected an int, got float"),
        ({"features": [1.0]}, TypeError, r"features: expected a tensor \[B N C\], got list"),
        ({"features": torch.randn(36, 5)}, ValueError, r"features: expected \[B N C\], got shape \(36, 5\)"),
        ({"features": torch.ones(2, 36, 5, dtype=torch.int64)}, TypeError, "features: expected float32"),
        ({"quality": torch.rand(36)}, ValueError, r"quality: expected \[B N\], got shape \(36,\)"),
        ({"quality": torch.rand(2, 35)}, ValueError, r"quality: expected \[B N\] = \(2, 36\), got shape \(2, 35\)"),
        ({"quality": torch.ones(2, 36, dtype=torch.int64)}, TypeError, "quality: expected float32"),
        ({"quality": torch.empty(2, 36, device="meta")}, ValueError, "quality: expected device cpu as features"),
        ({"candidate_mask": torch.ones(2, 36)}, TypeError, "candidate_mask: expected bool"),
        ({"candidate_mask": torch.ones(2, 35, dtype=torch.bool)}, ValueError, r"candidate_mask: expected \[B N\] = \(2, 36\)"),
    ],
)  # fmt: skip
def test_bad_dense_input(change, error, message):
    hk.select_diverse(**DENSE)
    with pytest.raises(error, match=message):
        hk.select_diverse(**{**DENSE, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sizes": [36, 8]}, ValueError, "sizes: expected a sum of 45, the rows of features, got 44"),
        ({"sizes": [45, 0]}, ValueError, r"sizes\[1\]: expected at least 1, got 0"),
        ({"sizes": 45}, TypeError, "sizes: expected a list"),
        ({"counts": [9]}, ValueError, "counts: expected 2, one per size, got 1"),
        ({"counts": [9, 10]}, ValueError, r"counts\[1\]: expected 1\.\.9, as many as there are tokens, got 10"),
        ({"counts": [0, 2]}, ValueError, r"counts\[0\]: expected at least 1, got 0"),
        ({"features": torch.randn(1, 45, 5)}, ValueError, r"features: expected \[T C\], got shape \(1, 45, 5\)"),
        ({"quality": torch.rand(44)}, ValueError, r"quality: expected \[T\] = \(45,\), got shape \(44,\)"),
        ({"candidate_mask": torch.ones(44, dtype=torch.bool)}, ValueError, r"candidate_mask: expected \[T\] = \(45,\)"),
    ],
)
def test_bad_packed_input(change, error, message):
    hk.select_diverse_varlen(**PACKED)
    with pytest.raises(error, match=message):
        hk.select_diverse_varlen(**{**PACKED, **change})


@needs_cpu_kernels
def test_kernel_refuses_arguments_that_do_not_fit():
    """What a direct call of the operator could get wrong, and would read or write beyond memory."""
    batch, packed = torch.randn(2, 36, 5), torch.randn(45, 5)
    for arguments, message in (
        ((batch, None, None, [36], [9]), "expected one and no sizes for a batch, got 1 and 1"),
        ((batch, None, None, [], [9, 9]), "expected one and no sizes for a batch, got 2 and 0"),
        ((batch, None, None, [], [37]), r"expected 1\.\.36 of fewer than 2\*\*31 tokens, got 37"),
        ((batch, None, None, [], [0]), r"expected 1\.\.36"),
        ((packed, None, None, [36, 9], [9]), "expected 2, one per size, got 1"),
        ((packed, None, None, [36, 10], [9, 2]), "expected 46 rows, got 45"),
        ((packed[0], None, None, [], [1]), "expected 2 or 3 dimensions, got 1"),
        ((batch.int(), None, None, [], [9]), "features: expected float32, bfloat16, float16 or float64"),
        ((batch, torch.rand(2, 35), None, [], [9]), "quality: expected the sizes of features"),
        ((batch, None, torch.ones(36, dtype=torch.bool), [], [9]), "candidate_mask: expected the sizes of features"),
        ((batch, None, torch.ones(2, 36), [], [9]), "candidate_mask: expected bool"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.hiprune.select_diverse(*arguments)
    for given in (batch, torch.randn(2, 5, 5).half()):
        with pytest.raises(RuntimeError, match="expected a Gram matrix"):
            with_isa(given, counts=[3], gram=True)
