"""A patched Qwen-VL or GLM-4V computes what stock modules compute on explicitly pruned embeddings and positions."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from models import IMAGE_TOKEN, VIDEO_TOKEN, qwen_batch, tiny_qwen
from patch_reference import one_thread  # noqa: F401
from qwen_reference import (
    KINDS,
    TYPES,
    beam_search,
    eager_row_scores,
    expected_selection,
    extended,
    features_of,
    greedy,
    patch_order,
    pruned_rows,
    raster_order,
    row_logits,
)

from hiprune_kernels.patch import apply_hiprune, last_selection, record_scores
from hiprune_kernels.patch.encoders import ENCODERS
from hiprune_kernels.patch.language import CACHE

SHARE, OBJECT_LAYER, FEATURE_LAYER = 0.3, 2, 4
TOLERANCE = {"rtol": 0, "atol": 3e-4}  # logits are of order 5; a wrong token moves them by more than 0.02
VISUAL = [IMAGE_TOKEN, VIDEO_TOKEN]
COUNT = 6
GREEDY = {"do_sample": False, "max_new_tokens": COUNT, "suppress_tokens": VISUAL}

IMAGE, SMALL, ODD, VIDEO = (4, 6), (3, 3), (5, 3), (2, 3, 4)
PROMPTS = {
    "one image": [(5, IMAGE, 7)],
    "two images": [(3, IMAGE, 4, ODD, 2)],
    "video": [(5, VIDEO, 4)],
    "videos": [(3, (3, 2, 2), 2, VIDEO, 4), (4, (1, 3, 3), 6)],
    "image and video": [(3, VIDEO, 2, SMALL, 5)],
    "batch": [(5, IMAGE, 7), (2, ODD, 3)],
    "mixed": [(5, IMAGE, 7), (9,), (3, SMALL, 2, VIDEO, 1, ODD, 6)],
    "long text-only": [(5, IMAGE, 7), (60,)],
}


MODELS = ["qwen2", "qwen2.5", "qwen3", "qwen3 moe", "qwen3.5", "qwen3.5 moe", "glm", "glm moe"]


@pytest.fixture(scope="module", params=MODELS)
def kind(request):
    return request.param


def named_batch(kind, name, **options):
    """One of PROMPTS; for GLM, which takes images or videos, images beside a video are videos of one frame."""
    rows = PROMPTS[name]
    if kind.startswith("glm") and any(VIDEO in row for row in rows):
        rows = [tuple((1, *part) if part in (IMAGE, SMALL, ODD) else part for part in row) for row in rows]
    return qwen_batch(kind, rows, **options)


@pytest.fixture(scope="module")
def stock(kind):
    return tiny_qwen(kind)


@pytest.fixture(scope="module")
def patched(stock):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the sources are the known ones
        return apply_hiprune(copy.deepcopy(stock), retention=SHARE)


def selections(stock, inputs, budgets=SHARE, layers=(OBJECT_LAYER, FEATURE_LAYER), **options):
    """What is kept, by kind of placeholder."""
    return {
        token: expected_selection(stock, inputs, token, budgets, layers, **options)
        for token, (pixels, _) in KINDS.items()
        if pixels in inputs
    }


def last_selections(model, inputs):
    """The indices and roles of `last_selection`, by kind of placeholder."""
    kept = iter([(selection.indices, selection.roles) for selection in last_selection(model)])
    return {token: [next(kept) for _ in inputs[grids]] for token, (_, grids) in KINDS.items() if grids in inputs}


def reference_rows(stock, inputs, budgets=SHARE, **options):
    return pruned_rows(stock, inputs, selections(stock, inputs, budgets, **options))


def logits_of(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options).logits


def assert_rows(logits, stock, rows):
    """Rows of logits, padded on the left, are those of the reference."""
    assert logits.shape[1] == max(len(row.embeds) for row in rows)
    for ours, row in zip(logits, rows, strict=True):
        torch.testing.assert_close(ours[-len(row.embeds) :], row_logits(stock, row), **TOLERANCE)


def new_tokens(model, inputs, **options):
    """What `generate` adds; the caller's prompt must lead the returned sequences."""
    sequences = model.generate(**inputs, **{**GREEDY, **options})
    length = inputs["input_ids"].shape[1]
    repeats = len(sequences) // len(inputs["input_ids"])
    assert torch.equal(sequences[:, :length], inputs["input_ids"].repeat_interleave(repeats, dim=0))
    return sequences[:, length:]


