"""What stock code makes of the images and texts of a batch of prompts: in float64, with eager attention, nothing pruned.

Where the tokens lie is worked out here from sizes alone, without what the package knows of layouts.
"""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field
from unittest import mock

import torch
from method_cases import Tile
from models import IMAGE_TOKEN, VIDEO_END, VIDEO_START, VIDEO_TOKEN
from torch import Tensor

from hiprune_kernels.patch import FAMILIES
from hiprune_kernels.patch.encoders import find_encoder

NEWLINE = -1


@dataclass
class Layer:
    """One layer of a vision encoder."""

    maps: list[Tensor] = field(default_factory=list)  # [B, H, M, N]; or [1, H, m, m] of one sequence after the other
    keys: Tensor | None = None  # [B, N, D] or [R, D], before any rotation, the mean over heads
    states: Tensor | None = None  # the output, [B, N, C] or [R, C]


@dataclass
class Shown:
    """The images, or the videos, of all prompts: one run of an encoder."""

    view: StockView
    layers: dict[int, Layer]
    prefix: int
    packed: bool
    tiles: list[int]  # how many each image has
    grids: list[tuple[int, ...]]  # of each tile, in tokens
    rows: list[Tensor]  # of each tile [n, G]: the encoder's rows behind the prefix that make a token
    placeholders: list[int]  # the token of each placeholder
    places: Tensor  # [B, L] bool
    pool: object = None

    @property
    def sizes(self) -> list[int]:
        return [int(torch.tensor(grid).prod()) for grid in self.grids]

    def _of_tokens(self, rows: Tensor) -> list[Tensor]:
        """What the encoder's rows have, [B, prefix + N, C] or [R, C], of each tile, [n, G, C]."""
        if self.packed:
            return [rows[own] for own in self.rows]
        return [tile[self.prefix :][own] for tile, own in zip(rows, self.rows)]

    def _means(self, rows: Tensor) -> Tensor:
        means = [part.mean(dim=1) for part in self._of_tokens(rows)]
        return torch.cat(means) if self.pool is None else self.pool(torch.stack(means))

    def scores(self, layer: int, queries: str) -> Tensor:
        """[T]"""
        maps = [weights.double().mean(dim=1) for weights in self.layers[layer].maps]  # heads
        reduce = {"all": lambda m: m.sum(dim=1), "mean": lambda m: m.mean(dim=1), "cls": lambda m: m[:, 0]}[queries]
        columns = [reduce(each) for each in maps]
        columns = torch.cat([each[0] for each in columns]) if self.packed else columns[0]
        return self._means(columns[..., None]).flatten()

    def keys(self, layer: int) -> Tensor:
        """[T, D]"""
        return self._means(self.layers[layer].keys)

    def features(self, layer: int) -> Tensor:
        """[T, G C], of the encoder."""
        tiles = [part.flatten(1) for part in self._of_tokens(self.layers[layer].states)]
        return torch.cat(tiles) if self.pool is None else self.pool(torch.stack(tiles))

    def regions(self, layer: int) -> Tensor:
        """[R, C]"""
        states = self.layers[layer].states
        if self.prefix:
            return states[:, 0]
        return torch.stack([part.flatten(0, 1).mean(dim=0) for part in self._all_rows(states)])

    def _all_rows(self, states: Tensor) -> list[Tensor]:
        """Of each tile that the encoder takes, whatever becomes of its rows."""
        return self._of_tokens(states) if self.packed else [tile[:, None] for tile in states]

    def language(self) -> Tensor:
        """[T, C]: what stands at the placeholders in the prompts; zero for tokens that have none."""
        rows = self.view.embeds[self.places]
        tokens = torch.tensor(self.placeholders)
        result = rows.new_zeros(sum(self.sizes), rows.shape[-1])
        result[tokens[tokens >= 0]] = rows[tokens >= 0]
        return result

    def images(self) -> list[tuple[slice, slice]]:
        """Of each image its tiles and its tokens."""
        found, tile, token = [], 0, 0
        for count in self.tiles:
            size = sum(self.sizes[tile : tile + count])
            found.append((slice(tile, tile + count), slice(token, token + size)))
            tile, token = tile + count, token + size
        return found

    def in_prompts(self) -> list[tuple[int, int]]:
        """Of each image its prompt and the column of its last placeholder."""
        where, found = self.places.nonzero().tolist(), []
        for _, tokens in self.images():
            own = [i for i, token in enumerate(self.placeholders) if tokens.start <= token < tokens.stop]
            found.append(tuple(where[own[-1]]))
        return found

    def text(self) -> list[Tensor]:
        """Of each image the text's embeddings of its prompt, [M, C]."""
        return [self.view.embeds[row][self.view.text[row]] for row, _ in self.in_prompts()]

    def text_scores(self, layer: int, reduction: str) -> Tensor:
        """[T]: the attention of the text behind each image to its tokens."""
        result = torch.zeros(sum(self.sizes), dtype=torch.float64)
        where = self.places.nonzero().tolist()
        for (row, column), (_, tokens) in zip(self.in_prompts(), self.images()):
            attention = self.view.maps[layer][row].double().mean(dim=0)  # [L, L]
            if reduction == "last":
                queries = attention[-1:]
            else:
                behind = torch.arange(len(attention)) > column
                queries = attention[behind & self.view.text[row]]
            if len(queries) == 0:
                continue
            values = queries.amax(dim=0) if reduction == "max" else queries.mean(dim=0)
            for (_, at), token in zip(where, self.placeholders):
                if tokens.start <= token < tokens.stop:
                    result[token] = values[at]
        return result

    def tiles_of_image(self, image: int, scores: dict[int, Tensor], features: Tensor | None) -> list[Tile]:
        """As the references of the methods take it; padding, which has no placeholder, is no candidate."""
        tiles, tokens = self.images()[image]
        found, first, reached = [], tokens.start, set(self.placeholders)
        for grid, size in zip(self.grids[tiles], self.sizes[tiles]):
            own = slice(first, first + size)
            candidates = [token - first for token in range(first, first + size) if token in reached]
            values = {layer: each[own] for layer, each in scores.items()}
            found.append(Tile(grid, candidates, values, None if features is None else features[own]))
            first += size
        return found


