"""A patched vision encoder: which tokens it keeps, that kept features are the stock ones, and recorded scores."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from models import DEPTH, NUM_TOKENS, clip_l_336, images, tiny_clip, tiny_clip_config, tiny_llava
from patch_reference import (
    eager_scores,
    expected_selection,
    one_thread,  # noqa: F401
    seen_features,
)
from transformers import AttentionInterface, CLIPConfig, CLIPModel, CLIPVisionModelWithProjection
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hiprune_kernels import reference
from hiprune_kernels.patch import apply_hiprune, hiprune, is_patched, last_selection, record_scores, remove_hiprune

CLOSE = {"rtol": 0, "atol": 5e-5}  # states are of order 5


@pytest.fixture(scope="module")
def stock():
    return tiny_clip()


def selected(model):
    return torch.stack([s.indices for s in last_selection(model)]), torch.stack(
        [s.roles for s in last_selection(model)]
    )


def dense_rows(states, indices):
    """[CLS, kept rows] of the stock hidden states."""
    rows = torch.cat([torch.zeros(len(indices), 1, dtype=torch.long), indices + 1], dim=1)
    return states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1]))


# ---------------------------------------------------------------------------------------------------------- selection

OPTIONS = [
    {},
    {"budget": 1},
    {"budget": 35},
    {"alpha": 0.0},
    {"alpha": 1.0, "budget": 20},
    {"object_layer": 1},
    {"object_layer": DEPTH - 1},
    {"object_layer": DEPTH},
    {"rule": "grid", "alpha": 0.9},
    {"rule": "official", "alpha": 0.8},
    {"rule": "official", "alpha": 0.8, "score_queries": "cls"},
    {"score_queries": "cls"},
    {"neighborhood": "square", "alpha": 0.9, "budget": 18},
    {"neighborhood": "row", "alpha": 0.9},
    {"neighborhood": "none", "alpha": 0.5},
    {"keep_roles": ("register",)},
    {"keep_roles": ("anchor", "register"), "alpha": 0.9},
    {"keep_roles": ["anchor", "buffer"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_selection_is_that_of_float64_eager_attention(stock, options):
    pixels = images(3, seed=4)
    options = {"budget": 12, "object_layer": 2, **options}
    model = apply_hiprune(copy.deepcopy(stock), **options)
    with torch.no_grad():
        model(pixels)
    indices, roles = expected_selection(stock, pixels, deep_layer=DEPTH, **options)
    assert torch.equal(selected(model)[0], indices)
    assert torch.equal(selected(model)[1], roles)
    assert (roles > 0).sum(dim=1).tolist() == [options["budget"]] * 3


def test_every_option_changes_the_selection(stock):
    """Options that were ignored would agree with the default, and the test above would not notice."""
    pixels = images(3, seed=4)

    def kept(**options):
        model = apply_hiprune(copy.deepcopy(stock), **{"budget": 12, "alpha": 0.9, **options})
        with torch.no_grad():
            model(pixels)
        return torch.stack([selection.roles for selection in last_selection(model)])

    default = kept()
    changed = [{"alpha": 0.2}, {"object_layer": 3}, {"score_queries": "cls"}, {"neighborhood": "row"}, {"budget": 13}]
    changed += [{"rule": "grid"}, {"rule": "official"}, {"keep_roles": ("register",)}]
    for options in changed:
        assert not torch.equal(kept(**options), default), options


def test_official_takes_means(stock):
    """With sums the released rule would pick kept tokens again, and fewer would survive."""
    pixels = images(3, seed=4)
    model = apply_hiprune(copy.deepcopy(stock), budget=12, alpha=0.9, rule="official")
    with torch.no_grad():
        model(pixels)
    sums = [eager_scores(stock, pixels, layer) for layer in (2, DEPTH)]
    options = {"budget": 12, "alpha": 0.9, "grid": (6, 6), "rule": "official", "num_prefix_tokens": 1}
    of_sums, _ = reference.select_tokens(*sums, **options)
    of_means, _ = reference.select_tokens(*(score / 37 for score in sums), **options)
    assert not torch.equal(of_sums, of_means)
    assert torch.equal(selected(model)[0], of_means)


@pytest.mark.parametrize("depth,layer", [(24, 9), (12, 4), (5, 2), (1, 1)])
def test_default_object_layer(depth, layer):
    """9 of CLIP-L's 24, scaled to other depths."""
    model = apply_hiprune(tiny_clip(num_hidden_layers=depth, hidden_size=16, num_attention_heads=2), budget=9)
    explicit = apply_hiprune(copy.deepcopy(remove_hiprune(copy.deepcopy(model))), budget=9, object_layer=layer)
    with torch.no_grad():
        assert torch.equal(model(images(2)).last_hidden_state, explicit(images(2)).last_hidden_state)
    assert torch.equal(selected(model)[1], selected(explicit)[1])


