"""Pictures of a selection: the roles of tokens and their scores, drawn over the image.

Needs the extra `hiprune-kernels[images]`; PIL and matplotlib are imported when a function is called, not before.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .budget import ROLE_NAMES

if TYPE_CHECKING:
    from PIL.Image import Image

# By role: dropped (dimmed instead; this is its swatch in legends), anchor, buffer, register.
ROLE_COLORS = ((84, 86, 96), (255, 214, 10), (255, 64, 54), (64, 204, 255))
_TINTS = (0.0, 0.36, 0.32, 0.16)  # share of the role's colour over the image: anchors are few, registers many
_OUTLINES = (0.0, 0.14, 0.12, 0.08)  # width, as a share of the token's shorter side
_BACKGROUND, _TEXT = (18, 18, 23), (236, 236, 240)
_LEAST_CELL = 28  # pixels; small images are enlarged until a token's outline and its content are both visible


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


def _checked_roles(roles: Tensor | Sequence[int], grid: tuple[int, int]) -> Tensor:
    values = _checked_tokens("roles", roles, grid)
    if values.is_floating_point() or ((values < 0) | (values > 3)).any():
        raise ValueError(f"roles: expected integers from 0 to 3, got {values.unique().tolist()}")
    return values


def _checked_scores(name: str, scores: Tensor | Sequence[float], grid: tuple[int, int]) -> Tensor:
    values = _checked_tokens(name, scores, grid).double()
    if not values.isfinite().all():
        raise ValueError(f"{name}: expected finite values, got {int((~values.isfinite()).sum())} that are not")
    return values


def _edges(length: int, tokens: int) -> list[int]:
    """Pixel borders of the tokens along one axis."""
    return [round(i * length / tokens) for i in range(tokens + 1)]


def _enlarged(image: Image, grid: tuple[int, int]) -> Image:
    factor = math.ceil(_LEAST_CELL * max(grid[0] / image.height, grid[1] / image.width))
    return image.resize((image.width * factor, image.height * factor), optional_import("PIL.Image").Resampling.LANCZOS)


def _font(size: float):
    return optional_import("PIL.ImageFont").load_default(size=max(8, round(size)))


def _with_legend(panel: Image, entries: Sequence[tuple[Image, str]]) -> Image:
    """The panel above a strip that explains its colours: swatches, each followed by a text, over several lines."""
    pil, image_draw = optional_import("PIL.Image"), optional_import("PIL.ImageDraw")
    size = min(max(panel.width / 38, 12), 26)
    line = round(2 * size)
    canvas = pil.new("RGB", (panel.width, panel.height + line * len(entries)), _BACKGROUND)
    canvas.paste(panel, (0, 0))
    draw, font = image_draw.Draw(canvas), _font(size)
    x, y = 0.5 * size, panel.height + 0.5 * line
    for swatch, text in entries:
        swatch = swatch.resize((round(size * swatch.width / swatch.height), round(size)))
        width = swatch.width + 0.45 * size + draw.textlength(text, font=font)
        if x > size and x + width > panel.width:
            x, y = 0.5 * size, y + line
        canvas.paste(swatch, (round(x), round(y - size / 2)))
        draw.text((x + swatch.width + 0.45 * size, y), text, fill=_TEXT, font=font, anchor="lm")
        x += width + 1.2 * size
    return canvas.crop((0, 0, panel.width, round(y + 0.5 * line)))


def _selection_panel(image: Image, roles: Tensor, grid: tuple[int, int]) -> Image:
    pil, image_draw, enhance = (
        optional_import("PIL.Image"),
        optional_import("PIL.ImageDraw"),
        optional_import("PIL.ImageEnhance"),
    )
    panel = enhance.Brightness(enhance.Color(image).enhance(0.2)).enhance(0.36)
    draw = image_draw.Draw(panel)
    rows, columns = _edges(image.height, grid[0]), _edges(image.width, grid[1])
    for index, role in enumerate(roles.tolist()):
        if role != 0:
            y, x = divmod(index, grid[1])
            left, top, right, bottom = columns[x], rows[y], columns[x + 1], rows[y + 1]
            token = image.crop((left, top, right, bottom))
            panel.paste(pil.blend(token, pil.new("RGB", token.size, ROLE_COLORS[role]), _TINTS[role]), (left, top))
            width = max(1, round(min(token.size) * _OUTLINES[role]))
            draw.rectangle((left, top, right - 1, bottom - 1), outline=ROLE_COLORS[role], width=width)
    return panel


def _selection_legend(roles: Tensor) -> list[tuple[Image, str]]:
    pil = optional_import("PIL.Image")
    counts = torch.bincount(roles.long(), minlength=4).tolist()
    names = [name if count == 1 else f"{name}s" for name, count in zip(ROLE_NAMES, counts[1:])]
    texts = [f"{counts[0]} dropped", *(f"{count} {name}" for name, count in zip(names, counts[1:]))]
    return [(pil.new("RGB", (8, 8), ROLE_COLORS[role]), texts[role]) for role in (1, 2, 3, 0)]


def _score_panel(image: Image, scores: Tensor, grid: tuple[int, int], colormap: str) -> tuple[Image, Image, str]:
    """The heat map, and its legend's swatch and text."""
    pil, enhance, colormaps = (
        optional_import("PIL.Image"),
        optional_import("PIL.ImageEnhance"),
        optional_import("matplotlib").colormaps,
    )
    if colormap not in colormaps:
        raise ValueError(f"colormap: expected the name of a matplotlib colormap, got {colormap!r}")
    # A few tokens may score a hundred times the rest; without cutting the ends the map would be one bright dot.
    low, high = torch.quantile(scores, torch.tensor([0.01, 0.99], dtype=torch.float64)).tolist()

    def heat(values: Tensor) -> Image:
        return pil.fromarray(colormaps[colormap](values.numpy(), bytes=True)[..., :3].copy())

    share = ((scores - low) / (high - low)).clamp(0, 1) if high > low else torch.full_like(scores, 0.5)
    tokens = heat(share.reshape(grid)).resize(image.size, pil.Resampling.NEAREST)
    gray = enhance.Color(image).enhance(0.0)
    return pil.blend(gray, tokens, 0.68), heat(torch.linspace(0, 1, 96).expand(16, 96)), f"{low:.2g} to {high:.2g}"


