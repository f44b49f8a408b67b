"""The methods, and what each must keep by its definition: plain loops in float64, one image at a time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hiprune_kernels.facts import ENCODERS, EncoderFacts
from hiprune_kernels.methods import (
    DivPrune,
    FasterVLM,
    HiPrune,
    Method,
    Random,
    Seen,
    TokenLayout,
    UniformGrid,
)

CLIP = EncoderFacts("clip_vision_model", ENCODERS["clip_vision_model"], 24, 23, 1, decoder_layers=32)
SIGLIP = EncoderFacts("siglip_vision_model", ENCODERS["siglip_vision_model"], 26, 26, 0, decoder_layers=28)


@dataclass
class Tile:
    """What is known of one tile of an image."""

    grid: tuple[int, ...]
    candidates: list[int]  # counted within the tile
    scores: dict[int, Tensor] = field(default_factory=dict)  # layer -> [n]
    features: Tensor | None = None  # [n, C]

    @property
    def size(self) -> int:
        return math.prod(self.grid)


Roles = dict[int, int]  # a kept token, counted within the image -> its role


def best(scores: Tensor, places: list[int], count: int) -> list[int]:
    """The places with the highest scores; the lowest of equals."""
    return sorted(places, key=lambda place: (-float(scores[place]), place))[:count]


def shares(method: Method, image: list[Tile]) -> list[int]:
    """How many tokens of each tile stay: in proportion to its tokens, rounded down; at most its candidates."""
    total, counts = sum(tile.size for tile in image), []
    for tile in image:
        if method.budget is None:
            share = max(1, round(tile.size * method.retention))
        else:
            share = min(tile.size, method.budget * tile.size // total)
        counts.append(min(share, len(tile.candidates)))
    return counts


def by_tile(choose: Callable[[Method, Tile, int], Roles]) -> Callable[[Method, list[Tile]], Roles]:
    """The reference of a method that looks at each tile by itself."""

    def reference(method: Method, image: list[Tile]) -> Roles:
        kept, first = {}, 0
        for tile, count in zip(image, shares(method, image)):
            kept |= {first + place: role for place, role in choose(method, tile, count).items()}
            first += tile.size
        return kept

    return reference


@by_tile
def fastervlm(method: FasterVLM, tile: Tile, count: int) -> Roles:
    (scores,) = tile.scores.values()
    return dict.fromkeys(best(scores, tile.candidates, count), 1)


def random(method: Random, image: list[Tile]) -> Roles:
    """One stream of numbers for an image, from its first tile to its last."""
    kept, first, stream = {}, 0, torch.Generator().manual_seed(method.seed)
    for tile, count in zip(image, shares(method, image)):
        order = torch.randperm(len(tile.candidates), generator=stream).tolist()
        kept |= {first + tile.candidates[place]: 1 for place in order[:count]}
        first += tile.size
    return kept


@by_tile
def uniform_grid(method: UniformGrid, tile: Tile, count: int) -> Roles:
    """The formulas of the docstring, on the rectangle that the candidates fill, or on one row of them."""
    width, places = tile.grid[-1], tile.candidates
    rows, columns = sorted({p // width for p in places}), sorted({p % width for p in places})
    adjacent = all(side == list(range(side[0], side[-1] + 1)) for side in (rows, columns) if side)
    h, w = (len(rows), len(columns)) if adjacent and len(rows) * len(columns) == len(places) else (1, len(places))
    if count == 0:
        return {}
    used = max(min(round(math.sqrt(count * h / w)), h, count), -(-count // w))
    kept = []
    for j in range(used):
        row = math.floor((j + 0.5) * h / used)
        n = math.floor((j + 1) * count / used) - math.floor(j * count / used)
        kept += [places[row * w + math.floor((i + 0.5) * w / n)] for i in range(n)]
    return dict.fromkeys(kept, 1)


def divprune(method: DivPrune, image: list[Tile]) -> Roles:
    """All of an image's candidates are one set."""
    starts = [sum(tile.size for tile in image[:i]) for i in range(len(image))]
    places = [start + place for start, tile in zip(starts, image) for place in tile.candidates]
    rows = [row.double() for tile in image for row in tile.features[tile.candidates]]
    count = len(places)
    count = min(method.budget, count) if method.retention is None else max(1, round(count * method.retention))

    def distance(i: int, j: int) -> float:
        return 1 - float(rows[i] @ rows[j] / (rows[i].norm() * rows[j].norm()))

    everyone, chosen = range(len(places)), []
    between = [[distance(i, j) for j in everyone] for i in everyone]
    while len(chosen) < count:
        worth = {}
        for i in everyone:
            others = chosen if chosen else [j for j in everyone if j != i]
            worth[i] = min((between[i][j] for j in others), default=math.inf)
        chosen.append(max((i for i in everyone if i not in chosen), key=lambda i: (worth[i], -i)))
    return dict.fromkeys((places[i] for i in chosen), 1)


_NEIGHBOURS = {
    "none": [],
    "row": [(0, -1), (0, 1)],
    "cross": [(0, -1), (0, 1), (-1, 0), (1, 0)],
    "square": [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)],
}


