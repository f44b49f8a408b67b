"""Whether patched models are right under the installed transformers: a tiny random one of the family is asked.

What it must compute comes from stock code alone. A stock model hands its language model the whole prompt as embeddings;
without the rows that the patched model dropped, they give the logits, the greedy tokens and the beams to compare with.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from ..methods import HiPrune
from . import stock as stock_functions
from . import tiny
from .call import Patch
from .edits import StockModule
from .generate import wrong_beams
from .language import CACHE

_RETENTION = 0.3
_NEW_TOKENS, _BEAMS = 4, 2
_TOKEN = 5  # of text
_CLOSE = 1e-3  # of the largest number; a wrong token moves logits by more than a hundredth of that


class Verdict(NamedTuple):
    """What `check_model` found.

    Attributes:
        model_type: which models it is about.
        difference: what a patched model does otherwise than stock code on the tokens that it kept; empty if nothing.
    """

    model_type: str
    difference: str

    @property
    def right(self) -> bool:
        return not self.difference


class _Differs(Exception):
    """Says what is wrong."""


def check_model(model_or_type: nn.Module | str) -> Verdict:
    """Compare a tiny random model of a family, patched, with stock code under the installed transformers.

    Takes about a second. Compared are the features of the tokens kept, and of models with a language model the logits
    of prompts and of a decoding step, greedy tokens with a growing and with a static cache, and beams.

    Args:
        model_or_type: a model, whose weights are not touched, or a model type as in `hiprune info --models`.

    Raises:
        TypeError: if it is neither.
        ValueError: if such models are not supported.

    Example:
        >>> check_model("llava").right
        True
    """
    from . import FAMILIES, _family

    if isinstance(model_or_type, str):
        if model_or_type not in FAMILIES:
            raise ValueError(f"model_or_type: expected one of {', '.join(FAMILIES)}, got {model_or_type!r}")
        variant: tuple[str, str | None, str | None] = (model_or_type, None, None)
    elif not isinstance(model_or_type, transformers.PreTrainedModel):
        got = type(model_or_type).__name__
        raise TypeError(f"model_or_type: expected a transformers.PreTrainedModel or a model type, got {got}")
    else:
        family = _family(model_or_type)
        family.check(family.host(model_or_type))
        variant = _variant(model_or_type)
    with _undisturbed():
        try:
            _compare(*tiny.build(*variant))
        except _Differs as difference:
            return Verdict(variant[0], str(difference))
        except Exception as error:  # whatever a changed transformers brings about
            return Verdict(variant[0], f"{type(error).__name__}: {' '.join(str(error).split())}")
    return Verdict(variant[0], "")


def _variant(model: StockModule) -> tuple[str, str | None, str | None]:
    parts = (
        getattr(getattr(model.config, name, None), "model_type", None) for name in ("text_config", "vision_config")
    )
    return (model.config.model_type, *parts)


_VERDICTS: dict[Any, Verdict] = {}  # of this process


def vouch(patch: Patch, model: nn.Module) -> None:
    """Check by `check_model`, once, if a stock function that `patch` relies on is none of the known ones.

    Raises:
        ValueError: if patched models are wrong with it.
    """
    names = stock_functions.unknown(patch, model)
    if not names:
        return
    installed, variant = stock_functions.functions(patch, model), _variant(model)
    key = (variant, *(f"{name} {installed[name]}" for name in names))
    first = key not in _VERDICTS
    if first:
        _VERDICTS[key] = check_model(model)
    changed = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}"
    if not _VERDICTS[key].right:
        raise ValueError(
            f"model: hiprune_kernels is known to be right with transformers {stock_functions.RELEASES[0]} to "
            f"{stock_functions.RELEASES[-1]}, of which none has this version of {changed} (transformers "
            f"{transformers.__version__}), and a tiny patched {variant[0]} is wrong with it: "
            f"{_VERDICTS[key].difference}; install one of those releases"
        )
    if first:
        elsewhere = [name for name in names if name not in _covered(variant)]
        warnings.warn(
            f"hiprune_kernels was not tested with this version of {changed} (transformers {transformers.__version__}), "
            + (
                f"and cannot check it, as a tiny {variant[0]} has no {', '.join(elsewhere)}: compare the outputs"
                if elsewhere
                else f"but a tiny patched {variant[0]} was now compared with stock code and is right"
            ),
            stacklevel=4,  # where apply_hiprune was called
        )


def _covered(variant: tuple[str, str | None, str | None]) -> dict[str, str]:
    """The stock functions that the check of these models runs through."""
    from . import FAMILIES, _prepare

    with _undisturbed():
        model, _ = tiny.build(*variant)
    return stock_functions.functions(_prepare(model, FAMILIES[variant[0]], HiPrune(retention=_RETENTION), None), model)


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Whatever the process has set for models of its own, and no messages of transformers."""
    dtype, verbosity = torch.get_default_dtype(), transformers.logging.get_verbosity()
    torch.set_default_dtype(torch.float32)
    transformers.logging.set_verbosity_error()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("cpu"),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_default_dtype(dtype)
        transformers.logging.set_verbosity(verbosity)


