"""A patched LLaVA computes what stock modules compute on explicitly pruned embeddings, in every way of running it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from models import IMAGE_TOKEN, NUM_TOKENS, batch, images, prompt, tiny_clip_config, tiny_llava, tiny_text_config
from patch_reference import (
    expected_selection,
    kept_features,
    new_tokens,
    one_thread,  # noqa: F401
    pruned_rows,
    row_logits,
    seen_features,
    stock_generate,
)
from transformers import (
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    StaticCache,
)

from hiprune_kernels.patch import apply_hiprune, last_selection
from hiprune_kernels.patch.language import CACHE

BUDGET, OBJECT_LAYER, FEATURE_LAYER = 10, 2, 4
TOLERANCE = {"rtol": 0, "atol": 2e-4}  # logits are of order 10; a wrong token moves them by more than 0.1
GREEDY = {"do_sample": False, "max_new_tokens": 6, "suppress_tokens": [IMAGE_TOKEN]}  # no image token in an answer

PROMPTS = {
    "one image": [prompt(5, "image", 7)],
    "image first": [prompt("image", 4)],
    "two images": [prompt(3, "image", 4, "image", 2)],
    "batch": [prompt(5, "image", 7), prompt(2, "image", 3, seed=1)],
    "mixed": [prompt(5, "image", 7), prompt(9, seed=1), prompt(3, "image", 2, "image", 6, seed=2)],
    "long text-only": [prompt(5, "image", 7), prompt(60, seed=1)],
}


def inputs_for(name: str, side: str = "left") -> dict:
    rows = PROMPTS[name]
    count = sum(row.count(IMAGE_TOKEN) for row in rows) // NUM_TOKENS
    return batch(rows, images(count), side)


@pytest.fixture(scope="module")
def stock():
    return tiny_llava()


@pytest.fixture(scope="module")
def patched(stock):
    return apply_hiprune(copy.deepcopy(stock), budget=BUDGET)


def reference_rows(stock, inputs, budget=BUDGET):
    indices, _ = expected_selection(
        stock.model.vision_tower, inputs["pixel_values"], budget, OBJECT_LAYER, FEATURE_LAYER
    )
    return pruned_rows(stock, inputs, kept_features(stock, inputs["pixel_values"], indices), indices)


# ------------------------------------------------------------------------------------------------------------ prefill


@pytest.mark.parametrize("name", PROMPTS)
def test_prefill_logits(stock, patched, name):
    inputs = inputs_for(name)
    with torch.no_grad():
        logits = patched(**inputs).logits
    rows = reference_rows(stock, inputs)
    assert logits.shape[1] == max(len(embeds) for embeds, _ in rows)
    for row, (embeds, _) in zip(logits, rows):
        torch.testing.assert_close(row[-len(embeds) :], row_logits(stock, embeds), **TOLERANCE)


def test_a_shifted_selection_would_show(stock, patched):
    """The tolerance above is worth something: indices off by one, or one wrong token, are far outside of it."""
    inputs = inputs_for("one image")
    with torch.no_grad():
        logits = patched(**inputs).logits[0]
    indices = last_selection(patched)[0].indices[None]
    wrong = indices.clone()
    wrong[0, -1] += 1
    assert not torch.isin(wrong[0, -1], indices)
    for other in ((indices + 1) % NUM_TOKENS, wrong):
        [(embeds, _)] = pruned_rows(stock, inputs, kept_features(stock, inputs["pixel_values"], other), other)
        assert (row_logits(stock, embeds) - logits).abs().max() > 0.1


@pytest.mark.parametrize("name", ["mixed", "long text-only", "batch"])
def test_right_padding_keeps_columns_counted_from_the_end(stock, patched, name):
    inputs = inputs_for(name, side="right")
    with torch.no_grad():
        logits = patched(**inputs).logits
    length = inputs["input_ids"].shape[1]
    for row, mask, (embeds, _) in zip(logits, inputs["attention_mask"], reference_rows(stock, inputs)):
        end = logits.shape[1] - (length - int(mask.sum()))
        torch.testing.assert_close(row[end - len(embeds) : end], row_logits(stock, embeds), **TOLERANCE)


def test_no_attention_mask(stock, patched):
    """Rows of one length that lose different numbers of tokens need a mask that the caller does not give."""
    inputs = batch([prompt(5, "image", 7), prompt(48, seed=1)], images(1))
    rows = reference_rows(stock, inputs)
    del inputs["attention_mask"]
    with torch.no_grad():
        logits = patched(**inputs).logits
    for row, (embeds, _) in zip(logits, rows):
        torch.testing.assert_close(row[-len(embeds) :], row_logits(stock, embeds), **TOLERANCE)


def test_positions_of_the_caller_are_compacted(stock, patched):
    """Own position ids move up by the dropped tokens before each; relative distances elsewhere are the caller's."""
    inputs = inputs_for("one image")
    [(embeds, kept)] = reference_rows(stock, inputs)
    own = torch.arange(inputs["input_ids"].shape[1])
    own[-4:] += 5  # a gap that the caller wants
    dropped = kept - torch.arange(len(kept))
    with torch.no_grad():
        logits = patched(**inputs, position_ids=own[None]).logits[0]
        expected = stock(inputs_embeds=embeds[None], position_ids=(own[kept] - dropped)[None], use_cache=True).logits[0]
    torch.testing.assert_close(logits, expected, **TOLERANCE)
    assert (logits - row_logits(stock, embeds)).abs().max() > 0.1


