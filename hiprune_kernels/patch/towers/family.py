"""What the vision encoders have in common, and the record of what differs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attention import Attention

Grid = tuple[int, ...]  # (h, w), or (t, h, w)


@dataclass(frozen=True)
class EncoderFamily:
    """What differs between vision encoders; one entry per family in `ENCODERS`.

    `project` and `finish` are the two ends of a layer, with the attention itself between them: the feature layer runs
    the first for all rows and the second for the selected ones. Both call the stock submodules.
    """

    name: str  # as people call it
    layers: str  # path of the list of layers, below the module whose config has this family's model type
    attention: str  # path of the attention module that looks its attention function up, below a layer
    project: Callable[..., Attention]  # (layer, hidden_states, the layer's other arguments) -> queries, keys, values
    finish: Callable[[nn.Module, Tensor, Tensor], Tensor]  # (layer, hidden states, attention output) of rows -> states
    grids: Callable[[Any, dict[str, Any]], list[Grid]]  # (config, the encoder's arguments) -> token grid of each image
    computed: tuple[str, ...] = ()  # paths of what else than a layer and its attention they compute, not merely call
    not_in: tuple[str, ...] = ()  # classes of modules with such layers that are no vision encoder
    num_prefix_tokens: Callable[[Any], int] = lambda config: 0  # leading rows (CLS, registers): never candidates
    object_share: float = 9 / 24  # default object layer as a share of the depth: layer 9 of CLIP-L's 24
    official_rule: str = "official"  # the selection rule of the authors' released code for this kind of encoder ...
    official_means: bool = True  # ... and whether it is handed means over queries instead of sums
    unit_rows: Callable[[Any, dict[str, Any]], Tensor | None] = lambda config, arguments: None
    # ^ [T, G]: the encoder rows (behind the prefix) that make each token, in raster order; None: row t is token t
    packed: bool = False  # hidden states are [T, C], all images one behind the other, rather than [B, N, C]
    full_shape: bool = False  # what follows the encoder needs the full grid: kept rows are spread over zeros
    returns_tuple: bool = False  # a layer returns (hidden_states, attention weights)
    notes: str = ""  # what `hiprune info --models` says of limits

    def default_object_layer(self, depth: int, feature_layer: int) -> int:
        """The 1-based object layer of an encoder of `depth` layers, at most the feature layer."""
        return min(max(1, round(self.object_share * depth)), feature_layer)


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def image_grids(config: Any, arguments: dict[str, Any]) -> list[Grid]:
    """`pixel_values` [B, C, H, W], all of one size."""
    pixel_values = arguments["pixel_values"]
    height, width = pixel_values.shape[-2:]
    patch_height, patch_width = sides(config.patch_size)
    return [(height // patch_height, width // patch_width)] * len(pixel_values)


def finish_layer(
    layer: nn.Module, states: Tensor, attended: Tensor, *, output: str, norm: str, drop: str = ""
) -> Tensor:
    """`EncoderFamily.finish` of a pre-norm layer: `output` is the path of its attention's output projection.

    `drop` names its dropout, which does nothing in a pruned forward, but somebody may have hooked it.
    """
    attended, dropped = layer.get_submodule(output)(attended), getattr(layer, drop) if drop else nn.Identity()
    states = states + dropped(attended)
    return states + dropped(layer.mlp(getattr(layer, norm)(states)))
