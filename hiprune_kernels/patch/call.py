"""The whole state of a forward of a patched model: the patch, an open call, and the encoder runs in it.

It travels in a context variable, never on a module, so threads and nested models do not mix. README.md beside this file
draws the life of one `generate()` call.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..facts import EncoderFacts
from ..methods import HiPrune, Method, Needs, Picks, Seen, Selection, Stage, TokenLayout
from ..methods.base import ABSENT, checked_picks
from .edits import Edits, StockModule
from .encoders import EncoderFamily

if TYPE_CHECKING:
    from .models.family import ModelFamily

PATCH = "_hiprune"  # where a patched model keeps its Patch
ENCODED = "hiprune"  # in `mm_encoder_outputs`, beside features that `generate` encoded ahead: the Call that made them

_T = TypeVar("_T")


def present(value: _T | None, what: str) -> _T:
    """A value that may be None, where it must not be: else RuntimeError."""
    if value is None:
        raise RuntimeError(f"hiprune_kernels: expected {what}, got None")
    return value


@dataclass
class PatchedEncoder:
    """One vision encoder of a patched model, and what the method reads of it."""

    module: nn.Module
    family: EncoderFamily
    facts: EncoderFacts
    config: Any
    layers: list[nn.Module]
    needs: Needs
    argument_names: tuple[str, ...]  # of the encoder's forward

    @property
    def feature_layer(self) -> nn.Module:
        return self.layers[self.facts.feature_layer - 1]

    @property
    def skipped_layers(self) -> list[nn.Module]:
        """Those behind the feature layer, whose output nothing reads."""
        return self.layers[self.facts.feature_layer :]

    @property
    def listened_layers(self) -> list[int]:
        """1-based layers in front of the feature layer whose scores are needed."""
        return [layer for layer in self.needs.scores if layer != self.facts.feature_layer]

    def attention(self, layer: int) -> nn.Module:
        return self.layers[layer - 1].get_submodule(self.family.attention)

    @property
    def region_layer(self) -> nn.Module | None:
        """The layer, in front of the feature layer, whose input are the rows that `Needs.region_features` asks for."""
        layer = self.needs.region_features
        return None if layer is None or layer >= self.facts.feature_layer - 1 else self.layers[layer]

    def has(self, module: nn.Module) -> bool:
        """Whether `module` is the encoder or a part of it that is patched."""
        if module in (self.module, *self.layers[self.facts.feature_layer - 1 :]) or module is self.region_layer:
            return True
        return any(module is self.attention(layer) for layer in self.listened_layers)


@dataclass
class Patch:
    """One patched model: what was asked for, where it happens, how it is undone."""

    method: Method
    unpad: str | None  # see `apply_method`
    family: ModelFamily
    host: StockModule
    encoders: list[PatchedEncoder]
    connector: nn.Module | None
    language_model: StockModule | None
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
        patched = (*(encoder.module for encoder in self.encoders), self.connector, self.language_model)
        present = (*family.encoders(host), family.connector(host), family.language_model(host))
        for old, new in zip(patched, present):
            if old is not new and old is not getattr(new, "_orig_mod", None):  # which torch.compile's wrapper runs
                raise RuntimeError(
                    f"model: expected the {type(old).__name__} that was patched, but another module, a "
                    f"{type(new).__name__}, stands in its place; {self.apply_again}"
                )

    @property
    def apply_again(self) -> str:
        """What a user is asked to do where somebody else changed the model."""
        return f"call {'apply_hiprune' if type(self.method) is HiPrune else 'apply_method'} again"

    def encoder_of(self, module: nn.Module) -> PatchedEncoder | None:
        """The encoder that `module` is, or is a patched part of."""
        return next((encoder for encoder in self.encoders if encoder.has(module)), None)


@dataclass
class Run:
    """One run of a vision encoder within a call: how its images lie, what was seen of them, and what was picked."""

    encoder: PatchedEncoder
    layout: TokenLayout
    announced: list[int]  # how many tokens of each image stay, by `Method.kept`
    video: bool = False  # of videos, not of images
    whole: bool = False  # every token stays: the forward is stock
    scores: dict[int, Tensor] = field(default_factory=dict)  # the fields of Seen, as they come
    keys: Tensor = ABSENT
    features: Tensor = ABSENT
    regions: Tensor | None = None
    connector_prefix: int = 0  # prefix rows that went through the connector with every image
    _seen: Seen | None = None  # both are None until `select`
    _picks: Picks | None = None

    @property
    def seen(self) -> Seen:
        """What the method was shown."""
        return present(self._seen, "what the method was shown")

    @property
    def picks(self) -> Picks:
        """What it picked."""
        return present(self._picks, "what the method picked")

    @property
    def unit_rows(self) -> Tensor:
        """`TokenLayout.unit_rows` of a packed encoder, which has them in every run that prunes."""
        return present(self.layout.unit_rows, "unit_rows of a packed encoder")

    @property
    def stage(self) -> Stage:
        return self.encoder.needs.stage(self.encoder.facts)

    @property
    def dense(self) -> bool:
        """Whether the connector gets the rows of all tokens, and they are dropped in front of the language model."""
        return self.whole or self.layout.pool is not None or self.stage is Stage.LANGUAGE

    def select(self, method: Method, device: torch.device, **late: Any) -> None:
        """Let the method pick from what was seen; `late` are the fields of Seen that only the language side knows."""
        encoder, needs = self.encoder, self.encoder.needs
        for layer in needs.scores:
            if layer not in self.scores:
                raise RuntimeError(
                    f"model: expected scores of layer {layer} of {type(encoder.module).__name__}, but its attention "
                    "was replaced by one that hiprune_kernels cannot listen to; undo that, or choose another layer"
                )
        seen = {"keys": self.keys, "features": self.features, "regions": self.regions, **late}
        self._seen = Seen(
            self.layout,
            {layer: self.scores[layer].to(device) for layer in needs.scores},
            **{name: _to(value, device) for name, value in seen.items()},
            encoder=encoder.facts,
            device=device,
        )
        self._picks = checked_picks(method, method.select(self._seen), self.layout, self.announced, device)

    def keep_all(self, role: int, device: torch.device) -> None:
        """Let every token stay, and the forward be stock: nothing is selected."""
        count, self.whole = sum(self.layout.sizes), True
        roles = torch.full((count,), role, dtype=torch.uint8, device=device)
        self._picks = Picks(torch.arange(count, device=device), roles, self.layout.sizes)

    def merged(self, method: Method, features: Tensor) -> Tensor:
        """What the method makes of the features of all tokens, [T, C]."""
        merged = method.merge(features, self.seen, self.picks)
        found = (list(merged.shape), merged.dtype) if isinstance(merged, Tensor) else type(merged).__name__
        if found != (list(features.shape), features.dtype):
            name = f"{type(method).__name__}.merge"
            raise ValueError(f"{name}: expected {list(features.shape)} of {features.dtype}, got {found}")
        return merged

    def check_selected(self, patch: Patch) -> None:
        """Raise RuntimeError if nothing was selected where it should have been."""
        if self._picks is None:
            encoder = self.encoder
            raise RuntimeError(
                f"model: expected layer {encoder.facts.feature_layer} of {type(encoder.module).__name__} to run as "
                f"patched, but the layer or its forward was replaced; undo that, or {patch.apply_again}"
            )

    def placeholder_tokens(self, device: torch.device) -> Tensor:
        """The token of each placeholder of these images, [P]; -1 where there is none: a newline, a prefix row."""
        if self.layout.placeholders is not None:
            return self.layout.placeholders.to(device)
        tokens = torch.arange(sum(self.layout.sizes), device=device)
        if self.connector_prefix == 0:
            return tokens
        tokens = tokens.view(len(self.layout.grids), -1)
        return torch.cat([tokens.new_full((len(tokens), self.connector_prefix), -1), tokens], dim=1).flatten()

    def kept(self) -> Tensor:
        """Which placeholders stay, bool [P]."""
        kept = self.picks.roles > 0
        if self.layout.placeholders is None and self.connector_prefix == 0:
            return kept
        return torch.cat([kept, kept.new_ones(1)])[self.placeholder_tokens(kept.device)]

    def selections(self, role_names: tuple[str, ...]) -> Iterator[Selection]:
        """What was kept of each image."""
        row, notes = 0, iter(self.picks.notes)
        for (tiles, tokens), count in zip(self.layout.images(), self.announced):
            grids = self.layout.grids[tiles]
            indices = self.picks.indices[row : row + count]
            if self.picks.fills:
                indices = indices[indices >= 0]
            roles, note = self.picks.roles[tokens], next(notes, "")
            yield Selection(indices - tokens.start, roles, _common_grid(grids), role_names, note)
            row += count


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _common_grid(grids: Sequence[tuple[int, ...]]) -> Any:
    if len(grids) == 1:
        return grids[0]
    return tuple(grids) if len(set(grids)) > 1 else (len(grids), *grids[0])


@dataclass
class Call:
    """One forward of a patched model, or the images that `generate` encodes ahead of it."""

    patch: Patch
    arguments: dict[str, Any]
    prompts: int | None = None  # how many the encoded images belong to, where that happened ahead of the forward
    runs: list[Run] = field(default_factory=list)
    cache_map: Any = None  # of the language side: what this forward leaves with the cache

    @property
    def prunes(self) -> bool:
        return any(not run.whole for run in self.runs)

    def placeholder_id(self, run: Run) -> int:
        """The token id of the placeholders of a run."""
        return self.patch.family.video_token(self) if run.video else self.patch.host.config.image_token_id


_CALL: ContextVar[Call | None] = ContextVar("hiprune_call", default=None)
_REFUSALS: ContextVar[tuple[tuple[nn.Module, str], ...]] = ContextVar("hiprune_refusals", default=())


def current_call() -> Call | None:
    """The call that is open in this thread."""
    return _CALL.get()


def current_run(module: nn.Module) -> Run | None:
    """The run that `module`, a part of a vision encoder, is in, if it selects anything."""
    call = _CALL.get()
    encoder = call.patch.encoder_of(module) if call is not None else None
    if call is None or encoder is None or not call.runs or call.runs[-1].encoder is not encoder or call.runs[-1].whole:
        return None
    return call.runs[-1]


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


@contextmanager
def refuse_if_pruned(host: nn.Module, message: str) -> Iterator[None]:
    """Let a forward of `host` raise ValueError as soon as it is certain that tokens go, and be stock if none do."""
    token = _REFUSALS.set((*_REFUSALS.get(), (host, message)))
    try:
        yield
    finally:
        _REFUSALS.reset(token)


def refuse(call: Call) -> None:
    """Raise ValueError for what was asked of a forward that is going to prune, and cannot be given."""
    for host, message in _REFUSALS.get():
        if host is call.patch.host:
            raise ValueError(message)


def bind(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    return {**dict(zip(names, args)), **kwargs}


def forward_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's stock forward."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def has_images(arguments: dict[str, Any]) -> bool:
    """Images or videos: models name them pixel_values, pixel_values_images and pixel_values_videos."""
    return any(name.startswith("pixel_values") and value is not None for name, value in arguments.items())