# ---------------------------------------------------------------------------------------------------------- selection


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"budget": 7},
        {"object_layer": 1},
        {"object_layer": 3, "alpha": 0.6},
        {"object_layer": 4},
        {"rule": "official", "retention": 0.334},
        {"rule": "official", "alpha": 0.5, "budget": 10},
        {"rule": "grid", "neighborhood": "square", "alpha": 0.5},
        {"keep_roles": ("anchor", "register"), "alpha": 0.5},
    ],
    ids=str,
)
def test_selection(kind, stock, options):
    """Each image and video by itself, windows undone, of scores that are means over merge groups."""
    options = dict(options) if "budget" in options else {"retention": SHARE, **options}
    inputs = named_batch(kind, "mixed")
    model = apply_hiprune(copy.deepcopy(stock), **options)
    logits = logits_of(model, inputs)
    ours = last_selection(model)
    budgets, layers = options.pop("budget", None) or options.pop("retention"), options.pop("object_layer", 2)
    if options.get("rule") == "official":
        options["rule"] = "official_qwen"
    expected = selections(stock, inputs, budgets, (layers, FEATURE_LAYER), **options)
    flat = [kept for token in expected for kept in expected[token]]
    grids = [IMAGE, SMALL, VIDEO, ODD] if kind.startswith("glm") else [IMAGE, SMALL, ODD, VIDEO]
    assert [selection.grid for selection in ours] == grids
    for selection, (indices, roles) in zip(ours, flat, strict=True):
        assert torch.equal(selection.indices, indices) and torch.equal(selection.roles, roles)
    assert_rows(logits, stock, pruned_rows(stock, inputs, expected))


def test_fewer_than_the_budget_survive_the_official_rule():
    """Its registers may be tokens that are anchors already."""
    stock = tiny_qwen("qwen2.5")
    inputs = named_batch("qwen2.5", "batch")
    model = apply_hiprune(copy.deepcopy(stock), budget=14, object_layer=4, alpha=0.8, rule="official")
    logits = logits_of(model, inputs)
    expected = selections(stock, inputs, 14, (4, 4), alpha=0.8, rule="official_qwen")
    survivors = [len(selection.indices) for selection in last_selection(model)]
    assert survivors == [len(indices) for indices, _ in expected[IMAGE_TOKEN]] and min(survivors) < 14
    assert_rows(logits, stock, pruned_rows(stock, inputs, expected))


def test_the_scale_is_the_module_s(kind):
    stock = tiny_qwen(kind)
    for block in stock.model.visual.blocks:
        block.attn.scaling *= 1.5
    inputs = named_batch(kind, "mixed")
    logits = logits_of(apply_hiprune(copy.deepcopy(stock), retention=SHARE), inputs)
    assert_rows(logits, stock, reference_rows(stock, inputs))


def test_kept_features_are_those_of_the_stock_merger(kind, stock, patched):
    """The merger sees the selected rows only, makes of them what the stock one makes, and of each what it should."""
    inputs = named_batch(kind, "two images")
    model, seen = copy.deepcopy(patched), {}
    model.model.visual.merger.register_forward_hook(lambda module, args, output: seen.update(rows=args[0], out=output))
    logits_of(model, inputs)
    kept = torch.cat([selection.roles > 0 for selection in last_selection(model)])
    with torch.no_grad():
        merged = stock.model.visual.merger(seen["rows"])
    rows = 1 if kind.startswith("glm") else 4  # GLM's come to the merger as one
    assert len(seen["rows"]) == rows * int(kept.sum()) < rows * len(kept)
    filled = (seen["out"] != 0).any(dim=1)
    assert torch.equal(seen["out"][filled], merged) and len(seen["out"]) == len(kept)
    features, _ = features_of(stock, inputs, IMAGE_TOKEN)
    ours = seen["out"][raster_order(stock, inputs["image_grid_thw"])][kept]
    torch.testing.assert_close(ours, features[kept], rtol=0, atol=1e-4)
    assert torch.equal(features_of(model, inputs, IMAGE_TOKEN)[0], features)  # outside of a call the encoder is stock


