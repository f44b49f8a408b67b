"""Wrong arguments of every public function: each is a ValueError or TypeError that names the argument.

`BAD` has, for each kind of argument, what it must not be; `CALLS` has every function with the kinds of its arguments.
"""

import decimal
import fractions
import inspect
import math
import re

import numpy as np
import pytest
import torch
from models import tiny_clip, tiny_llava_next

import hiprune_kernels as hk
from hiprune_kernels import budget
from hiprune_kernels.budget import ROLE_NAMES


class Unhashable:
    __hash__ = None


JUNK = [
    *(None, "", "3", b"3"),
    *(
        3,
        2.5,
        True,
        math.nan,
        -math.inf,
        1j,
        np.int64(3),
        np.float32(0.5),
        fractions.Fraction(1, 2),
        decimal.Decimal(1),
    ),
    *([], (), {}, set(), [3], [None], [[]], (3, "3"), np.array([1.0, 2.0]), range(2)),
    *(object(), Unhashable(), int, len, torch.tensor(1.0), torch.tensor([6, 6])),
]


def no(*types):
    """Junk that is of none of the types."""
    return [x for x in JUNK if type(x) not in types]


PAIRS = [(6,), (6, 6, 6, 6), (6, "6"), (6, None), (6, 6.0), (6, True), (0, 6), (6, -6), {5, 7}, (x for x in (6, 6))]
BAD = {
    "tensor": JUNK,
    "bool": no(bool),
    "int": [*no(int), -1, 0, 10**30],
    "count": [*no(int), -1, 10**30],
    "prefix": [*no(int), -1],
    "scale": [*no(int, float), math.nan, math.inf, -math.inf, 10**400],
    "share": [*no(float), -0.5, 1.5, math.nan],
    "choice": [*JUNK, "PAPER", "mean ", np.array(["paper", "sum"])],
    "roles": [
        *JUNK,
        "anchor",
        ["anchor"] * 2,
        ["anchor", None],
        ["anchor", ["register"]],
        [np.array(["anchor", "x"])],
        {"anchor": 1},
    ],
    "grid": [*JUNK, *PAIRS],
    "sides": [*JUNK, *PAIRS, (6, 6, 6)],
    "grids": [
        *no(list, tuple),
        [None],
        [[]],
        [3],
        [(6, 6), None],
        [(6, 6), (3, "3")],
        [(6, 6), (3, 3.0)],
        [(6, 6), (3, 3, 1, 1)],
    ],
    "budgets": [*JUNK, [9], [9, None], [9, "2"], [9, 2.0], [9, True], [9, 0], [9, 10]],
    "sizes": [*no(list), [], [None], [9, 0], [9, 2.0], [9, True]],
    "host": [*no(list, tuple), [None], [[]], [36, -1], [36, 9.0], [36, "9"], [36, True]],
    "sums": [*no(list, tuple), [None], [[]], [36, -1], [36, 9.0], [36, "9"], [36, True], [36, 10]],
    "totals": [*no(list, tuple), [None], [[]], [11, 2], [-1], [11.0], ["11"], [True], [46]],
    "pinpoints": [*JUNK, [(336, 672), None], [(336, 672), (336,)]],
    "layers": [*no(list, tuple, set, range), [None], [[]], (1, "2"), [1.0], [True], [0], [6]],
    "module": JUNK,
}


def spoiled(tensor):
    """The same tensor as no operator takes it. Whatever the argument is, all of these are wrong."""
    floating = tensor.detach().float()
    yield tensor.to_sparse()
    yield torch.quantize_per_tensor(floating, 0.1, 0, torch.qint8)
    yield tensor[None]
    yield torch.empty_like(tensor, device="meta")
    yield tensor.detach().numpy()
    if tensor.dim() > 1:
        yield torch.nested.nested_tensor(list(floating))
        yield floating.to_mkldnn()


