"""Vision side of patching: what a method reads is gathered, and the tokens that it does not pick are not computed.

Layers whose scores are needed compute their attention in full and yield column scores. The *feature layer* computes
queries, keys and values of all tokens. A method that reads scores alone selects right there: attention, output
projection and MLP run for the kept rows only. One that reads keys or finished rows selects behind that layer. Layers
further behind are skipped. The *connector*, which brings features to the language model, computes the kept rows and
spreads them over the places of all, for stock code behind it.

All of this happens only while a call is open (`host_forward`): a vision encoder called by itself is the stock one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..methods import Stage
from ..methods.base import ABSENT, checked_kept, merges
from .call import (
    ENCODED,
    PATCH,
    Call,
    Patch,
    PatchedEncoder,
    Run,
    bind,
    current_call,
    current_run,
    open_call,
    refuse,
)
from .edits import refuse_replaced
from .encoders import EncoderFamily
from .tap import Attention

# ---------------------------------------------------------------------------------------------------- opening a call


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
            refuse(call)
    forward = encoder_forward if any(encoder.module is self for encoder in patch.encoders) else type(self).forward
    return_dict = kwargs.pop("return_dict", None)
    with open_call(call):
        output = forward(self, *args, **kwargs, return_dict=True)
    if call.prunes and call.cache_map is None and patch.language_model is not None:
        raise RuntimeError(
            f"model: expected {type(patch.language_model).__name__} to run as patched, but its forward was replaced; "
            f"undo that, or {patch.apply_again}"
        )
    for run in call.runs:
        run.check_selected(patch)
    if call.runs:
        patch.last = [selection for run in call.runs for selection in run.selections(patch.method.roles)]
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
    """The rows that stay, in the form that the features have: [P, C], [images, P, C], or a list or tuple of [P, C].

    Where images of a batch keep different numbers, a tuple.
    """
    if isinstance(features, Tensor) and features.ndim == 2:
        return features[kept.to(features.device)]
    rows = kept.split([len(image) for image in features])
    seen = [image[row.to(image.device)] for image, row in zip(features, rows)]
    if not isinstance(features, Tensor):
        return type(features)(seen)
    return torch.stack(seen) if len({len(image) for image in seen}) == 1 else tuple(seen)


# ---------------------------------------------------------------------------------------------------- an encoder's run


def encoder_forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The stock forward; in an open call it begins a run."""
    call = current_call()
    encoder = call.patch.encoder_of(self) if call is not None else None
    if call is not None and encoder is not None:
        call.runs.append(_begin_run(call, encoder, bind(encoder.argument_names, args, kwargs)))
    return type(self).forward(self, *args, **kwargs)


def _begin_run(call: Call, encoder: PatchedEncoder, arguments: dict[str, Any]) -> Run:
    """How many tokens of which images will stay; raises for what a pruned forward cannot give."""
    patch, facts, video = call.patch, encoder.facts, _of_videos(call)
    layout = patch.family.layout(call, encoder.family.grids(encoder.config, arguments), video)
    if layout.pictures is not None and patch.method.whole_images:
        layout = layout._replace(tiles=layout.pictures)
    run, sizes = Run(encoder, layout, checked_kept(patch.method, layout), video), layout.sizes
    if sum(run.announced) == sum(sizes):  # nothing is selected
        device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
        run.keep_all(len(patch.method.roles), device)
        return run
    refuse(call)
    if patch.host.training:
        raise ValueError("model: pruning is for inference, but the model is in training mode; call model.eval() first")
    if call.arguments.get("output_attentions") or getattr(patch.host.config, "output_attentions", False):
        raise ValueError("output_attentions: a pruned forward has no full attention maps; use record_scores instead")
    layer = patch.family.feature_layer(patch.host, call.arguments)
    if layer != facts.feature_layer:
        raise ValueError(
            f"vision_feature_layer: the model was patched for features of layer {facts.feature_layer}, but this call "
            f"asks for layer {layer}; set it in the config and apply again"
        )
    patch.family.check_call(call)
    if run.layout.placeholders is not None and patch.unpad != "after":  # padding never reaches the prompt
        candidates = torch.zeros(sum(sizes), dtype=torch.bool)
        candidates[run.layout.placeholders[run.layout.placeholders >= 0]] = True
        if not bool(candidates.all()):
            run.layout = run.layout.with_candidates(candidates)
            run.announced = checked_kept(patch.method, run.layout)
    if run.layout.unit_rows is None:
        run.layout = run.layout._replace(unit_rows=encoder.family.unit_rows(encoder.config, arguments))
    return run


