"""Language side of patching: a pruned prefill, and bookkeeping for everything that comes after it.

The caller, and `generate()`, go on counting in *full coordinates*: attention masks, position ids and input ids have the
length they would have without pruning. The key-value cache is shorter. A `CacheMap` on the cache maps one to the other,
and a forward around the language model's translates what comes in; so stock code on both sides stays as it is.

Methods that read the language model's features, or text, select here too, before the prefill is pruned (`late.py`).

A row of the pruned batch holds, in order, what was not dropped. Rows with fewer tokens are padded on the left (leading
padding of the caller's is reused first), so columns counted from the end stay where they were behind the last image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate as stock_create_masks_for_generate

from .call import bind, current_call, forward_names, refuse_if_pruned
from .edits import Edits, StockModule
from .late import Prompt, select_late

_MAP = "_hiprune_map"
# What transformers calls the cache, as an argument and in outputs: "past_key_values" until 5.23.
CACHE = "cache" if "cache" in inspect.signature(stock_create_masks_for_generate).parameters else "past_key_values"


@dataclass
class CacheMap:
    """Which full position each slot of a pruned cache holds. Slots behind the recorded ones follow one to one."""

    source: Tensor  # [B, S] int64: full position of slot s
    valid: Tensor  # [B, S] bool: False for padding that pruning added or kept
    dropped: Tensor  # [B, 1] int64: visual tokens dropped; position ids behind them shift by as many
    gone: int  # full length minus cache length
    padded: bool  # whether any slot is not valid
    positions: str  # what becomes of position ids, see `_compact`: "compact", "original" or "multimodal"
    rope_deltas: Tensor | None = None  # [B, 1] int64, of these: from a token's place to its position behind the prompt

    def take(self, rows: Tensor) -> CacheMap:
        """This map for a batch made of these rows [R] of its batch."""
        rows = rows.to(self.valid.device)
        deltas = None if self.rope_deltas is None else self.rope_deltas[rows.to(self.rope_deltas.device)]
        source, valid, dropped = self.source[rows], self.valid[rows], self.dropped[rows]
        return replace(self, source=source, valid=valid, dropped=dropped, rope_deltas=deltas)

    def check_batch(self, batch: int) -> None:
        """Raise ValueError if inputs have another number of rows."""
        if batch != len(self.valid):
            raise ValueError(f"{CACHE}: pruned for a batch of {len(self.valid)}, but the inputs have {batch} rows")

    def cache_mask(self, mask: Any, seen: int, new: int) -> Any:
        """The caller's mask in cache coordinates, for `seen` slots in the cache and `new` tokens behind them.

        2-D masks may have full length, or the cache's (from a caller who counts in cache slots). Masks that are not 2-D
        were made from one that went through here.
        """
        if mask is None and not self.padded:
            return None
        slots = min(seen, self.valid.shape[1])  # fewer than recorded after the cache was cropped
        valid = self.valid[:, :slots]
        if mask is None:
            return torch.cat([valid, valid.new_ones(len(valid), seen - slots + new)], dim=1).long()
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            return mask
        if mask.shape[1] == seen + self.gone + new:
            head, tail = mask.gather(1, self.source[:, :slots]), mask[:, slots + self.gone :]
        elif mask.shape[1] == seen + new:
            head, tail = mask[:, :slots], mask[:, slots:]
        else:
            raise ValueError(
                f"attention_mask: expected [batch, {seen + self.gone + new}] ({seen} tokens in the pruned cache, "
                f"{self.gone} pruned away, {new} new), got {list(mask.shape)}"
            )
        return torch.cat([head * valid.to(mask.dtype), tail], dim=1)

    def text_positions(self, mask: Any, seen: int, new: int) -> Tensor:
        """Full positions [B or 1, new] of `new` tokens behind `seen` slots, padding not counted, as stock counts them.

        Of a caller without a mask every column counts.
        """
        mask = self.cache_mask(mask, seen, new)
        if mask is None:
            return torch.arange(seen + self.gone, seen + self.gone + new, device=self.dropped.device)[None]
        return (mask.long().cumsum(dim=1) - 1)[:, -new:] + self.dropped.to(mask.device)


def cache_of(arguments: dict[str, Any]) -> Any:
    """The cache among arguments by name; callers may use the older one."""
    return arguments.get(CACHE, arguments.get("past_key_values"))


def cached_length(cache: Any) -> int:
    return 0 if cache is None else int(cache.get_seq_length())


CACHE_METHODS = ("get_seq_length", "reorder_cache", "batch_select_indices", "batch_repeat_interleave")


if TYPE_CHECKING:
    from transformers import Cache as _Cache  # whose methods are behind ours, see `_mapped_class`
else:
    _Cache = object


class _MappedCache(_Cache):
    """What a cache with a map has before its own class: methods that rearrange the map's rows with the cache's.

    A class of its own rather than methods on the instance, which would hold the cache in a reference cycle.
    """

    stock_class: ClassVar[type]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        valid = getattr(self, _MAP).valid
        self._take(torch.arange(len(valid), device=valid.device).repeat_interleave(repeats))

    def _take(self, rows: Tensor) -> None:
        setattr(self, _MAP, getattr(self, _MAP).take(rows))

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_cache, (type(self).stock_class,), self.__dict__


_MAPPED_CLASSES: dict[type, type] = {}  # no functools.cache, which torch.compile warns of


def _mapped_class(cache_class: type) -> type:
    if cache_class not in _MAPPED_CLASSES:
        names = {"stock_class": cache_class}
        _MAPPED_CLASSES[cache_class] = type(cache_class.__name__, (_MappedCache, cache_class), names)
    return _MAPPED_CLASSES[cache_class]


def _restore_cache(cache_class: type) -> Any:
    """An empty cache for a copy's or a file's contents, as its class has no name to be found by."""
    return object.__new__(_mapped_class(cache_class))


def _set_map(cache: Any, cache_map: CacheMap) -> None:
    setattr(cache, _MAP, cache_map)
    if not isinstance(cache, _MappedCache):
        cache.__class__ = _mapped_class(type(cache))


def _forget_map(cache: Any) -> None:
    if isinstance(cache, _MappedCache):
        delattr(cache, _MAP)
        cache.__class__ = type(cache).stock_class


def live_map(cache: Any) -> CacheMap | None:
    """The map of a cache; none if it was never pruned, or was reset since."""
    cache_map = getattr(cache, _MAP, None)
    return cache_map if cache_map is not None and cached_length(cache) > 0 else None


def _new_tokens(kwargs: dict[str, Any]) -> Tensor:
    return kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]


# ----------------------------------------------------------------------------------------------------- pruned prefill


def _keep_mask(prompt: Prompt) -> Tensor:
    """False where the prompt loses a token, bool [B, L]."""
    keep = torch.ones_like(prompt.placeholders[0][1])
    for run, places in prompt.placeholders:
        keep = keep.masked_scatter(places, run.kept().to(places.device))
    return keep.repeat_interleave(prompt.beams, dim=0)


def _prune(
    cache_map: CacheMap | None, keep: Tensor, kwargs: dict[str, Any], compaction: str, stateful: bool
) -> tuple[dict[str, Any], CacheMap]:
    """The language model's arguments without the tokens where `keep` [B, Q] is False, and the map for what follows."""
    embeds, mask, positions = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs.get("position_ids")
    batch, length = keep.shape
    device = embeds.device
    keep = keep.to(device)
    seen = cached_length(cache_of(kwargs))
    if cache_map is None:
        slots = torch.arange(seen, device=device).expand(batch, -1)
        cache_map = CacheMap(
            slots, torch.ones_like(slots, dtype=torch.bool), slots.new_zeros(batch, 1), 0, False, compaction
        )
    start = seen + cache_map.gone  # full position of the first new token
    if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != (batch, start + length)):
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: a pruned prefill needs [batch, {start + length}], got {shape}")

    removable = ~keep
    if mask is not None:
        removable |= mask[:, start:].to(device).bool().cumsum(dim=1) == 0  # leading padding
    remaining = int((~removable).sum(dim=1).max())
    index = (~removable).to(torch.uint8).argsort(dim=1, stable=True)[:, length - remaining :]
    valid = ~removable.gather(1, index)
    if stateful and seen > 0 and not bool(valid.all()):
        raise ValueError(
            f"{CACHE}: linear attention takes no padding behind what is cached, so rows of a later turn must "
            f"all keep as many tokens, got {(~removable).sum(dim=1).tolist()}"
        )

    between = torch.arange(cache_map.valid.shape[1], seen, device=device).expand(batch, -1) + cache_map.gone
    dropped_before = (~keep).cumsum(dim=1)
    if positions is None:
        positions = torch.arange(start, start + length, device=device)[None]
    if positions.ndim == 2:
        positions = positions.expand(batch, -1)
    new_map = CacheMap(
        source=torch.cat([cache_map.source[:, :seen], between, start + index], dim=1),
        valid=torch.cat([cache_map.valid[:, :seen], torch.ones_like(between, dtype=torch.bool), valid], dim=1),
        dropped=cache_map.dropped + dropped_before[:, -1:],
        gone=cache_map.gone + length - remaining,
        padded=cache_map.padded or not bool(valid.all()),
        positions=compaction,
    )
    positions = _compact(positions, cache_map.dropped + dropped_before, compaction)
    mask = new_map.cache_mask(mask, seen + remaining, 0)
    if mask is None and compaction == "original":  # without one, stock takes gaps in positions for ends of texts
        mask = torch.ones(batch, seen + remaining, dtype=torch.long, device=device)
    pruned = {
        "inputs_embeds": embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1])),
        "attention_mask": mask,
        "position_ids": positions.gather(-1, index.expand(*positions.shape[:-2], -1, -1)),
    }
    if kwargs.get("visual_pos_masks") is not None:  # deepstack: visual features added in the first layers
        visual = kwargs["visual_pos_masks"].to(device)
        pruned["visual_pos_masks"] = visual.gather(1, index) & valid
        features = kwargs["deepstack_visual_embeds"]
        pruned["deepstack_visual_embeds"] = [rows[keep[visual].to(rows.device)] for rows in features]
    return {**kwargs, **pruned}, new_map


