"""Pictures of a selection: the roles of tokens and their scores, drawn over the image.

Needs the extra `hiprune-kernels[images]`; PIL and matplotlib are imported when a function is called, not before.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .budget import ROLE_NAMES

if TYPE_CHECKING:
    from PIL.Image import Image

# By HiPrune's role: dropped (dimmed instead; this is its swatch in legends), anchor, buffer, register.
ROLE_COLORS = ((84, 86, 96), (255, 214, 10), (255, 64, 54), (64, 204, 255))
OTHER_COLORS = ((80, 227, 148), (255, 159, 67), (190, 132, 255), (255, 214, 10), (255, 64, 54), (64, 204, 255))
_TINTS = (0.0, 0.36, 0.32, 0.16)  # share of the role's colour over the image: anchors are few, registers many
_OUTLINES = (0.0, 0.14, 0.12, 0.08)  # width, as a share of the token's shorter side
_OTHER_TINT, _OTHER_OUTLINE = 0.16, 0.09
_BACKGROUND, _TEXT, _PADDING = (18, 18, 23), (236, 236, 240), (56, 42, 66)
_LEAST_CELL = 28  # pixels; small images are enlarged until a token's outline and its content are both visible
_LEAST_CELL_OF_TILES = 14  # there are many
_LEAST_COLUMN = 176  # pixels; of a figure, so that titles and legends can be read beside narrow images
_LAYER_WIDTH = 216  # pixels, of a map among those of all layers
_WIDEST_ROW, _FLATTEST_ROW = 4000, 6.2  # pixels, and width over height; what is beyond goes into more rows
_SMALLEST_FONT = 8


class View(NamedTuple):
    """One picture that a vision encoder gets to see.

    Attributes:
        image: as it is seen (resized, cropped); enlarged as by `draw_selection`.
        grid: (height, width) in tokens.
        place: (row, column) of a tile among the tiles of its image; None for an image that was not cut, and for the
            view of the whole beside the tiles.
    """

    image: Image
    grid: tuple[int, int]
    place: tuple[int, int] | None = None


class _Look(NamedTuple):
    """How a role is drawn."""

    color: tuple[int, int, int]
    tint: float
    outline: float
    hatched: bool = False  # another row stands in the token's place


def _looks(role_names: Sequence[str], merged: Sequence[str] = ()) -> list[_Look]:
    """Of role 0, which is dropped, and of each name."""
    if isinstance(role_names, str) or not role_names or not all(isinstance(name, str) for name in role_names):
        raise ValueError(f"role_names: expected the names of roles 1, 2, ..., got {role_names!r}")
    if tuple(role_names[: len(ROLE_NAMES)]) == ROLE_NAMES:  # HiPrune's, and those that HiPrune++ has besides
        looks, more = [_Look(*look) for look in zip(ROLE_COLORS, _TINTS, _OUTLINES)], role_names[len(ROLE_NAMES) :]
    else:
        looks, more = [_Look(ROLE_COLORS[0], 0.0, 0.0)], role_names
    for i, name in enumerate(more):
        color = OTHER_COLORS[i % len(OTHER_COLORS)]
        looks.append(_Look(color, _OTHER_TINT, _OTHER_OUTLINE, hatched=name in merged))
    return looks


def optional_import(module: str, extra: str = "images") -> ModuleType:
    """Import a module that an extra of this package brings, or raise ImportError saying how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"this needs {module}: pip install 'hiprune-kernels[{extra}]' ({error})") from error


def _checked_image(image: Image) -> Image:
    if not isinstance(image, optional_import("PIL.Image").Image):
        raise TypeError(f"image: expected a PIL image, got {type(image).__name__}")
    return to_rgb(image)


