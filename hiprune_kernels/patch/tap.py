"""What an attention layer of a vision encoder works on, and the tap that lets us listen to it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .. import ops
from .edits import Edits, StockModule

_TAP = "_hiprune_tap"
# The attention implementation that hands a call to the module's tap. "flash" in its name makes the Qwen encoders hand
# over all their packed sequences at once instead of one window after the other; other encoders do not look.
_TAPPED = "hiprune_tapped_flash"


class Attention(NamedTuple):
    """Queries, keys and values of one layer: a batch [B, H, N, D], or packed sequences [T, H, D] with `cu_seqlens`."""

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float | None
    key_mask: Tensor | None = None  # [B, N] bool: False for padding, as key and as query; only where nothing is pruned
    cu_seqlens: Tensor | None = None  # [S + 1] int32
    plain_key: Tensor | None = None  # the keys before they were rotated, where they are

    def autocast(self) -> Attention:
        """In the dtype that fused attention computes in: under autocast some encoders' norms give float32 to it."""
        device = self.query.device.type
        if not torch.is_autocast_enabled(device):
            return self
        dtype = torch.get_autocast_dtype(device)
        states = (self.query, self.key, self.value)
        query, key, value = (each if each.dtype == torch.float64 else each.to(dtype) for each in states)
        return self._replace(query=query, key=key, value=value)

    def column_scores(self, queries: str = "all") -> Tensor:
        """Eq. 2 over all queries ("all"), their mean, or the first one ("cls"): [B, N], or [T] for packed sequences."""
        if self.cu_seqlens is not None:
            scores = ops.attention_scores_varlen(self.query, self.key, cu_seqlens_q=self.cu_seqlens, scale=self.scale)
        elif queries == "cls":
            return ops.attention_scores(self.query[:, :, :1], self.key, scale=self.scale)
        else:
            mask = self.key_mask
            scores = ops.attention_scores(self.query, self.key, scale=self.scale, key_mask=mask, query_mask=mask)
        return scores / self._num_queries() if queries == "mean" else scores

    def output_and_scores(self, queries: str = "all") -> tuple[Tensor, Tensor]:
        """The layer's full output, [B, N, H, D] (of packed sequences [1, T, H, D]), and `column_scores`."""
        if self.cu_seqlens is not None:
            output, scores = ops.attention_with_scores_varlen(
                self.query, self.key, self.value, cu_seqlens_q=self.cu_seqlens, scale=self.scale
            )
            output = output[None]
        else:
            output, scores = ops.attention_with_scores(self.query, self.key, self.value, scale=self.scale)
            output = output.transpose(1, 2)
        return output, scores / self._num_queries() if queries == "mean" else scores

    def _num_queries(self) -> int | Tensor:
        """How many queries attend to each key."""
        if self.cu_seqlens is None:
            return self.query.shape[2]
        lengths = self.cu_seqlens.diff()
        return lengths.repeat_interleave(lengths, output_size=len(self.key))

    def mean_key(self) -> Tensor:
        """The keys before any rotation, averaged over heads: [B, N, D], or [T, D] for packed sequences."""
        key = self.key if self.plain_key is None else self.plain_key
        return key.mean(dim=1)

    def output_rows(self, rows: Tensor) -> Tensor:
        """The output for some query rows: [B, K, H * D] for `rows` [B, K]; [K, H * D] for ascending packed ones [K]."""
        if self.cu_seqlens is not None:
            starts = torch.searchsorted(rows, self.cu_seqlens.to(rows.dtype)).to(torch.int32)
            output, _ = ops.attention_with_scores_varlen(
                self.query[rows],
                self.key,
                self.value,
                cu_seqlens_q=starts,
                cu_seqlens_k=self.cu_seqlens,
                scale=self.scale,
            )
            return output.flatten(1)
        query = self.query.gather(2, rows[:, None, :, None].expand(-1, self.query.shape[1], -1, self.query.shape[3]))
        output = F.scaled_dot_product_attention(query, self.key, self.value, scale=self.scale)
        return output.transpose(1, 2).flatten(2)