@dataclass
class StockView:
    """All of it."""

    model_type: str
    runs: list[Shown]
    feature_layer: int
    depth: int
    embeds: Tensor  # [B, L, C], float64, into the language model
    text: Tensor  # [B, L] bool
    maps: dict[int, Tensor]  # 1-based decoder layer -> [B, H, L, L]

    @property
    def has_cls(self) -> bool:
        return self.runs[0].prefix > 0


def stock_view(stock, inputs: dict) -> StockView:
    """Runs a copy of `stock` once, in float64."""
    model_type = stock.config.model_type
    model = copy.deepcopy(stock).double()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):  # grouped matrix products take no float64
        model.set_experts_implementation("eager")
    family = FAMILIES[model_type]
    host = family.host(model)
    seen, owners, runs = {}, {}, []

    def listen(encoder) -> None:
        encoder.register_forward_pre_hook(lambda module, args: runs.append((encoder, defaultdict(Layer))))
        for number, layer in enumerate(find_encoder(encoder)[2], 1):
            owners.update({id(module): number for module in layer.modules()})
            listen_to_layer(number, layer)

    def listen_to_layer(number: int, layer) -> None:
        (name, projection), heads = _key_projection(layer), _num_heads(layer)
        layer.register_forward_hook(lambda _, args, output: _keep_states(runs[-1][1][number], output))
        projection.register_forward_hook(lambda _, args, output: _keep_keys(runs[-1][1][number], output, name, heads))

    encoders = family.encoders(host)
    for encoder in encoders:
        listen(encoder)
    language_model, decoder_maps = family.language_model(host), {}
    decoders = {id(m): i for i, layer in enumerate(language_model.layers, 1) for m in layer.modules()}
    language_model.layers[0].register_forward_pre_hook(lambda module, args: seen.update(embeds=args[0]))

    def recording(eager):
        def attend(module, query, key, value, attention_mask, *args, **kwargs):
            # Of rows that may see nothing, padding's, eager attention in float64 would make NaN.
            mask = None if attention_mask is None else attention_mask.clamp(min=-1e9)
            output, weights = eager(module, query, key, value, mask, *args, **kwargs)
            assert bool(weights.isfinite().all())
            if id(module) in owners:
                runs[-1][1][owners[id(module)]].maps.append(weights)
            elif id(module) in decoders:
                decoder_maps[decoders[id(module)]] = weights
            return output, weights

        return attend

    with ExitStack() as stack, torch.no_grad():
        parts = [model, *model.modules()]
        for namespace in {type(part).__module__ for part in parts}:
            module = sys.modules[namespace]
            if hasattr(module, "eager_attention_forward"):
                stack.enter_context(
                    mock.patch.object(module, "eager_attention_forward", recording(module.eager_attention_forward))
                )
        as_double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        model(**as_double, use_cache=False)

    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    visual = (ids == IMAGE_TOKEN) | (ids == VIDEO_TOKEN)
    feature_layer, depth = family.feature_layer(host, {}), len(find_encoder(encoders[0])[2])
    view = StockView(model_type, [], feature_layer, depth, seen["embeds"], mask & ~visual, decoder_maps)
    given = [name for name in inputs if name.startswith("pixel_values")]
    kinds = sorted(name.endswith("videos") for name in given)
    for (encoder, layers), video in zip(runs, kinds, strict=True):
        view.runs.append(_shown(view, model, encoder, dict(layers), inputs, video))
    return view


