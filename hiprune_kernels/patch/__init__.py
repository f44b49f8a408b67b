"""Load-time patching of Hugging Face models: `apply_method` and its relatives. README.md beside this file says more."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..facts import EncoderFacts, encoder_type
from ..methods import HiPrune, Method, Selection, Stage
from ..methods.base import checked_needs, merges
from .call import PATCH, Patch, PatchedEncoder, forward_names
from .edits import clear_methods
from .encoders import ENCODERS, find_encoder
from .generate import install_generation
from .language import install_language
from .late import attention_layers
from .models import FAMILIES, ModelFamily
from .recording import LayerScores, record_scores
from .sharding import refuse_sharded
from .tap import clear_taps, refuse_tapped, tap_attention
from .vision import (
    connector_forward,
    encoder_forward,
    feature_layer_forward,
    host_forward,
    refuse_bypassed,
    region_layer_forward,
    score_listener,
    skipped_layer_forward,
)

__all__ = [
    "FAMILIES",
    "LayerScores",
    "Selection",
    "applied",
    "apply_hiprune",
    "apply_method",
    "hiprune",
    "is_patched",
    "last_selection",
    "record_scores",
    "remove_hiprune",
    "remove_method",
]

Model = TypeVar("Model", bound=nn.Module)


def _family(model: nn.Module) -> ModelFamily:
    if not isinstance(model, PreTrainedModel):  # wrappers show the config of what they wrap: take no part for the whole
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    if model.config.model_type not in FAMILIES:
        encoder = ENCODERS.get(model.config.model_type)
        raise ValueError(
            f"model: expected a model of type {', '.join(FAMILIES)}, got {type(model).__name__} of type "
            f"{model.config.model_type!r}"
            + (f" ({encoder.kind.notes})" if encoder is not None and encoder.kind.notes else "")
        )
    return FAMILIES[model.config.model_type]


def _patch_of(model: nn.Module) -> Patch | None:
    return _family(model).host(model).__dict__.get(PATCH)


def apply_method(model: Model, method: Method, *, unpad: str | None = None) -> Model:
    """Let a loaded model prune its visual tokens by a method, in place.

    Args:
        model: see `hiprune info --models`; in eval mode when it runs.
        method: `HiPrune(budget=192)` or another of `hiprune_kernels.methods`, or an object of a class of your own.
        unpad: only for models that cut images into tiles: "before" (the default) takes tokens of the tiles' padding out
            before the selection, so that the number of kept tokens follows from the image's size alone; "after", as
            the authors' released code, lets the model drop them afterwards, so that fewer may survive.

    Returns:
        `model`. A vision encoder now returns `last_hidden_state` [B, prefix + budget, C] in ascending order, and the
        `pooler_output` and earlier hidden states it returned before. A vision-language model takes the inputs it took
        before, masks and positions of full length included; its `logits` have columns for kept tokens only; counted
        from the end they are where they were behind the last image. Applying again replaces the method.

    Raises:
        TypeError, ValueError: naming the argument or the method, what was expected and what came; or because patched
            models are wrong with a version of transformers that was not tested, which `check_model` finds out when it
            is first met. The model is then as it was before.

    Example:
        >>> apply_method(model, FasterVLM(budget=144))
        >>> model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    """
    from .selfcheck import vouch  # late, as it needs what is here

    family = _family(model)
    patch, previous = _prepare(model, family, method, unpad), _patch_of(model)
    vouch(patch, model)
    if previous is not None:
        previous.edits.refuse_changed()  # what could not be patched again is not taken off
        _take_off(previous)
    try:
        _install(patch, model)
    except BaseException:
        if previous is not None:
            _install(previous, model)
        raise
    return model


def remove_method(model: Model) -> Model:
    """Take the patch off again: the model computes its stock bits, and no attribute stays behind.

    Raises:
        ValueError: if the model is not patched.
    """
    _take_off(_patched(model))
    return model


@contextmanager
def applied(model: Model, method: Method, *, unpad: str | None = None) -> Iterator[Model]:
    """`apply_method` for the length of a ``with`` block; then the model is stock again, or patched as it was before.

    Example:
        >>> with applied(model, DivPrune(retention=0.1)):
        ...     answer = model.generate(**inputs)
    """
    previous = _patch_of(model)
    apply_method(model, method, unpad=unpad)
    try:
        yield model
    finally:
        if previous is not None:
            apply_method(model, previous.method, unpad=previous.unpad)
        elif is_patched(model):  # unless the block took the patch off itself
            remove_method(model)


def is_patched(model: nn.Module) -> bool:
    """Whether a method is in force on this model (False for models that cannot be patched)."""
    supported = isinstance(model, PreTrainedModel) and model.config.model_type in FAMILIES
    return supported and _patch_of(model) is not None


def last_selection(model: nn.Module) -> list[Selection]:
    """What the most recent forward with images kept, one `Selection` per image; empty before the first one.

    Where the budget reached the number of tokens nothing was selected, and all of them have the method's last role: of
    HiPrune, they count as registers.

    Raises:
        ValueError: if the model is not patched.

    Example:
        >>> indices, roles, grid = last_selection(model)[0]
    """
    return _patched(model).last


# ------------------------------------------------------------------------------------------------ HiPrune's front doors


def apply_hiprune(
    model: Model,
    *,
    budget: int | None = None,
    retention: float | None = None,
    alpha: float = HiPrune.alpha,
    object_layer: int | str | os.PathLike[str] | None = HiPrune.object_layer,
    rule: str = HiPrune.rule,
    neighborhood: str = HiPrune.neighborhood,
    score_queries: str = HiPrune.score_queries,
    keep_roles: Sequence[str] = HiPrune.keep_roles,
    unpad: str | None = None,
) -> Model:
    """Let a loaded model prune its visual tokens with HiPrune, in place.

    The same as `apply_method` with `HiPrune` of these options, which says what they mean.

    Example:
        >>> apply_hiprune(model, budget=192)
        >>> model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    """
    _family(model)  # what cannot be patched at all is said first
    method = HiPrune(
        budget=budget,
        retention=retention,
        alpha=alpha,
        object_layer=object_layer,
        rule=rule,
        neighborhood=neighborhood,
        score_queries=score_queries,
        keep_roles=keep_roles,
    )
    return apply_method(model, method, unpad=unpad)


remove_hiprune = remove_method


@contextmanager
def hiprune(
    model: Model,
    *,
    budget: int | None = None,
    retention: float | None = None,
    alpha: float = HiPrune.alpha,
    object_layer: int | str | os.PathLike[str] | None = HiPrune.object_layer,
    rule: str = HiPrune.rule,
    neighborhood: str = HiPrune.neighborhood,
    score_queries: str = HiPrune.score_queries,
    keep_roles: Sequence[str] = HiPrune.keep_roles,
    unpad: str | None = None,
) -> Iterator[Model]:
    """`applied` with `HiPrune` of these options, those of `apply_hiprune`.

    Example:
        >>> with hiprune(model, retention=0.222):
        ...     answer = model.generate(**inputs)
    """
    _family(model)
    method = HiPrune(
        budget=budget,
        retention=retention,
        alpha=alpha,
        object_layer=object_layer,
        rule=rule,
        neighborhood=neighborhood,
        score_queries=score_queries,
        keep_roles=keep_roles,
    )
    with applied(model, method, unpad=unpad):
        yield model


# ---------------------------------------------------------------------------------------------------- preparing a patch


def _prepare(model: nn.Module, family: ModelFamily, method: Method, unpad: str | None) -> Patch:
    """Check everything that can be checked before a module is touched.

    Raises:
        ValueError, TypeError: naming the argument or the method, what was expected and what came.
    """
    if not isinstance(method, Method):
        raise TypeError(
            "method: expected a Method, such as HiPrune(budget=192), got "
            + (f"the class {method.__name__}, without options" if isinstance(method, type) else type(method).__name__)
        )
    host = family.host(model)
    family.check(host)
    kind = family.kind
    if unpad is not None and not (isinstance(unpad, str) and kind.unpad and unpad in ("before", "after")):
        expected = '"before" or "after"' if kind.unpad else f"None for a {type(model).__name__}"
        raise ValueError(f"unpad: expected {expected}, got {unpad!r}")
    language_model = family.language_model(host)
    around: dict[str, Any] = {"feature_layer": family.feature_layer(host, {}), "tiled": kind.thumbnail is not None}
    around["places_tiles"] = kind.places_tiles
    if language_model is not None:
        around["decoder_layers"] = len(language_model.layers)
        around["attention_layers"] = attention_layers(language_model)
    encoders = [_prepare_encoder(encoder, method, **around) for encoder in family.encoders(host)]
    return Patch(
        method=method,
        unpad=unpad,
        family=family,
        host=host,
        encoders=encoders,
        connector=family.connector(host),
        language_model=language_model,
        argument_names=forward_names(host),
    )


def _prepare_encoder(module: nn.Module, method: Method, **around: Any) -> PatchedEncoder:
    if not isinstance(module, PreTrainedModel):  # a wrapper, whose forward does not show what it takes
        raise ValueError(f"model: expected a transformers.PreTrainedModel for its vision, got {type(module).__name__}")
    family, config, layers = find_encoder(module)
    facts = EncoderFacts(
        encoder_type(config),
        family.kind,
        depth=len(layers),
        num_prefix_tokens=family.kind.num_prefix_tokens(config),
        class_name=type(module).__name__,
        **around,
    )
    needs = checked_needs(method, facts)
    late = needs.stage(facts) is Stage.LANGUAGE
    if merges(method) and needs.features == "encoder" and late and family.full_shape:
        raise ValueError(
            f"{type(method).__name__}: expected features of the language model, as rows of {facts.name} are mixed in "
            "front of the connector, and cannot be merged there once text is known, got the encoder's"
        )
    refuse_bypassed(layers[facts.feature_layer - 1], family)
    refuse_sharded(module, [layer.get_submodule(family.attention) for layer in layers])
    return PatchedEncoder(module, family, facts, config, layers, needs, forward_names(module))


def _install(patch: Patch, model: nn.Module) -> None:
    """Do what was prepared; on any error everything done so far is undone."""
    edits, host = patch.edits, patch.host
    try:
        for encoder in patch.encoders:
            refuse_tapped(encoder.attention(layer) for layer in range(1, len(encoder.layers) + 1))
            if encoder.module is not host:
                edits.set_method(encoder.module, "forward", encoder_forward)
            for layer in encoder.listened_layers:
                tap_attention(edits, encoder.attention(layer), score_listener)
            if encoder.region_layer is not None:
                edits.set_method(encoder.region_layer, "forward", region_layer_forward)
            edits.set_method(encoder.feature_layer, "forward", feature_layer_forward)
            for skipped in encoder.skipped_layers:
                edits.set_method(skipped, "forward", skipped_layer_forward)
        edits.set_attribute(host, PATCH, patch)
        edits.set_method(host, "forward", host_forward)
        if patch.connector is not None:
            edits.wrap_forward(patch.connector, connector_forward)
        if patch.language_model is not None:
            install_language(edits, model, host, patch.language_model)
            install_generation(edits, model, host, patch.family)
    except BaseException:
        edits.undo()
        raise


def _take_off(patch: Patch) -> None:
    patch.edits.undo()
    clear_methods(patch.host)
    clear_taps(patch.host, score_listener)


def _patched(model: nn.Module) -> Patch:
    patch = _patch_of(model)
    if patch is None:
        raise ValueError(f"model: expected a patched model, but this {type(model).__name__} is not; call apply_hiprune")
    return patch
