"""Masks of objects: a folder of pictures with the images' names, or a JSON file as of COCO."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .visualize import optional_import

if TYPE_CHECKING:
    from PIL.Image import Image


def load_masks(source: Path, images: dict[str, Image]) -> dict[str, Image]:
    """The mask of each image that has one, as large as the image; what is not 0 is the object.

    Args:
        source: a folder, where an image's mask has its stem and ends in .png; or a JSON file with COCO's `images` and
            `annotations`, whose polygons and run lengths of one image are joined.
        images: path -> image.

    Raises:
        ValueError: if the source cannot be read, fits none of the images, or a mask differs from its image in size.
    """
    if source.is_dir():
        found = {path: _picture(source / f"{Path(path).stem}.png") for path in images}
    elif source.is_file():
        found = _of_coco(source, images)
    else:
        raise ValueError(f"masks: there is no folder or file {str(source)!r}")
    masks = {path: mask for path, mask in found.items() if mask is not None}
    if not masks:
        raise ValueError(f"masks: expected at least one for the images, got none in {str(source)!r}")
    for path, mask in masks.items():
        if mask.size != images[path].size:
            width, height = images[path].size
            raise ValueError(
                f"masks: expected {width} x {height} pixels for {path!r}, got {mask.size[0]} x {mask.size[1]}"
            )
    return masks


def _picture(path: Path) -> Image | None:
    if not path.is_file():
        return None
    pil = optional_import("PIL.Image")
    try:
        with pil.open(path) as mask:
            values = np.asarray(mask.convert("RGB") if mask.mode in ("P", "RGB", "RGBA") else mask)
    except Exception as error:  # a damaged file can raise OSError, SyntaxError, struct.error, ...
        raise ValueError(f"masks: {str(path)!r} cannot be read: {error}") from error
    return _binary(values.max(axis=-1) > 0 if values.ndim == 3 else values > 0)


def _binary(mask: NDArray[Any]) -> Image:
    return optional_import("PIL.Image").fromarray((mask * 255).astype(np.uint8))


def _of_coco(source: Path, images: dict[str, Image]) -> dict[str, Image | None]:
    try:
        found = json.loads(source.read_text())
        files = {Path(each["file_name"]).name: each["id"] for each in found["images"]}
        segments: dict[Any, list[Any]] = {}
        for each in found["annotations"]:
            segments.setdefault(each["image_id"], []).append(each["segmentation"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"masks: expected COCO's images and annotations in {str(source)!r}, got {error!r}") from error
    masks: dict[str, Image | None] = {}
    for path, image in images.items():
        own = segments.get(files.get(Path(path).name), [])
        parts = [_segment(segment, image.height, image.width, source) for segment in own]
        masks[path] = _binary(np.logical_or.reduce(parts)) if parts else None
    return masks


def _segment(segment: Any, height: int, width: int, source: Path) -> NDArray[np.bool_]:
    """[height, width]: polygons, or run lengths as numbers or in COCO's compressed form."""
    if isinstance(segment, list):
        canvas = optional_import("PIL.Image").new("1", (width, height))
        draw = optional_import("PIL.ImageDraw").Draw(canvas)
        for polygon in segment:
            draw.polygon([(polygon[i], polygon[i + 1]) for i in range(0, len(polygon) - 1, 2)], fill=1, outline=1)
        return np.asarray(canvas)
    if not isinstance(segment, dict) or "counts" not in segment:
        raise ValueError(f"masks: expected polygons or run lengths in {str(source)!r}, got {segment!r}")
    counts = segment["counts"]
    runs = counts if isinstance(counts, list) else _decompressed(counts)
    if list(segment.get("size", [])) != [height, width] or sum(runs) != height * width:
        raise ValueError(f"masks: expected run lengths of {height} x {width} pixels in {str(source)!r}, got others")
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return flat.reshape(width, height).T  # column by column


def _decompressed(text: str) -> Sequence[int]:
    """COCO's run lengths: 5 bits a character, little end first; from the fourth on changes against two before."""
    runs: list[int] = []
    place = 0
    while place < len(text):
        value = shift = 0
        more = True
        while more:
            bits = ord(text[place]) - 48
            value |= (bits & 31) << shift
            shift, place, more = shift + 5, place + 1, bool(bits & 32)
            if not more and bits & 16:
                value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
    return runs
