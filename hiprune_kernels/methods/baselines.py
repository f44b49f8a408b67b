"""Baselines that look at nothing: a random choice, and an even grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..budget import check_int
from .base import Grid, Method, Picks, Seen


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """A random choice in each tile, every candidate equally likely.

    The same seed keeps the same places in every image of a size, whatever else is in the batch, on every device.

    Attributes:
        budget, retention: exactly one of them: visual tokens kept per image, shared out among its tiles, or the share.
        seed: of the random numbers, 0 to 2**63 - 1.

    Example:
        >>> Random(budget=192, seed=1).seed
        1
    """

    seed: int = 0

    guaranteed: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_int("seed", self.seed, least=0)
        super().__post_init__()

    def select(self, seen: Seen) -> Picks:
        return _select_on_host(seen, self.tile_budgets(seen.layout), self._of_image)

    def _of_image(self, candidates: list[Tensor], budgets: list[int], grids: list[Grid]) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        for places, budget in zip(candidates, budgets):
            yield places[torch.randperm(len(places), generator=generator)[:budget]]


@dataclass(frozen=True, kw_only=True)
class UniformGrid(Method):
    """An even grid in each tile: rows at even distances, and at even distances in each of them as many tokens.

    With a budget of k for h x w tokens there are about ``sqrt(k h / w)`` rows; row j of r has
    ``floor((j + 1) k / r) - floor(j k / r)`` tokens. The n places of m are ``floor((i + 1/2) m / n)``. Frames stand one
    below the other. Padding is left out first; where what is left is no rectangle, its tokens in raster order are one
    row.

    Attributes:
        budget, retention: exactly one of them: visual tokens kept per image, shared out among its tiles, or the share.

    Example:
        >>> from hiprune_kernels.methods import TokenLayout
        >>> UniformGrid(budget=4).select(Seen(TokenLayout(grids=((4, 4),), tiles=(1,)))).indices
        tensor([ 5,  7, 13, 15])
    """

    guaranteed: ClassVar[bool] = True

    def select(self, seen: Seen) -> Picks:
        return _select_on_host(seen, self.tile_budgets(seen.layout), self._of_image)

    def _of_image(self, candidates: list[Tensor], budgets: list[int], grids: list[Grid]) -> Iterator[Tensor]:
        for places, budget, grid in zip(candidates, budgets, grids):
            rows, columns = _rectangle(places, grid[-1])
            yield places[torch.tensor(list(_even_places(rows, columns, min(budget, len(places)))), dtype=torch.long)]


def _rectangle(places: Tensor, width: int) -> tuple[int, int]:
    """Rows and columns of the rectangle that ascending places in a grid fill; one row where they fill none."""
    columns = int((places // width == places[0] // width).sum()) if len(places) else 0
    rows = len(places) // columns if columns else 0
    if rows == 0 or rows * columns != len(places):
        return 1, len(places)
    square = places[0] + torch.arange(rows)[:, None] * width + torch.arange(columns)
    return (rows, columns) if torch.equal(places, square.flatten()) else (1, len(places))


def _even_places(rows: int, columns: int, budget: int) -> Iterator[int]:
    if budget == 0:
        return
    used = round(math.sqrt(budget * rows / columns))
    used = max(min(used, rows, budget), math.ceil(budget / columns))
    for j in range(used):
        row, count = (2 * j + 1) * rows // (2 * used), (j + 1) * budget // used - j * budget // used
        yield from (row * columns + (2 * i + 1) * columns // (2 * count) for i in range(count))


def _select_on_host(
    seen: Seen, budgets: list[int], choose: Callable[[list[Tensor], list[int], list[Grid]], Iterator[Tensor]]
) -> Picks:
    """Picks of places that `choose` makes, image by image, of each tile's candidates."""
    layout = seen.layout
    sizes = layout.sizes
    mask = torch.ones(sum(sizes), dtype=torch.bool) if layout.candidates is None else layout.candidates
    candidates = [part.nonzero()[:, 0] for part in mask.split(sizes)]
    chosen: list[Tensor] = []
    for tiles, _ in layout.images():
        chosen += choose(candidates[tiles], budgets[tiles], list(layout.grids[tiles]))
    roles, parts, first = torch.zeros(sum(sizes), dtype=torch.uint8), [], 0
    for places, size, budget in zip(chosen, sizes, budgets):
        places = places.sort().values + first
        roles[places] = 1
        parts += [places, places.new_full((budget - len(places),), -1)]
        first += size
    indices = torch.cat(parts)
    return Picks(indices.to(seen.device), roles.to(seen.device), budgets, fills=any(map(len, parts[1::2])))
