"""The vision side of the paper's models (its table 7) at their real sizes, stock and patched, on the CPU.

    python -m bench.bench_models_cpu                    # all of them, some minutes
    python -m bench.bench_models_cpu --only Qwen        # those whose name contains "Qwen"
    python -m bench.bench_models_cpu --write            # and write bench/results/models_cpu.{md,json}

Weights are random, float32, batch 1; times and sizes are real, the choice of tokens means nothing. A language model of
one thin layer stands in for the real one: what is timed ends where the language model begins. Of every model the
features of kept tokens are compared with the stock model's before a figure is shown.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    LlamaConfig,
    LlavaConfig,
    LlavaModel,
    LlavaNextConfig,
    LlavaNextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    VJEPA2Config,
    VJEPA2Model,
)

import hiprune_kernels as hk
from bench.gpu_suite.conductor import commit_of
from hiprune_kernels.environment import environment
from hiprune_kernels.loading import CLIP_L_14_336
from hiprune_kernels.patch import FAMILIES
from hiprune_kernels.patch.encoders import find_encoder

RESULTS = Path(__file__).parent / "results" / "models_cpu"
SECONDS = 15.0  # spent on each model's rounds; a round that began is finished
MAX_ROUNDS = 9
TOLERANCE = 1e-3  # of the largest feature: float32 rounding through some thirty layers stays far below
IMAGE_TOKEN = 9

Loaded = tuple[nn.Module, dict[str, Any]]  # a stock model, and the arguments of its forward


# ---------------------------------------------------------------------------------------------------------- the models


def _thin_text(width: int) -> dict[str, Any]:
    """A language model of the real width, for the sake of the projector, that takes no time."""
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "num_hidden_layers": 1, "intermediate_size": 16}
    return {"hidden_size": width, "head_dim": 16, "vocab_size": 16, "max_position_embeddings": 8192, **heads}


def _prompt(placeholders: int) -> dict[str, Any]:
    ids = torch.tensor([[1] + [IMAGE_TOKEN] * placeholders + [2] * 16])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}


def _images(side: int, count: int = 1) -> Tensor:
    return torch.randn(count, 3, side, side)


def _clip(config: CLIPVisionConfig) -> Loaded:
    return CLIPVisionModel(config), {"pixel_values": _images(config.image_size)}


def _clip_base() -> Loaded:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return _clip(CLIPVisionConfig(**sizes, image_size=224, patch_size=32))


def _siglip() -> Loaded:
    sizes = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    config = SiglipVisionConfig(**sizes, image_size=384, patch_size=14, vision_use_head=False)
    return SiglipVisionModel(config), {"pixel_values": _images(384)}


def _deit() -> Loaded:
    return DeiTModel(DeiTConfig(), add_pooling_layer=False), {
        "pixel_values": _images(224)
    }  # the defaults are its sizes


def _vjepa2() -> Loaded:
    """16 of the 64 frames: 2048 tokens."""
    clip = torch.randn(1, 16, 3, 256, 256)
    return VJEPA2Model(VJEPA2Config()), {"pixel_values_videos": clip, "skip_predictor": True}  # ViT-L is the default


def _llava(width: int) -> Loaded:
    text = LlamaConfig(**_thin_text(width))
    config = LlavaConfig(vision_config=CLIP_L_14_336, text_config=text, image_token_index=IMAGE_TOKEN)
    return LlavaModel(config), {**_prompt(576), "pixel_values": _images(336)}


def _llava_next() -> Loaded:
    """A square image of 672 pixels: a base tile and 2 x 2 tiles, whose 48 rows end in a newline each."""
    text = LlamaConfig(**_thin_text(4096))
    config = LlavaNextConfig(vision_config=CLIP_L_14_336, text_config=text, image_token_index=IMAGE_TOKEN)
    tiles = {"pixel_values": _images(336, count=5)[None], "image_sizes": torch.tensor([[672, 672]])}
    return LlavaNextModel(config), {**_prompt(5 * 576 + 48), **tiles}


def _qwen(width: int) -> Loaded:
    """An image of 896 pixels a side: 64 x 64 patches, 32 x 32 tokens."""
    vision = {"hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": width}  # the depth is the default, 32
    heads = {"num_attention_heads": width // 128, "head_dim": 128}
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text = {**_thin_text(width), **heads, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2}
    config = Qwen2_5_VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN, video_token_id=8, vision_start_token_id=1
    )
    prompt = _prompt(1024)
    kinds = (prompt["input_ids"] == IMAGE_TOKEN).int()
    patches = {"pixel_values": torch.randn(64 * 64, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 64, 64]])}
    return Qwen2_5_VLModel(config), {**prompt, **patches, "mm_token_type_ids": kinds}


@dataclass(frozen=True)
class Case:
    """A model of the paper, how to build it, and what it keeps."""

    name: str
    build: Callable[[], Loaded]
    amount: dict[str, Any]  # budget or retention


CASES = (
    Case("CLIP-L/14-336", lambda: _clip(CLIP_L_14_336), {"budget": 192}),
    Case("CLIP-B/32-224", _clip_base, {"retention": 1 / 3}),
    Case("SigLIP so400m/14-384", _siglip, {"retention": 1 / 3}),
    Case("SigLIP2 so400m/14-384", _siglip, {"retention": 1 / 3}),  # the same architecture with other weights
    Case("DeiT-B/16-224", _deit, {"retention": 1 / 3}),
    Case("V-JEPA2 ViT-L/16-256, 16 frames", _vjepa2, {"retention": 1 / 3}),
    Case("LLaVA-1.5-7B", lambda: _llava(4096), {"budget": 192}),
    Case("LLaVA-1.5-13B", lambda: _llava(5120), {"budget": 192}),
    Case("LLaVA-NeXT-7B, 5 tiles", _llava_next, {"budget": 640}),
    Case("Qwen2.5-VL-3B, 1024 tokens", lambda: _qwen(2048), {"retention": 0.334}),
    Case("Qwen2.5-VL-7B, 1024 tokens", lambda: _qwen(3584), {"retention": 0.334}),
)


# ------------------------------------------------------------------------------------------------------- measurements


@dataclass
class Times:
    """Seconds of each round."""

    vision: list[float] = field(default_factory=list)  # encoder and connector
    last_layers: list[float] = field(default_factory=list)  # the feature layer and those behind it
    connector: list[float] = field(default_factory=list)


@dataclass
class Result:
    """A line of the table. Times are medians, in milliseconds."""

    name: str
    tokens: int
    kept: int
    rounds: int
    sdpa_ms: float
    patched_ms: float
    recorded_ms: float | None  # a bare encoder, stock, while the scores of two layers are recorded
    last_layers_ms: float  # the feature layer and those behind it, stock ...
    last_layers_patched_ms: float  # ... and with scores and selection, sparse
    connector_ms: float
    connector_patched_ms: float
    error: float  # largest difference of a kept feature from stock's, over the largest feature


class _Watch:
    """Watches one forward's vision side: how long it takes, and what comes out of it for the language model."""

    def __init__(self, model: nn.Module) -> None:
        family = FAMILIES[model.config.model_type]
        host = family.host(model)
        encoder = family.encoders(host)[0]
        _, _, layers = find_encoder(encoder)
        self.feature_layer = family.feature_layer(host, {})
        self.features: Tensor | None = None  # [.., C]: rows of kept tokens, or of all with zeros in between
        self._connector = family.connector(host)
        self.bare = self._connector is None
        self._began: dict[nn.Module, float] = {}
        self._spent: dict[nn.Module, float] = {}
        self._encoder, self._last_layers = encoder, layers[self.feature_layer - 1 :]
        self._ended = 0.0

    @contextlib.contextmanager
    def forward(self, times: Times) -> Iterator[None]:
        modules = [self._encoder, *self._last_layers, *([] if self.bare else [self._connector])]
        handles = [module.register_forward_pre_hook(self._start) for module in modules]
        handles += [module.register_forward_hook(self._stop) for module in modules]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        times.vision.append(self._ended - self._began[self._encoder])
        times.last_layers.append(sum(self._spent[layer] for layer in self._last_layers))
        times.connector.append(self._spent.get(self._connector, 0.0))

    def _start(self, module: nn.Module, args: tuple) -> None:
        self._began[module] = time.perf_counter()

    def _stop(self, module: nn.Module, args: tuple, output: Any) -> None:
        now = time.perf_counter()
        self._spent[module] = now - self._began[module]
        if module is self._encoder or module is self._connector:
            self._ended = now
        if module is self._connector or (module is self._encoder and self.bare):
            self.features = output if isinstance(output, Tensor) else output.last_hidden_state


