"""What workers share: a pass of an encoder that a method looks at, the same on all ranks, and what the method picks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_reduce,
)

from ..methods import Method, Picks, Seen, Stage, TokenLayout
from ..methods.base import ABSENT, checked_kept, checked_picks, merges
from .options import Asked, Options


def over_all_heads(mean: Tensor, shards: int) -> Tensor:
    """A mean over the heads of this rank -> over all heads. Ranks have as many heads each."""
    return mean if shards == 1 else tensor_model_parallel_all_reduce(mean) / shards


def of_first_rank(tensor: Tensor) -> Tensor:
    """The first rank's values: nothing promises that an all-reduce gives all ranks the same bits."""
    if get_tensor_model_parallel_world_size() == 1:
        return tensor
    return get_tp_group().broadcast(tensor.contiguous(), src=0)


@dataclass
class Pass:
    """Images that ask for the same, on their way through the encoder. A `Seen` in the making, and the picks."""

    options: Options
    method: Method
    layout: TokenLayout
    scores: dict[int, Tensor] = field(default_factory=dict)
    keys: Tensor = ABSENT
    features: Tensor = ABSENT
    regions: Tensor = ABSENT
    picks: Picks | None = None

    @property
    def stage(self) -> Stage:
        return self.options.needs.stage(self.options.facts)

    @property
    def whole(self) -> bool:
        """Whether nothing is dropped."""
        return sum(checked_kept(self.method, self.layout)) == sum(self.layout.sizes)

    def select(self, device: torch.device) -> Tensor:
        """Which tokens stay, [K], counted in T, ascending in each image."""
        layout, method = self.layout, self.method
        self._seen = Seen(
            layout,
            self.scores,
            keys=self.keys,
            features=self.features,
            regions=self.regions,
            encoder=self.options.facts,
            device=device,
        )
        picks = checked_picks(method, method.select(self._seen), layout, checked_kept(method, layout), device)
        if picks.fills:
            raise RuntimeError(f"hiprune: expected as many tokens as announced, got fewer from {type(method).__name__}")
        self.picks = picks._replace(indices=of_first_rank(picks.indices), roles=of_first_rank(picks.roles))
        return self.picks.indices

    def merged(self, features: Tensor) -> Tensor:
        """What the method makes of the features of all tokens, [T, C]."""
        assert self.picks is not None
        return self.method.merge(features, self._seen, self.picks) if merges(self.method) else features


def check_config(vllm_config: Any) -> None:
    """Raise RuntimeError for parts of a server's configuration that pruning cannot go with."""
    if vllm_config.model_config.multimodal_config.video_pruning_rate:
        raise RuntimeError("hiprune: video_pruning_rate: expected none, as images are pruned")
    if vllm_config.lora_config is not None and getattr(vllm_config.lora_config, "enable_tower_connector_lora", False):
        raise RuntimeError("hiprune: enable_tower_connector_lora: expected false, as rows of the tower are dropped")
    compilation = vllm_config.compilation_config
    for name in ("compile_mm_encoder", "cudagraph_mm_encoder"):
        if getattr(compilation, name, False):
            raise RuntimeError(f"hiprune: {name}: expected false, as it goes round what selects tokens, got true")


def check_rows(embeddings: Sequence[Tensor], asked: Tensor) -> None:
    """Raise RuntimeError unless each image has as many rows as placeholders; vLLM would take the first ones."""
    expected = [Asked.from_row(row)[0] for row in asked.reshape(-1, 3).tolist()]
    found = [len(rows) for rows in embeddings]
    if found != expected:
        raise RuntimeError(f"hiprune: expected {expected} rows of images, as there are placeholders, got {found}")
