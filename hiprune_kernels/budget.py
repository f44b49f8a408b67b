"""How many tokens of which kind are kept: plain integer arithmetic, from sizes alone (no torch, no data).

A serving engine can call these before it has encoded anything, to lay out the placeholders of a prompt.
"""

from __future__ import annotations

import functools
import math
import operator
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
        TypeError: if ``num_tokens`` or ``budget`` is not an int, or ``retention`` not a float.

    Example:
        >>> resolve_budget(576, budget=192), resolve_budget(576, retention=1 / 9)
        (192, 64)
    """
    if (budget is None) == (retention is None):
        both = f"budget={budget!r}, retention={retention!r}"
        raise ValueError(f"budget: expected exactly one of budget and retention, got {both}")
    check_int("num_tokens", num_tokens)
    if budget is not None:
        check_int("budget", budget)
        return min(budget, num_tokens)
    share = _check_float("retention", retention)
    if not 0.0 < share <= 1.0:
        raise ValueError(f"retention: expected a share in (0, 1], got {retention}")
    return max(1, round(num_tokens * share))


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
    check_list("sizes", sizes)
    for i, size in enumerate(sizes):
        check_int(f"sizes[{i}]", size)
    if not sizes:
        raise ValueError("sizes: expected at least one tile, got none")
    shares, total = [budget] * len(sizes), sum(sizes)
    if type(budget) is int:
        least = math.ceil(total / min(sizes))
        if 0 < budget < least:
            raise ValueError(f"budget: expected at least {least}, one token for each tile of the image, got {budget}")
        shares = [budget * size // total for size in sizes]
    return [resolve_budget(size, budget=share, retention=retention) for size, share in zip(sizes, shares)]


def shares(weights: Sequence[float], total: int, caps: Sequence[int]) -> list[int]:
    """A budget shared out by weights, to the last token: ``min(total, sum(caps))`` in all.

    Parts that would get their cap or more get the cap, and the rest is shared anew, until none is full. Then all get
    the whole tokens of their quotas. What is left goes one each to the largest fractions; the lower index wins ties.

    Args:
        weights: of each part, at least 0; parts are equal where all are 0.
        total: tokens to share.
        caps: the most that each part can take.

    Raises:
        ValueError: if there are not as many caps as weights, or a weight is negative or not finite.

    Example:
        >>> shares([0.7, 0.1, 0.1, 0.1], 40, [16] * 4)
        [16, 8, 8, 8]
    """
    if len(weights) != len(caps):
        raise ValueError(f"caps: expected {len(weights)}, one for each weight, got {len(caps)}")
    if not all(0 <= weight < math.inf for weight in weights):
        raise ValueError(f"weights: expected finite numbers of at least 0, got {list(weights)}")
    budgets, left, parts = [0] * len(weights), min(total, sum(caps)), list(range(len(weights)))
    while parts:
        scale = functools.reduce(operator.add, (weights[i] for i in parts))  # newer Pythons' sum() rounds otherwise
        quotas = {i: left * weights[i] / scale if scale else left / len(parts) for i in parts}
        full = [i for i in parts if quotas[i] >= caps[i]]
        if not full:
            break
        for i in full:
            budgets[i] = caps[i]
            left -= caps[i]
            parts.remove(i)
    for i in parts:
        budgets[i] = int(quotas[i])
    left -= sum(budgets[i] for i in parts)
    for i in sorted(parts, key=lambda i: budgets[i] - quotas[i])[:left]:
        budgets[i] += 1
    return budgets


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
    _check_sides("size", size)
    check_list("pinpoints", pinpoints)
    if not pinpoints:
        raise ValueError("pinpoints: expected at least one (height, width), got none")
    for i, pinpoint in enumerate(pinpoints):
        _check_sides(f"pinpoints[{i}]", pinpoint)
    check_int("tile_size", tile_size)
    check_int("patch_size", patch_size)
    if max_tiles is not None:
        check_int("max_tiles", max_tiles)
    side = tile_size // patch_size
    if side < 1 or any(min(pinpoint) < tile_size for pinpoint in pinpoints):
        smallest = min(map(min, pinpoints))
        raise ValueError(f"tile_size: expected {patch_size} (patch_size) to {smallest} (pinpoints), got {tile_size}")
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


# The checks below name the argument, what was expected and what came. Types are exact: True is no number, and 9.0 no
# number of tokens, though they equal one.


def check_int(name: str, value: int, least: int = 1) -> None:
    if type(value) is not int:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if not least <= value < 2**63:
        raise ValueError(f"{name}: expected {f'at least {least}' if value < least else 'less than 2**63'}, got {value}")


def _check_float(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    return value


def check_share(name: str, value: float) -> None:
    _check_float(name, value)
    if not 0.0 <= value <= 1.0:  # also catches NaN
        raise ValueError(f"{name}: expected a share in [0, 1], got {value}")


def check_list(name: str, value: Sequence) -> None:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name}: expected a list or tuple, got {type(value).__name__}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")


def _check_sides(name: str, value: Sequence[int]) -> None:
    if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(type(x) is int and x > 0 for x in value):
        raise ValueError(f"{name}: expected (height, width), positive integers, got {value!r}")


def check_grid(name: str, grid: Sequence[int]) -> list[int]:
    """(h, w) or (t, h, w) as [t, h, w]."""
    sides = list(grid) if isinstance(grid, (list, tuple)) else []
    if len(sides) == 2:
        sides = [1, *sides]
    if len(sides) != 3 or not all(type(side) is int and side > 0 for side in sides):
        raise ValueError(f"{name}: expected (h, w) or (t, h, w), positive integers, got {grid!r}")
    return sides


def check_budget(name: str, budget: int, grid: Sequence[int]) -> None:
    if type(budget) is not int:
        raise TypeError(f"{name}: expected an int, got {type(budget).__name__}")
    if not 1 <= budget <= math.prod(grid):
        raise ValueError(f"{name}: expected 1..{math.prod(grid)} for a grid of {tuple(grid)}, got {budget}")


def check_selection_options(alpha: float, rule: str, neighborhood: str, keep_roles: Sequence[str]) -> None:
    """Raise ValueError or TypeError, naming the argument, unless these options of a selection are valid."""
    check_share("alpha", alpha)
    check_choice("rule", rule, RULES)
    check_choice("neighborhood", neighborhood, tuple(CLUSTER_SIZES))
    if keep_roles is ROLE_NAMES:
        return
    roles = list(keep_roles) if isinstance(keep_roles, (list, tuple, set, frozenset)) else []
    if not roles or not all(isinstance(x, str) and x in ROLE_NAMES for x in roles) or len(set(roles)) != len(roles):
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

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Example:
        >>> anchor_count(192), anchor_count(64, rule="official"), anchor_count(192, alpha=1.0)
        (4, 1, 38)
    """
    check_int("budget", budget)
    check_selection_options(alpha, rule, neighborhood, keep_roles)
    return _anchor_count(budget, alpha, rule, neighborhood, keep_roles)


