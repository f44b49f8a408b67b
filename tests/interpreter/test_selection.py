"""The selection kernel in Triton's interpreter, bit for bit against the reference."""

import math
import random

import pytest
import torch
from test_ops_selection import ROLE_CHOICES, draw_case, draw_scores

from hiprune_kernels import reference
from hiprune_kernels.budget import CLUSTER_SIZES, ROLE_NAMES, RULES, SelectionPlan, plan_selection
from hiprune_kernels.kernels import selection
from hiprune_kernels.ops.selection import _prune_cuda, _select_cuda, cuda_kernel_gap

pytestmark = pytest.mark.usefixtures("poisoned_memory", "few_programs")
DEFAULTS = {"alpha": 0.1, "rule": "paper", "neighborhood": "cross", "keep_roles": ROLE_NAMES, "candidate_mask": None}


@pytest.fixture
def few_programs(monkeypatch):
    """The interpreter runs one program after another, and each does the whole selection."""
    monkeypatch.setattr(selection, "_MOST_WARPS", 8)  # 4 each


def launcher_arguments(options):
    """Candidate mask and plan of a call of the public functions."""
    options = {**DEFAULTS, **options}
    grids, budgets = (
        (options["grids"], options["budgets"]) if "grids" in options else ([options["grid"]], [options["budget"]])
    )
    choices = (options[name] for name in ("alpha", "rule", "neighborhood", "keep_roles"))
    flat = plan_selection([(1, *grid)[-3:] for grid in grids], budgets, *choices, options.get("num_prefix_tokens", 0))
    return options["candidate_mask"], SelectionPlan.from_flat(flat)


def run_kernel(features, objects, deeps, options):
    return selection.prune_tokens(features, objects.unsqueeze(-2), deeps.unsqueeze(-2), *launcher_arguments(options))


def run_reference(features, objects, deeps, options):
    prune = reference.prune_tokens_varlen if "grids" in options else reference.prune_tokens
    return prune(features, objects, deeps, **options)


def check(features, objects, deeps, options):
    """Kernel and reference agree; returns the reference's results."""
    expected = run_reference(features, objects, deeps, options)
    for name, x, y in zip(("kept", "indices", "roles"), run_kernel(features, objects, deeps, options), expected):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        assert torch.equal(x, y), (name, options)
    return expected


