"""DivPrune: tokens that differ most from one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .. import ops
from ..facts import EncoderFacts
from .base import Method, Needs, Picks, Seen, TokenLayout, image_budgets, picks_of


@dataclass(frozen=True, kw_only=True)
class DivPrune(Method):
    """DivPrune (Alvar et al., CVPR 2025): of each image the tokens whose least distance to one another is large.

    Features are the language model's input embeddings of the tokens, distances 1 - cosine. The first token is the one
    whose nearest other token is farthest away; then, again and again, the one that is farthest from the chosen ones
    (farthest-point sampling). The lowest index wins ties, and no token is chosen twice. An image's tiles are one set of
    tokens. Newlines of LLaVA-NeXT stay besides; in the released code they are candidates like tokens.

    Attributes:
        budget, retention: exactly one of them: visual tokens kept per image, or the share of them.

    Example:
        >>> angles = torch.tensor([0.0, 10.0, 90.0, 180.0]).deg2rad()
        >>> farthest_points(torch.stack([angles.cos(), angles.sin()], dim=1), 3)
        tensor([3, 0, 2])
    """

    whole_images: ClassVar[bool] = True
    guaranteed: ClassVar[bool] = True

    def needs(self, encoder: EncoderFacts) -> Needs:
        return Needs(features="language")

    def kept(self, layout: TokenLayout) -> list[int]:
        return image_budgets(self, layout)

    def select(self, seen: Seen) -> Picks:
        layout, kept = seen.layout, self.kept(seen.layout)
        indices, _ = ops.select_diverse_varlen(
            seen.features,
            sizes=[tokens.stop - tokens.start for _, tokens in layout.images()],
            counts=kept,
            candidate_mask=None if layout.candidates is None else layout.candidates.to(seen.device),
        )
        return picks_of(indices, layout, kept)


def farthest_points(features: Tensor, count: int) -> Tensor:
    """`count` of the rows of features [N, C] by farthest-point sampling on 1 - cosine, in the order of choice."""
    return ops.select_diverse(features[None], count=count)[1][0]