def to_rgb(image: Image) -> Image:
    """The picture with 8 bits a channel, on white where it is transparent.

    `convert("RGB")` alone cuts 16-bit values off at 255, which turns nearly all of them white, and it shows the colours
    that transparent pixels hide.

    Raises:
        ValueError: for pixels whose range is not known (mode F, or I beyond 16 bits), and modes without a conversion.

    Example:
        >>> to_rgb(PIL.Image.open("16_bits.png")).save("8_bits.png")
    """
    pil = optional_import("PIL.Image")
    if image.mode == "F":
        raise ValueError("image: expected integer pixels, got mode F, where no range is set for black to white")
    if image.mode.startswith("I"):  # I;16 and its byte orders; pillow reads some 16-bit files as I, of 32 bits
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"image: expected 0 to 65535 in mode {image.mode}, got {values.min()} to {values.max()}")
        gray = (values + 128) // 257  # 65535 is 255 * 257
        gray[values == image.info.get("transparency")] = 255  # PNG: one shade of grey may stand for transparency
        return pil.fromarray(gray.astype(np.uint8)).convert("RGB")
    try:
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
    except ValueError as error:
        raise ValueError(f"image: expected a mode that converts to RGB, got {image.mode}: {error}") from error
    return pil.alpha_composite(pil.new("RGBA", image.size, "white"), image).convert("RGB")


def _checked_grid(grid: Sequence[int]) -> tuple[int, int]:
    if len(grid) != 2 or not all(isinstance(n, int) and n > 0 for n in grid):
        raise ValueError(
            f"grid: expected the image's (height, width) in tokens (a video: frame by frame), got {tuple(grid)}"
        )
    return grid[0], grid[1]


def _checked_tokens(name: str, values: Tensor | Sequence[float], grid: tuple[int, int]) -> Tensor:
    values = torch.as_tensor(values).detach().cpu()
    if tuple(values.shape) != (math.prod(grid),):
        raise ValueError(
            f"{name}: expected shape ({math.prod(grid)},), one value per token of the {grid[0]} x {grid[1]} grid "
            f"without prefix tokens, got {tuple(values.shape)}"
        )
    return values


def _checked_roles(roles: Tensor | Sequence[int], grid: tuple[int, int], role_names: Sequence[str]) -> Tensor:
    values, most = _checked_tokens("roles", roles, grid), len(_looks(role_names)) - 1
    if values.is_floating_point() or ((values < 0) | (values > most)).any():
        raise ValueError(f"roles: expected integers from 0 to {most}, got {values.unique().tolist()}")
    return values


def _checked_scores(name: str, scores: Tensor | Sequence[float], grid: tuple[int, int]) -> Tensor:
    values = _checked_tokens(name, scores, grid).double()
    if not values.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got {int((~values.isfinite()).sum())} that are not")
    return values


def _edges(length: int, tokens: int) -> list[int]:
    """Pixel borders of the tokens along one axis."""
    return [round(i * length / tokens) for i in range(tokens + 1)]


def _enlarged(image: Image, grid: tuple[int, int], least_cell: int = _LEAST_CELL) -> Image:
    factor = math.ceil(least_cell * max(grid[0] / image.height, grid[1] / image.width))
    return image.resize((image.width * factor, image.height * factor), optional_import("PIL.Image").Resampling.LANCZOS)


def _font(size: float):
    return optional_import("PIL.ImageFont").load_default(size=max(_SMALLEST_FONT, round(size)))


def _fitting(size: float, width: float, length: Callable[[float], float]) -> float:
    """The font size, or the largest below it with which something, `length(size)` long, is no longer than `width`."""
    while size > _SMALLEST_FONT and length(size) > width:
        size = max(_SMALLEST_FONT, size - 0.5)
    return size


def _text_length(text: str, size: float) -> float:
    return _font(size).getlength(text)


def _with_legend(panel: Image, entries: Sequence[tuple[Image, str]], width: int | None = None) -> Image:
    """The panel above a strip that explains its colours: swatches, each followed by a text, over several lines.

    `width` is what there is where the panel itself is narrower.
    """
    pil, image_draw = optional_import("PIL.Image"), optional_import("PIL.ImageDraw")
    width = panel.width if width is None else max(width, panel.width)

    def length(entry: tuple[Image, str], size: float) -> float:
        swatch, text = entry
        return round(size * swatch.width / swatch.height) + 0.45 * size + _text_length(text, size)

    size = min(max(width / 38, 12), 26)
    size = _fitting(size, width, lambda size: max(0.6 * size + length(entry, size) for entry in entries))
    line = round(2 * size)
    canvas = pil.new("RGB", (width, panel.height + line * len(entries)), _BACKGROUND)
    canvas.paste(panel, (0, 0))
    draw, font = image_draw.Draw(canvas), _font(size)
    x, y = 0.5 * size, panel.height + 0.5 * line
    for entry in entries:
        swatch, text = entry
        swatch = swatch.resize((round(size * swatch.width / swatch.height), round(size)))
        if x > size and x + length(entry, size) > width:
            x, y = 0.5 * size, y + line
        canvas.paste(swatch, (round(x), round(y - size / 2)))
        draw.text((x + swatch.width + 0.45 * size, y), text, fill=_TEXT, font=font, anchor="lm")
        x += length(entry, size) + 1.2 * size
    return canvas.crop((0, 0, width, round(y + 0.5 * line)))


