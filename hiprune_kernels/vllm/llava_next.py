"""LLaVA-NeXT with a CLIP tower, in vLLM: images cut into tiles, padding cut away, newlines that stay."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from vllm.model_executor.models import llava_next as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..methods import TokenLayout
from .clip import Tower
from .encoder import Pass, check_config, check_rows
from .front import ASKED, PIXELS, PruningInfo, PruningProcessor
from .llava import check_tower
from .options import Asked, Options, asked_of_images, grid_of

NEWLINE = -1  # in `TokenLayout.placeholders`


def layout_of(config: Any, sizes: list[list[int]]) -> TokenLayout:
    """The layout of images of these (height, width) in pixels; tokens of padding are no candidates."""
    grid, side = grid_of(config), config.vision_config.image_size
    tiles, tile_grids, placeholders, first = [], [], [], 0
    for size in sizes:
        rows, columns = get_anyres_image_grid_shape(tuple(size), config.image_grid_pinpoints, side)
        count = math.prod(grid)
        tokens = torch.arange(first, first + (1 + rows * columns) * count).view(-1, *grid)
        parts = tokens[1:].view(rows, columns, *grid).transpose(1, 2).reshape(1, rows * grid[0], columns * grid[1])
        shown = unpad_image(parts, tuple(size))[0]
        lines = torch.cat([shown, shown.new_full((len(shown), 1), NEWLINE)], dim=1)
        placeholders.append(torch.cat([tokens[0].flatten(), lines.flatten()]))
        tiles.append(len(tokens))
        tile_grids.append((rows, columns))
        first += tokens.numel()
    layout = TokenLayout(
        (grid,) * sum(tiles),
        tuple(tiles),
        placeholders=torch.cat(placeholders),
        thumbnail=0,
        tile_grids=tuple(tile_grids),
    )
    candidates = torch.zeros(first, dtype=torch.bool)
    candidates[layout.placeholders[layout.placeholders >= 0]] = True  # type: ignore[index, operator]
    return layout if bool(candidates.all()) else layout.with_candidates(candidates)


class Info(PruningInfo, stock.LlavaNextProcessingInfo):
    def kept_of(self, full: int, size: Any, asked: Asked) -> int:
        layout = layout_of(self.get_hf_config(), [[size.height, size.width]])
        assert layout.placeholders is not None
        newlines = int((layout.placeholders == NEWLINE).sum())
        return self.options.kept(layout, asked) + newlines if _prunes(self.options, layout, asked) else full

    def most_kept(self) -> int:
        asked = self.options.asked(None)
        pinpoints = [stock.ImageSize(width=w, height=h) for h, w in self.get_hf_config().image_grid_pinpoints]
        fulls = [self.get_num_image_tokens(image_width=size.width, image_height=size.height) for size in pinpoints]
        return max(self.kept_of(full, size, asked) for full, size in zip(fulls, pinpoints))


class Processor(PruningProcessor, stock.LlavaNextMultiModalProcessor):
    pass


def build_info(ctx: Any) -> Any:
    config = ctx.get_hf_config()
    if getattr(config, "hiprune", None) is None:
        return stock.LlavaNextProcessingInfo(ctx)
    check_tower(config)
    return Info(ctx)


def build_processor(info: Any, dummy_inputs: Any, **kwargs: Any) -> Any:
    return (Processor if isinstance(info, Info) else stock.LlavaNextMultiModalProcessor)(info, dummy_inputs, **kwargs)


def _prunes(options: Options, layout: TokenLayout, asked: Asked) -> bool:
    """Whether a token of an image is dropped."""
    candidates = sum(layout.candidate_counts or layout.sizes)
    return options.kept(layout, asked) < candidates


@MULTIMODAL_REGISTRY.register_processor(build_processor, info=build_info, dummy_inputs=stock.LlavaDummyInputsBuilder)
class LlavaNext(stock.LlavaNextForConditionalGeneration):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        options = self.options = Options.of(vllm_config.model_config.hf_config)
        if options is None:
            return
        check_tower(self.config)
        check_config(vllm_config)
        self.tower = Tower(self.vision_tower.vision_model.encoder.layers, options)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        asked: Tensor | None = kwargs.pop(ASKED, None)
        if self.options is None or asked is None:
            return super().embed_multimodal(**kwargs)
        inputs = self._parse_and_validate_image_input(pixel_values=kwargs[PIXELS], image_sizes=kwargs["image_sizes"])
        pixels, sizes = inputs["pixel_values"], inputs["image_sizes"].tolist()
        embeddings: dict[int, Tensor] = {}
        for own, images in asked_of_images(asked).items():
            for image in images:  # one by one: an image has up to five tiles or more, a batch by itself
                embeddings[image] = self._encoded(pixels[image], sizes[image], own)
        result = [embeddings[image] for image in range(len(embeddings))]
        check_rows(result, asked)
        return result

    def _encoded(self, pixels: Tensor, size: list[int], asked: Asked) -> Tensor:
        """What stays of an image with tiles [B, 3, H, W] of it, newlines included: [P, C]."""
        assert self.options is not None
        layout = layout_of(self.config, [size])
        assert layout.placeholders is not None
        pixels = pixels[: layout.tiles[0]]  # others would be padding of a batch

        def encode() -> Tensor:
            return self._image_pixels_to_features(self.vision_tower, pixels)

        places = layout.placeholders.to(pixels.device)
        if _prunes(self.options, layout, asked):
            own = Pass(self.options, self.options.method_of(asked), layout)
            rows = self.tower.run(encode, self.multi_modal_projector, own, sparse=False)
            assert own.picks is not None
            row_of = places.new_full((sum(layout.sizes),), -1)
            row_of[own.picks.indices] = torch.arange(len(rows), device=rows.device)
        else:
            rows = self.multi_modal_projector(encode()).flatten(0, 1)
            row_of = torch.arange(len(rows), device=rows.device)
        newline = places == NEWLINE
        row = torch.where(newline, len(rows), row_of[places.clamp(min=0)])
        return torch.cat([rows, self.image_newline[None].to(rows)])[row[row >= 0]]
