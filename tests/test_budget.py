"""budget.py: pure arithmetic, against figures worked out by hand and exact fractions."""

import math
from fractions import Fraction

import pytest

from hiprune_kernels.budget import (
    CLUSTER_SIZES,
    ROLE_NAMES,
    RULES,
    Image,
    SelectionPlan,
    anchor_count,
    check_selection_options,
    kept_anyres_tokens,
    plan_selection,
    resolve_budget,
)


@pytest.mark.parametrize(
    ("tokens", "options", "expected"),
    [
        (576, {"budget": 192}, 192),
        (576, {"budget": 576}, 576),
        (576, {"budget": 1000}, 576),
        (576, {"retention": 1 / 3}, 192),
        (576, {"retention": 0.222}, 128),
        (256, {"retention": 0.334}, 86),
        (256, {"retention": 0.112}, 29),
        (4, {"retention": 0.01}, 1),
        (1, {"retention": 1.0}, 1),
    ],
)
def test_resolve_budget(tokens, options, expected):
    assert resolve_budget(tokens, **options) == expected


@pytest.mark.parametrize(
    ("tokens", "options", "error", "message"),
    [
        (576, {}, ValueError, "exactly one of budget and retention"),
        (576, {"budget": 1, "retention": 0.5}, ValueError, "exactly one of budget and retention"),
        (0, {"budget": 1}, ValueError, "num_tokens: expected at least 1, got 0"),
        (576, {"budget": 0}, ValueError, "budget: expected at least 1, got 0"),
        (576, {"budget": 1.5}, TypeError, "budget: expected an int, got float"),
        (576, {"budget": True}, TypeError, "budget: expected an int, got bool"),
        (576, {"retention": 0.0}, ValueError, "retention: expected a share in"),
        (576, {"retention": 1.1}, ValueError, "retention: expected a share in"),
        (576, {"retention": float("nan")}, ValueError, "retention: expected a share in"),
        (576, {"retention": "0.5"}, TypeError, "retention: expected a float, got str"),
    ],
)
def test_resolve_budget_errors(tokens, options, error, message):
    with pytest.raises(error, match=message):
        resolve_budget(tokens, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 337}, r"tile_size: expected 337 \(patch_size\) to 336 \(pinpoints\), got 336"),
        (
            {"pinpoints": [(672, 672), (672, 335)]},
            r"tile_size: expected 14 \(patch_size\) to 335 \(pinpoints\), got 336",
        ),
        ({"pinpoints": []}, r"pinpoints: expected at least one \(height, width\), got none"),
    ],
)
def test_sizes_of_tiles_that_do_not_fit(change, message):
    options = {"pinpoints": [(336, 672)], "tile_size": 336, "patch_size": 14, "budget": 64}
    kept_anyres_tokens((480, 640), **options)
    with pytest.raises(ValueError, match=message):
        kept_anyres_tokens((480, 640), **{**options, **change})


@pytest.mark.parametrize("neighborhood", CLUSTER_SIZES)
@pytest.mark.parametrize("rule", RULES)
def test_anchor_count_against_exact_fractions(rule, neighborhood):
    """alpha as the decimal that was typed, without the noise of binary floating point."""
    cluster = CLUSTER_SIZES[neighborhood]
    for hundredths in range(101):
        for budget in range(1, 200):
            share = Fraction(hundredths, 100) * budget / cluster
            exact = round(share) if rule.startswith("official") else min(math.ceil(share), budget // cluster)
            count = anchor_count(budget, alpha=hundredths / 100, rule=rule, neighborhood=neighborhood)
            # Exactly half way, the sum in floating point decides, as it does in the released code.
            half = rule.startswith("official") and share * 2 == int(share * 2) and share.denominator == 2
            assert count == exact or (half and abs(count - share) == Fraction(1, 2)), (hundredths, budget)


def test_anchor_count_of_the_paper():
    assert [anchor_count(n) for n in (192, 128, 64, 1)] == [4, 3, 2, 0]  # ceil(alpha N' / 5), limited to N' // 5
    assert [anchor_count(n, rule="official") for n in (192, 128, 64)] == [4, 3, 1]  # Algorithm 1's round
    assert anchor_count(192, alpha=1.0) == 38  # ceil gives 39, and 5 * 39 > 192
    assert anchor_count(192, alpha=1.0, rule="official") == 38
    assert anchor_count(25, rule="official") == 0  # 0.5, half to even


def test_anchor_count_of_role_choices():
    assert anchor_count(192, keep_roles=("anchor", "register")) == 4  # buffers go, anchors stay
    assert anchor_count(192, keep_roles=("register",)) == 0
    assert anchor_count(192, keep_roles=("anchor", "buffer")) == 38  # alpha acts as 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alpha": -0.1}, "alpha: expected a share in"),
        ({"alpha": float("nan")}, "alpha: expected a share in"),
        ({"rule": "papr"}, "rule: expected one of"),
        ({"neighborhood": "ring"}, "neighborhood: expected one of"),
        ({"keep_roles": ()}, "keep_roles: expected a non-empty choice"),
        ({"keep_roles": "anchor"}, "keep_roles: expected a non-empty choice"),
        ({"keep_roles": ("anchor", "anchor")}, "keep_roles: expected a non-empty choice"),
        ({"keep_roles": ("buffer", "register")}, 'keep_roles: "buffer" needs "anchor"'),
    ],
)
def test_selection_option_errors(change, message):
    options = {"alpha": 0.1, "rule": "paper", "neighborhood": "cross", "keep_roles": ("anchor", "register")}
    check_selection_options(**options)
    with pytest.raises(ValueError, match=message):
        check_selection_options(**{**options, **change})


def test_selection_plan():
    flat = plan_selection([(1, 24, 24), (2, 3, 4)], [192, 5], 0.5, "grid", "row", ("anchor", "register"))
    plan = SelectionPlan.from_flat(flat)
    assert plan.images == (Image(1, 24, 24, 192, 32), Image(2, 3, 4, 5, 1))
    assert (plan.buffers, plan.registers, plan.num_prefix_tokens) == (False, True, 0)
    for rule in RULES:
        for neighborhood in CLUSTER_SIZES:
            flat = plan_selection([(1, 6, 6)], [9], 0.1, rule, neighborhood, ROLE_NAMES, 1)
            plan = SelectionPlan.from_flat(flat)
            assert (plan.rule, plan.neighborhood, plan.num_prefix_tokens) == (rule, neighborhood, 1)
            assert (plan.buffers, plan.registers) == (True, True)
