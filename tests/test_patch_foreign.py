"""What others do to a model that is patched, or was: replaced forwards, hooks, PEFT. Respected, or one clear error."""

from __future__ import annotations

import copy
import functools
import types
from collections import Counter

import encoder_models
import pytest
import torch
from models import VLM_CASES
from patch_reference import one_thread  # noqa: F401
from peft import LoraConfig, get_peft_model
from torch import nn

from hiprune_kernels.patch import FAMILIES, apply_hiprune, hiprune, is_patched, remove_hiprune
from hiprune_kernels.patch.models import bare

SHARE = 0.3
GREEDY = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": [90, 91]}
BARE = [name for name, case in encoder_models.CASES.items() if case.config.model_type in bare.FAMILIES]


@pytest.fixture(scope="module", params=[*VLM_CASES, *BARE])
def case(request):
    """A stock model of the family, inputs with images for it, and what it gives with pruning."""
    return _case(request.param)


@pytest.fixture(scope="module", params=VLM_CASES)
def vlm(request):
    return _case(request.param)


@pytest.fixture(scope="module")
def llava():
    return _case("llava")


def _case(name):
    if name in VLM_CASES:
        model, inputs = VLM_CASES[name]()
    else:
        model, inputs = encoder_models.tiny_encoder(name), encoder_models.encoder_inputs(name)
    with hiprune(model, retention=SHARE):
        pruned = run(model, inputs)
    return model, inputs, pruned


def run(model, inputs, **changes):
    with torch.no_grad():
        output = model(**inputs, **changes)
    return output.logits if "logits" in output else output.last_hidden_state


def feature_layers(model):
    """Each tower's layer that selects, and the path of its attention."""
    host = FAMILIES[model.config.model_type].host(model)
    with hiprune(model, retention=SHARE):
        return [(encoder.feature_layer, encoder.family.attention) for encoder in host._hiprune.encoders]


def on_the_way(path):
    """The module at this path, and those above it."""
    names = path.split(".")
    return [".".join(names[: i + 1]) for i in range(len(names))]


# --------------------------------------------------------------------------------------------- modules we stand in for


def test_all_but_the_attention_is_called_as_a_module(case):
    stock, inputs, _ = case
    model, called = copy.deepcopy(stock), Counter()
    for i, (layer, attention) in enumerate(feature_layers(model)):
        for name, module in layer.named_modules():
            if name not in on_the_way(attention):
                module.register_forward_hook(lambda *_, key=(i, name): called.update([key]))
    run(model, inputs)
    in_stock = called.copy()
    assert len(in_stock) > 8
    called.clear()
    run(apply_hiprune(model, retention=SHARE), inputs)
    assert not in_stock - called


def _replace_forward(module):
    def forward(self, *args, **kwargs):
        return type(self).forward(self, *args, **kwargs)

    module.forward = types.MethodType(forward, module)
    return lambda: module.__dict__.pop("forward")


CHANGES = {  # module -> how to take the change back
    "expected the stock `forward`": _replace_forward,
    "expected no hooks": lambda module: module.register_forward_hook(lambda *_: None).remove,
    "no hooks on": lambda module: module.register_forward_pre_hook(lambda *_: None).remove,
    "no hooks": lambda module: module.register_full_backward_hook(lambda *_: None).remove,
    "hooks": lambda module: module.register_full_backward_pre_hook(lambda *_: None).remove,
}


@pytest.mark.parametrize("message", CHANGES)
def test_a_changed_attention_is_refused(case, message):
    stock, inputs, pruned = case
    model = copy.deepcopy(stock)
    for layer, path in feature_layers(model):
        for name in on_the_way(path):
            module = layer.get_submodule(name)
            take_back = CHANGES[message](module)
            with pytest.raises(ValueError, match=f"{message}.* {type(module).__name__}"):
                apply_hiprune(model, retention=SHARE)
            assert not is_patched(model)
            take_back()
            apply_hiprune(model, retention=SHARE)
            assert torch.equal(run(model, inputs), pruned)
            take_back = CHANGES[message](module)
            with pytest.raises(ValueError, match=f"{message}.* {type(module).__name__}"):
                run(model, inputs)
            take_back()
            assert torch.equal(run(model, inputs), pruned)
            remove_hiprune(model)


