"""How many tokens of which kind are kept: plain integer arithmetic, from sizes alone (no torch, no data).

A serving engine can call these before it has encoded anything, to lay out the placeholders of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

RULES = ("paper", "official", "official_qwen", "grid")
CLUSTER_SIZES = {"cross": 5, "square": 9, "row": 3, "none": 1}  # an anchor and its neighbours
ROLE_NAMES = ("anchor", "buffer", "register")


def resolve_budget(num_tokens: int, *, budget: int | None = None, retention: float | None = None) -> int:
    """Number of visual tokens kept out of ``num_tokens``.

    Args:
        num_tokens: tokens of the image, at least 1.
        budget: tokens to keep; a budget above ``num_tokens`` keeps all of them.
        retention: share to keep, in (0, 1]; ``max(1, round(num_tokens * retention))`` tokens survive.

    Returns:
        The number of tokens kept, in 1..num_tokens.

    Raises:
        ValueError: if not exactly one of ``budget`` and ``retention`` is given, or it is out of range.
        TypeError: if ``budget`` is not an integer or ``retention`` not a number.

    Example:
        >>> resolve_budget(576, budget=192), resolve_budget(576, retention=1 / 9)
        (192, 64)
    """
    if (budget is None) == (retention is None):
        raise ValueError(f"expected exactly one of budget and retention, got budget={budget}, retention={retention}")
    if num_tokens < 1:
        raise ValueError(f"num_tokens: expected at least 1, got {num_tokens}")
    if budget is not None:
        if isinstance(budget, bool) or not isinstance(budget, int):
            raise TypeError(f"budget: expected an int, got {type(budget).__name__}")
        if budget < 1:
            raise ValueError(f"budget: expected at least 1, got {budget}")
        return min(budget, num_tokens)
    if isinstance(retention, bool) or not isinstance(retention, (int, float)):
        raise TypeError(f"retention: expected a float, got {type(retention).__name__}")
    if not 0.0 < retention <= 1.0:
        raise ValueError(f"retention: expected a share in (0, 1], got {retention}")
    return max(1, round(num_tokens * retention))


def tile_budgets(sizes: Sequence[int], *, budget: int | None = None, retention: float | None = None) -> list[int]:
    """Number of visual tokens kept in each tile (or frame) of an image (or video) that is cut into several.

    Args:
        sizes: tokens of each tile.
        budget: tokens to keep of the image, shared out in proportion to the tiles' tokens, rounded down:
            ``budget // len(sizes)`` in each where they are equal.
        retention: share to keep of each tile.

    Raises:
        ValueError, TypeError: as `resolve_budget`; also if the budget leaves a tile without a token.

    Example:
        >>> tile_budgets([576] * 5, budget=640), tile_budgets([576], budget=192), tile_budgets([729, 6480], budget=640)
        ([128, 128, 128, 128, 128], [192], [64, 575])
    """
    shares, total = [budget] * len(sizes), sum(sizes)
    if isinstance(budget, int):
        least = math.ceil(total / min(sizes))
        if 0 < budget < least:
            raise ValueError(f"budget: expected at least {least}, one token for each tile of the image, got {budget}")
        shares = [budget * size // total for size in sizes]
    return [resolve_budget(size, budget=share, retention=retention) for size, share in zip(sizes, shares)]


def kept_anyres_tokens(
    size: Sequence[int],
    *,
    pinpoints: Sequence[Sequence[int]],
    tile_size: int,
    patch_size: int,
    max_tiles: int | None = None,
    budget: int | None = None,
    retention: float | None = None,
) -> int:
    """Number of placeholders that stay in the prompt for an image that LLaVA-NeXT or -OneVision cuts into tiles.

    Newlines, which always stay, are counted. Right for ``unpad="before"``, with which nothing else than sizes decides.

    Args:
        size: (height, width) of the image in pixels.
        pinpoints: the (height, width) that images are brought to, as `image_grid_pinpoints` of the model's config.
        tile_size, patch_size: sides in pixels, as `image_size` and `patch_size` of the vision config.
        max_tiles: the 9 of LLaVA-OneVision's "anyres_max_9": what is larger is interpolated; None for LLaVA-NeXT.
        budget, retention: as `tile_budgets`.

    Raises:
        ValueError, TypeError: as `tile_budgets`.

    Example:
        >>> pinpoints = [(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)]
        >>> kept_anyres_tokens((480, 640), pinpoints=pinpoints, tile_size=336, patch_size=14, budget=640)
        676
    """
    side = tile_size // patch_size
    height, width = (pixels // tile_size * side for pixels in _best_resolution(size, pinpoints))
    top, left = _padding(size, height, width)
    shown = height - 2 * top, width - 2 * left
    ratio = math.sqrt(shown[0] * shown[1] / (max_tiles * side**2)) if max_tiles is not None else 0.0
    if ratio > 1.1:
        shown = int(shown[0] // ratio), int(shown[1] // ratio)
        return sum(tile_budgets([side**2, shown[0] * shown[1]], budget=budget, retention=retention)) + shown[0]
    tiles = 1 + height * width // side**2  # the first one shows the whole image
    share = tile_budgets([side**2] * tiles, budget=budget, retention=retention)[0]
    in_rows, in_columns = _shown_of_tiles(height, top, side), _shown_of_tiles(width, left, side)
    return share + sum(min(share, rows * columns) for rows in in_rows for columns in in_columns) + shown[0]


def _best_resolution(size: Sequence[int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """As `select_best_resolution` of transformers: the most pixels of the image, then the least waste."""

    def worth(resolution: Sequence[int]) -> tuple[int, int]:
        scale = min(resolution[1] / size[1], resolution[0] / size[0])
        effective = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return effective, effective - resolution[0] * resolution[1]

    best = max(pinpoints, key=worth)  # the first one of equals
    return best[0], best[1]


def _padding(size: Sequence[int], height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens that `unpad_image` of transformers cuts off at each side of a height x width grid."""
    if size[1] / size[0] > width / height:
        return (height - int(round(size[0] * (width / size[1]), 7))) // 2, 0
    return 0, (width - int(round(size[1] * (height / size[0]), 7))) // 2