@pytest.mark.parametrize("given", ["pixel_values", "features"])
def test_inputs_embeds(stock, patched, given):
    inputs = inputs_for("mixed")
    embeds = stock.get_input_embeddings()(inputs["input_ids"]).detach()
    mask = inputs["attention_mask"]
    with torch.no_grad():
        if given == "features":  # the caller's own embeddings without images: stock
            ours = patched(inputs_embeds=embeds, attention_mask=mask).logits
            assert torch.equal(ours, stock(inputs_embeds=embeds, attention_mask=mask).logits)
        else:
            ours = patched(inputs_embeds=embeds, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
            assert torch.equal(ours, patched(**inputs).logits)


def test_text_only_is_stock(stock, patched):
    inputs = batch([prompt(9), prompt(4, seed=1)])
    with torch.no_grad():
        assert torch.equal(patched(**inputs).logits, stock(**inputs).logits)
    assert torch.equal(patched.generate(**inputs, **GREEDY), stock.generate(**inputs, **GREEDY))


def test_features_and_hidden_states(stock, patched):
    inputs = inputs_for("two images")
    with torch.no_grad():
        output = patched(**inputs, output_hidden_states=True)
    indices = torch.stack([selection.indices for selection in last_selection(patched)])
    expected = kept_features(stock, inputs["pixel_values"], indices).flatten(0, 1)
    torch.testing.assert_close(seen_features(output), expected, rtol=0, atol=1e-4)
    assert {states.shape for states in output.hidden_states} == {(1, output.logits.shape[1], 64)}


def test_inner_model_alone(stock):
    inputs = inputs_for("mixed")
    inner = apply_hiprune(copy.deepcopy(stock.model), budget=BUDGET)
    with torch.no_grad():
        states = inner(**inputs).last_hidden_state
        by_position = inner(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]).last_hidden_state
    for row, (embeds, _) in zip(stock.lm_head(states), reference_rows(stock, inputs)):
        torch.testing.assert_close(row[-len(embeds) :], row_logits(stock, embeds), **TOLERANCE)
    assert torch.equal(states, by_position)