# ------------------------------------------------------------------------------------------------------- the comparison


def _compare(stock: StockModule, inputs: dict[str, Tensor]) -> None:
    """Raises where a patched copy of `stock` and stock code differ."""
    from . import FAMILIES, _install, _prepare

    model = copy.deepcopy(stock)
    patch = _prepare(model, FAMILIES[model.config.model_type], HiPrune(retention=_RETENTION), None)
    _install(patch, model)
    if patch.family.language_model(patch.host) is None:
        _compare_encoders(patch, model, stock, inputs)
        return
    ours, ours_embeds, _ = _prefill(model, patch.host, inputs)
    _, embeds, arguments = _prefill(stock, patch.family.host(stock), inputs)
    rows = _rows(patch, inputs, ours_embeds, embeds, arguments)
    for row, logits in zip(rows, ours):
        _expect_close("logits", logits[-len(row.embeds) :], _row_logits(stock, row))
    for row, logits in zip(rows, _decoding_step(model, inputs)):
        _expect_close("logits of a decoding step", logits, _row_logits(stock, _extended(stock, row, [_TOKEN]))[-1:])

    visual: set[Any] = {getattr(stock.config, name, None) for name in ("image_token_id", "video_token_id")} - {None}
    options = {"do_sample": False, "max_new_tokens": _NEW_TOKENS, "suppress_tokens": sorted(visual)}
    length = inputs["input_ids"].shape[1]

    def generated(**others: Any) -> list[list[int]]:
        return model.generate(**inputs, **options, **others)[:, length:].tolist()

    expected = [_beam_search(stock, row, visual, width=1) for row in rows]
    _expect_equal("greedy tokens", generated(), expected)
    _expect_equal("greedy tokens with a static cache", generated(cache_implementation="static"), expected)
    if _beams_are_right(patch, stock):
        expected = [_beam_search(stock, row, visual, width=_BEAMS) for row in rows]
        _expect_equal(f"tokens of {_BEAMS} beams", generated(num_beams=_BEAMS), expected)


def _beams_are_right(patch: Patch, stock: StockModule) -> bool:
    """Before 5.18 transformers mixes up several images of a prompt, which most models take image by image."""
    one_by_one = not patch.family.multimodal_positions
    before_518 = not hasattr(transformers.GenerationMixin, "_expand_multimodal_outputs")
    return not wrong_beams(stock.config.model_type) and not (before_518 and one_by_one)


def _compare_encoders(patch: Patch, model: nn.Module, stock: nn.Module, inputs: dict[str, Any]) -> None:
    ours, theirs = model(**inputs).last_hidden_state, stock(**inputs).last_hidden_state
    prefix = patch.encoders[0].facts.num_prefix_tokens
    indices = torch.stack([selection.indices for selection in patch.last])
    rows = torch.cat([torch.arange(prefix).expand(len(indices), -1), indices + prefix], dim=1)
    if not prefix < rows.shape[1] < theirs.shape[1]:
        raise _Differs(f"{rows.shape[1]} of {theirs.shape[1]} tokens are kept")
    _expect_close("features", ours, theirs.gather(1, rows[..., None].expand(-1, -1, theirs.shape[-1])))


def _expect_close(what: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise _Differs(f"{what} of shape {list(found.shape)}, where stock code gives {list(expected.shape)}")
    error, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not error <= _CLOSE * largest:
        raise _Differs(f"{what} that are off by {error:.2g}, where stock code's reach {largest:.2g}")


def _expect_equal(what: str, found: list[list[int]], expected: list[list[int]]) -> None:
    if found != expected:
        raise _Differs(f"{what} {found}, where stock code gives {expected}")


# ------------------------------------------------------------------------------------- stock code on pruned embeddings


@dataclass
class _Row:
    """A prompt as the language model is to see it, without padding and dropped tokens."""

    embeds: Tensor  # [K, C]
    positions: Tensor  # [1, K], or [3 or 4, K] where they tell places in images
    visual: Tensor  # [K] bool
    deepstack: list[Tensor]  # of each level, for the visual ones


def _prefill(model: StockModule, host: StockModule, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Logits, what goes into the first layer of the language model, and the arguments of that."""
    seen: dict[str, Any] = {}
    hooks = (
        host.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
        ),
        host.language_model.layers[0].register_forward_pre_hook(lambda module, args: seen.update(embeds=args[0])),
    )
    logits = model(**inputs, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, seen.pop("embeds"), seen


def _decoding_step(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Logits [B, 1, V] of one token behind the prompts, in a loop that the caller writes."""
    cache = model(**inputs, use_cache=True)[CACHE]
    token = torch.full_like(inputs["input_ids"][:, :1], _TOKEN)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], dim=1)
    return model(input_ids=token, attention_mask=mask, **{CACHE: cache}).logits