torch.manual_seed(0)
ATTENTION = {"scale": ("scale?", 0.3), "causal": ("bool", False)}
REDUCED = {"query_reduction": ("choice", "sum"), "head_reduction": ("choice", "mean")}
QUERY, KEY, VALUE = torch.randn(2, 4, 5, 8), *torch.randn(2, 2, 2, 7, 8)
DENSE = {
    "query": ("tensor", QUERY),
    "key": ("tensor", KEY),
    "key_mask": ("tensor?", torch.ones(2, 7, dtype=torch.bool)),
    "query_mask": ("tensor?", torch.ones(2, 5, dtype=torch.bool)),
    **ATTENTION,
}
LENGTHS, ROWS = torch.tensor([0, 4, 4, 9], dtype=torch.int32), torch.randn(9, 2, 8)
PACKED = {
    "query": ("tensor", torch.randn(9, 4, 8)),
    "key": ("tensor", ROWS),
    "cu_seqlens_q": ("tensor", LENGTHS),
    "cu_seqlens_k": ("tensor?", LENGTHS),
    "max_seqlen_q": ("count?", 5),
    "key_mask": ("tensor?", torch.ones(9, dtype=torch.bool)),
    "query_mask": ("tensor?", torch.ones(9, dtype=torch.bool)),
    **ATTENTION,
}
OPTIONS = {
    "alpha": ("share", 0.1),
    "rule": ("choice", "paper"),
    "neighborhood": ("choice", "cross"),
    "keep_roles": ("roles", ROLE_NAMES),
}
SCORES = torch.rand(2, 37)
SELECT = {
    "object_scores": ("tensor", SCORES),
    "deep_scores": ("tensor", SCORES),
    "budget": ("int", 9),
    "grid": ("grid", (6, 6)),
    "num_prefix_tokens": ("prefix", 1),
    "candidate_mask": ("tensor?", None),
    **OPTIONS,
}
SELECT_PACKED = {
    "object_scores": ("tensor", torch.rand(45)),
    "deep_scores": ("tensor", torch.rand(45)),
    "grids": ("grids", [(6, 6), (3, 3)]),
    "budgets": ("budgets", [9, 2]),
    "candidate_mask": ("tensor?", torch.ones(45, dtype=torch.bool)),
    **OPTIONS,
}
SEGMENTS = {
    "budgets": ("tensor", torch.tensor([9, 2, 0])),
    "sizes": ("host", [36, 5, 4]),
    "tiles": ("host", [3]),
    "totals": ("totals", [11]),
}
SEGMENT_MASK = {"candidate_mask": ("tensor?", torch.ones(45, dtype=torch.bool))}
CAPS = [
    *[x for x in JUNK if not isinstance(x, torch.Tensor)],
    [9, -1, 0],
    [9, 2.0, 0],
    torch.rand(3),
    torch.ones(2).long(),
]
BAD["caps"] = CAPS
BAD["totals of shares"] = BAD["totals"][:-1]
SHARES = {
    "weights": ("tensor", torch.rand(3)),
    "totals": ("totals of shares", [11]),
    "caps": ("caps", torch.tensor([9, 2, 0])),
    "tiles": ("host", [3]),
}
MERGE = {
    "features": ("tensor", torch.randn(2, 9, 4)),
    "keys": ("tensor", torch.randn(2, 9, 3)),
    "targets": ("tensor", torch.tensor([[1, 3], [0, 8]])),
    "sources": ("tensor", torch.ones(2, 9, dtype=torch.bool)),
    "rows_only": ("bool", False),
}
MERGE_PACKED = {
    "features": ("tensor", torch.randn(45, 4, requires_grad=True)),
    "keys": ("tensor", torch.randn(45, 3)),
    "targets": ("tensor", torch.arange(45)),
    "sources": ("tensor", torch.ones(45, dtype=torch.bool)),
    "sizes": ("sums", [36, 9]),
    "counts": ("host", [36, 9]),
    "rows_only": ("bool", True),
}
DIVERSE = {
    "features": ("tensor", torch.randn(45, 3)),
    "quality": ("tensor?", torch.rand(45)),
    "candidate_mask": ("tensor?", torch.ones(45, dtype=torch.bool)),
}
DIVERSE_BATCH = {name: (kind, torch.stack([tensor, tensor])) for name, (kind, tensor) in DIVERSE.items()}
BUDGET = {"budget": ("int", 640), "retention": ("nothing", None)}
ANYRES = {
    "size": ("sides", (480, 640)),
    "pinpoints": ("pinpoints", [(336, 672), (672, 336)]),
    "tile_size": ("int", 336),
    "patch_size": ("int", 14),
    "max_tiles": ("int?", 9),
}
RECORD = {"encoder": ("module", tiny_clip()), "layers": ("layers", [1, 2])}
APPLY = {
    "model": ("module", tiny_llava_next()),
    "budget": ("nothing", None),
    "retention": ("share", 0.5),
    "object_layer": ("int?", 2),
    "score_queries": ("choice", "all"),
    "unpad": ("choice?", "before"),
    **OPTIONS,
}
CALLS = [
    (hk.attention_with_scores, {**DENSE, "value": ("tensor", VALUE)}),
    (hk.attention_scores, {**DENSE, **REDUCED}),
    (hk.attention_scores_per_head, {**DENSE, "query_reduction": ("choice", "sum")}),
    (hk.attention_with_scores_varlen, {**PACKED, "value": ("tensor", ROWS)}),
    (hk.attention_scores_varlen, {**PACKED, **REDUCED}),
    (hk.attention_scores_per_head_varlen, {**PACKED, "query_reduction": ("choice", "sum")}),
    (hk.select_tokens, SELECT),
    (hk.select_tokens, {**SELECT, "candidate_mask": ("tensor?", torch.ones(2, 36, dtype=torch.bool))}),
    (hk.prune_tokens, {**SELECT, "features": ("tensor", torch.randn(2, 37, 3))}),
    (hk.prune_tokens, {**SELECT, "features": ("tensor", torch.randn(2, 37, 3, requires_grad=True))}),
    (hk.select_tokens_varlen, SELECT_PACKED),
    (hk.prune_tokens_varlen, {**SELECT_PACKED, "features": ("tensor", torch.randn(45, 3))}),
    (hk.select_top_segments, {"scores": ("tensor", torch.rand(45)), **SEGMENTS, **SEGMENT_MASK}),
    (hk.shares, SHARES),
    (hk.merge_tokens, MERGE),
    (hk.merge_tokens_varlen, MERGE_PACKED),
    (hk.select_diverse, {**DIVERSE_BATCH, "count": ("int", 9)}),
    (hk.select_diverse_varlen, {**DIVERSE, "sizes": ("sizes", [36, 9]), "counts": ("budgets", [9, 2])}),
    (budget.resolve_budget, {"num_tokens": ("int", 576), **BUDGET}),
    (budget.resolve_budget, {"budget": ("nothing", None), "num_tokens": ("int", 576), "retention": ("share", 0.5)}),
    (budget.tile_budgets, {"sizes": ("sizes", [576, 576]), **BUDGET}),
    (budget.kept_anyres_tokens, {**ANYRES, **BUDGET}),
    (budget.check_selection_options, OPTIONS),
    (budget.anchor_count, {"budget": ("int", 9), **OPTIONS}),
    (budget.plan_selection, {"grids": ("grids", [(6, 6), (3, 3)]), "budgets": ("budgets", [9, 2]), "num_prefix_tokens": ("prefix", 1), **OPTIONS}),
    (hk.apply_hiprune, APPLY),
    (hk.hiprune, APPLY),
    (hk.record_scores, RECORD),
]  # fmt: skip