def _of_videos(call: Call) -> bool:
    """Whether the run that begins is one of videos, which come behind images in all stock code."""
    given = [name for name, value in call.arguments.items() if name.startswith("pixel_values") and value is not None]
    images = sum(not name.endswith("videos") for name in given)
    return images <= len(call.runs) < len(given)


# ---------------------------------------------------------------------------------------- in front of the feature layer


def score_listener(
    module: nn.Module, attention: Attention, stock: Callable[[], tuple[Tensor, Tensor | None]]
) -> tuple[Tensor, Tensor | None]:
    """A layer whose scores are needed: full attention, and in a run its column scores (Eq. 2)."""
    run = current_run(module)
    if run is None:
        return stock()
    encoder = run.encoder
    layer = next(layer for layer in encoder.listened_layers if encoder.attention(layer) is module)
    queries = encoder.needs.scores[layer]
    if queries == "cls":
        scores, result = attention.column_scores(queries), stock()
    else:
        output, scores = attention.output_and_scores(queries)
        result = output, None
    run.scores[layer] = run.layout.scores_of_tokens(scores, encoder.facts.num_prefix_tokens)
    return result


def region_layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The layer behind the one of whose output regions are wanted: they are what comes in."""
    run = current_run(self)
    if run is not None:
        run.regions = _regions(run, hidden_states)
    return type(self).forward(self, hidden_states, *args, **kwargs)


def _regions(run: Run, states: Tensor) -> Tensor:
    """The CLS row of each tile that the encoder takes, or the mean of its rows where there is none: [R, C]."""
    if run.encoder.facts.has_cls:
        return states[:, 0]
    if states.ndim == 3:
        return states.mean(dim=1)
    tokens = run.layout.rows_of_tokens(states).mean(dim=1)
    return torch.stack([tile.mean(dim=0) for tile in tokens.split(run.layout.sizes)])


# --------------------------------------------------------------------------------------------------- the feature layer


def _tile_indices(run: Run) -> Tensor:
    """Kept tokens of each tile, [B, K] counted within the tile; -1 fills."""
    indices = run.picks.indices
    tiles, size = len(run.layout.grids), run.layout.sizes[0]
    if tiles == 1:
        return indices[None]
    starts = torch.arange(0, tiles * size, size, device=indices.device)[:, None]
    if run.picks.even:
        return indices.view(tiles, -1) - starts
    indices = pad_sequence(list(indices.split(run.picks.host_counts())), batch_first=True, padding_value=-1)
    return torch.where(indices < 0, indices, indices - starts)


def _packed_units(run: Run) -> Tensor:
    """Kept tokens in the order of a packed encoder's groups of rows: which groups, ascending, [K]."""
    indices, unit_rows = run.picks.indices, run.unit_rows
    if run.picks.fills:
        indices = indices[indices >= 0]
    return unit_rows[indices, 0].sort().values // unit_rows.shape[1]


