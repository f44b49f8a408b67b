"""Selection in front of the language model, for methods that read its features, the prompt's text, or text attention.

The last comes from a *probe*: the language model's first layers run on the whole prompt, without a cache, on shallow
copies of the modules, so that stock code makes the masks and rotations and nothing of the model is touched.
"""

from __future__ import annotations

import contextvars
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..methods import Stage
from ..methods.base import merges
from .call import Call, Run, present
from .edits import StockModule, refuse_replaced
from .sharding import all_heads, heads_group
from .tap import Attention, listen_to_copy

_ATTENTION = "self_attn"  # of a decoder layer, in all language models that are supported


def attention_layers(language_model: StockModule) -> tuple[int, ...]:
    """1-based decoder layers with softmax attention; linear attention has no scores."""
    return tuple(i for i, layer in enumerate(language_model.layers, 1) if hasattr(layer, _ATTENTION))


@dataclass
class Prompt:
    """Where the images of a call lie in its prompts."""

    placeholders: list[tuple[Run, Tensor]]  # of each run: bool [B, L]
    beams: int  # so many equal rows, one behind the other, the batch has of each of the B prompts

    @staticmethod
    def of(call: Call) -> Prompt:
        found, beams = [], 1
        for run in call.runs:
            places = placeholders_in(call.patch.host, call.arguments, call.placeholder_id(run))
            beams = 1 if call.prompts is None else len(places) // call.prompts
            found.append((run, places[::beams]))
        return Prompt(found, beams)


def placeholders_in(host: StockModule, arguments: dict[str, Any], token_id: int) -> Tensor:
    """Where the prompt has tokens of this kind, as the stock forward finds them: bool [B, L]."""
    if arguments.get("input_ids") is not None:
        return arguments["input_ids"] == token_id
    embeds = arguments["inputs_embeds"]
    image = host.get_input_embeddings()(torch.tensor(token_id, device=embeds.device))
    return (embeds == image).all(dim=-1)


class _Place(NamedTuple):
    """An image in the prompts: its row, and its last placeholder's column."""

    row: int
    column: int


@dataclass
class _Text:
    """The prompts' text."""

    embeds: Tensor  # [B, L, C], of text and images
    valid: Tensor  # [B, L] bool: False for padding
    mask: Tensor  # [B, L] bool: True for text
    ids: Tensor | None  # [B, L]

    def of(self, place: _Place) -> Tensor:
        """The text's embeddings of an image's prompt, [M, C]."""
        return self.embeds[place.row][self.mask[place.row]]

    def rows_behind(self, places: Iterable[_Place], last_only: bool) -> Tensor:
        """Whose attention to these images, at most one in a prompt, counts: bool [B, L]."""
        rows = torch.zeros_like(self.mask)
        for row, column in places:
            if last_only:
                rows[row, self.valid[row].nonzero()[-1, 0]] = True
            else:
                rows[row, column + 1 :] = self.mask[row, column + 1 :]
        return rows


def select_late(call: Call, prompt: Prompt, kwargs: dict[str, Any], seen: int) -> dict[str, Any]:
    """Select in the runs that wait for it; `seen` tokens are in the cache. The language model's arguments, merged."""
    method, merging = call.patch.method, merges(call.patch.method)
    waiting = [
        (run, places)
        for run, places in prompt.placeholders
        if not run.whole and (run.stage is Stage.LANGUAGE or (merging and run.layout.pool is not None))
    ]
    if not waiting:
        return kwargs
    embeds = kwargs["inputs_embeds"][:: prompt.beams]
    device = embeds.device
    visual = functools.reduce(torch.logical_or, (places for _, places in prompt.placeholders)).to(device)
    valid = _valid(kwargs.get("attention_mask"), prompt.beams, visual)
    ids = call.arguments.get("input_ids")
    text = _Text(embeds, valid, valid & ~visual, None if ids is None else ids[:: prompt.beams].to(device))
    probe = functools.cache(lambda layer: _probe(call, kwargs, layer, prompt.beams, seen))
    for run, places in waiting:
        places = places.to(device)
        tokens, features = run.placeholder_tokens(device), embeds[places]
        if run.stage is Stage.LANGUAGE:
            images = _places_of_images(run, tokens, places)
            needs = run.encoder.needs
            late: dict[str, Any] = {}
            if needs.features == "both":
                late["encoder_features"] = run.features
            if needs.features in ("language", "both"):
                late["features"] = _scatter(tokens, features, run.layout)
            if needs.text:
                late["text"] = [text.of(image) for image in images]
                if text.ids is not None:
                    late["text_ids"] = [text.ids[image.row][text.mask[image.row]] for image in images]
            if needs.text_attention is not None:
                layer, reduction = needs.text_attention
                scores = text_scores(probe(layer), reduction, text, images, run, places, tokens)
                late["text_scores"] = scores.to(device)
            run.select(method, device, **late)
        if merging:
            features = _merged(call, run, tokens, features)
            kwargs = {**kwargs, "inputs_embeds": _replace(kwargs["inputs_embeds"], places, features, prompt.beams)}
    return kwargs


