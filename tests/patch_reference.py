"""What a pruned model must compute, built by hand from stock modules on explicitly pruned embeddings."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from models import GRID, IMAGE_TOKEN, NUM_TOKENS, VIDEO_TOKEN
from torch import Tensor

from hiprune_kernels import reference
from hiprune_kernels.patch.language import CACHE


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Tiny matrices gain nothing from threads, and waiting ones cost much on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def eager_scores(encoder, pixel_values: Tensor, layer: int, score_queries: str = "all") -> Tensor:
    """Column scores [B, prefix + N] of a 1-based layer, from the eager attention matrix in float64."""
    encoder = copy.deepcopy(encoder).double()
    encoder.set_attn_implementation("eager")
    with torch.no_grad():
        attention = encoder(pixel_values.double(), output_attentions=True).attentions[layer - 1]
    rows = attention.mean(dim=1)
    return rows[:, 0] if score_queries == "cls" else rows.sum(dim=1)


def expected_selection(
    encoder,
    pixel_values: Tensor,
    budget: int,
    object_layer: int,
    deep_layer: int,
    rule: str = "paper",
    score_queries: str = "all",
    grid: tuple[int, int] = GRID,
    **options,
) -> tuple[Tensor, Tensor]:
    """Indices and roles by the reference implementation on float64 eager scores."""
    layers = (object_layer, deep_layer)
    scores = [eager_scores(encoder, pixel_values, layer, score_queries) for layer in layers]
    if rule == "official" and score_queries == "all":
        scores = [score / score.shape[1] for score in scores]
    return reference.select_tokens(*scores, budget=budget, grid=grid, rule=rule, num_prefix_tokens=1, **options)


def kept_features(model, pixel_values: Tensor, indices: Tensor, **options) -> Tensor:
    """The stock projector's output [images, K, C] at the given rows."""
    with torch.no_grad():
        features = torch.stack(model.get_image_features(pixel_values, **options, return_dict=True).pooler_output)
    return features.gather(1, indices[..., None].expand(-1, -1, features.shape[-1]))


def pruned_rows(
    model, inputs: dict, features: Tensor, indices: Tensor, image_tokens: int = NUM_TOKENS
) -> list[tuple[Tensor, Tensor]]:
    """`visual_rows` for images [images, K, C] of which the given tokens [images, K] were kept."""
    count, _, width = features.shape
    dense = features.new_zeros(count, image_tokens, width)
    dense = dense.scatter(1, indices[..., None].expand_as(features), features)
    keep = torch.zeros(count, image_tokens, dtype=torch.bool).scatter(1, indices, True)
    return visual_rows(model, inputs, {IMAGE_TOKEN: (dense.flatten(0, 1), keep.flatten())})


def seen_features(output, kind: str = "image") -> Tensor | None:
    """The features [P, C] of all images (or videos) that come with a model's output; None without any."""
    if hasattr(output, f"{kind}_outputs"):  # from transformers 5.24 on
        output = getattr(output, f"{kind}_outputs")
        states = None if output is None else output.pooler_output
    else:
        states = getattr(output, f"{kind}_hidden_states", None)
    if states is None or (isinstance(states, Tensor) and states.ndim == 2):
        return states
    return torch.cat(list(states))