class Strange(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def __getattr__(self, name):
        return getattr(super().__getattr__("module"), name) if name != "module" else super().__getattr__(name)

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_another_attention_is_refused(case):
    stock, inputs, pruned = case
    model = copy.deepcopy(stock)
    for layer, path in feature_layers(model):
        for name in on_the_way(path):
            owner, _, last = name.rpartition(".")
            owner = layer.get_submodule(owner)
            module = getattr(owner, last)
            apply_hiprune(model, retention=SHARE)
            setattr(owner, last, Strange(module))
            for refused in (lambda: run(model, inputs), lambda: apply_hiprune(model, retention=SHARE)):
                with pytest.raises(ValueError, match=r"expected transformers' own module as .* got Strange"):
                    refused()
            setattr(owner, last, module)
            assert torch.equal(run(model, inputs), pruned)
            remove_hiprune(model)


def test_a_replaced_attention_of_the_object_layer(llava):
    """It is called; if it does not come to its attention function, there are no scores."""
    stock, inputs, pruned = llava
    model = copy.deepcopy(stock)
    attention = model.model.vision_tower.encoder.layers[1].self_attn
    _replace_forward(attention)
    apply_hiprune(model, retention=SHARE, object_layer=2)
    assert torch.equal(run(model, inputs), pruned)
    attention.forward = types.MethodType(lambda self, hidden_states, *_, **__: (hidden_states, None), attention)
    with pytest.raises(RuntimeError, match="model: expected scores of layer 2 of CLIPVisionModel"):
        run(model, inputs)


def test_layers_and_forwards_replaced_after_patching(llava):
    stock, inputs, pruned = llava
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    layers = model.model.vision_tower.encoder.layers
    for change, message in [
        (lambda: layers.__setitem__(3, copy.deepcopy(stock.model.vision_tower.encoder.layers[3])), "layer 4 of CLIP"),
        (lambda: layers[3].__dict__.update(forward=type(layers[3]).forward.__get__(layers[3])), "layer 4 of CLIP"),
    ]:
        before, forward = layers[3], layers[3].__dict__["forward"]
        change()
        with pytest.raises(RuntimeError, match=f"model: expected {message}VisionModel to run as patched"):
            run(model, inputs)
        layers[3] = before
        before.__dict__["forward"] = forward
        assert torch.equal(run(model, inputs), pruned)
    language_model = model.model.language_model
    forward = language_model.__dict__.pop("forward")
    with pytest.raises(
        RuntimeError, match="model: expected LlamaModel to run as patched, but its forward was replaced"
    ):
        run(model, inputs)
    language_model.__dict__["forward"] = forward
    for name in ("vision_tower", "multi_modal_projector", "language_model"):
        part = getattr(model.model, name)
        setattr(model.model, name, copy.deepcopy(part))
        with pytest.raises(
            RuntimeError, match=f"model: expected the {type(part).__name__} that was patched, but anoth"
        ):
            run(model, inputs)
        setattr(model.model, name, part)
    assert torch.equal(run(model, inputs), pruned)
    encoder = apply_hiprune(encoder_models.tiny_encoder("vit"), retention=SHARE)
    encoder.layers[-1].__dict__.pop("forward")
    with pytest.raises(RuntimeError, match="layer 5 of ViTModel to run as patched"):
        run(encoder, encoder_models.encoder_inputs("vit"))


def test_applying_again_to_what_was_replaced_since(llava):
    """A refusal leaves the patch on, as it was."""
    stock, inputs, pruned = llava
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    layer = model.model.vision_tower.encoder.layers[3]
    inner = layer.forward
    layer.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    with pytest.raises(ValueError, match="expected the stock `forward` on CLIPEncoderLayer"):
        apply_hiprune(model, retention=0.9)
    assert is_patched(model) and torch.equal(run(model, inputs), pruned)
    layer.forward = inner
    with hiprune(model, retention=0.9):
        assert run(model, inputs).shape[1] > pruned.shape[1]
    assert torch.equal(run(model, inputs), pruned)


def test_a_wrapped_vision_tower_is_refused(llava):
    model = copy.deepcopy(llava[0])
    model.model.vision_tower = Strange(model.model.vision_tower)
    with pytest.raises(
        ValueError, match=r"model: expected a transformers\.PreTrainedModel for its vision, got Strange"
    ):
        apply_hiprune(model, retention=SHARE)
    assert not is_patched(model)


# ------------------------------------------------------------------------------------------------- forwards we wrap


def twice(module):
    """Let a module's output be twice what it is, from its forward."""
    forward = module.forward

    def doubled(*args, **kwargs):
        return 2 * forward(*args, **kwargs)

    module.forward = doubled


def projector(model):
    return model.model.visual.merger if hasattr(model.model, "visual") else model.model.multi_modal_projector


def test_a_forward_of_one_s_own_is_respected(vlm):
    """Before patching or while patched, of the projector; and it is there after removing."""
    stock, inputs, pruned = vlm
    model = copy.deepcopy(stock)
    stock_logits = run(stock, inputs)
    twice(projector(model))
    own, doubled = projector(model).forward, run(model, inputs)
    apply_hiprune(model, retention=SHARE)
    twice_pruned = run(model, inputs)
    assert twice_pruned.shape == pruned.shape and not torch.equal(twice_pruned, pruned)
    remove_hiprune(model)
    assert projector(model).forward is own and torch.equal(run(model, inputs), doubled)
    other = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    twice(projector(other))
    own = projector(other).forward
    assert torch.equal(run(other, inputs), twice_pruned)
    remove_hiprune(other)
    assert projector(other).forward is own and torch.equal(run(other, inputs), doubled)
    apply_hiprune(other, retention=SHARE)
    assert torch.equal(run(other, inputs), twice_pruned)
    remove_hiprune(other)
    del projector(other).forward
    assert torch.equal(run(other, inputs), stock_logits)


def test_a_wrapper_around_the_patched_inner_model(llava):
    """Nothing can be put in its place again, but what it wraps is stock after removing."""
    stock, inputs, pruned = llava
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    inner = model.model.forward
    model.model.forward = lambda *args, **kwargs: inner(*args, **kwargs)
    assert torch.equal(run(model, inputs), pruned)
    remove_hiprune(model)
    assert torch.equal(run(model, inputs), run(stock, inputs))
    with pytest.raises(ValueError, match="expected the stock `forward` on LlavaModel"):
        apply_hiprune(model, retention=SHARE)


@pytest.mark.parametrize("part", ["language model", "head"])
def test_a_wrapper_around_a_patched_forward(llava, part):
    stock, inputs, pruned = llava
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    module = model.model.language_model if part == "language model" else model
    inner, calls = module.forward, []

    @functools.wraps(inner)  # `generate` reads the names of the arguments
    def wrapper(*args, **kwargs):
        calls.append(kwargs)
        return inner(*args, **kwargs)

    module.forward = wrapper
    for _ in range(2):
        assert torch.equal(run(model, inputs), pruned)
        remove_hiprune(model)
        assert torch.equal(run(model, inputs), run(stock, inputs))
        apply_hiprune(model, retention=SHARE)
    assert len(calls) == 4 and module.forward is not wrapper
    with hiprune(stock, retention=SHARE):
        expected = stock.generate(**inputs, **GREEDY)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)


