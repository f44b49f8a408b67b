"""Recording column scores of a stock vision encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .call import PATCH, bind, forward_names
from .edits import Edits, StockModule
from .encoders import EncoderFamily, find_encoder, locate_layers
from .sharding import refuse_sharded
from .tap import Attention, refuse_tapped, tap_attention


class LayerScores(dict[int, list[Tensor]]):
    """Recorded column scores: 1-based layer -> one float32 tensor per forward call, see `record_scores`.

    Attributes:
        num_prefix_tokens: how many leading columns belong to prefix tokens (CLS), not to the image's grid.
    """

    num_prefix_tokens: int


@dataclass
class _Recording:
    """One open `record_scores`."""

    scores: LayerScores
    raster_rows: Tensor | None = None  # [T] of the forward that runs, for packed encoders

    @property
    def active(self) -> bool:
        """Another thread's forward through the same modules is not part of this recording."""
        return any(recording is self for recording in _RECORDING.get())


_RECORDING: ContextVar[tuple[_Recording, ...]] = ContextVar("hiprune_recording", default=())


@dataclass
class _Recorder:
    """Listens to one layer's attention; the stock function computes the output."""

    recording: _Recording
    layer: int

    def __call__(
        self, module: nn.Module, attention: Attention, stock: Callable[[], tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        if self.recording.active:
            scores, rows = attention.column_scores().detach(), self.recording.raster_rows
            self.recording.scores[self.layer].append(scores if rows is None else scores[rows])
        return stock()


@dataclass
class _SizesReader:
    """Around the forward of a packed encoder: only its arguments tell where the patches of its images are."""

    recording: _Recording
    family: EncoderFamily

    def __call__(self, module: StockModule, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.recording.active:
            arguments = bind(forward_names(module), args, kwargs)
            self.recording.raster_rows = _raster_rows(self.family, module.config, arguments)
        return forward(*args, **kwargs)


def _raster_rows(family: EncoderFamily, config: Any, arguments: dict[str, Any]) -> Tensor | None:
    """A packed encoder's rows [T] in raster order of the patches, image by image: merge groups and windows undone.

    None: they are in that order.
    """
    unit_rows, grids = family.unit_rows(config, arguments), family.grids(config, arguments)
    if unit_rows is None:
        return None
    side = math.isqrt(unit_rows.shape[1])
    images = zip(unit_rows.split([math.prod(grid) for grid in grids]), grids)
    return torch.cat([rows.view(-1, *grid[-2:], side, side).transpose(2, 3).flatten() for rows, grid in images])


@contextmanager
def record_scores(encoder: nn.Module, layers: str | Sequence[int] = "all") -> Iterator[LayerScores]:
    """Record the column scores (Eq. 2) of a vision encoder's layers while its forward runs; nothing is pruned.

    Outputs stay bit for bit what they are without recording. Only forwards of the current thread are recorded.

    Scores are those of the attention that the encoder computes: in float32 within its rounding of the column sums of
    eager attention. In bfloat16 and float16 they follow from the rounded queries and keys, and are not rounded further.

    Args:
        encoder: a supported vision encoder (`CLIPVisionModel`), the transformer inside it, or any model that holds one,
            such as `LlavaForConditionalGeneration`; of several encoders the first one is recorded.
        layers: 1-based layer numbers, or "all".

    Yields:
        A dict from layer to a list with one detached float32 tensor per forward call. It has every key's column in
        raster order, prefix tokens included (`scores.num_prefix_tokens` of them lead):

        - encoders of a batch of images or clips: [B, N], a clip's frames one after the other;
        - encoders whose images are padded to one length (SigLIP 2 NaFlex): [B, N], with 0 in the columns of padding,
          whose queries do not count either;
        - encoders of packed images (Qwen-VL, GLM-4V): [T], image after image and frame after frame, the patches of each
          row by row, whatever the windows and merge groups that the encoder works in.

    Raises:
        TypeError: if `encoder` is not a module or a layer is not an int.
        ValueError: if there is no supported encoder, a layer is out of range, or the model is patched or recorded.

    Example:
        >>> with record_scores(encoder, layers=[9, 23]) as scores:
        ...     encoder(pixel_values)
        >>> scores[9][0].shape
        torch.Size([1, 577])
    """
    if not isinstance(encoder, nn.Module):
        raise TypeError(f"encoder: expected a torch.nn.Module, got {type(encoder).__name__}")
    family, config, modules = find_encoder(encoder)
    _, inner = locate_layers(encoder)
    wanted = range(1, len(modules) + 1) if isinstance(layers, str) and layers == "all" else layers
    if not isinstance(wanted, (list, tuple, range, set, frozenset)) or not all(type(layer) is int for layer in wanted):
        raise TypeError(f'layers: expected "all" or a sequence of 1-based layer numbers, got {layers!r}')
    if not all(1 <= layer <= len(modules) for layer in wanted):
        raise ValueError(f"layers: expected numbers from 1 to {len(modules)}, got {layers!r}")
    if any(PATCH in module.__dict__ for module in encoder.modules()):
        raise ValueError(
            "encoder: it is patched, and a pruned forward has no scores of every layer; call remove_hiprune first"
        )
    attentions = [module.get_submodule(family.attention) for module in modules]
    refuse_sharded(encoder, attentions)
    refuse_tapped(attentions)
    recording = _Recording(LayerScores({layer: [] for layer in wanted}))
    recording.scores.num_prefix_tokens = family.kind.num_prefix_tokens(config)
    edits = Edits()
    token = _RECORDING.set((*_RECORDING.get(), recording))
    try:
        if family.packed:
            edits.wrap_forward(inner, _SizesReader(recording, family))
        for layer in recording.scores:
            tap_attention(edits, attentions[layer - 1], _Recorder(recording, layer))
        yield recording.scores
    finally:
        _RECORDING.reset(token)
        edits.undo()
