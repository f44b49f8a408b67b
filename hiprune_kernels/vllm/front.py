"""What processors share: how many placeholders an image has, what is asked for it as a field, its place in the hash.

Counts follow from sizes alone: vLLM lays out, hashes and schedules a prompt before anything is encoded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.multimodal.hasher import MultiModalHasher
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import ImageEmbeddingItems
from vllm.multimodal.processing import PromptReplacement

from .options import Asked, Options, check_budget_of, one_tile

KEY = "hiprune"  # of the overrides, and of a request's mm_processor_kwargs
ASKED = "hiprune_asked"  # [3] int64 of each image, see `Asked.to_row`: travels with its pixels to the worker
# Under a name of its own: a worker with the stock class would return all rows, of which vLLM takes as many as there are
# placeholders, the top of the picture, and says nothing. Without pixels that it knows it returns none, and vLLM raises.
PIXELS = "hiprune_pixel_values"


class PruningInfo:
    """In front of a stock ProcessingInfo. It reads the options once: a server with wrong ones does not start."""

    options: Options

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)  # type: ignore[call-arg]
        options = Options.of(ctx.get_hf_config())
        assert options is not None
        self.options = options

    def kept_of(self, full: int, size: Any, asked: Asked) -> int:
        """Placeholders of an image with `full` of them where nothing is pruned; `size` has its height and width."""
        return self.options.kept(one_tile(full), asked)

    def most_tokens(self) -> int:
        """Placeholders of the largest image where nothing is pruned."""
        return self.get_max_image_tokens()  # type: ignore[attr-defined]

    def most_kept(self) -> int:
        """Placeholders of an image, at most, where no request asks for more."""
        return self.kept_of(self.most_tokens(), self.get_image_size_with_most_features(), self.options.asked(None))  # type: ignore[attr-defined]

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        # Zero for the others, not left out: stock classes look them up.
        limits: Mapping[str, int | None] = super().get_supported_mm_limits()  # type: ignore[misc]
        return {modality: limit if modality == "image" else 0 for modality, limit in limits.items()}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        if not mm_counts.get("image", 0):
            return {}
        return {"image": self.most_tokens() if self.options.per_request else self.most_kept()}


class PruningProcessor:
    """In front of a stock processor, whose `info` is a `PruningInfo`."""

    info: Any

    def __init__(self, info: Any, dummy_inputs: Any, **kwargs: Any) -> None:
        super().__init__(info, dummy_inputs, **kwargs)  # type: ignore[call-arg]
        try:
            check_budget_of(info.options.asked(None), info.most_tokens())
            info.most_kept()
        except ValueError as error:
            message = str(error)
            raise RuntimeError(message if message.startswith("hiprune") else f"hiprune: {message}") from error

    def full_tokens(self, images: Any, item: int, processed: Any) -> int:
        """Placeholders of an image where nothing is pruned."""
        size = images.get_image_size(item)
        return self.info.get_num_image_tokens(image_width=size.width, image_height=size.height)

    def _asked(self, hf_processor_mm_kwargs: Mapping[str, Any]) -> Asked:
        asked = self.info.options.asked(hf_processor_mm_kwargs.get(KEY))
        check_budget_of(asked, self.info.most_tokens())
        return asked

    def _get_mm_hashes(self, inputs: Any) -> Any:
        # The options of one server do not change, but stores that several servers share go by this hash.
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        options = self.info.options
        tag = json.dumps([repr(options.method), repr(self._asked(inputs.hf_processor_mm_kwargs))])
        algorithm = self.info.ctx.get_mm_config().mm_hasher_algorithm
        return {
            modality: [MultiModalHasher.hash_kwargs(algorithm, item=item, hiprune=tag) for item in items]
            if modality == "image"
            else items
            for modality, items in hashes.items()
        }

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        out = super()._apply_hf_processor_main(mm_items, _of_stock(hf_kwargs))  # type: ignore[misc]
        if "pixel_values" in out:
            images, asked = mm_items["image"], self._asked(hf_kwargs)
            rows = []
            for item in range(len(images)):
                full = self.full_tokens(images, item, out)
                rows.append(asked.to_row(self.info.kept_of(full, images.get_image_size(item), asked)))
            out[PIXELS] = out.pop("pixel_values")
            out[ASKED] = torch.tensor(rows, dtype=torch.int64)
        return out

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, _of_stock(hf_processor_mm_kwargs)))  # type: ignore[misc]
        if ASKED in hf_inputs:
            fields[PIXELS] = fields.pop("pixel_values")
            fields[ASKED] = MultiModalFieldConfig.batched("image", keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        asked = self._asked(hf_processor_mm_kwargs)

        def cut(full: Any, item: int) -> Any:
            tokens, images = full(item), mm_items["image"]
            if isinstance(images, ImageEmbeddingItems):  # features that a client hands over are all used
                return tokens
            return tokens[: self.info.kept_of(len(tokens), images.get_image_size(item), asked)]

        updates = super()._get_prompt_updates(mm_items, _of_stock(hf_processor_mm_kwargs), out_mm_kwargs)  # type: ignore[misc]
        return [
            PromptReplacement(
                modality=update.modality,
                target=update.target,
                replacement=lambda item, full=update.replacement: cut(full, item),
            )
            if update.modality == "image"
            else update
            for update in updates
        ]


def _of_stock(hf_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in hf_kwargs.items() if name != KEY}
