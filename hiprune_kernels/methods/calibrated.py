"""An object layer from a file of `hiprune calibrate`."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..facts import EncoderFacts


class CalibratedLayer(int):
    """A layer, 1-based, that knows which encoder it was found for.

    Attributes:
        encoder: the type of that encoder's config.
        depth: how many layers it has.
    """

    encoder: str
    depth: int

    def check(self, encoder: EncoderFacts) -> None:
        """Raise ValueError where this is a layer of another encoder."""
        if (encoder.model_type, encoder.depth) != (self.encoder, self.depth):
            raise ValueError(
                f"object_layer: expected a calibration of a {encoder.model_type} of {encoder.depth} layers, got one of "
                f"a {self.encoder} of {self.depth}"
            )


def calibrated_layer(path: str | os.PathLike[str]) -> CalibratedLayer:
    """The object layer in a file of `hiprune calibrate`; `apply_hiprune(model, object_layer=PATH)` reads it by itself.

    Raises:
        ValueError: if the file is none of a calibration.

    Example:
        >>> hk.apply_hiprune(model, budget=192, object_layer=calibrated_layer("calibration.json"))
    """
    try:
        found = json.loads(Path(path).read_text())
        number, encoder, depth = found["object_layer"], found["encoder"], found["layers"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"object_layer: expected a layer or a file of hiprune calibrate, got {str(path)!r}") from error
    if type(number) is not int or type(depth) is not int or not 1 <= number <= depth:
        raise ValueError(f"object_layer: expected 1 to {depth} in {str(path)!r}, got {number!r}")
    layer = CalibratedLayer(number)
    layer.encoder, layer.depth = encoder, depth
    return layer