def _selection_panel(
    image: Image, roles: Tensor, grid: tuple[int, int], looks: Sequence[_Look], padding: Tensor | None = None
) -> Image:
    """Kept tokens over the dimmed image; `padding` [N] bool are tokens that were none to choose from."""
    pil, image_draw, enhance = (
        optional_import("PIL.Image"),
        optional_import("PIL.ImageDraw"),
        optional_import("PIL.ImageEnhance"),
    )
    panel = enhance.Brightness(enhance.Color(image).enhance(0.2)).enhance(0.36)
    draw = image_draw.Draw(panel)
    rows, columns = _edges(image.height, grid[0]), _edges(image.width, grid[1])
    empty = [False] * len(roles) if padding is None else padding.tolist()
    for index, role in enumerate(roles.tolist()):
        y, x = divmod(index, grid[1])
        left, top, right, bottom = columns[x], rows[y], columns[x + 1], rows[y + 1]
        if role != 0:
            color, tint, outline, _ = looks[role]
            token = image.crop((left, top, right, bottom))
            panel.paste(pil.blend(token, pil.new("RGB", token.size, color), tint), (left, top))
            width = max(1, round(min(token.size) * outline))
            draw.rectangle((left, top, right - 1, bottom - 1), outline=color, width=width)
            if looks[role].hatched:
                _hatch(panel, (left, top, right, bottom), color)
        elif empty[index]:
            draw.rectangle((left, top, right - 1, bottom - 1), fill=_PADDING)
    return panel


def _hatch(panel: Image, box: tuple[int, int, int, int], color: tuple[int, int, int]) -> None:
    """Diagonal lines over a token."""
    left, top, right, bottom = box
    size = right - left, bottom - top
    step = max(4, round(min(size) / 3))
    y, x = np.mgrid[: size[1], : size[0]]
    lines = ((x + y) % step < max(1, round(step / 4))).astype(np.uint8) * 255
    panel.paste(color, (left, top), optional_import("PIL.Image").fromarray(lines))