def _shown_of_tiles(length: int, padding: int, side: int) -> list[int]:
    """How many of each tile's rows (or columns) are not padding, for tiles of `side` along `length`."""
    starts = range(0, length, side)
    return [len(range(max(padding, start), min(length - padding, start + side))) for start in starts]


def check_selection_options(alpha: float, rule: str, neighborhood: str, keep_roles: Sequence[str]) -> None:
    """Raise ValueError, naming the argument, unless these options of a selection are valid."""
    if not 0.0 <= alpha <= 1.0:  # also catches NaN
        raise ValueError(f"alpha: expected a share in [0, 1], got {alpha}")
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {RULES}, got {rule!r}")
    if neighborhood not in CLUSTER_SIZES:
        raise ValueError(f"neighborhood: expected one of {tuple(CLUSTER_SIZES)}, got {neighborhood!r}")
    if keep_roles is ROLE_NAMES:
        return
    roles = set(keep_roles)
    if isinstance(keep_roles, str) or not roles or not roles <= set(ROLE_NAMES) or len(roles) != len(keep_roles):
        raise ValueError(f"keep_roles: expected a non-empty choice of {ROLE_NAMES}, each once, got {keep_roles!r}")
    if "buffer" in roles and "anchor" not in roles:
        raise ValueError(f'keep_roles: "buffer" needs "anchor" (buffers surround anchors), got {keep_roles!r}')


def anchor_count(
    budget: int,
    *,
    alpha: float = 0.1,
    rule: str = "paper",
    neighborhood: str = "cross",
    keep_roles: Sequence[str] = ROLE_NAMES,
) -> int:
    """Number of anchors N_a for a budget of N' tokens (section "Pruning Pipeline" and table 5 of the paper).

    With cluster size c: ``ceil(alpha N' / c)``, at most ``N' // c`` (rules "paper" and "grid"), or
    ``round(alpha N' / c)``, half to even, unlimited (rules "official" and "official_qwen", as in the authors' released
    code). Without registers alpha acts as 1; without anchors there are none; without buffers N_a stays what it is with
    them.

    Example:
        >>> anchor_count(192), anchor_count(64, rule="official"), anchor_count(192, alpha=1.0)
        (4, 1, 38)
    """
    if "anchor" not in keep_roles:
        return 0
    cluster = CLUSTER_SIZES[neighborhood]
    share = (alpha if "register" in keep_roles else 1.0) * budget / cluster
    if rule in ("official", "official_qwen"):
        return round(share)
    # 0.07 * 100 is 7.000000000000001 in floating point: noise of that size must not add an anchor.
    return min(math.ceil(share - 1e-9), budget // cluster)


class Image(NamedTuple):
    """What is kept of one image: its grid, its budget in tokens, and how many of those are anchors."""

    frames: int
    height: int
    width: int
    budget: int
    anchors: int


class SelectionPlan(NamedTuple):
    """A selection with all its arithmetic done, as every implementation takes it."""

    num_prefix_tokens: int
    rule: str
    neighborhood: str
    buffers: bool
    registers: bool
    images: tuple[Image, ...]  # of packed images one each; a batch shares one

    @staticmethod
    def from_flat(flat: Sequence[int]) -> SelectionPlan:
        """The plan behind the list that `plan_selection` makes."""
        prefix, rule, neighborhood, buffers, registers, *sizes = flat
        images = tuple(Image(*sizes[i : i + 5]) for i in range(0, len(sizes), 5))
        names = RULES[rule], _NEIGHBORHOODS[neighborhood]
        return SelectionPlan(prefix, *names, bool(buffers), bool(registers), images)


_NEIGHBORHOODS = tuple(CLUSTER_SIZES)


def plan_selection(
    grids: Sequence[Sequence[int]],
    budgets: Sequence[int],
    alpha: float = 0.1,
    rule: str = "paper",
    neighborhood: str = "cross",
    keep_roles: Sequence[str] = ROLE_NAMES,
    num_prefix_tokens: int = 0,
) -> list[int]:
    """The `SelectionPlan` for images with these grids (t, h, w) and budgets, as one flat list of integers.

    Flat, because that is how it reaches the operators of torch: a call costs microseconds, and several lists and
    strings would add half as much again.

    Example:
        >>> SelectionPlan.from_flat(plan_selection([(1, 24, 24)], [192])).images
        (Image(frames=1, height=24, width=24, budget=192, anchors=4),)
    """
    buffers, registers = int("buffer" in keep_roles), int("register" in keep_roles)
    plan = [num_prefix_tokens, RULES.index(rule), _NEIGHBORHOODS.index(neighborhood), buffers, registers]
    for grid, budget in zip(grids, budgets):
        anchors = anchor_count(budget, alpha=alpha, rule=rule, neighborhood=neighborhood, keep_roles=keep_roles)
        plan += (*grid, budget, anchors)
    return plan
