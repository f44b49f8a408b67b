"""Options of a server, ``--hf-overrides '{"hiprune": {...}}'``: the one channel that reaches every process of vLLM.

Nothing here imports vLLM.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..facts import ENCODERS, MODELS, EncoderFacts, encoder_type
from ..methods import METHODS, HiPrune, HiRED, Method, Needs, TokenLayout, options_of
from ..methods.base import checked_kept, checked_needs


@dataclasses.dataclass(frozen=True)
class Options:
    """What a server was started with.

    Attributes:
        method: the method of pruning.
        facts: what is known of the vision encoder.
        needs: what the method reads of it.
        per_request: whether requests may ask for a budget of their own.
    """

    method: Method
    facts: EncoderFacts
    needs: Needs
    per_request: bool = False

    @classmethod
    def of(cls, hf_config: Any) -> Options | None:
        """The options in a model's config, if there are any.

        Raises:
            RuntimeError: naming the option, what was expected and what came. (vLLM takes a ValueError of a processor
                for "no processor", and goes on without images.)
        """
        given = getattr(hf_config, "hiprune", None)
        if given is None:
            return None
        try:
            return _options(given, encoder_facts(hf_config))
        except (TypeError, ValueError) as error:
            raise RuntimeError(f"hiprune: {error}") from error

    def asked(self, request: Any) -> Asked:
        """What one request asks for: its own `mm_processor_kwargs["hiprune"]`, or None.

        Raises:
            ValueError: naming the option, what was expected and what came.
        """
        if request is None:
            return Asked(self.method.budget, self.method.retention)
        if not self.per_request:
            raise ValueError('hiprune: expected a server that was started with "per_request": true')
        if not isinstance(request, dict) or not request or not set(request) <= {"budget", "retention"}:
            raise ValueError(f"hiprune: expected a budget or a retention of a request, got {request!r}")
        asked = Asked(request.get("budget"), request.get("retention"))
        try:
            self.method_of(asked)
        except (TypeError, ValueError) as error:
            raise ValueError(f"hiprune: {error}") from error
        return asked

    def method_of(self, asked: Asked) -> Method:
        """The method with what a request asks for."""
        return dataclasses.replace(self.method, budget=asked.budget, retention=asked.retention)

    def kept(self, layout: TokenLayout, asked: Asked) -> int:
        """How many of an image's tokens stay."""
        return checked_kept(self.method_of(asked), layout)[0]


class Asked(NamedTuple):
    """What is wanted for an image: exactly one of the two.

    Example:
        >>> Asked.from_row(Asked(None, 0.1).to_row(64)) == (64, Asked(None, 0.1))
        True
    """

    budget: int | None
    retention: float | None

    def to_row(self, placeholders: int) -> list[int]:
        """As integers that no engine rounds: placeholders in the prompt, budget, and the bits of the retention."""
        bits = int(torch.tensor(float(self.retention or 0), dtype=torch.float64).view(torch.int64))
        return [placeholders, self.budget or 0, bits]

    @classmethod
    def from_row(cls, row: list[int]) -> tuple[int, Asked]:
        placeholders, budget, bits = row
        retention = float(torch.tensor(bits, dtype=torch.int64).view(torch.float64))
        return placeholders, cls(budget or None, retention or None)


def asked_of_images(rows: Tensor) -> dict[Asked, list[int]]:
    """Images [n, 3] that ask for the same, together: they are encoded in one pass."""
    groups: dict[Asked, list[int]] = {}
    for image, row in enumerate(rows.reshape(-1, 3).tolist()):
        groups.setdefault(Asked.from_row(row)[1], []).append(image)
    return groups


def one_tile(tokens: int) -> TokenLayout:
    """The layout of an image of which only the number of tokens matters."""
    return TokenLayout(((1, tokens),), (1,))


def encoder_facts(hf_config: Any) -> EncoderFacts:
    """What is known of the vision encoder in a model's config."""
    vision, text = hf_config.vision_config, hf_config.get_text_config()
    model = MODELS[hf_config.model_type]
    kind_of_tower = encoder_type(vision)
    if kind_of_tower not in ENCODERS:
        known = "clip_vision_model or a Qwen-VL's"
        raise ValueError(f"vision_config: expected {known}, got {kind_of_tower}")
    kind = ENCODERS[kind_of_tower]
    depth = vision.depth if kind.merges_rows else vision.num_hidden_layers
    return EncoderFacts(
        kind_of_tower,
        kind,
        depth=depth,
        feature_layer=depth if kind.merges_rows else _feature_layer(hf_config, depth),
        num_prefix_tokens=kind.num_prefix_tokens(vision),
        tiled=model.thumbnail is not None,
        places_tiles=model.places_tiles,
        decoder_layers=text.num_hidden_layers,
    )


def _feature_layer(hf_config: Any, depth: int) -> int:
    index, strategy = hf_config.vision_feature_layer, hf_config.vision_feature_select_strategy
    if not isinstance(index, int):
        raise ValueError(f"vision_feature_layer: expected one layer, got {index!r}")
    if strategy != "default":
        raise ValueError(f'vision_feature_select_strategy: expected "default", got {strategy!r}')
    return index if index >= 0 else depth + 1 + index


_READ_PROMPTS = ("hiprune++", "cdpruner", "trim", "fastv")


def _options(given: Any, facts: EncoderFacts) -> Options:
    if not isinstance(given, dict):
        raise TypeError(f'expected a dict such as {{"budget": 192}}, got {given!r}')
    rest = dict(given)
    name, per_request = rest.pop("method", "hiprune"), rest.pop("per_request", False)
    if not isinstance(name, str) or name not in METHODS:
        raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {name!r}")
    if type(per_request) is not bool:
        raise TypeError(f"per_request: expected true or false, got {per_request!r}")
    if name in _READ_PROMPTS:
        raise ValueError(f"method: expected one that reads images alone, got {name!r}, which reads the prompt")
    known = options_of(METHODS[name])
    for option in rest:
        if option not in known:
            raise ValueError(f"{option}: expected an option among {', '.join([*known, 'method', 'per_request'])}")
    method = METHODS[name](**rest)
    needs = checked_needs(method, facts)
    _refuse(name, method, needs, facts)
    return Options(method, facts, needs, per_request)


def _refuse(name: str, method: Method, needs: Needs, facts: EncoderFacts) -> None:
    """Raise ValueError for what cannot be done while a prompt is laid out and its images are encoded."""
    if needs.text or needs.text_attention is not None:
        raise ValueError(f"method: expected one that reads images alone, got {name!r}, which reads the prompt")
    if isinstance(method, HiPrune) and method.rule == "official" and facts.kind.official_rule == "official_qwen":
        raise ValueError('rule: expected "paper" or "grid", as "official" may keep fewer tokens, got "official"')
    if isinstance(method, HiRED) and method.rule == "official" and facts.tiled:
        raise ValueError('rule: expected "paper", as "official" may keep fewer tokens of tiles, got "official"')
    region = needs.region_features
    if region is not None and not (region == facts.feature_layer and facts.has_cls):
        raise ValueError(f"method: expected one without features of regions, got {name!r}")


def check_budget_of(asked: Asked, most: int) -> None:
    """Raise ValueError where a budget is above the tokens that any image has."""
    if asked.budget is not None and asked.budget > most:
        raise ValueError(f"hiprune: budget: expected 1 to {most}, the most tokens of an image, got {asked.budget}")


def grid_of(hf_config: Any) -> tuple[int, int]:
    """Height and width, in tokens, of what a CLIP tower takes."""
    side = hf_config.vision_config.image_size // hf_config.vision_config.patch_size
    return side, side