# ---------------------------------------------------------------------------------------------------------------- PEFT


ORDERS = {  # steps; "!" where the next run is refused
    "wrapped while patched": "apply wrap ! apply run unload ! apply run remove run",
    "wrapped before": "wrap run apply run remove run apply run merge ! apply run remove run",
    "removed while wrapped": "apply wrap remove run merge run apply run remove run",
    "merged at once": "apply wrap merge ! apply run remove run",
    "unloaded at once": "apply wrap unload ! remove run apply run",
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_peft_saves_the_projector(vlm, order):
    """PEFT puts a wrapper with a copy in the place of a module that it saves, and later the copy in that of the wrapper."""
    stock, inputs, pruned = vlm
    name = "merger" if hasattr(stock.model, "visual") else "multi_modal_projector"
    model = called = copy.deepcopy(stock)
    expected = stock_logits = run(stock, inputs)
    for step in ORDERS[order].split():
        if step == "run":
            torch.testing.assert_close(run(called, inputs), expected, rtol=0, atol=5e-4)
        elif step == "!":
            with pytest.raises(
                RuntimeError, match=r"that was patched, but another module, a .*; call apply_hiprune again"
            ):
                run(called, inputs)
        elif step == "apply":
            apply_hiprune(model, retention=SHARE)
            expected = pruned
        elif step == "remove":
            remove_hiprune(model)
            expected = stock_logits
        elif step == "wrap":
            called = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=[name])).eval()
        else:
            called = called.unload() if step == "unload" else called.merge_and_unload()
            assert called is model
    if not is_patched(model):
        assert not any("hiprune" in key or key == "forward" for module in model.modules() for key in module.__dict__)


def test_lora_in_every_linear_layer(vlm):
    """Adapters are modules in the place of linear layers, in the layers that we compute too."""
    stock, inputs, pruned = vlm
    model = copy.deepcopy(stock)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    apply_hiprune(model, retention=SHARE)
    adapted = run(wrapped, inputs)
    assert adapted.shape == pruned.shape and (adapted - pruned).abs().max() > 0.1
    merged = wrapped.merge_and_unload()
    assert merged is model
    torch.testing.assert_close(run(merged, inputs), adapted, rtol=0, atol=2e-2)
    remove_hiprune(model)


@pytest.mark.parametrize("name", ["vision_tower", "language_model", "self_attn", "layers.3"])
def test_peft_saves_something_else(llava, name):
    """A copy of a patched part is not the part that was patched; a copy is patched like any other."""
    stock, inputs, pruned = llava
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    wrapped = get_peft_model(model, LoraConfig(target_modules=["lm_head"], modules_to_save=[name])).eval()
    with pytest.raises((RuntimeError, ValueError), match="model: expected"):
        run(wrapped, inputs)
    remove_hiprune(model)
    torch.testing.assert_close(run(wrapped, inputs), run(stock, inputs), rtol=0, atol=5e-4)
    merged = wrapped.merge_and_unload()
    assert not any("hiprune" in key or key == "forward" for module in merged.modules() for key in module.__dict__)
    torch.testing.assert_close(run(apply_hiprune(merged, retention=SHARE), inputs), pruned, rtol=0, atol=5e-4)
