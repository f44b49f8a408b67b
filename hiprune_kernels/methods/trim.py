"""TRIM: tokens that are like the question, in CLIP's space, and one that stands for all others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..facts import EncoderFacts
from .base import Method, Needs, Picks, Seen, TokenLayout, best_first, candidates_of_images, image_budgets, picks_of
from .text import ClipText, check_text_encoder, check_tower, notes_of, relevance

_MEAN, _LIKE = 1, 2


@dataclass(frozen=True, kw_only=True)
class TRIM(Method):
    """TRIM (Song et al., COLING 2025): N' - 1 tokens of an image by text, and the mean of all others.

    A token's relevance is minus the dot product of patch and text in CLIP's space, neither normalised; the sign is as
    in the released code. One row more, the last, is the mean of the rows that were dropped, in front of the projector.
    Without text in the prompt the first tokens stay. Text beyond 77 tokens is cut off, as released.

    Attributes:
        budget, retention: exactly one of them: rows kept per image, the mean counted, or k, for ``int(k N) + 1`` rows.
        text_encoder: the CLIP text tower that belongs to the vision tower, see `ClipText`; it must be given.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """

    text_encoder: ClipText | None = None

    roles: ClassVar[tuple[str, ...]] = ("mean of the others", "like the text")
    merged_roles: ClassVar[tuple[str, ...]] = ("mean of the others",)
    whole_images: ClassVar[bool] = True
    guaranteed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_text_encoder(self.text_encoder)
        if self.text_encoder is None:
            raise ValueError("text_encoder: expected a ClipText, as TRIM compares patches with text in CLIP's space")

    def needs(self, encoder: EncoderFacts) -> Needs:
        check_tower(self.text_encoder, encoder)
        return Needs(features="encoder", text=True)

    def kept(self, layout: TokenLayout) -> list[int]:
        if self.retention is None:
            return image_budgets(self, layout)
        counts = layout.candidate_counts or layout.sizes
        totals = (sum(counts[tiles]) for tiles, _ in layout.images())
        return [min(int(self.retention * total) + 1, total) for total in totals]

    def select(self, seen: Seen) -> Picks:
        layout, found = seen.layout, []
        scores = torch.zeros(sum(layout.sizes), device=seen.device)
        for image, (_, tokens) in enumerate(layout.images()):
            found.append(relevance(seen, image, tokens, self.text_encoder, _dot_products, truncated=True))
            if found[-1] is not None:
                scores[tokens] = found[-1]
        kept, own = self.kept(layout), candidates_of_images(seen)
        roles = torch.zeros(len(scores), dtype=torch.uint8, device=seen.device)
        for here, count in zip(own, kept):
            best = here[best_first(scores[here])[: count - (count < len(here))]]
            roles[best] = _LIKE
            roles[here[roles[here] == 0][: count - len(best)]] = _MEAN  # some place is needed for the row
        picks = picks_of(roles.nonzero()[:, 0], layout)
        return picks._replace(roles=roles, notes=notes_of(found, "the first tokens stay"))

    def merge(self, features: Tensor, seen: Seen, picks: Picks) -> Tensor:
        merged = features.clone()
        for here in candidates_of_images(seen):
            roles = picks.roles[here]
            if bool((roles == _MEAN).any()):
                mean = features[here[roles != _LIKE]].float().mean(dim=0, keepdim=True).to(features.dtype)
                merged[here[roles > 0]] = torch.cat([features[here[roles == _LIKE]], mean])
        return merged


def _dot_products(tokens: Tensor, text: Tensor) -> Tensor:
    return tokens @ text[0]
