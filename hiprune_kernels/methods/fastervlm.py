"""FasterVLM: the tokens that the CLS token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..facts import EncoderFacts
from .base import Method, Needs, Picks, Seen, best_of_tiles, cls_queries, no_cls_note


@dataclass(frozen=True, kw_only=True)
class FasterVLM(Method):
    """FasterVLM (Zhang et al., arXiv 2412.01818): in each tile the tokens with the most attention of the CLS token.

    The attention is the feature layer's, averaged over heads. Encoders without a CLS token are scored by the mean over
    all queries, as the authors' later work does for SigLIP. Newlines of LLaVA-NeXT stay; the released code takes them
    out.

    Attributes:
        budget, retention: exactly one of them: visual tokens kept per image, shared out among its tiles, or the share.

    Example:
        >>> FasterVLM(budget=144).roles
        ('kept',)
    """

    guaranteed: ClassVar[bool] = True

    def needs(self, encoder: EncoderFacts) -> Needs:
        return Needs(scores={encoder.feature_layer: cls_queries(encoder)})

    def select(self, seen: Seen) -> Picks:
        (scores,) = seen.scores.values()
        picks = best_of_tiles(scores, seen.layout, self.tile_budgets(seen.layout))
        return picks._replace(notes=[no_cls_note(seen.encoder)] * len(seen.layout.tiles))
