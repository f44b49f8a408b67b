"""Merging of tokens on the CPU: against loops over tokens in float64, the order of sums, gradients, bad input."""

import math
import random

import pytest
import torch
from torch.autograd import forward_ad
from torch.library import opcheck

import hiprune_kernels as hk
from hiprune_kernels import reference
from hiprune_kernels.ops.library import CPU_KERNELS
from hiprune_kernels.ops.merge import cpu_merge_gap

needs_cpu_kernels = pytest.mark.skipif(not CPU_KERNELS, reason="the C++ extension is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def plain(features, keys, targets, sources, wide=torch.float64):
    """One image, in loops: rows, and of each source the position of its target. Sums in order, in `wide`."""
    count, size = len(targets), len(features)
    x, k = features.to(wide), keys.double()
    taken = [int(t) for t in targets if 0 <= t < size]
    members, assigned = [[] for _ in range(count)], [-1] * size
    for s in range(size):
        if not sources[s] or s in taken:
            continue
        best, where = -math.inf, -1
        for j, t in enumerate(targets.tolist()):
            if not 0 <= t < size:
                continue
            value = float(k[s] @ k[t] / k[t].norm().clamp(min=1e-12))
            value = value if math.isfinite(value) else -1e300
            if value > best:
                best, where = value, j
        if where >= 0:
            members[where].append(s)
            assigned[s] = where
    merged, rows = x.clone(), x.new_zeros(count, x.shape[1])
    for j, t in enumerate(targets.tolist()):
        if not 0 <= t < size:
            continue
        rows[j] = x[t]
        if members[j]:
            total = torch.zeros_like(x[0])
            for s in members[j]:
                total = total + x[s]
            rows[j] = merged[t] = x[t] + total / len(members[j])
    return merged.to(features.dtype), rows.to(features.dtype), torch.tensor(assigned, dtype=torch.int64)


def plain_packed(features, keys, targets, sources, sizes, counts, wide=torch.float64):
    parts, first, begin = [[features[:0], features[:0], targets[:0]]], 0, 0
    for size, count in zip(sizes, counts):
        here = slice(first, first + size)
        *rows, assigned = plain(features[here], keys[here], targets[begin : begin + count] - first, sources[here], wide)
        parts.append([*rows, torch.where(assigned < 0, -1, assigned + begin)])
        first, begin = first + size, begin + count
    return [torch.cat(column) for column in zip(*parts)]


def draw_call(rng, most=24):
    """Packed images. Keys of small integers: products and lengths are exact, and many cosines are equal."""
    sizes = [rng.choice([0, 1, rng.randint(1, most), rng.randint(1, most)]) for _ in range(rng.randint(0, 4))]
    counts = [rng.choice([0, 1, 3, 20]) for _ in sizes]
    features = torch.randn(sum(sizes), rng.choice([0, 1, 7, 16, 37])).to(rng.choice(DTYPES))
    keys = torch.randint(-1, 2, (sum(sizes), rng.choice([0, 1, 2, 3, 20]))).to(rng.choice(DTYPES))
    if rng.random() < 0.2 and keys.numel():
        keys[torch.rand(len(keys)) < 0.3, 0] = rng.choice([math.nan, math.inf])
    targets, first = [torch.zeros(0, dtype=torch.int64)], 0
    for size, count in zip(sizes, counts):
        targets.append(torch.randint(-2, size + 2, (count,)) + first)  # some are of other images, some twice
        first += size
    sources = torch.rand(sum(sizes)) < 0.7
    if rng.random() < 0.2:  # any strides
        features, keys = features.T.contiguous().T, keys.repeat_interleave(2, dim=1)[:, ::2]
        sources = sources.repeat_interleave(2)[::2]
    return features, keys, torch.cat(targets), sources, sizes, counts


def assert_same(result, expected, context=None):
    for x, y in zip(result, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y), context


# ------------------------------------------------------------------------------------------------------ what it does

KEYS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 2.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.2]])
FEATURES = torch.arange(0.0, 60.0, 10.0)[:, None]
SOURCES = torch.tensor([False, True, True, True, False, True])  # targets are no sources, though they are marked