def _select_rows(run: Run) -> Tensor:
    """The encoder's rows to compute: [B, prefix + K G], prefix rows first, or [K G] packed."""
    if run.encoder.family.packed:
        units, group = _packed_units(run), run.unit_rows.shape[1]
        return (units[:, None] * group + torch.arange(group, device=units.device)).flatten()
    indices, unit_rows = _tile_indices(run), run.layout.unit_rows
    if not run.picks.even:
        indices = indices.clamp(min=0)
    if unit_rows is not None:
        indices = unit_rows.to(indices.device)[indices].flatten(1)
    return with_prefix(indices, run.encoder.facts.num_prefix_tokens)


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
    """The feature layer: all rows in; in a run, only the selected ones out, unless all are wanted."""
    call, run = current_call(), current_run(self)
    if call is None or run is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    encoder, family, needs, method = run.encoder, run.encoder.family, run.encoder.needs, call.patch.method
    layer, prefix = encoder.facts.feature_layer, encoder.facts.num_prefix_tokens
    if needs.region_features == layer - 1:
        run.regions = _regions(run, hidden_states)
    sparse = run.stage is Stage.FEATURE_LAYER and run.layout.pool is None
    own_regions = run.stage is Stage.FEATURE_LAYER and needs.region_features == layer
    attention: Attention = ABSENT
    if sparse or own_regions or needs.keys or layer in needs.scores:
        refuse_bypassed(self, family)
        attention = family.project(self, hidden_states, *args, **kwargs).autocast()
        if layer in needs.scores:
            run.scores[layer] = run.layout.scores_of_tokens(attention.column_scores(needs.scores[layer]), prefix)
        if needs.keys:
            run.keys = run.layout.keys_of_tokens(attention.mean_key(), prefix)
        if own_regions:
            first = torch.zeros(len(hidden_states), 1, dtype=torch.long, device=hidden_states.device)
            run.regions = family.finish(self, gather_rows(hidden_states, first), attention.output_rows(first))[:, 0]
    if run.stage is Stage.FEATURE_LAYER:
        run.select(method, hidden_states.device)
        if sparse:
            rows = _select_rows(run)
            states = family.finish(self, gather_rows(hidden_states, rows), attention.output_rows(rows))
            return _kept_output(run, hidden_states, states, rows)
    output = type(self).forward(self, hidden_states, *args, **kwargs)
    states = output[0] if family.returns_tuple else output
    if needs.region_features == layer and run.regions is None:
        run.regions = _regions(run, states)
    if needs.features in ("encoder", "both"):
        run.features = run.layout.features_of_tokens(states, prefix)
    if run.stage is not Stage.ENCODER:
        return output
    run.select(method, states.device)
    if run.layout.pool is not None:
        return output
    if merges(method):
        states = _with_merged(run, states, run.merged(method, run.features))
    rows = _select_rows(run)
    return _kept_output(run, states, gather_rows(states, rows), rows)


def _kept_output(run: Run, states: Tensor, kept: Tensor, rows: Tensor) -> Any:
    """What the layer returns of `kept`, its finished rows; spread over zeros like `states` where all are expected."""
    family = run.encoder.family
    if family.full_shape:
        kept = torch.zeros_like(states).scatter(1, rows[..., None].expand_as(kept), kept)
    return (kept, None) if family.returns_tuple else kept


def _with_merged(run: Run, states: Tensor, merged: Tensor) -> Tensor:
    """An encoder's rows with the features of tokens, [T, G C], back in their places."""
    group, prefix = merged.shape[1] // states.shape[-1], run.encoder.facts.num_prefix_tokens
    rows = merged.view(-1, group, states.shape[-1])
    states, unit_rows = states.clone(), run.layout.unit_rows
    if states.ndim == 2:
        states[run.unit_rows.to(states.device)] = rows
    elif unit_rows is None:
        states[:, prefix:] = rows.view(len(states), -1, states.shape[-1])
    else:
        states[:, prefix + unit_rows.to(states.device)] = rows.view(len(states), -1, *rows.shape[1:])
    return states


def skipped_layer_forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A layer behind the feature layer: in a run nothing reads its output."""
    run = current_run(self)
    if run is None:
        return type(self).forward(self, hidden_states, *args, **kwargs)
    return (hidden_states, None) if run.encoder.family.returns_tuple else hidden_states


# -------------------------------------------------------------------------------------------------------- the connector


def connector_forward(module: nn.Module, forward: Callable[..., Tensor], features: Tensor) -> Tensor:
    """Features to the language model's space; in a run, for the kept tokens, spread over the places of all of them."""
    call = current_call()
    if call is None or call.patch.connector is not module or not call.runs:
        return forward(features)
    run = call.runs[-1]
    family = run.encoder.family
    if run.stage is not Stage.LANGUAGE:
        run.check_selected(call.patch)
    if run.dense:
        projected = forward(features)
        run.connector_prefix = 0 if family.packed else projected.shape[1] - run.layout.sizes[0]
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
    even, size = run.picks.even, run.layout.sizes[0]
    length = prefix + size
    places = tokens if even else torch.where(tokens < 0, size, tokens)  # fill goes to a row behind the last
    places = with_prefix(places, prefix).to(projected.device)[..., None].expand_as(projected)
    shape = (len(projected), length if even else length + 1, projected.shape[-1])
    spread = projected.new_zeros(shape).scatter(1, places, projected)
    return spread if even else spread[:, :length].contiguous()