def test_strategy_full_keeps_the_cls_row_besides_the_budget(stock):
    model = copy.deepcopy(stock)
    model.config.vision_feature_select_strategy = "full"
    inputs = batch([prompt(5, "image", 7, image_tokens=NUM_TOKENS + 1)], images(1))
    indices, _ = expected_selection(
        stock.model.vision_tower, inputs["pixel_values"], BUDGET, OBJECT_LAYER, FEATURE_LAYER
    )
    rows = torch.cat([torch.zeros(1, 1, dtype=torch.long), indices + 1], dim=1)
    features = kept_features(stock, inputs["pixel_values"], rows, vision_feature_select_strategy="full")
    [(embeds, _)] = pruned_rows(stock, inputs, features, rows, NUM_TOKENS + 1)
    with torch.no_grad():
        from_argument = apply_hiprune(copy.deepcopy(stock), budget=BUDGET)(
            **inputs, vision_feature_select_strategy="full"
        )
        output = apply_hiprune(model, budget=BUDGET)(**inputs)
    torch.testing.assert_close(output.logits[0], row_logits(stock, embeds), **TOLERANCE)
    torch.testing.assert_close(seen_features(output), features[0], rtol=0, atol=1e-4)
    assert torch.equal(output.logits, from_argument.logits)


def test_a_tower_without_a_cls_token(stock):
    """Stock code with the strategy "default" would take the first token of the grid for one."""
    vision = SiglipVisionConfig(**{**tiny_clip_config().to_dict(), "model_type": "siglip_vision_model"})
    config = LlavaConfig(
        vision_config=vision,
        text_config=tiny_text_config(),
        image_token_index=IMAGE_TOKEN,
        vision_feature_select_strategy="full",
    )
    stock = LlavaForConditionalGeneration._from_config(config).eval()
    model, inputs = apply_hiprune(copy.deepcopy(stock), budget=BUDGET), inputs_for("mixed")
    with torch.no_grad():
        logits = model(**inputs).logits
    indices = torch.stack([selection.indices for selection in last_selection(model)])
    rows = pruned_rows(stock, inputs, kept_features(stock, inputs["pixel_values"], indices), indices)
    for row, (embeds, _) in zip(logits, rows):
        torch.testing.assert_close(row[-len(embeds) :], row_logits(stock, embeds), **TOLERANCE)
    with pytest.raises(ValueError, match='vision_feature_select_strategy: expected "full", as SigLIP has no CLS token'):
        model(**inputs, vision_feature_select_strategy="default")


@pytest.mark.parametrize("index", [-1, -3, 3])
def test_feature_layer_of_the_config(stock, index):
    model = copy.deepcopy(stock)
    model.config.vision_feature_layer = index
    inputs = inputs_for("batch")
    deep = index if index > 0 else 6 + index
    indices, _ = expected_selection(stock.model.vision_tower, inputs["pixel_values"], BUDGET, OBJECT_LAYER, deep)
    features = kept_features(stock, inputs["pixel_values"], indices, vision_feature_layer=index)
    rows = pruned_rows(stock, inputs, features, indices)
    with torch.no_grad():
        logits = apply_hiprune(model, budget=BUDGET)(**inputs).logits
    for row, (embeds, _) in zip(logits, rows):
        torch.testing.assert_close(row[-len(embeds) :], row_logits(stock, embeds), **TOLERANCE)


# ---------------------------------------------------------------------------------------------------------- generate()


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=["dynamic", "no cache", "static"]
)
def test_greedy(stock, patched, name, options):
    inputs = inputs_for(name)
    expected = stock_generate(stock, reference_rows(stock, inputs), **GREEDY)
    assert torch.equal(new_tokens(patched, inputs, **GREEDY, **options), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 0.7},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "do_sample": False, "num_return_sequences": 2, "cache_implementation": "static"},
    ],
    ids=["sampling", "sampling thrice", "beams", "beams static"],
)
@pytest.mark.parametrize("name", ["one image", "batch", "long text-only"])
def test_sampling_and_beams(stock, patched, name, options):
    inputs = inputs_for(name)
    rows = reference_rows(stock, inputs)
    torch.manual_seed(3)
    expected = stock_generate(stock, rows, max_new_tokens=6, **options)
    torch.manual_seed(3)
    assert torch.equal(new_tokens(patched, inputs, max_new_tokens=6, **options), expected)


