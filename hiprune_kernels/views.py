"""The pictures that a model sees, from the tensors that its processor made of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .methods import TokenLayout
from .visualize import View, optional_import

if TYPE_CHECKING:
    from PIL.Image import Image


def views_of(
    inputs: Mapping[str, Any], layout: TokenLayout, config: Any, image_processor: Any, size: tuple[int, int]
) -> list[View]:
    """Each picture that the vision encoder gets of one image, in the order of its tokens.

    Args:
        inputs: what the processor made of the image.
        layout: how the tokens of this image lie, as the method saw it.
        config: of the model.
        image_processor: whose mean and standard deviation are taken back.
        size: (height, width) of the image.

    Returns:
        The image; or the view of the whole and the tiles, each with its place in the image. Where a model brings the
        features of all tiles to one grid (`TokenLayout.pool`), the tiles are one view.
    """
    if inputs.get("image_grid_thw") is not None:
        pixels = [_unpacked(inputs["pixel_values"], inputs["image_grid_thw"][0].tolist(), config.vision_config)]
    else:
        name = next(name for name in ("pixel_values", "pixel_values_images", "pixel_values_videos") if name in inputs)
        pixels = inputs[name]
        if name == "pixel_values_videos":  # a still: its frames are equal
            pixels = pixels[:, 0]
        pixels = list(pixels.flatten(0, -4))
    images = [picture_of(tile, image_processor) for tile in pixels]
    grids = [(grid[-2], grid[-1]) for grid in layout.grids]
    if len(images) == 1:
        return [View(images[0], grids[0])]
    places: list[tuple[int, int] | None]
    if inputs.get("image_sizes") is not None:  # the view of the whole comes first
        rows, columns = _anyres_shape(config, pixels[0].shape[-1], size)
        if len(grids) == len(images):
            places = [None, *((i // columns, i % columns) for i in range(rows * columns))]
            return [View(*view) for view in zip(images, grids, places)]
        joined = _joined(pixels[1:], columns, size)
        return [View(images[0], grids[0]), View(_resized(joined, images[0], grids, image_processor), grids[1], (0, 0))]
    columns = _closest_columns(len(images) - 1, size)  # InternVL's view of the whole comes last
    places = [*((i // columns, i % columns) for i in range(len(images) - 1)), None]
    return [View(*view) for view in zip(images, grids, places)]


def picture_of(pixels: Tensor, image_processor: Any) -> Image:
    """Pixel values [3, H, W] without their normalisation."""
    colors = pixels.float().cpu()
    if getattr(image_processor, "do_normalize", True) and getattr(image_processor, "image_mean", None) is not None:
        std, mean = (torch.tensor(x).view(-1, 1, 1) for x in (image_processor.image_std, image_processor.image_mean))
        colors = colors * std + mean
    colors = (colors.clamp(0, 1) * 255).round().to(torch.uint8)
    return optional_import("PIL.Image").fromarray(colors.permute(1, 2, 0).contiguous().numpy())


def _unpacked(patches: Tensor, grid: list[int], vision: Any) -> Tensor:
    """Qwen-VL's patches [P, 3 T p p], which stand in squares that make one token, as pixels [3, H, W]."""
    (_, height, width), side, merge = grid, vision.patch_size, vision.spatial_merge_size
    squares = height // merge, width // merge, merge, merge
    patches = patches.reshape(*squares, -1, vision.temporal_patch_size, side, side)[..., 0, :, :]
    return patches.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, height * side, width * side)


def _anyres_shape(config: Any, side: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tiles that LLaVA-NeXT and -OneVision cut an image of this size into."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size, config.image_grid_pinpoints)
    return height // side, width // side


def _joined(tiles: list[Tensor], columns: int, size: tuple[int, int]) -> Tensor:
    """Tiles put together, and their padding taken off: [3, H, W]."""
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    rows = [torch.cat(tiles[i : i + columns], dim=-1) for i in range(0, len(tiles), columns)]
    return unpad_image(torch.cat(rows, dim=-2), size)


def _resized(pixels: Tensor, whole: Image, grids: list[tuple[int, int]], image_processor: Any) -> Image:
    """The joined tiles, with tokens as large as in the view of the whole."""
    (rows, columns), (height, width) = grids[0], grids[1]
    size = round(width * whole.width / columns), round(height * whole.height / rows)
    return picture_of(pixels, image_processor).resize(size, optional_import("PIL.Image").Resampling.LANCZOS)


def _closest_columns(tiles: int, size: tuple[int, int]) -> int:
    """In how many columns so many tiles are, if their rectangle has about the image's aspect ratio, as InternVL's."""
    aspect = size[1] / size[0]
    shapes = [columns for columns in range(1, tiles + 1) if tiles % columns == 0]
    return min(shapes, key=lambda columns: abs(columns**2 / tiles - aspect))