def _merged(call: Call, run: Run, tokens: Tensor, features: Tensor) -> Tensor:
    """What stands at the placeholders, [P, C], with what the method makes of the tokens that it keeps."""
    method, patch = call.patch.method, call.patch
    if run.encoder.needs.features != "encoder" or run.layout.pool is not None:
        merged = run.merged(method, _scatter(tokens, features, run.layout))
        return torch.where((tokens >= 0)[:, None], merged[tokens], features)
    kept = run.picks.roles.nonzero()[:, 0]
    connector = present(patch.connector, "a connector")
    rows = run.merged(method, run.features)[kept.to(run.features.device)]
    if run.encoder.family.packed:
        rows = rows.view(-1, rows.shape[1] // run.unit_rows.shape[1])
        projected = contextvars.Context().run(connector, rows)
    else:  # in a context of its own the connector is the stock one
        projected = contextvars.Context().run(connector, rows[None])[0]
    merged = features.new_zeros(sum(run.layout.sizes), features.shape[1])
    merged = merged.index_copy(0, kept.to(features.device), projected.to(features))
    return torch.where((tokens >= 0)[:, None], merged[tokens], features)


def _valid(mask: Any, beams: int, visual: Tensor) -> Tensor:
    """Which columns [B, L] are no padding. A mask of another form is refused by the pruned prefill."""
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return torch.ones_like(visual)
    return mask[::beams, -visual.shape[1] :].to(visual.device).bool()


def _scatter(tokens: Tensor, rows: Tensor, layout: Any) -> Tensor:
    """What placeholders have, [P, ...], as what tokens have, [T, ...]; zero for tokens without a placeholder."""
    real = tokens >= 0
    return rows.new_zeros(sum(layout.sizes), *rows.shape[1:]).index_copy(0, tokens[real], rows[real])


def _replace(embeds: Tensor, places: Tensor, rows: Tensor, beams: int) -> Tensor:
    """Embeddings [B beams, L, C] with these rows [P, C] at places [B, L] of every beam."""
    new = torch.zeros_like(embeds[::beams]).masked_scatter(places[..., None], rows)
    mask, new = (x.repeat_interleave(beams, dim=0) for x in (places, new))
    return torch.where(mask[..., None], new, embeds)


def _places_of_images(run: Run, tokens: Tensor, places: Tensor) -> list[_Place]:
    """Of each image of a run where its last placeholder is; placeholders run through the prompts row by row."""
    where, tokens = places.nonzero().cpu(), tokens.cpu()
    found = []
    for _, own in run.layout.images():
        last = ((tokens >= own.start) & (tokens < own.stop)).nonzero()[-1, 0]
        found.append(_Place(*where[last].tolist()))
    return found


# ---------------------------------------------------------------------------------------------------------- the probe


def text_scores(
    attention: Attention, reduction: str, text: _Text, images: list[_Place], run: Run, places: Tensor, tokens: Tensor
) -> Tensor:
    """Attention of text to a run's tokens, [T]: the mean over heads, reduced over the rows of text behind each image.

    Images that are each the same in number in their prompts share a call: rows of the batch do not mix.
    """
    device = attention.query.device
    groups: dict[int, list[tuple[int, _Place]]] = defaultdict(list)
    count: dict[int, int] = defaultdict(int)
    for image, place in enumerate(images):
        groups[count[place.row]].append((image, place))
        count[place.row] += 1
    scores = torch.zeros(sum(run.layout.sizes), device=device)
    key_mask = None if bool(text.valid.all()) else text.valid.to(device)
    owners = torch.full((sum(run.layout.sizes) + 1,), -1)  # image of each token; of -1 none
    for image, (_, own) in enumerate(run.layout.images()):
        owners[own] = image
    owners, tokens, places = owners.to(device), tokens.to(device), places.to(device)
    for group in groups.values():
        rows = text.rows_behind((place for _, place in group), reduction == "last").to(device)
        if not bool(rows.any()):
            continue
        first = int(rows.any(dim=0).nonzero()[0, 0])  # rows before the first that counts need not be computed
        columns = ops.attention_scores(
            attention.query[:, :, first:],
            attention.key,
            scale=attention.scale,
            causal=True,
            query_mask=rows[:, first:],
            key_mask=key_mask,
            query_reduction="sum" if reduction == "last" else reduction,
        )
        found = columns[places]  # [P]
        here = torch.isin(owners[tokens], torch.tensor([image for image, _ in group], device=device))
        scores = scores.index_copy(0, tokens[here], found[here].to(scores.dtype))
    return scores


def _probe(call: Call, kwargs: dict[str, Any], layer: int, beams: int, seen: int) -> Attention:
    """Queries and keys of a decoder layer, 1-based, from a run of the layers up to it on the whole prompts."""
    name, module = type(call.patch.method).__name__, present(call.patch.language_model, "a language model")
    if seen > 0:
        raise ValueError(
            f"{name}: text attention needs the whole prompt, but {seen} tokens of it are in the cache already; hand "
            "the images over with the first turn, or the whole conversation without a cache"
        )
    heard: list[Attention] = []

    def listener(module: nn.Module, attention: Attention, stock: Callable[[], Any]) -> Any:
        heard.append(attention)
        return stock()

    layers = [getattr(each, "_orig_mod", each) for each in module.layers[:layer]]
    refuse_replaced(layers[-1], "forward")
    last = _shallow_copy(layers[-1])
    attention = getattr(last, _ATTENTION)
    refuse_replaced(attention, "forward")
    last._modules[_ATTENTION] = listen_to_copy(_shallow_copy(attention), listener)
    cut = _shallow_copy(module)
    cut._modules["layers"] = nn.ModuleList([*layers[:-1], last])
    arguments = {key: value for key, value in kwargs.items() if key not in _NOT_OF_THE_PROBE}
    # In a context of its own: nothing that listens to the model's layers is to hear these.
    contextvars.Context().run(type(module).forward, cut, **arguments, use_cache=False, return_dict=True)
    window = getattr(attention, "sliding_window", None)
    (found,) = heard
    if window is not None and found.query.shape[2] > window:
        raise ValueError(
            f"{name}: expected a prompt of at most {window} tokens, the sliding window of decoder layer {layer}, got "
            f"{found.query.shape[2]}"
        )
    group = heads_group(attention, module)  # each process would pick by some of the heads
    query, key = (all_heads(group, states[::beams]) for states in (found.query, found.key))
    return found._replace(query=query, key=key)


_NOT_OF_THE_PROBE = (
    "cache",
    "past_key_values",
    "use_cache",
    "cache_position",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)


def _shallow_copy(module: nn.Module) -> nn.Module:
    """A module with the same parameters and children, that can be given others of these without touching the first."""
    clone = object.__new__(type(module))
    clone.__dict__.update(module.__dict__)
    clone.__dict__.update(_modules=dict(module._modules), _compiled_call_impl=None)
    for name in ("forward", "_old_forward"):
        clone.__dict__.pop(name, None)
    hook = clone.__dict__.pop("_hf_hook", None)
    if hook is not None:  # accelerate's, whose forward is bound to the first module
        clone.__dict__["forward"] = functools.partial(_with_hook, clone, hook)
    return clone


def _with_hook(module: nn.Module, hook: Any, *args: Any, **kwargs: Any) -> Any:
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return hook.post_forward(module, type(module).forward(module, *args, **kwargs))