def split_heads(states: Tensor, head_dim: int) -> Tensor:
    """[B, N, H * D] -> [B, H, N, D]."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def padding_mask(attention_mask: Tensor | None) -> Tensor | None:
    """The padding that a bidirectional encoder's mask hides: [B, N] bool from any form that transformers gives it.

    All queries share it, so the first one's row tells.
    """
    if attention_mask is None:
        return None
    row = attention_mask if attention_mask.ndim == 2 else attention_mask[:, 0, 0]
    return row if row.dtype == torch.bool else (row != 0 if attention_mask.ndim == 2 else row == 0)


@dataclass
class _Tap:
    """Who listens to one attention module, and the config that the module had before."""

    config: Any
    listener: Callable[..., tuple[Tensor, Tensor | None]]


def _tapped_attention(
    module: nn.Module,
    query: Tensor,  # [B, H, N, D]; packed sequences [1, H, T, D]
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of a tapped module: its tap's listener decides, and may run the stock function."""
    tap: _Tap = module.__dict__[_TAP]

    def stock() -> tuple[Tensor, Tensor | None]:
        implementation = tap.config._attn_implementation  # looked up per call: set_attn_implementation may change it
        eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
        untapped: StockModule = copy.copy(module)  # flash attention reads the implementation's name from module.config
        untapped.config = tap.config
        if cu_seq_lens_q is None:
            return function(untapped, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if "flash" in implementation:
            packed = {**kwargs, "cu_seq_lens_q": cu_seq_lens_q}
            return function(untapped, query, key, value, attention_mask, scaling=scaling, **packed)
        lengths = cu_seq_lens_q.diff().tolist()  # as the stock module does for implementations without packing
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)))
        single = {name: value for name, value in kwargs.items() if name not in _PACKED_ONLY}
        outputs = [function(untapped, *part, attention_mask, scaling=scaling, **single)[0] for part in parts]
        return torch.cat(outputs, dim=1), None

    if cu_seq_lens_q is None:
        attention = Attention(query, key, value, scaling, padding_mask(attention_mask))
    else:
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        attention = Attention(q, k, v, scaling, cu_seqlens=cu_seq_lens_q.to(torch.int32))
    return tap.listener(module, attention.autocast(), stock)


_PACKED_ONLY = ("cu_seq_lens_k", "max_length_q", "max_length_k")
ALL_ATTENTION_FUNCTIONS.register(_TAPPED, _tapped_attention)


def tap_attention(edits: Edits, attention: StockModule, listener: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    """Put a listener, called with (module, `Attention`, stock function), between a module and its attention function.

    Every attention module looks its function up by the name in its own `config`, so a private copy of that config
    changes this one layer; the config that the model saves is untouched.
    """
    config = copy.copy(attention.config)
    config._attn_implementation_internal = _TAPPED
    edits.set_attribute(attention, _TAP, _Tap(attention.config, listener))
    edits.set_attribute(attention, "config", config)


def listen_to_copy(attention: nn.Module, listener: Callable[..., tuple[Tensor, Tensor | None]]) -> nn.Module:
    """A shallow copy of an attention module, which is nobody else's, with a tap."""
    tap_attention(Edits(), attention, listener)
    return attention


def clear_taps(root: nn.Module, listener: Callable[..., tuple[Tensor, Tensor | None]]) -> None:
    """Take this listener's taps off copies of tapped modules, as PEFT makes them, which no record of edits knows."""
    for module in root.modules():
        tap = module.__dict__.get(_TAP)
        if tap is not None and tap.listener is listener:
            del module.__dict__[_TAP]
            module.__dict__["config"] = tap.config


def refuse_tapped(attentions: Iterable[nn.Module]) -> None:
    """Raise ValueError if any of these attention modules has a tap already."""
    if any(_TAP in attention.__dict__ for attention in attentions):
        raise ValueError(
            "model: its vision encoder is patched or being recorded already; call remove_hiprune, or leave "
            "record_scores, before this"
        )