def visual_rows(model, inputs: dict, visual: dict[int, tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Per row without padding: embeddings [L', C] with the kept features in place, and the full positions kept [L'].

    `visual` holds for each kind of placeholder the features [P, C], in the order of the prompts, and which stay [P].
    """
    embeds, keep = model.get_input_embeddings()(inputs["input_ids"]).detach(), inputs["attention_mask"].bool()
    for token, (features, kept) in visual.items():
        places = inputs["input_ids"] == token
        assert int(places.sum()) == len(features) == len(kept)
        embeds[places], keep[places] = features, keep[places] & kept
    return [(row[kept], kept.nonzero()[:, 0]) for row, kept in zip(embeds, keep)]


def row_logits(model, embeds: Tensor) -> Tensor:
    """Stock logits [L', V] of one row of embeddings."""
    with torch.no_grad():
        return model(inputs_embeds=embeds[None], position_ids=torch.arange(len(embeds))[None]).logits[0]


def stock_generate(model, rows: list[tuple[Tensor, Tensor]], **options) -> Tensor:
    """New tokens that the stock `generate` makes from the pruned embeddings, left-padded."""
    length = max(len(embeds) for embeds, _ in rows)
    embeds = torch.zeros(len(rows), length, rows[0][0].shape[-1], dtype=rows[0][0].dtype)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, (row, _) in enumerate(rows):
        embeds[i, length - len(row) :] = row
        mask[i, length - len(row) :] = 1
    return model.generate(inputs_embeds=embeds, attention_mask=mask, **options)


def new_tokens(model, inputs: dict, **options) -> Tensor:
    """What `generate` adds; the caller's prompt must lead the returned sequences."""
    sequences = model.generate(**inputs, **options)
    length = inputs["input_ids"].shape[1]
    repeats = len(sequences) // len(inputs["input_ids"])
    assert torch.equal(sequences[:, :length], inputs["input_ids"].repeat_interleave(repeats, dim=0))
    return sequences[:, length:]


def assert_prefill(model, stock, inputs: dict, rows: list[tuple[Tensor, Tensor]], atol: float = 2e-4) -> None:
    """Logits of each row are those of its pruned embeddings, at the columns that they have counted from the end."""
    with torch.no_grad():
        logits = model(**inputs).logits
    length = inputs["input_ids"].shape[1]
    for row, mask, (embeds, _) in zip(logits, inputs["attention_mask"], rows):
        end = logits.shape[1] - (length - int(mask.nonzero().max()) - 1)
        torch.testing.assert_close(row[end - len(embeds) : end], row_logits(stock, embeds), rtol=0, atol=atol)


GREEDY = {"do_sample": False, "max_new_tokens": 5, "suppress_tokens": [IMAGE_TOKEN, VIDEO_TOKEN]}
WAYS = {  # of generating: options, and those of the reference
    "dynamic": ({}, {}),
    "no cache": ({"use_cache": False}, {}),
    "static": ({"cache_implementation": "static"}, {}),
    "beams": ({"num_beams": 3}, {"num_beams": 3}),
    "lookup": ({"prompt_lookup_num_tokens": 3, "max_new_tokens": 10}, {"max_new_tokens": 10}),
}


def assert_generates(model, stock, inputs: dict, rows: list[tuple[Tensor, Tensor]], way: str) -> None:
    """The stock `generate` makes the same tokens from the pruned embeddings."""
    options, of_reference = WAYS[way]
    expected = stock_generate(stock, rows, **{**GREEDY, **of_reference})
    assert torch.equal(new_tokens(model, inputs, **{**GREEDY, **options}), expected)


def assert_decodes_by_hand(model, stock, inputs: dict, rows: list[tuple[Tensor, Tensor]]) -> None:
    """A loop that knows nothing of pruning: the mask grows by one with each token."""
    mask, tokens = inputs["attention_mask"], []
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
        for _ in range(GREEDY["max_new_tokens"]):
            logits = output.logits[:, -1].index_fill(1, torch.tensor(GREEDY["suppress_tokens"]), -torch.inf)
            tokens.append(logits.argmax(dim=-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], dim=1)
            output = model(input_ids=tokens[-1], **{CACHE: output[CACHE]}, attention_mask=mask)
    assert torch.equal(torch.cat(tokens, dim=1), stock_generate(stock, rows, **GREEDY))


def assert_second_turn(model, stock, inputs: dict, second: list[int], shown: dict, rows_of: Callable) -> None:
    """A second prompt in the first one's cache; `shown` are its images, `rows_of` makes rows of inputs with all images.

    `inputs` has one row.
    """
    first = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.tensor([second])], dim=1)
    turn = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    both = {name: torch.cat([value, shown[name]]) if name in shown else value for name, value in inputs.items()}
    rows = rows_of({**both, **turn})
    sequences = model.generate(**turn, **shown, **{CACHE: first[CACHE]}, **GREEDY)
    assert torch.equal(sequences[:, ids.shape[1] :], stock_generate(stock, rows, **GREEDY))


def assert_a_wrong_token_shows(
    model, stock, inputs: dict, features: dict[int, Tensor], keep: dict[int, Tensor], least: float
) -> None:
    """What a tolerance of logits is worth: one other token, of any kind, moves those of one prompt by over `least`."""
    with torch.no_grad():
        logits = model(**inputs).logits[0]
    for token in keep:
        wrong = keep[token].clone()
        out, into = int(wrong.nonzero()[-2]), int((~wrong).nonzero()[-1])
        wrong[out], wrong[into] = False, True
        visual = {kind: (features[kind], wrong if kind == token else keep[kind]) for kind in keep}
        [(embeds, _)] = visual_rows(stock, inputs, visual)
        assert (row_logits(stock, embeds) - logits).abs().max() > least
