"""FastV: the tokens that the prompt's last row attends to in an early decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..budget import check_int
from ..facts import EncoderFacts
from .base import Method, Needs, Picks, Seen, TokenLayout, best_of_images, check_decoder_layer, image_budgets


@dataclass(frozen=True, kw_only=True)
class FastV(Method):
    """FastV (Chen et al., ECCV 2024): of each image the tokens with the most attention of the prompt's last row.

    The attention is that of a decoder layer, mean over heads, softmax over all keys. What is kept is what the released
    code keeps, and position ids stay the original ones. The released code drops tokens behind that layer; layers up to
    it see all of them, and their cache is longer. Here they are dropped in front of the language model, whose first
    layers run once more for the attention. So answers may differ, and the cache of every layer is short.

    Attributes:
        budget, retention: exactly one of them: visual tokens kept per image, or the share of them.
        layer: 1-based decoder layer; None takes layer 2, or the next one that has softmax attention.

    Example:
        >>> FastV(budget=144).original_positions
        True
    """

    layer: int | None = None

    whole_images: ClassVar[bool] = True
    original_positions: ClassVar[bool] = True
    guaranteed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.layer is not None:
            check_int("layer", self.layer)
        super().__post_init__()

    def needs(self, encoder: EncoderFacts) -> Needs:
        if self.layer is not None:
            check_decoder_layer("layer", self.layer, encoder)
        return Needs(text_attention=(self.layer or encoder.attention_layer(2), "last"))

    def kept(self, layout: TokenLayout) -> list[int]:
        return image_budgets(self, layout)

    def select(self, seen: Seen) -> Picks:
        return best_of_images(seen.text_scores, seen.layout, self.kept(seen.layout))
