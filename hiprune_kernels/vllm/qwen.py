"""What the Qwen-VLs share in vLLM: packed images, and positions that tell places in the image (M-RoPE).

Positions of the kept tokens are known when they are encoded, in the worker. vLLM has one door for them: the embeddings
bring them along in channels of their own, and `recompute_mrope_positions` takes them off again. Runners open it where
the configuration says that something prunes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from vllm.multimodal import MULTIMODAL_REGISTRY

from .. import ops
from ..methods import TokenLayout
from .encoder import Pass, check_config, check_rows, over_all_heads
from .front import ASKED, PIXELS, PruningInfo, PruningProcessor
from .options import Asked, Options, asked_of_images

_DIGITS = 256  # the largest base whose digits bfloat16 holds exactly
CHANNELS = 6  # time, row and column, as two digits each
_TABLE = 4  # vLLM's tables of rotations hold so many times the positions that a model was trained for

_Stock: Any = object  # one of vLLM's classes stands behind, see `qwen2_vl.py`, `qwen2_5_vl.py` and `qwen3_vl.py`


class QwenProcessor(PruningProcessor, _Stock):
    def full_tokens(self, images: Any, item: int, processed: Any) -> int:
        return math.prod(self._grid(processed["image_grid_thw"][item]))

    def _grid(self, grid_thw: Tensor) -> tuple[int, int]:
        """Height and width of an image in tokens."""
        merge = self.info.get_hf_config().vision_config.spatial_merge_size
        _, height, width = grid_thw.tolist()
        return height // merge, width // merge

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        self._check_positions(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        return super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)

    def _check_positions(self, mm_items: Any, hf_kwargs: Any, out_mm_kwargs: Any) -> None:
        """Refuse a request whose positions could leave the table of rotations: an engine would die of it.

        Text goes on behind an image's longer side, however few of its tokens are kept.
        """
        asked, beyond = self._asked(hf_kwargs), 0
        for item, image in enumerate(out_mm_kwargs.get("image", ())):
            grid = self._grid(image["image_grid_thw"].data)
            kept = self.info.kept_of(math.prod(grid), mm_items["image"].get_image_size(item), asked)
            beyond += max(0, max(grid) - kept)
        model = self.info.ctx.model_config
        room = _TABLE * model.hf_text_config.max_position_embeddings - model.max_model_len
        if beyond > room:
            raise ValueError(
                f"hiprune: images: expected at most {room} positions more than tokens, got {beyond}; keep more tokens "
                "of each image, or lower the server's --max-model-len"
            )


def _yes() -> bool:  # a function of a module: configurations are pickled
    return True


def pruning_processor(info: Any, processor: Any, dummy_inputs: Any) -> Callable[[Any], Any]:
    """vLLM's decorator of model classes, `register_processor`, with pruning in front where there are options for it."""
    pruning_info: Any = type("Info", (PruningInfo, info), {})
    pruning: Any = type("Processor", (QwenProcessor, processor), {})

    def build_info(ctx: Any) -> Any:
        config = ctx.get_hf_config()
        if getattr(config, "hiprune", None) is None:
            return info(ctx)
        multimodal = ctx.get_mm_config()
        if multimodal.video_pruning_rate:
            raise RuntimeError("hiprune: video_pruning_rate: expected none, as images are pruned")
        if multimodal.mm_encoder_tp_mode == "data":
            raise RuntimeError(
                'hiprune: mm_encoder_tp_mode: expected "weights", as scores stay on their rank, got "data"'
            )
        check_layers(config)
        return pruning_info(ctx)

    def build_processor(made: Any, dummy: Any, **kwargs: Any) -> Any:
        return (pruning if isinstance(made, PruningInfo) else processor)(made, dummy, **kwargs)

    register: Callable[[Any], Any] = MULTIMODAL_REGISTRY.register_processor(
        build_processor, info=build_info, dummy_inputs=dummy_inputs
    )
    return register