@pytest.mark.parametrize("seed", range(6))
def test_random_calls(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(10):
        objects, deeps, options = draw_case(rng)
        check(torch.randn(*objects.shape, 7), objects, deeps, options)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("neighborhood", CLUSTER_SIZES)
def test_every_rule_and_neighborhood_at_the_edges_of_blocks(rule, neighborhood):
    rng = random.Random(rule + neighborhood)
    for grid in ((1, 1), (1, 2), (3, 5), (4, 4), (17, 1), (4, 3, 3), (10, 10), (2, 5, 13)):
        count = math.prod(grid)
        options = {"grid": grid, "rule": rule, "neighborhood": neighborhood, "keep_roles": rng.choice(ROLE_CHOICES)}
        options |= {"alpha": rng.choice([0.1, 0.5, 1.0]), "budget": rng.randint(1, count)}
        if rng.random() < 0.3:
            options["candidate_mask"] = torch.rand(2, count) < 0.7
        objects, deeps = (draw_scores(rng, rng.choice(["normal", "ties", "special"]), 2, count) for _ in range(2))
        check(torch.randn(2, count, 3), objects, deeps, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_order_of_special_scores(dtype):
    """inf, then numbers with -0 equal to 0, then -inf, then NaN of either sign; the lowest index among equals."""
    nan, inf, tiny = math.nan, math.inf, torch.finfo(dtype).smallest_normal
    if dtype in (torch.float32, torch.float64):  # the interpreter reads subnormal bfloat16 numbers wrongly
        tiny /= 2
    scores = torch.tensor([[nan, -0.0, -inf, 0.0, inf, -tiny, tiny, -1.0, -nan, 1.0, inf, -0.0]], dtype=dtype)
    best_first = [4, 10, 9, 6, 1, 3, 11, 5, 7, 2, 0, 8]
    for budget in (1, 2, 4, 5, 6, 8, 10, 11, 12):
        options = {"grid": (1, 12), "budget": budget, "keep_roles": ("register",)}
        _, indices, _ = check(torch.randn(1, 12, 3), torch.zeros_like(scores), scores, options)
        assert indices[0].tolist() == sorted(best_first[:budget])


def test_wider_counts_than_ten_bits():
    """Beyond 1023 tokens the three counts of a step no longer fit one 32-bit integer."""
    for h, w in ((31, 33), (32, 32), (40, 50)):
        objects, deeps = torch.ones(1, h * w), torch.randint(0, 4, (1, h * w)).float()
        check(torch.randn(1, h * w, 3), objects, deeps, {"grid": (h, w), "budget": h * w - 3})
        check(torch.randn(1, h * w, 3), torch.rand(1, h * w), deeps, {"grid": (h, w), "budget": h * w // 3})


def test_too_many_buffers_lose_the_highest_indices():
    objects = torch.tensor([[0.0, 9.0, 0.0, 0.0, 0.0, 8.0, 0.0, 0.0, 0.0]])
    options = {"grid": (3, 3), "budget": 5, "alpha": 1.0, "rule": "official", "neighborhood": "row"}
    _, _, roles = check(torch.randn(1, 9, 3), objects, torch.rand(1, 9), options)
    assert roles[0].tolist() == [2, 1, 2, 0, 2, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("grid", "neighborhood", "anchor", "expected"),
    [
        ((3, 1, 4), "square", 4, [5, 7]),  # a row and one column are longer than these frames
        ((3, 1, 4), "square", 7, [4, 6]),
        ((4, 5), "cross", 4, [0, 3, 5, 9]),
        ((4, 5), "cross", 6, [1, 5, 7, 11]),
        ((4, 5), "cross", 13, [8, 12, 14, 18]),
        ((4, 5), "cross", 15, [10, 14, 16, 19]),
    ],
)
def test_clamped_neighbors(grid, neighborhood, anchor, expected):
    """Only steps that leave the frame end at its first or last token."""
    count = math.prod(grid)
    objects = torch.zeros(1, count)
    objects[0, anchor] = 1.0
    budget = CLUSTER_SIZES[neighborhood]  # of one anchor
    options = {"grid": grid, "budget": budget, "alpha": 1.0, "rule": "official", "neighborhood": neighborhood}
    _, _, roles = check(torch.randn(1, count, 3), objects, torch.rand(1, count), options)
    assert (roles[0] == reference.BUFFER).nonzero()[:, 0].tolist() == expected


def test_taken_tokens_stay_in_the_race_of_the_official_qwen_rule():
    objects, deeps = torch.zeros(1, 16), torch.zeros(1, 16)
    objects[0, 5], deeps[0, 5] = 1.0, 50.0  # a column sum, which 1 does not bring down
    options = {"grid": (4, 4), "budget": 8, "rule": "official_qwen", "alpha": 0.5, "neighborhood": "none"}
    kept, indices, _ = check(torch.randn(1, 16, 3), objects, deeps, options)
    assert indices[0, -1] == -1
    assert not kept[0, -1].any()


def test_fewer_candidates_than_the_budget():
    mask = torch.zeros(3, 36, dtype=torch.bool)
    mask[0, 7], mask[1, ::5] = True, True
    options = {"grid": (6, 6), "budget": 20, "candidate_mask": mask}
    _, indices, _ = check(torch.randn(3, 36, 5), torch.rand(3, 36), torch.rand(3, 36), options)
    assert [int((row >= 0).sum()) for row in indices] == [1, 8, 0]


@pytest.mark.parametrize("images", [1, 2, 17])
def test_packed_images_of_different_sizes(images):
    rng = random.Random(images)
    grids = [(rng.randint(1, 9), rng.randint(1, 9)) if k % 3 else (2, rng.randint(1, 5), 4) for k in range(images)]
    budgets = [rng.randint(1, math.prod(grid)) for grid in grids]
    total = sum(map(math.prod, grids))
    options = {"grids": grids, "budgets": budgets, "alpha": 0.4, "candidate_mask": torch.rand(total) < 0.9}
    check(torch.randn(total, 5), torch.rand(total), torch.rand(total), options)


def test_launches():
    """One for a batch, for packed images of one size however many, and for sixteen different ones."""

    def chunks(grids, budgets, batch=None):
        options = {"grids": grids, "budgets": budgets}
        return selection._chunks(launcher_arguments(options)[1].images, batch)

    assert [chunk.number for chunk in chunks([(24, 24)], [192], 700)] == [700]
    assert [chunk.number for chunk in chunks([(3, 3)] * 700, [4] * 700)] == [700]
    different = [(3, k + 1) for k in range(33)]
    assert [chunk.number for chunk in chunks(different[:16], [2] * 16)] == [16]
    assert [chunk.number for chunk in chunks(different, [2] * 33)] == [16, 16, 1]
    assert len({len(chunk.sizes) for chunk in chunks(different, [2] * 33)}) == 1  # one compiled kernel
    assert chunks([], []) == []


def test_packed_images_of_one_size():
    options = {"grids": [(3, 4)] * 5, "budgets": [7] * 5}
    check(torch.randn(60, 5), torch.rand(60), torch.rand(60), options)


@pytest.mark.parametrize("options", [{"grids": [], "budgets": []}, {"grid": (2, 3), "budget": 2}])
def test_no_images(options):
    shape = (0,) if "grids" in options else (0, 6)
    check(torch.randn(*shape, 5), torch.rand(shape), torch.rand(shape), options)


def test_partial_sums_are_added_in_slot_order():
    """1 + 2**24 - 2**24 depends on the order in float32, and decides here which tokens win."""
    parts = torch.tensor([1.0, 2.0**24, -(2.0**24), 0.5])
    objects = torch.stack([parts[torch.randperm(4)] for _ in range(2 * 37)], dim=1).view(4, 2, 37).transpose(0, 1)
    deeps = torch.randn(2, 3, 37)
    summed = torch.zeros(2, 37)
    for slot in objects.unbind(1):
        summed += slot
    assert len(summed.unique()) > 2
    options = {"grid": (6, 6), "budget": 15, "num_prefix_tokens": 1, "alpha": 0.5, "rule": "official"}
    features = torch.randn(2, 37, 4)
    expected = run_reference(features, summed, (deeps[:, 0] + deeps[:, 1]) + deeps[:, 2], options)
    for x, y in zip(selection.prune_tokens(features, objects, deeps, *launcher_arguments(options)), expected):
        assert torch.equal(x, y)

    packed = {"grids": [(4, 5), (4, 4)], "budgets": [6, 7]}
    summed, objects = summed[0, 1:], objects[0, :, 1:]
    result = selection.select_tokens(objects, deeps[0, :1, 1:], *launcher_arguments(packed))
    for x, y in zip(result, reference.select_tokens_varlen(summed, deeps[0, 0, 1:], **packed)):
        assert torch.equal(x, y)


FEATURE_DTYPES = (torch.bool, torch.uint8, torch.float8_e4m3fn, torch.bfloat16, torch.int32, torch.complex64)


@pytest.mark.parametrize("dtype", [*FEATURE_DTYPES, torch.float64, torch.int64, torch.complex128])
def test_features_of_any_dtype_are_copied_bit_for_bit(dtype):
    random_bytes = torch.randint(0, 256, (2, 37, 5 * dtype.itemsize), dtype=torch.uint8)
    features = random_bytes.remainder(2).bool() if dtype == torch.bool else random_bytes.view(dtype)
    scores, options = torch.rand(2, 37), {"grid": (6, 6), "budget": 11, "num_prefix_tokens": 1}
    kept, indices, _ = run_kernel(features, scores, scores, options)
    expected = torch.stack([features[b, 1 + indices[b]] for b in range(2)])
    assert torch.equal(kept.view(torch.uint8), expected.view(torch.uint8))  # NaN included


def test_any_strides():
    features = torch.randn(7, 37, 2).transpose(0, 2)  # [2, 37, 7], channels far apart
    objects, deeps = torch.rand(37, 2).T, torch.rand(2, 74)[:, ::2]
    mask = (torch.rand(36, 2) < 0.7).T
    options = {"grid": (6, 6), "budget": 11, "num_prefix_tokens": 1, "candidate_mask": mask}
    check(features, objects, deeps, options)
    packed = {"grids": [(3, 5), (2, 4), (4, 3)], "budgets": [7, 3, 5], "candidate_mask": mask[1, 1:]}
    check(features[1, 1:36], objects[1, 1:36], deeps[1, 1:36], packed)


@pytest.mark.parametrize("programs", [1, 2, 3, 256])
def test_rows_shared_out_to_programs(programs, monkeypatch):
    """Several programs per image, several rounds per program, rows wider than a round."""
    monkeypatch.setattr(selection, "_MOST_WARPS", 4 * programs)
    features = torch.randn(1, 100, 300, dtype=torch.float64)
    check(features, torch.rand(1, 100), torch.rand(1, 100), {"grid": (10, 10), "budget": 93})
    options = {"grids": [(10, 5), (5, 10)], "budgets": [50, 3]}
    check(features[0], torch.rand(100), torch.rand(100), options)


def test_indices_alone():
    objects, deeps = torch.rand(2, 577), torch.rand(2, 577)
    options = {"grid": (24, 24), "budget": 192, "num_prefix_tokens": 1}
    result = selection.select_tokens(objects[:, None], deeps[:, None], *launcher_arguments(options))
    for x, y in zip(result, reference.select_tokens(objects, deeps, **options)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("grid", [(5, 7), (1, 16385)])
def test_dispatch(grid):
    """What the CUDA operators call: the kernel, or the reference for a larger image."""
    count = math.prod(grid)
    objects, deeps, features = torch.rand(2, count), torch.rand(2, count), torch.randn(2, count, 3)
    options = {"grid": grid, "budget": 9}
    arguments = launcher_arguments(options)
    assert cuda_kernel_gap(arguments[1]) == ("an image of 16385 tokens, above 16384" if count > 16384 else "")
    largest, none = ({"grids": grids, "budgets": [1] * len(grids)} for grids in ([(128, 128)], []))
    assert cuda_kernel_gap(launcher_arguments(largest)[1]) == cuda_kernel_gap(launcher_arguments(none)[1]) == ""
    expected = run_reference(features, objects, deeps, options)
    flat = plan_selection([(1, *grid)], [9])
    result = _prune_cuda(features, objects, deeps, None, flat), _select_cuda(objects, deeps, None, flat)
    for x, y in zip((*result[0], *result[1]), (*expected, *expected[1:])):
        assert torch.equal(x, y)
