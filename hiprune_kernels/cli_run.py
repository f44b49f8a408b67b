"""`hiprune run IMAGE QUESTION`: a model's answer from a part of the image's tokens, beside the one from all of them."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .cli_common import DTYPES, add_method_options, checked_device, method_of, open_image, progress, watched
from .facts import MODELS
from .methods import Method

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from .loading import LoadedModel
    from .patch.edits import StockModule

_WARM_UP = 2  # tokens


def add_arguments(run: argparse.ArgumentParser) -> None:
    run.add_argument("image", metavar="IMAGE", help="an image file that pillow can read")
    run.add_argument("question", metavar="QUESTION", help="what to ask about it")
    run.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        required=True,
        help="local directory or hub id of a checkpoint of a type in `hiprune info --models` with a language model",
    )
    add_method_options(run, seed_help="of Random (default: 0)", amount_needed=True)
    run.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="of the answer (default: 128)")
    run.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="default: auto, the checkpoint's own")
    run.add_argument("--device", default="cpu", help="as PyTorch writes it, e.g. cuda:0 (default: cpu)")
    run.add_argument(
        "--compare", action="store_true", help="answer from all tokens first, and compare, after a run to warm up"
    )
    run.set_defaults(run=run_model)


def run_model(args: argparse.Namespace) -> None:
    method, image = method_of(args), open_image(args.image)
    if args.max_new_tokens < 1:
        raise ValueError(f"max-new-tokens: expected at least 1, got {args.max_new_tokens}")
    if not args.question.strip():
        raise ValueError("question: expected some text, got none")

    import torch

    from .loading import load_model
    from .patch import applied
    from .processing import prompt_inputs

    device = checked_device(args.device)
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    loaded = load_model(args.model, method, dtype=dtype, device=device, answers=True)
    model, processor = loaded.model, loaded.processor
    for remark in loaded.remarks:
        print(f"note: {remark}", file=sys.stderr)
    inputs = prompt_inputs(model, processor, image, args.question)

    answer = _Answerer(loaded, inputs, args.max_new_tokens)
    if not args.compare:
        with applied(model, watched(method)):
            pruned = answer()
        _print_table([("", None), (type(method).__name__, pruned)], answer)
        return
    with progress("warming up"):
        answer.warm_up()
        with applied(model, watched(method)):
            answer.warm_up()
    print(f"{answer.places} visual tokens, all of them:", flush=True)
    stock = answer()
    print(f"\n{_named(method, model.config.model_type)}:", flush=True)
    with applied(model, watched(method)):
        pruned = answer()
    _print_table([("all tokens", stock), (type(method).__name__, pruned)], answer)


def _named(method: Method, model_type: str) -> str:
    if method.budget is None:
        return f"{type(method).__name__}, retention {method.retention:.3g}"
    of_tiles = MODELS[model_type].budget_per == "tile"
    return f"{type(method).__name__}, budget {method.budget}{' of each tile' * of_tiles}"


# ----------------------------------------------------------------------------------------------------------- answering


@dataclass(frozen=True)
class Figures:
    """What one answer took."""

    visual_tokens: int  # of the prompt that the language model saw, newlines included
    prompt_tokens: int
    new_tokens: int
    first_token: float  # seconds from the prepared inputs, vision included
    tokens_per_second: float | None  # behind the first; None where there is one only


class _Answerer:
    """Generates greedily from the same inputs, again and again."""

    def __init__(self, loaded: LoadedModel, inputs: dict[str, Any], max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.inputs = loaded.model, loaded.processor.tokenizer, inputs
        self.max_new_tokens = max_new_tokens
        self.places = int((inputs["input_ids"] == self.model.config.image_token_id).sum())
        self.prompt = inputs["input_ids"].shape[1]

    def __call__(self) -> Figures:
        """Stream an answer to stdout."""
        with _SeenPrompt(self.model) as seen:
            clock = _streamer(self.tokenizer, seen)
            begun = time.perf_counter()
            self._generate(self.max_new_tokens, clock)
        first, last = clock.times[0], clock.times[-1]
        more = len(clock.times) - 1
        return Figures(
            visual_tokens=self.places - (self.prompt - clock.prompt),
            prompt_tokens=clock.prompt,
            new_tokens=len(clock.times),
            first_token=first - begun,
            tokens_per_second=more / (last - first) if more else None,
        )

    def warm_up(self) -> None:
        self._generate(min(_WARM_UP, self.max_new_tokens))

    def _generate(self, max_new_tokens: int, streamer: Any = None) -> None:
        import torch

        from .processing import quiet_transformers

        model: StockModule = self.model
        with torch.inference_mode(), quiet_transformers():
            model.generate(
                **self.inputs,
                max_new_tokens=max_new_tokens,
                streamer=streamer,
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
            )


class _SeenPrompt:
    """How many tokens the language model's layers saw last."""

    def __init__(self, model: PreTrainedModel) -> None:
        from .patch import FAMILIES

        family = FAMILIES[model.config.model_type]
        language_model: Any = family.language_model(family.host(model))
        self._layer = language_model.layers[0]

    def __enter__(self) -> _SeenPrompt:
        self._handle = self._layer.register_forward_pre_hook(self._see, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _see(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]


def _streamer(tokenizer: Any, seen: _SeenPrompt) -> Any:
    """transformers' own, which also notes when each token came, and the length of the prompt that the first came of."""
    from transformers import TextStreamer

    class Clock(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
            self.times: list[float] = []

        def put(self, value: torch.Tensor) -> None:
            if not self.next_tokens_are_prompt:
                self.times.append(time.perf_counter())
                if len(self.times) == 1:
                    self.prompt = seen.tokens
            super().put(value)

    return Clock()


# ------------------------------------------------------------------------------------------------------------- figures


def _print_table(columns: list[tuple[str, Figures | None]], answer: _Answerer) -> None:
    """Figures on stderr; beside all tokens' with ratios, else with the tokens before pruning."""
    (first, before), (second, after) = columns
    compared = before is not None
    first = first if compared else "all tokens"
    rows: list[tuple[str, ...]] = [("", first, second, "ratio")]
    old = {"visual_tokens": answer.places, "prompt_tokens": answer.prompt}
    labels = {
        "visual_tokens": ("visual tokens", "{}"),
        "prompt_tokens": ("prompt tokens", "{}"),
        "first_token": ("seconds to the first token", "{:.3f}"),
        "tokens_per_second": ("tokens a second behind it", "{:.1f}"),
        "new_tokens": ("tokens of the answer", "{}"),
    }
    for name, (label, form) in labels.items():
        values = [getattr(before, name) if compared else old.get(name), getattr(after, name)]
        shown = ["" if value is None else form.format(value) for value in values]
        ratio = "" if None in values or name == "new_tokens" else f"{values[1] / values[0]:.2f}"
        rows.append((label, *shown, ratio))
    widths = [max(map(len, column)) for column in zip(*rows)]
    print(file=sys.stderr)
    for label, *cells in rows:
        line = [label.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:]))]
        print("  ".join(line).rstrip(), file=sys.stderr)