@by_tile
def hiprune(method: HiPrune, tile: Tile, count: int) -> Roles:
    """Algorithm 1 with the rules "paper" and "grid"."""
    if count == tile.size:
        return dict.fromkeys(range(count), 3)
    assert method.rule in ("paper", "grid")
    shallow, deep = tile.scores[min(tile.scores)], tile.scores[max(tile.scores)]
    steps, (height, width) = _NEIGHBOURS[method.neighborhood], tile.grid[-2:]
    cluster = 1 + len(steps)
    number = min(math.ceil(method.alpha * count / cluster - 1e-9), count // cluster)
    anchors = best(shallow, tile.candidates, number)
    buffers = set()
    for anchor in anchors:
        frame, place = divmod(anchor, height * width)
        row, column = divmod(place, width)
        for down, right in steps:
            if method.rule == "grid" and not (0 <= row + down < height and 0 <= column + right < width):
                continue
            other = place + down * width + right  # without `grid` a step to the side may go to the next row
            if 0 <= other < height * width:
                buffers.add(frame * height * width + other)
    buffers = (buffers & set(tile.candidates)) - set(anchors)
    rest = [place for place in tile.candidates if place not in buffers and place not in anchors]
    registers = best(deep, rest, count - len(anchors) - len(buffers))
    return dict.fromkeys(anchors, 1) | dict.fromkeys(buffers, 2) | dict.fromkeys(registers, 3)


@dataclass(frozen=True)
class MethodCase:
    """A method with options other than the budget, and what it must keep of an image."""

    cls: type[Method]
    reference: Callable[[Method, list[Tile]], Roles]
    options: dict = field(default_factory=dict)
    scores: Callable[[EncoderFacts], dict[int, str]] = lambda encoder: {}  # what is read of which layer
    features: bool = False  # whether the language model's are read

    def make(self, **budget) -> Method:
        return self.cls(**budget, **self.options)

    def expected(self, method: Method, image: list[Tile]) -> tuple[Tensor, Tensor]:
        """Indices and roles of an image's tokens."""
        kept = self.reference(method, image)
        roles = torch.zeros(sum(tile.size for tile in image), dtype=torch.uint8)
        for token, role in kept.items():
            roles[token] = role
        return torch.tensor(sorted(kept)), roles


def _middle_and_last(encoder: EncoderFacts) -> dict[int, str]:
    """Layer 9 of 24, or half of Qwen-VL's depth, and the feature layer."""
    share = 1 / 2 if encoder.model_type.startswith(("qwen", "glm")) else 9 / 24
    return {round(share * encoder.depth): "all", encoder.feature_layer: "all"}


def _last_of_cls(encoder: EncoderFacts) -> dict[int, str]:
    """The feature layer's CLS row, or the mean of all rows."""
    return {encoder.feature_layer: "cls" if encoder.num_prefix_tokens else "mean"}


METHOD_CASES = {
    "hiprune": MethodCase(HiPrune, hiprune, {"alpha": 0.5}, scores=_middle_and_last),
    "fastervlm": MethodCase(FasterVLM, fastervlm, scores=_last_of_cls),
    "divprune": MethodCase(DivPrune, divprune, features=True),
    "random": MethodCase(Random, random, {"seed": 7}),
    "uniform-grid": MethodCase(UniformGrid, uniform_grid),
}


# ------------------------------------------------------------------------------------------- without a model around them


def layout_of(*images: list[tuple[int, ...]], padding: list[int] | None = None) -> TokenLayout:
    """Images given as the grids of their tiles; `padding` are tokens that never reach the prompt."""
    layout = TokenLayout(tuple(grid for image in images for grid in image), tuple(map(len, images)))
    if padding is None:
        return layout
    candidates = torch.ones(sum(layout.sizes), dtype=torch.bool)
    candidates[padding] = False
    return layout.with_candidates(candidates)


LAYOUTS = {
    "one image": layout_of([(6, 6)]),
    "images of several sizes": layout_of([(4, 5)], [(2, 3)], [(6, 2)]),
    "tiles": layout_of([(4, 4)] * 3, [(4, 4)] * 2),
    "tiles of several sizes": layout_of([(3, 3), (4, 7)], [(3, 3)]),
    "a video": layout_of([(3, 3, 4)], [(3, 3)]),
    "padding": layout_of([(4, 4)] * 3, [(3, 5)], padding=[16, 17, 18, 19, 28, 29, 30, 31, 35, 39, 43, 47, 50]),
    "a tile of padding alone": layout_of([(3, 3)] * 3, padding=[*range(9, 18), 20]),
    "images of one token": layout_of([(1, 1)], [(4, 4)], [(1, 1)]),
}


def random_seen(method: Method, layout: TokenLayout, seed: int = 0, encoder: EncoderFacts = CLIP) -> Seen:
    """What a method asks for, of random numbers. Each tile's scores differ by more than rounding."""
    generator = torch.Generator().manual_seed(seed)
    needs, total = method.needs(encoder), sum(layout.sizes)
    scores = {layer: 1.0 + torch.randperm(total, generator=generator).float() for layer in needs.scores}
    features = torch.randn(total, 16, generator=generator) if needs.features != "none" else None
    return Seen(layout, scores, features=features, encoder=encoder)


def images_of(seen: Seen) -> list[list[Tile]]:
    """The same as tiles, image by image."""
    layout, found = seen.layout, []
    candidates = torch.ones(sum(layout.sizes), dtype=torch.bool) if layout.candidates is None else layout.candidates
    for tiles, tokens in layout.images():
        sizes, image, first = layout.sizes[tiles], [], tokens.start
        for size, grid in zip(sizes, layout.grids[tiles]):
            own = slice(first, first + size)
            scores = {layer: values[own].double() for layer, values in seen.scores.items()}
            features = None if seen.features is None else seen.features[own]
            image.append(Tile(tuple(grid), candidates[own].nonzero()[:, 0].tolist(), scores, features))
            first += size
        found.append(image)
    return found


def of_images(picks, layout: TokenLayout) -> list[tuple[Tensor, Tensor]]:
    """Indices without fill, counted within the image, and roles, of each image."""
    found, row = [], 0
    for tiles, tokens in layout.images():
        count = sum(picks.host_counts()[tiles])
        indices = picks.indices[row : row + count]
        found.append((indices[indices >= 0] - tokens.start, picks.roles[tokens]))
        row += count
    return found
