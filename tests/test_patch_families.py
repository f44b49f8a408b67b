"""What holds for every family of vision-language models alike: on and off, copies, files, dtypes, threads, bad input."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from models import IMAGE_TOKEN, VLM_CASES
from patch_reference import one_thread, seen_features  # noqa: F401
from torch.utils._pytree import tree_leaves
from transformers import GenerationMixin

from hiprune_kernels.patch import (
    FAMILIES,
    apply_hiprune,
    generate,
    is_patched,
    last_selection,
    record_scores,
    remove_hiprune,
)
from hiprune_kernels.patch.models import bare

SHARE = 0.3
GREEDY = {"do_sample": False, "max_new_tokens": 4}


@pytest.fixture(scope="module", params=VLM_CASES)
def case(request):
    """A stock model of the family, inputs with images for it, and what it gives with pruning."""
    model, inputs = VLM_CASES[request.param]()
    run(model, inputs, output_hidden_states=True)  # installs transformers' own hooks, once and for all
    pruned = apply_hiprune(copy.deepcopy(model), retention=SHARE)
    return model, inputs, run(pruned, inputs), tokens(pruned, inputs)


def test_every_family_is_here():
    """A family that is added comes with a case."""
    covered = {VLM_CASES[name]()[0].config.model_type for name in VLM_CASES}
    assert covered == set(FAMILIES) - set(bare.FAMILIES)


def run(model, inputs, **changes):
    with torch.no_grad():
        return model(**{**inputs, **changes}).logits


def tokens(model, inputs, **options):
    """What `generate` adds to the prompt, without image tokens, which would be taken for images."""
    config = model.config
    visual = {getattr(config, name, None) for name in ("image_token_id", "video_token_id")} | {IMAGE_TOKEN}
    options = {**GREEDY, "suppress_tokens": sorted(visual - {None}), **options}
    return model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]


def attributes(model):
    return {name: set(module.__dict__) for name, module in model.named_modules()}


def pixels_as(inputs, dtype):
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def test_on_and_off(case):
    stock, inputs, pruned_logits, pruned_tokens = case
    model = copy.deepcopy(stock)
    before, stock_logits = attributes(model), run(stock, inputs)
    assert pruned_logits.shape[1] < stock_logits.shape[1]
    apply_hiprune(model, retention=0.6)
    apply_hiprune(model, retention=SHARE)
    assert torch.equal(run(model, inputs), pruned_logits) and torch.equal(tokens(model, inputs), pruned_tokens)
    for selection in last_selection(model):
        assert len(selection.indices) == int((selection.roles > 0).sum()) < len(selection.roles)
        assert len(selection.roles) == torch.tensor(selection.grid).prod()
    remove_hiprune(model)
    assert not is_patched(model) and attributes(model) == before
    assert torch.equal(run(model, inputs), stock_logits) and torch.equal(tokens(model, inputs), tokens(stock, inputs))


def test_an_encoders_config_that_says_the_models_type(case):
    """Checkpoints of older releases have it so ("qwen2_5_vl" in the vision config), and some releases keep it."""
    stock, inputs, pruned_logits, _ = case
    model = copy.deepcopy(stock)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is model.config.vision_config:
            config.model_type = model.config.model_type
    assert torch.equal(run(apply_hiprune(model, retention=SHARE), inputs), pruned_logits)


def test_a_budget_for_everything_is_the_stock_model(case):
    stock, inputs, _, _ = case
    for options in ({"retention": 1.0}, {"budget": 100_000}):
        model = apply_hiprune(copy.deepcopy(stock), **options)
        assert torch.equal(run(model, inputs), run(stock, inputs))
        assert torch.equal(tokens(model, inputs), tokens(stock, inputs))
        assert all(bool((selection.roles == 3).all()) for selection in last_selection(model))
        assert [len(s.indices) for s in last_selection(model)] == [len(s.roles) for s in last_selection(model)]


def test_features_of_an_output_are_those_that_the_language_model_saw(case):
    stock, inputs, _, _ = case
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    with torch.no_grad():
        ours, theirs = model(**inputs), stock(**inputs)
    found = {kind: seen_features(theirs, kind) for kind in ("image", "video")}
    assert found["image"] is not None or not hasattr(theirs, "image_outputs")
    tokens = 0
    for kind, features in found.items():
        kept = seen_features(ours, kind)
        assert (kept is None) == (features is None)
        if kept is not None:
            distances, rows = torch.cdist(kept, features, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1)
            rows = rows[rows.bincount()[rows] == 1]  # newlines are all alike
            assert float(distances.max()) < 1e-3 and torch.equal(rows, rows.sort().values)
            tokens += len(rows)
    assert tokens >= sum(len(selection.indices) for selection in last_selection(model)) or found["image"] is None


def test_outputs_as_tuples(case):
    stock, inputs, _, _ = case
    model = apply_hiprune(copy.deepcopy(stock.model), retention=SHARE)
    with torch.no_grad():
        outputs = [model(**inputs, return_dict=False), model(**inputs).to_tuple()]
        if stock.config.model_type == "llava":  # most families need the outputs of their parts as such
            model.config.return_dict = False
            outputs.append(model(**inputs))
    assert all(type(output) is tuple and len(output) > 1 for output in outputs)
    for leaves in zip(*map(tree_leaves, outputs), strict=True):
        assert all(type(leaf) is type(leaves[0]) for leaf in leaves)
        assert not isinstance(leaves[0], torch.Tensor) or all(torch.equal(leaf, leaves[0]) for leaf in leaves)


def test_copies_and_files(case, tmp_path):
    stock, inputs, pruned_logits, _ = case
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    twin = copy.deepcopy(model)
    remove_hiprune(model)
    assert torch.equal(run(twin, inputs), pruned_logits) and torch.equal(run(model, inputs), run(stock, inputs))
    twin.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert "hiprune" not in (tmp_path / "config.json").read_text()
    loaded = type(stock).from_pretrained(tmp_path)
    assert not is_patched(loaded) and torch.equal(run(loaded, inputs), run(stock, inputs))
    assert torch.equal(run(apply_hiprune(loaded, retention=SHARE), inputs), pruned_logits)


def test_nothing_is_refused_where_nothing_is_pruned(case):
    stock, inputs, *_ = case
    model, stock = apply_hiprune(copy.deepcopy(stock), retention=1.0), copy.deepcopy(stock)
    labels = inputs["input_ids"]
    with torch.no_grad():
        assert torch.equal(model(**inputs, labels=labels).loss, stock(**inputs, labels=labels).loss)
    last = torch.tensor([0, 5])
    assert torch.equal(run(model, inputs, logits_to_keep=last), run(stock, inputs, logits_to_keep=last))
    assert outcome(model, inputs) == outcome(stock, inputs)
    for each in (model, stock):
        each.set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = (each(**inputs, output_attentions=True).attentions for each in (model, stock))
    assert len(ours) == len(theirs) > 0 and all(map(torch.equal, ours, theirs))
    for each in (model.train(), stock.train()):
        torch.manual_seed(0)
        each(**inputs, labels=labels).loss.backward()
    gradients = [[parameter.grad for parameter in each.parameters()] for each in (model, stock)]
    assert any(gradient is not None for gradient in gradients[0])
    for ours, theirs in zip(*gradients):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def outcome(model, inputs):
    """Tokens of a prefill in chunks, or the error where the stock code of a release cannot do it."""
    try:
        return tokens(model, inputs, prefill_chunk_size=8).tolist()
    except (ValueError, RuntimeError) as error:
        return repr(error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", ["float32", "half"])
def test_autocast(case, dtype, weights):
    """In half precision as to size, and the same whatever the weights' own dtype where they are all cast."""
    stock, inputs, pruned_logits, pruned_tokens = case
    model = copy.deepcopy(stock)
    if weights == "half":
        model, inputs = model.to(dtype), pixels_as(inputs, dtype)
    with torch.autocast("cpu", dtype=dtype):
        expected = run(model, inputs)
        with record_scores(model, layers=[1]) as scores:
            assert torch.equal(run(model, inputs), expected)
        assert all(score.dtype == torch.float32 and bool(score.isfinite().all()) for score in scores[1])
        logits = run(apply_hiprune(model, retention=SHARE), inputs)
        assert tokens(model, inputs).shape == pruned_tokens.shape
    assert logits.dtype == expected.dtype and logits.shape == pruned_logits.shape
    last = logits[:, -1].float() - pruned_logits[:, -1]
    assert float(last.norm() / pruned_logits[:, -1].norm()) < 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(case, dtype):
    """Selections may differ where scores are within rounding; counts and shapes may not."""
    stock, inputs, pruned_logits, pruned_tokens = case
    model = apply_hiprune(copy.deepcopy(stock).to(dtype), retention=SHARE)
    logits = run(model, pixels_as(inputs, dtype))
    assert logits.dtype == dtype and logits.shape == pruned_logits.shape and bool(logits.isfinite().all())
    last = logits[:, -1].float() - pruned_logits[:, -1]
    assert (
        float(last.norm() / pruned_logits[:, -1].norm()) < 0.5
    )  # the same answer, roughly: stock models differ so too
    assert tokens(model, pixels_as(inputs, dtype)).shape == pruned_tokens.shape