def _keep_states(layer: Layer, output) -> None:
    layer.states = output[0] if isinstance(output, tuple) else output


def _keep_keys(layer: Layer, output: Tensor, name: str, heads: int) -> None:
    if name == "qkv":
        layer.keys = output.unflatten(-1, (3, heads, -1))[:, 1].mean(dim=1)
    else:
        layer.keys = output.unflatten(-1, (heads, -1)).mean(dim=-2)


def _key_projection(layer) -> tuple[str, torch.nn.Module]:
    """What makes the keys last, before they are rotated."""
    named = {name.rsplit(".")[-1]: module for name, module in layer.named_modules()}
    name = next(name for name in ("k_norm", "k_proj", "key", "qkv") if name in named)
    return name, named[name]


def _num_heads(layer) -> int:
    return next(m.num_heads for m in layer.modules() if hasattr(m, "num_heads"))


# ------------------------------------------------------------------------------------------------- where tokens lie


def _shown(view: StockView, model, encoder, layers: dict, inputs: dict, video: bool) -> Shown:
    ids, kind = inputs["input_ids"], model.config.model_type
    places, pool = ids == (VIDEO_TOKEN if video else IMAGE_TOKEN), None
    if kind.startswith("glm"):
        in_video = (ids == VIDEO_START).cumsum(dim=1) > (ids == VIDEO_END).cumsum(dim=1)
        places = (ids == IMAGE_TOKEN) & (in_video if video else ~in_video)
    prefix = 1 if kind in ("llava", "llava_next", "video_llava", "internvl") else 0
    packed = kind.startswith(("qwen", "glm"))
    if packed:
        tiles, grids, rows = _packed(inputs["video_grid_thw" if video else "image_grid_thw"].tolist(), kind, video)
        placeholders = list(range(sum(map(len, rows))))
    else:
        count = len(layers[1].states)
        own = layers[1].states.shape[1] - prefix
        side = round(own**0.5)
        rows, grids, tiles = [torch.arange(own)[:, None]] * count, [(side, side)] * count, [1] * count
        if kind == "internvl":  # squares of 2 by 2 patches
            square = torch.arange(own).view(side // 2, 2, side // 2, 2).transpose(1, 2).reshape(-1, 4)
            rows, grids = [square] * count, [(side // 2, side // 2)] * count
        placeholders = list(range(sum(map(len, rows))))
        if kind == "video_llava" and video:
            frames = inputs["pixel_values_videos"].shape[1]
            tiles = [frames] * (count // frames)
            placeholders = [p for tile in range(count) for p in (NEWLINE, *range(tile * own, (tile + 1) * own))]
        elif kind == "llava_onevision" and video:
            frames, pooled = inputs["pixel_values_videos"].shape[1], -(-side // 2)
            tiles, grids = [frames] * (count // frames), [(pooled, pooled)] * count
            each = frames * pooled**2
            placeholders = [p for i in range(len(tiles)) for p in (*range(i * each, (i + 1) * each), NEWLINE)]

            def pool(parts):
                return model.model.apply_pooling(parts).flatten(0, 1)

        elif kind in ("llava_next", "llava_onevision"):
            tiles, placeholders = _tiled(model, inputs, count, own)
    return Shown(view, layers, prefix, packed, tiles, grids, rows, placeholders, places, pool)


def _tiled(model, inputs: dict, count: int, own: int) -> tuple[list[int], list[int]]:
    """Stock code packs the tiles; what it packs are numbers of tokens."""
    real = inputs["pixel_values"].flatten(2)
    sizes = inputs["image_sizes"].tolist()
    tiles = [_num_tiles(model, size) for size in sizes]
    if model.config.model_type == "llava_onevision":
        several = [n > 1 for n in inputs["batch_num_images"].tolist() for _ in range(n)]
        tiles = [1 if many else n for n, many in zip(tiles, several)]
    assert sum(tiles) == count and len(real) == len(sizes)
    numbers = torch.arange(count * own, dtype=torch.float64).view(count, own, 1).split(tiles)
    newline = torch.tensor([float(NEWLINE)], dtype=torch.float64)
    if model.config.model_type == "llava_next":
        packed, _ = model.model.pack_image_features(numbers, sizes, "default", image_newline=newline)
    else:
        packed, _ = model.model.pack_image_features(
            numbers, sizes, image_newline=newline, vision_aspect_ratio=model.config.vision_aspect_ratio
        )
    return tiles, torch.cat(list(packed)).flatten().long().tolist()


def _num_tiles(model, size: list[int]) -> int:
    """The view of the whole, and the tiles of the resolution that fits best."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size, model.config.image_grid_pinpoints)
    side = model.config.vision_config.image_size
    return 1 + (height // side) * (width // side)


def _packed(sizes: list[list[int]], kind: str, video: bool) -> tuple[list[int], list, list[Tensor]]:
    """Merge groups of 4 rows, which Qwen2.5-VL brings into the order of windows of 2 by 2 tokens."""
    tiles, grids, rows, first = [], [], [], 0
    for t, h, w in sizes:
        h, w = h // 2, w // 2
        groups = torch.arange(t * h * w)
        if kind == "qwen2_5_vl":
            order = sorted(
                range(t * h * w),
                key=lambda n: (n // (h * w), n % (h * w) // w // 2, n % w // 2, n % (h * w) // w, n % w),
            )
            groups[torch.tensor(order)] = torch.arange(t * h * w)
        own = first + groups[:, None] * 4 + torch.arange(4)
        first += 4 * t * h * w
        if kind.startswith("glm") and video:  # frame by frame
            tiles.append(t)
            grids += [(h, w)] * t
            rows += own.split(h * w)
        else:
            tiles.append(1)
            grids.append((h, w) if t == 1 else (t, h, w))
            rows.append(own)
    return tiles, grids, rows
