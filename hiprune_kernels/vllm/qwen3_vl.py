"""Qwen3-VL and Qwen3.5, with and without experts, images, in vLLM. Every layer attends to the whole image."""

from __future__ import annotations

from vllm.model_executor.models import qwen3_5, qwen3_vl, qwen3_vl_moe

from .qwen import PrunedQwen, pruning_processor

_PROCESSOR = qwen3_vl.Qwen3VLMultiModalProcessor, qwen3_vl.Qwen3VLDummyInputsBuilder


@pruning_processor(qwen3_vl.Qwen3VLProcessingInfo, *_PROCESSOR)
class Qwen3VL(PrunedQwen, qwen3_vl.Qwen3VLForConditionalGeneration):
    pass


@pruning_processor(qwen3_vl_moe.Qwen3VLMoeProcessingInfo, *_PROCESSOR)
class Qwen3VLMoe(PrunedQwen, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    pass


@pruning_processor(qwen3_5.Qwen3_5ProcessingInfo, *_PROCESSOR)
class Qwen3_5(PrunedQwen, qwen3_5.Qwen3_5ForConditionalGeneration):
    pass


@pruning_processor(qwen3_5.Qwen3_5MoeProcessingInfo, *_PROCESSOR)
class Qwen3_5Moe(PrunedQwen, qwen3_5.Qwen3_5MoeForConditionalGeneration):
    pass