def test_retention_and_grid(stock):
    model = apply_hiprune(copy.deepcopy(stock), retention=0.25)
    with torch.no_grad():
        model(images(1))
    [(indices, roles, grid)] = last_selection(model)
    assert (indices.shape, indices.dtype, roles.shape, roles.dtype, grid) == (
        (9,),
        torch.int64,
        (NUM_TOKENS,),
        torch.uint8,
        (6, 6),
    )


def test_other_resolutions(stock):
    pixels = torch.randn(2, 3, 40, 64, generator=torch.Generator().manual_seed(1))
    model = apply_hiprune(copy.deepcopy(stock), budget=12, alpha=0.9)
    with torch.no_grad():
        pruned = model(pixels, interpolate_pos_encoding=True).last_hidden_state
        dense = stock(pixels, interpolate_pos_encoding=True).last_hidden_state
        with record_scores(stock, layers=[2, DEPTH]) as scores:
            stock(pixels, interpolate_pos_encoding=True)
    indices, _ = reference.select_tokens(
        scores[2][0], scores[DEPTH][0], budget=12, alpha=0.9, grid=(5, 8), num_prefix_tokens=1
    )
    assert torch.equal(selected(model)[0], indices)
    assert last_selection(model)[0].grid == (5, 8)
    torch.testing.assert_close(pruned, dense_rows(dense, indices), **CLOSE)


# ------------------------------------------------------------------------------------------------------ kept features


def test_outputs_of_a_bare_encoder(stock):
    model = apply_hiprune(copy.deepcopy(stock), budget=12)
    with torch.no_grad():
        pruned = model(images(3), output_hidden_states=True)
        dense = stock(images(3), output_hidden_states=True)
        as_tuple = model(images(3), return_dict=False)
    indices = selected(model)[0]
    assert (indices.diff(dim=1) > 0).all()
    torch.testing.assert_close(pruned.last_hidden_state, dense_rows(dense.last_hidden_state, indices), **CLOSE)
    assert (pruned.last_hidden_state - dense_rows(dense.last_hidden_state, (indices + 1) % 36)).abs().max() > 0.1
    torch.testing.assert_close(pruned.pooler_output, dense.pooler_output, **CLOSE)
    assert torch.equal(as_tuple[0], pruned.last_hidden_state)
    assert len(pruned.hidden_states) == len(dense.hidden_states)
    for ours, theirs in zip(pruned.hidden_states[:-1], dense.hidden_states[:-1]):
        torch.testing.assert_close(ours, theirs, **CLOSE)
    assert torch.equal(pruned.hidden_states[-1], pruned.last_hidden_state)