def test_prompt_lookup_and_assisted_decoding(stock, patched):
    repeated = prompt(6)
    inputs = batch([repeated + prompt("image") + repeated[:3]], images(1))  # something to look up on the first step
    expected = stock_generate(stock, reference_rows(stock, inputs), do_sample=False, max_new_tokens=12)
    lookup = new_tokens(patched, inputs, do_sample=False, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(lookup, expected)
    for assistant in (copy.deepcopy(stock), apply_hiprune(tiny_llava(), budget=5), patched):
        assisted = new_tokens(patched, inputs, do_sample=False, max_new_tokens=12, assistant_model=assistant)
        assert torch.equal(assisted, expected)


@pytest.mark.parametrize("text", [MistralConfig, Qwen2Config])
def test_text_models(text):
    config = text(**{**tiny_text_config().to_dict(), "model_type": text.model_type})
    stock = tiny_llava(text=config)
    assert stock.config.text_config.model_type == text.model_type
    inputs = inputs_for("mixed")
    expected = stock_generate(stock, reference_rows(stock, inputs), **GREEDY)
    assert torch.equal(new_tokens(apply_hiprune(copy.deepcopy(stock), budget=BUDGET), inputs, **GREEDY), expected)


def test_generate_from_embeddings(stock, patched):
    inputs = inputs_for("mixed")
    expected = stock_generate(stock, reference_rows(stock, inputs), **GREEDY)
    embeds = stock.get_input_embeddings()(inputs["input_ids"]).detach()
    ours = patched.generate(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], pixel_values=inputs["pixel_values"], **GREEDY
    )
    assert torch.equal(ours, expected)


# --------------------------------------------------------------------------------------------------- decoding by hand


@pytest.mark.parametrize("counting", ["full mask", "cache mask", "no mask", "positions", "new cache", "static cache"])
@pytest.mark.parametrize("name", ["one image", "mixed", "same length"])
def test_decode_loop(stock, patched, name, counting):
    inputs = inputs_for(name) if name in PROMPTS else batch([prompt(5, "image", 7), prompt(48, seed=1)], images(1))
    if counting == "no mask" and not bool(inputs["attention_mask"].all()):
        return  # stock needs a mask there as well
    expected = stock_generate(stock, reference_rows(stock, inputs), **GREEDY)
    mask = inputs["attention_mask"]
    start = {}
    if counting == "new cache":
        start[CACHE] = DynamicCache()
    if counting == "static cache":
        start[CACHE] = StaticCache(config=stock.config.text_config, max_cache_len=64)
    if counting == "no mask":
        inputs = {key: value for key, value in inputs.items() if key != "attention_mask"}
    if counting == "positions":
        start["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    tokens = []
    with torch.no_grad():
        output = patched(**inputs, **start, use_cache=True)
        for _ in range(GREEDY["max_new_tokens"]):
            token = output.logits[:, -1].argmax(dim=-1, keepdim=True)
            tokens.append(token)
            mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            cache = output[CACHE]
            step = {"attention_mask": mask}
            if counting == "cache mask":
                ones = torch.ones(len(mask), cache.get_seq_length() + 1, dtype=torch.long)
                step = {"attention_mask": ones}
            if counting == "no mask":
                step = {}
            if counting == "positions":
                step["position_ids"] = mask.sum(dim=1, keepdim=True) - 1
            output = patched(input_ids=token, **{CACHE: cache}, **step)
    assert torch.equal(torch.cat(tokens, dim=1), expected)


def test_mask_of_an_impossible_length(patched):
    with torch.no_grad():
        output = patched(**inputs_for("one image"))
        mask = torch.ones(1, 30, dtype=torch.long)
        with pytest.raises(ValueError, match=r"attention_mask: expected \[batch, 49\] .*got \[1, 30\]"):
            patched(input_ids=torch.tensor([[5]]), **{CACHE: output[CACHE]}, attention_mask=mask)
        with pytest.raises(ValueError, match=r"attention_mask: a pruned prefill needs \[batch, 48\], got \[1, 30\]"):
            patched(**{**inputs_for("one image"), "attention_mask": mask})


# ------------------------------------------------------------------------------------------------------- caches reused


def conversation(stock, rows, new_image):
    """Whole prompts of a second turn: first turn, its answer, new text (and a new image)."""
    second = prompt(4, "image", 3, seed=9) if new_image else prompt(5, seed=9)
    return [[*row, *second] for row in rows], second


@pytest.mark.parametrize("new_image", [False, True], ids=["text", "new image"])
@pytest.mark.parametrize("only_new", [False, True], ids=["whole ids", "new ids"])
def test_second_turn(stock, patched, new_image, only_new):
    inputs = inputs_for("one image")
    first = patched.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    rows, second = conversation(stock, first.sequences.tolist(), new_image)
    pixels = torch.cat([inputs["pixel_values"], images(1, seed=5)]) if new_image else inputs["pixel_values"]
    whole = batch(rows, pixels)
    expected = stock_generate(stock, reference_rows(stock, whole), **GREEDY)
    turn = {"input_ids": whole["input_ids"], "attention_mask": whole["attention_mask"]}
    if new_image:
        turn["pixel_values"] = pixels[1:]
    if only_new:  # the last token of the answer is not in the cache yet
        turn["input_ids"] = whole["input_ids"][:, -len(second) - 1 :]
    sequences = patched.generate(**turn, **{CACHE: first[CACHE]}, **GREEDY)
    assert torch.equal(sequences[:, turn["input_ids"].shape[1] :], expected)


def by_hand(model, turns, masked):
    """Logits of the last column after each turn of a conversation in one growing cache."""
    logits, cache, mask = [], None, torch.zeros(2, 0, dtype=torch.long)
    with torch.no_grad():
        for turn in turns:
            mask = torch.cat([mask, turn["attention_mask"]], dim=1)
            given = {**turn, "attention_mask": mask}
            if masked:
                given["position_ids"] = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -turn["input_ids"].shape[1] :]
            else:
                del given["attention_mask"]
            output = model(**given, **{CACHE: cache}, use_cache=True)
            logits.append(output.logits[:, -1])
            cache = output[CACHE]
    return logits