def test_default_object_layers():
    for name, depth, layer in [
        ("qwen2_5_vl_vision", 32, 16),
        ("qwen2_vl_vision", 32, 16),
        ("qwen3_vl_vision", 27, 14),
        ("glm4v_vision", 24, 12),
    ]:
        assert ENCODERS[name].kind.object_layer(depth, depth) == layer


def test_windows_that_the_caller_computed():
    """transformers takes the order of windows from the caller; here another than the model's own."""
    stock = tiny_qwen("qwen2.5")
    patched = apply_hiprune(copy.deepcopy(stock), retention=SHARE)
    inputs = named_batch("qwen2.5", "two images")
    sizes = inputs["image_grid_thw"].prod(dim=1)
    ends = torch.cat([sizes.new_zeros(1), sizes.cumsum(dim=0)]).int()
    given = {"image_window_index": torch.arange(int(sizes.sum()) // 4), "image_cu_window_seqlens": ends}
    wide = copy.deepcopy(stock)  # its windows hold whole images
    wide.config.vision_config.window_size = wide.model.visual.window_size = 128
    expected = logits_of(apply_hiprune(wide, retention=SHARE), inputs)
    torch.testing.assert_close(logits_of(patched, inputs, **given), expected, **TOLERANCE)
    assert (expected - logits_of(patched, inputs)).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------------------ prefill


@pytest.mark.parametrize("name", PROMPTS)
def test_prefill_logits(kind, stock, patched, name):
    inputs = named_batch(kind, name)
    assert_rows(logits_of(patched, inputs), stock, reference_rows(stock, inputs))


def test_a_wrong_token_or_position_would_show(kind, stock, patched):
    inputs = named_batch(kind, "one image")
    logits = logits_of(patched, inputs)[0]
    [(_, roles)] = selections(stock, inputs)[IMAGE_TOKEN]
    wrong = roles.clone()
    last, free = int((roles > 0).nonzero()[-1]), int((roles == 0).nonzero()[-1])
    wrong[last], wrong[free] = 0, 3
    for other in (roles.roll(1), wrong):
        [row] = pruned_rows(stock, inputs, {IMAGE_TOKEN: [(None, other)]})
        assert (row_logits(stock, row) - logits).abs().max() > 0.02
    [row] = reference_rows(stock, inputs)
    row.positions[1:] -= row.columns - torch.arange(len(row.columns))
    assert (row_logits(stock, row) - logits).abs().max() > 0.02


@pytest.mark.parametrize("name", ["mixed", "batch"])
def test_right_padding_keeps_columns_counted_from_the_end(kind, stock, patched, name):
    inputs = named_batch(kind, name, side="right")
    logits = logits_of(patched, inputs)
    length = inputs["input_ids"].shape[1]
    for ours, mask, row in zip(logits, inputs["attention_mask"], reference_rows(stock, inputs), strict=True):
        end = logits.shape[1] - (length - int(mask.sum()))
        torch.testing.assert_close(ours[end - len(row.embeds) : end], row_logits(stock, row), **TOLERANCE)


def test_no_attention_mask(kind, stock, patched):
    """Rows of one length that lose different numbers of tokens; and one row, where packing must not be suspected."""
    for rows in ([(5, IMAGE, 7)], [(5, IMAGE, 7), (38,)]):
        inputs = qwen_batch(kind, rows)
        expected = reference_rows(stock, inputs)
        assert bool(inputs.pop("attention_mask").all())
        for use_cache in (True, False):
            assert_rows(logits_of(patched, inputs, use_cache=use_cache), stock, expected)


@pytest.mark.parametrize("form", ["text and multimodal", "multimodal", "text"])
def test_position_ids_of_the_caller(kind, stock, patched, form):
    """Multimodal ids stay as they are; the row of text order before them has no gaps."""
    inputs = named_batch(kind, "one image")
    length = inputs["input_ids"].shape[1]
    [row] = reference_rows(stock, inputs)
    own = (torch.arange(4 * length).view(4, 1, length) * 7) % 50
    own[0] = torch.arange(length)
    own = {"text and multimodal": own, "multimodal": own[1:], "text": own[1]}[form]
    row.positions[1:] = own.view(-1, length)[-3:, row.columns]
    mask = inputs.pop("attention_mask")
    # Stock looks for packed sequences in text order where there is neither a mask nor a cache.
    for given in ({}, {"use_cache": False}, {"attention_mask": mask}):
        logits = logits_of(patched, inputs, position_ids=own, **given)
        torch.testing.assert_close(logits[0], row_logits(stock, row), **TOLERANCE)


def test_inputs_embeds(kind, stock, patched):
    inputs = qwen_batch(kind, PROMPTS["mixed"])
    grids = {name: inputs[name] for name in ("image_grid_thw", "video_grid_thw")}
    ids, types, mask = (inputs[name] for name in ("input_ids", "mm_token_type_ids", "attention_mask"))
    positions, _ = stock.model.get_rope_index(ids, types, **grids, attention_mask=mask)
    given = {name: value for name, value in inputs.items() if name not in ("input_ids", "mm_token_type_ids")}
    ids = ids.masked_fill(types == TYPES[VIDEO_TOKEN], VIDEO_TOKEN)  # by which GLM tells videos apart here
    given["inputs_embeds"] = stock.get_input_embeddings()(ids).detach()
    logits = logits_of(patched, given, position_ids=positions)
    assert_rows(logits, stock, reference_rows(stock, inputs))
    assert kind.startswith("glm") or torch.equal(logits, logits_of(patched, inputs))


def test_text_only_is_stock(kind, stock, patched):
    inputs = qwen_batch(kind, [(9,), (4,)])
    assert torch.equal(logits_of(patched, inputs), logits_of(stock, inputs))
    assert torch.equal(new_tokens(patched, inputs), new_tokens(stock, inputs))


def test_inner_model_alone(kind, stock):
    inputs = named_batch(kind, "mixed")
    inner = apply_hiprune(copy.deepcopy(stock.model), retention=SHARE)
    with torch.no_grad():
        logits = stock.lm_head(inner(**inputs).last_hidden_state)
    assert_rows(logits, stock, reference_rows(stock, inputs))


def test_budgets_that_keep_some_images_whole(kind, stock):
    """9 tokens are all of the small image; the others are pruned to as many."""
    model = apply_hiprune(copy.deepcopy(stock), budget=9)
    inputs = named_batch(kind, "image and video")
    assert_rows(logits_of(model, inputs), stock, reference_rows(stock, inputs, 9))
    whole, pruned = sorted(last_selection(model), key=lambda selection: len(selection.roles))
    kept = 8 if kind.startswith("glm") else 9  # 4 of each frame
    assert bool((whole.roles == 3).all()) and len(pruned.indices) == kept < len(pruned.roles)
    small = qwen_batch(kind, [(3, SMALL, 4)])
    assert torch.equal(logits_of(model, small), logits_of(stock, small))


def test_one_token_per_image(kind, stock):
    model, least = apply_hiprune(copy.deepcopy(stock), budget=1), 1
    inputs = named_batch(kind, "mixed")
    if kind.startswith("glm"):
        with pytest.raises(ValueError, match="budget: expected at least 2, one token for each tile"):
            logits_of(model, inputs)
        model, least = apply_hiprune(copy.deepcopy(stock), budget=2), 2
    assert_rows(logits_of(model, inputs), stock, reference_rows(stock, inputs, least))


# ---------------------------------------------------------------------------------------------------------- generate()


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy(kind, stock, patched, name):
    inputs = named_batch(kind, name)
    expected = greedy(stock, reference_rows(stock, inputs), COUNT, VISUAL)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(new_tokens(patched, inputs, **options), expected)


@pytest.mark.parametrize("name", ["one image", "two images", "batch", "image and video"])
def test_beams(kind, stock, patched, name):
    """Each beam has all images of its prompt, in order: GLM's too, of which stock repeats one by one."""
    inputs = named_batch(kind, name)
    if kind.startswith("glm") and "video_grid_thw" in inputs and hasattr(stock, "_expand_multimodal_outputs"):
        for model in (stock, patched):  # transformers from 5.18 on takes GLM's videos for none
            with pytest.raises(
                ValueError, match=r"expected a non-empty list of Tensors|the beams of transformers 5.18.0"
            ):
                new_tokens(model, inputs, num_beams=3)
        return
    expected = [beam_search(stock, row, COUNT, width=3)[:2] for row in reference_rows(stock, inputs)]
    for cache in ("dynamic", "static"):
        options = {"num_beams": 3, "num_return_sequences": 2, "suppress_tokens": None, "cache_implementation": cache}
        answers = new_tokens(patched, inputs, **options)
        assert answers.tolist() == [tokens for best in expected for _, tokens in best]


def test_sampling(kind, stock, patched):
    """Sampled tokens come from the reference's distribution: the same seed draws the same tokens from it."""
    inputs = named_batch(kind, "one image")
    torch.manual_seed(3)
    ours = new_tokens(patched, inputs, do_sample=True, top_k=0, num_return_sequences=2)
    torch.manual_seed(3)
    rows = reference_rows(stock, inputs) * 2
    for tokens in ours.T:
        logits = torch.stack([row_logits(stock, row)[-1] for row in rows])
        logits[:, VISUAL] = -torch.inf
        drawn = torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]
        assert torch.equal(tokens, drawn)
        rows = [extended(stock, row, token[None]) for row, token in zip(rows, drawn)]


def test_prompt_lookup_and_assisted_decoding(kind, stock, patched):
    inputs = qwen_batch(kind, [(6, IMAGE, 6)])
    inputs["input_ids"][0, -4:] = inputs["input_ids"][0, :4]  # something to look up on the first step
    if stock._is_stateful:
        for model in (stock, patched):
            with pytest.raises(ValueError, match="not supported with stateful models"):
                new_tokens(model, inputs, prompt_lookup_num_tokens=3)
        return
    expected = greedy(stock, reference_rows(stock, inputs), 10, VISUAL)
    assert torch.equal(new_tokens(patched, inputs, max_new_tokens=10, prompt_lookup_num_tokens=3), expected)
    for assistant in (copy.deepcopy(stock), apply_hiprune(copy.deepcopy(stock), budget=5)):
        assert torch.equal(new_tokens(patched, inputs, max_new_tokens=10, assistant_model=assistant), expected)


# --------------------------------------------------------------------------------------------------- decoding by hand


@pytest.mark.parametrize("counting", ["full mask", "cache mask", "no mask", "own positions"])
@pytest.mark.parametrize("name", ["one image", "image and video", "mixed", "same length"])
def test_decode_loop(kind, stock, patched, name, counting):
    inputs = qwen_batch(kind, [(5, IMAGE, 7), (38,)]) if name == "same length" else named_batch(kind, name)
    expected = greedy(stock, reference_rows(stock, inputs), COUNT, VISUAL)
    mask = inputs["attention_mask"]
    if counting == "no mask" and not bool(mask.all()):
        return  # stock needs a mask there as well
    if counting == "no mask":
        del inputs["attention_mask"]
    tokens = []
    with torch.no_grad():
        output = patched(**inputs, use_cache=True)
        for _ in range(COUNT):
            logits = output.logits[:, -1]
            logits[:, VISUAL] = -torch.inf
            tokens.append(logits.argmax(dim=-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], dim=1)
            cache, step = output[CACHE], {"attention_mask": mask}
            if counting == "cache mask":
                step = {"attention_mask": torch.ones(len(mask), cache.get_seq_length() + 1, dtype=torch.long)}
            if counting == "no mask":
                step = {}
            if counting == "own positions":
                step["position_ids"] = (mask.cumsum(dim=1) - 1)[:, -1:] + patched.model.rope_deltas
            output = patched(input_ids=tokens[-1], **{CACHE: cache}, **step)
    assert torch.equal(torch.cat(tokens, dim=1), expected)


# ------------------------------------------------------------------------------------------------------- caches reused


@pytest.mark.parametrize("shown", [None, SMALL, VIDEO], ids=["text", "new image", "new video"])
@pytest.mark.parametrize("only_new", [False, True], ids=["whole ids", "new ids"])
def test_second_turn(kind, stock, patched, shown, only_new):
    """Stock gives what follows a cached prompt plain positions, images too; so they come out here."""
    first = (5, IMAGE, 7)
    inputs = qwen_batch(kind, [first])
    answer = patched.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    length = answer.sequences.shape[1]
    whole = qwen_batch(kind, [(*first, COUNT, 4, *([shown, 3] if shown else []))])
    whole["input_ids"][:, :length] = answer.sequences
    rows = reference_rows(stock, whole)
    later = rows[0].columns >= inputs["input_ids"].shape[1]
    rows[0].positions[1:, later] = rows[0].columns[later] + patched.model.rope_deltas[0]
    expected = greedy(stock, rows, COUNT, VISUAL)
    turn = {name: whole[name] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    if shown == SMALL:
        patches = int(whole["image_grid_thw"][0].prod())
        turn |= {"pixel_values": whole["pixel_values"][patches:], "image_grid_thw": whole["image_grid_thw"][1:]}
    if shown == VIDEO:
        turn |= {name: whole[name] for name in KINDS[VIDEO_TOKEN]}
    if only_new:  # the last token of the answer is not in the cache yet
        turn |= {name: turn[name][:, length - 1 :] for name in ("input_ids", "mm_token_type_ids")}
    cache = stock.generate(**inputs, **GREEDY, return_dict_in_generate=True)[CACHE]
    try:
        stock.generate(**turn, **GREEDY, **{CACHE: cache})
    except (StopIteration, TypeError) as error:  # transformers from 5.23 on, where whole ids show something new
        assert shown and not only_new
        with pytest.raises(type(error)):
            new_tokens(patched, turn, **{CACHE: answer[CACHE]})
        return
    assert torch.equal(new_tokens(patched, turn, **{CACHE: answer[CACHE]}), expected)


def test_turns_by_hand(kind, stock, patched):
    """A batch with padding in each turn, an image in the second: positions go on behind the whole prompt's."""
    turns = [qwen_batch(kind, rows, seed=i) for i, rows in enumerate([[(5, IMAGE, 3), (9,)], [(4,), (2, SMALL, 1)]])]
    mask = torch.cat([turn["attention_mask"] for turn in turns], dim=1)
    with torch.no_grad():
        output = patched(**turns[0])
        cache, deltas = output[CACHE], patched.model.rope_deltas
        second = {**turns[1], "attention_mask": mask}
        if stock._is_stateful:
            with pytest.raises(ValueError, match=rf"{CACHE}: linear attention takes no padding .*, got \[4, 8\]"):
                patched(**second, **{CACHE: cache})
            return
        logits = patched(**second, **{CACHE: cache}).logits
    whole = {name: torch.cat([turn[name] for turn in turns], dim=1) for name in ("input_ids", "mm_token_type_ids")}
    visual = {name: torch.cat([turn[name] for turn in turns]) for name in KINDS[IMAGE_TOKEN]}
    width = turns[0]["input_ids"].shape[1]
    rows = reference_rows(stock, {**whole, **visual, "attention_mask": mask})
    for ours, row, delta, padding in zip(logits, rows, deltas, (mask == 0), strict=True):
        later = row.columns >= width
        text = torch.tensor([int(column) - int(padding[:column].sum()) for column in row.columns[later]])
        row.positions[1:, later] = text + delta
        torch.testing.assert_close(ours[-1], row_logits(stock, row)[-1], **TOLERANCE)


def test_a_cache_for_several_continuations(kind, stock, patched):
    inputs = named_batch(kind, "batch")
    rows = reference_rows(stock, inputs)
    tokens = torch.tensor([[7, 8], [9, 10], [11, 12], [13, 14]])
    with torch.no_grad():
        cache = patched(**inputs)[CACHE]
        patched(**qwen_batch(kind, [(5, SMALL, 3)]))  # another prompt in between
        if stock._is_stateful:  # whose cache stock cannot repeat in place
            cache.reorder_cache(torch.tensor([0, 0, 1, 1]))
        else:
            cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 2, 1]))
        order = [1, 0, 1, 0]
        mask = torch.cat([inputs["attention_mask"][order], torch.ones_like(tokens)], dim=1)
        logits = patched(input_ids=tokens, attention_mask=mask, **{CACHE: cache}).logits
    for ours, i, new in zip(logits, order, tokens, strict=True):
        expected = row_logits(stock, extended(stock, rows[i], new))
        torch.testing.assert_close(ours, expected[-2:], **TOLERANCE)


