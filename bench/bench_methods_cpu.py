"""What each method costs on the CPU, one thread: the vision side of LLaVA-1.5-7B, 192 of 576 tokens, and none of them.

Encoder and projector have their real sizes (CLIP-L/14-336), and random weights. The language model has as many layers
and is as wide as Vicuna-7B, but thin inside, so that a run of its first layers, which PTP and FastV need for the text's
attention, takes no time: what the table says of them is without it. All methods have their turn in each round. Times
are of this process's processor, which others on the machine disturb less than the clock.

Before anything is timed, the rows that come to the language model are compared with those of the stock model.

python -m bench.bench_methods_cpu [--rounds N] [--write]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, LlamaConfig, LlavaConfig, LlavaModel

import hiprune_kernels as hk
from bench.bench_models_cpu import IMAGE_TOKEN, TOLERANCE, _images, _prompt, _thin_text
from hiprune_kernels.cli_compare import Times, timed_forward
from hiprune_kernels.environment import environment
from hiprune_kernels.loading import CLIP_L_14_336
from hiprune_kernels.methods import METHODS, Method, Needs

RESULTS = Path(__file__).parent / "results" / "methods_cpu.md"
BUDGET, TOKENS = 192, 576


class _Words:
    """In the place of both tokenizers: a prompt's 17 tokens of text come to 17 of CLIP's."""

    def decode(self, ids: Tensor, **options: Any) -> str:
        return "w" * len(ids)

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [49406, *[320] * len(text), 49407]}


def clip_text() -> hk.ClipText:
    """The text tower of CLIP-L/14-336, at its size; its vision tower has one layer, which nobody runs."""
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    vision = {**CLIP_L_14_336.to_dict(), "num_hidden_layers": 1}
    clip = CLIPModel(CLIPConfig(text_config={**text, "projection_dim": 768}, vision_config=vision, projection_dim=768))
    return hk.ClipText(clip=clip.eval().requires_grad_(False), clip_tokenizer=_Words(), tokenizer=_Words())


def methods() -> dict[str, Method]:
    made = {name: cls(budget=BUDGET) for name, cls in METHODS.items() if cls is not hk.TRIM}
    text = clip_text()
    made["trim"] = hk.TRIM(budget=BUDGET, text_encoder=text)
    made["cdpruner, text encoder"] = hk.CDPruner(budget=BUDGET, text_encoder=text)
    made["ptp, alpha 0"] = hk.PTP(budget=BUDGET, alpha=0.0)
    return made


def llava() -> tuple[LlavaModel, dict[str, Any]]:
    text = LlamaConfig(**{**_thin_text(4096), "num_hidden_layers": 32})
    config = LlavaConfig(vision_config=CLIP_L_14_336, text_config=text, image_token_index=IMAGE_TOKEN)
    inputs = {**_prompt(TOKENS), "pixel_values": _images(336)}
    return LlavaModel(config).eval().requires_grad_(False), inputs


def rows_for_the_language_model(model: LlavaModel, inputs: dict[str, Any]) -> Tensor:
    """What the first decoder layer gets last, [L, C]; a run for the text's attention comes before."""
    seen: list[Tensor] = []
    layer = model.language_model.layers[0]
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    return seen[-1][0]


def check(name: str, method: Method, model: LlavaModel, inputs: dict[str, Any], stock: Tensor) -> None:
    """Raise RuntimeError unless the kept tokens come as the stock model has them, but for those that are merged."""
    with hk.applied(model, method):
        rows = rows_for_the_language_model(model, inputs)[1 : 1 + BUDGET]
        (selection,) = hk.last_selection(model)
    if len(selection.indices) != BUDGET:
        raise RuntimeError(f"{name}: expected {BUDGET} tokens, got {len(selection.indices)}")
    places = 1 + selection.indices
    if method.merged_roles:
        names = (None, *method.roles)
        same = [names[role] not in method.merged_roles for role in selection.roles[selection.indices].tolist()]
        expected = stock[places][torch.tensor(same)]
        rows = rows[torch.cdist(expected, rows).argmin(dim=1)]  # merged ones stand in between
    else:
        expected = stock[places]
    error = float((rows - expected).abs().max() / stock[1 : 1 + TOKENS].abs().max())
    if not error < TOLERANCE:
        raise RuntimeError(f"{name}: rows differ from the stock model's by {error:.1e} of the largest")


def needs_of(method: Method, model: LlavaModel) -> Needs:
    from hiprune_kernels.loading import encoder_of

    with hk.applied(model, method):
        return encoder_of(model).needs


@torch.inference_mode()
def measure(rounds: int) -> list[tuple[str, ...]]:
    """The table's rows: name, vision side and selection in milliseconds and as shares, decoder layers that are run."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = llava()
    stock, every = rows_for_the_language_model(model, inputs), methods()
    for name, method in every.items():
        check(name, method, model, inputs, stock)
    whole, times = Times(), {name: Times() for name in every}
    for _ in range(rounds):
        timed_forward(model, None, inputs, whole, clock=time.process_time)
        for name, method in every.items():
            timed_forward(model, method, inputs, times[name], clock=time.process_time)
    stock_ms = 1e3 * statistics.median(whole.vision)
    table = [("no method", f"{stock_ms:.0f}", "1.00", "", "", "")]
    for name, method in every.items():
        vision, selection = (1e3 * statistics.median(part) for part in (times[name].vision, times[name].selection))
        probed = needs_of(method, model).text_attention
        share = f"{100 * selection / stock_ms:.2f} %".replace("0.00 %", "< 0.01 %")
        layers = "" if probed is None else str(probed[0])
        table.append((name, f"{vision:.0f}", f"{vision / stock_ms:.2f}", f"{selection:.2f}", share, layers))
    return table


HEADER = ("method", "vision side, ms", "of no method's", "selection, ms", "of the vision side", "decoder layers run")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_methods_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: 7")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name} into bench/results")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {args.rounds}")
    rows = [HEADER, ("---",) * len(HEADER), *measure(args.rounds)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    print(*lines, sep="\n")
    if args.write:
        found = environment()
        head = (
            "Methods on the CPU: the vision side of LLaVA-1.5-7B (CLIP-L/14-336, 576 tokens, 192 kept, float32), one "
            "thread, "
            f"medians of {args.rounds} rounds of processor time, by `python -m bench.bench_methods_cpu --write`. "
            f"{found['devices'][0]}; torch {found['versions']['torch']}."
        )
        RESULTS.write_text("\n".join([head, "", *lines, ""]))
        print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
