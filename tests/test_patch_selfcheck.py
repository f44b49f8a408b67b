"""The table of stock functions, and the self-check against a transformers whose code was changed on purpose."""

from __future__ import annotations

import functools
import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from patch_reference import one_thread  # noqa: F401
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.llava.modeling_llava import LlavaModel

import hiprune_kernels as hk
from hiprune_kernels.methods import HiPrune
from hiprune_kernels.patch import FAMILIES, _prepare, selfcheck, stock, tiny
from hiprune_kernels.patch.call import PATCH
from hiprune_kernels.patch.generate import wrong_beams
from hiprune_kernels.patch.models import bare

VARIANTS = list(itertools.chain.from_iterable(map(tiny.variants, FAMILIES)))


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What was checked before is checked again."""
    monkeypatch.setattr(selfcheck, "_VERDICTS", {})


def changed(function, change):
    """`change(stock function, *args, **kwargs)` in the place of a stock function."""
    return functools.wraps(function)(lambda *args, **kwargs: change(function, *args, **kwargs))


def same(function):
    return changed(function, lambda stock, *args, **kwargs: stock(*args, **kwargs))


def prepared(model):
    return _prepare(model, FAMILIES[model.config.model_type], HiPrune(retention=0.5), None)


# ----------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_function_is_there_and_known(variant):
    model, _ = tiny.build(*variant)
    names = stock.functions(prepared(model), model)
    assert stock.unknown(prepared(model), model) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hk.apply_hiprune(model, retention=0.5)
    family, host = FAMILIES[model.config.model_type], FAMILIES[model.config.model_type].host(model)
    changed = [(type(module), name) for module, name, _ in host.__dict__[PATCH].edits._methods]
    changed += [(type(module), "forward") for module in (model, family.language_model(host)) if module is not None]
    assert len(changed) > 2
    for owner, name in changed:
        function = getattr(owner, name, None)  # a class may lack what `generate` looks for
        assert function is None or stock._name(function) in names


def test_run_as_a_program_it_prints_itself():
    """... under a release that is in it."""
    command = [sys.executable, "-m", "hiprune_kernels.patch.stock"]
    table = subprocess.run(command, capture_output=True, text=True, check=True)
    assert table.stdout in Path(stock.__file__).read_text() and "KNOWN = {" in table.stdout
    assert "RuntimeWarning" not in table.stderr


def test_a_new_release_is_added(monkeypatch):
    monkeypatch.setattr(stock.transformers, "__version__", "5.100.0")
    monkeypatch.setattr(CLIPAttention, "forward", same(CLIPAttention.forward))
    before, table = Path(stock.__file__).read_text().splitlines(), list(stock._table())
    release, attention = [line for line in table if line not in before]
    assert release == '    "5.100.0",' and table[table.index(release) + 1] == ")"
    assert attention.startswith('    "clip.CLIPAttention.forward": ("45fb45ce 5.16.0", "')
    assert attention.endswith(' 5.100.0"),')


def test_digests():
    around = same(LlavaModel.forward)
    assert stock._name(around) == "llava.LlavaModel.forward"
    assert stock.digest(around) != stock.digest(LlavaModel.forward)
    assert stock.digest(LlavaModel.forward) in dict(map(str.split, stock.KNOWN["llava.LlavaModel.forward"]))
    assert stock.digest(len) == "?"


# ------------------------------------------------------------------------------------------------------- the self-check


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_right(model_type):
    assert hk.check_model(model_type) == (model_type, "")


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if len(tiny.variants(variant[0])) > 1], ids=str)
def test_a_model_is_checked_with_parts_like_its_own(variant, monkeypatch):
    built = []
    monkeypatch.setattr(tiny, "build", lambda *parts, build=tiny.build: built.append(parts) or build(*parts))
    model, _ = tiny.build(*variant)
    text, tower = model.config.text_config.model_type, model.config.vision_config.model_type
    assert text == variant[1] and tower == (variant[2] or tower)
    assert hk.check_model(model).right
    assert built[1] == (variant[0], text, tower)


def test_every_family_has_a_tiny_model():
    assert {*tiny.VLM_CASES, *bare.FAMILIES} == set(FAMILIES)
    for model_type in FAMILIES:
        assert tiny.build(model_type)[0].config.model_type == model_type


def test_bad_input():
    with pytest.raises(ValueError, match=r"model_or_type: expected one of llava, .*, got 'lava'"):
        hk.check_model("lava")
    with pytest.raises(
        TypeError, match=r"model_or_type: expected a transformers.PreTrainedModel or a model type, got int"
    ):
        hk.check_model(3)


def test_nothing_else_is_disturbed():
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            assert hk.check_model("llava").right and hk.check_model("vit").right
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()


HARMFUL = {  # what -> (model type, owner, name, change, what the check says)
    "the layer": (
        *("clip_vision_model", CLIPEncoderLayer, "forward"),
        lambda stock, *args, **kwargs: stock(*args, **kwargs) * 1.1,
        "features that are off by",
    ),
    "the layer inside a model": (
        *("llava", CLIPEncoderLayer, "forward"),
        lambda stock, *args, **kwargs: stock(*args, **kwargs) * 1.1,
        "features that stock code does not have",
    ),
    "padding in the language model": (
        *("llava", LlamaModel, "forward"),
        lambda stock, *args, **kwargs: stock(*args, **{**kwargs, "attention_mask": None}),
        "logits of a decoding step that are off by",
    ),
    "decoding": (
        *("llava", GenerationMixin, "prepare_inputs_for_generation"),
        lambda stock, *args, **kwargs: {**stock(*args, **kwargs), "attention_mask": None},
        "greedy tokens \\[",
    ),
    "beams": ("llava", Cache, "reorder_cache", lambda stock, *args, **kwargs: None, "tokens of 2 beams"),
}


@pytest.mark.parametrize("what", HARMFUL)
def test_harmful_changes(what, monkeypatch):
    """The check finds them, `apply_hiprune` refuses, and the model is as it was."""
    model_type, owner, name, change, message = HARMFUL[what]
    if what == "beams" and (wrong_beams(model_type) or not hasattr(GenerationMixin, "_expand_multimodal_outputs")):
        return
    (model, _), (patched, _) = tiny.build(model_type), tiny.build(model_type)
    hk.apply_hiprune(patched, retention=0.5)
    settings = patched.base_model.__dict__[PATCH].method
    attributes = {key: set(module.__dict__) for key, module in model.named_modules()}
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, changed(getattr(owner, name), change))
        for each in (model, patched):
            with pytest.raises(ValueError, match=f"hiprune_kernels is known to be right with .*{name}.*{message}"):
                hk.apply_hiprune(each, retention=0.2)
    assert {key: set(module.__dict__) for key, module in model.named_modules()} == attributes
    assert patched.base_model.__dict__[PATCH].method == settings


def test_harmless_changes(monkeypatch, recwarn):
    """One line says so, once."""
    model, inputs = tiny.build("llava")
    with torch.no_grad():
        expected = hk.apply_hiprune(model, retention=0.5)(**inputs).logits
    hk.remove_hiprune(model)
    assert not [warning for warning in recwarn if "hiprune" in str(warning.message)]
    monkeypatch.setattr(CLIPAttention, "forward", same(CLIPAttention.forward))
    with pytest.warns(
        UserWarning, match="not tested with this version of clip.CLIPAttention.forward .*a tiny patched llava"
    ):
        hk.apply_hiprune(model, retention=0.5)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(selfcheck, "check_model", None)  # not called again
        hk.apply_hiprune(model, retention=0.2)


def test_a_layer_of_somebody_s_own():
    """A tiny model has none, so it tells nothing."""

    class Mine(CLIPEncoderLayer):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            return super().forward(hidden_states, attention_mask, **kwargs) + 1

    model, _ = tiny.build("llava")
    for layer in model.model.vision_tower.encoder.layers:
        layer.__class__ = Mine
    with pytest.warns(UserWarning, match="cannot check it, as a tiny llava has no test_patch_selfcheck.*Mine.forward"):
        hk.apply_hiprune(model, retention=0.5)


def test_wrappers_of_whole_parts(recwarn):
    """They call what they wrap, which is as known as without them."""

    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, features):
            return self.inner(features)

    model, inputs = tiny.build("llava")
    with torch.no_grad():
        expected = hk.apply_hiprune(model, retention=0.5)(**inputs).logits
        hk.remove_hiprune(model)
        model.model.multi_modal_projector = Wrapper(model.model.multi_modal_projector)
        assert torch.equal(hk.apply_hiprune(model, retention=0.5)(**inputs).logits, expected)
    assert not [warning for warning in recwarn if "hiprune" in str(warning.message)]


def test_a_method_of_another_name(monkeypatch):
    monkeypatch.delattr(GenerationMixin, "_prefill")
    verdict = hk.check_model("llava")
    assert not verdict.right and "with a method `_prefill`" in verdict.difference