def stock_modules_on_rows(layer, hidden_states, indices):
    """The feature layer by its own modules: everything behind the attention sees gathered rows only."""
    attention, batch = layer.self_attn, len(hidden_states)
    normed = layer.layer_norm1(hidden_states)
    q, k, v = (
        projection(normed).view(batch, -1, attention.num_heads, attention.head_dim).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    rows = torch.cat([torch.zeros(batch, 1, dtype=torch.long), indices + 1], dim=1)
    q = torch.stack([image[:, kept] for image, kept in zip(q, rows)])
    residual = torch.stack([image[kept] for image, kept in zip(hidden_states, rows)])
    attended = F.scaled_dot_product_attention(q, k, v, scale=attention.scale)
    hidden_states = residual + attention.out_proj(attended.transpose(1, 2).reshape(residual.shape))
    return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_features_are_bitwise_those_of_stock_modules(dtype):
    model = apply_hiprune(tiny_llava().to(dtype), budget=12)
    tower, inputs = model.model.vision_tower, []
    layer = tower.encoder.layers[DEPTH - 2]
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    ids = torch.full((2, NUM_TOKENS + 1), 90)
    ids[:, -1] = 5
    with torch.no_grad():
        states = seen_features(model(input_ids=ids, pixel_values=images(2).to(dtype)))
        handle.remove()
        indices = selected(model)[0]
        remove_hiprune(model)
        expected = stock_modules_on_rows(layer, inputs[0], indices)
        expected = model.model.multi_modal_projector(expected[:, 1:]).flatten(0, 1)
    assert torch.equal(states, expected)


def test_only_kept_rows_are_computed():
    """Behind the deep layer's projections nothing is as long as the image, and the last block does nothing."""
    model = apply_hiprune(tiny_llava(), budget=12)
    layers, seen = model.model.vision_tower.encoder.layers, {}

    def spy(name):
        def note(module, args, output):
            seen[name] = args[0].shape[1]

        return note

    for name, module in {
        "object mlp": layers[1].mlp,
        "deep q": layers[3].self_attn.q_proj,
        "deep out": layers[3].self_attn.out_proj,
        "deep mlp": layers[3].mlp,
        "projector": model.model.multi_modal_projector.linear_1,
        "last q": layers[4].self_attn.q_proj,
        "last mlp": layers[4].mlp,
        "language mlp": model.model.language_model.layers[0].mlp,
    }.items():
        module.register_forward_hook(spy(name))
    with torch.no_grad():
        model(input_ids=torch.tensor([[3] + [90] * NUM_TOKENS + [5]]), pixel_values=images(1))
    expected = {"object mlp": 37, "deep q": 37, "deep out": 13, "deep mlp": 13, "projector": 12, "language mlp": 14}
    assert seen == expected


def test_outside_of_a_call_the_tower_is_stock():
    """Called by itself, everything is dense and bit for bit what it was."""
    model, stock = apply_hiprune(tiny_llava(), budget=12), tiny_llava()
    with torch.no_grad():
        ours = model.model.vision_tower(images(2), output_hidden_states=True)
        theirs = stock.model.vision_tower(images(2), output_hidden_states=True)
        features = model.get_image_features(images(2)).pooler_output
        expected = stock.get_image_features(images(2)).pooler_output
    assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states))
    assert torch.equal(ours.pooler_output, theirs.pooler_output)
    assert all(torch.equal(a, b) for a, b in zip(features, expected))


def test_gradients(stock):
    """Through kept rows, gradients are those of the stock encoder for the same rows."""
    gradients = []
    for prune in (True, False):
        model, pixels = copy.deepcopy(stock), images(2).requires_grad_()
        if prune:
            apply_hiprune(model, budget=12)
        states = model(pixels).last_hidden_state
        if prune:
            indices = selected(model)[0]
        else:
            states = dense_rows(states, indices)
        weights = torch.randn(states.shape, generator=torch.Generator().manual_seed(0))
        (states * weights).sum().backward()
        attention = model.encoder.layers[1].self_attn
        gradients.append([pixels.grad, attention.q_proj.weight.grad, model.encoder.layers[4].mlp.fc1.weight.grad])
    for ours, theirs in zip(*gradients):
        assert theirs.abs().max() > 1
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * theirs.abs().max().item())


def test_projection_model():
    torch.manual_seed(0)
    stock = CLIPVisionModelWithProjection(tiny_clip_config(projection_dim=32)).eval()
    model = apply_hiprune(copy.deepcopy(stock), budget=12)
    assert is_patched(model)
    with torch.no_grad():
        pruned, dense = model(images(2)), stock(images(2))
    assert pruned.last_hidden_state.shape == (2, 13, 64)
    torch.testing.assert_close(pruned.image_embeds, dense.image_embeds, **CLOSE)


