"""Section "llava": prefill, decode and memory of LLaVA-1.5-7B in bfloat16 with random weights, unpruned and pruned.

As the paper's efficiency table. Prefill: one forward over prompt and image, with the vision tower. Decode: what
`generate` takes per further token. Both include the time that Python needs to launch the work, as users see it.
"""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

import hiprune_kernels as hk
from hiprune_kernels.patch import FAMILIES

from .attention import relative_error
from .context import Case, Context, Row
from .models import llava_config, random_model
from .timing import compare, free_memory, peak_extra_bytes

TEXT_TOKENS = 48  # of a prompt beside the image's, about a question's


class _Llava:
    """The model, and prompts of one image each."""

    def __init__(self, context: Context) -> None:
        self.config = llava_config(context.quick)
        self.model = random_model(LlavaForConditionalGeneration, self.config, context.device)
        self.tokens = self.config.image_seq_length
        self.device = context.device

    def inputs(self, batch: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(2)
        text = torch.randint(3, 32000, (batch, TEXT_TOKENS), generator=generator)
        image = torch.full((batch, self.tokens), self.config.image_token_id)
        ids = torch.cat([text[:, :8], image, text[:, 8:]], dim=1).to(self.device)
        side = self.config.vision_config.image_size
        pixels = torch.randn(batch, 3, side, side, generator=generator).to(self.device, torch.bfloat16)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    def pruning(self, budget: int | None) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if budget is None else hk.hiprune(self.model, budget=budget)

    def prefill(self, inputs: dict[str, Tensor]) -> object:
        return self.model(**inputs, use_cache=True, logits_to_keep=1)

    def generate(self, inputs: dict[str, Tensor], new_tokens: int) -> Tensor:
        return self.model.generate(**inputs, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)

    def pruned_error(self, inputs: dict[str, Tensor], budget: int) -> float:
        """Of the pruned prefill's logits, against the stock language model fed with the kept rows of stock's features.

        Raises:
            RuntimeError: if the cache has another length than the pruned prompt.
        """
        with self.pruning(budget):
            found = self.prefill(inputs)
            kept = torch.stack([selection.indices for selection in hk.last_selection(self.model)])
        length = found.past_key_values.get_seq_length()
        if length != TEXT_TOKENS + budget or kept.shape[1] != budget:
            raise RuntimeError(f"pruned prefill: expected {TEXT_TOKENS + budget} tokens in the cache, got {length}")
        features = torch.stack(list(self.model.get_image_features(inputs["pixel_values"]).pooler_output))
        features = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
        embeds = self.model.get_input_embeddings()(inputs["input_ids"])
        prompt = torch.cat([embeds[:, :8], features, embeds[:, 8 + self.tokens :]], dim=1)
        expected = self.model.model.language_model(inputs_embeds=prompt, use_cache=False).last_hidden_state[:, -1:]
        return relative_error(found.logits, self.model.lm_head(expected).double())


def _measure(context: Context, llava: _Llava, batch: int, budget: int | None) -> list[Row]:
    with torch.inference_mode():
        inputs = llava.inputs(batch)
        row: Row = {"way": "unpruned" if budget is None else f"{budget} tokens"}
        row["prompt tokens"] = TEXT_TOKENS + (llava.tokens if budget is None else budget)
        if budget is not None:
            row["logit error"] = llava.pruned_error(inputs, budget)
            if not row["logit error"] < 0.1:  # bfloat16 through all layers
                raise RuntimeError(f"pruned prefill: the logits are off by {row['logit error']:.1e}")
        new_tokens = 4 if context.quick else 32
        with llava.pruning(budget):
            peak = peak_extra_bytes(lambda: llava.generate(inputs, new_tokens), context.device)
            samples = 3 if context.quick else 10  # as in the paper
            options = {"samples": samples, "graph_below": 0.0, "warm_up": 1}
            prefill = compare({"": [lambda: llava.prefill(inputs)]}, context.clock, **options)[""].launched
            lengths = {n: [lambda n=n: llava.generate(inputs, n)] for n in (1, 1 + new_tokens)}
            generated = compare(lengths, context.clock, **(options | {"samples": max(3, samples // 3)}))
        decode = (generated[1 + new_tokens].launched.median - generated[1].launched.median) / new_tokens
        row |= {"prefill ms": prefill.median * 1e3, "decode ms": decode * 1e3, "tokens/s": batch / decode}
        if peak is not None:
            weights = sum(p.numel() * p.element_size() for p in llava.model.parameters())
            row |= {"peak GiB": (peak + torch.cuda.memory_allocated()) / 2**30, "weights GiB": weights / 2**30}
            row["beyond weights MiB"] = peak / 2**20
        free_memory(context.device)
        return [row]


def _next(context: Context) -> list[Row]:
    if "llava_next" not in FAMILIES:
        return [{"way": "LLaVA-NeXT-7B", "failure": "hiprune_kernels.patch does not support llava_next yet"}]
    return [{"way": "LLaVA-NeXT-7B", "failure": "this suite has no measurement of it yet"}]


def cases(context: Context) -> list[Case]:
    model = functools.cache(lambda: _Llava(context))  # made at the first use, shared by all cases
    budgets = (None, 12, 6, 3) if context.quick else (None, 192, 128, 64)
    batches = (1, 2) if context.quick else (1, 8)
    found = [
        Case(
            f"LLaVA-1.5-7B B={batch}, {'unpruned' if budget is None else f'{budget} tokens'}",
            15.0,
            lambda batch=batch, budget=budget: _measure(context, model(), batch, budget),
        )
        for batch in batches
        for budget in budgets
    ]
    return [*found, Case("LLaVA-NeXT-7B", 0.1, lambda: _next(context))]
