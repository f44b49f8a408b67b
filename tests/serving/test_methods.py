"""Methods that read other things of the encoder than HiPrune does, equal to transformers, in engines of vLLM."""

import pytest
from helpers import run_engines, same, transformers_answers
from small_models import IMAGE_PAD, VISION_END, VISION_START

import hiprune_kernels as hk

METHODS = {
    "llava": {
        "fastervlm": hk.FasterVLM,
        "visionzip": hk.VisionZip,
        "divprune": hk.DivPrune,
        "uniform-grid": hk.UniformGrid,
    },
    "qwen2_5_vl": {"fastervlm": hk.FasterVLM, "visionzip": hk.VisionZip, "divprune": hk.DivPrune, "random": hk.Random},
    "qwen3_vl": {"visionzip": hk.VisionZip, "vispruner": hk.VisPruner, "divprune": hk.DivPrune},
}
IMAGES = {"llava": "<image>"} | dict.fromkeys(("qwen2_5_vl", "qwen3_vl"), VISION_START + IMAGE_PAD + VISION_END)
PAIRS = [(family, method) for family, methods in METHODS.items() for method in methods]
BUDGET = {"budget": 48}


def cases(family):
    image = IMAGES[family]
    return [
        {"prompt": image + "what?", "images": [(0, 308, 420)]},
        {"prompt": f"a {image} and {image} which?", "images": [(1, 560, 252), (2, 196, 644)]},
    ]


@pytest.fixture(scope="module")
def answers(checkpoint, tmp_path_factory):
    engines = [
        {
            "options": {
                "model": str(checkpoint(family)),
                "limit_mm_per_prompt": {"image": 2},
                "max_num_batched_tokens": 2048,
                "hf_overrides": {"hiprune": BUDGET | {"method": method}},
            },
            "rounds": [cases(family)],
        }
        for family, method in PAIRS
    ]
    found = run_engines(tmp_path_factory.mktemp("methods"), *engines)
    return {pair: engine["answers"][0] for pair, engine in zip(PAIRS, found)}


@pytest.mark.parametrize("family, method", PAIRS)
def test_equals_transformers(answers, checkpoint, family, method):
    same(
        answers[family, method],
        transformers_answers(checkpoint(family), cases(family), BUDGET, METHODS[family][method]),
    )
    others = [found for pair, found in answers.items() if pair[0] == family and pair[1] != method]
    assert answers[family, method] not in others
