"""PTP: budgets for an image's regions, saliency of tokens, and what the instruction asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import check_int, check_share
from ..facts import EncoderFacts
from .base import (
    Method,
    Needs,
    Picks,
    Seen,
    TokenLayout,
    areas_of_tiles,
    best_of_shares,
    check_decoder_layer,
    check_encoder_layer,
    cls_queries,
    image_budgets,
    no_cls_note,
    shared_budgets,
)


@dataclass(frozen=True, kw_only=True)
class PTP(Method):
    """Pyramid Token Pruning (Liang et al., arXiv 2509.15704), for images that are cut into a thumbnail and sub-images.

    1. *Token:* the saliency b of a token is the CLS token's attention to it in the saliency layer, mean over heads.
    2. *Region:* the weight of a sub-image is ``softmax(s_r / temperature)``, s_r the cosine of its CLS row with the
       thumbnail's. The thumbnail keeps its even share of the budget N'; the sub-images get the rest by `budget.shares`.
    3. *Instruction:* the importance c of a token is the attention of the text behind the image to it in a decoder
       layer, mean over heads, then the largest over the text's rows.
    4. ``f = (1 - alpha) minmax(b) + alpha minmax(c)`` over the image's tokens; each region keeps its best by f.

    Exactly N' tokens stay. Images of one region skip step 2. With ``alpha=0`` everything happens inside the encoder,
    which computes the kept tokens only; otherwise all tokens go through the language model's first layers once. A
    sub-image whose weight is not a number has weight 0; tokens without a number come last.

    No code of the authors is public. Not settled by the paper's public texts, and so our readings or options: the
    numbering of layers (from 1), the region formula (that of the same group's HERO, arXiv 2509.13067), its temperature,
    the scaling of c, and the decoder layer. Encoders without a CLS token take the mean over all queries, and of a
    region's rows.

    Attributes:
        budget, retention: exactly one of them: visual tokens kept per image, or the share of them.
        alpha: weight of the instruction, 0 to 1.
        saliency_layer: 1-based encoder layer; None takes layer 11 of 24, scaled to other depths.
        region: "features" (step 2), or "attention": a sub-image's weight is the thumbnail's CLS attention to its area,
            for models that tell where their tiles lie (not InternVL).
        region_layer: 1-based encoder layer of the CLS rows; None takes the feature layer.
        temperature: of step 2, above 0.
        instruction_layer: 1-based decoder layer; None takes layer 2, or the next one that has softmax attention.
        scale_instruction: whether c is brought to 0..1 as b is; without, attention of some thousandths hardly counts.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> PTP(budget=640).kept(TokenLayout(grids=((24, 24),) * 5, tiles=(5,), thumbnail=0))
        [640]
    """

    alpha: float = 0.5
    saliency_layer: int | None = None
    region: str = "features"
    region_layer: int | None = None
    temperature: float = 1.0
    instruction_layer: int | None = None
    scale_instruction: bool = True

    whole_images: ClassVar[bool] = True
    guaranteed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("alpha", self.alpha)
        if self.region not in ("features", "attention"):
            raise ValueError(f'region: expected "features" or "attention", got {self.region!r}')
        if isinstance(self.temperature, bool) or not isinstance(self.temperature, (int, float)):
            raise TypeError(f"temperature: expected a float, got {type(self.temperature).__name__}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature: expected a number above 0, got {self.temperature!r}")
        for name in ("saliency_layer", "region_layer", "instruction_layer"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name))
        if type(self.scale_instruction) is not bool:
            raise TypeError(f"scale_instruction: expected a bool, got {type(self.scale_instruction).__name__}")
        super().__post_init__()

    def needs(self, encoder: EncoderFacts) -> Needs:
        for name in ("saliency_layer", "region_layer"):
            if getattr(self, name) is not None:
                check_encoder_layer(name, getattr(self, name), encoder)
        if self.instruction_layer is not None:
            check_decoder_layer("instruction_layer", self.instruction_layer, encoder)
        queries, region_layer = cls_queries(encoder), None
        scores = {self._saliency_layer(encoder): queries}
        if encoder.tiled and self.region == "attention":
            if not encoder.places_tiles:
                raise ValueError(
                    f'region: expected "features", as {encoder.name} does not tell where tiles lie, got "attention"'
                )
            scores[encoder.feature_layer] = queries
        elif encoder.tiled:
            region_layer = self.region_layer or encoder.feature_layer
        layer = self.instruction_layer or encoder.attention_layer(2)
        text = (layer, "max") if self.alpha > 0 else None
        return Needs(scores=scores, region_features=region_layer, text_attention=text)

    def kept(self, layout: TokenLayout) -> list[int]:
        return image_budgets(self, layout)

    def select(self, seen: Seen) -> Picks:
        layout, encoder = seen.layout, seen.encoder
        saliency = seen.scores[self._saliency_layer(encoder)]
        fused, notes = torch.zeros_like(saliency), []
        for tiles, tokens in layout.images():
            here = torch.arange(tokens.start, tokens.stop)
            if layout.candidates is not None:
                here = here[layout.candidates[tokens]]
            here = here.to(seen.device)
            fused[here] = _minmax(saliency[here])
            note = [no_cls_note(encoder)] + ["one region"] * (tiles.stop - tiles.start == 1)
            importance = None if seen.text_scores is None else seen.text_scores[here]
            if importance is not None and bool(importance.any()):
                importance = _minmax(importance) if self.scale_instruction else importance
                fused[here] = (1 - self.alpha) * fused[here] + self.alpha * importance
            elif importance is not None:
                note.append("no text behind the image: saliency alone")
            notes.append("; ".join(filter(None, note)))
        kept = self.kept(layout)
        return best_of_shares(fused, layout, kept, self._region_budgets(seen, kept))._replace(notes=notes)

    def _saliency_layer(self, encoder: EncoderFacts) -> int:
        return self.saliency_layer or min(max(1, round(11 / 24 * encoder.depth)), encoder.feature_layer)

    def _region_budgets(self, seen: Seen, kept: Sequence[int]) -> Tensor:
        """How many tokens of each tile stay, [R]: of the thumbnail from sizes, of the others by their weights."""
        layout = seen.layout
        sizes, caps = layout.sizes, list(layout.candidate_counts or layout.sizes)
        thumbnails, weights, row = [], [], 0
        for image, ((tiles, tokens), total) in enumerate(zip(layout.images(), kept)):
            rows = slice(row, row + (layout.encoder_tiles or layout.tiles)[image])
            row = rows.stop
            places = layout.tiles_beside_thumbnail(tiles)
            if layout.thumbnail is None or not places:
                thumbnails.append(total)
                continue
            whole = tiles.start + layout.thumbnail % (len(places) + 1)
            room = sum(caps[place] for place in places)
            even = total * sizes[whole] // (tokens.stop - tokens.start)
            thumbnails.append(max(min(even, caps[whole]), total - room))
            if len(places) == 1:  # it has them all, also where sub-images are mixed into one region
                weights.append(torch.ones(1, dtype=torch.float64, device=seen.device))
            elif self.region == "features":
                weights.append(self._likeness(seen.regions[rows], layout.thumbnail))
            else:
                weights.append(self._attention_weights(seen, image, whole))
        return shared_budgets(seen, kept, thumbnails, weights)

    def _likeness(self, states: Tensor, thumbnail: int) -> Tensor:
        """Weights [R - 1] of an image's sub-images, by the cosines of their rows [R, C] with the thumbnail's."""
        states, whole = states.double(), thumbnail % len(states)
        likeness = F.cosine_similarity(states, states[whole][None], dim=1) / self.temperature
        likeness = torch.cat([likeness[:whole], likeness[whole + 1 :]])
        return likeness.masked_fill(likeness.isnan(), -math.inf).softmax(dim=0)

    def _attention_weights(self, seen: Seen, image: int, whole: int) -> Tensor:
        """The thumbnail's attention to the areas of the sub-images."""
        layout = seen.layout
        assert layout.tile_grids is not None  # or `needs` has refused the model
        first = sum(layout.sizes[:whole])
        scores = seen.scores[seen.encoder.feature_layer][first : first + layout.sizes[whole]].double()
        return areas_of_tiles(scores.view(layout.grids[whole]), layout.tile_grids[image])


def _minmax(values: Tensor) -> Tensor:
    """Brought to 0..1; 0 where all are equal. NaN stays NaN, and is left out of account."""
    number = ~values.isnan()
    low, high = values.where(number, math.inf).min(), values.where(number, -math.inf).max()
    return torch.where(high > low, (values - low) / (high - low), 0.0)
