"""Section "encoder": a whole CLIP-L/14-336 in bfloat16, as the released code runs it, stock, scored, and pruned."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import CLIPVisionModel

import hiprune_kernels as hk
from hiprune_kernels import reference
from hiprune_kernels.loading import queries_and_keys
from hiprune_kernels.patch.encoders import find_encoder

from .attention import relative_error
from .context import Case, Context, Row, extra_memory, seconds_row
from .models import clip_config, random_model
from .selection import RULE, released_chain

AGREE = 0.97  # share of the kept tokens that bfloat16 rounding may not change


class _Encoders:
    """The ways to encode `pixels`: functions of no argument, on models with the same weights."""

    def __init__(self, context: Context, stack: contextlib.ExitStack, batch: int) -> None:
        config = clip_config(context.quick)
        side = config.image_size // config.patch_size
        self.grid, self.budget = (side, side), max(1, side * side // 3)
        generator = torch.Generator(context.device).manual_seed(1)
        size = (batch, 3, config.image_size, config.image_size)
        self.pixels = torch.randn(size, device=context.device, generator=generator).bfloat16()
        self._sdpa = random_model(CLIPVisionModel, config, context.device)
        self._eager = copy.deepcopy(self._sdpa)
        self._eager.set_attn_implementation("eager")
        self._scored, self._pruned = copy.deepcopy(self._sdpa), copy.deepcopy(self._sdpa)
        family, _, layers = find_encoder(self._sdpa)
        self.deep_layer = len(layers)
        self.object_layer = max(1, round(family.kind.object_share * len(layers)))
        hk.apply_hiprune(self._pruned, budget=self.budget, rule=RULE)
        self._recorded = stack.enter_context(hk.record_scores(self._scored, [self.object_layer, self.deep_layer]))

    def released(self) -> tuple[Tensor, Tensor]:
        """Kept features and indices, with the attention matrices of every layer, as the released code has it."""
        encoded = self._eager(self.pixels, output_attentions=True)
        maps = (encoded.attentions[layer - 1] for layer in (self.object_layer, self.deep_layer))
        scores = (attention.mean(dim=1).mean(dim=1)[:, 1:] for attention in maps)  # [B, N]; the CLS column is dropped
        return released_chain(encoded.last_hidden_state[:, 1:], *scores, self.budget, self.grid)

    def eager(self) -> Tensor:
        return self._eager(self.pixels).last_hidden_state

    def sdpa(self) -> Tensor:
        return self._sdpa(self.pixels).last_hidden_state

    def scored(self) -> Tensor:
        output = self._scored(self.pixels).last_hidden_state
        for scores in self._recorded.values():
            del scores[:-1]  # a recording keeps every forward's scores
        return output

    def pruned(self) -> Tensor:
        return self._pruned(self.pixels).last_hidden_state

    def checked(self) -> dict[str, Row]:
        """Kept tokens against those of float64 scores from the same queries and keys, features against stock's.

        Raises:
            RuntimeError: if ours keeps other tokens than rounding explains, or other features for them.
        """
        some = slice(0, 2)
        states = queries_and_keys(self._sdpa, self.pixels[some], (self.object_layer, self.deep_layer))
        exact = [reference.attention_scores(q.double(), k.double()) / q.shape[2] for q, k in states.values()]
        if len(exact) == 1:
            exact *= 2
        expected, _ = reference.select_tokens(
            *exact, budget=self.budget, grid=self.grid, rule=RULE, num_prefix_tokens=1
        )
        stock, pruned = self.sdpa(), self.pruned()
        kept = torch.stack([selection.indices for selection in hk.last_selection(self._pruned)])
        rows = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)  # the CLS row stays
        error = relative_error(pruned, stock.double().gather(1, rows[..., None].expand(-1, -1, stock.shape[-1])))
        agreement = _agreement(kept[some], expected)
        if agreement < AGREE or not error < 0.05:
            raise RuntimeError(f"pruned encoder: {agreement:.3f} of the tokens agree, features differ by {error:.1e}")
        return {
            "released code": {"tokens kept as in float64": _agreement(self.released()[1][some], expected)},
            "scored and pruned": {"tokens kept as in float64": agreement, "output error": error},
            "scored": {"output error": relative_error(self.scored(), stock.double())},
        }


def _agreement(found: Tensor, expected: Tensor) -> float:
    """Share of the expected indices [B, K] that were found."""
    return sum(float(torch.isin(a, b).sum()) for a, b in zip(found, expected)) / expected.numel()


def _measure(context: Context, batch: int) -> list[Row]:
    with contextlib.ExitStack() as stack, torch.inference_mode():
        encoders = _Encoders(context, stack, batch)
        ways: dict[str, Callable[[], object]] = {
            "scored and pruned": encoders.pruned,
            "sdpa": encoders.sdpa,
            "scored": encoders.scored,
            "eager": encoders.eager,
            "released code": encoders.released,
        }
        rows = {name: {"way": name} for name in ways}
        for name, row in encoders.checked().items():
            rows[name] |= row
        for name, way in ways.items():
            rows[name] |= extra_memory(way, context)
        calls = {name: [way] for name, way in ways.items()}
        # One forward of the smallest batch is hundreds of launches: worth a graph even at several milliseconds.
        measured = context.compare(calls, rows, graph_below=1.0)
        for name, times in measured.items():
            rows[name] |= seconds_row(times, measured.get("scored and pruned"))
        return list(rows.values())


def cases(context: Context) -> list[Case]:
    batches = (1, 2) if context.quick else (1, 8, 64)
    return [Case(f"CLIP-L/14-336 B={b}", 5.0 + 0.35 * b, lambda b=b: _measure(context, b)) for b in batches]