def test_compiled_language_model(case):
    stock, inputs, pruned_logits, pruned_tokens = case
    torch._dynamo.reset()  # all models share transformers' wrappers, whose recompilations are counted and limited
    model = copy.deepcopy(stock)
    language_model = model.model.language_model
    language_model.forward = torch.compile(language_model.forward, backend="eager", fullgraph=True)
    apply_hiprune(model, retention=SHARE)
    torch.testing.assert_close(run(model, inputs), pruned_logits, rtol=0, atol=5e-4)
    assert torch.equal(tokens(model, inputs), pruned_tokens)


@pytest.mark.parametrize("first", ["patch", "hooks"])
def test_accelerate_hooks_in_either_order(case, first):
    stock, inputs, pruned_logits, _ = case
    model = copy.deepcopy(stock)
    steps = [
        lambda: apply_hiprune(model, retention=SHARE),
        lambda: [add_hook_to_module(module, ModelHook()) for module in list(model.modules())],
    ]
    for step in steps if first == "patch" else reversed(steps):
        step()
    assert torch.equal(run(model, inputs), pruned_logits)
    remove_hiprune(model)
    assert torch.equal(run(model, inputs), run(stock, inputs))
    remove_hook_from_module(model, recurse=True)
    assert not any("hiprune" in key for module in model.modules() for key in module.__dict__)


