"""Load-time patching of Hugging Face models: `apply_hiprune` and its relatives, and the table of what is supported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..budget import ROLE_NAMES, check_selection_options, resolve_budget
from . import bare, glm4v, internvl, llava, llava_next, llava_onevision, qwen_vl, video_llava
from .attention import clear_taps, refuse_tapped, tap_attention
from .decoder import install_decoder
from .edits import clear_methods
from .encoders import (
    PATCH,
    ModelFamily,
    Patch,
    Selection,
    Settings,
    Tower,
    connector_forward,
    encoder_forward,
    feature_layer_forward,
    forward_names,
    host_forward,
    object_listener,
    refuse_bypassed,
    skipped_layer_forward,
)
from .generate import install_generation
from .recording import LayerScores, record_scores
from .towers import ENCODERS, find_encoder

__all__ = [
    "FAMILIES",
    "LayerScores",
    "Selection",
    "apply_hiprune",
    "hiprune",
    "is_patched",
    "last_selection",
    "record_scores",
    "remove_hiprune",
]

Model = TypeVar("Model", bound=nn.Module)


FAMILIES = {  # config.model_type -> family
    **llava.FAMILIES,
    **llava_next.FAMILIES,
    **llava_onevision.FAMILIES,
    **video_llava.FAMILIES,
    **qwen_vl.FAMILIES,
    **glm4v.FAMILIES,
    **internvl.FAMILIES,
    **bare.FAMILIES,
}


def _family(model: nn.Module) -> ModelFamily:
    if not isinstance(model, PreTrainedModel):  # wrappers show the config of what they wrap: take no part for the whole
        raise TypeError(f"model: expected a transformers.PreTrainedModel, got {type(model).__name__}")
    if model.config.model_type not in FAMILIES:
        encoder = ENCODERS.get(model.config.model_type)
        raise ValueError(
            f"model: expected a model of type {', '.join(FAMILIES)}, got {type(model).__name__} of type "
            f"{model.config.model_type!r}" + (f" ({encoder.notes})" if encoder is not None and encoder.notes else "")
        )
    return FAMILIES[model.config.model_type]


def _patch_of(model: nn.Module) -> Patch | None:
    return _family(model).host(model).__dict__.get(PATCH)


def apply_hiprune(
    model: Model,
    *,
    budget: int | None = None,
    retention: float | None = None,
    alpha: float = 0.1,
    object_layer: int | None = None,
    rule: str = "paper",
    neighborhood: str = "cross",
    score_queries: str = "all",
    keep_roles: Sequence[str] = ROLE_NAMES,
    unpad: str | None = None,
) -> Model:
    """Let a loaded model prune its visual tokens with HiPrune, in place.

    Args:
        model: see `FAMILIES`; in eval mode when it runs.
        budget, retention: exactly one of them: visual tokens kept per image (or video; `hiprune info --models` says
            what of), or the share of them. A budget that reaches the number of tokens leaves the forward stock.
        alpha: share of the budget spent on anchors and buffers (Eq. 3).
        object_layer: 1-based layer whose scores choose the anchors; None takes the family's (CLIP: 9 of 24, scaled to
            other depths by ``round(9 / 24 * depth)``; Qwen-VL: half the depth).
        rule: "paper", "official" (the authors' released code for this family) or "grid".
        neighborhood: "cross", "square", "row" or "none".
        score_queries: "all" (Eq. 2) or "cls": which queries' attention counts.
        keep_roles: which of "anchor", "buffer", "register" are kept (table 5 of the paper).
        unpad: only for models that cut images into tiles: "before" (the default) takes tokens of the tiles' padding out
            before the selection, so that the number of kept tokens follows from the image's size alone; "after", as
            the authors' released code, lets the model drop them afterwards, so that fewer may survive.

    Returns:
        `model`. A vision encoder now returns `last_hidden_state` [B, prefix + budget, C] in ascending order, and the
        `pooler_output` and earlier hidden states it returned before. A vision-language model takes the inputs it took
        before, masks and positions of full length included; its `logits` have columns for kept tokens only; counted
        from the end they are where they were behind the last image. Applying again replaces the settings.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came; or because patched models are wrong
            with a version of transformers that was not tested, which `check_model` finds out when it is first met. The
            model is then as it was before.

    Example:
        >>> apply_hiprune(model, budget=192)
        >>> model.generate(**processor(images=image, text=prompt, return_tensors="pt"))
    """
    settings = Settings(budget, retention, alpha, object_layer, rule, neighborhood, score_queries, keep_roles, unpad)
    _apply(model, settings)
    return model


def _prepare(model: nn.Module, family: ModelFamily, settings: Settings) -> Patch:
    """Check everything that can be checked before a module is touched.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    host = family.host(model)
    family.check(host)
    check_selection_options(settings.alpha, settings.rule, settings.neighborhood, settings.keep_roles)
    if settings.rule not in ("paper", "official", "grid"):
        raise ValueError(f'rule: expected "paper", "official" or "grid" for a model, got {settings.rule!r}')
    if not isinstance(settings.score_queries, str) or settings.score_queries not in ("all", "cls"):
        raise ValueError(f'score_queries: expected "all" or "cls", got {settings.score_queries!r}')
    known = ("before", "after") if family.has_unpad else ()
    if settings.unpad is not None and not (isinstance(settings.unpad, str) and settings.unpad in known):
        expected = '"before" or "after"' if family.has_unpad else f"None for a {type(model).__name__}"
        raise ValueError(f"unpad: expected {expected}, got {settings.unpad!r}")
    resolve_budget(1, budget=settings.budget, retention=settings.retention)
    return Patch(
        settings=settings,
        family=family,
        host=host,
        towers=[_prepare_tower(encoder, family.feature_layer(host, {}), settings) for encoder in family.encoders(host)],
        connector=family.connector(host),
        language_model=family.language_model(host),
        argument_names=forward_names(host),
    )


def _prepare_tower(encoder: nn.Module, feature_layer: int, settings: Settings) -> Tower:
    if not isinstance(encoder, PreTrainedModel):  # a wrapper, whose forward does not show what it takes
        raise ValueError(f"model: expected a transformers.PreTrainedModel for its vision, got {type(encoder).__name__}")
    family, config, layers = find_encoder(encoder)
    object_layer = settings.object_layer
    if object_layer is None:
        object_layer = family.default_object_layer(len(layers), feature_layer)
    if type(object_layer) is not int:
        raise TypeError(f"object_layer: expected an int, got {type(object_layer).__name__}")
    if not 1 <= object_layer <= feature_layer:
        raise ValueError(
            f"object_layer: expected 1 to {feature_layer} (1-based, not behind the layer whose output are the "
            f"features), got {object_layer}"
        )
    if settings.score_queries == "cls" and family.num_prefix_tokens(config) == 0:
        raise ValueError(f'score_queries: expected "all", as {type(encoder).__name__} has no CLS token, got "cls"')
    refuse_bypassed(layers[feature_layer - 1], family)
    return Tower(encoder, family, config, layers, object_layer, feature_layer, forward_names(encoder))


def _install(patch: Patch, model: nn.Module) -> None:
    """Do what was prepared; on any error everything done so far is undone."""
    edits, host = patch.edits, patch.host
    try:
        for tower in patch.towers:
            refuse_tapped(layer.get_submodule(tower.family.attention) for layer in tower.layers)
            if tower.encoder is not host:
                edits.set_method(tower.encoder, "forward", encoder_forward)
            if tower.object_layer != tower.feature_layer:
                tap_attention(edits, tower.object_attention, object_listener)
            edits.set_method(tower.layers[tower.feature_layer - 1], "forward", feature_layer_forward)
            for layer in tower.layers[tower.feature_layer :]:
                edits.set_method(layer, "forward", skipped_layer_forward)
        edits.set_attribute(host, PATCH, patch)
        edits.set_method(host, "forward", host_forward)
        if patch.connector is not None:
            edits.wrap_forward(patch.connector, connector_forward)
        if patch.language_model is not None:
            install_decoder(edits, model, host, patch.language_model)
            install_generation(edits, model, host, patch.family)
    except BaseException:
        edits.undo()
        raise


def _apply(model: nn.Module, settings: Settings) -> None:
    from .selfcheck import vouch  # late, as it needs what is here

    patch, previous = _prepare(model, _family(model), settings), _patch_of(model)
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


def remove_hiprune(model: Model) -> Model:
    """Take the patch off again: the model computes its stock bits, and no attribute stays behind.

    Raises:
        ValueError: if the model is not patched.
    """
    _take_off(_patched(model))
    return model


def _take_off(patch: Patch) -> None:
    patch.edits.undo()
    clear_methods(patch.host)
    clear_taps(patch.host, object_listener)


def _patched(model: nn.Module) -> Patch:
    patch = _patch_of(model)
    if patch is None:
        raise ValueError(f"model: expected a patched model, but this {type(model).__name__} is not; call apply_hiprune")
    return patch


def is_patched(model: nn.Module) -> bool:
    """Whether `apply_hiprune` is in force on this model (False for models that cannot be patched)."""
    supported = isinstance(model, PreTrainedModel) and model.config.model_type in FAMILIES
    return supported and _patch_of(model) is not None


def last_selection(model: nn.Module) -> list[Selection]:
    """What the most recent forward with images kept, one `Selection` per image; empty before the first one.

    Where the budget reached the number of tokens nothing was selected, and all of them count as registers.

    Raises:
        ValueError: if the model is not patched.

    Example:
        >>> indices, roles, grid = last_selection(model)[0]
    """
    return _patched(model).last


@contextmanager
def hiprune(
    model: Model,
    *,
    budget: int | None = None,
    retention: float | None = None,
    alpha: float = 0.1,
    object_layer: int | None = None,
    rule: str = "paper",
    neighborhood: str = "cross",
    score_queries: str = "all",
    keep_roles: Sequence[str] = ROLE_NAMES,
    unpad: str | None = None,
) -> Iterator[Model]:
    """`apply_hiprune` for the length of a ``with`` block; then the model is stock again, or patched as it was before.

    Example:
        >>> with hiprune(model, retention=0.222):
        ...     answer = model.generate(**inputs)
    """
    settings = Settings(budget, retention, alpha, object_layer, rule, neighborhood, score_queries, keep_roles, unpad)
    previous = _patch_of(model)
    _apply(model, settings)
    try:
        yield model
    finally:
        if previous is not None:
            _apply(model, previous.settings)
        elif is_patched(model):  # unless the block took the patch off itself
            remove_hiprune(model)
