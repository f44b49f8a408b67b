"""Vision side of patching: scores in the object layer, selection and sparse computing in the feature layer.

Three steps, kept apart: the *object layer* computes its attention in full and yields column scores; the *feature layer*
computes queries, keys and values of all tokens, its own column scores, and with both scores the selection; then its
attention, output projection and MLP run for the kept rows only. Layers behind it are skipped. The *connector*, which
brings features to the language model, computes the kept rows and spreads them over the places of all, for stock
code behind it.

All of this happens only while a call is open (`host_forward`): a vision tower called by itself is the stock one.
The state of a forward travels in a context variable, never on a module, so threads and nested models do not mix.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import ops
from ..budget import ROLE_NAMES, tile_budgets
from .attention import Attention
from .edits import Edits, refuse_replaced
from .towers import EncoderFamily, Grid

PATCH = "_hiprune"  # where a patched model keeps its Patch
ENCODED = "hiprune"  # in `mm_encoder_outputs`, beside features that `generate` encoded ahead: the Call that made them
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
    unpad: str | None = None


class Selection(NamedTuple):
    """Which visual tokens of one image or video survived.

    Attributes:
        indices: [k] int64, ascending: the kept tokens, counted in raster order without prefix tokens, tile by tile.
        roles: [N] uint8: 0 dropped, 1 anchor, 2 buffer, 3 register.
        grid: (height, width) of the token grid; (tiles or frames, height, width) where there are several; a tuple of
            grids where those differ, as where a model brings the features of many tiles to a smaller common grid.
    """

    indices: Tensor
    roles: Tensor
    grid: Grid | tuple[Grid, ...]


@dataclass(frozen=True)
class ModelFamily:
    """What differs between models around an encoder; one entry per model type in `hiprune_kernels.patch.FAMILIES`."""

    name: str  # as people call it, and its transformers class
    host: Callable[[nn.Module], nn.Module]  # the module whose forward opens a call
    encoders: Callable[[nn.Module], Sequence[nn.Module]]  # host -> its vision encoders
    feature_layer: Callable[[nn.Module, dict[str, Any]], int]  # (host, its forward's arguments) -> 1-based layer
    check: Callable[[nn.Module], None] = lambda host: None  # raises if this host is not supported
    check_call: Callable[[Call], None] = lambda call: None  # raises for what a pruned forward cannot give
    layout: Callable[[Call, EncoderRun], None] = lambda call, run: None
    # ^ sets what lies between a run's tokens and the prompt: its `tiles`, `places`, `pool` or `unit_rows` (and, with
    # those, `grids`)
    connector: Callable[[nn.Module], nn.Module | None] = lambda host: None  # what takes features to the language model
    language_model: Callable[[nn.Module], nn.Module | None] = lambda host: None
    video_token: Callable[[Call], int] = lambda call: call.patch.host.config.video_token_id  # placeholders of videos
    multimodal_positions: bool = False  # M-RoPE: position ids of the language model tell places in images
    has_unpad: bool = False  # takes the option `unpad`
    budget_per: str = "image"  # what `budget` counts the tokens of, for `hiprune info --models`
    notes: str = ""  # what `hiprune info --models` says of limits


@dataclass
class Tower:
    """One vision encoder of a patched model."""

    encoder: nn.Module
    family: EncoderFamily
    config: Any
    layers: list[nn.Module]
    object_layer: int  # 1-based, both
    feature_layer: int
    argument_names: tuple[str, ...]  # of the encoder's forward

    @property
    def object_attention(self) -> nn.Module:
        return self.layers[self.object_layer - 1].get_submodule(self.family.attention)

    @property
    def num_prefix_tokens(self) -> int:
        return self.family.num_prefix_tokens(self.config)


@dataclass
class Patch:
    """One patched model: what was asked for, where it happens, how it is undone."""

    settings: Settings
    family: ModelFamily
    host: nn.Module
    towers: list[Tower]
    connector: nn.Module | None
    language_model: nn.Module | None
    argument_names: tuple[str, ...]  # of the host's forward
    edits: Edits = field(default_factory=Edits)
    last: list[Selection] = field(default_factory=list)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        memo[id(self)] = clone = object.__new__(Patch)
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def __reduce__(self) -> tuple[Any, ...]:
        """Methods of an instance come back from a pickle as those of its class: half of the patch would be missing."""
        raise TypeError(
            "model: a patched model cannot be pickled (torch.save of the whole model, a process that is spawned); call "
            "remove_hiprune before, or save its state_dict, or use save_pretrained"
        )

    def check_parts(self) -> None:
        """Raise RuntimeError if a part of the model was replaced, as PEFT does with the modules that it is to save."""
        family, host = self.family, self.host
        patched = (*(tower.encoder for tower in self.towers), self.connector, self.language_model)
        present = (*family.encoders(host), family.connector(host), family.language_model(host))
        for old, new in zip(patched, present):
            if old is not new and old is not getattr(new, "_orig_mod", None):  # which torch.compile's wrapper runs
                raise RuntimeError(
                    f"model: expected the {type(old).__name__} that was patched, but another module, a "
                    f"{type(new).__name__}, stands in its place; call apply_hiprune again"
                )

    def tower_of(self, module: nn.Module) -> Tower | None:
        """The tower whose encoder, object attention, feature layer or later layer `module` is."""
        for tower in self.towers:
            if module in (tower.encoder, tower.object_attention, *tower.layers[tower.feature_layer - 1 :]):
                return tower
        return None


@dataclass
class EncoderRun:
    """One run of a vision encoder within a call: its images, and what was selected in them.

    Tokens of all images are counted through, tile by tile: [T].
    """

    tower: Tower
    grids: list[Grid]  # of the tiles
    tiles: list[int]  # how many of them (or frames) each image (or video) has
    video: bool = False  # of videos, not of images
    budgets: list[int] = field(default_factory=list)  # of the tiles
    places: Tensor | None = None  # [P] on the CPU: the token of each placeholder in the prompt, -1 for one that stays
    pool: Callable[[Tensor], Tensor] | None = None
    # ^ where the language model's tokens are mixtures of the encoder's: scores of the latter -> scores of the former.
    # Selected are the former then, they are counted in T and have the grids; the features are computed for all.
    unit_rows: Tensor | None = None  # [T, G], see EncoderFamily
    candidates: Tensor | None = None  # [T] bool
    whole: bool = False  # every token stays: the forward is stock
    filled: bool = True  # sizes alone tell that no index is -1
    object_scores: Tensor | None = None  # [T]
    deep_scores: Tensor | None = None  # [T]
    indices: Tensor | None = None  # [sum of budgets], counted in T; -1 where a budget could not be filled
    roles: Tensor | None = None  # [T]
    connector_prefix: int = 0  # prefix rows that went through the connector with every image

    @property
    def sizes(self) -> list[int]:
        return [math.prod(grid) for grid in self.grids]

    @property
    def even(self) -> bool:
        """Whether sizes alone tell that every tile keeps the same number of tokens, with no -1 among them."""
        return self.filled and len(set(self.budgets)) == 1

    def check_selected(self) -> None:
        """Raise RuntimeError if nothing was selected where it should have been."""
        if not self.whole and self.roles is None:
            raise RuntimeError(
                f"model: expected layer {self.tower.feature_layer} of {type(self.tower.encoder).__name__} to run as "
                "patched, but the layer or its forward was replaced; undo that, or call apply_hiprune again"
            )

    def kept(self) -> Tensor:
        """Which placeholders stay, bool; tile by tile: prefix rows that went through the connector, then tokens."""
        kept = self.roles > 0
        if self.places is not None:
            return torch.cat([kept, kept.new_ones(1)])[self.places.to(kept.device)]
        if self.connector_prefix == 0:
            return kept
        kept = kept.view(len(self.grids), -1)
        return torch.cat([kept.new_ones(len(kept), self.connector_prefix), kept], dim=1).flatten()


@dataclass
class Call:
    """One forward of a patched model."""

    patch: Patch
    arguments: dict[str, Any]
    prompts: int | None = None  # how many the encoded images belong to, where that happened ahead of the forward
    runs: list[EncoderRun] = field(default_factory=list)
    plan: Any = None  # of the language side

    @property
    def prunes(self) -> bool:
        return any(not run.whole for run in self.runs)

    def kept(self) -> list[tuple[int, Tensor]]:
        """Per kind of placeholder: its token id, and in the order of the prompts which of them stay, bool."""
        image, video = self.patch.host.config.image_token_id, self.patch.family.video_token
        return [(video(self) if run.video else image, run.kept()) for run in self.runs]


_CALL: ContextVar[Call | None] = ContextVar("hiprune_call", default=None)
_REFUSALS: ContextVar[tuple[tuple[nn.Module, str], ...]] = ContextVar("hiprune_refusals", default=())


def current_call(part: str, module: nn.Module) -> Call | None:
    """The open call, if `module` is this part ("connector" or "language_model") of its host."""
    call = _CALL.get()
    return call if call is not None and getattr(call.patch, part) is module else None


@contextmanager
def refuse_if_pruned(host: nn.Module, message: str) -> Iterator[None]:
    """Let a forward of `host` raise ValueError as soon as it is certain that tokens go, and be stock if none do."""
    token = _REFUSALS.set((*_REFUSALS.get(), (host, message)))
    try:
        yield
    finally:
        _REFUSALS.reset(token)


def _refuse(call: Call) -> None:
    """Raise ValueError for what was asked of a forward that is going to prune, and cannot be given."""
    for host, message in _REFUSALS.get():
        if host is call.patch.host:
            raise ValueError(message)


def _current_run(module: nn.Module) -> EncoderRun | None:
    """The run that `module`, a part of a vision encoder, is in, if it selects anything."""
    call = _CALL.get()
    tower = call.patch.tower_of(module) if call is not None else None
    if tower is None or not call.runs or call.runs[-1].tower is not tower or call.runs[-1].whole:
        return None
    return call.runs[-1]


# ---------------------------------------------------------------------------------------------------- opening a call


def bind(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    return {**dict(zip(names, args)), **kwargs}


def forward_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's stock forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def has_images(arguments: dict[str, Any]) -> bool:
    """Images or videos: models name them pixel_values, pixel_values_images and pixel_values_videos."""
    return any(name.startswith("pixel_values") and value is not None for name, value in arguments.items())


@contextmanager
def open_call(call: Call) -> Iterator[None]:
    """Let `call` be the current one."""
    if has_images(call.arguments):
        call.patch.check_parts()
    token = _CALL.set(call)
    try:
        yield
    finally:
        _CALL.reset(token)


def host_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The stock forward, inside an open call. A wrapper rather than two hooks, so that even an interrupt closes it."""
    patch: Patch | None = self.__dict__.get(PATCH)
    if patch is None:  # taken off since, and called by somebody's forward around this one
        return type(self).forward(self, *args, **kwargs)
    call = Call(patch, bind(patch.argument_names, args, kwargs))
    encoded = (call.arguments.get("mm_encoder_outputs") or {}).get(ENCODED)
    if encoded is not None:
        call.runs, call.prompts = encoded.runs, encoded.prompts
        if call.prunes:
            _refuse(call)
    forward = encoder_forward if any(tower.encoder is self for tower in patch.towers) else type(self).forward
    return_dict = kwargs.pop("return_dict", None)
    with open_call(call):
        output = forward(self, *args, **kwargs, return_dict=True)
    if call.prunes and call.plan is None and patch.language_model is not None:
        raise RuntimeError(
            f"model: expected {type(patch.language_model).__name__} to run as patched, but its forward was replaced; "
            "undo that, or call apply_hiprune again"
        )
    for run in call.runs:
        run.check_selected()
    if call.runs:
        patch.last = [selection for run in call.runs for selection in _selections(run)]
    if call.prunes and encoded is None:  # `generate` reads no features
        _drop_unseen_features(call, output)
    return output if (patch.host.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


def _drop_unseen_features(call: Call, output: Any) -> None:
    """Of the features that come with the output those stay which the language model saw."""
    for run in call.runs:
        kind = "video" if run.video else "image"
        encoded, name = getattr(output, f"{kind}_outputs", None), "pooler_output"
        if encoded is None:  # transformers before 5.24, where some models have an attribute for them
            encoded, name = output, f"{kind}_hidden_states"
        features = getattr(encoded, name, None)
        if features is not None:
            setattr(encoded, name, _seen_rows(features, run.kept()))


def _seen_rows(features: Any, kept: Tensor) -> Any:
    """The rows that stay, in the form that the features have: [P, C], [images, P, C], or a list or tuple of [P, C]."""
    if isinstance(features, Tensor) and features.ndim == 2:
        return features[kept.to(features.device)]
    rows = kept.split([len(image) for image in features])
    seen = [image[row.to(image.device)] for image, row in zip(features, rows)]
    return torch.stack(seen) if isinstance(features, Tensor) else type(features)(seen)


def _selections(run: EncoderRun) -> list[Selection]:
    """What was kept of each image of a run."""
    selections, tile, token, row = [], 0, 0, 0
    for count in run.tiles:
        grid = _common_grid(run.grids[tile : tile + count])
        tokens, rows = sum(run.sizes[tile : tile + count]), sum(run.budgets[tile : tile + count])
        indices = run.indices[row : row + rows]
        if not run.filled:
            indices = indices[indices >= 0]
        selections.append(Selection(indices - token, run.roles[token : token + tokens], grid))
        tile, token, row = tile + count, token + tokens, row + rows
    return selections


def _common_grid(grids: list[Grid]) -> Grid | tuple[Grid, ...]:
    if len(grids) == 1:
        return grids[0]
    return tuple(grids) if len(set(grids)) > 1 else (len(grids), *grids[0])


# ---------------------------------------------------------------------------------------------------- an encoder's run


def encoder_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The stock forward; in an open call it begins a run."""
    call = _CALL.get()
    tower = call.patch.tower_of(self) if call is not None else None
    if tower is not None:
        call.runs.append(_begin_run(call, tower, bind(tower.argument_names, args, kwargs)))
    return type(self).forward(self, *args, **kwargs)


def _begin_run(call: Call, tower: Tower, arguments: dict[str, Any]) -> EncoderRun:
    """How many tokens of which images will stay; raises for what a pruned forward cannot give."""
    patch, settings = call.patch, call.patch.settings
    grids = tower.family.grids(tower.config, arguments)
    run = EncoderRun(tower, grids, [1] * len(grids), _of_videos(call))
    patch.family.layout(call, run)
    sizes, tile = run.sizes, 0
    for count in run.tiles:
        shared = sizes[tile : tile + count]
        run.budgets += tile_budgets(shared, budget=settings.budget, retention=settings.retention)
        tile += count
    if run.budgets == sizes:  # nothing is selected, so every token counts as a register
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        run.whole = True
        run.indices = torch.arange(sum(sizes), device=device)
        run.roles = torch.full((sum(sizes),), _REGISTER, dtype=torch.uint8, device=device)
        return run
    _refuse(call)
    if patch.host.training:
        raise ValueError("model: pruning is for inference, but the model is in training mode; call model.eval() first")
    if call.arguments.get("output_attentions") or getattr(patch.host.config, "output_attentions", False):
        raise ValueError("output_attentions: a pruned forward has no full attention maps; use record_scores instead")
    layer = patch.family.feature_layer(patch.host, call.arguments)
    if layer != tower.feature_layer:
        raise ValueError(
            f"vision_feature_layer: the model was patched for features of layer {tower.feature_layer}, but this call "
            f"asks for layer {layer}; set it in the config and apply again"
        )
    patch.family.check_call(call)
    run.filled = settings.rule != "official" or tower.family.official_rule != "official_qwen"
    if run.places is not None and settings.unpad != "after":
        _take_out_padding(run)
    if run.unit_rows is None:
        run.unit_rows = tower.family.unit_rows(tower.config, arguments)
    return run


def _of_videos(call: Call) -> bool:
    """Whether the run that begins is one of videos, which come behind images in all stock code."""
    given = [name for name, value in call.arguments.items() if name.startswith("pixel_values") and value is not None]
    images = sum(not name.endswith("videos") for name in given)
    return images <= len(call.runs) < len(given)


def _take_out_padding(run: EncoderRun) -> None:
    """Tokens that never reach the prompt are no candidates."""
    candidates = torch.zeros(sum(run.sizes), dtype=torch.bool)
    candidates[run.places[run.places >= 0]] = True
    if bool(candidates.all()):
        return
    counts = [int(part.sum()) for part in candidates.split(run.sizes)]
    run.budgets = [max(1, min(budget, count)) for budget, count in zip(run.budgets, counts)]
    run.candidates = candidates
    run.filled = run.filled and min(counts) > 0


# --------------------------------------------------------------------------------------------------- the object layer


def object_listener(
    module: nn.Module, attention: Attention, stock: Callable[[], tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """The object layer: full attention, and in a run its column scores (Eq. 2)."""
    run = _current_run(module)
    if run is None:
        return stock()
    settings = _CALL.get().patch.settings
    if settings.score_queries == "cls":
        run.object_scores = token_scores(run, settings, attention.column_scores("cls"))
        return stock()
    output, scores = attention.output_and_scores()
    run.object_scores = token_scores(run, settings, scores)
    return output, None


def token_scores(run: EncoderRun, settings: Settings, scores: Tensor) -> Tensor:
    """Scores of an encoder's rows, [B, prefix + N] or [R], as scores of tokens, [T]: the means over their rows."""
    if scores.ndim == 2:
        if settings.rule == "official" and run.tower.family.official_means:
            scores = scores / scores.shape[1]
        scores = scores[:, run.tower.num_prefix_tokens :]
    if run.unit_rows is not None:
        scores = scores[..., run.unit_rows.to(scores.device)].mean(dim=-1)
    return scores.flatten() if run.pool is None else run.pool(scores.flatten())


# --------------------------------------------------------------------------------------------------- the feature layer


def select(run: EncoderRun, settings: Settings) -> None:
    """Algorithm 1 on a run's scores: sets `indices` and `roles`."""
    if run.object_scores is None:
        raise RuntimeError(
            f"model: expected scores of layer {run.tower.object_layer} of {type(run.tower.encoder).__name__}, but its "
            "attention was replaced by one that hiprune_kernels cannot listen to; undo that, or choose another "
            "object_layer"
        )
    device = run.deep_scores.device
    run.indices, run.roles = ops.select_tokens_varlen(
        run.object_scores.to(device),
        run.deep_scores,
        grids=run.grids,
        budgets=run.budgets,
        alpha=settings.alpha,
        rule=run.tower.family.official_rule if settings.rule == "official" else settings.rule,
        neighborhood=settings.neighborhood,
        candidate_mask=None if run.candidates is None else run.candidates.to(device),
        keep_roles=settings.keep_roles,
    )
    token, row = 0, 0
    for size, budget in zip(run.sizes, run.budgets):
        if size == budget:  # a tile that loses nothing has the same selection whatever the other tiles lose
            run.indices[row : row + size] = torch.arange(token, token + size, device=device)
            run.roles[token : token + size] = _REGISTER
        token, row = token + size, row + budget


def _tile_indices(run: EncoderRun) -> Tensor:
    """Kept tokens of each tile, [B, K] counted within the tile; -1 fills."""
    tiles, size = len(run.grids), run.sizes[0]
    if tiles == 1:
        return run.indices[None]
    starts = torch.arange(0, tiles * size, size, device=run.indices.device)[:, None]
    if run.even:
        return run.indices.view(tiles, -1) - starts
    indices = pad_sequence(list(run.indices.split(run.budgets)), batch_first=True, padding_value=-1)
    return torch.where(indices < 0, indices, indices - starts)


def _packed_units(run: EncoderRun) -> Tensor:
    """Kept tokens in the order of a packed encoder's groups of rows: which groups, ascending, [K]."""
    indices = run.indices if run.filled else run.indices[run.indices >= 0]
    first = run.unit_rows[indices, 0]
    return first.sort().values // run.unit_rows.shape[1]


def _select_rows(run: EncoderRun) -> Tensor:
    """The encoder's rows to compute: [B, prefix + K G], prefix rows first, or [K G] packed."""
    prefix, group = run.tower.num_prefix_tokens, 1 if run.unit_rows is None else run.unit_rows.shape[1]
    if run.tower.family.packed:
        return (_packed_units(run)[:, None] * group + torch.arange(group, device=run.indices.device)).flatten()
    indices = _tile_indices(run)
    if not run.even:
        indices = indices.clamp(min=0)
    if run.unit_rows is not None:
        indices = run.unit_rows.to(indices.device)[indices].flatten(1)
    return with_prefix(indices, prefix)


def with_prefix(indices: Tensor, num_prefix_tokens: int) -> Tensor:
    """Rows of a sequence that starts with prefix tokens: all of those, then the given tokens."""
    prefix = torch.arange(num_prefix_tokens, device=indices.device).expand(len(indices), -1)
    return torch.cat([prefix, indices + num_prefix_tokens], dim=1)


def gather_rows(hidden_states: Tensor, rows: Tensor) -> Tensor:
    """Rows [B, K, C] of hidden states [B, N, C], or [K, C] of packed ones [T, C]."""
    if hidden_states.ndim == 2:
        return hidden_states[rows]
    return hidden_states.gather(1, rows[..., None].expand(-1, -1, hidden_states.shape[-1]))


def refuse_bypassed(layer: nn.Module, family: EncoderFamily) -> None:
    """Raise ValueError if somebody changed a module whose own forward the feature layer goes round: its attention.

    Everything else in the layer is called as a module.
    """
    module = layer
    for name in family.attention.split("."):
        owner, module = module, getattr(module, name)
        if not type(module).__module__.startswith("transformers."):
            raise ValueError(
                f"model: expected transformers' own module as `{name}` of {type(owner).__name__}, as hiprune_kernels "
                f"computes what it does by itself, got {type(module).__name__}"
            )
        refuse_replaced(module, "forward")
        backward = module._backward_hooks or module._backward_pre_hooks
        if backward or module._forward_pre_hooks or any(map(_foreign, module._forward_hooks.values())):
            raise ValueError(
                f"model: expected no hooks on {type(module).__name__}, as hiprune_kernels computes what it does by "
                "itself and would not call them; remove them first, or hook a module within it"
            )


def _foreign(hook: Callable[..., Any]) -> bool:
    """Whether a forward hook is not one of those with which transformers collects attention maps."""
    return not (getattr(hook, "__module__", None) or "").startswith("transformers.")


def feature_layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The feature layer: all rows in; in a run, only the selected ones out."""
    run = _current_run(self)
    if run is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    family, settings = run.tower.family, _CALL.get().patch.settings
    refuse_bypassed(self, family)
    attention = family.project(self, hidden_states, *args, **kwargs).autocast()
    run.deep_scores = token_scores(run, settings, attention.column_scores(settings.score_queries))
    if run.tower.object_layer == run.tower.feature_layer:
        run.object_scores = run.deep_scores
    select(run, settings)
    if run.pool is not None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    rows = _select_rows(run)
    states = family.finish(self, gather_rows(hidden_states, rows), attention.output_rows(rows))
    if family.full_shape:
        states = torch.zeros_like(hidden_states).scatter(1, rows[..., None].expand_as(states), states)
    return (states, None) if family.returns_tuple else states


def skipped_layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A layer behind the feature layer: in a run nothing reads its output."""
    run = _current_run(self)
    if run is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return (hidden_states, None) if run.tower.family.returns_tuple else hidden_states


# -------------------------------------------------------------------------------------------------------- the connector


def connector_forward(module: nn.Module, forward: Callable[..., Tensor], features: Tensor) -> Tensor:
    """Features to the language model's space; in a run, for the kept tokens, spread over the places of all of them."""
    call = current_call("connector", module)
    run = call.runs[-1] if call is not None and call.runs else None
    if run is None:
        return forward(features)
    run.check_selected()
    family = run.tower.family
    if run.whole or run.pool is not None:
        projected = forward(features)
        run.connector_prefix = 0 if family.packed else projected.shape[1] - run.sizes[0]
        return projected
    if family.packed:
        projected = forward(features)
        places = _packed_units(run)
        return projected.new_zeros(len(run.unit_rows), projected.shape[-1]).index_copy(0, places, projected)
    tokens = _tile_indices(run)
    if family.full_shape:
        features = gather_rows(features, tokens.clamp(min=0).to(features.device))
    projected = forward(features)
    run.connector_prefix = prefix = projected.shape[1] - tokens.shape[1]
    length = prefix + run.sizes[0]
    places = tokens if run.even else torch.where(tokens < 0, run.sizes[0], tokens)  # fill goes to a row behind the last
    places = with_prefix(places, prefix).to(projected.device)[..., None].expand_as(projected)
    shape = (len(projected), length if run.even else length + 1, projected.shape[-1])
    spread = projected.new_zeros(shape).scatter(1, places, projected)
    return spread if run.even else spread[:, :length].contiguous()
