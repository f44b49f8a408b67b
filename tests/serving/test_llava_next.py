"""LLaVA-NeXT in engines of vLLM, equal to transformers: tiles, padding, newlines, several methods."""

import pytest
from helpers import run_engines, same, transformers_answers

import hiprune_kernels as hk

ONE, TWO = "USER: <image>\nwhat? ASSISTANT:", "USER: <image> <image>\nwhich? ASSISTANT:"
LANDSCAPE, PORTRAIT, SQUARE = (0, 300, 400), (1, 500, 180), (2, 56, 56)
CASES = [
    {"prompt": ONE, "images": [LANDSCAPE]},
    {"prompt": TWO, "images": [PORTRAIT, LANDSCAPE]},
    {"prompt": "USER: hello ASSISTANT:"},
    {"prompt": ONE, "images": [SQUARE], "asked": {"budget": 60}},
    {"prompt": ONE, "images": [PORTRAIT], "asked": {"retention": 1.0}},
]
RETENTION = {"retention": 0.25}


def engine(folder, **hiprune):
    overrides = {"hiprune": RETENTION | {"per_request": True} | hiprune}
    options = {"model": str(folder), "limit_mm_per_prompt": {"image": 2}, "hf_overrides": overrides}
    options |= {"max_num_batched_tokens": 1024, "long_prefill_token_threshold": 48}
    return {"options": options, "rounds": [CASES, CASES[:2]]}


METHODS = {"hiprune": hk.HiPrune, "hired": hk.HiRED, "visionzip": hk.VisionZip, "divprune": hk.DivPrune}


@pytest.fixture(scope="module")
def answers(checkpoint, tmp_path_factory):
    engines = [engine(checkpoint("llava_next"), method=name) for name in METHODS]
    found = run_engines(tmp_path_factory.mktemp("next"), *engines)
    return {name: each["answers"] for name, each in zip(METHODS, found)}


@pytest.mark.parametrize("name", METHODS)
def test_equals_transformers(answers, checkpoint, name):
    expected = transformers_answers(checkpoint("llava_next"), CASES, RETENTION, METHODS[name])
    same(answers[name][0], expected)
    same(answers[name][1], expected[:2])
