"""Recording column scores of a stock vision encoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from torch import Tensor, nn

from .attention import Attention, refuse_tapped, tap_attention
from .edits import Edits
from .encoders import PATCH
from .towers import find_encoder


class LayerScores(dict[int, list[Tensor]]):
    """Recorded column scores: 1-based layer -> one [B, prefix + N] float32 tensor per forward call.

    Attributes:
        num_prefix_tokens: how many leading columns belong to prefix tokens (CLS), not to the image's grid.
    """

    num_prefix_tokens: int


_RECORDING: ContextVar[tuple[LayerScores, ...]] = ContextVar("hiprune_recording", default=())


@dataclass
class _Recorder:
    """Listens to one layer's attention; the stock function computes the output."""

    scores: LayerScores
    layer: int

    def __call__(
        self, module: nn.Module, attention: Attention, stock: Callable[[], tuple[Tensor, Tensor | None]]
    ) -> tuple[Tensor, Tensor | None]:
        # Another thread's forward through the same modules is not part of this recording.
        if any(active is self.scores for active in _RECORDING.get()):
            self.scores[self.layer].append(attention.column_scores().detach())
        return stock()


@contextmanager
def record_scores(encoder: nn.Module, layers: str | Sequence[int] = "all") -> Iterator[LayerScores]:
    """Record the column scores (Eq. 2) of a vision encoder's layers while its forward runs; nothing is pruned.

    Outputs stay bit for bit what they are without recording. Only forwards of the current thread are recorded.

    Args:
        encoder: a supported vision encoder (`CLIPVisionModel`), the transformer inside it, or any model that holds one,
            such as `LlavaForConditionalGeneration`.
        layers: 1-based layer numbers, or "all".

    Yields:
        A dict from layer to a list with one tensor per forward call: [B, N] float32 with every key's column in raster
        order, prefix tokens included (`scores.num_prefix_tokens` of them lead), detached.

    Raises:
        TypeError: if `encoder` is not a module or a layer is not an int.
        ValueError: if there is no supported encoder, a layer is out of range, or the model is patched or recorded.

    Example:
        >>> with record_scores(encoder, layers=[9, 23]) as scores:
        ...     encoder(pixel_values)
        >>> scores[9][0].shape
        torch.Size([1, 577])
    """
    family, config, modules = find_encoder(encoder)
    wanted = range(1, len(modules) + 1) if layers == "all" else layers
    if isinstance(wanted, (str, int)) or not all(isinstance(layer, int) for layer in wanted):
        raise TypeError(f'layers: expected "all" or a sequence of 1-based layer numbers, got {layers!r}')
    if not all(1 <= layer <= len(modules) for layer in wanted):
        raise ValueError(f"layers: expected numbers from 1 to {len(modules)}, got {layers!r}")
    if any(PATCH in module.__dict__ for module in encoder.modules()):
        raise ValueError(
            "encoder: it is patched, and a pruned forward has no scores of every layer; call remove_hiprune first"
        )
    attentions = [module.get_submodule(family.attention) for module in modules]
    refuse_tapped(attentions)
    scores = LayerScores({layer: [] for layer in wanted})
    scores.num_prefix_tokens = family.num_prefix_tokens(config)
    edits = Edits()
    token = _RECORDING.set((*_RECORDING.get(), scores))
    try:
        for layer in scores:
            tap_attention(edits, attentions[layer - 1], _Recorder(scores, layer))
        yield scores
    finally:
        _RECORDING.reset(token)
        edits.undo()