def call(function, arguments):
    result = function(**arguments)
    if hasattr(result, "__enter__"):
        with result:
            pass
    if function is hk.apply_hiprune:
        hk.remove_hiprune(result)


@pytest.mark.filterwarnings("ignore")  # quantized and nested tensors are deprecated, or prototypes
@pytest.mark.parametrize(
    ("function", "kinds", "argument"),
    [pytest.param(f, kinds, name, id=f"{f.__name__}-{name}") for f, kinds in CALLS for name in kinds],
)
def test_wrong_arguments_are_named(function, kinds, argument):
    good = {name: value for name, (_, value) in kinds.items()}
    call(function, good)
    kind = kinds[argument][0]
    values = [*BAD.get(kind.rstrip("?"), [])]
    if kind.endswith("?"):
        call(function, {**good, argument: None})
        values = [x for x in values if x is not None]
    elif kind == "nothing":  # one of two, of which the other one is given
        values = [x for x in JUNK if x is not None]
    if isinstance(good[argument], torch.Tensor):
        values += spoiled(good[argument])
    for value in values:
        with pytest.raises((TypeError, ValueError)) as raised:
            call(function, {**good, argument: value})
            pytest.fail(f"{argument}={value!r} was taken")
        named = "budget" if kind == "nothing" or (argument == "retention" and value is None) else argument
        if isinstance(value, torch.Tensor) and value.is_meta:  # the arguments that are not on it may be blamed
            named = r"\w+"
        assert re.match(rf"{named}(\[\d\])?: expected .*got ", str(raised.value), re.DOTALL), (value, raised.value)