def _rows(
    patch: Patch, inputs: dict[str, Tensor], pruned: Tensor, embeds: Tensor, arguments: dict[str, Any]
) -> list[_Row]:
    """The prompts' rows [K] of stock embeddings [B, L, C] that the patched model kept in its own [B, L', C]."""
    config, mask = patch.host.config, inputs["attention_mask"].bool()
    visual_ids = torch.tensor([getattr(config, name, -1) for name in ("image_token_id", "video_token_id")])
    places = torch.isin(inputs["input_ids"], visual_ids)
    columns = [_kept_columns(*row) for row in zip(pruned, embeds, mask)]
    for kept, text in zip(columns, mask & ~places):
        if not torch.isin(text.nonzero()[:, 0], kept).all():
            raise _Differs("a prompt that lacks tokens of its text")
    count = sum(int(row[kept].sum()) for row, kept in zip(places, columns))
    expected = sum(len(selection.indices) for selection in patch.last)
    if int(places.sum()) == sum(len(selection.roles) for selection in patch.last) and count != expected:  # no newlines
        raise _Differs(f"{count} visual tokens in the prompts, where {expected} were selected")
    if count == int(places.sum()):
        raise _Differs("prompts from which nothing is pruned")

    visual = arguments.get("visual_pos_masks")
    visual = torch.zeros_like(mask) if visual is None else visual
    deepstack = [
        torch.zeros_like(embeds).masked_scatter(visual[..., None], level)
        for level in arguments.get("deepstack_visual_embeds") or ()
    ]
    rows = []
    for i, kept in enumerate(columns):
        positions = torch.arange(len(kept))[None]
        if patch.family.multimodal_positions:
            places_in_images = arguments["position_ids"][-3:, i, kept]
            positions = torch.cat([positions, places_in_images])
        here = visual[i, kept]
        rows.append(_Row(embeds[i, kept], positions, here, [level[i, kept][here] for level in deepstack]))
    return rows


def _kept_columns(pruned: Tensor, embeds: Tensor, mask: Tensor) -> Tensor:
    """Which rows of embeddings [L, C], without padding, those of [L', C] behind its own padding are: ascending, [K]."""
    same = torch.cdist(pruned, embeds, compute_mode="donot_use_mm_for_euclid_dist") < _CLOSE * float(embeds.abs().max())
    columns: list[int] = []
    for row in same & mask:
        following = row.nonzero()[:, 0]
        following = following[following > (columns[-1] if columns else -1)]
        if len(following):
            columns.append(int(following[0]))
        elif columns:  # padding leads
            raise _Differs("features that stock code does not have")
    return torch.tensor(columns)


def _row_logits(stock: StockModule, row: _Row) -> Tensor:
    """[K, V]"""
    arguments: dict[str, Any] = {"inputs_embeds": row.embeds[None], "position_ids": row.positions[:, None]}
    if len(row.positions) == 1:
        arguments["position_ids"] = row.positions
    if row.deepstack and bool(row.visual.any()):
        arguments |= {"visual_pos_masks": row.visual[None], "deepstack_visual_embeds": row.deepstack}
    return stock.lm_head(stock.model.language_model(**arguments, use_cache=False).last_hidden_state)[0]


def _beam_search(stock: StockModule, row: _Row, forbidden: set[int], width: int) -> list[int]:
    """The new tokens of the best beam, each from forwards over the whole row; of one beam they are the greedy ones."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(_NEW_TOKENS):
        candidates = []
        for score, tokens in beams:
            scores = _row_logits(stock, _extended(stock, row, tokens))[-1].log_softmax(dim=-1)
            scores[sorted(forbidden)] = -torch.inf
            best = scores.topk(width)
            candidates += [(score + float(step), [*tokens, int(token)]) for step, token in zip(*best)]
        beams = sorted(candidates, reverse=True)[:width]
    return beams[0][1]


def _extended(stock: StockModule, row: _Row, tokens: list[int]) -> _Row:
    """The row with text behind it; its own last token is text, whose position is the furthest."""
    embeds = stock.get_input_embeddings()(torch.tensor(tokens, dtype=torch.long))
    return replace(
        row,
        embeds=torch.cat([row.embeds, embeds]),
        positions=torch.cat([row.positions, row.positions[:, -1:] + torch.arange(1, len(tokens) + 1)], dim=1),
        visual=torch.cat([row.visual, torch.zeros(len(tokens), dtype=torch.bool)]),
    )