PADDED_TURNS = [
    batch([prompt(5, "image", 2), prompt(12, seed=1)], images(1)),
    batch([prompt(4, seed=2), prompt(2, seed=3)]),
    batch([prompt(7, seed=4), prompt(3, "image", seed=5)], images(1, seed=8)),
    batch([prompt(2, seed=6), prompt(2, seed=7)]),
]
EQUAL_TURNS = [  # rows of one length: stock needs no masks, and pruning has to pad
    batch([prompt(10, "image", 2), prompt(48, seed=1)], images(1)),
    batch([prompt(4, seed=2), prompt(4, seed=3)]),
    batch([prompt(39, seed=4), prompt(3, "image", seed=5)], images(1, seed=8)),
    batch([prompt(3, "image", 1, seed=6), prompt(2, "image", 2, seed=7)], images(2, seed=9)),
]


@pytest.mark.parametrize("masked,turns", [(True, PADDED_TURNS), (False, EQUAL_TURNS)], ids=["masks", "no masks"])
def test_turns_of_a_batch(stock, patched, masked, turns):
    """Padding within each turn, different numbers of images, text between: every part of the plan carries over."""
    ours = by_hand(patched, turns, masked)
    for count, logits in enumerate(ours, start=1):
        whole = {
            key: torch.cat([turn[key] for turn in turns[:count]], dim=1) for key in ("input_ids", "attention_mask")
        }
        shown = [turn["pixel_values"] for turn in turns[:count] if "pixel_values" in turn]
        if len(shown) == 3:  # images are numbered row by row: row 0 shows the first and the third, row 1 the others
            shown = [shown[0], shown[2][:1], shown[1], shown[2][1:]]
        for row, (embeds, _) in zip(logits, reference_rows(stock, {**whole, "pixel_values": torch.cat(shown)})):
            torch.testing.assert_close(row, row_logits(stock, embeds)[-1], **TOLERANCE)