def test_no_multimodal_positions(kind, stock, patched):
    """Who gives neither token types nor positions gets plain ones from Qwen2.5-VL; dropped tokens leave gaps there."""
    inputs = named_batch(kind, "one image")
    del inputs["mm_token_type_ids"]
    model = copy.deepcopy(patched)
    model.model.rope_deltas = None
    if kind != "qwen2.5":
        with pytest.raises(ValueError, match="mm_token_type_ids"):
            logits_of(model, inputs)
        return
    [row] = reference_rows(stock, named_batch(kind, "one image"))
    row.positions[1:] = row.columns
    with torch.no_grad():
        output = model(**inputs)
        torch.testing.assert_close(output.logits[0], row_logits(stock, row), **TOLERANCE)
        token = torch.tensor([7])
        step = model(input_ids=token[None], **{CACHE: output[CACHE]}).logits[0]
    torch.testing.assert_close(step[-1], row_logits(stock, extended(stock, row, token))[-1], **TOLERANCE)


# -------------------------------------------------------------------------------------------------- limits, recording


def test_refusals(kind, stock):
    model = copy.deepcopy(stock)
    with pytest.raises(ValueError, match=r'score_queries: expected "all", as \w+ has no CLS token'):
        apply_hiprune(model, retention=SHARE, score_queries="cls")
    with pytest.raises(ValueError, match="object_layer: expected 1 to 4"):
        apply_hiprune(model, retention=SHARE, object_layer=5)
    if kind in ("qwen3", "qwen3 moe"):
        late = tiny_qwen(kind, deepstack_visual_indexes=[0, 3])
        with pytest.raises(ValueError, match=r"deepstack_visual_indexes below 3, .* got \[0, 3\]"):
            apply_hiprune(late, retention=SHARE)
    if kind.startswith("glm"):  # by stock code
        with pytest.raises(ValueError, match="Image features and image tokens do not match, tokens: 33, features: 9"):
            logits_of(apply_hiprune(model, retention=SHARE), qwen_batch(kind, PROMPTS["image and video"]))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_recorded_scores(kind, implementation):
    """The scores are eager attention's; the outputs are the stock bits."""
    model = tiny_qwen(kind, implementation=implementation)
    inputs = named_batch(kind, "image and video")
    expected = logits_of(model, inputs)
    with record_scores(model) as scores:
        assert torch.equal(logits_of(model, inputs), expected)
    shown = [token for token, (pixels, _) in KINDS.items() if pixels in inputs]
    for layer, runs in scores.items():
        for token, ours in zip(shown, runs, strict=True):
            pixels, grid_thw = (inputs[name] for name in KINDS[token])
            rows = eager_row_scores(model, pixels, grid_thw, layer)[patch_order(model, grid_thw)]
            torch.testing.assert_close(ours.double(), rows, rtol=1e-4, atol=1e-5)


def test_bfloat16(kind, stock):
    """Errors are like those of stock bfloat16 on the same tokens."""
    inputs = named_batch(kind, "mixed")
    half = copy.deepcopy(stock).bfloat16()
    model = apply_hiprune(copy.deepcopy(half), retention=SHARE)
    logits = logits_of(model, inputs)
    kept = last_selections(model, inputs)
    for ours, exact, same in zip(logits, pruned_rows(stock, inputs, kept), pruned_rows(half, inputs, kept)):
        truth = row_logits(stock, exact)
        expected, error = (row_logits(half, same) - truth).norm(), (ours[-len(truth) :] - truth).norm()
        assert error <= 1.3 * expected + 0.01 * truth.norm() < truth.norm() / 4