def whole_layers(config: Any) -> Sequence[int]:
    """The encoder's layers, 1-based, that attend to the whole image, not within windows."""
    vision = config.vision_config
    if not hasattr(vision, "fullatt_block_indexes"):
        return range(1, vision.depth + 1)
    return [index + 1 for index in vision.fullatt_block_indexes]


def check_layers(config: Any) -> None:
    """Raise RuntimeError where scores are wanted of a layer that attends within windows only."""
    options = Options.of(config)
    assert options is not None
    whole = whole_layers(config)
    for layer in options.needs.scores:
        if layer not in whole:
            one_of = ", ".join(map(str, whole))
            raise RuntimeError(f"hiprune: object_layer: expected a layer without windows, one of {one_of}, got {layer}")


class PrunedQwen(_Stock):
    """In front of a stock model class.

    Attributes:
        merger_norm: where the merger's norm is, whose input is what the encoder gives.
    """

    merger_norm = "norm"

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        options = Options.of(vllm_config.model_config.hf_config)
        if options is not None:
            check_config(vllm_config)
            # Before anything is built: classes and runners ask at different times.
            object.__setattr__(vllm_config.model_config.multimodal_config, "is_multimodal_pruning_enabled", _yes)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.options, self.asked, self.cuts = options, None, None
        self.scores: dict[int, Tensor] = {}
        self.keys: Tensor | None = None
        self.states: Tensor | None = None
        if options is None:
            return
        needs, blocks = options.needs, self.visual.blocks
        for layer in whole_layers(self.config):
            attention, queries = blocks[layer - 1].attn, needs.scores.get(layer)
            attention.attn.forward = self._attention(layer, queries, attention, attention.attn.forward)
        if needs.keys:
            self._listen_to_keys(blocks[-1].attn)
        if needs.features == "encoder":
            # Of the merger's norm: vLLM's own `__call__` of classes that it can compile, as the merger, calls no hooks.
            self.visual.merger.get_submodule(self.merger_norm).register_forward_pre_hook(self._keep_states)

    asked: Tensor | None  # of the images that are being encoded
    cuts: Tensor | None  # where their rows start, while they are

    def _attention(self, layer: int, queries: str | None, attention: Any, stock_forward: Any) -> Any:
        # The last block's attention and output are wanted besides its scores; it is not worth while to fuse them there.
        # Where nothing is read, our kernel serves if it outruns SDPA.
        def forward(query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Tensor:
            q, k, v = query[0], key[0], value[0]
            if self.cuts is None or (queries is None and not ops.outruns_sdpa(q, k, v)):
                return stock_forward(query=query, key=key, value=value, **kwargs)
            scale = attention.attn.scale
            out, scores = ops.attention_with_scores_varlen(q, k, v, cu_seqlens_q=self.cuts, scale=scale)
            if queries is None:
                return out[None]
            if queries == "mean":
                lengths = self.cuts.diff()
                scores = scores / lengths.repeat_interleave(lengths, output_size=len(scores))
            self.scores[layer] = over_all_heads(scores, attention.tp_size)
            return out[None]

        return forward

    def _listen_to_keys(self, attention: Any) -> None:
        """Have `_keep_keys` called with keys that are not rotated yet."""

        def hook(module: Any, args: Any, output: Any) -> None:
            heads = output[0].unflatten(-1, (3, -1, attention.hidden_size_per_attention_head))
            self._keep_keys(heads[:, 0, 1], attention)

        attention.qkv.register_forward_hook(hook)

    def _keep_keys(self, key: Tensor, attention: Any) -> None:
        """Of this rank's heads, [N, H, D]."""
        if self.cuts is not None:
            self.keys = over_all_heads(key.mean(dim=1), attention.tp_size)

    def _keep_states(self, norm: Any, inputs: tuple[Tensor, ...]) -> None:
        if self.cuts is not None:
            self.states = inputs[0].flatten(0, -2)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        if self.options is None:
            return super().embed_multimodal(**kwargs)
        self.asked = kwargs.pop(ASKED, None)
        if PIXELS in kwargs:
            kwargs["pixel_values"] = kwargs.pop(PIXELS)
        try:
            return super().embed_multimodal(**kwargs)
        finally:
            self.asked = self.keys = self.states = None
            self.scores.clear()

    def _process_image_input(self, image_input: Any) -> Any:
        """Kept tokens of each image, [k, C + CHANNELS], with their places; of features that were handed over all."""
        if self.options is None:
            return super()._process_image_input(image_input)
        if self.asked is not None:
            rows = image_input["image_grid_thw"].prod(-1).to(torch.int32)
            self.cuts = torch.cat([rows.new_zeros(1), rows.cumsum(0, dtype=torch.int32)]).to(self.visual.device)
        try:
            embeddings = list(super()._process_image_input(image_input))
        finally:
            self.cuts = None
        merge = self.visual.spatial_merge_size
        grids = [(h // merge, w // merge) for _, h, w in image_input["image_grid_thw"].tolist()]
        kept = [torch.arange(len(rows), device=rows.device) for rows in embeddings]
        if self.asked is not None:
            for asked, images in asked_of_images(self.asked).items():
                self._prune(asked, images, grids, embeddings, kept)
            check_rows(embeddings, self.asked)
        return tuple(with_places(rows, own, width) for rows, own, (_, width) in zip(embeddings, kept, grids))

    def _process_video_input(self, video_input: Any) -> Any:
        if self.options is not None:
            raise RuntimeError("hiprune: expected images alone, got a video")
        return super()._process_video_input(video_input)

    def _postprocess_image_embeds_evs(self, image_embeds_split: Any, image_input: Any) -> Any:
        """Stock classes with pruning of videos would add places of their own here."""
        if self.options is None:
            return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)
        return image_embeds_split

    def _prune(self, asked: Asked, images: list[int], grids: list, embeddings: list, kept: list) -> None:
        """Leave kept tokens alone in the embeddings of some images, and say which these are."""
        assert self.options is not None
        needs = self.options.needs
        layout = TokenLayout(
            tuple(grids[i] for i in images), (1,) * len(images), unit_rows=self._unit_rows(images, grids)
        )
        own = Pass(self.options, self.options.method_of(asked), layout)
        if own.whole:
            return
        own.scores = {layer: layout.scores_of_tokens(scores) for layer, scores in self.scores.items()}
        if needs.keys:
            assert self.keys is not None
            own.keys = layout.keys_of_tokens(self.keys)
        # Beside what stands in the prompt, a row of Qwen3-VL has what its first decoder layers add (deepstack).
        rows = torch.cat([embeddings[i] for i in images])
        width = self.config.vision_config.out_hidden_size if hasattr(self, "deepstack_num_level") else rows.shape[1]
        prompt, beside = rows[:, :width], rows[:, width:]
        if needs.features == "encoder":
            assert self.states is not None
            own.features = layout.features_of_tokens(self.states)
        elif needs.features == "language":
            own.features = prompt
        indices = own.select(rows.device)
        rows = torch.cat([own.merged(prompt), beside], dim=1)[indices]
        assert own.picks is not None
        first, counts = 0, own.picks.host_counts()
        for image, part, tokens in zip(images, indices.split(counts), rows.split(counts)):
            kept[image], embeddings[image] = part - first, tokens
            first += math.prod(grids[image])

    def _unit_rows(self, images: Sequence[int], grids: list) -> Tensor:
        """The encoder's rows that make each token of some images: [T, merge * merge]."""
        parts, first, merge = [], 0, self.visual.spatial_merge_size
        for image, grid in enumerate(grids):
            if image in images:
                parts.append(first + self.places(*grid))
            first += math.prod(grid)
        rows = torch.cat(parts)[:, None] * merge**2
        return (rows + torch.arange(merge**2)).to(self.visual.device)

    def places(self, height: int, width: int) -> Tensor:
        """Where the encoder keeps each token of an image, [height * width]: the merge groups lie in raster order."""
        return torch.arange(height * width)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Positions before anything is encoded: those of the text are final, and go on behind an image's whole grid."""
        if self.options is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        spans, merge = [], self.config.vision_config.spatial_merge_size
        for feature in features:
            _, height, width = feature.data["image_grid_thw"].data.tolist()
            spans.append((feature.mm_position.offset, feature.mm_position.length, max(height, width) // merge))
        return text_positions(len(input_tokens), spans)

    def recompute_mrope_positions(
        self,
        input_ids: Any,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        if self.options is None:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)
        rows, places = without_places(multimodal_embeddings)
        image, start = self.config.image_token_id, self.config.vision_start_token_id
        positions = placed(ids, places, mrope_positions, num_computed_tokens, image, start)
        return rows, positions, int(mrope_positions[:, -1].max()) + 1 - len(ids)


def with_places(rows: Tensor, tokens: Tensor, width: int) -> Tensor:
    """Rows [k, C] with the places of their tokens, counted in raster order of a grid this wide: [k, C + CHANNELS].

    Example:
        >>> with_places(torch.zeros(1, 2), torch.tensor([5]), width=4)
        tensor([[0., 0., 0., 0., 0., 1., 0., 1.]])
    """
    place = torch.stack([torch.zeros_like(tokens), tokens // width, tokens % width], dim=1)  # [k, 3]
    digits = torch.stack([place // _DIGITS, place % _DIGITS], dim=2).flatten(1)
    return torch.cat([rows, digits.to(rows)], dim=1)


def without_places(embeddings: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Rows [k, C] of each image, and the places of all: [3, K]."""
    if not embeddings:
        return [], torch.zeros(3, 0, dtype=torch.int64)
    digits = torch.cat([rows[:, -CHANNELS:] for rows in embeddings]).long().view(-1, 3, 2)
    return [rows[:, :-CHANNELS] for rows in embeddings], (digits[..., 0] * _DIGITS + digits[..., 1]).T


def text_positions(length: int, spans: Sequence[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """Positions [3, length] of a prompt, where only those of text are final, and what to add to later tokens' places.

    Args:
        length: tokens of the prompt.
        spans: of each image: its first placeholder, how many it has, and the longer side of its grid.

    Example:
        >>> text_positions(5, [(1, 2, 9)])[0][0], text_positions(5, [(1, 2, 9)])[1]
        (tensor([ 0,  1,  9, 10, 11]), 7)
    """
    parts, at, position = [], 0, 0
    for offset, count, longer in spans:
        parts.append(torch.arange(position, position + offset - at))
        position += offset - at
        parts.append(torch.full((count,), position))
        position += longer
        parts[-1][-1] = position - 1  # where a prompt ends with an image, its last position tells how to go on
        at = offset + count
    parts.append(torch.arange(position, position + length - at))
    return torch.cat(parts).expand(3, -1).contiguous(), position - at


def placed(ids: Tensor, places: Tensor, positions: Tensor, computed: int, image_id: int, start_id: int) -> Tensor:
    """Positions [3, N] with those of images' tokens: what stands in front of the image, plus one, plus their place.

    Args:
        ids: [N] of the prompt.
        places: [3, K] of the first K placeholders that are not computed yet.
        positions: [3, N]
        computed: how many of the prompt's tokens are computed.
        image_id, start_id: ids of a placeholder, and of the token in front of an image.
    """
    positions = positions.clone()
    media = (ids == image_id).nonzero()[:, 0]
    starts = (ids == start_id).nonzero()[:, 0]
    rows = media[media >= computed][: places.shape[1]]
    if len(rows):
        positions[:, rows] = positions[:, starts[torch.searchsorted(starts, rows) - 1]] + 1 + places.to(positions)
    return positions
