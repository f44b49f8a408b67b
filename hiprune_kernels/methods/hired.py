"""HiRED: budgets for an image's tiles by what the thumbnail's early layer attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import check_share, shares
from ..facts import EncoderFacts
from .base import (
    Method,
    Needs,
    Picks,
    Seen,
    TokenLayout,
    areas_of_tiles,
    best_first,
    best_of_tiles,
    cls_queries,
    image_budgets,
    no_cls_note,
)


@dataclass(frozen=True, kw_only=True)
class HiRED(Method):
    """HiRED (Arif et al., AAAI 2025), for images that are cut into a thumbnail and sub-images.

    The thumbnail keeps ``int(N' alpha)`` tokens. The rest goes to the sub-images by the attention that the thumbnail's
    CLS token pays, in layer 1, to their areas. In each, the tokens with the most attention of its own CLS token in the
    feature layer stay. An image of one tile keeps its N' best. Budgets of tiles follow from data: the host waits.

    Rules: "paper" sums the attention over the sub-images' rectangles, and shares the budget to the last token
    (`budget.shares`); it needs a model that tells where its tiles lie, as InternVL does not. "official" does as the
    released code: it counts the ``int(n (1 - alpha))`` tokens with the most attention in as many bands of the raster
    order as there are sub-images, and rounds down: fewer than N' may stay.

    Attributes:
        budget, retention: exactly one of them: visual tokens kept per image, or the share of them.
        alpha: the thumbnail's share, 0 to 1.
        rule: "paper" or "official".

    Example:
        >>> HiRED(retention=0.2).alpha
        0.5
    """

    alpha: float = 0.5
    rule: str = "paper"

    whole_images: ClassVar[bool] = True
    guaranteed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("alpha", self.alpha)
        if self.rule not in ("paper", "official"):
            raise ValueError(f'rule: expected "paper" or "official", got {self.rule!r}')
        super().__post_init__()

    def needs(self, encoder: EncoderFacts) -> Needs:
        if not encoder.has_cls and not encoder.tiled:
            raise ValueError(f"HiRED: expected an encoder with a CLS token, or tiles, got {encoder.name}")
        if self.rule == "paper" and encoder.tiled and not encoder.places_tiles:
            raise ValueError(f'rule: expected "official", as {encoder.name} does not tell where tiles lie, got "paper"')
        queries = cls_queries(encoder)
        return Needs(scores={encoder.feature_layer: queries} | ({1: queries} if encoder.tiled else {}))

    def kept(self, layout: TokenLayout) -> list[int]:
        return image_budgets(self, layout)

    def select(self, seen: Seen) -> Picks:
        layout = seen.layout
        budgets, kept = self._tile_budgets(seen), self.kept(layout)
        picks = best_of_tiles(seen.scores[seen.encoder.feature_layer], layout, budgets)
        lost = [total - sum(budgets[tiles]) for (tiles, _), total in zip(layout.images(), kept)]
        picks = picks._replace(notes=[no_cls_note(seen.encoder)] * len(layout.tiles))
        return _filled(picks, layout, lost) if any(lost) else picks

    def _tile_budgets(self, seen: Seen) -> list[int]:
        layout = seen.layout
        sizes, caps, budgets = layout.sizes, list(layout.candidate_counts or layout.sizes), []
        for image, ((tiles, tokens), total) in enumerate(zip(layout.images(), self.kept(layout))):
            size, cap = sizes[tiles], caps[tiles]
            if len(size) == 1 or layout.thumbnail is None:
                budgets += shares(size, total, cap)
                continue
            whole = layout.thumbnail % len(size)
            others = [i for i in range(len(size)) if i != whole]
            own = [0] * len(size)
            own[whole] = min(int(total * self.alpha), cap[whole])
            rest, room = total - own[whole], [cap[i] for i in others]
            first = tokens.start + sum(size[:whole])
            scores = seen.scores[1][first : first + size[whole]].double()
            if self.rule == "official":
                weights = self._bands(scores, len(others))
                found = [min(int(weight / max(sum(weights), 1) * rest), most) for weight, most in zip(weights, room)]
            else:
                own[whole] = max(own[whole], total - sum(room))
                rest = total - own[whole]
                found = shares(self._rectangles(seen, image, scores.view(layout.grids[tiles][whole])), rest, room)
            for i, budget in zip(others, found):
                own[i] = budget
            budgets += own
        return budgets

    def _bands(self, scores: Tensor, count: int) -> list[int]:
        """How many of the thumbnail's hot tokens are in each band of its raster order."""
        hot = torch.zeros(len(scores), dtype=torch.long, device=scores.device)
        hot[best_first(scores)[: int(len(scores) * (1 - self.alpha))]] = 1
        band = max(1, len(scores) // count)
        return [int(part.sum()) for part in hot.split(band)][:count]

    def _rectangles(self, seen: Seen, image: int, scores: Tensor) -> list[float]:
        layout = seen.layout
        if layout.encoder_tiles and layout.encoder_tiles[image] != layout.tiles[image]:
            return [1.0]  # the sub-images are mixed into one
        assert layout.tile_grids is not None  # or `needs` has refused the model
        return areas_of_tiles(scores, layout.tile_grids[image]).tolist()


def _filled(picks: Picks, layout: TokenLayout, lost: list[int]) -> Picks:
    """Picks with so many -1 at the end of each image's share."""
    counts, parts, row = list(picks.counts), [], 0
    for (tiles, _), missing in zip(layout.images(), lost):
        size = sum(counts[tiles])
        parts += [picks.indices[row : row + size], picks.indices.new_full((missing,), -1)]
        row += size
        counts[tiles.stop - 1] += missing
    return picks._replace(indices=torch.cat(parts), counts=counts, fills=True)
