"""Plugin for vLLM: images are pruned where the server was started with options for it.

``vllm serve MODEL --hf-overrides '{"hiprune": {"budget": 192}}'``, and nothing else. Without these options the stock
classes do everything.

vLLM calls `register` by the entry point "vllm.general_plugins", in every process, and before it knows the model. So
nothing here imports one.
"""

from __future__ import annotations

import functools
from typing import Any

ARCHITECTURES = {  # vLLM's name -> the class that takes its place
    "LlavaForConditionalGeneration": "hiprune_kernels.vllm.llava:Llava",
    "LlavaNextForConditionalGeneration": "hiprune_kernels.vllm.llava_next:LlavaNext",
    "Qwen2VLForConditionalGeneration": "hiprune_kernels.vllm.qwen2_vl:Qwen2VL",
    "Qwen2_5_VLForConditionalGeneration": "hiprune_kernels.vllm.qwen2_5_vl:Qwen2_5_VL",
    "Qwen3VLForConditionalGeneration": "hiprune_kernels.vllm.qwen3_vl:Qwen3VL",
    "Qwen3VLMoeForConditionalGeneration": "hiprune_kernels.vllm.qwen3_vl:Qwen3VLMoe",
    "Qwen3_5ForConditionalGeneration": "hiprune_kernels.vllm.qwen3_vl:Qwen3_5",
    "Qwen3_5MoeForConditionalGeneration": "hiprune_kernels.vllm.qwen3_vl:Qwen3_5Moe",
}
RELEASES = ("0.32",)  # of vLLM, whose internals this was written for


def register() -> None:
    """Put our classes under the names of the stock ones. Called again, it does nothing.

    In a release of vLLM that we do not know nothing is replaced, and options for pruning are refused.
    """
    from vllm import ModelRegistry, __version__
    from vllm.platforms import current_platform

    if getattr(ModelRegistry.inspect_model_cls, "of_hiprune", False):
        return
    known = __version__.startswith(tuple(f"{release}." for release in RELEASES))
    if known:
        for name, path in ARCHITECTURES.items():
            ModelRegistry.register_model(name, path)
        if current_platform.is_cpu():
            _cpu_runner_asks_for_positions()
    _refuse_what_would_be_ignored(ModelRegistry, "" if known else __version__)


def _refuse_what_would_be_ignored(registry: Any, unknown_release: str) -> None:
    """Make vLLM's look-up of a model's class, which each start passes, raise where options would have no effect."""
    stock = registry.inspect_model_cls

    @functools.wraps(stock)
    def inspect_model_cls(architectures: Any, model_config: Any) -> Any:
        info, name = stock(architectures, model_config)
        if getattr(model_config.hf_config, "hiprune", None) is not None:
            if unknown_release:
                raise RuntimeError(f"hiprune: expected vLLM {' or '.join(RELEASES)}, got {unknown_release}")
            if name not in ARCHITECTURES:
                raise RuntimeError(f"hiprune: expected a model of {', '.join(ARCHITECTURES)}, got {name}")
        return info, name

    inspect_model_cls.of_hiprune = True  # type: ignore[attr-defined]
    registry.inspect_model_cls = inspect_model_cls


def _cpu_runner_asks_for_positions() -> None:
    """`CPUModelRunner.load_model` does not set the flag by which its parent takes positions from pruned embeddings."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    stock = CPUModelRunner.load_model

    @functools.wraps(stock)
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        self.is_multimodal_pruning_enabled |= getattr(self.get_model(), "is_multimodal_pruning_enabled", False)

    CPUModelRunner.load_model = load_model
