"""Qwen2.5-VL, images, in vLLM: most layers attend within windows, and rows lie in the order of these."""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl as stock

from .qwen import PrunedQwen, pruning_processor


@pruning_processor(
    stock.Qwen2_5_VLProcessingInfo, stock.Qwen2_5_VLMultiModalProcessor, stock.Qwen2_5_VLDummyInputsBuilder
)
class Qwen2_5_VL(PrunedQwen, stock.Qwen2_5_VLForConditionalGeneration):
    merger_norm = "ln_q"

    def places(self, height: int, width: int) -> Tensor:
        merge = self.visual.spatial_merge_size
        order: Tensor = self.visual.get_rope_by_thw(1, height * merge, width * merge)[2]  # token of each place
        return order.argsort()
