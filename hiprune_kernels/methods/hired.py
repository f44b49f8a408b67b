"""HiRED: budgets for an image's tiles by what the thumbnail's early layer attends to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..budget import check_share
from ..facts import EncoderFacts
from .base import (
    Method,
    Needs,
    Picks,
    Seen,
    TokenLayout,
    areas_of_tiles,
    best_first,
    best_of_shares,
    cls_queries,
    image_budgets,
    no_cls_note,
    shared_budgets,
)


@dataclass(frozen=True, kw_only=True)
class HiRED(Method):
    """HiRED (Arif et al., AAAI 2025), for images that are cut into a thumbnail and sub-images.

    The thumbnail keeps ``int(N' alpha)`` tokens. The rest goes to the sub-images by the attention that the thumbnail's
    CLS token pays, in layer 1, to their areas. In each, the tokens with the most attention of its own CLS token in the
    feature layer stay. An image of one tile keeps its N' best. Budgets of tiles are data, and stay on the device. An
    area whose attention is not a number gets nothing; tokens without a number come last.

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
        layout, kept = seen.layout, self.kept(seen.layout)
        budgets = self._tile_budgets(seen, kept)
        picks = best_of_shares(seen.scores[seen.encoder.feature_layer], layout, kept, budgets)
        tiled = any(layout.tiles_beside_thumbnail(tiles) for tiles, _ in layout.images())
        if self.rule == "official" and tiled:  # fewer than `kept` may stay
            ends = [tiles.stop - 1 for tiles, _ in layout.images()]
            parts = budgets.split(list(layout.tiles))
            lost = [total - part.sum() for part, total in zip(parts, kept)]
            counts = budgets.index_add(0, torch.tensor(ends, device=seen.device), torch.stack(lost))
            picks = picks._replace(counts=counts, fills=True)
        return picks._replace(notes=[no_cls_note(seen.encoder)] * len(layout.tiles))

    def _tile_budgets(self, seen: Seen, kept: Sequence[int]) -> Tensor:
        """How many tokens of each tile stay, [R]: of the thumbnail from sizes, of the others by their weights."""
        layout = seen.layout
        caps, thumbnails, weights = list(layout.candidate_counts or layout.sizes), [], []
        for image, ((tiles, _), total) in enumerate(zip(layout.images(), kept)):
            places = layout.tiles_beside_thumbnail(tiles)
            if layout.thumbnail is None or not places:
                thumbnails.append(total)
                continue
            whole = tiles.start + layout.thumbnail % (len(places) + 1)
            first = sum(layout.sizes[:whole])
            scores = seen.scores[1][first : first + layout.sizes[whole]].double()
            thumbnail, room = min(int(total * self.alpha), caps[whole]), sum(caps[place] for place in places)
            if self.rule == "official":
                weights.append(self._bands(scores, len(places)))
            else:
                thumbnail = max(thumbnail, total - room)
                weights.append(self._rectangles(seen, image, scores.view(layout.grids[whole])))
            thumbnails.append(thumbnail)
        share = _rounded_down if self.rule == "official" else ops.shares
        return shared_budgets(seen, kept, thumbnails, weights, share)

    def _bands(self, scores: Tensor, count: int) -> Tensor:
        """[count] float64: how many of the thumbnail's hot tokens are in each band of its raster order."""
        band = max(1, len(scores) // count)
        hot = scores.new_zeros(max(len(scores), count * band))
        hot[best_first(scores)[: int(len(scores) * (1 - self.alpha))]] = 1
        return hot[: count * band].view(count, band).sum(dim=1)

    def _rectangles(self, seen: Seen, image: int, scores: Tensor) -> Tensor:
        layout = seen.layout
        if layout.encoder_tiles and layout.encoder_tiles[image] != layout.tiles[image]:
            return scores.new_ones(1)  # the sub-images are mixed into one
        assert layout.tile_grids is not None  # or `needs` has refused the model
        return areas_of_tiles(scores, layout.tile_grids[image])


def _rounded_down(weights: Tensor, totals: Sequence[int], caps: Sequence[int], *, tiles: Sequence[int]) -> Tensor:
    """Each image's total shared out by weights, and rounded down, as the released code does: [R] int64."""
    parts = [(part / part.sum().clamp(min=1) * total).long() for part, total in zip(weights.split(list(tiles)), totals)]
    return torch.cat(parts).minimum(torch.tensor(list(caps), device=weights.device))
