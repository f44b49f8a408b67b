"""What differs between models around a vision encoder: the record that every family fills in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...facts import ModelKind
from ...methods import TokenLayout
from ...methods.base import Grid
from ..call import Call
from ..edits import StockModule


def one_tile_each(call: Call, grids: list[Grid], video: bool) -> TokenLayout:
    """Every image is one tile, and its tokens follow one another in the prompt."""
    return TokenLayout(tuple(grids), (1,) * len(grids))


@dataclass(frozen=True)
class ModelFamily:
    """One entry per model type in `hiprune_kernels.patch.FAMILIES`."""

    kind: ModelKind
    # model -> the module whose forward opens a call
    host: Callable[[StockModule], StockModule]
    # host -> its vision encoders
    encoders: Callable[[StockModule], Sequence[nn.Module]]
    # (host, its forward's arguments) -> 1-based layer
    feature_layer: Callable[[StockModule, dict[str, Any]], int]
    # raises if this host is not supported
    check: Callable[[StockModule], None] = lambda host: None
    # raises for what a pruned forward cannot give
    check_call: Callable[[Call], None] = lambda call: None
    # (call, grids of what the encoder gets, whether these are videos) -> how the tokens lie
    layout: Callable[[Call, list[Grid], bool], TokenLayout] = one_tile_each
    # what takes features to the language model
    connector: Callable[[StockModule], nn.Module | None] = lambda host: None
    language_model: Callable[[StockModule], StockModule | None] = lambda host: None
    # the token id of placeholders of videos
    video_token: Callable[[Call], int] = lambda call: call.patch.host.config.video_token_id
    # M-RoPE: position ids of the language model tell places in images
    multimodal_positions: bool = False
