"""Putting the patch on, taking it off, everything that may happen in between, and bad input."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from models import IMAGE_TOKEN, batch, images, prompt, tiny_clip, tiny_llava, tiny_text_config
from patch_reference import one_thread  # noqa: F401
from transformers import (
    CLIPVisionModel,
    GemmaConfig,
    GenerationMixin,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from hiprune_kernels.patch import (
    FAMILIES,
    apply_hiprune,
    hiprune,
    is_patched,
    last_selection,
    record_scores,
    remove_hiprune,
)
from hiprune_kernels.patch.edits import Edits

GREEDY = {"do_sample": False, "max_new_tokens": 5, "suppress_tokens": [IMAGE_TOKEN]}


def inputs(seed: int = 0, text: int = 5) -> dict:
    rows = [prompt(text, "image", 7, seed=seed), prompt(9, seed=seed + 1)]
    return batch(rows, images(1, seed=seed))


def run(model, **changes):
    with torch.no_grad():
        return model(**{**inputs(), **changes}).logits


def fingerprint(model):
    """Everything that a patch could leave behind on any module."""
    return {
        name: {key: dict(value) if isinstance(value, dict) else value for key, value in module.__dict__.items()}
        for name, module in model.named_modules()
    }


def assert_untouched(model, before):
    after = fingerprint(model)
    assert after.keys() == before.keys()
    for name, attributes in before.items():
        assert after[name].keys() == attributes.keys(), name
        assert after[name].get("config") is attributes.get("config"), name
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"):
            assert list(after[name][hooks]) == list(attributes[hooks]), name


@pytest.fixture(scope="module")
def stock():
    model = tiny_llava()
    with torch.no_grad():  # installs the hooks with which transformers collects hidden states, once and for all
        model(**inputs(), output_hidden_states=True)
    return model


@pytest.fixture
def model(stock):
    return copy.deepcopy(stock)


@pytest.fixture(scope="module")
def pruned_logits(stock):
    return run(apply_hiprune(copy.deepcopy(stock), budget=10))


# ------------------------------------------------------------------------------------------------------ on and off


def test_removing_restores_the_stock_bits_and_leaves_nothing(stock, model, pruned_logits):
    snapshot = fingerprint(model)
    assert not is_patched(model)
    assert apply_hiprune(model, budget=10) is model
    assert is_patched(model) and is_patched(model.model)
    assert torch.equal(run(model), pruned_logits)
    assert fingerprint(model)["model"].keys() != snapshot["model"].keys()
    assert remove_hiprune(model) is model
    assert not is_patched(model)
    assert_untouched(model, snapshot)
    assert torch.equal(run(model), run(stock))
    assert torch.equal(model.generate(**inputs(), **GREEDY), stock.generate(**inputs(), **GREEDY))
    apply_hiprune(model, budget=10)
    assert torch.equal(run(model), pruned_logits)


def test_bare_encoder_comes_back(stock):
    encoder, pixels = tiny_clip(), images(2)
    with torch.no_grad():
        before = encoder(pixels)
        with hiprune(encoder, budget=5):
            assert encoder(pixels).last_hidden_state.shape[1] == 6
        after = encoder(pixels)
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    assert torch.equal(before.pooler_output, after.pooler_output)


def test_applying_again_replaces_the_settings(stock, model, pruned_logits):
    untouched = fingerprint(model)
    apply_hiprune(model, budget=3, object_layer=4, alpha=1.0)
    assert run(model).shape[1] == 12 + 3
    apply_hiprune(model, budget=10)
    assert torch.equal(run(model), pruned_logits)
    remove_hiprune(model)
    assert_untouched(model, untouched)


def test_context_form(stock, model, pruned_logits):
    with hiprune(model, retention=0.28) as inside:  # 10 of 36
        assert inside is model
        assert torch.equal(run(model), pruned_logits)
    assert torch.equal(run(model), run(stock))
    with pytest.raises(RuntimeError, match="stop"), hiprune(model, budget=10):
        raise RuntimeError("stop")
    assert not is_patched(model)
    with hiprune(model, budget=10):
        remove_hiprune(model)
    assert not is_patched(model)
    apply_hiprune(model, budget=10)
    with hiprune(model, budget=3):
        assert run(model).shape[1] == 12 + 3
    assert torch.equal(run(model), pruned_logits)


@pytest.mark.parametrize("before", ["stock", "patched"])
def test_a_failed_apply_leaves_the_model_as_it_was(stock, model, monkeypatch, before, pruned_logits):
    """Whatever fails half way, what was done is undone."""
    if before == "patched":
        apply_hiprune(model, budget=10)
    snapshot = fingerprint(model)
    expected = pruned_logits if before == "patched" else run(stock)
    last = model.model.vision_tower.encoder.layers[-1]
    stock_forward = type(last).forward
    calls = []

    original = Edits.set_method

    def failing(self, module, name, function, **options):
        calls.append(name)
        if len(calls) == 5:  # host, feature layer, skipped layer, projector, then the first generation method
            raise RuntimeError("half way")
        original(self, module, name, function, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Edits, "set_method", failing)
        with pytest.raises(RuntimeError, match="half way"):
            apply_hiprune(model, budget=3)
    assert type(last).forward is stock_forward
    assert is_patched(model) == (before == "patched")
    if before == "stock":
        assert_untouched(model, snapshot)
    assert torch.equal(run(model), expected)


def test_somebody_elses_replacement_is_refused(model):
    layer = model.model.vision_tower.encoder.layers[-1]
    layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    with pytest.raises(ValueError, match="expected the stock `forward` on CLIPEncoderLayer"):
        apply_hiprune(model, budget=10)
    assert not is_patched(model)
    del layer.forward
    apply_hiprune(model, budget=10)


def test_an_error_or_interrupt_inside_closes_the_call(stock, model):
    apply_hiprune(model, budget=10)
    mismatch = inputs()
    mismatch["input_ids"] = mismatch["input_ids"].clamp(max=IMAGE_TOKEN - 1)
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**mismatch)

    def interrupt(*args):
        raise KeyboardInterrupt

    handle = model.model.language_model.layers[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model)
    handle.remove()
    with torch.no_grad():
        ours = model.model.vision_tower(images(1)).last_hidden_state
        assert torch.equal(ours, stock.model.vision_tower(images(1)).last_hidden_state)


# --------------------------------------------------------------------------------------------------- copies and files


def test_deepcopy_owns_its_patch(stock, model, pruned_logits):
    apply_hiprune(model, budget=10)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin), pruned_logits)
    remove_hiprune(model)
    assert is_patched(twin) and torch.equal(run(twin), pruned_logits) and torch.equal(run(model), run(stock))
    apply_hiprune(model, budget=10)
    remove_hiprune(twin)
    assert is_patched(model) and torch.equal(run(model), pruned_logits) and torch.equal(run(twin), run(stock))
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert torch.equal(run(model), pruned_logits)


def test_pickling_is_refused(tmp_path):
    model = apply_hiprune(tiny_llava(), budget=10)
    with pytest.raises(TypeError, match=r"model: a patched model cannot be pickled .* call remove_hiprune before"):
        torch.save(model, tmp_path / "model.pt")
    torch.save(remove_hiprune(model), tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(run(loaded), run(model))


@pytest.mark.parametrize("shards", ["10GB", "100KB"])
def test_save_and_load(stock, model, pruned_logits, tmp_path, shards):
    apply_hiprune(model, budget=10)
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "100KB")
    assert "hiprune" not in (tmp_path / "config.json").read_text()
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert not is_patched(loaded)
    assert torch.equal(run(loaded), run(stock))
    apply_hiprune(loaded, budget=10)
    assert torch.equal(run(loaded), pruned_logits)
    assert torch.equal(loaded.generate(**inputs(), **GREEDY), model.generate(**inputs(), **GREEDY))
    half = apply_hiprune(LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16), budget=10)
    with torch.no_grad():
        logits = half(**{**inputs(), "pixel_values": inputs()["pixel_values"].bfloat16()}).logits
    assert logits.dtype == torch.bfloat16 and logits.shape == pruned_logits.shape


def test_encoder_from_a_sub_folder(tmp_path):
    encoder = tiny_clip()
    encoder.save_pretrained(tmp_path / "vision")
    loaded = apply_hiprune(CLIPVisionModel.from_pretrained(tmp_path, subfolder="vision"), budget=7)
    with torch.no_grad():
        ours = apply_hiprune(encoder, budget=7)(images(2)).last_hidden_state
        assert torch.equal(loaded(images(2)).last_hidden_state, ours)


def test_state_dict_is_unchanged(stock, model):
    apply_hiprune(model, budget=10)
    assert model.state_dict().keys() == stock.state_dict().keys()
    assert model.config.to_dict() == stock.config.to_dict()


# ---------------------------------------------------------------------------------------------------- other libraries


def hooked(model):
    for module in list(model.modules()):
        add_hook_to_module(module, ModelHook())


def unhooked(model):
    remove_hook_from_module(model, recurse=True)


ORDERS = [
    ("apply", "hook", "remove", "unhook"),
    ("apply", "hook", "unhook", "remove"),
    ("hook", "apply", "remove", "unhook"),
    ("hook", "apply", "unhook", "remove"),
]


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_accelerate_hooks_in_any_order(stock, model, pruned_logits, order):
    steps = {
        "apply": lambda: apply_hiprune(model, budget=10),
        "remove": lambda: remove_hiprune(model),
        "hook": lambda: hooked(model),
        "unhook": lambda: unhooked(model),
    }
    on = False
    for step in order:
        steps[step]()
        on = {"apply": True, "remove": False}.get(step, on)
        assert torch.equal(run(model), pruned_logits if on else run(stock))
    for module in model.modules():
        assert not any("hiprune" in key for key in module.__dict__)
        present = module.__dict__.get("forward")
        assert present is None or present.__func__ is type(module).forward  # accelerate leaves the bound stock method


@pytest.mark.filterwarnings("ignore:You are calling .generate")  # the model's device reads as meta
def test_offloaded_weights(model, pruned_logits):
    """Weights that only exist while their own module runs: submodules are called, never their weights."""
    expected = apply_hiprune(copy.deepcopy(model), budget=10).generate(**inputs(), **GREEDY)
    cpu_offload(model, execution_device="cpu")
    assert model.model.vision_tower.encoder.layers[0].mlp.fc1.weight.is_meta
    apply_hiprune(model, budget=10)
    assert torch.equal(run(model), pruned_logits)
    assert torch.equal(model.generate(**inputs(), **GREEDY), expected)
    apply_hiprune(model, retention=1.0)
    run(model)
    assert last_selection(model)[0].indices.tolist() == list(range(36))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_set_attn_implementation_after_patching(stock, model, implementation, pruned_logits):
    apply_hiprune(model, budget=10)
    model.set_attn_implementation(implementation)
    attention = model.model.vision_tower.encoder.layers[0].self_attn
    assert attention.config._attn_implementation == implementation
    mask = torch.arange(pruned_logits.shape[1]) >= torch.tensor([[0], [pruned_logits.shape[1] - 9]])  # not padding
    torch.testing.assert_close(run(model)[mask], pruned_logits[mask], rtol=0, atol=2e-4)
    other = copy.deepcopy(stock)
    other.set_attn_implementation(implementation)
    remove_hiprune(model)
    assert model.model.vision_tower.encoder.layers[1].self_attn.config._attn_implementation == implementation
    assert torch.equal(run(model), run(other))


def test_recording_follows_set_attn_implementation():
    encoder, eager = tiny_clip(), tiny_clip(implementation="eager")
    with torch.no_grad(), record_scores(encoder):
        encoder.set_attn_implementation("eager")
        inside = encoder(images(1)).last_hidden_state
    with torch.no_grad():
        assert torch.equal(inside, eager(images(1)).last_hidden_state)


def test_compiled_language_model(model, pruned_logits):
    """The pre-hook stays outside of a compiled forward, which then traces without a graph break."""
    language_model = model.model.language_model
    language_model.forward = torch.compile(language_model.forward, backend="eager", fullgraph=True)
    apply_hiprune(model, budget=10)
    torch.testing.assert_close(run(model), pruned_logits, rtol=0, atol=2e-4)
    expected = apply_hiprune(tiny_llava(), budget=10).generate(**inputs(), **GREEDY)
    assert torch.equal(model.generate(**inputs(), **GREEDY), expected)


# ------------------------------------------------------------------------------------------- several models, threads


def test_two_models_at_once(stock):
    one, other = tiny_llava(), tiny_llava(seed=7)
    expected = run(apply_hiprune(tiny_llava(), budget=10)), run(apply_hiprune(tiny_llava(seed=7), budget=5))
    apply_hiprune(one, budget=10)
    assert torch.equal(run(other), run(tiny_llava(seed=7)))
    apply_hiprune(other, budget=5)
    assert torch.equal(run(one), expected[0]) and torch.equal(run(other), expected[1])
    assert [len(last_selection(m)[0].indices) for m in (one, other)] == [10, 5]
    inside = []  # one model's forward runs the other's tower: that one is not part of the call

    def look(module, args):
        inside.append(other.model.vision_tower(images(1)).last_hidden_state)

    one.model.vision_tower.encoder.layers[-1].register_forward_pre_hook(look)
    assert torch.equal(run(one), expected[0])
    with torch.no_grad():
        assert torch.equal(inside[0], other.model.vision_tower(images(1)).last_hidden_state)
    remove_hiprune(one)
    assert torch.equal(run(one), run(stock)) and torch.equal(run(other), expected[1])


def test_threads_on_one_model(model):
    """Two forwards of one model interleave, block by block, with a third thread on its stock tower."""
    apply_hiprune(model, budget=10)
    jobs = [inputs(seed, text) for seed, text in ((0, 5), (3, 20))]
    expected = [model.generate(**job, **GREEDY) for job in jobs]
    with torch.no_grad():
        dense = model.model.vision_tower(images(4)).last_hidden_state
    barrier = threading.Barrier(3, timeout=30)
    for layer in model.model.vision_tower.encoder.layers:

        def meet(module, args):
            if meeting.is_set():
                barrier.wait()

        layer.register_forward_pre_hook(meet)
    meeting, results, errors = threading.Event(), {}, []

    def work(name, job):
        try:
            results[name] = job()
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    def tower():
        with torch.no_grad():
            return model.model.vision_tower(images(4)).last_hidden_state

    meeting.set()
    threads = [
        threading.Thread(target=work, args=(0, lambda: model.generate(**jobs[0], **GREEDY))),
        threading.Thread(target=work, args=(1, lambda: model.generate(**jobs[1], **GREEDY))),
        threading.Thread(target=work, args=("tower", tower)),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])
    assert torch.equal(results["tower"], dense)


def test_recording_is_of_one_thread():
    encoder, other = tiny_clip(), []
    with torch.no_grad(), record_scores(encoder, [1]) as scores:
        thread = threading.Thread(target=lambda: other.append(encoder(images(3)).last_hidden_state))
        thread.start()
        thread.join()
        encoder(images(2))
    assert len(other) == 1 and [score.shape[0] for score in scores[1]] == [2]


# --------------------------------------------------------------------------------------------------------- bad input


BAD_OPTIONS = [
    ({}, ValueError, "exactly one of budget and retention"),
    ({"budget": 3, "retention": 0.5}, ValueError, "exactly one of budget and retention"),
    ({"budget": 0}, ValueError, "budget: expected at least 1, got 0"),
    ({"budget": 2.0}, TypeError, "budget: expected an int, got float"),
    ({"retention": 1.5}, ValueError, "retention: expected a share"),
    ({"budget": 3, "alpha": 1.5}, ValueError, "alpha: expected a share"),
    ({"budget": 3, "rule": "other"}, ValueError, "rule: expected"),
    ({"budget": 3, "rule": "official_qwen"}, ValueError, 'rule: expected "paper", "official" or "grid"'),
    ({"budget": 3, "neighborhood": "star"}, ValueError, "neighborhood: expected"),
    ({"budget": 3, "score_queries": "last"}, ValueError, 'score_queries: expected "all" or "cls", got \'last\''),
    ({"budget": 3, "keep_roles": ()}, ValueError, "keep_roles: expected"),
    ({"budget": 3, "keep_roles": "anchor"}, ValueError, "keep_roles: expected"),
    ({"budget": 3, "object_layer": 0}, ValueError, "object_layer: expected 1 to 4 .*, got 0"),
    ({"budget": 3, "object_layer": 5}, ValueError, "object_layer: expected 1 to 4 .*, got 5"),
    (
        {"budget": 3, "object_layer": 2.0},
        TypeError,
        "object_layer: expected an int or a file of hiprune calibrate, got float",
    ),
    (
        {"budget": 3, "object_layer": True},
        TypeError,
        "object_layer: expected an int or a file of hiprune calibrate, got bool",
    ),
]


@pytest.mark.parametrize("before", ["stock", "patched"])
@pytest.mark.parametrize("options,error,message", BAD_OPTIONS, ids=str)
def test_bad_options(stock, options, error, message, before):
    model = stock  # not copied: nothing may happen to it
    if before == "patched":
        apply_hiprune(model, budget=10)
    snapshot = fingerprint(model)
    try:
        with pytest.raises(error, match=message):
            apply_hiprune(model, **options)
        assert_untouched(model, snapshot)
    finally:
        if is_patched(model):
            remove_hiprune(model)


def test_unsupported_models(model):
    with pytest.raises(TypeError, match="got dict"):
        apply_hiprune({}, budget=3)
    for part in (torch.nn.Linear(2, 2), tiny_clip().encoder, model.model.language_model.layers[0]):
        with pytest.raises(TypeError, match=rf"expected a transformers\.PreTrainedModel, got {type(part).__name__}"):
            apply_hiprune(part, budget=3)
    with pytest.raises(ValueError, match="got LlamaForCausalLM of type 'llama'"):
        apply_hiprune(LlamaForCausalLM(tiny_text_config()), budget=3)
    with pytest.raises(ValueError, match="not; call apply_hiprune"):
        remove_hiprune(model)
    with pytest.raises(ValueError, match="not; call apply_hiprune"):
        last_selection(model)
    assert not is_patched(model) and not is_patched(torch.nn.Linear(2, 2))
    assert set(FAMILIES) >= {"clip_vision_model", "llava"}


def test_unsupported_parts():
    text = GemmaConfig(**{**tiny_text_config().to_dict(), "head_dim": 16, "model_type": "gemma"})
    with pytest.raises(ValueError, match="got 'gemma'"):
        apply_hiprune(tiny_llava(text=text), budget=3)
    model = tiny_llava()
    config = ViTConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    model.model.vision_tower, model.config.vision_config = ViTModel(config), config
    with pytest.raises(ValueError, match=r"expected a vision tower of type clip_vision_model, .*, got 'vit'"):
        apply_hiprune(model, budget=3)


def test_unsupported_feature_layers(model):
    model.config.vision_feature_layer = [-2, -3]
    with pytest.raises(
        ValueError, match=r"vision_feature_layer: pruning needs the features of one layer, got \[-2, -3\]"
    ):
        apply_hiprune(model, budget=3)
    for index in (0, 6, -6):
        model.config.vision_feature_layer = index
        with pytest.raises(
            ValueError, match=f"vision_feature_layer: expected the output of one of 5 layers, got {index}"
        ):
            apply_hiprune(model, budget=3)
    model.config.vision_feature_layer = -2
    apply_hiprune(model, budget=10)
    run(model, vision_feature_layer=4)  # the same layer by another name
    with pytest.raises(ValueError, match="patched for features of layer 4, but this call asks for layer 5"):
        run(model, vision_feature_layer=-1)
    with pytest.raises(ValueError, match="pruning needs the features of one layer"):
        run(model, vision_feature_layer=[-2])


def test_what_a_pruned_forward_refuses(stock, model):
    apply_hiprune(model, budget=10)
    with pytest.raises(ValueError, match="labels: the logits of a pruned forward are shorter"):
        run(model, labels=inputs()["input_ids"])
    with pytest.raises(ValueError, match="logits_to_keep: expected an int"):
        run(model, logits_to_keep=torch.tensor([3]))
    with pytest.raises(ValueError, match="logits_to_keep: expected an int"):
        run(model, logits_to_keep=slice(3))
    ids, pixel_values = inputs()["input_ids"], inputs()["pixel_values"]
    with pytest.raises(ValueError, match="labels: the logits of a pruned forward are shorter"):
        model(ids, pixel_values, labels=ids)  # by position
    with pytest.raises(ValueError, match="output_attentions: a pruned forward has no full attention maps"):
        run(model, output_attentions=True)
    with pytest.raises(ValueError, match="prefill_chunk_size: images cannot be pruned"):
        model.generate(**inputs(), **GREEDY, prefill_chunk_size=8)
    mask = torch.zeros(2, 1, 48, 48)
    with pytest.raises(ValueError, match=r"attention_mask: a pruned prefill needs \[batch, 48\], got \[2, 1, 48, 48\]"):
        run(model, attention_mask=mask)
    model.train()
    with pytest.raises(ValueError, match=r"training mode; call model.eval\(\) first"):
        run(model)
    model.eval()
    text = batch([prompt(9)])
    labels = text["input_ids"]
    with torch.no_grad():  # without images nothing is pruned, and nothing refused
        assert torch.equal(model(**text, labels=labels).loss, stock(**text, labels=labels).loss)
        model.generate(**text, **GREEDY, prefill_chunk_size=4)
    assert last_selection(model) == []
    torch.testing.assert_close(run(model, logits_to_keep=2), run(model)[:, -2:], rtol=0, atol=1e-5)
    assert len(last_selection(model)) == 1


def test_an_encoder_refuses_too():
    encoder = apply_hiprune(tiny_clip(), budget=10)
    with pytest.raises(ValueError, match="output_attentions: a pruned forward"):
        encoder(images(1), output_attentions=True)
    encoder.train()
    with pytest.raises(ValueError, match="training mode"):
        encoder(images(1))


def test_nothing_deprecated_is_used_unseen():
    """Of what transformers logs, `conftest.no_deprecations_of_ours` lets the tests fail where we are the cause."""
    log = "import logging; logging.getLogger('transformers.any').warning('`old` is deprecated')"
    with pytest.raises(DeprecationWarning, match="`old` is deprecated"):
        exec(log, {"__name__": "hiprune_kernels.patch.any"})
    exec(log, {"__name__": "somebody_elses"})
    exec(log.replace("deprecated", "new"), {"__name__": "hiprune_kernels.patch.any"})


def test_a_method_that_the_class_lacks(model, monkeypatch):
    """Renamed by transformers, ours would never be called."""
    before = fingerprint(model)
    monkeypatch.setattr(GenerationMixin, "_prefill_of_another_name", GenerationMixin._prefill, raising=False)
    monkeypatch.delattr(GenerationMixin, "_prefill")
    with pytest.raises(ValueError, match="model: expected a LlavaForConditionalGeneration with a method `_prefill`"):
        apply_hiprune(model, budget=10)
    assert_untouched(model, before)


def test_a_method_that_older_releases_lack(stock, monkeypatch, pruned_logits):
    for name in ("_maybe_prepare_encoder_kwargs_for_generation", "_expand_multimodal_outputs"):
        monkeypatch.delattr(GenerationMixin, name, raising=False)
    model = apply_hiprune(copy.deepcopy(stock), budget=10)
    assert torch.equal(run(model), pruned_logits)
    remove_hiprune(model)
    assert torch.equal(run(model), run(stock))