def draw_selection(image: Image, roles: Tensor | Sequence[int], grid: Sequence[int], *, legend: bool = True) -> Image:
    """Kept tokens over the image: anchors yellow, buffers red, registers cyan, dropped tokens dark.

    Args:
        image: PIL image, as the model sees it (resized and cropped), any size; small ones are enlarged by a whole
            factor until a token measures at least 28 pixels.
        roles: [N] integers, 0 dropped, 1 anchor, 2 buffer, 3 register; one image, no prefix tokens.
        grid: (height, width) in tokens; N = height * width.
        legend: add a strip below the image that names the colours and counts the tokens.

    Returns:
        A new RGB PIL image.

    Raises:
        ValueError: if ``roles`` does not fit ``grid``, or holds something else than roles.
        TypeError: if ``image`` is not a PIL image.
        ImportError: if pillow is missing.

    Example:
        >>> selection = hk.last_selection(model)[0]
        >>> draw_selection(image, selection.roles, selection.grid).save("kept.png")
    """
    image, grid = _checked_image(image), _checked_grid(grid)
    roles = _checked_roles(roles, grid)
    panel = _selection_panel(_enlarged(image, grid), roles, grid)
    return _with_legend(panel, _selection_legend(roles)) if legend else panel


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
    panel, swatch, text = _score_panel(_enlarged(image, grid), scores, grid, colormap)
    return _with_legend(panel, [(swatch, text)]) if legend else panel


def draw_overview(
    image: Image,
    object_scores: Tensor | Sequence[float],
    deep_scores: Tensor | Sequence[float],
    roles: Tensor | Sequence[int],
    grid: Sequence[int],
    *,
    titles: Sequence[str] = ("image", "object layer scores", "deep layer scores", "kept tokens"),
    colormap: str = "inferno",
) -> Image:
    """Four panels side by side: the image, the scores of both layers, the kept tokens; titles above, legends below.

    Args:
        image: PIL image, as the model sees it; enlarged as by `draw_selection`.
        object_scores: [N] scores that choose the anchors.
        deep_scores: [N] scores that choose the registers.
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
    pil, image_draw = optional_import("PIL.Image"), optional_import("PIL.ImageDraw")
    image, grid = _checked_image(image), _checked_grid(grid)
    object_scores = _checked_scores("object_scores", object_scores, grid)
    deep_scores = _checked_scores("deep_scores", deep_scores, grid)
    roles = _checked_roles(roles, grid)
    if isinstance(titles, str) or len(titles) != 4:
        raise ValueError(f"titles: expected four lines, got {titles!r}")

    image = _enlarged(image, grid)
    heat_maps = [_score_panel(image, scores, grid, colormap) for scores in (object_scores, deep_scores)]
    panels = [
        image,
        *(_with_legend(panel, [(swatch, text)]) for panel, swatch, text in heat_maps),
        _with_legend(_selection_panel(image, roles, grid), _selection_legend(roles)),
    ]
    margin, size = round(image.width / 32), min(max(image.width / 26, 13), 34)
    head = round(2.2 * size)
    height = head + max(panel.height for panel in panels) + margin // 2
    figure = pil.new("RGB", (4 * image.width + 5 * margin, height), _BACKGROUND)
    draw = image_draw.Draw(figure)
    for i, (panel, title) in enumerate(zip(panels, titles)):
        left = margin + i * (image.width + margin)
        figure.paste(panel, (left, head))
        draw.text((left, head / 2), title, fill=_TEXT, font=_font(size), anchor="lm")
    return figure
