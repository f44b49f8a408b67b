"""Qwen2.5-VL in an engine of vLLM, equal to transformers: landscape, portrait, wide, several images, chunks, hits."""

import pytest
from helpers import mixed_requests, run_engines, same, transformers_answers
from small_models import IMAGE_PAD, VISION_END, VISION_START

IMAGE = VISION_START + IMAGE_PAD + VISION_END
LANDSCAPE, PORTRAIT, WIDE = (0, 308, 420), (1, 560, 252), (2, 196, 644)
CASES = [
    {"prompt": IMAGE + "what?", "images": [LANDSCAPE]},
    {"prompt": IMAGE + "which?", "images": [PORTRAIT]},
    {"prompt": f"a {IMAGE} and {IMAGE} and {IMAGE} which?", "images": [PORTRAIT, WIDE, LANDSCAPE]},
    {"prompt": "no picture"},
    {"prompt": IMAGE + "what?", "images": [WIDE], "asked": {"budget": 40}},
    {"prompt": IMAGE + "what?", "images": [PORTRAIT], "asked": {"retention": 1.0}},
]
RETENTION = {"retention": 0.3333}
SIZES = [LANDSCAPE[1:], PORTRAIT[1:], WIDE[1:], (112, 112), (448, 336)]
MIXED = mixed_requests(100, "{} {} which?", IMAGE, SIZES)


@pytest.fixture(scope="module")
def answers(checkpoint, tmp_path_factory):
    options = {"model": str(checkpoint("qwen2_5_vl")), "limit_mm_per_prompt": {"image": 3, "video": 0}}
    options |= {"hf_overrides": {"hiprune": RETENTION | {"per_request": True}}, "long_prefill_token_threshold": 48}
    engine = {
        "options": options | {"max_num_batched_tokens": 2048},
        "rounds": [CASES, CASES, MIXED, "forget", *([one] for one in MIXED)],
    }
    return run_engines(tmp_path_factory.mktemp("qwen"), engine)[0]["answers"]


@pytest.fixture(scope="module")
def expected(checkpoint):
    return transformers_answers(checkpoint("qwen2_5_vl"), CASES, RETENTION)


def test_equals_transformers(answers, expected):
    same(answers[0], expected)


def test_prefix_hits_change_nothing(answers, expected):
    same(answers[1], expected)
    assert answers[1][2]["cached"] >= 96  # inside the second image


def test_many_mixed_requests_at_once_as_alone(answers):
    """One hundred, eight at a time: none is lost, none has another's answer."""
    same([answer for (answer,) in answers[3:]], answers[2])
    assert len({tuple(answer["tokens"]) for answer in answers[2]}) > 80
