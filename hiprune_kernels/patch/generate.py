"""Every override of transformers' generation code: what `generate` does before, between and instead of forwards.

`generate` counts in full coordinates (see `language`), but asks the cache, which is shorter, how far it is. Each
function in this file stands on an instance under its own name, calls the stock one, and puts that right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.masking_utils import create_masks_for_generate as stock_create_masks_for_generate

from .call import ENCODED, PATCH, Call, has_images, open_call
from .edits import Edits, StockModule
from .language import CACHE, cache_of, cached_length, live_map
from .models import ModelFamily

# Releases that repeat prompts with images wrongly, for beams and for several answers: a fault of transformers' own, in
# models whose types begin so.
_WRONG_BEAMS = {"5.18.0": ("",), "5.19.0": ("qwen3_5",), "5.20.0": ("qwen3_5",), "5.20.1": ("qwen3_5",)}


def wrong_beams(model_type: str) -> bool:
    """Whether beams are wrong under the installed transformers, pruned or not."""
    return model_type.startswith(_WRONG_BEAMS.get(transformers.__version__, ()))


def prepare_inputs_for_generation(
    self: StockModule,
    input_ids: Tensor,
    next_sequence_length: int | None = None,
    inputs_embeds: Tensor | None = None,  # named, as `generate` looks for the name
    is_first_iteration: bool | None = False,
    **kwargs: Any,
) -> dict[str, Any]:
    """Stock, but `generate` takes a cache's length off the full one when it continues from a cache: set that right."""
    cache = cache_of(kwargs)
    cache_map = live_map(cache)
    if cache_map is not None and next_sequence_length is not None:
        prompt = inputs_embeds if inputs_embeds is not None and is_first_iteration else input_ids
        if next_sequence_length == prompt.shape[1] - cached_length(cache):
            next_sequence_length -= cache_map.gone
    return type(self).prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=next_sequence_length,
        inputs_embeds=inputs_embeds,
        is_first_iteration=is_first_iteration,
        **kwargs,
    )


def create_masks_for_generate(
    self: StockModule,
    config: Any,
    inputs_embeds: Tensor,
    attention_mask: Any,
    is_first_iteration: bool | None = False,
    **kwargs: Any,
) -> Any:
    """Static caches get their 4-D mask before the forward: not yet for a prefill, and in cache coordinates later."""
    if is_first_iteration:
        return attention_mask
    cache = cache_of(kwargs)
    cache_map = live_map(cache)
    if cache_map is not None:
        attention_mask = cache_map.cache_mask(attention_mask, cached_length(cache), inputs_embeds.shape[1])
    return stock_create_masks_for_generate(
        config=config, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
    )


def _prefill(
    self: StockModule, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], **kwargs: Any
) -> Any:
    """Stock, which cannot cut into chunks what is pruned; what is not pruned goes its way without our record of it."""
    if generation_config.prefill_chunk_size is not None:
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).pop(ENCODED, None)
        whole = self.base_model.__dict__[PATCH].method.retention == 1
        if encoded.prunes if encoded is not None else has_images(model_kwargs) and not whole:
            raise ValueError(
                "prefill_chunk_size: images cannot be pruned in a prefill that is cut into chunks; leave it unset"
            )
    return type(self)._prefill(self, input_ids, generation_config, model_kwargs, **kwargs)


# ---------------------------------------------------------------------------------- images encoded ahead of the prefill


def _maybe_prepare_encoder_kwargs_for_generation(
    self: StockModule,
    inputs_tensor: Tensor,
    model_kwargs: dict[str, Any],
    model_input_name: str | None,
    generation_config: Any,
    **kwargs: Any,
) -> dict[str, Any]:
    """Stock from transformers 5.18 on: images are encoded ahead of the prefill, once for all beams.

    What was selected in them travels with their features to the forward that prunes.
    """
    repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
    if repeats > 1 and has_images(model_kwargs) and wrong_beams(self.config.model_type):
        raise ValueError(
            f"num_beams: the beams of transformers {transformers.__version__} itself are wrong for a "
            f"{type(self).__name__} with images; install another, or leave num_beams and num_return_sequences at 1"
        )
    arguments = {**model_kwargs, model_input_name or "input_ids": inputs_tensor}
    call = Call(self.base_model.__dict__[PATCH], arguments, prompts=len(inputs_tensor))
    with open_call(call):
        encode = type(self)._maybe_prepare_encoder_kwargs_for_generation
        model_kwargs = encode(self, inputs_tensor, model_kwargs, model_input_name, generation_config, **kwargs)
    if call.runs:
        model_kwargs["mm_encoder_outputs"][ENCODED] = call
    return model_kwargs


def _expand_multimodal_outputs(self: StockModule, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """transformers' own for all models: GLM's repeats image by image, but in the beams prompts follow one another."""
    return GenerationMixin._expand_multimodal_outputs(self, *args, **kwargs)


# -------------------------------------------------------------------------------------------------- positions of M-RoPE


def compute_3d_position_ids(self: StockModule, **kwargs: Any) -> Tensor | None:
    """Stock, but behind a pruned prompt positions go on as behind the whole one, which the cache is shorter than."""
    cache = cache_of(kwargs)
    cache_map = live_map(cache)
    if cache_map is None or cache_map.rope_deltas is None:
        return type(self).compute_3d_position_ids(self, **kwargs)
    embeds = kwargs["inputs_embeds"]
    batch, new = embeds.shape[:2]
    cache_map.check_batch(batch)
    text = cache_map.text_positions(kwargs["attention_mask"], cache.get_seq_length(), new)
    return (text.to(embeds.device) + cache_map.rope_deltas.to(embeds.device)).expand(3, batch, new)


class _FullLength:
    """Stands for a pruned cache where stock code asks how much of a prompt is in it."""

    def __init__(self, length: int) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length


def _prepare_position_ids_for_generation(
    self: StockModule, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
) -> Tensor:
    """Stock, which looks behind what is cached for new images, and is to count the pruned tokens as cached."""
    cache = cache_of(model_kwargs)
    cache_map = live_map(cache)
    if cache_map is not None:
        model_kwargs = {**model_kwargs, CACHE: _FullLength(cache.get_seq_length() + cache_map.gone)}
    return type(self)._prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs)


# ---------------------------------------------------------------------------------------------------------- all of them

_ALWAYS_THERE = (prepare_inputs_for_generation, _prefill)
# `generate` looks for the first, which few classes have, and calls the others from 5.18 on.
_MAY_BE_MISSING = (
    create_masks_for_generate,
    _maybe_prepare_encoder_kwargs_for_generation,
    _expand_multimodal_outputs,
)


def overrides(
    model: nn.Module, host: nn.Module, family: ModelFamily
) -> Iterator[tuple[nn.Module, Callable[..., Any], bool]]:
    """Which module gets which function, under its own name, and whether its class may lack one of this name."""
    if model is not host:
        yield from ((model, function, False) for function in _ALWAYS_THERE)
        yield from ((model, function, True) for function in _MAY_BE_MISSING)
    if family.multimodal_positions:
        yield host, compute_3d_position_ids, False
        if model is not host:
            yield model, _prepare_position_ids_for_generation, False


def install_generation(edits: Edits, model: nn.Module, host: nn.Module, family: ModelFamily) -> None:
    """Let `model`, with the head (or `host` itself), generate from pruned prompts."""
    for module, function, may_be_missing in overrides(model, host, family):
        edits.set_method(module, function.__name__, function, may_be_missing=may_be_missing)
