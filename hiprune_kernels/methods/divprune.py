"""DivPrune: tokens that differ most from one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..facts import EncoderFacts
from .base import Method, Needs, Picks, Seen, TokenLayout, candidates_of_images, image_budgets, picks_of


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
        layout, chosen = seen.layout, []
        for candidates, count in zip(candidates_of_images(seen), self.kept(layout)):
            chosen.append(candidates[farthest_points(seen.features[candidates], count)])
        return picks_of(torch.cat(chosen), layout)


def farthest_points(features: Tensor, count: int) -> Tensor:
    """`count` of the rows of features [N, C] by farthest-point sampling on 1 - cosine, in the order of choice."""
    features = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    distances = 1 - features @ features.T  # [N, N]
    distances = torch.minimum(distances, distances.T)  # the product of few rows may round otherwise than its mirror
    nearest_other = distances.clone().fill_diagonal_(torch.inf).amin(dim=1)
    least, chosen = distances.new_full((len(features),), torch.inf), [nearest_other.argmax()]
    for _ in range(count - 1):
        least = torch.minimum(least, distances[chosen[-1]])
        least[chosen[-1]] = -torch.inf
        chosen.append(least.argmax())
    return torch.stack(chosen)
