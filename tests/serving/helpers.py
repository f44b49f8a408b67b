"""Engines in processes of their own, and what transformers answers to the same requests."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from engine import TOKENS
from small_models import IMAGE_PAD, PINPOINTS, picture

import hiprune_kernels as hk
from hiprune_kernels.budget import kept_anyres_tokens

HERE = Path(__file__).parent


def run_engines(folder: Path, *engines: dict, **environment: str) -> list[dict]:
    """What engines answer, see engine.py. Raises RuntimeError with the end of the log where one fails."""
    path = folder / "work.json"
    path.write_text(json.dumps(engines))
    command = [sys.executable, str(HERE / "engine.py"), str(path)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-6000:])
    return json.loads(path.read_text())


def mixed_requests(count: int, prompt: str, image: str, sizes: list[tuple[int, int]], seed: int = 0) -> list[dict]:
    """Requests of one image, of two, and of text alone, of many sizes and budgets."""
    draw, requests = random.Random(seed), []
    for number in range(count):
        images = draw.choice([0, 1, 1, 1, 2])
        request: dict = {"prompt": prompt.format(image * images, number)}
        if images:
            request["images"] = [(draw.randrange(40), *draw.choice(sizes)) for _ in range(images)]
            request["asked"] = draw.choice(
                [None, {"budget": draw.randint(8, 200)}, {"retention": draw.uniform(0.05, 1)}]
            )
        requests.append(request)
    return requests


def transformers_answers(
    checkpoint: Path, requests: list[dict], default: dict, method: type = hk.HiPrune
) -> list[dict]:
    """The same of transformers with `apply_method`, each request alone."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    config = AutoConfig.from_pretrained(checkpoint)
    fast, pictures = AutoTokenizer.from_pretrained(checkpoint), AutoImageProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    answers = []
    for request in requests:
        hk.apply_method(model, method(**(request.get("asked") or default)))
        answers.append(_answer(model, config, fast, pictures, request))
        hk.remove_hiprune(model)
    return answers


def _answer(model, config, fast, pictures, request: dict) -> dict:
    prompt, given = request["prompt"], {}
    if images := [picture(*image) for image in request.get("images") or ()]:
        given = dict(pictures(images, return_tensors="pt"))
        placeholder = IMAGE_PAD if config.model_type.startswith("qwen") else "<image>"
        for count in _placeholders(model, config, given):
            prompt = prompt.replace(placeholder, "\0" * count, 1)
        prompt = prompt.replace("\0", placeholder)
    ids = fast(prompt, return_tensors="pt")["input_ids"]
    if images and config.model_type.startswith("qwen"):
        given["mm_token_type_ids"] = (ids == config.image_token_id).long()
    with torch.no_grad():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **given,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    tokens = output.sequences[0, ids.shape[1] :].tolist()
    logprobs = [float(logits[0].log_softmax(-1)[token]) for logits, token in zip(output.logits, tokens)]
    return {"prompt": output.past_key_values.get_seq_length() - TOKENS + 1, "tokens": tokens, "logprobs": logprobs}


def _placeholders(model, config, given: dict) -> list[int]:
    """How many placeholders each image has where nothing is pruned."""
    if config.model_type.startswith("qwen"):
        return [int(grid.prod()) // 4 for grid in given["image_grid_thw"]]
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    if config.model_type == "llava":
        return [tokens] * len(given["pixel_values"])
    sizes = given["image_sizes"].tolist()
    return [kept_anyres_tokens(size, pinpoints=PINPOINTS, tile_size=28, patch_size=4, retention=1.0) for size in sizes]


def same(found: list[dict], expected: list[dict], tolerance: float = 1e-3) -> None:
    """Assert that answers are the same: lengths of prompts, tokens, and log-probabilities."""
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert ours["prompt"] == theirs["prompt"], number
        assert ours["tokens"] == theirs["tokens"], number
        difference = torch.tensor(ours["logprobs"]) - torch.tensor(theirs["logprobs"])
        assert float(difference.abs().max()) <= tolerance, (number, difference)