@pytest.mark.parametrize("function", [hk.merge_tokens, reference.merge_tokens])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_hand_case(function, dtype):
    """2 goes to 3, 5 to 1: 10 + 50 and 30 + 20."""
    call = FEATURES[None].to(dtype), KEYS[None].to(dtype), torch.tensor([[1, 3]]), SOURCES[None]
    merged, assigned = function(*call)
    assert merged.dtype == dtype
    assert merged.flatten().tolist() == [0, 60, 20, 50, 40, 50]
    assert assigned.tolist() == [[-1, -1, 1, -1, -1, 0]]
    rows, again = function(*call, rows_only=True)
    assert rows.flatten().tolist() == [60, 50]
    assert torch.equal(again, assigned)


@pytest.mark.parametrize(
    ("targets", "rows", "assigned"),
    [
        ([3, 1], [50, 60], [-1, -1, 0, -1, -1, 1]),  # positions follow the list
        ([1], [10 + (20 + 30 + 50) / 3], [-1, -1, 0, 0, -1, 0]),
        ([1, 3, 1], [60, 50, 10], [-1, -1, 1, -1, -1, 0]),  # twice in the list: the first place has the sources
        ([-1, 3, 6, 1], [0, 50, 0, 60], [-1, -1, 1, -1, -1, 3]),  # -1 and 6 are no tokens
        ([0, 4], [100 / 4 + 0, 40], [-1, 0, 0, 0, -1, 0]),  # keys of zeros: cosine 0 with all, the first one
        ([-1, 7], [0, 0], [-1] * 6),
        ([], [], [-1] * 6),
    ],
)
def test_targets(targets, rows, assigned):
    targets = torch.tensor([targets], dtype=torch.int64)
    expected = FEATURES.clone()
    for t, row in reversed(list(zip(targets[0].tolist(), rows))):
        if 0 <= t < 6:
            expected[t] = row
    if targets[0].tolist() == [0, 4]:
        rows, expected[0] = [27.5, 40], 27.5
    for function in (hk.merge_tokens, reference.merge_tokens):
        merged, to = function(FEATURES[None], KEYS[None], targets, SOURCES[None])
        torch.testing.assert_close(merged[0], expected)
        assert to.tolist() == [assigned]
        alone, _ = function(FEATURES[None], KEYS[None], targets, SOURCES[None], rows_only=True)
        torch.testing.assert_close(alone[0, :, 0], torch.tensor(rows, dtype=torch.float32))


def test_nan_and_infinite_keys():
    """They are like nothing: of a source to the first target, of a target behind all others."""
    keys = torch.tensor([[1.0, 0.0], [math.nan, 0.0], [-1.0, 0.0], [math.inf, 1.0], [-1.0, -3.0], [math.nan, math.nan]])
    features, sources = torch.eye(6)[None], torch.ones(1, 6, dtype=torch.bool)
    for targets, expected in (
        ([1, 0], [-1, -1, 1, 0, 1, 0]),  # token 2 goes to 0, though their cosine is -1
        ([3, 2], [1, 0, -1, -1, 1, 0]),
        ([1, 5], [0, -1, 0, 0, 0, -1]),
    ):
        for function in (hk.merge_tokens, reference.merge_tokens):
            assert function(features, keys[None], torch.tensor([targets]), sources)[1].tolist() == [expected]


def test_nan_and_infinite_features_stay_where_they_are():
    features = torch.randn(1, 6, 4)
    features[0, 0], features[0, 4, 1] = math.nan, math.inf  # neither sources nor targets
    clean = features.nan_to_num(0.0, posinf=0.0)
    call = KEYS[None], torch.tensor([[1, 3]]), SOURCES[None]
    rows, _ = hk.merge_tokens(features, *call, rows_only=True)
    assert torch.equal(rows, hk.merge_tokens(clean, *call, rows_only=True)[0])
    features[0, 2, 3] = math.nan
    rows, _ = hk.merge_tokens(features, *call, rows_only=True)
    assert rows.isnan().nonzero().tolist() == [[0, 1, 3]]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("seed", range(4))
