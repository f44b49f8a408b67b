"""VisPruner: important tokens, and others that are unlike one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import check_share
from ..facts import EncoderFacts
from .base import Method, Needs, Picks, Seen, best_first, cls_queries, no_cls_note, picks_of_tiles, tokens_of_tiles

_AT_ONCE = 8  # tokens that a round of thinning removes at most


@dataclass(frozen=True, kw_only=True)
class VisPruner(Method):
    """VisPruner (Zhang et al., ICCV 2025): in each tile important tokens, and diverse ones among the rest.

    ``int(T important_share)`` of a tile's T tokens are those with the most attention of the CLS token in the feature
    layer. The rest, in descending order of attention, is thinned, by features in front of the projector. Of the tokens
    at even places those go, at most 8, that are most like one at an odd place. The surviving ones, the likest first,
    and then those at odd places are the new list; and so on, until T are left.

    Attributes:
        budget, retention: exactly one of them: visual tokens kept per image, shared out among its tiles, or the share.
        important_share: share of the budget for important tokens, 0 to 1.

    Example:
        >>> VisPruner(budget=128).roles
        ('important', 'diverse')
    """

    important_share: float = 0.5

    roles: ClassVar[tuple[str, ...]] = ("important", "diverse")
    guaranteed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("important_share", self.important_share)
        super().__post_init__()

    def needs(self, encoder: EncoderFacts) -> Needs:
        return Needs(scores={encoder.feature_layer: cls_queries(encoder)}, features="encoder")

    def select(self, seen: Seen) -> Picks:
        layout, budgets = seen.layout, self.tile_budgets(seen.layout)
        (scores,) = seen.scores.values()
        roles, chosen = torch.zeros(len(scores), dtype=torch.uint8, device=seen.device), []
        for own, budget in zip(tokens_of_tiles(seen), budgets):
            budget = min(budget, len(own))
            ranked = own[best_first(scores[own])]
            important = int(budget * self.important_share) if budget < len(own) else 0
            diverse = thinned(ranked[important:], seen.features, budget - important)
            roles[diverse], roles[ranked[:important]] = 2, 1
            chosen.append(torch.cat([ranked[:important], diverse]).sort().values)
        picks = picks_of_tiles(chosen, budgets, layout, seen.device)
        return picks._replace(roles=roles, notes=[no_cls_note(seen.encoder)] * len(layout.tiles))


def thinned(tokens: Tensor, features: Tensor, count: int) -> Tensor:
    """`count` of tokens [R], which come in descending order of attention, by features [T, C]."""
    features = F.normalize(features.float(), dim=-1)
    while len(tokens) > count:
        even, odd = tokens[0::2], tokens[1::2]
        if len(odd) == 0:  # one token, and none is wanted
            return tokens[:0]
        likest = (features[even] @ features[odd].T).amax(dim=1)
        order = best_first(likest)
        gone = min(_AT_ONCE, len(tokens) - count, len(even))
        tokens = torch.cat([even[order[gone:]], odd])
    return tokens
