"""What the vision encoders have in common, and the record of what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ...facts import EncoderKind
from ...methods.base import Grid
from ..edits import StockModule
from ..tap import Attention


@dataclass(frozen=True)
class EncoderFamily:
    """How a kind of vision encoder computes; one entry per model type in `ENCODERS`.

    `project` and `finish` are the two ends of a layer, with the attention itself between them: the feature layer runs
    the first for all rows and the second for the selected ones. Both call the stock submodules.
    """

    kind: EncoderKind
    # path of the list of layers, below the module whose config has this family's model type
    layers: str
    # path of the attention module that looks its attention function up, below a layer
    attention: str
    # (layer, hidden_states, the layer's other arguments) -> queries, keys, values
    project: Callable[..., Attention]
    # (layer, hidden states, attention output) of rows -> states
    finish: Callable[[StockModule, Tensor, Tensor], Tensor]
    # (config, the encoder's arguments) -> token grid of each image
    grids: Callable[[Any, dict[str, Any]], list[Grid]]
    # paths of what else than a layer and its attention they compute, not merely call
    computed: tuple[str, ...] = ()
    # classes of modules with such layers that are no vision encoder
    not_in: tuple[str, ...] = ()
    # [T, G]: the encoder rows (behind the prefix) that make each token, in raster order; None: row t is token t
    unit_rows: Callable[[Any, dict[str, Any]], Tensor | None] = lambda config, arguments: None
    # hidden states are [T, C], all images one behind the other, rather than [B, N, C]
    packed: bool = False
    # what follows the encoder needs the full grid: kept rows are spread over zeros
    full_shape: bool = False
    # a layer returns (hidden_states, attention weights)
    returns_tuple: bool = False


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def image_grids(config: Any, arguments: dict[str, Any]) -> list[Grid]:
    """`pixel_values` [B, C, H, W], all of one size."""
    pixel_values = arguments["pixel_values"]
    height, width = pixel_values.shape[-2:]
    patch_height, patch_width = sides(config.patch_size)
    return [(height // patch_height, width // patch_width)] * len(pixel_values)


def finish_layer(
    layer: StockModule, states: Tensor, attended: Tensor, *, output: str, norm: str, drop: str = ""
) -> Tensor:
    """`EncoderFamily.finish` of a pre-norm layer: `output` is the path of its attention's output projection.

    `drop` names its dropout, which does nothing in a pruned forward, but somebody may have hooked it.
    """
    attended, dropped = layer.get_submodule(output)(attended), getattr(layer, drop) if drop else nn.Identity()
    states = states + dropped(attended)
    return states + dropped(layer.mlp(getattr(layer, norm)(states)))