def test_against_loops(seed):
    """The choice of targets exactly, ties included; sums bit for bit as float32 gives them in the order of tokens."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        call = draw_call(rng)
        whole, rows, assigned = plain_packed(*call, wide=torch.float32)
        named = {"sizes": call[4], "counts": call[5]}
        assert_same(hk.merge_tokens_varlen(*call[:4], **named), (whole, assigned), call)
        assert_same(hk.merge_tokens_varlen(*call[:4], **named, rows_only=True), (rows, assigned), call)
        assert_same(reference.merge_tokens(*call), (whole, assigned), call)
        if cpu_merge_gap(*call[:2]) == "":
            for isa in (0, 1, 2):
                result = torch.ops.hiprune._cpu_merge_tokens(*call, isa % 2 == 0, isa)
                assert_same(result, (rows if isa % 2 == 0 else whole, assigned), (isa, call))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_against_float64(dtype):
    """Keys as encoders have them. Where the two best cosines are too close for float32, either one will do."""
    features, keys = torch.randn(576, 129).to(dtype), torch.randn(576, 64)
    targets, sources = torch.randperm(576)[:40], torch.rand(576) < 0.9
    rows, assigned = hk.merge_tokens(features[None], keys[None], targets[None], sources[None], rows_only=True)
    _, expected, to = plain(features.double(), keys, targets, sources)
    assert torch.equal(assigned[0], to)  # with this seed there are no such cosines
    tolerance = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    error = ((rows[0].double() - expected).abs() / (1 + expected.abs())).max()
    assert error < tolerance
    for wrong in (0 * expected, expected.roll(1, 0), features[targets].double()):  # what must not pass
        assert ((wrong - expected).abs() / (1 + expected.abs())).max() > 10 * tolerance


@needs_cpu_kernels
@pytest.mark.parametrize("isa", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 33])
def test_equal_keys_of_targets_at_the_ends_of_vectors(count, isa):
    """All cosines are equal: the first target has all the sources. And where only the last one is like them, it has."""
    keys, features = torch.ones(1, 50, 3), torch.randn(1, 50, 5)
    targets, sources = torch.arange(count)[None], torch.ones(1, 50, dtype=torch.bool)
    arguments = targets, sources, [], [], True, isa
    _, assigned = torch.ops.hiprune._cpu_merge_tokens(features, keys, *arguments)
    assert assigned[0].tolist() == [-1] * count + [0] * (50 - count)
    keys[0, : count - 1] = torch.tensor([-1.0, -1.0, 0.0])  # cosines below 0, which is what padding would have
    keys[0, count - 1] = torch.tensor([-1.0, 0.0, 0.0])
    _, assigned = torch.ops.hiprune._cpu_merge_tokens(features, keys, *arguments)
    assert assigned[0].tolist() == [-1] * count + [count - 1] * (50 - count)


def test_a_batch_is_its_images():
    features, keys = torch.randn(3, 50, 20), torch.randn(3, 50, 8)
    targets, sources = torch.stack([torch.randperm(50)[:7] for _ in range(3)]), torch.rand(3, 50) < 0.8
    merged, assigned = hk.merge_tokens(features, keys, targets, sources)
    base = torch.arange(3)[:, None]
    packed, to = hk.merge_tokens_varlen(
        features.flatten(0, 1),
        keys.flatten(0, 1),
        (targets + 50 * base).flatten(),
        sources.flatten(),
        sizes=[50] * 3,
        counts=[7] * 3,
    )
    assert torch.equal(packed.view(3, 50, 20), merged)
    assert torch.equal(to.view(3, 50), torch.where(assigned < 0, -1, assigned + 7 * base))
    for b in range(3):
        alone = hk.merge_tokens(features[b : b + 1], keys[b : b + 1], targets[b : b + 1], sources[b : b + 1])
        assert_same(alone, (merged[b : b + 1], assigned[b : b + 1]))


def test_permuted_tokens_and_targets():
    features, keys = torch.randn(40, 6).double(), torch.randn(40, 8)
    targets, sources, order = torch.tensor([3, 30, 12]), torch.rand(40) < 0.7, torch.randperm(40)
    place = order.argsort()
    rows, assigned = hk.merge_tokens(features[None], keys[None], targets[None], sources[None], rows_only=True)
    moved = hk.merge_tokens(
        features[order][None], keys[order][None], place[targets][None], sources[order][None], rows_only=True
    )
    torch.testing.assert_close(moved[0], rows)
    assert torch.equal(moved[1][0], assigned[0][order])
    other = hk.merge_tokens(features[None], keys[None], targets[[2, 0, 1]][None], sources[None], rows_only=True)
    assert torch.equal(other[0][0], rows[0][[2, 0, 1]])


def test_same_bits_for_any_number_of_threads_and_neighbours():
    features, keys = torch.randn(3, 576, 700), torch.randn(3, 576, 64)
    targets, sources = torch.stack([torch.randperm(576)[:10] for _ in range(3)]), torch.rand(3, 576) < 0.9
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(hk.merge_tokens(features, keys, targets, sources))
    torch.set_num_threads(1)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])
    alone = hk.merge_tokens(features[1:2], keys[1:2], targets[1:2], sources[1:2])
    assert_same(alone, (results[0][0][1:2], results[0][1][1:2]))


@needs_cpu_kernels
def test_kernel_refuses_what_does_not_fit():
    features, keys, targets = torch.randn(6, 4), torch.randn(6, 2), torch.tensor([1, 3])
    call = [features, keys, targets, SOURCES, [6], [2], False, 2]
    torch.ops.hiprune._cpu_merge_tokens(*call)
    for place, value, message in (
        (0, features.double(), "features: expected float32, bfloat16 or float16"),
        (0, features[0], r"features: expected \[B N C\] or \[T C\]"),
        (1, keys.double(), "keys: expected float32, bfloat16 or float16"),
        (1, keys[:5], "keys, sources: expected as many tokens as features"),
        (1, keys[None], "keys, sources: expected as features"),
        (2, targets.int(), "targets: expected int64"),
        (2, targets[None], r"targets: expected \[B c\] or \[M\]"),
        (3, SOURCES.float(), "sources: expected bool"),
        (3, SOURCES[:5], "keys, sources: expected as many tokens as features"),
        (4, [7], "sizes, counts: expected sums of 6 and 2, got 7 and 2"),
        (4, [3, 3], "counts: expected 2, one an image"),
        (4, [-1], "sizes, counts: expected 0 to"),
        (5, [3], "sizes, counts: expected sums of 6 and 2, got 6 and 3"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.hiprune._cpu_merge_tokens(*call[:place], value, *call[place + 1 :])
    dense = [features[None], keys[None], targets[None], SOURCES[None], [], [], False, 2]
    torch.ops.hiprune._cpu_merge_tokens(*dense)
    with pytest.raises(RuntimeError, match="targets: expected 1 rows"):
        torch.ops.hiprune._cpu_merge_tokens(*dense[:2], targets.expand(2, 2), *dense[3:])


# ------------------------------------------------------------------------------------------- gradients and compilation


@pytest.mark.parametrize("rows_only", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_gradient(packed, rows_only):
    """Against finite differences, with targets that are none, that are there twice, and that have no sources."""
    rng = random.Random(3)
    while True:
        features, keys, targets, sources, sizes, counts = draw_call(rng, most=12)
        if len(sizes) > 1 and 20 in counts and features.shape[1] == 7 and keys.isfinite().all():
            break
    features = features.double().requires_grad_()
    named = {"sizes": sizes, "counts": counts, "rows_only": rows_only}
    if packed:
        assert torch.autograd.gradcheck(
            lambda x: hk.merge_tokens_varlen(x, keys, targets, sources, **named)[0], features
        )
        merged, assigned = hk.merge_tokens_varlen(features, keys, targets, sources, **named)
    else:
        features = torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True)
        call = torch.randn(2, 12, 4), torch.tensor([[5, 2, 5], [-1, 7, 0]]), torch.rand(2, 12) < 0.8
        assert torch.autograd.gradcheck(lambda x: hk.merge_tokens(x, *call, rows_only=rows_only)[0], features)
        assert torch.autograd.gradgradcheck(lambda x: hk.merge_tokens(x, *call, rows_only=rows_only)[0], features)
        merged, assigned = hk.merge_tokens(features, *call, rows_only=rows_only)
    assert merged.requires_grad
    assert not assigned.requires_grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_the_kernel_equals_the_references(dtype):
    features = torch.randn(2, 40, 9).to(dtype).requires_grad_()
    call = torch.randn(2, 40, 4), torch.tensor([[5, 2, 30], [11, 7, 0]]), torch.rand(2, 40) < 0.8
    for rows_only in (False, True):
        merged, _ = hk.merge_tokens(features, *call, rows_only=rows_only)
        expected, _ = reference.merge_tokens(features, *call, rows_only=rows_only)
        weights = torch.randn_like(merged)
        gradients = [torch.autograd.grad(y, features, weights)[0] for y in (merged, expected)]
        assert gradients[0].dtype == dtype
        torch.testing.assert_close(*gradients)
        assert gradients[0].abs().sum() > 0
    with torch.no_grad():
        assert not hk.merge_tokens(features, *call)[0].requires_grad
    assert not hk.merge_tokens(features.detach(), call[0].requires_grad_(), *call[1:])[0].requires_grad


@pytest.mark.parametrize("rows_only", [False, True])
def test_transforms_of_functions(rows_only):
    features, tangent = torch.randn(2, 40, 3), torch.randn(2, 40, 3)
    call = torch.randn(2, 40, 4), torch.tensor([[5, 2, 30], [11, 7, 0]]), torch.rand(2, 40) < 0.8

    def merged(features):
        return hk.merge_tokens(features, *call, rows_only=rows_only)[0]

    expected = merged(tangent)  # linear in the features
    value, derivative = torch.func.jvp(merged, (features,), (tangent,))
    torch.testing.assert_close(value, merged(features))
    torch.testing.assert_close(derivative, expected)
    with forward_ad.dual_level():
        dual = merged(forward_ad.make_dual(features, tangent))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, expected)
    both = torch.stack([features, tangent])
    torch.testing.assert_close(torch.vmap(merged)(both)[1], expected)


def test_opcheck():
    features, keys = torch.randn(2, 12, 5), torch.randn(2, 12, 3)
    targets, sources = torch.tensor([[5, 2], [-1, 7]]), torch.rand(2, 12) < 0.8
    for rows_only in (False, True):
        opcheck(torch.ops.hiprune.merge_tokens.default, (features, keys, targets, sources, [], [], rows_only))
        packed = features.flatten(0, 1).bfloat16(), keys.flatten(0, 1), targets.flatten(), sources.flatten()
        opcheck(torch.ops.hiprune.merge_tokens.default, (*packed, [10, 14], [3, 1], rows_only))


@pytest.mark.filterwarnings("error:Dynamo detected")
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compiles_without_graph_breaks(requires_grad):
    features = torch.randn(24, 5, requires_grad=requires_grad)
    call = torch.randn(24, 3), torch.tensor([5, 2, 20]), torch.rand(24) < 0.8

    def function(features):
        return hk.merge_tokens_varlen(features, *call, sizes=[10, 14], counts=[2, 1])

    compiled, expected = torch.compile(function, fullgraph=True, backend="aot_eager")(features), function(features)
    assert_same(compiled, expected)
    if requires_grad:
        gradients = [torch.autograd.grad(y[0].square().sum(), features)[0] for y in (compiled, expected)]
        assert torch.equal(*gradients)


def test_what_no_kernel_covers_goes_to_the_reference(monkeypatch):
    features, keys = torch.randn(1, 6, 4), torch.randn(1, 6, 2)
    assert cpu_merge_gap(features.double(), keys) == (
        "features of torch.float64" if CPU_KERNELS else hk.ops.library.NO_CPU_KERNELS
    )
    if CPU_KERNELS:
        assert cpu_merge_gap(features, keys.double()) == "keys of torch.float64"
        assert cpu_merge_gap(features.half(), keys.bfloat16()) == ""
    calls, original = [], reference.merge_tokens
    monkeypatch.setattr(reference, "merge_tokens", lambda *a: calls.append(1) or original(*a))
    call = torch.tensor([[1, 3]]), SOURCES[None]
    expected = hk.merge_tokens(features, keys, *call)
    calls.clear()
    hk.merge_tokens(features.double(), keys, *call)
    assert calls == [1]
    monkeypatch.setattr(hk.ops.merge, "CPU_KERNELS", False)
    monkeypatch.setattr(hk.ops.merge, "warn_without_cpu_kernels", lambda: calls.append("warned"))
    assert_same(hk.merge_tokens(features, keys, *call), expected)
    assert calls == [1, "warned", 1]


# ----------------------------------------------------------------------------------------------------------- bad input

DENSE = {"features": torch.randn(2, 6, 4), "keys": torch.randn(2, 6, 2), "targets": torch.tensor([[1, 3], [0, 2]]),
         "sources": torch.ones(2, 6, dtype=torch.bool)}  # fmt: skip
PACKED = {"features": torch.randn(12, 4), "keys": torch.randn(12, 2), "targets": torch.tensor([1, 3, 8]),
          "sources": torch.ones(12, dtype=torch.bool), "sizes": [5, 7], "counts": [2, 1]}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"features": torch.randn(6, 4)}, ValueError, r"features: expected \[B N C\], got shape \(6, 4\)"),
        ({"features": torch.ones(2, 6, 4, dtype=torch.int64)}, TypeError, "features: expected float32"),
        ({"keys": torch.randn(2, 5, 2)}, ValueError, r"keys: expected \[B N D\] = \(2, 6, 2\), got shape \(2, 5, 2\)"),
        ({"keys": torch.empty(2, 6, 2, device="meta")}, ValueError, "keys: expected device cpu"),
        ({"targets": torch.tensor([1, 3])}, ValueError, r"targets: expected \[B c\], got shape \(2,\)"),
        ({"targets": torch.tensor([[1, 3]])}, ValueError, r"targets: expected \[B c\] = \(2, 2\), got shape \(1, 2\)"),
        ({"targets": torch.tensor([[1, 3]] * 2).int()}, TypeError, "targets: expected int64, got torch.int32"),
        ({"sources": torch.ones(2, 6)}, TypeError, "sources: expected bool"),
        ({"sources": torch.ones(2, 5, dtype=torch.bool)}, ValueError, r"sources: expected \[B N\] = \(2, 6\)"),
        ({"sources": None}, TypeError, r"sources: expected a tensor \[B N\], got NoneType"),
        ({"rows_only": 1}, TypeError, "rows_only: expected a bool, got int"),
    ],
)
def test_bad_dense_input(change, error, message):
    hk.merge_tokens(**DENSE)
    with pytest.raises(error, match=message):
        hk.merge_tokens(**{**DENSE, **change})


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sizes": [5, 8]}, ValueError, "sizes: expected a sum of 12, the rows of features, got 13"),
        ({"sizes": [5, 7.0]}, TypeError, r"sizes\[1\]: expected an int, got float"),
        ({"counts": [2, 2]}, ValueError, r"targets: expected \[M\] = \(4,\), got shape \(3,\)"),
        ({"counts": [3]}, ValueError, "counts: expected 2, one for each image, got 1"),
        ({"counts": [4, -1]}, ValueError, r"counts\[1\]: expected at least 0, got -1"),
        ({"features": torch.randn(2, 6, 4)}, ValueError, r"features: expected \[T C\]"),
    ],
)
def test_bad_packed_input(change, error, message):
    hk.merge_tokens_varlen(**PACKED)
    with pytest.raises(error, match=message):
        hk.merge_tokens_varlen(**{**PACKED, **change})
