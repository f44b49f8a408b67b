"""Vision side of patching: scores in the object layer, selection and sparse computing in the feature layer.

Three steps, kept apart: the *object layer* computes its attention in full and yields column scores; the *feature layer*
computes queries, keys and values of all tokens, its own column scores, and with both scores the selection; then its
attention, output projection and MLP run for the kept rows only. Layers behind it are skipped.

All of this happens only while a call is open (`host_forward`): a vision tower called by itself is the stock one.
The state of a forward travels in a context variable, never on a module, so threads and nested models do not mix.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..budget import ROLE_NAMES, resolve_budget
from .edits import Edits

PATCH = "_hiprune"  # where a patched model keeps its Patch
_REGISTER = 3


@dataclass(frozen=True)
class Settings:
    """What a user asks for; see `apply_hiprune`."""

    budget: int | None = None
    retention: float | None = None
    alpha: float = 0.1
    object_layer: int | None = None
    rule: str = "paper"
    neighborhood: str = "cross"
    score_queries: str = "all"
    keep_roles: Sequence[str] = ROLE_NAMES


class Selection(NamedTuple):
    """Which visual tokens of one image survived.

    Attributes:
        indices: [k] int64, ascending: the kept tokens, counted in raster order without prefix tokens.
        roles: [N] uint8: 0 dropped, 1 anchor, 2 buffer, 3 register.
        grid: height and width of the token grid.
    """

    indices: Tensor
    roles: Tensor
    grid: tuple[int, int]


@dataclass(frozen=True)
class EncoderFamily:
    """What differs between vision encoders; one entry per family in `ENCODERS`."""

    num_prefix_tokens: int  # leading rows (CLS): queries and keys, but never candidates
    object_share: float  # default object layer as a share of the depth: 9 of CLIP-L's 24
    official_rule: str  # the selection rule of the released code for this family ...
    official_means: bool  # ... and whether it is handed means over queries instead of sums
    layers: str  # attribute that holds the list of layers
    attention: str  # attribute of a layer that holds its attention
    grid: Callable[[Any, Tensor], tuple[int, int]]  # (config, pixel_values) -> (h, w)
    sparse_layer: Callable[..., Tensor]  # (layer, hidden_states, select) -> hidden states of the selected rows
    stock_sources: dict[str, str]  # what `sparse_layer` re-implements: module path -> digest of the known source

    def default_object_layer(self, depth: int, feature_layer: int) -> int:
        """The 1-based object layer of an encoder of `depth` layers, at most the feature layer."""
        return min(max(1, round(self.object_share * depth)), feature_layer)


@dataclass(frozen=True)
class ModelFamily:
    """What differs between models around an encoder; one entry per model type in `hiprune_kernels.patch.FAMILIES`."""

    host: Callable[[nn.Module], nn.Module]  # the module whose forward opens a call
    encoder: Callable[[nn.Module], nn.Module]  # host -> vision encoder
    feature_layer: Callable[[nn.Module, dict[str, Any]], int]  # (host, its forward's arguments) -> 1-based layer
    check: Callable[[nn.Module], None] = lambda host: None  # raises if this host is not supported
    connector: Callable[[nn.Module], nn.Module | None] = lambda host: None  # what takes features to the language model
    language_model: Callable[[nn.Module], nn.Module | None] = lambda host: None
    keep_mask: Callable[[Call], Tensor] | None = None  # call -> bool [B, L], False where the prompt loses a token
    install: Callable[[Edits, nn.Module, nn.Module], None] = lambda edits, model, host: None  # (edits, model, host)
    finish: Callable[[Call, Any], Any] = lambda call, output: output  # (call, the host's output) -> output


@dataclass
class Patch:
    """One patched model: what was asked for, where it happens, how it is undone."""

    settings: Settings
    family: ModelFamily
    encoder_family: EncoderFamily
    host: nn.Module
    config: Any  # of the encoder
    object_layer: int
    feature_layer: int
    modules: tuple[nn.Module, ...]  # that act while one of this model's calls is open
    argument_names: tuple[str, ...]  # of the host's forward
    edits: Edits = field(default_factory=Edits)
    last: list[Selection] = field(default_factory=list)


@dataclass
class Call:
    """One forward of a patched model."""

    patch: Patch
    arguments: dict[str, Any]
    budget: int
    grid: tuple[int, int]
    object_scores: Tensor | None = None  # [B, prefix + N]
    indices: Tensor | None = None  # [B, budget]
    roles: Tensor | None = None  # [B, N]
    plan: Any = None  # of the language side


_CALL: ContextVar[Call | None] = ContextVar("hiprune_call", default=None)


def current_call(module: nn.Module) -> Call | None:
    """The open call that `module` takes part in, if there is one."""
    call = _CALL.get()
    return call if call is not None and module in call.patch.modules else None


# ---------------------------------------------------------------------------------------------------- opening a call


def _begin(patch: Patch, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """Open a call if this forward has images to prune; raises for what a pruned forward cannot give."""
    arguments = {**dict(zip(patch.argument_names, args)), **kwargs}
    pixel_values = arguments.get("pixel_values")
    if pixel_values is None:
        return None
    grid = patch.encoder_family.grid(patch.config, pixel_values)
    num_tokens = math.prod(grid)
    budget = resolve_budget(num_tokens, budget=patch.settings.budget, retention=patch.settings.retention)
    if budget == num_tokens:  # stock forward: nothing is selected, so every token counts as a register
        everything = torch.arange(num_tokens, device=pixel_values.device)
        roles = torch.full_like(everything, _REGISTER, dtype=torch.uint8)
        patch.last = [Selection(everything, roles, grid) for _ in range(len(pixel_values))]
        return None
    if patch.host.training:
        raise ValueError("model: pruning is for inference, but the model is in training mode; call model.eval() first")
    if arguments.get("output_attentions") or getattr(patch.host.config, "output_attentions", False):
        raise ValueError("output_attentions: a pruned forward has no full attention maps; use record_scores instead")
    layer = patch.family.feature_layer(patch.host, arguments)
    if layer != patch.feature_layer:
        raise ValueError(
            f"vision_feature_layer: the model was patched for features of layer {patch.feature_layer}, but this call "
            f"asks for layer {layer}; set it in the config and apply again"
        )
    return Call(patch, arguments, budget, grid)


def host_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The stock forward, inside an open call. A wrapper rather than two hooks, so that even an interrupt closes it."""
    patch: Patch = self.__dict__[PATCH]
    call = _begin(patch, args, kwargs)
    if call is None:
        return type(self).forward(self, *args, **kwargs)
    token = _CALL.set(call)
    try:
        output = type(self).forward(self, *args, **kwargs)
    finally:
        _CALL.reset(token)
    patch.last = [Selection(indices, roles, call.grid) for indices, roles in zip(call.indices, call.roles)]
    return patch.family.finish(call, output)


