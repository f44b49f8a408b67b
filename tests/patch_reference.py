"""What a pruned LLaVA must compute, built by hand from stock modules on explicitly pruned embeddings."""

from __future__ import annotations

import copy

import pytest
import torch
from models import GRID, IMAGE_TOKEN, NUM_TOKENS
from torch import Tensor

from hiprune_kernels import reference


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
    """Per row without padding: embeddings [L', C] with the kept features in place, and the full positions kept [L']."""
    embed, image, rows = model.get_input_embeddings(), 0, []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"]):
        parts, kept, column = [], [], 0
        while column < len(ids):
            if not mask[column]:
                column += 1
            elif ids[column] == IMAGE_TOKEN:
                parts.append(features[image])
                kept.append(column + indices[image])
                image, column = image + 1, column + image_tokens
            else:
                parts.append(embed(ids[column : column + 1]))
                kept.append(torch.tensor([column]))
                column += 1
        rows.append((torch.cat(parts).detach(), torch.cat(kept)))
    assert image == len(features)
    return rows


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