def _swatch(look: _Look) -> Image:
    pil = optional_import("PIL.Image")
    if not look.hatched:
        return pil.new("RGB", (8, 8), look.color)
    swatch = pil.new("RGB", (24, 24), tuple(channel // 3 for channel in look.color))
    _hatch(swatch, (0, 0, 24, 24), look.color)
    return swatch


def _selection_legend(
    roles: Tensor,
    role_names: Sequence[str] = ROLE_NAMES,
    padding: Tensor | None = None,
    merged: Sequence[str] = (),
) -> list[tuple[Image, str]]:
    pil, looks = optional_import("PIL.Image"), _looks(role_names, merged)
    dropped, *counts = torch.bincount(roles.long(), minlength=len(looks)).tolist()
    empty = 0 if padding is None else int((padding & (roles == 0)).sum())
    texts = [counted(name, count) for name, count in zip(role_names, counts)]
    shown = [(_swatch(look), text) for look, text, count in zip(looks[1:], texts, counts) if count]
    shown.append((_swatch(looks[0]), f"{dropped - empty} dropped"))
    if empty:
        shown.append((pil.new("RGB", (8, 8), _PADDING), f"{empty} padding"))
    return shown


def counted(role: str, count: int) -> str:
    """How many tokens have a role: 1 register, 2 registers, but 2 kept, or dominant, or like the text."""
    return f"{count} {role}{'s' * (count != 1 and role in ROLE_NAMES)}"


def _span(scores: Tensor) -> tuple[float, float]:
    """From the 1st to the 99th percentile: a few tokens may score a hundred times the rest, and be one bright dot."""
    low, high = torch.quantile(scores, torch.tensor([0.01, 0.99], dtype=torch.float64)).tolist()
    return low, high


def _heat(values: Tensor, colormap: str) -> Image:
    """Colours of numbers from 0 to 1, [h, w]."""
    colormaps = optional_import("matplotlib").colormaps
    if colormap not in colormaps:
        raise ValueError(f"colormap: expected the name of a matplotlib colormap, got {colormap!r}")
    colors = colormaps[colormap](values.numpy(), bytes=True)[..., :3].copy()
    return optional_import("PIL.Image").fromarray(colors)


def _score_panel(
    image: Image,
    scores: Tensor,
    grid: tuple[int, int],
    colormap: str,
    span: tuple[float, float],
    padding: Tensor | None = None,
) -> Image:
    """The heat map over the grey image."""
    pil, enhance = optional_import("PIL.Image"), optional_import("PIL.ImageEnhance")
    low, high = span
    share = ((scores - low) / (high - low)).clamp(0, 1) if high > low else torch.full_like(scores, 0.5)
    tokens = _heat(share.reshape(grid), colormap).resize(image.size, pil.Resampling.NEAREST)
    panel = pil.blend(enhance.Color(image).enhance(0.0), tokens, 0.68)
    if padding is not None:
        mask = pil.fromarray((padding.reshape(grid) * 255).to(torch.uint8).numpy())
        panel.paste(_PADDING, (0, 0), mask.resize(image.size, pil.Resampling.NEAREST))
    return panel


def _score_legend(span: tuple[float, float], colormap: str) -> list[tuple[Image, str]]:
    return [(_heat(torch.linspace(0, 1, 96).expand(16, 96), colormap), f"{span[0]:.2g} to {span[1]:.2g}")]


def draw_selection(
    image: Image,
    roles: Tensor | Sequence[int],
    grid: Sequence[int],
    *,
    role_names: Sequence[str] = ROLE_NAMES,
    legend: bool = True,
) -> Image:
    """Kept tokens over the image, dropped tokens dark: HiPrune's anchors yellow, buffers red, registers cyan.

    Args:
        image: PIL image, as the model sees it (resized and cropped), any size; small ones are enlarged by a whole
            factor until a token measures at least 28 pixels.
        roles: [N] integers, 0 dropped, else 1, 2, ... as in `role_names`; one image, no prefix tokens.
        grid: (height, width) in tokens; N = height * width.
        role_names: the method's, `Selection.role_names`; HiPrune's are anchor, buffer and register.
        legend: add a strip below the image that names the colours and counts the tokens.

    Returns:
        A new RGB PIL image.

    Raises:
        ValueError: if ``roles`` does not fit ``grid``, or holds something else than roles.
        TypeError: if ``image`` is not a PIL image.
        ImportError: if pillow is missing.

    Example:
        >>> selection = hk.last_selection(model)[0]
        >>> draw_selection(image, selection.roles, selection.grid, role_names=selection.role_names).save("kept.png")
    """
    image, grid = _checked_image(image), _checked_grid(grid)
    roles = _checked_roles(roles, grid, role_names)
    panel = _selection_panel(_enlarged(image, grid), roles, grid, _looks(role_names))
    return _with_legend(panel, _selection_legend(roles, role_names)) if legend else panel


def draw_scores(
    image: Image,
    scores: Tensor | Sequence[float],
    grid: Sequence[int],
    *,
    colormap: str = "inferno",
    legend: bool = True,
) -> Image:
    """Heat map of one layer's column scores (Eq. 2 of the paper) over the grey image.

    The colours span the scores from their 1st to their 99th percentile; the legend prints both.

    Args:
        image: PIL image, as the model sees it; enlarged as by `draw_selection`.
        scores: [N] finite numbers; one image, prefix tokens sliced off.
        grid: (height, width) in tokens; N = height * width.
        colormap: name of a matplotlib colormap.
        legend: add a strip below the image with the colours' scale.

    Returns:
        A new RGB PIL image.

    Raises:
        ValueError: if ``scores`` does not fit ``grid`` or is not finite, or the colormap is unknown.
        TypeError: if ``image`` is not a PIL image.
        ImportError: if pillow or matplotlib is missing.

    Example:
        >>> with hk.record_scores(encoder, layers=[9]) as scores:
        ...     encoder(pixel_values)
        >>> draw_scores(image, scores[9][0][0, scores.num_prefix_tokens :], (24, 24)).save("object_layer.png")
    """
    image, grid = _checked_image(image), _checked_grid(grid)
    scores = _checked_scores("scores", scores, grid)
    span = _span(scores)
    panel = _score_panel(_enlarged(image, grid), scores, grid, colormap, span)
    return _with_legend(panel, _score_legend(span, colormap)) if legend else panel


def draw_overview(
    image: Image,
    object_scores: Tensor | Sequence[float],
    deep_scores: Tensor | Sequence[float],
    roles: Tensor | Sequence[int],
    grid: Sequence[int],
    *,
    titles: Sequence[str] = ("image", "object layer scores", "feature layer scores", "kept tokens"),
    colormap: str = "inferno",
) -> Image:
    """Four panels side by side: the image, the scores of both layers, the kept tokens; titles above, legends below.

    Args:
        image: PIL image, as the model sees it; enlarged as by `draw_selection`.
        object_scores: [N] scores that choose the anchors.
        deep_scores: [N] scores that choose the registers, those of the feature layer.
        roles: [N] integers from 0 to 3, as of `select_tokens`.
        grid: (height, width) in tokens; N = height * width.
        titles: four lines, one above each panel.
        colormap: name of a matplotlib colormap.

    Returns:
        A new RGB PIL image.

    Raises:
        ValueError: if an argument does not fit ``grid``, scores are not finite, or there are not four titles.
        TypeError: if ``image`` is not a PIL image.
        ImportError: if pillow or matplotlib is missing.

    Example:
        >>> draw_overview(image, object_scores[0, 1:], deep_scores[0, 1:], roles[0], (24, 24)).save("overview.png")
    """
    if isinstance(titles, str) or len(titles) != 4:
        raise ValueError(f"titles: expected four lines, got {titles!r}")
    grid = _checked_grid(grid)
    scores = {"object_scores": object_scores, "deep_scores": deep_scores}
    checked = [_checked_scores(name, values, grid) for name, values in scores.items()]
    return draw_views([View(image, grid)], roles, checked, titles=titles, colormap=colormap)


def draw_views(
    views: Sequence[View],
    roles: Tensor | Sequence[int],
    scores: Sequence[Tensor | Sequence[float]] = (),
    *,
    titles: Sequence[str],
    role_names: Sequence[str] = ROLE_NAMES,
    candidates: Tensor | None = None,
    merged: Sequence[str] = (),
    colormap: str = "inferno",
) -> Image:
    """What a model sees, the scores that a method read, and the kept tokens, in panels with titles and legends.

    An image that was cut into tiles shows them in their places, a grid of tiles, beside the view of the whole.

    Args:
        views: the image, or the view of the whole and the tiles in any order; their tokens are counted one view after
            the other: N in all.
        roles: [N] integers, 0 dropped, else 1, 2, ... as in `role_names`.
        scores: heat maps, [N] finite numbers each; one span of colours for all views.
        titles: a line above each panel: the image, each of the scores, and the kept tokens.
        role_names: the method's.
        candidates: [N] bool, False for padding, which no method may keep; None: all are.
        merged: which of the role names are hatched, as other rows stand there: `Method.merged_roles`.
        colormap: name of a matplotlib colormap.

    Returns:
        A new RGB PIL image: one row of panels, or two where that would be too wide.

    Raises:
        ValueError: if an argument does not fit the views' grids, scores are not finite, or titles are missing.
        TypeError: if an image is not a PIL image.
        ImportError: if pillow or matplotlib is missing.

    Example:
        >>> views = [View(whole, (24, 24)), View(left, (24, 24), (0, 0)), View(right, (24, 24), (0, 1))]
        >>> draw_views(views, roles, role_names=("kept",), titles=("image", "kept tokens")).save("kept.png")
    """
    views, total, images, padding = _prepared(views, candidates)
    grids = [view.grid for view in views]
    roles = _checked_roles(roles, total, role_names)
    maps_of = [_checked_scores(f"scores[{i}]", values, total) for i, values in enumerate(scores)]
    if isinstance(titles, str) or len(titles) != len(scores) + 2:
        raise ValueError(f"titles: expected {len(scores) + 2} lines, got {titles!r}")

    sizes = [math.prod(grid) for grid in grids]
    empty = [None] * len(views) if padding is None else padding.split(sizes)
    places = [view.place for view in views]
    seen = _mosaic(images, places)
    width = max(seen.width, _LEAST_COLUMN)
    panels = [seen]
    for values in maps_of:
        span = _span(values if padding is None else values[~padding])
        parts = zip(images, values.split(sizes), grids, empty)
        maps = [_score_panel(image, part, grid, colormap, span, none) for image, part, grid, none in parts]
        heat = _mosaic(maps, places)
        panels.append(_with_legend(heat, _score_legend(span, colormap), width))
    panels.append(_kept_panel(images, views, roles, role_names, merged, padding, width))
    return _figure(panels, titles, width)


def draw_methods(
    views: Sequence[View],
    selections: Sequence[tuple[Tensor | Sequence[int], Sequence[str], Sequence[str]]],
    *,
    titles: Sequence[str],
    candidates: Tensor | None = None,
) -> Image:
    """What a model sees, and beside it the tokens that each of several methods keeps of it.

    Args:
        views: as of `draw_views`.
        selections: of each method the roles [N], the names of its roles, and which of them are merged.
        titles: a line above each panel: the image, and each method.
        candidates: [N] bool, False for padding; None: all are.

    Returns:
        A new RGB PIL image: panels in as many rows as make it no wider than can be looked at.

    Raises:
        ValueError: if roles do not fit the views' grids, or titles are missing.
        TypeError: if an image is not a PIL image.
        ImportError: if pillow is missing.

    Example:
        >>> views, kept = [View(image, (24, 24))], [(roles, ("kept",), ()), (other_roles, ("kept",), ())]
        >>> draw_methods(views, kept, titles=("image", "FasterVLM", "DivPrune")).save("both.png")
    """
    if isinstance(titles, str) or len(titles) != len(selections) + 1:
        raise ValueError(f"titles: expected {len(selections) + 1} lines, got {titles!r}")
    views, total, images, padding = _prepared(views, candidates)
    panels = [_mosaic(images, [view.place for view in views])]
    width = max(panels[0].width, _LEAST_COLUMN)
    for roles, role_names, merged in selections:
        checked = _checked_roles(roles, total, role_names)
        panels.append(_kept_panel(images, views, checked, role_names, merged, padding, width))
    return _figure(panels, titles, width)


def draw_layers(view: View, scores: Tensor, *, colormap: str = "inferno") -> Image:
    """Heat maps of every layer's scores over one picture, in rows: the picture, then layers 1, 2, ...

    Each map's colours span its own scores, from the 1st to the 99th percentile.

    Args:
        view: the picture, and its grid of tokens.
        scores: [L, N] finite numbers.
        colormap: name of a matplotlib colormap.

    Returns:
        A new RGB PIL image.

    Raises:
        ValueError: if the scores do not fit the grid or are not finite, or the colormap is unknown.
        TypeError: if the image is not a PIL image.
        ImportError: if pillow or matplotlib is missing.

    Example:
        >>> found = analyze_image(loaded, image)
        >>> draw_layers(found.view, found.scores).save("layers.png")
    """
    image, grid = _checked_image(view.image), _checked_grid(view.grid)
    height = max(1, round(_LAYER_WIDTH * image.height / image.width))
    small = image.resize((_LAYER_WIDTH, height), optional_import("PIL.Image").Resampling.LANCZOS)
    checked = [_checked_scores(f"scores[{i}]", values, grid) for i, values in enumerate(scores)]
    maps = [_score_panel(small, values, grid, colormap, _span(values)) for values in checked]
    titles = ["what the model sees", *(f"layer {layer}" for layer in range(1, len(maps) + 1))]
    return _figure([small, *maps], titles, _LAYER_WIDTH)


def _prepared(
    views: Sequence[View], candidates: Tensor | None
) -> tuple[list[View], tuple[int, int], list[Image], Tensor | None]:
    """Checked views, the grid of all their tokens, their images large enough, and what is padding."""
    views = [View(_checked_image(image), _checked_grid(grid), place) for image, grid, place in views]
    total = views[0].grid if len(views) == 1 else (1, sum(math.prod(view.grid) for view in views))
    least_cell = _LEAST_CELL if len(views) == 1 else _LEAST_CELL_OF_TILES
    images = [_enlarged(view.image, view.grid, least_cell) for view in views]
    padding = None if candidates is None else ~_checked_tokens("candidates", candidates, total).bool()
    return views, total, images, padding


def _kept_panel(
    images: Sequence[Image],
    views: Sequence[View],
    roles: Tensor,
    role_names: Sequence[str],
    merged: Sequence[str],
    padding: Tensor | None,
    width: int,
) -> Image:
    """The kept tokens of all views, with a legend."""
    sizes, looks = [math.prod(view.grid) for view in views], _looks(role_names, merged)
    empty = [None] * len(views) if padding is None else padding.split(sizes)
    parts = zip(images, roles.split(sizes), views, empty)
    panels = [_selection_panel(image, part, view.grid, looks, none) for image, part, view, none in parts]
    kept = _mosaic(panels, [view.place for view in views])
    return _with_legend(kept, _selection_legend(roles, role_names, padding, merged), width)


def _mosaic(panels: Sequence[Image], places: Sequence[tuple[int, int] | None]) -> Image:
    """Tiles in their places, to the right of what has none."""
    if len(panels) == 1:
        return panels[0]
    pil = optional_import("PIL.Image")
    tiles = {place: panel for place, panel in zip(places, panels) if place is not None}
    whole = [panel for place, panel in zip(places, panels) if place is None]
    gap = max(4, round(panels[0].width / 48))
    rows, columns = (1 + max(place[axis] for place in tiles) if tiles else 0 for axis in (0, 1))
    widths = [max(panel.width for place, panel in tiles.items() if place[1] == x) for x in range(columns)]
    heights = [max(panel.height for place, panel in tiles.items() if place[0] == y) for y in range(rows)]
    height = max([sum(heights) + gap * (rows - 1), *(panel.height for panel in whole)])
    left = sum(panel.width + 4 * gap for panel in whole)
    width = left + sum(widths) + gap * (columns - 1) if tiles else left - 4 * gap
    canvas, x = pil.new("RGB", (width, height), _BACKGROUND), 0
    for panel in whole:
        canvas.paste(panel, (x, (height - panel.height) // 2))
        x += panel.width + 4 * gap
    top = (height - sum(heights) - gap * (rows - 1)) // 2
    for (row, column), panel in tiles.items():
        place = left + sum(widths[:column]) + gap * column, top + sum(heights[:row]) + gap * row
        canvas.paste(panel, place)
    return canvas


def _figure(panels: Sequence[Image], titles: Sequence[str], width: int) -> Image:
    """Panels of at most this width in as few rows as are not too wide, a title above each."""
    pil, image_draw = optional_import("PIL.Image"), optional_import("PIL.ImageDraw")
    columns, rows_of_panels = len(panels), 1
    while columns > 3 and columns * width > min(_WIDEST_ROW, _FLATTEST_ROW * rows_of_panels * panels[0].height):
        rows_of_panels += 1
        columns = math.ceil(len(panels) / rows_of_panels)
    margin = max(round(width / 32), 6) if width <= 1000 else 32
    size = min(max(width / 26, 13), 34)
    size = min(_fitting(size, width, functools.partial(_text_length, title)) for title in titles)
    head = round(2.2 * size)
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [head + max(panel.height for panel in row) + margin // 2 for row in rows]
    figure = pil.new("RGB", (columns * width + (columns + 1) * margin, sum(heights)), _BACKGROUND)
    draw, font = image_draw.Draw(figure), _font(size)
    for i, (panel, title) in enumerate(zip(panels, titles)):
        y, x = divmod(i, columns)
        left, top = margin + x * (width + margin), sum(heights[:y])
        figure.paste(panel, (left, top + head))
        draw.text((left, top + head / 2), title, fill=_TEXT, font=font, anchor="lm")
    return figure
