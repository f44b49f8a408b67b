"""CDPruner: tokens that differ from one another and are relevant to the prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..budget import check_share
from ..facts import EncoderFacts
from .base import Method, Needs, Picks, Seen, TokenLayout
from .text import ClipText, check_text_encoder, check_tower, mean_of_cosines, notes_of, relevance


@dataclass(frozen=True, kw_only=True)
class CDPruner(Method):
    """CDPruner (Zhang et al., NeurIPS 2025): in each tile the likeliest set of a determinantal point process.

    ``K = diag(q) L diag(q)``, L the cosines between the tokens' projected features, and q in 0..1 their relevance:
    ``q_i = (u_i - min u + 1e-6) / (max u - min u)``, over the tiles of one image. The set is chosen greedily. With a
    text encoder u_i is the mean, over segments of the text, of minus the cosine of patch and text in CLIP's space, as
    released. Without one it is the mean cosine with the embeddings of the prompt's text, in the language model's space,
    as ports to models without a text tower have it. Without text all tokens are equally relevant. Where the features do
    not differ enough for as many tokens, the most relevant ones fill up.

    Attributes:
        budget, retention: exactly one of them: visual tokens kept per image, shared out among its tiles, or the share.
        text_encoder: the CLIP text tower that belongs to the vision tower, see `ClipText`.
        relevance_weight: None, as released, or theta in [0, 1): q becomes ``exp(theta / (2 (1 - theta)) q)``.

    Example:
        >>> CDPruner(budget=64).relevance_weight is None
        True
    """

    text_encoder: ClipText | None = None
    relevance_weight: float | None = None

    guaranteed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_text_encoder(self.text_encoder)
        if self.relevance_weight is not None:
            check_share("relevance_weight", self.relevance_weight)
            if self.relevance_weight == 1:
                raise ValueError("relevance_weight: expected a share below 1, got 1")
        super().__post_init__()

    def needs(self, encoder: EncoderFacts) -> Needs:
        check_tower(self.text_encoder, encoder)
        return Needs(features="language" if self.text_encoder is None else "both", text=True)

    def select(self, seen: Seen) -> Picks:
        layout, budgets = seen.layout, self.tile_budgets(seen.layout)
        relevances, quality = [], []
        for image, (_, tokens) in enumerate(layout.images()):
            relevances.append(relevance(seen, image, tokens, self.text_encoder, mean_of_cosines))
            quality.append(self._quality(relevances[-1], layout, tokens, seen.device))
        indices, _ = greedy_dpp(seen.features, torch.cat(quality), layout, budgets)
        roles = torch.zeros(sum(layout.sizes) + 1, dtype=torch.uint8, device=seen.device)
        roles[indices] = 1  # -1, which fills up a tile without candidates, is the one too many
        empty = layout.candidate_counts is not None and min(layout.candidate_counts) == 0
        return Picks(indices, roles[:-1], budgets, empty, notes_of(relevances, "diversity alone"))

    def _quality(self, u: Tensor | None, layout: TokenLayout, tokens: slice, device: torch.device) -> Tensor:
        if u is None:
            return torch.ones(tokens.stop - tokens.start, device=device)
        among = u if layout.candidates is None else u[layout.candidates[tokens].to(device)]
        low, high = among.min(), among.max()
        quality = torch.where(high > low, (u - low + 1e-6) / (high - low), 1.0)
        if self.relevance_weight is None:
            return quality
        return torch.exp(self.relevance_weight / (2 * (1 - self.relevance_weight)) * quality)


def greedy_dpp(features: Tensor, quality: Tensor, layout: TokenLayout, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Greedy MAP inference in each tile with K = diag(q) L diag(q): indices ascending, and in the order of choice.

    Where the features, [T, C], span fewer dimensions, the highest quality, [T], fills up.
    """
    mask = None if layout.candidates is None else layout.candidates.to(features.device)
    # The lowest of equally relevant tokens is the first, whatever a cosine with itself is rounded to. The factor of a
    # token that was chosen cancels.
    among = quality if mask is None else quality.where(mask, -1.0)
    starts = [0, *itertools.accumulate(layout.sizes)][:-1]
    first = torch.stack([part.argmax() for part in among.split(layout.sizes)])
    first = first + torch.tensor(starts, device=features.device)
    quality = quality * (1 + torch.zeros_like(quality).index_fill(0, first, 2e-6))
    return ops.select_diverse_varlen(features, sizes=layout.sizes, counts=counts, quality=quality, candidate_mask=mask)