def _kept_error(model: nn.Module, stock: Tensor, pruned: Tensor) -> float:
    """The largest difference of a kept token's features from stock's, over the largest feature.

    Raises:
        RuntimeError: if other rows than those of the selection are there, or differ by more than rounding.
    """
    kept = torch.cat([selection.indices for selection in hk.last_selection(model)])
    if pruned.shape == stock.shape:  # what follows expects all places: rows of dropped tokens are zeros
        stock, pruned = (x.flatten(0, -2) for x in (stock, pruned))
        rows = pruned.abs().amax(dim=-1).nonzero()[:, 0]
        expected = len(kept)
    else:  # a bare encoder: prefix rows, then kept ones
        stock, pruned = stock[0], pruned[0]
        prefix = len(stock) - len(hk.last_selection(model)[0].roles)
        rows = torch.cat([torch.arange(prefix), kept + prefix])
        expected = len(pruned)
    if len(rows) != expected:
        raise RuntimeError(f"expected features of {expected} rows, got {len(rows)}")
    pruned = pruned[rows] if len(pruned) == len(stock) else pruned
    error = float((pruned - stock[rows]).abs().max() / stock.abs().max())
    if not error < TOLERANCE:
        raise RuntimeError(f"the kept features differ from the stock model's by {error:.1e} of the largest")
    return error