def test_threads(case):
    """Two generations on one patched model, of which each holds the other up in every layer of the text model."""
    stock, inputs, _, pruned_tokens = case
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    visual = {name: -value if value.is_floating_point() else value for name, value in inputs.items()}
    expected = [pruned_tokens, tokens(model, visual)]
    barrier, results, errors = threading.Barrier(2, timeout=30), {}, []

    def meet(module, args, kwargs):
        barrier.wait()

    def work(i, job):
        try:
            results[i] = tokens(model, job)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    model.model.language_model.register_forward_pre_hook(meet, with_kwargs=True)
    threads = [threading.Thread(target=work, args=pair) for pair in enumerate((inputs, visual))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])


def test_a_failed_apply_leaves_the_model_as_it_was(case):
    stock, inputs, pruned_logits, _ = case
    for patched in (False, True):
        model = copy.deepcopy(stock)
        if patched:
            apply_hiprune(model, retention=SHARE)
        before = attributes(model)
        for options, name in [
            ({"budget": 0}, "budget"),
            ({"retention": 1.5}, "retention"),
            ({"budget": 4, "retention": 0.5}, "exactly one of budget and retention"),
            ({"retention": 0.5, "object_layer": 99}, "object_layer"),
            ({"retention": 0.5, "object_layer": 0}, "object_layer"),
            ({"retention": 0.5, "unpad": "sideways"}, "unpad"),
            ({"retention": 0.5, "rule": "official_qwen"}, "rule"),
        ]:
            with pytest.raises(ValueError, match=name):
                apply_hiprune(model, **options)
        assert attributes(model) == before and is_patched(model) == patched
        assert torch.equal(run(model, inputs), pruned_logits if patched else run(stock, inputs))


def test_what_a_pruned_forward_refuses(case):
    stock, inputs, _, _ = case
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    with pytest.raises(ValueError, match="labels: the logits of a pruned forward are shorter"):
        run(model, inputs, labels=inputs["input_ids"])
    with pytest.raises(ValueError, match="output_attentions: a pruned forward has no full attention maps"):
        run(model, inputs, output_attentions=True)
    with pytest.raises(ValueError, match="logits_to_keep: expected an int"):
        run(model, inputs, logits_to_keep=torch.tensor([0]))
    with pytest.raises(ValueError, match="prefill_chunk_size: images cannot be pruned"):
        tokens(model, inputs, prefill_chunk_size=4)
    model.train()
    with pytest.raises(ValueError, match="model: pruning is for inference"):
        run(model, inputs)
    with pytest.raises(ValueError, match="expected a patched model"):
        remove_hiprune(copy.deepcopy(stock))