# --------------------------------------------------------------------------------------------------- the object layer


def object_listener(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    stock: Callable[[], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """The object layer: full attention, and in an open call its column scores (Eq. 2)."""
    call = current_call(module)
    if call is None:
        return stock()
    if call.patch.settings.score_queries == "cls":
        call.object_scores = ops.attention_scores(query[:, :, :1], key, scale=scaling)
        return stock()
    output, call.object_scores = ops.attention_with_scores(query, key, value, scale=scaling)
    return output.transpose(1, 2), None


# --------------------------------------------------------------------------------------------------- the feature layer


def _select_rows(call: Call, query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Deep scores and selection: the rows to compute, [B, prefix + budget] int64, prefix rows first."""
    patch, settings, family = call.patch, call.patch.settings, call.patch.encoder_family
    counted = query[:, :, :1] if settings.score_queries == "cls" else query
    deep_scores = ops.attention_scores(counted, key, scale=scale)
    object_scores = deep_scores
    if patch.object_layer != patch.feature_layer:
        object_scores = call.object_scores.to(deep_scores.device)
    rule = settings.rule
    if rule == "official":
        rule = family.official_rule
        if family.official_means:
            object_scores, deep_scores = object_scores / counted.shape[2], deep_scores / counted.shape[2]
    call.indices, call.roles = ops.select_tokens(
        object_scores,
        deep_scores,
        budget=call.budget,
        alpha=settings.alpha,
        grid=call.grid,
        rule=rule,
        neighborhood=settings.neighborhood,
        num_prefix_tokens=family.num_prefix_tokens,
        keep_roles=settings.keep_roles,
    )
    return with_prefix(call.indices, family.num_prefix_tokens)


def with_prefix(indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Rows of a sequence that starts with prefix tokens: all of those, then the given tokens."""
    prefix = torch.arange(num_prefix_tokens, device=indices.device).expand(len(indices), -1)
    return torch.cat([prefix, indices + num_prefix_tokens], dim=1)


def gather_rows(hidden_states: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, K, C] of hidden states [B, N, C]."""
    return hidden_states.gather(1, rows[..., None].expand(-1, -1, hidden_states.shape[-1]))


def feature_layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The feature layer: [B, prefix + N, C] -> [B, prefix + budget, C] in an open call."""
    call = current_call(self)
    if call is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return call.patch.encoder_family.sparse_layer(
        self, hidden_states, lambda query, key, scale: _select_rows(call, query, key, scale)
    )


def skipped_layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A layer behind the feature layer: in an open call nothing reads its output."""
    if current_call(self) is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return hidden_states


def _clip_sparse_layer(
    layer: nn.Module, hidden_states: Tensor, select: Callable[[Tensor, Tensor, float], Tensor]
) -> Tensor:
    """CLIPEncoderLayer for selected rows: attention over all keys, everything behind it for those rows only."""
    attention = layer.self_attn
    normed = layer.layer_norm1(hidden_states)
    query, key, value = (
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [B, H, N, D]
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    rows = select(query, key, attention.scale)
    query = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    attended = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    hidden_states = gather_rows(hidden_states, rows) + attention.out_proj(attended.transpose(1, 2).flatten(2))
    return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))


def _image_grid(config: Any, pixel_values: Tensor) -> tuple[int, int]:
    height, width = pixel_values.shape[-2:]
    return height // config.patch_size, width // config.patch_size


ENCODERS = {
    "clip_vision_model": EncoderFamily(
        num_prefix_tokens=1,
        object_share=9 / 24,
        official_rule="official",
        official_means=True,
        layers="layers",
        attention="self_attn",
        grid=_image_grid,
        sparse_layer=_clip_sparse_layer,
        stock_sources={"": "9c77f9ba2eeb4169", "self_attn": "45fb45ce967c253b"},
    ),
}


# ------------------------------------------------------------------------------------------------------ finding things


def find_encoder(model: nn.Module) -> tuple[EncoderFamily, Any, list[nn.Module]]:
    """Family, config and layers of the vision encoder that `model` is, holds, or is the inside of.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if there is no supported encoder.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        config = getattr(module, "config", None)
        family = ENCODERS.get(getattr(config, "model_type", None))
        if family is not None and isinstance(layers := getattr(module, family.layers, None), nn.ModuleList):
            return family, config, list(layers)
    raise ValueError(f"model: found no supported vision encoder ({', '.join(ENCODERS)}) in {type(model).__name__}")


def warn_unknown_sources(family: EncoderFamily, layer: nn.Module) -> None:
    """Warn if the stock forwards that the feature layer stands in for are not the known ones."""
    for path, digest in family.stock_sources.items():
        forward = type(layer.get_submodule(path)).forward
        if source_digest(forward) != digest:
            warnings.warn(
                f"hiprune_kernels computes {forward.__qualname__} by itself in the feature layer, and the installed "
                "transformers has a version of it that was never compared with ours: check the outputs, or use a "
                "transformers release that hiprune_kernels was tested with",
                stacklevel=5,  # where apply_hiprune was called,
            )


def source_digest(function: Callable[..., Any]) -> str:
    """A short digest of a function's source text; empty where there is no source to read."""
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""
