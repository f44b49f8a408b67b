"""Qwen-VLs in engines of vLLM, equal to transformers: landscape, portrait, wide, several images, chunks, hits."""

import pytest
from helpers import mixed_requests, run_engines, same, transformers_answers
from small_models import IMAGE_PAD, VISION_END, VISION_START

import hiprune_kernels as hk

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


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def answers(kind, checkpoint, tmp_path_factory):
    options = {"model": str(checkpoint(kind)), "limit_mm_per_prompt": {"image": 3, "video": 0}}
    options |= {"hf_overrides": {"hiprune": RETENTION | {"per_request": True}}, "long_prefill_token_threshold": 48}
    engine = {
        "options": options | {"max_num_batched_tokens": 2048},
        "rounds": [CASES, CASES, MIXED, "forget", *([one] for one in MIXED)],
    }
    return run_engines(tmp_path_factory.mktemp("qwen"), engine)[0]["answers"]


@pytest.fixture(scope="module")
def expected(kind, checkpoint):
    return transformers_answers(checkpoint(kind), CASES, RETENTION)


def test_equals_transformers(answers, expected):
    same(answers[0], expected)


def test_prefix_hits_change_nothing(answers, expected):
    same(answers[1], expected)
    assert answers[1][2]["cached"] >= 96  # inside the second image


def test_many_mixed_requests_at_once_as_alone(answers):
    """One hundred, eight at a time: none is lost, none has another's answer."""
    same([answer for (answer,) in answers[3:]], answers[2])
    assert len({tuple(answer["tokens"]) for answer in answers[2]}) > 70


@pytest.mark.parametrize(
    "kind, name, method", [("qwen2_vl", "visionzip", hk.VisionZip), ("qwen3_vl", "hiprune", hk.HiPrune)]
)
def test_two_ranks(kind, name, method, checkpoint, tmp_path):
    """Scores and keys of half of the heads each."""
    options = {"model": str(checkpoint(kind)), "limit_mm_per_prompt": {"image": 3}, "max_num_batched_tokens": 2048}
    options |= {"hf_overrides": {"hiprune": RETENTION | {"method": name}}, "tensor_parallel_size": 2}
    engine = {"options": options, "rounds": [CASES[:4]], "record": True}
    insecure = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    two = run_engines(tmp_path, engine, **insecure)[0]
    same(two["answers"][0], transformers_answers(checkpoint(kind), CASES[:4], RETENTION, method))
    first, second = two["picks"][0]
    assert first and first == second


@pytest.mark.parametrize("kind", ["qwen3_5", "qwen3_5_moe"])
def test_linear_attention(kind, checkpoint, tmp_path):
    """vLLM's linear attention on a CPU takes bfloat16 alone, so that near ties of tokens fall either way."""
    options = {"model": str(checkpoint(kind)), "limit_mm_per_prompt": {"image": 3}, "max_num_batched_tokens": 2048}
    options |= {"hf_overrides": {"hiprune": RETENTION | {"per_request": True}}, "dtype": "bfloat16"}
    cases = [CASES[0], CASES[1], CASES[2], CASES[3], CASES[5]]
    found = run_engines(tmp_path, {"options": options, "rounds": [cases]})[0]["answers"][0]
    expected = transformers_answers(checkpoint(kind), cases, RETENTION)
    assert [answer["prompt"] for answer in found] == [answer["prompt"] for answer in expected]
    assert alike(found, expected) >= 0.6
    assert alike(found, transformers_answers(checkpoint(kind), cases[:3], RETENTION, hk.Random)) < 0.3


def alike(found, expected):
    """The share of the tokens up to the first difference, with log-probabilities no further apart than bfloat16's."""
    same_tokens = 0
    for ours, theirs in zip(found, expected):
        for token, other, logprob, its in zip(
            *(answer[key] for key in ("tokens", "logprobs") for answer in (ours, theirs))
        ):
            if token != other or abs(logprob - its) > 0.2:
                break
            same_tokens += 1
    return same_tokens / sum(len(answer["tokens"]) for answer in expected)
