"""A tiny model of each family with what stock code computes for it, and what a pruned one must compute."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from models import VLM_CASES
from stock_view import Shown, StockView, stock_view
from torch import Tensor

import hiprune_kernels as hk
from hiprune_kernels.patch import FAMILIES
from hiprune_kernels.patch.selfcheck import _NEW_TOKENS, _TOKEN, _beam_search, _extended, _prefill, _Row, _row_logits

CLOSE = 1e-4  # of the largest number
SHARE = 0.3


@dataclass
class FamilyCase:
    """A stock model, inputs for it, and what it makes of them."""

    name: str
    stock: torch.nn.Module
    inputs: dict

    def __post_init__(self) -> None:
        assert not hk.is_patched(self.stock)
        self.view = stock_view(self.stock, self.inputs)
        self.prefill = self.prefill_of(self.stock, self.inputs)

    def prefill_of(self, model, inputs: dict) -> tuple[Tensor, Tensor, dict]:
        """Logits, what goes into the first layer of the language model, and the arguments of that."""
        with torch.no_grad():
            return _prefill(model, self.host(model), inputs)

    @property
    def forbidden(self) -> set[int]:
        """Token ids that are not to be generated, as they would be taken for images."""
        return {getattr(self.stock.config, name, None) for name in ("image_token_id", "video_token_id")} - {None}

    def host(self, model):
        return FAMILIES[self.name].host(model)

    def with_inputs(self, **changes) -> FamilyCase:
        """The same model with others; None takes one away."""
        inputs = {name: value for name, value in {**self.inputs, **changes}.items() if value is not None}
        return FamilyCase(self.name, self.stock, inputs)

    def logits(self, model=None, **changes) -> Tensor:
        with torch.no_grad():
            return (self.stock if model is None else model)(**{**self.inputs, **changes}).logits

    def tokens(self, model=None, **options) -> list[list[int]]:
        """What `generate` adds to the prompts."""
        options = {"max_new_tokens": _NEW_TOKENS, "suppress_tokens": sorted(self.forbidden), **options}
        sequences = (self.stock if model is None else model).generate(**self.inputs, do_sample=False, **options)
        return sequences[:, self.inputs["input_ids"].shape[1] :].tolist()

    def keep_mask(self, kept: list[Tensor]) -> Tensor:
        """Which columns of the prompts stay, [B, L] bool, where these tokens, [T] bool of each run, are kept."""
        keep = self.inputs["attention_mask"].bool().clone()
        for run, tokens in zip(self.view.runs, kept, strict=True):
            keep[run.places] = torch.tensor([token < 0 or bool(tokens[token]) for token in run.placeholders])
        return keep

    def rows(self, kept: list[Tensor], embeds: Tensor | None = None) -> list[_Row]:
        """The prompts as the language model is to see them, of `embeds` instead of stock's own where given."""
        _, own, arguments = self.prefill
        embeds, keep = own if embeds is None else embeds, self.keep_mask(kept)
        visual = arguments.get("visual_pos_masks")
        visual = torch.zeros_like(keep) if visual is None else visual
        deepstack = [
            torch.zeros_like(embeds).masked_scatter(visual[..., None], level)
            for level in arguments.get("deepstack_visual_embeds") or ()
        ]
        rows = []
        for i, here in enumerate(keep):
            positions = torch.arange(int(here.sum()))[None]
            if FAMILIES[self.name].multimodal_positions:
                positions = torch.cat([positions, arguments["position_ids"][-3:, i, here]])
            seen = visual[i, here]
            rows.append(_Row(embeds[i, here], positions, seen, [level[i, here][seen] for level in deepstack]))
        return rows

    def assert_prefill(self, model, rows: list[_Row]) -> None:
        """Logits are those of stock code on these rows."""
        logits = self.logits(model)
        assert logits.shape[1] == max(len(row.embeds) for row in rows)
        with torch.no_grad():
            for found, row in zip(logits, rows, strict=True):
                assert_close(found[-len(row.embeds) :], _row_logits(self.stock, row), 1e-3)

    def assert_generates(self, model, rows: list[_Row], width: int = 1, **options) -> None:
        """Greedy tokens, or those of so many beams, are those of stock code on these rows."""
        with torch.no_grad():
            expected = [_beam_search(self.stock, row, self.forbidden, width=width) for row in rows]
        assert self.tokens(model, num_beams=width, **options) == expected


def family_case(name: str) -> FamilyCase:
    case = FamilyCase(name, *VLM_CASES[name]())
    case.logits(output_hidden_states=True)  # installs transformers' own hooks, once and for all
    return case


def copied(case: FamilyCase) -> FamilyCase:
    """The same with a model of its own, which may be changed."""
    return FamilyCase(case.name, copy.deepcopy(case.stock), case.inputs)


def right_padded(inputs: dict) -> dict:
    """The same prompts with their padding behind them."""
    shifts = inputs["attention_mask"].argmax(dim=1).tolist()
    moved = {}
    for name, value in inputs.items():
        if value.shape == inputs["input_ids"].shape:
            value = torch.stack([row.roll(-shift) for row, shift in zip(value, shifts)])
        moved[name] = value
    return moved


def kept_tokens(model, view: StockView) -> list[Tensor]:
    """Which tokens of each run were kept, [T] bool, by what the model tells of its last forward."""
    selections = iter(hk.last_selection(model))
    return [torch.cat([next(selections).roles > 0 for _ in run.tiles]) for run in view.runs]


def expected_of(case, method, view: StockView) -> list[list[tuple[Tensor, Tensor]]]:
    """Indices and roles of each image of each run, by a method's reference, from what stock code computes."""
    found = []
    for run in view.runs:
        scores = {layer: run.scores(layer, queries) for layer, queries in case.scores(facts_of(view)).items()}
        features = run.language() if case.features else None
        found.append([case.expected(method, run.tiles_of_image(i, scores, features)) for i in range(len(run.tiles))])
    return found


def facts_of(view: StockView):
    """What is known of the encoder, as a method is told."""
    from hiprune_kernels.facts import ENCODERS, EncoderFacts

    encoder = {"llava": "clip_vision_model", "llava_next": "clip_vision_model", "video_llava": "clip_vision_model"}
    encoder |= {"llava_onevision": "siglip_vision_model", "glm46v": "glm4v_vision"}
    model_type = encoder.get(view.model_type, f"{view.model_type}_vision")
    return EncoderFacts(
        model_type,
        ENCODERS[model_type],
        view.depth,
        view.feature_layer,
        view.runs[0].prefix,
        tiled=view.model_type in ("llava_next", "llava_onevision"),
        decoder_layers=3,
    )


def assert_close(found: Tensor, expected: Tensor, share: float = CLOSE) -> None:
    """Equal up to a share of the largest number; zeros, and rows in another order, are not."""
    found, expected = found.double(), expected.double()
    assert found.shape == expected.shape
    limit = share * float(expected.abs().max())
    assert float((found - expected).abs().max()) <= limit
    assert float(expected.abs().max()) > 0
    if len(expected) > 1:
        assert float((found - expected.roll(1, dims=0)).abs().max()) > limit


__all__ = [
    "CLOSE",
    "SHARE",
    "_TOKEN",
    "FamilyCase",
    "Shown",
    "_extended",
    "assert_close",
    "copied",
    "expected_of",
    "facts_of",
    "family_case",
    "kept_tokens",
    "right_padded",
]