def test_second_turn_from_embeddings(stock, patched):
    inputs = inputs_for("one image")
    first = patched.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    rows, _ = conversation(stock, first.sequences.tolist(), new_image=False)
    whole = batch(rows, inputs["pixel_values"])
    expected = stock_generate(stock, reference_rows(stock, whole), **GREEDY)
    embeds = stock.get_input_embeddings()(whole["input_ids"]).detach()
    turn = {"inputs_embeds": embeds, "attention_mask": whole["attention_mask"]}
    assert torch.equal(patched.generate(**turn, **{CACHE: first[CACHE]}, **GREEDY), expected)


def test_an_image_after_a_turn_of_text(stock, patched):
    text = batch([prompt(6)])
    first = patched.generate(**text, **GREEDY, return_dict_in_generate=True)
    rows, _ = conversation(stock, first.sequences.tolist(), new_image=True)
    whole = batch(rows, images(1))
    expected = stock_generate(stock, reference_rows(stock, whole), **GREEDY)
    sequences = patched.generate(**whole, **{CACHE: first[CACHE]}, **GREEDY)
    assert torch.equal(sequences[:, whole["input_ids"].shape[1] :], expected)


def test_cropped_copied_and_repeated_caches(stock, patched):
    """A prompt's cache serves several continuations; cropping text off its end is fine."""
    inputs = inputs_for("one image")
    tail = inputs["input_ids"][:, -3:]
    expected = stock_generate(stock, reference_rows(stock, inputs), **GREEDY)
    with torch.no_grad():
        cache = patched(**inputs)[CACHE]
    cropped = copy.deepcopy(cache)
    cropped.crop(-3)
    whole = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    assert torch.equal(patched.generate(**whole, **{CACHE: cropped}, **GREEDY)[:, -6:], expected)
    repeated = copy.deepcopy(cache)
    repeated.crop(-3)
    repeated.batch_repeat_interleave(2)
    mask = inputs["attention_mask"].repeat(2, 1)
    with torch.no_grad():
        logits = patched(input_ids=tail.repeat(2, 1), attention_mask=mask, **{CACHE: repeated}).logits
        assert torch.equal(logits[:, -1].argmax(dim=-1), expected[:, 0].repeat(2))
        mask = inputs_for("batch")["attention_mask"]  # `generate` counts positions from the mask, so this must
        two = patched(**inputs_for("batch"), position_ids=(mask.cumsum(1) - 1).clamp(min=0))[CACHE]
        both = copy.deepcopy(two)
        both.crop(-2)
        both.batch_repeat_interleave(2)
        turn = {key: inputs_for("batch")[key].repeat_interleave(2, dim=0) for key in ("input_ids", "attention_mask")}
        answers = patched.generate(**turn, **{CACHE: both}, **GREEDY)[:, -6:]
        rows = reference_rows(stock, inputs_for("batch"))
        assert torch.equal(answers, stock_generate(stock, rows, **GREEDY).repeat_interleave(2, dim=0))
        with pytest.raises(ValueError, match=f"{CACHE}: pruned for a batch of 2, but the inputs have 3 rows"):
            patched(input_ids=tail.repeat(3, 1), **{CACHE: two})


def _refilled(cache):
    """What a file or a shallow copy makes of a cache."""
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return copy.copy(torch.load(file, weights_only=False))


