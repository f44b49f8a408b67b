"""LLaVA-1.5 with a CLIP tower, in vLLM."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.model_executor.models import llava as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..methods import TokenLayout
from .clip import Tower
from .encoder import Pass, check_config, check_rows
from .front import ASKED, PIXELS, PruningInfo, PruningProcessor
from .options import Options, asked_of_images, grid_of


class Info(PruningInfo, stock.LlavaProcessingInfo):
    pass


class Processor(PruningProcessor, stock.LlavaMultiModalProcessor):
    pass


def build_info(ctx: Any) -> Any:
    config = ctx.get_hf_config()
    if getattr(config, "hiprune", None) is None:
        return stock._build_llava_or_pixtral_hf_info(ctx)
    check_tower(config)
    return Info(ctx)


def build_processor(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
    if isinstance(info, Info):
        return Processor(info, dummy_inputs, **kwargs)
    return stock._build_llava_or_pixtral_hf_processor(info, dummy_inputs, **kwargs)


def check_tower(config: Any) -> None:
    """Raise RuntimeError unless the vision tower is CLIP's: the same class serves others."""
    tower = config.vision_config.model_type
    if tower != "clip_vision_model":
        raise RuntimeError(f"hiprune: vision_config: expected a tower of type clip_vision_model, got {tower}")


@MULTIMODAL_REGISTRY.register_processor(build_processor, info=build_info, dummy_inputs=stock.LlavaDummyInputsBuilder)
class Llava(stock.LlavaForConditionalGeneration):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        options = self.options = Options.of(vllm_config.model_config.hf_config)
        if options is None:
            return
        check_tower(self.config)
        check_config(vllm_config)
        self.grid = grid_of(self.config)
        self.tower = Tower(self.vision_tower.vision_model.encoder.layers, options)
        # vLLM counts an encoder's work in placeholders: pruned images must not make its batches larger than stock.
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        self.images_at_once = max(1, tokens // (self.grid[0] * self.grid[1]))

    def embed_multimodal(self, **kwargs: Any) -> Any:
        asked: Tensor | None = kwargs.pop(ASKED, None)
        if self.options is None or asked is None:
            return super().embed_multimodal(**kwargs)
        pixels = self._parse_and_validate_image_input(pixel_values=kwargs[PIXELS])["pixel_values"]
        embeddings: dict[int, Tensor] = {}
        for own, images in asked_of_images(asked).items():
            method = self.options.method_of(own)
            for first in range(0, len(images), self.images_at_once):
                part = images[first : first + self.images_at_once]
                layout = TokenLayout((self.grid,) * len(part), (1,) * len(part))
                rows = self._encoded(pixels[part], Pass(self.options, method, layout))
                embeddings.update(zip(part, rows.chunk(len(part))))
        result = [embeddings[image] for image in range(len(embeddings))]
        check_rows(result, asked)
        return result

    def _encoded(self, pixels: Tensor, own: Pass) -> Tensor:
        """Kept tokens of images [B, 3, H, W] that keep as many each: [K, C]."""

        def encode() -> Tensor:
            return self._image_pixels_to_features(self.vision_tower, pixels)

        if own.whole:
            return self.multi_modal_projector(encode()).flatten(0, 1)
        return self.tower.run(encode, self.multi_modal_projector, own, sparse=True)
