"""VisionZip: dominant tokens, and the others merged into contextual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..budget import check_share
from ..facts import EncoderFacts
from .base import Method, Needs, Picks, Seen, best_first, cls_queries, no_cls_note, picks_of_tiles, tokens_of_tiles

_CLS, _CONTEXTUAL, _DOMINANT = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class VisionZip(Method):
    """VisionZip (Yang et al., CVPR 2025): in each tile the tokens that the CLS token attends to, and merged ones.

    *Dominant* tokens have the most attention of the CLS token in the feature layer. Of the U others, as they follow,
    every ``max(1, U // c)``-th is a target, until there are c. Each that is left goes to the target with the largest
    cosine of keys, the first of equals. A *contextual* token is its target plus the mean of those that went to it.

    Where the encoder has a CLS token and each token is one of its rows (LLaVA), the CLS row itself is kept, as in the
    released code: it counts as one of the dominant ones, and a tile's rows are CLS, dominant and contextual ones, these
    ascending, at the places of the picked tokens and of one more. Elsewhere contextual tokens stand at their targets'
    places, and where several rows make a token (Qwen-VL, InternVL) they are merged in the language model's space. Tiles
    that lose nothing stay as they are. Newlines of LLaVA-NeXT stay and padding is left out; the released code drops the
    former and keeps the latter. Where a model keeps CLS rows in the prompt by itself (Video-LLaVA's frames), they stand
    there besides.

    Attributes:
        budget, retention: exactly one of them: rows kept per image, shared out among its tiles, or the share.
        contextual_share: share of the budget for contextual tokens, rounded, 0 to below 1; of 64 released runs have 10.

    Example:
        >>> VisionZip(budget=64).roles
        ('CLS', 'contextual', 'dominant')
    """

    contextual_share: float = 10 / 64

    roles: ClassVar[tuple[str, ...]] = ("CLS", "contextual", "dominant")
    merged_roles: ClassVar[tuple[str, ...]] = ("CLS", "contextual")
    guaranteed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_share("contextual_share", self.contextual_share)
        if self.contextual_share == 1:
            raise ValueError("contextual_share: expected a share below 1, got 1")
        super().__post_init__()

    def needs(self, encoder: EncoderFacts) -> Needs:
        return Needs(
            scores={encoder.feature_layer: cls_queries(encoder)},
            keys=True,
            features="language" if encoder.kind.merges_rows else "encoder",
            region_features=encoder.feature_layer if self._keeps_cls(encoder) else None,
        )

    def _keeps_cls(self, encoder: EncoderFacts) -> bool:
        return encoder.has_cls and not encoder.kind.merges_rows

    def _has_cls_rows(self, seen: Seen) -> bool:
        return self._keeps_cls(seen.encoder) and seen.layout.pool is None

    def _contextual(self, budget: int, size: int) -> int:
        """How many contextual tokens a tile of so many tokens has."""
        return 0 if budget >= size else min(round(self.contextual_share * budget), budget - 1)

    def select(self, seen: Seen) -> Picks:
        layout, budgets = seen.layout, self.tile_budgets(seen.layout)
        (scores,) = seen.scores.values()
        roles = torch.zeros(len(scores), dtype=torch.uint8, device=seen.device)
        chosen, cls = [], self._has_cls_rows(seen)
        for own, budget in zip(tokens_of_tiles(seen), budgets):
            if budget >= len(own):
                roles[own] = _DOMINANT
            else:
                contextual = self._contextual(budget, len(own))
                dominant = own[best_first(scores[own])[: budget - contextual - cls]]
                roles[dominant] = _DOMINANT
                others = own[roles[own] == 0]
                targets = others[:: max(1, len(others) // max(contextual, 1))][:contextual]
                roles[targets] = _CONTEXTUAL
                if cls:
                    roles[others[roles[others] == 0][:1]] = _CLS
            chosen.append(own[roles[own] > 0])
        note = "the CLS row is kept" if cls else no_cls_note(seen.encoder)
        picks = picks_of_tiles(chosen, budgets, layout, seen.device)
        return picks._replace(roles=roles, notes=[note] * len(layout.tiles))

    def merge(self, features: Tensor, seen: Seen, picks: Picks) -> Tensor:
        layout, roles = seen.layout, picks.roles
        sources = (roles == 0) | (roles == _CLS)
        if layout.candidates is not None:
            sources &= layout.candidates.to(seen.device)
        sizes, budgets = layout.candidate_counts or layout.sizes, self.tile_budgets(layout)
        merged, _ = ops.merge_tokens_varlen(
            features,
            seen.keys,
            (roles == _CONTEXTUAL).nonzero()[:, 0],
            sources,
            sizes=layout.sizes,
            counts=[self._contextual(budget, size) for budget, size in zip(budgets, sizes)],
        )
        if not self._has_cls_rows(seen):
            return merged
        for tile, own in enumerate(tokens_of_tiles(seen)):
            own_roles = roles[own]
            if bool((own_roles == _CLS).any()):
                first = seen.regions[tile][None].to(features.dtype)
                rows = [first, merged[own[own_roles == _DOMINANT]], merged[own[own_roles == _CONTEXTUAL]]]
                merged[own[own_roles > 0]] = torch.cat(rows)
        return merged
