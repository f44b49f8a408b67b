"""A CLIP tower that lets a method look at it, and computes the last layer for the kept tokens only where it can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..methods import Stage
from .encoder import Pass, over_all_heads
from .options import Options


class Tower:
    """Taps of a tower's layers. vLLM builds the tower up to the feature layer, which is the last one.

    While a `Pass` is open, layers whose scores are wanted yield them, and the feature layer also keys; where our kernel
    outruns SDPA, it serves the other layers too. Else, the layers are the stock ones.
    """

    def __init__(self, layers: Any, options: Options) -> None:
        self.options, self.open, self.sparse = options, None, False
        deepest = options.facts.feature_layer
        if len(layers) != deepest:
            raise RuntimeError(f"hiprune: expected a tower of {deepest} layers, got {len(layers)}")
        for number, layer in enumerate(layers[:-1], start=1):
            queries, attention = options.needs.scores.get(number), layer.self_attn
            attention.forward = self._attention(number, queries, attention, attention.forward)
        layers[-1].forward = self._feature_layer(layers[-1], layers[-1].forward)

    open: Pass | None

    def run(self, encode: Callable[[], Tensor], project: Callable[[Tensor], Tensor], own: Pass, sparse: bool) -> Tensor:
        """The kept tokens of a pass, [K, C], in the language model's space.

        Args:
            encode: runs the tower: [B, N, C] without the CLS row.
            project: the connector.
            own: the pass; it has its picks afterwards.
            sparse: whether all its images keep as many tokens, so that the last layer may leave out the others.
        """
        needs = self.options.needs
        self.open, self.sparse = own, sparse and own.stage is Stage.FEATURE_LAYER
        try:
            states = encode().flatten(0, 1)
        finally:
            self.open = None
        if self.sparse:
            return project(states)
        if needs.features == "encoder":
            own.features = states
        late = own.stage is Stage.LANGUAGE
        if late:
            states = own.features = project(states)
        indices = own.select(states.device)
        states = own.merged(states)[indices]
        return states if late else project(states)

    def _attention(self, number: int, queries: str | None, attention: Any, stock: Any) -> Any:
        def forward(hidden_states: Tensor) -> Any:
            if self.open is None:
                return stock(hidden_states)
            qkv, _ = attention.qkv_proj(hidden_states)
            query, key, value = _heads(qkv, attention)
            if queries in ("all", "mean") or ops.outruns_sdpa(query, key, value):
                out, scores = ops.attention_with_scores(query, key, value, scale=attention.scale)
                out = out.transpose(1, 2).flatten(2)
            else:
                out = attention.attn(*qkv.chunk(3, dim=-1))
            if queries == "cls":
                scores = _scores(query, key, queries, attention.scale)
            if queries is not None:
                self._record(number, _of_queries(scores, queries, query), attention.tp_size)
            return attention.out_proj(out)[0], None

        return forward

    def _feature_layer(self, layer: Any, stock: Any) -> Any:
        attention, number, needs = layer.self_attn, self.options.facts.feature_layer, self.options.needs
        prefix = self.options.facts.num_prefix_tokens

        def forward(hidden_states: Tensor) -> Tensor:
            own = self.open
            if own is None:
                return stock(hidden_states)
            qkv, _ = attention.qkv_proj(layer.layer_norm1(hidden_states))
            query, key, value = _heads(qkv, attention)
            if number in needs.scores:
                queries = needs.scores[number]
                self._record(number, _scores(query, key, queries, attention.scale), attention.tp_size)
            if needs.keys:
                own.keys = own.layout.keys_of_tokens(over_all_heads(key.mean(dim=1), attention.tp_size), prefix)
            if self.sparse:
                images, tokens = len(own.layout.grids), own.layout.sizes[0]
                indices = own.select(hidden_states.device).view(images, -1)
                starts = torch.arange(0, images * tokens, tokens, device=indices.device)[:, None]
                rows = F.pad(indices - starts + prefix, (prefix, 0))  # the CLS row goes along: stock code takes it off
                pick = rows[..., None].expand(-1, -1, hidden_states.shape[-1])
                hidden_states = hidden_states.gather(1, pick)
                query = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1]))
                out = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
                out = out.transpose(1, 2).flatten(2)
            else:
                out = attention.attn(*qkv.chunk(3, dim=-1))
            hidden_states = hidden_states + attention.out_proj(out)[0]
            hidden_states = hidden_states + layer.mlp(layer.layer_norm2(hidden_states))
            if needs.region_features is not None:
                own.regions = hidden_states[:, 0]
            return hidden_states

        return forward

    def _record(self, number: int, scores: Tensor, shards: int) -> None:
        assert self.open is not None
        prefix = self.options.facts.num_prefix_tokens
        self.open.scores[number] = self.open.layout.scores_of_tokens(over_all_heads(scores, shards), prefix)


def _heads(qkv: Tensor, attention: Any) -> tuple[Tensor, ...]:
    """[B, N, 3 H D] -> three of [B, H, N, D]."""
    return tuple(part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))


def _scores(query: Tensor, key: Tensor, queries: str, scale: float) -> Tensor:
    if queries == "cls":
        return ops.attention_scores(query[:, :, :1], key, scale=scale)
    return _of_queries(ops.attention_scores(query, key, scale=scale), queries, query)


def _of_queries(scores: Tensor, queries: str, query: Tensor) -> Tensor:
    return scores / query.shape[2] if queries == "mean" else scores
