"""What one process of several finds with a model that `tp_plan` shares out; test_tensor_parallel.py starts them.

Run as `torchrun --nproc-per-node 2 tests/tensor_parallel.py FOLDER`, where `save` has put the models.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.distributed import DistributedConfig

import hiprune_kernels as hk
from hiprune_kernels.methods import PTP, FastV
from hiprune_kernels.patch import late
from hiprune_kernels.patch.tiny import VLM_CASES

MODELS = ("llava", "qwen2_5_vl")
METHODS = {"none": None, "hiprune": hk.HiPrune(budget=6), "fastv": FastV(budget=6), "ptp": PTP(budget=6)}
_TOWER = "model.vision_tower.encoder.layers.*.self_attn."
TOWER_PLAN = {_TOWER + f"{name}_proj": "colwise" for name in "qkv"} | {_TOWER + "out_proj": "rowwise"}


def save(folder: Path) -> None:
    for name in MODELS:
        VLM_CASES[name]()[0].save_pretrained(folder / name)


def load(path: Path, plan: object) -> torch.nn.Module:
    config = {} if plan is None else {"distributed_config": DistributedConfig(tp_plan=plan)}
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, **config).eval()


def found(folder: Path, plan: object = None) -> dict[str, list]:
    """Of each model and method the generated tokens, and the indices of the tokens that were kept."""
    results = {}
    for name in MODELS:
        model, inputs = load(folder / name, plan), VLM_CASES[name]()[1]
        for label, method in METHODS.items():
            results[f"{name} {label}"] = _answers(model, inputs, method)
    return results


def _answers(model, inputs, method) -> list:
    if method is not None:
        hk.apply_method(model, method)
    with torch.inference_mode():
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    kept = [] if method is None else [selection.indices.tolist() for selection in hk.last_selection(model)]
    if method is not None:
        hk.remove_method(model)
    return [tokens.tolist(), kept]


def _refusals(folder: Path) -> list[str]:
    """What is said of a vision encoder that is shared out."""
    model, said = load(folder / "llava", TOWER_PLAN), []
    for call in (lambda: hk.apply_hiprune(model, budget=6), lambda: hk.record_scores(model).__enter__()):
        with pytest.raises(ValueError) as refused:
            call()
        said.append(str(refused.value))
    assert not hk.is_patched(model)
    return said


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    results = {"found": found(folder, "auto"), "refusals": _refusals(folder)}
    late.all_heads = lambda group, states: states
    model, inputs = load(folder / "llava", "auto"), VLM_CASES["llava"]()[1]
    results["own heads only"] = _answers(model, inputs, METHODS["fastv"])
    (folder / f"{torch.distributed.get_rank()}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