def _rope_deltas(host: nn.Module, batch: int) -> Tensor | None:
    """Those of M-RoPE that belong to a prefill, [B, 1]; `generate` finds them before it repeats rows for beams."""
    deltas = getattr(host, "rope_deltas", None)
    if deltas is None or batch % len(deltas):  # of another batch, where the caller made the position ids
        return None
    return deltas.repeat_interleave(batch // len(deltas), dim=0)


def _compact(positions: Tensor, dropped: Tensor, compaction: str) -> Tensor:
    """Position ids [B, L] with each token moved up by the `dropped` [B, L] or [B, 1] visual tokens before it.

    Where a method keeps the original ones, they stay. So do multimodal ids [1 or 3, B, L]: they tell where in the image
    a token lies; [B, L] stand for [1, B, L] there. Of [4, B, L] the first row is text order; it must have no gaps, or
    stock takes them for ends of packed sequences.
    """
    if compaction != "multimodal":
        return positions - dropped if compaction == "compact" else positions
    if positions.ndim == 2:
        return positions[None]
    if len(positions) < 4:
        return positions
    return torch.cat([(positions[0] - dropped)[None], positions[1:]])


def _translate(cache_map: CacheMap, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The language model's arguments for tokens that follow a pruned prefill, in cache coordinates."""
    batch, new = _new_tokens(kwargs).shape[:2]
    cache_map.check_batch(batch)
    seen = cached_length(cache_of(kwargs))
    positions = kwargs.get("position_ids")
    if positions is None:
        start = seen + cache_map.gone
        positions = torch.arange(start, start + new, device=cache_map.dropped.device)[None]
    mask = cache_map.cache_mask(kwargs.get("attention_mask"), seen, new)
    return {
        **kwargs,
        "attention_mask": mask,
        "position_ids": _compact(positions, cache_map.dropped, cache_map.positions),
    }


def language_model_forward(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The language model's forward on pruned inputs; the map rides on the cache that it fills."""
    cache = cache_of(kwargs)
    cache_map = live_map(cache)
    if cache_map is None:  # a cache that was reset starts anew, and must not find its old map again once it is filled
        _forget_map(cache)
    call = current_call()
    if call is not None and call.patch.language_model is module and call.prunes:
        host, family = call.patch.host, call.patch.family
        prompt = Prompt.of(call)
        kwargs = select_late(call, prompt, kwargs, cached_length(cache))
        compaction = "original" if call.patch.method.original_positions else "compact"
        if family.multimodal_positions:
            compaction = "multimodal"
        stateful = host._is_stateful  # layers that hold a state instead of keys and values
        kwargs, filled_map = _prune(cache_map, _keep_mask(prompt), kwargs, compaction, stateful)
        filled_map.rope_deltas = _rope_deltas(host, len(filled_map.valid))
        call.cache_map = filled_map
    else:
        filled_map = None
        if cache_map is not None:
            kwargs = _translate(cache_map, kwargs)
    output = forward(*args, **kwargs)
    cache = output.get(CACHE)
    if filled_map is not None and cache is not None:
        _set_map(cache, filled_map)
    return output


def head_forward(module: StockModule, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The model with the head: what counts positions in the unpruned logits cannot be honoured where tokens go."""
    arguments = bind(forward_names(module), args, kwargs) if args else kwargs
    if not isinstance(arguments.get("logits_to_keep", 0), int):
        message = "logits_to_keep: expected an int, counted from the end, as the pruned logits are shorter"
    elif arguments.get("labels") is not None:
        message = (
            "labels: the logits of a pruned forward are shorter than the labels; compute the loss from the logits, "
            "whose columns counted from the end are where they were behind the last image"
        )
    else:
        return forward(*args, **kwargs)
    with refuse_if_pruned(module.base_model, message):
        return forward(*args, **kwargs)


def install_language(edits: Edits, model: nn.Module, host: nn.Module, language_model: nn.Module) -> None:
    """Patch the language side of `model` (with the head, or `host` itself), but for `generate`."""
    edits.wrap_forward(language_model, language_model_forward)
    if model is not host:
        edits.wrap_forward(model, head_forward)