# --------------------------------------------------------------------- features that are encoded ahead of the prefill


def encode(model, inputs):
    """Features of images and videos as `generate` of transformers from 5.18 on hands them to the forward."""
    inputs = dict(inputs)
    prepare = model._prepare_multimodal_encoder_kwargs_for_generation
    with torch.no_grad():
        return prepare({name: inputs[name] for name in inputs if name != "input_ids"})


encodes_ahead = pytest.mark.skipif(
    not hasattr(GenerationMixin, "_prepare_multimodal_encoder_kwargs_for_generation"),
    reason="transformers before 5.18 encodes images in the forward",
)


def skip_where_none_are_taken(model):
    """In releases whose beams are wrong Qwen3.5 takes no such features either."""
    if generate.wrong_beams(model.config.model_type):
        pytest.skip("in some releases Qwen3.5 takes none")


@encodes_ahead
def test_features_of_the_caller_s_are_not_pruned(case):
    """They were computed outside of any call: all of them are there, and all are used."""
    stock, inputs, *_ = case
    skip_where_none_are_taken(stock)
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    ours, theirs = ({"input_ids": inputs["input_ids"], **encode(each, inputs)} for each in (model, stock))
    assert torch.equal(run(model, ours), run(stock, theirs))
    assert torch.equal(tokens(model, ours), tokens(stock, theirs))
    assert last_selection(model) == []


@encodes_ahead
def test_labels_are_refused_with_pruned_features_too(case):
    stock, inputs, *_ = case
    skip_where_none_are_taken(stock)
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    given = {name: inputs[name] for name in inputs if name != "input_ids"}
    with torch.no_grad():
        encode = model._maybe_prepare_encoder_kwargs_for_generation
        given = encode(inputs["input_ids"], given, None, model.generation_config)
    given = {name: value for name, value in given.items() if not name.startswith("pixel_values")}
    with pytest.raises(ValueError, match="labels: the logits of a pruned forward are shorter"):
        run(model, given, input_ids=inputs["input_ids"], labels=inputs["input_ids"])


def rows(args, kwargs):
    """How much goes into an encoder."""
    return next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


@encodes_ahead
def test_beams_share_one_run_of_the_encoder(case):
    stock, inputs, _, expected = case
    if generate.wrong_beams(stock.config.model_type):
        pytest.skip("the beams of transformers itself are wrong")
    model, runs = apply_hiprune(copy.deepcopy(stock), retention=SHARE), []
    for encoder in model.model._hiprune.encoders:
        encoder.module.register_forward_pre_hook(
            lambda _, args, kwargs: runs.append(rows(args, kwargs)), with_kwargs=True
        )
    assert torch.equal(tokens(model, inputs), expected)
    once = runs.copy()
    assert tokens(model, inputs, num_beams=3).shape == expected.shape
    assert runs == once + once and once


@encodes_ahead
def test_releases_whose_own_beams_are_wrong(case, monkeypatch):
    """Everything else works there."""
    stock, inputs, _, expected = case
    monkeypatch.setattr(generate, "_WRONG_BEAMS", {transformers.__version__: ("another", stock.config.model_type)})
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    assert torch.equal(tokens(model, inputs), expected)
    for options in ({"num_beams": 2}, {"do_sample": True, "num_return_sequences": 2}):
        with pytest.raises(
            ValueError, match=r"num_beams: the beams of transformers .* itself are wrong for a \w+ with images"
        ):
            tokens(model, inputs, **options)
    text = {"input_ids": inputs["input_ids"][:, -4:]}
    assert tokens(model, text, num_beams=2).shape == expected.shape


def test_attention_maps_of_generate_are_refused(case):
    stock, inputs, *_ = case
    model = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="output_attentions: a pruned forward has no full attention maps"):
        model.generate(**inputs, **GREEDY, output_attentions=True, return_dict_in_generate=True)
