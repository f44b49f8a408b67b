"""torch.compile, in any order with patching: graphs that were traced before a model was patched must not outlive it."""

from __future__ import annotations

import copy

import pytest
import torch
from models import VLM_CASES
from patch_reference import one_thread  # noqa: F401
from torch._dynamo.utils import counters
from transformers import CompileConfig

from hiprune_kernels.patch import apply_hiprune, hiprune, record_scores, remove_hiprune
from hiprune_kernels.patch.encoders import find_encoder, locate_layers

FAMILIES = ["llava", "internvl", "qwen2_5_vl"]
SHARE, OTHER_SHARE = 0.3, 0.1
CLOSE = {"rtol": 0, "atol": 5e-4}  # of what is compiled; a wrong token moves logits by more than 0.1
SUPPRESSED = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": [90, 91]}


@pytest.fixture(autouse=True)
def fresh_compiler():
    """All models share the code that is compiled, and recompilations are counted and limited."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    """A stock model with one layer of text, inputs, and the logits and tokens by the share that is kept."""
    return _case(request.param)


@pytest.fixture(scope="module")
def llava():
    return _case("llava")


def _case(family):
    model, inputs = VLM_CASES[family]()
    vision, text = model.config.vision_config, model.config.text_config
    setattr(vision, "depth" if hasattr(vision, "depth") else "num_hidden_layers", 3)  # what is traced has to be small
    del locate_layers(model)[1].get_submodule(locate_layers(model)[0].layers)[3:]
    text.num_hidden_layers = 1
    del model.model.language_model.layers[1:]
    expected = {None: (logits(model, inputs), tokens(model, inputs))}
    for share in (SHARE, OTHER_SHARE):
        with hiprune(model, retention=share):
            expected[share] = logits(model, inputs), tokens(model, inputs)
    assert len({expected[share][0].shape for share in expected}) == len(expected)
    assert len({tuple(expected[share][1].flatten().tolist()) for share in expected}) > 1
    return model, inputs, expected


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def tokens(model, inputs, **options):
    return model.generate(**inputs, **SUPPRESSED, **options)[:, inputs["input_ids"].shape[1] :]


def in_place(model, *modules):
    for module in modules:
        module.compile(backend="eager")
    return model


def parts(model):
    host = model.model
    if hasattr(host, "visual"):
        return host.visual, host.visual.merger, host.language_model
    return host.vision_tower, host.multi_modal_projector, host.language_model


def _replaced_language_model(model):
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    return model


def _replaced_forward(model):
    language_model = model.model.language_model
    language_model.forward = torch.compile(language_model.forward, backend="eager")
    return model


WAYS = {  # of compiling: model -> what to call from then on
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "model": lambda model: in_place(model, model),
    "inner model": lambda model: in_place(model, model.model),
    "parts": lambda model: in_place(model, *parts(model)),
    "layers": lambda model: in_place(model, *find_encoder(model)[2], *model.model.language_model.layers),
    "language model": _replaced_language_model,
    "its forward": _replaced_forward,
}


def check(case, way, steps, run):
    """Every "run" among the steps gives what a model gives that was never compiled."""
    stock, inputs, expected = case
    model, share = copy.deepcopy(stock), None
    called = model
    for step in steps.split():
        if step == "compile":
            called = way(model)
        elif step == "apply":
            share = SHARE if share is None else OTHER_SHARE
            apply_hiprune(model, retention=share)
        elif step == "remove":
            share = None
            remove_hiprune(model)
        elif step == "within":
            with hiprune(model, retention=OTHER_SHARE):
                run(called, inputs, *expected[OTHER_SHARE])
        else:
            run(called, inputs, *expected[share])
    assert counters["stats"]["unique_graphs"] > 0


def same_logits(called, inputs, expected, _):
    torch.testing.assert_close(logits(called, inputs), expected, **CLOSE)


COMPILED_FIRST = "compile run apply run apply run remove run"
PATCHED_FIRST = "apply compile run remove run within run"


def test_compiled_and_run_before_patching(case):
    check(case, WAYS["inner model"], "compile run apply run remove run", same_logits)


@pytest.mark.parametrize("way", ["torch.compile", "parts", "layers", "language model", "its forward"])
def test_compiled_first(llava, way):
    check(llava, WAYS[way], COMPILED_FIRST, same_logits)


@pytest.mark.parametrize("way", ["model", "parts", "layers", "language model", "its forward"])
def test_patched_first(llava, way):
    check(llava, WAYS[way], PATCHED_FIRST, same_logits)


@pytest.mark.parametrize("steps", [COMPILED_FIRST, PATCHED_FIRST], ids=["compiled first", "patched first"])
def test_compiled_decoding_steps(case, steps):
    """`generate` with a static cache compiles the model's call by itself, on a GPU; here it is told to."""
    compiled = CompileConfig(backend="eager", fullgraph=False, mode=None)
    compiled._compile_all_devices = True

    def same_tokens(called, inputs, _, expected):
        ours = tokens(called, inputs, cache_implementation="static", compile_config=compiled)
        assert torch.equal(ours, expected)

    check(case, lambda model: model, steps, same_tokens)


def test_recording_an_encoder_that_ran_compiled():
    """A packed encoder's arguments tell which column belongs to which patch."""
    model, inputs = VLM_CASES["qwen2_5_vl"]()
    encoder = model.model.visual
    images = inputs["pixel_values"], inputs["image_grid_thw"]
    with torch.no_grad():
        with record_scores(encoder, layers=[2]) as expected:
            encoder(*images)
        encoder.compile(backend="eager")
        encoder(*images)
        with record_scores(encoder, layers=[2]) as scores:
            encoder(*images)
            encoder(*images)
        assert counters["stats"]["unique_graphs"] > 0
    assert len(scores[2]) == 2
    for each in scores[2]:
        torch.testing.assert_close(each, expected[2][0], rtol=1e-4, atol=1e-4)
