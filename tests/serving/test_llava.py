"""LLaVA-1.5 in engines of vLLM: equal to transformers, to itself on two ranks, and to stock code where it is off."""

import pytest
from helpers import run_engines, same, transformers_answers

ONE, TWO = "USER: <image>\nwhat? ASSISTANT:", "USER: <image> <image>\nwhich? ASSISTANT:"
A, B, C = (0, 300, 400), (1, 500, 280), (2, 336, 336)
CASES = [
    {"prompt": ONE, "images": [A]},
    {"prompt": TWO, "images": [B, A]},
    {"prompt": "USER: hello ASSISTANT:"},
    {"prompt": ONE, "images": [C], "asked": {"budget": 64}},
    {"prompt": ONE, "images": [B], "asked": {"budget": 576}},
    {"prompt": ONE, "images": [A], "asked": {"retention": 0.5}},
]
BUDGET = {"budget": 192}
STOCK = {"prompt": ONE, "images": [(8, 300, 400)]}


def options(checkpoint, **more):
    return {
        "model": str(checkpoint("llava")),
        "limit_mm_per_prompt": {"image": 2},
        "max_num_batched_tokens": 2304,
    } | more


@pytest.fixture(scope="module")
def expected(checkpoint):
    return transformers_answers(checkpoint("llava"), CASES, BUDGET)


@pytest.fixture(scope="module")
def pruned(checkpoint, tmp_path_factory):
    """An engine whose prompts come in chunks of 48 tokens, asked all at once, again (prefix hits), and one by one."""
    overrides = {"hiprune": BUDGET | {"per_request": True}}
    rounds = [CASES[:1], CASES, CASES, *([case] for case in reversed(CASES)), "stock", [STOCK]]
    engine = {"options": options(checkpoint, hf_overrides=overrides, long_prefill_token_threshold=48), "rounds": rounds}
    return run_engines(tmp_path_factory.mktemp("pruned"), engine | {"record": True})[0]


def test_equals_transformers(pruned, expected):
    same(pruned["answers"][1], expected)
    assert [answer["prompt"] for answer in expected[:3]] == [192 + 23, 2 * 192 + 25, 22]


def test_prefix_hits_change_nothing(pruned, expected):
    same(pruned["answers"][2], expected)
    assert min(answer["cached"] for case, answer in zip(CASES, pruned["answers"][2]) if case.get("images")) >= 64


def test_neighbours_change_nothing(pruned, expected):
    same([answer for (answer,) in reversed(pruned["answers"][3:-1])], expected)


def test_a_stock_model_in_the_worker_raises(pruned):
    """vLLM would take the first 192 rows of 576, had the model given those."""
    assert pruned["answers"][-1].startswith(("RuntimeError", "ValueError", "AssertionError"))


def test_answers_depend_on_what_is_kept(pruned):
    """Else the tests above would prove nothing."""
    first, *_, half = pruned["answers"][1]
    assert first["tokens"] != half["tokens"]


def test_two_ranks(checkpoint, pruned, expected, tmp_path):
    overrides = {"hiprune": BUDGET | {"per_request": True}}
    more = {"hf_overrides": overrides, "tensor_parallel_size": 2, "enable_prefix_caching": False}
    other = {"prompt": ONE, "images": [(9, 300, 400)]}  # one that no cache knows
    engine = {"options": options(checkpoint, **more), "rounds": [CASES[:1], CASES, "break", [other]], "record": True}
    insecure = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    two = run_engines(tmp_path, engine, **insecure)[0]
    same(two["answers"][1], expected)
    first, second = two["picks"][0]
    assert first == second == pruned["picks"][0][0]
    assert len(first[0]) == 192
    first, second = two["picks"][2]  # without the all-reduce, the ranks differ: what is above can fail
    assert first and first != second


@pytest.fixture(scope="module")
def off(checkpoint, tmp_path_factory):
    return run_engines(tmp_path_factory.mktemp("off"), {"options": options(checkpoint), "rounds": [CASES[:3]]})[0]


def test_off_is_stock(checkpoint, off, tmp_path):
    stock = run_engines(tmp_path, {"options": options(checkpoint), "rounds": [CASES[:3]]}, VLLM_PLUGINS="none")[0]
    assert off["answers"] == stock["answers"]
    assert off["answers"][0][0]["prompt"] == 576 + 23
