"""Qwen2-VL, images, in vLLM, whose own class has no door for positions of pruned images."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models import qwen2_vl as stock

from .qwen import PrunedQwen, pruning_processor


@pruning_processor(stock.Qwen2VLProcessingInfo, stock.Qwen2VLMultiModalProcessor, stock.Qwen2VLDummyInputsBuilder)
class Qwen2VL(PrunedQwen, stock.Qwen2VLForConditionalGeneration):
    merger_norm = "ln_q"

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # Of the instance: runners ask it, and without options the answer is the stock one.
        self.supports_multimodal_pruning = self.is_multimodal_pruning_enabled = self.options is not None

    def _listen_to_keys(self, attention: Any) -> None:
        # Of several ranks each has a piece of queries, keys and values that is no set of heads before this.
        stock_split = attention.split_qkv

        def split_qkv(qkv: Tensor) -> Any:
            query, key, value = stock_split(qkv)
            self._keep_keys(key[:, 0], attention)
            return query, key, value

        attention.split_qkv = split_qkv
