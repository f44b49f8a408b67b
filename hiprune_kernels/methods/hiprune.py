"""HiPrune: anchors and their neighbours from an object layer's attention, registers from the feature layer's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import ops
from ..budget import ROLE_NAMES, check_selection_options
from ..facts import EncoderFacts
from .base import Method, Needs, Picks, Seen
from .calibrated import CalibratedLayer, calibrated_layer

_REGISTER = 1 + ROLE_NAMES.index("register")


@dataclass(frozen=True, kw_only=True)
class HiPrune(Method):
    """HiPrune (Algorithm 1): anchors, buffers and registers.

    Attributes:
        budget, retention: exactly one of them: visual tokens kept per image (or video; `hiprune info --models` says
            what of), or the share of them. A budget that reaches the number of tokens leaves the forward stock.
        alpha: share of the budget spent on anchors and buffers (Eq. 3).
        object_layer: 1-based layer whose scores choose the anchors, or the file of `hiprune calibrate` that proposes
            it; None takes the family's (CLIP: 9 of 24, scaled to other depths by ``round(9 / 24 * depth)``; Qwen-VL:
            half the depth).
        rule: "paper", "official" (the authors' released code for this family) or "grid".
        neighborhood: "cross", "square", "row" or "none".
        score_queries: "all" (Eq. 2) or "cls": which queries' attention counts.
        keep_roles: which of "anchor", "buffer", "register" are kept (table 5 of the paper).

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Example:
        >>> HiPrune(budget=192).roles
        ('anchor', 'buffer', 'register')
    """

    alpha: float = 0.1
    object_layer: int | str | os.PathLike[str] | None = None
    rule: str = "paper"
    neighborhood: str = "cross"
    score_queries: str = "all"
    keep_roles: Sequence[str] = ROLE_NAMES

    roles: ClassVar[tuple[str, ...]] = ROLE_NAMES
    guaranteed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_selection_options(self.alpha, self.rule, self.neighborhood, self.keep_roles)
        if self.rule not in ("paper", "official", "grid"):
            raise ValueError(f'rule: expected "paper", "official" or "grid" for a model, got {self.rule!r}')
        if not isinstance(self.score_queries, str) or self.score_queries not in ("all", "cls"):
            raise ValueError(f'score_queries: expected "all" or "cls", got {self.score_queries!r}')
        if isinstance(self.object_layer, (str, os.PathLike)):
            object.__setattr__(self, "object_layer", calibrated_layer(self.object_layer))
        if self.object_layer is not None and type(self.object_layer) not in (int, CalibratedLayer):
            raise TypeError(
                f"object_layer: expected an int or a file of hiprune calibrate, got {type(self.object_layer).__name__}"
            )
        super().__post_init__()

    def needs(self, encoder: EncoderFacts) -> Needs:
        object_layer = encoder.object_layer if self.object_layer is None else int(self.object_layer)  # type: ignore[arg-type]
        if isinstance(self.object_layer, CalibratedLayer):
            self.object_layer.check(encoder)
        if not 1 <= object_layer <= encoder.feature_layer:
            raise ValueError(
                f"object_layer: expected 1 to {encoder.feature_layer} (1-based, not behind the layer whose output are "
                f"the features), got {object_layer}"
            )
        if self.score_queries == "cls" and not encoder.has_cls:
            raise ValueError(f'score_queries: expected "all", as {encoder.name} has no CLS token, got "cls"')
        means = self.rule == "official" and encoder.kind.official_means and self.score_queries == "all"
        queries = "mean" if means else self.score_queries
        return Needs(scores={object_layer: queries, encoder.feature_layer: queries})

    def select(self, seen: Seen) -> Picks:
        return self._select(seen, self.tile_budgets(seen.layout))

    def _select(self, seen: Seen, budgets: list[int]) -> Picks:
        """Algorithm 1 with a budget for each tile."""
        layout, encoder = seen.layout, seen.encoder
        official_rule = "official" if encoder is None else encoder.kind.official_rule
        rule = official_rule if self.rule == "official" else self.rule
        deep_scores = seen.scores[max(seen.scores)]
        device = deep_scores.device
        indices, roles = ops.select_tokens_varlen(
            seen.scores[min(seen.scores)],
            deep_scores,
            grids=list(layout.grids),
            budgets=budgets,
            alpha=self.alpha,
            rule=rule,
            neighborhood=self.neighborhood,
            candidate_mask=None if layout.candidates is None else layout.candidates.to(device),
            keep_roles=self.keep_roles,
        )
        token, row = 0, 0
        for size, budget in zip(layout.sizes, budgets):
            if size == budget:  # a tile that loses nothing has the same selection whatever the other tiles lose
                indices[row : row + size] = torch.arange(token, token + size, device=device)
                roles[token : token + size] = _REGISTER
            token, row = token + size, row + budget
        empty = layout.candidate_counts is not None and min(layout.candidate_counts) == 0
        return Picks(indices, roles, budgets, fills=rule == "official_qwen" or empty)
