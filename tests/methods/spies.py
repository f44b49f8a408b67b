"""Methods that are made for the tests: they want one thing, and write down what they get to see."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from hiprune_kernels.methods import Method, Needs, Picks, Seen, best_of_tiles


@dataclass(frozen=True, kw_only=True)
class Spy(Method):
    """Wants what `wanted` says, and keeps tokens by numbers that follow from their places alone."""

    wanted: Callable = lambda encoder: Needs()
    log: list = field(default_factory=list, compare=False)

    def needs(self, encoder):
        return self.wanted(encoder) if callable(self.wanted) else self.wanted

    def select(self, seen: Seen) -> Picks:
        self.log.append(seen)
        sizes = [tokens.stop - tokens.start for _, tokens in seen.layout.images()]
        numbers = [torch.rand(size, generator=torch.Generator().manual_seed(5)) for size in sizes]
        scores = torch.cat(numbers).to(seen.device)
        return best_of_tiles(scores, seen.layout, self.tile_budgets(seen.layout))


@dataclass(frozen=True, kw_only=True)
class Doubler(Spy):
    """Puts twice the sum of a token and the one behind it in the place of each token."""

    def merge(self, features, seen, picks):
        return doubled(features)


def doubled(features):
    return 2 * features + features.roll(-1, dims=0)