@pytest.mark.parametrize("through", [lambda cache: cache, copy.deepcopy, _refilled], ids=["itself", "copy", "file"])
def test_rows_of_a_cache_rearranged(stock, patched, through):
    """Rows of a batch that lost different tokens: the bookkeeping goes where the keys and values go."""
    inputs = inputs_for("mixed")
    mask, rows = inputs["attention_mask"], reference_rows(stock, inputs)
    tokens = torch.tensor([[7, 8, 9, 10, 11, 12]]).T

    def check(cache, order):
        ids = tokens[: len(order)]
        with torch.no_grad():
            grown = torch.cat([mask[order], torch.ones_like(ids)], dim=1)
            logits = patched(input_ids=ids, attention_mask=grown, **{CACHE: cache}).logits[:, -1]
        for ours, row, token in zip(logits, order, ids):
            embeds = torch.cat([rows[row][0], stock.get_input_embeddings()(token).detach()])
            torch.testing.assert_close(ours, row_logits(stock, embeds)[-1], **TOLERANCE)

    def prefilled():
        with torch.no_grad():
            return through(patched(**inputs, **{CACHE: DynamicCache()})[CACHE])

    count = len(rows)
    assert len({len(row) for row, _ in rows}) > 1
    back = list(range(count))[::-1]
    cache = prefilled()
    assert isinstance(cache, DynamicCache)
    cache.reorder_cache(torch.tensor(back))
    check(cache, back)
    cache = prefilled()
    cache.batch_select_indices(torch.tensor([count - 1]))
    check(cache, [count - 1])
    cache = prefilled()
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0, *range(2, 2 * count)]))
    cache.batch_select_indices(torch.tensor([2, 0]))
    check(cache, [1, 0])


def test_a_reset_cache_forgets(stock, patched):
    first, text = inputs_for("mixed"), batch([prompt(6, seed=seed) for seed in range(3)])
    cache, other = (StaticCache(config=stock.config.text_config, max_cache_len=128) for _ in range(2))
    with torch.no_grad():
        patched(**first, **{CACHE: cache})
        cache.reset()
        ours = patched(**text, **{CACHE: cache}).logits
        assert torch.equal(ours, stock(**text, **{CACHE: other}).logits)
        token = torch.tensor([[7], [8], [9]])  # the cache is filled again, but not pruned
        ours = patched(input_ids=token, **{CACHE: cache}).logits
        assert torch.equal(ours, stock(input_ids=token, **{CACHE: other}).logits)
        assert type(cache) is StaticCache
        cache.reset()
        again = patched(**first, **{CACHE: cache}).logits
        torch.testing.assert_close(again, patched(**first).logits, **TOLERANCE)


# ------------------------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize("budget", [NUM_TOKENS, 1000])
def test_a_budget_that_keeps_everything_is_stock(stock, budget):
    model = apply_hiprune(copy.deepcopy(stock), budget=budget)
    inputs = inputs_for("mixed")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stock(**inputs).logits)
    assert [selection.indices.tolist() for selection in last_selection(model)] == [list(range(NUM_TOKENS))] * 3
    assert all((selection.roles == 3).all() and selection.grid == (6, 6) for selection in last_selection(model))


def test_one_token_per_image(stock):
    model = apply_hiprune(copy.deepcopy(stock), budget=1)
    inputs = inputs_for("two images")
    expected = stock_generate(stock, reference_rows(stock, inputs, budget=1), **GREEDY)
    assert torch.equal(new_tokens(model, inputs, **GREEDY), expected)


def test_bfloat16(stock):
    """Errors are like those of stock bfloat16 on the same tokens."""
    inputs = inputs_for("mixed")
    half = copy.deepcopy(stock).bfloat16()
    model = apply_hiprune(copy.deepcopy(half), budget=BUDGET)
    pixels = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        logits = model(**{**inputs, "pixel_values": pixels}).logits
    assert logits.dtype == torch.bfloat16
    indices = torch.stack([selection.indices for selection in last_selection(model)])
    exact = pruned_rows(stock, inputs, kept_features(stock, inputs["pixel_values"], indices), indices)
    same = pruned_rows(half, inputs, kept_features(half, pixels, indices), indices)
    for row, (embeds, _), (half_embeds, _) in zip(logits, exact, same):
        truth = row_logits(stock, embeds)
        allowed = 2 * (row_logits(half, half_embeds).float() - truth).abs().max() + 0.02
        assert (row[-len(embeds) :].float() - truth).abs().max() <= allowed
        assert allowed < truth.abs().max() / 4