# `check_inputs` looks at values: no tensor without any, and one of other dimensions is none of its business.
CHECKED = {
    "query": ("tensor?", ROWS),
    "key": ("tensor?", ROWS),
    "value": ("tensor?", ROWS),
    "features": ("tensor?", ROWS),
    "object_scores": ("tensor?", SCORES),
    "deep_scores": ("tensor?", SCORES),
    "quality": ("tensor?", SCORES),
    "cu_seqlens_q": ("tensor?", LENGTHS),
    "cu_seqlens_k": ("tensor?", LENGTHS),
    "max_seqlen_q": ("count?", 5),
    "candidate_mask": ("tensor?", torch.ones(45, dtype=torch.bool)),
    "budget": ("int?", 9),
    "scores": ("tensor?", SCORES),
    "keys": ("tensor?", ROWS),
    "weights": ("tensor?", SCORES),
    "budgets": ("tensor?", torch.tensor([9, 2, 0])),
    "sizes": ("host?", [36, 5, 4]),
    "tiles": ("host?", [3]),
    "totals": ("totals?", [11]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("argument", CHECKED)
def test_wrong_arguments_of_check_inputs_are_named(argument):
    good = {name: value for name, (_, value) in CHECKED.items()}
    hk.check_inputs(**good)
    values = [x for x in BAD[CHECKED[argument][0][:-1]] if x is not None and not isinstance(x, torch.Tensor)]
    if isinstance(good[argument], torch.Tensor):
        values += [
            x for x in spoiled(good[argument]) if not isinstance(x, torch.Tensor) or x.dim() == good[argument].dim()
        ]
    for value in values:
        with pytest.raises((TypeError, ValueError), match=rf"^{argument}(\[\d\])?: expected .*got "):
            hk.check_inputs(**{**good, argument: value})


def test_no_public_function_is_left_out():
    """Nor an argument of one."""
    takes_a_model = {"check_model", "is_patched", "last_selection", "remove_hiprune", "remove_method"}
    takes_a_method = {"apply_method", "applied"}  # tests/methods
    types = {name for name in hk.__all__ if isinstance(getattr(hk, name), type)}  # tests/methods
    listed = {function.__name__ for function, _ in [*CALLS, (hk.check_inputs, CHECKED)]}
    assert listed | takes_a_model | takes_a_method | types >= set(hk.__all__)
    for function, kinds in [*CALLS, (hk.check_inputs, CHECKED)]:
        assert set(kinds) == set(inspect.signature(function).parameters)
