"""Generated scenes: coloured handwritten digits on textured, cluttered backgrounds, with questions and answers.

Pictures are made of integers alone, so that a seed gives the same scene on every machine. The digits are those of
scikit-learn (`load_digits`, 8 x 8 pixels); every fourth is never trained on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..visualize import optional_import

SIDE = 96  # pixels
PATCH = 8  # pixels that a token stands for, along a side
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 30, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 255),
    "yellow": (240, 220, 40),
    "magenta": (230, 60, 220),
    "cyan": (50, 220, 230),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (30, 30, 34),
    "gray": (118, 118, 116),
    "brown": (120, 78, 46),
}
QUESTIONS = (
    "what digit is {color}",
    "what color is {digit}",
    "how many digits",
    "what digit is leftmost",
    "what digit is rightmost",
    "what color is leftmost",
    "what color is rightmost",
    "is there a {digit}",
    "what color is background",
)
WORDS = tuple(
    dict.fromkeys(
        [
            *(word for question in QUESTIONS for word in question.split() if not word.startswith("{")),
            *("yes", "no"),
            *NUMBERS,
            *COLORS,
            *BACKGROUNDS,
        ]
    )
)

_Integers = NDArray[np.int64]


class Thing(NamedTuple):
    """A digit in a scene: its value, the name of its color, and where its picture is."""

    digit: int
    color: str
    top: int
    left: int
    side: int


@dataclass(frozen=True)
class Scene:
    """A picture, what is in it, and where.

    Attributes:
        pixels: [H, W, 3] uint8.
        things: from left to right.
        background: name of its color.
        owner: [H, W] int8: the digit that covers a pixel, by its place in `things`, or -1.
    """

    pixels: NDArray[np.uint8]
    things: tuple[Thing, ...]
    background: str
    owner: NDArray[np.int8]

    @property
    def owners(self) -> NDArray[np.int8]:
        """[H / 8, W / 8]: the digit that covers most of a token, if an eighth of its pixels is covered; else -1."""
        rows, columns = self.owner.shape[0] // PATCH, self.owner.shape[1] // PATCH
        cells = self.owner.reshape(rows, PATCH, columns, PATCH).transpose(0, 2, 1, 3).reshape(rows, columns, -1)
        counts = np.stack([(cells == i).sum(axis=-1) for i in range(len(self.things))])
        return np.where(counts.max(axis=0) * 8 >= PATCH**2, counts.argmax(axis=0), -1).astype(np.int8)

    def questions(self, rng: np.random.Generator) -> list[tuple[str, str]]:
        """One of each of the `QUESTIONS`, and the word that answers it."""
        about, named = (self.things[int(rng.integers(len(self.things)))] for _ in range(2))
        there = {thing.digit for thing in self.things}
        absent = [digit for digit in range(10) if digit not in there]
        present = bool(rng.integers(2))
        asked = int(rng.choice(sorted(there) if present else absent))
        first, last = self.things[0], self.things[-1]
        return [
            (QUESTIONS[0].format(color=about.color), NUMBERS[about.digit]),
            (QUESTIONS[1].format(digit=NUMBERS[named.digit]), named.color),
            (QUESTIONS[2], NUMBERS[len(self.things)]),
            (QUESTIONS[3], NUMBERS[first.digit]),
            (QUESTIONS[4], NUMBERS[last.digit]),
            (QUESTIONS[5], first.color),
            (QUESTIONS[6], last.color),
            (QUESTIONS[7].format(digit=NUMBERS[asked]), "yes" if present else "no"),
            (QUESTIONS[8], self.background),
        ]


def scene(seed: int, *, side: int = SIDE, digits: tuple[int, int] = (2, 4), training: bool = False) -> Scene:
    """The scene of a seed.

    Args:
        seed: at least 0.
        side: of the picture, in pixels, a multiple of 8.
        digits: least and largest number of digits; each digit and each color occurs once.
        training: whether digits are taken from those that the shipped checkpoint was trained on, or from the others.

    Raises:
        ImportError: without scikit-learn.

    Example:
        >>> scene(0).pixels.shape, len(scene(0).owners)
        ((96, 96, 3), 12)
    """
    rng = np.random.default_rng([seed, int(training)])
    count = int(rng.integers(digits[0], digits[1] + 1))
    values = rng.choice(10, size=count, replace=False)
    colors = rng.choice(list(COLORS), size=count, replace=False)
    background = str(rng.choice(list(BACKGROUNDS)))
    pixels = _background(rng, side, background)
    owner = np.full((side, side), -1, dtype=np.int8)
    spots = _spots(rng, side, count)
    things = sorted(
        (Thing(int(value), str(color), *spot) for value, color, spot in zip(values, colors, spots)),
        key=lambda thing: 2 * thing.left + thing.side,
    )
    for i, thing in enumerate(things):
        samples = _digits(training)[thing.digit]
        ink = _enlarged(samples[int(rng.integers(len(samples)))], thing.side)
        box = np.s_[thing.top : thing.top + thing.side, thing.left : thing.left + thing.side]
        color = np.array(COLORS[thing.color]) + rng.integers(-20, 21, size=3)
        pixels[box] += (color - pixels[box]) * ink[..., None] // 256
        owner[box] = np.where(ink >= 96, i, owner[box])
    pixels += rng.integers(-8, 9, size=pixels.shape)
    return Scene(pixels.clip(0, 255).astype(np.uint8), tuple(things), background, owner)


# -------------------------------------------------------------------------------------------------------------- parts


@functools.cache
def _digits(training: bool) -> list[_Integers]:
    """For each digit its pictures [n, 8, 8], 0 to 16."""
    bunch: Any = optional_import("sklearn.datasets").load_digits()
    chosen = (np.arange(len(bunch.target)) % 4 != 3) == training
    return [bunch.images[chosen & (bunch.target == digit)].astype(np.int64) for digit in range(10)]


@functools.cache
def _bilinear(size: int, source: int) -> _Integers:
    """[size, source]: what each of the samples weighs at a place, in 64ths."""
    places = np.clip(((2 * np.arange(size) + 1) * source * 64 // (2 * size)) - 32, 0, 64 * (source - 1))
    weights = np.zeros((size, source), dtype=np.int64)
    lower = np.minimum(places // 64, source - 2)
    weights[np.arange(size), lower] = 64 * (lower + 1) - places
    weights[np.arange(size), lower + 1] = places - 64 * lower
    return weights


def _enlarged(digit: _Integers, side: int) -> _Integers:
    """[side, side]: how much ink there is, 0 to 256, with edges made crisp."""
    weights = _bilinear(side, 8)
    ink = weights @ digit @ weights.T // 256  # 0 to 256
    return (2 * ink - 96).clip(0, 256)


def _background(rng: np.random.Generator, side: int, name: str) -> _Integers:
    """[side, side, 3]: a color with a soft texture, stripes, and gray clutter."""
    weights = _bilinear(side, side // PATCH)
    texture = weights @ rng.integers(-36, 37, size=(side // PATCH, side // PATCH)) @ weights.T // 4096
    down, across = np.mgrid[0:side, 0:side]
    a, b, period = (int(x) for x in rng.integers([-3, -3, 8], [4, 4, 24]))
    texture += ((a * down + b * across) // period % 2) * int(rng.integers(0, 22))
    pixels = np.array(BACKGROUNDS[name]) + rng.integers(-8, 9, size=3) + texture[..., None]
    for _ in range(int(rng.integers(2, 6)) * side // SIDE):  # strokes as thick as those of digits
        top, left = (int(x) for x in rng.integers(0, side, size=2))
        height, width = (int(x) for x in rng.permutation([int(rng.integers(2, 5)), int(rng.integers(8, 28))]))
        pixels[top : top + height, left : left + width] += int(rng.choice([-44, -30, 30, 44, 60]))
    return pixels


def _spots(rng: np.random.Generator, side: int, count: int) -> list[tuple[int, int, int]]:
    """(top, left, side) of so many squares that do not overlap, and whose middles are not in one column."""
    while True:
        spots: list[tuple[int, int, int]] = []
        for _ in range(40):
            size = int(rng.integers(19, 28))
            top, left = (int(x) for x in rng.integers(0, side - size + 1, size=2))
            apart = (abs(2 * left + size - 2 * x - s) >= 12 for _, x, s in spots)
            clear = (top + size <= y or y + s <= top or left + size <= x or x + s <= left for y, x, s in spots)
            if all(apart) and all(clear):
                spots.append((top, left, size))
            if len(spots) == count:
                return spots
