"""HiPrune++: HiPrune, and tokens that are like the prompt's text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..budget import ROLE_NAMES, check_share
from ..facts import EncoderFacts
from .base import Needs, Picks, Seen, TokenLayout, best_of_tiles
from .hiprune import HiPrune
from .text import ClipText, check_text_encoder, check_tower, cosine_with_mean, notes_of, relevance

_TEXT = len(ROLE_NAMES) + 1


@dataclass(frozen=True, kw_only=True)
class HiPrunePlusPlus(HiPrune):
    """HiPrune++ (section 4.4 of HiPrune): ``round(text_budget N')`` of the tokens are the likest to the text (Eq. 9).

    The likeness of a token is its cosine with the averaged text: with a text encoder in CLIP's space, its sign turned
    round, as in the practice that the paper cites; without one in the language model's space, with the mean of the
    embeddings of the prompt's text. HiPrune selects first, with its alpha and rounding, for the rest of the budget (at
    least one token a tile); then come the likest of the tokens that it left. By default N' is the total, which is what
    the paper's measured costs say; its text and its pseudo-code say otherwise, and disagree. Without text in the prompt
    HiPrune has the whole total.

    Attributes:
        text_budget: beta, the share of the budget, 0 to 1.
        additive: whether these tokens come on top of N'.
        text_encoder: the CLIP text tower that belongs to the vision tower, see `ClipText`.

    The other attributes are those of `HiPrune`.

    Example:
        >>> HiPrunePlusPlus(budget=192).roles
        ('anchor', 'buffer', 'register', 'text')
    """

    text_budget: float = 0.1
    additive: bool = False
    text_encoder: ClipText | None = None

    roles: ClassVar[tuple[str, ...]] = (*ROLE_NAMES, "text")
    guaranteed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("text_budget", self.text_budget)
        if type(self.additive) is not bool:
            raise TypeError(f"additive: expected a bool, got {type(self.additive).__name__}")
        check_text_encoder(self.text_encoder)
        super().__post_init__()

    def needs(self, encoder: EncoderFacts) -> Needs:
        check_tower(self.text_encoder, encoder)
        scores = super().needs(encoder).scores
        return Needs(scores=scores, features="language" if self.text_encoder is None else "encoder", text=True)

    def tile_budgets(self, layout: TokenLayout) -> list[int]:
        budgets = super().tile_budgets(layout)
        if not self.additive:
            return budgets
        counts = layout.candidate_counts or layout.sizes
        return [
            min(budget + extra, max(1, count)) for budget, extra, count in zip(budgets, self._extra(layout), counts)
        ]

    def _extra(self, layout: TokenLayout) -> list[int]:
        """Of each tile how many tokens are chosen by text, if there is any."""
        return [round(self.text_budget * budget) for budget in super().tile_budgets(layout)]

    def select(self, seen: Seen) -> Picks:
        layout, totals = seen.layout, self.tile_budgets(seen.layout)
        relevances = [
            relevance(seen, image, tokens, self.text_encoder, cosine_with_mean)
            for image, (_, tokens) in enumerate(layout.images())
        ]
        own = super().tile_budgets(layout)
        if not self.additive:
            own = [max(1, total - few) for total, few in zip(totals, self._extra(layout))]
        budgets = []
        for (tiles, _), likeness in zip(layout.images(), relevances):
            budgets += totals[tiles] if likeness is None else own[tiles]
        first = self._select(seen, budgets)
        likeness = torch.cat(
            [
                torch.zeros(tokens.stop - tokens.start, device=seen.device) if found is None else found.float()
                for (_, tokens), found in zip(layout.images(), relevances)
            ]
        )
        kept = (first.roles > 0).float()
        likeness = likeness.nan_to_num(nan=-2.0) + 4 * kept  # cosines are at most 1: what is kept stays
        picks = best_of_tiles(likeness, layout, totals)
        text = (picks.roles > 0) & (first.roles == 0)
        roles = torch.where(text, _TEXT, first.roles).to(torch.uint8)
        without = [found is None for found, tiles in zip(relevances, layout.tiles) for _ in range(tiles)]
        token, row, row_of_first = 0, 0, 0
        for size, total, budget, alone in zip(layout.sizes, totals, budgets, without):
            here = slice(token, token + size)
            if total == size:  # what loses nothing has the last role, whatever the other tiles lose
                roles[here] = _TEXT
            elif alone:  # which may leave some of its budget
                roles[here] = first.roles[here]
                picks.indices[row : row + total] = first.indices[row_of_first : row_of_first + total]
            token, row, row_of_first = token + size, row + total, row_of_first + budget
        fills = picks.fills or (first.fills and any(without))
        return picks._replace(roles=roles, fills=fills, notes=notes_of(relevances, "HiPrune alone"))
