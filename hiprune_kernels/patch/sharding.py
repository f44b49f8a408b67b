"""Attention whose heads are shared out over processes, as by the `tp_plan` of transformers."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def heads_group(attention: nn.Module, within: nn.Module) -> Any:
    """The processes that share an attention module's heads out among them; None if each has all of them.

    Weights that FSDP has cut are whole again whenever they are used.

    Args:
        attention: of a decoder or encoder layer.
        within: the model, or the part of it, that the module is in.
    """
    if not dist.is_available() or not dist.is_initialized():
        return None
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if any(isinstance(module, FSDPModule) for module in within.modules()):
        return None
    for parameter in attention.parameters():
        if isinstance(parameter, DTensor):
            for dimension, placement in enumerate(parameter.placements):
                if placement.is_shard():
                    return parameter.device_mesh.get_group(dimension)
    return None


def all_heads(group: Any, states: Tensor) -> Tensor:
    """[B, H, N, D] from the heads [B, H / P, N, D] of each of P processes; the same bits in every one."""
    if group is None:
        return states
    parts = [torch.empty_like(states, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, states.contiguous(), group=group)
    return torch.cat(parts, dim=1)


def refuse_sharded(encoder: nn.Module, attentions: list[nn.Module]) -> None:
    """Raise ValueError if heads of a vision encoder are shared out: its scores would be those of some heads only."""
    if any(heads_group(attention, encoder) is not None for attention in attentions):
        raise ValueError(
            "model: expected a vision encoder with all heads in each process, got one that a tp_plan shares out; leave "
            'the vision encoder out of the plan, as tp_plan="auto" does'
        )