def test_real_size():
    """CLIP-L/14-336 at its real size: the paper's layers, 192 of 576 tokens."""
    torch.set_num_threads(2)
    stock = clip_l_336()
    pixels = torch.randn(1, 3, 336, 336, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with record_scores(stock, layers=[9, 24]) as scores:
            dense = stock(pixels)
        pruned = apply_hiprune(stock, budget=192)(pixels)
    indices, roles = reference.select_tokens(
        scores[9][0], scores[24][0], budget=192, grid=(24, 24), num_prefix_tokens=1
    )
    assert torch.equal(selected(stock)[0], indices) and torch.equal(selected(stock)[1], roles)
    torch.testing.assert_close(
        pruned.last_hidden_state, dense_rows(dense.last_hidden_state, indices), rtol=0, atol=1e-4
    )


# ---------------------------------------------------------------------------------------------------- recorded scores


def test_recorded_scores_are_those_of_eager_attention(stock):
    pixels = images(2)
    with torch.no_grad():
        plain = stock(pixels).last_hidden_state
        with record_scores(stock) as scores:
            recorded = stock(pixels).last_hidden_state
            stock(images(1, seed=1))
    assert torch.equal(recorded, plain)
    assert list(scores) == list(range(1, DEPTH + 1)) and scores.num_prefix_tokens == 1
    for layer, (first, second) in scores.items():
        expected = eager_scores(stock, pixels, layer)
        assert (first.dtype, first.shape, second.shape) == (torch.float32, (2, 37), (1, 37))
        assert (expected - expected.roll(1, dims=1)).abs().max() > 0.1
        torch.testing.assert_close(first.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_recording_any_holder_of_an_encoder(implementation):
    llava = tiny_llava(implementation=implementation)
    tower = llava.model.vision_tower
    expected = eager_scores(tower, images(1), 3)
    ids = torch.tensor([[5] + [90] * NUM_TOKENS + [6]])
    vision, text = tower.config.to_dict(), {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    pair = CLIPModel(CLIPConfig(vision_config=vision, text_config=text)).eval()  # its text model has the same layers
    pair.vision_model.load_state_dict(tower.state_dict())
    for holder, run in [
        (pair, lambda: pair.get_image_features(images(1))),
        (llava, lambda: llava(input_ids=ids, pixel_values=images(1))),
        (llava.model, lambda: llava.get_image_features(images(1))),
        (tower, lambda: tower(images(1))),
        (tower.encoder, lambda: tower(images(1))),
    ]:
        with torch.no_grad(), record_scores(holder, layers=[3]) as scores:
            run()
        assert list(scores) == [3] and len(scores[3]) == 1
        torch.testing.assert_close(scores[3][0].double(), expected, rtol=0, atol=1e-5)


def test_the_stock_attention_function_sees_its_own_config():
    """Flash attention reads the implementation's name from `module.config`: it must not find ours there."""
    seen = []

    def attention(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, module.training))
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register("test_attention", attention)
    encoder = tiny_clip(implementation="test_attention")
    with torch.no_grad(), record_scores(encoder):
        encoder(images(1))
    with torch.no_grad(), hiprune(encoder, budget=4):
        encoder(images(1))
    assert seen == [("test_attention", False)] * (DEPTH + DEPTH - 2)  # pruned: not the object nor the feature layer


def test_recording_leaves_nothing_behind(stock):
    model = copy.deepcopy(stock)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="stop"), record_scores(model):
        assert model.encoder.layers[0].self_attn.config is not model.config
        raise RuntimeError("stop")
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert module.__dict__.get("config") is before[name].get("config")


def test_recorded_scores_are_detached_and_gradients_stock(stock):
    gradients = []
    for record in (True, False):
        model, pixels = copy.deepcopy(stock), images(1).requires_grad_()
        if record:
            with record_scores(model) as scores:
                model(pixels).last_hidden_state.square().sum().backward()
            assert not any(score[0].requires_grad for score in scores.values())
        else:
            model(pixels).last_hidden_state.square().sum().backward()
        gradients.append(pixels.grad)
    assert torch.equal(*gradients)


def test_recording_nested_encoders_and_two_models(stock):
    other = tiny_clip(seed=7)
    with torch.no_grad(), record_scores(stock, [1]) as outer, record_scores(other, [2]) as inner:
        stock(images(1))
        other(images(1))
    assert (len(outer[1]), len(inner[2])) == (1, 1)


def test_recording_refuses(stock):
    for layers, error in [
        ([0], ValueError),
        ([DEPTH + 1], ValueError),
        ([1.0], TypeError),
        (3, TypeError),
        ("each", TypeError),
    ]:
        with pytest.raises(error, match="layers: expected"), record_scores(stock, layers):
            pass
    with pytest.raises(ValueError, match="found no supported vision encoder"), record_scores(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(TypeError, match="got str"), record_scores("clip"):
        pass
    with record_scores(stock), pytest.raises(ValueError, match="patched or being recorded"), record_scores(stock):
        pass
    with record_scores(stock), pytest.raises(ValueError, match="patched or being recorded"):
        apply_hiprune(stock, budget=3)
    with hiprune(stock, budget=12), pytest.raises(ValueError, match="it is patched"), record_scores(stock):
        pass
    assert not is_patched(stock)