@torch.inference_mode()
def measure(case: Case) -> Result:
    """Build a model, run it stock, recorded and patched in turns, compare, and take medians.

    Raises:
        RuntimeError: if the patched model's features of kept tokens are not the stock model's.
    """
    torch.manual_seed(0)
    model, inputs = case.build()
    model = model.eval().requires_grad_(False)
    watch = _Watch(model)
    ways = {"sdpa": Times(), "recorded": Times(), "patched": Times()}
    error, began = 0.0, time.perf_counter()
    while (rounds := len(ways["patched"].vision)) < MAX_ROUNDS and (
        rounds == 0 or time.perf_counter() - began < SECONDS
    ):
        with watch.forward(ways["sdpa"]):
            model(**inputs)
        stock = watch.features
        if watch.bare:
            layers = [watch.feature_layer // 2, watch.feature_layer]
            with hk.record_scores(model, layers=layers), watch.forward(ways["recorded"]):
                model(**inputs)
            if not torch.equal(watch.features, stock):
                raise RuntimeError("recording changed the features")
        with hk.hiprune(model, **case.amount):
            with watch.forward(ways["patched"]):
                model(**inputs)
            error = max(error, _kept_error(model, stock, watch.features))
            selections = hk.last_selection(model)

    def milliseconds(way: str, part: str) -> float:
        seconds = getattr(ways[way], part)
        return 1e3 * statistics.median(seconds[1:] if len(seconds) > 2 else seconds)  # the first round warms up

    return Result(
        name=case.name,
        tokens=sum(len(selection.roles) for selection in selections),
        kept=sum(len(selection.indices) for selection in selections),
        rounds=len(ways["patched"].vision),
        sdpa_ms=milliseconds("sdpa", "vision"),
        patched_ms=milliseconds("patched", "vision"),
        recorded_ms=milliseconds("recorded", "vision") if watch.bare else None,
        last_layers_ms=milliseconds("sdpa", "last_layers"),
        last_layers_patched_ms=milliseconds("patched", "last_layers"),
        connector_ms=milliseconds("sdpa", "connector"),
        connector_patched_ms=milliseconds("patched", "connector"),
        error=error,
    )


# ------------------------------------------------------------------------------------------------------------- report

HEADER = (
    "model | tokens | kept | rounds | SDPA ms | patched ms | patched / SDPA | recording two layers / SDPA "
    "| feature layer and behind, ms | connector, ms | saved there, of the whole | error"
)


def line(result: Result) -> str:
    """A row of the Markdown table."""
    before = result.last_layers_ms + result.connector_ms
    after = result.last_layers_patched_ms + result.connector_patched_ms
    recorded = "" if result.recorded_ms is None else f"{result.recorded_ms / result.sdpa_ms:.3f}"
    connector = f"{result.connector_ms:.0f} to {result.connector_patched_ms:.0f}" if result.connector_ms else ""
    cells = (
        result.name,
        str(result.tokens),
        str(result.kept),
        str(result.rounds),
        f"{result.sdpa_ms:.0f}",
        f"{result.patched_ms:.0f}",
        f"{result.patched_ms / result.sdpa_ms:.3f}",
        recorded,
        f"{result.last_layers_ms:.0f} to {result.last_layers_patched_ms:.0f}",
        connector,
        f"{(before - after) / result.sdpa_ms:.1%}",
        f"{result.error:.0e}",
    )
    return f"| {' | '.join(cells)} |"


def write(results: list[Result]) -> None:
    """The table and all figures under bench/results/."""
    found = environment()
    commit, date = commit_of(Path(__file__).parent.parent), time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    versions = ", ".join(f"{name} {found['versions'][name]}" for name in ("python", "torch", "transformers"))
    text = [
        "# The vision side of the paper's models at their real sizes, on a CPU",
        "",
        f"`python -m bench.bench_models_cpu --write`, {date}, commit {commit}",
        "",
        f"{found['devices'][0]}; {versions}",
        "",
        "Random weights, float32, batch 1; medians of rounds that run the stock model (SDPA), bare encoders also while",
        "scores of two layers are recorded, and the patched model in turn. Times end where the language model begins.",
        'Stock against patched are also given for the layers and the connector that compute kept tokens only; "saved',
        'there" is what that takes off the whole, scores and selection of the feature layer paid for. The rest of the',
        "difference is the object layer's attention, which runs in our kernel. Error: the largest difference of a kept",
        "token's features from the stock model's, over the largest feature.",
        "",
        f"| {HEADER} |",
        "|---|" + "---:|" * HEADER.count("|"),
        *map(line, results),
    ]
    RESULTS.with_suffix(".md").write_text("\n".join(text) + "\n")
    figures = {"date": date, "commit": commit, "environment": found, "results": [asdict(x) for x in results]}
    RESULTS.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"wrote {RESULTS}.md and .json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.bench_models_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="models whose name contains TEXT")
    parser.add_argument("--write", action="store_true", help="write bench/results/models_cpu.md and .json")
    args = parser.parse_args()
    cases = [case for case in CASES if args.only.lower() in case.name.lower()]
    if not cases:
        parser.error(f"--only: none of {', '.join(case.name for case in CASES)} contains {args.only!r}")
    if args.write and len(cases) < len(CASES):
        parser.error("--write: the table holds all models of one run, so it does not go with --only")
    print(f"| {HEADER} |", flush=True)
    results = []
    for case in cases:
        results.append(measure(case))
        gc.collect()  # one model in memory at a time
        print(line(results[-1]), flush=True)
    if args.write:
        write(results)


if __name__ == "__main__":
    main()