def _anchor_count(budget: int, alpha: float, rule: str, neighborhood: str, keep_roles: Sequence[str]) -> int:
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
    """The `SelectionPlan` for images with these grids, (h, w) or (t, h, w), and budgets, as one flat list of integers.

    Flat, because that is how it reaches the operators of torch: a call costs microseconds, and several lists and
    strings would add half as much again.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.

    Example:
        >>> SelectionPlan.from_flat(plan_selection([(1, 24, 24)], [192])).images
        (Image(frames=1, height=24, width=24, budget=192, anchors=4),)
    """
    check_selection_options(alpha, rule, neighborhood, keep_roles)
    if type(num_prefix_tokens) is not int or num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens: expected an int, at least 0, got {num_prefix_tokens!r}")
    check_list("grids", grids)
    check_list("budgets", budgets)
    sizes = [check_grid(f"grids[{i}]", grid) for i, grid in enumerate(grids)]
    if len(budgets) != len(grids):
        raise ValueError(f"budgets: expected {len(grids)}, one per grid, got {len(budgets)}")
    buffers, registers = int("buffer" in keep_roles), int("register" in keep_roles)
    plan = [num_prefix_tokens, RULES.index(rule), _NEIGHBORHOODS.index(neighborhood), buffers, registers]
    for i, (sides, budget) in enumerate(zip(sizes, budgets)):
        check_budget(f"budgets[{i}]", budget, sides)
        plan += (*sides, budget, _anchor_count(budget, alpha, rule, neighborhood, keep_roles))
    return plan
