"""What a method of pruning visual tokens is: one object that says what it reads, how many tokens stay, and which.

Nothing here or in the other files of this folder knows a model: tensors and sizes come in, indices go out. The patch of
a Hugging Face model (`hiprune_kernels.patch`) computes what a method needs and carries out what it picks.

What a method reads decides when it runs (`Stage`). How many tokens of an image stay follows from sizes alone
(`Method.kept`); which ones, from data (`Method.select`).
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..budget import resolve_budget, shares, tile_budgets
from ..facts import EncoderFacts

Grid = tuple[int, ...]  # (height, width), or (frames, height, width)

_QUERIES = ("all", "cls", "mean")
_FEATURES = ("none", "encoder", "language", "both")
_REDUCTIONS = ("max", "mean", "last")

ABSENT: Any = None  # default of fields that their readers have asked for, and need not test; for others they are None


class Stage(enum.Enum):
    """Where in a forward a method selects."""

    FEATURE_LAYER = "inside the feature layer, which computes the kept tokens only"
    ENCODER = "behind the feature layer, in front of the connector"
    LANGUAGE = "in front of the language model"


class Needs(NamedTuple):
    """What a method reads.

    Attributes:
        scores: 1-based encoder layer, at most the feature layer -> whose attention counts in the token's scores: "all"
            queries, summed; their "mean"; or the "cls" token's row alone. Heads are averaged, and so are the encoder's
            rows that make one token.
        keys: the feature layer's keys, before any rotation, averaged over heads.
        features: finished rows, of all tokens: of the "encoder", before the connector, or of the "language" model, as
            they stand in its prompt; "both", or "none".
        region_features: 1-based encoder layer, at most the feature layer, of whose output each tile's CLS row is
            wanted, or the mean of its rows where there is no CLS.
        text: the text of each image's prompt: its embeddings, and the ids of its tokens.
        text_attention: (1-based decoder layer, "max", "mean" or "last"): attention of the text behind an image to its
            tokens, averaged over heads and then reduced over the text's rows; "last" takes the prompt's last row. The
            language model's layers up to this one run on the whole prompt for that.
    """

    scores: Mapping[int, str] = MappingProxyType({})
    keys: bool = False
    features: str = "none"
    region_features: int | None = None
    text: bool = False
    text_attention: tuple[int, str] | None = None

    def stage(self, encoder: EncoderFacts) -> Stage:
        """When a method that needs this selects."""
        if self.features in ("language", "both") or self.text or self.text_attention is not None:
            return Stage.LANGUAGE
        whole_regions = self.region_features == encoder.feature_layer and not encoder.has_cls
        if self.keys or self.features == "encoder" or whole_regions:
            return Stage.ENCODER
        return Stage.FEATURE_LAYER


class TokenLayout(NamedTuple):
    """How the tokens of a forward's images lie: host data, from sizes alone.

    Tokens are those that the language model would see. They are counted through all images, tile by tile, each tile in
    raster order: T in all. An image that is not cut into tiles is one tile; a video's frames may be tiles.

    Attributes:
        grids: of each tile: (height, width), or (frames, height, width).
        tiles: how many tiles (or frames) each image (or video) has.
        unit_rows: [T, G] int64, the encoder's rows behind its prefix that make each token; [N, G] of each tile alike
            where the encoder takes tiles as a batch. None: row t is token t.
        placeholders: [P] int64 on the CPU, the token of each placeholder in the prompt; -1 for a newline, which stays.
            None: placeholder t is token t.
        pool: where tokens are mixtures of the encoder's rows: from what rows have, [R, C], to what tokens have, [T, C].
        candidates: [T] bool on the CPU; False for padding, which never reaches the prompt. None: all are.
        candidate_counts: how many candidates each tile has, where `candidates` is given.
        pictures: how many tiles each picture was cut into, where the model takes each tile for an image of its own.
        thumbnail: where pictures are cut into several tiles, which of them shows the whole: 0 the first, -1 the last.
        tile_grids: of each image, (rows, columns) in which its tiles but the thumbnail lie. None: not known.
        encoder_tiles: how many tiles of each image the encoder takes, where `pool` makes them fewer.
    """

    grids: tuple[Grid, ...]
    tiles: tuple[int, ...]
    unit_rows: Tensor | None = None
    placeholders: Tensor | None = None
    pool: Callable[[Tensor], Tensor] | None = None
    candidates: Tensor | None = None
    candidate_counts: tuple[int, ...] | None = None
    pictures: tuple[int, ...] | None = None
    thumbnail: int | None = None
    tile_grids: tuple[tuple[int, int], ...] | None = None
    encoder_tiles: tuple[int, ...] | None = None

    @property
    def sizes(self) -> list[int]:
        """Tokens of each tile."""
        return [math.prod(grid) for grid in self.grids]

    def images(self) -> Iterator[tuple[slice, slice]]:
        """Of each image: which of the tiles, and which of the T tokens, are its own."""
        sizes, tile, token = self.sizes, 0, 0
        for count in self.tiles:
            size = sum(sizes[tile : tile + count])
            yield slice(tile, tile + count), slice(token, token + size)
            tile, token = tile + count, token + size

    def tiles_beside_thumbnail(self, tiles: slice) -> list[int]:
        """The tiles of an image, `tiles`, but the one that shows the whole; none where there is none beside it."""
        places = list(range(tiles.start, tiles.stop))
        if self.thumbnail is None:
            return []
        del places[self.thumbnail % len(places)]
        return places

    def with_candidates(self, candidates: Tensor) -> TokenLayout:
        """This layout where only some tokens, [T] bool, are candidates."""
        counts = tuple(int(part.sum()) for part in candidates.split(self.sizes))
        return self._replace(candidates=candidates, candidate_counts=counts)

    def scores_of_tokens(self, scores: Tensor, num_prefix_tokens: int = 0) -> Tensor:
        """Scores of an encoder's rows, [B, prefix + N] or packed [R], as scores of tokens, [T]: means over their rows.

        Example:
            >>> layout = TokenLayout(grids=((1, 2),), tiles=(1,), unit_rows=torch.tensor([[0, 1], [2, 3]]))
            >>> layout.scores_of_tokens(torch.tensor([1.0, 2.0, 3.0, 5.0]))
            tensor([1.5000, 4.0000])
        """
        if scores.ndim == 2:
            scores = scores[:, num_prefix_tokens:]
        if self.unit_rows is not None:
            scores = scores[..., self.unit_rows.to(scores.device)].mean(dim=-1)
        return scores.flatten() if self.pool is None else self.pool(scores.reshape(-1, 1)).flatten()

    def rows_of_tokens(self, states: Tensor, num_prefix_tokens: int = 0) -> Tensor:
        """States of an encoder's rows, [B, prefix + N, C] or packed [R, C], token by token, [T, G, C]."""
        if states.ndim == 3:
            states = states[:, num_prefix_tokens:]
        if self.unit_rows is None:
            return states.reshape(-1, 1, states.shape[-1])
        return states[..., self.unit_rows.to(states.device), :].reshape(-1, self.unit_rows.shape[1], states.shape[-1])

    def features_of_tokens(self, states: Tensor, num_prefix_tokens: int = 0) -> Tensor:
        """Finished rows of an encoder as features of tokens, [T, G C]: the rows of one token stand side by side."""
        features = self.rows_of_tokens(states, num_prefix_tokens).flatten(1)
        return features if self.pool is None else self.pool(features)

    def keys_of_tokens(self, keys: Tensor, num_prefix_tokens: int = 0) -> Tensor:
        """Keys of an encoder's rows, averaged over heads, as keys of tokens, [T, D]: the means over their rows."""
        tokens = self.rows_of_tokens(keys, num_prefix_tokens).mean(dim=1)
        return tokens if self.pool is None else self.pool(tokens)


class Seen(NamedTuple):
    """What a method gets to see: what it asked for by `Needs`, on one device. What it did not ask for is None or empty.

    Attributes:
        layout: how the tokens lie.
        scores: layer -> [T] float32.
        keys: [T, D].
        features: [T, C]. Of the encoder, the rows that make one token stand side by side. Of the language model, what
            never reaches the prompt (padding) is zero; where both were asked for, these are its.
        encoder_features: [T, C], those of the encoder where both were asked for.
        regions: [R, C], a row for each tile that the encoder takes.
        text: of each image, [M, C]: the text of its prompt, in order, without padding and placeholders.
        text_scores: [T] float32.
        text_ids: of each image, [M] int64; None where a prompt came as embeddings.
        encoder: what is known of the encoder.
        device: where everything is, and where the picks belong.
    """

    layout: TokenLayout
    scores: Mapping[int, Tensor] = MappingProxyType({})
    keys: Tensor = ABSENT
    features: Tensor = ABSENT
    regions: Tensor = ABSENT
    text: Sequence[Tensor] = ABSENT
    text_scores: Tensor = ABSENT
    text_ids: Sequence[Tensor] | None = None
    encoder_features: Tensor | None = None
    encoder: EncoderFacts = ABSENT
    device: torch.device = torch.device("cpu")


class Picks(NamedTuple):
    """What a method picks.

    Attributes:
        indices: [K] int64, the kept tokens, counted in T, ascending. K is the sum of `Method.kept`. Where a tile cannot
            fill its share, -1 fills the end of it.
        roles: [T] uint8: 0 for a dropped token, else 1, 2, ... as in `Method.roles`.
        counts: how many of the indices are of each tile, fill included: host data, or where data decide also [R] int64
            on the device.
        fills: whether there may be a -1.
        notes: of each image what a reader of `last_selection` should know, such as that its prompt has no text.
    """

    indices: Tensor
    roles: Tensor
    counts: Sequence[int] | Tensor
    fills: bool = False
    notes: Sequence[str] = ()

    @property
    def even(self) -> bool:
        """Whether sizes alone tell that every tile keeps the same number of tokens, with no -1 among them."""
        return not self.fills and not isinstance(self.counts, Tensor) and len(set(self.counts)) == 1

    def host_counts(self) -> list[int]:
        """`counts` as host data. Where they are on a GPU this waits for it."""
        return self.counts.tolist() if isinstance(self.counts, Tensor) else list(self.counts)


class _SelectionFields(NamedTuple):
    indices: Tensor
    roles: Tensor
    grid: Grid | tuple[Grid, ...]


class Selection(_SelectionFields):
    """Which visual tokens of one image or video survived.

    Attributes:
        indices: [k] int64, ascending: the kept tokens, counted in raster order without prefix tokens, tile by tile.
        roles: [N] uint8: 0 dropped, else 1, 2, ... as in `role_names`; of HiPrune: 1 anchor, 2 buffer, 3 register.
        grid: (height, width) of the token grid; (tiles or frames, height, width) where there are several; a tuple of
            grids where those differ, as where a model brings the features of many tiles to a smaller common grid.
        role_names: the method's names for roles 1, 2, ...
        note: what the method says of this image, such as that its prompt had no text.
    """

    role_names: tuple[str, ...] = ()
    note: str = ""

    def __new__(
        cls,
        indices: Tensor,
        roles: Tensor,
        grid: Grid | tuple[Grid, ...],
        role_names: tuple[str, ...] = (),
        note: str = "",
    ) -> Selection:
        selection = super().__new__(cls, indices, roles, grid)
        selection.role_names, selection.note = role_names, note
        return selection


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method of pruning: options, and what to do with them. Subclass it, as a frozen dataclass with keyword options.

    A method of your own is applied like any other, `apply_method(model, Mine(budget=192))`; nothing is registered.

    Attributes:
        budget, retention: exactly one of them: visual tokens kept per image (or video), or the share of them.
        roles: names of the roles 1, 2, ... that `select` gives. Where nothing has to be dropped `select` is not called,
            and all tokens have the last one.
        whole_images: whether a budget is of the picture that was cut into tiles, also where a model takes tiles for
            images of their own (InternVL).
        original_positions: whether kept tokens and the text keep the position ids that they have among all tokens; else
            they move up, but for models whose positions tell places in images.
        merged_roles: names of the roles whose rows `merge` puts others in the place of.
        guaranteed: whether what this class's `select` returns is right by construction. What other classes return is
            checked, which waits for the device.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Brightest(Method):
        ...     def needs(self, encoder):
        ...         return Needs(scores={encoder.feature_layer: "all"})
        ...
        ...     def select(self, seen):
        ...         (scores,) = seen.scores.values()
        ...         return best_of_tiles(scores, seen.layout, self.tile_budgets(seen.layout))
        >>> Brightest(budget=2).select(Seen(TokenLayout(((2, 2),), (1,)), {24: torch.tensor([1.0, 3.0, 2.0, 0.0])}))[0]
        tensor([1, 2])
    """

    budget: int | None = None
    retention: float | None = None

    roles: ClassVar[tuple[str, ...]] = ("kept",)
    merged_roles: ClassVar[tuple[str, ...]] = ()
    whole_images: ClassVar[bool] = False
    original_positions: ClassVar[bool] = False
    guaranteed: ClassVar[bool] = False

    def __new__(cls, *args: Any, **options: Any) -> Method:
        known = [field.name for field in dataclasses.fields(cls) if field.init]
        unknown = [*map(repr, args), *(name for name in options if name not in known)]
        if unknown:
            raise TypeError(f"{cls.__name__}: expected options among {', '.join(known)}, by name, got {unknown[0]}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        resolve_budget(1, budget=self.budget, retention=self.retention)

    def needs(self, encoder: EncoderFacts) -> Needs:
        """What this method reads. Raises ValueError for an encoder that it cannot serve."""
        return Needs()

    def tile_budgets(self, layout: TokenLayout) -> list[int]:
        """Tokens of each tile: the image's budget in proportion to their tokens, at most their candidates, at least 1.

        Raises:
            ValueError: if the budget leaves a tile without a token.
        """
        sizes, budgets = layout.sizes, []
        for tiles, _ in layout.images():
            budgets += tile_budgets(sizes[tiles], budget=self.budget, retention=self.retention)
        if layout.candidate_counts is None:
            return budgets
        return [max(1, min(budget, count)) for budget, count in zip(budgets, layout.candidate_counts)]

    def kept(self, layout: TokenLayout) -> list[int]:
        """Tokens of each image, from sizes alone: serving engines lay out prompts by it before anything is encoded."""
        budgets = self.tile_budgets(layout)
        return [sum(budgets[tiles]) for tiles, _ in layout.images()]

    def select(self, seen: Seen) -> Picks:
        """Which tokens stay; as many of each image as `kept` says."""
        raise NotImplementedError(f"{type(self).__name__}: expected a method `select`, got none")

    def merge(self, features: Tensor, seen: Seen, picks: Picks) -> Tensor:
        """What stands in the place of the kept tokens: features [T, C] of all tokens in, [T, C] out.

        Rows of dropped tokens do not matter. The features are those that were asked for by `Needs.features`; where a
        model interpolates between encoder and prompt (`TokenLayout.pool`), they are the language model's.
        """
        return features


def options_of(method: type[Method]) -> dict[str, Any]:
    """A method's options and their defaults."""
    return {field.name: field.default for field in dataclasses.fields(method) if field.init}


def merges(method: Method) -> bool:
    """Whether a method changes the tokens that it keeps."""
    return type(method).merge is not Method.merge


# ------------------------------------------------------------------------------------------------------ ways to select


def cls_queries(encoder: EncoderFacts) -> str:
    """Whose attention stands for that of the CLS token: without one, the mean of all queries'."""
    return "cls" if encoder.has_cls else "mean"


def no_cls_note(encoder: EncoderFacts) -> str:
    """What `last_selection` says of an encoder without a CLS token."""
    return "" if encoder.has_cls else "no CLS token: the mean over all queries stands for its attention"


def check_encoder_layer(name: str, layer: int, encoder: EncoderFacts) -> None:
    """Raise ValueError unless the encoder's features come of this layer or of one behind it."""
    if not 1 <= layer <= encoder.feature_layer:
        raise ValueError(
            f"{name}: expected 1 to {encoder.feature_layer} (1-based, not behind the layer whose output are the "
            f"features), got {layer}"
        )


def check_decoder_layer(name: str, layer: int, encoder: EncoderFacts) -> None:
    """Raise ValueError unless the language model has attention scores in this layer, as far as that is known."""
    if encoder.attention_layers and layer not in encoder.attention_layers:
        one_of = ", ".join(map(str, encoder.attention_layers))
        raise ValueError(f"{name}: expected a decoder layer with softmax attention, one of {one_of}, got {layer}")


def image_budgets(method: Method, layout: TokenLayout) -> list[int]:
    """Tokens of each image, where its tiles are one set of candidates: `Method.kept` of methods that share by data."""
    counts = layout.candidate_counts or layout.sizes
    totals = (sum(counts[tiles]) for tiles, _ in layout.images())
    return [resolve_budget(total, budget=method.budget, retention=method.retention) for total in totals]


def areas_of_tiles(scores: Tensor, tile_grid: tuple[int, int]) -> Tensor:
    """The sum of a thumbnail's scores [h, w] over the area of each tile of (rows, columns): [rows * columns].

    Row i of h lies in tile row ``i * rows // h``.

    Example:
        >>> areas_of_tiles(torch.arange(4.0).view(2, 2), (1, 2))
        tensor([2., 4.])
    """
    rows, columns = (
        torch.arange(length, device=scores.device) * count // length for length, count in zip(scores.shape, tile_grid)
    )
    tiles = (rows[:, None] * tile_grid[1] + columns).flatten()
    return scores.new_zeros(math.prod(tile_grid)).index_add(0, tiles, scores.flatten())


def best_of_tiles(scores: Tensor, layout: TokenLayout, budgets: Sequence[int]) -> Picks:
    """In each tile the candidates with the highest scores, [T]; the lowest index wins ties. A budget may be 0.

    Example:
        >>> best_of_tiles(torch.tensor([1.0, 3.0, 3.0, 0.0]), TokenLayout(((2, 2),), (1,)), [1]).indices
        tensor([1])
    """
    mask = None if layout.candidates is None else layout.candidates.to(scores.device)
    empty = layout.candidate_counts is not None and min(layout.candidate_counts) == 0
    if 0 in budgets:  # the fused operator takes no such tiles
        alone, own = [1] * len(budgets), torch.tensor(list(budgets), device=scores.device)
        indices, roles = ops.select_top_segments(
            scores, own, sizes=layout.sizes, tiles=alone, totals=list(budgets), candidate_mask=mask
        )
        return Picks(indices, roles, budgets, fills=empty)
    indices, roles = ops.select_tokens_varlen(
        scores,
        scores,
        grids=list(layout.grids),
        budgets=list(budgets),
        keep_roles=("register",),
        candidate_mask=mask,
    )
    return Picks(indices, (roles > 0).to(torch.uint8), budgets, fills=empty)


def best_of_shares(scores: Tensor, layout: TokenLayout, kept: Sequence[int], budgets: Tensor) -> Picks:
    """`best_of_tiles` with budgets [R] that are data: nobody waits for the device.

    Args:
        scores: [T].
        layout: of T tokens in R tiles.
        kept: tokens of each image. Where its tiles' budgets are fewer, -1 fills the end.
        budgets: [R] int64 on the scores' device, each at most the tile's candidates.

    Example:
        >>> layout = TokenLayout(((1, 2), (1, 2)), (2,))
        >>> best_of_shares(torch.tensor([1.0, 3.0, 3.0, 0.0]), layout, [2], torch.tensor([2, 0])).indices
        tensor([0, 1])
    """
    mask = None if layout.candidates is None else layout.candidates.to(scores.device)
    indices, roles = ops.select_top_segments(
        scores, budgets, sizes=layout.sizes, tiles=layout.tiles, totals=kept, candidate_mask=mask
    )
    return Picks(indices, roles, kept if len(layout.tiles) == len(layout.grids) else budgets)


def shared_budgets(
    seen: Seen,
    kept: Sequence[int],
    thumbnails: Sequence[int],
    weights: Sequence[Tensor],
    share: Callable[..., Tensor] = ops.shares,
) -> Tensor:
    """Budgets of all tiles, [R] int64 on the device: of an image its thumbnail's, and the rest by the others' weights.

    Images without a thumbnail beside other tiles share their budget by sizes.

    Args:
        kept: tokens of each image.
        thumbnails: of which so many are of the thumbnail.
        weights: of each image with a thumbnail beside other tiles, those of the others.
        share: what shares out, `ops.shares` or a function of the same arguments.
    """
    sizes, caps = seen.layout.sizes, list(seen.layout.candidate_counts or seen.layout.sizes)
    budgets: list[int] = []
    others, rest = [], []
    for (tiles, _), total, thumbnail in zip(seen.layout.images(), kept, thumbnails):
        places = seen.layout.tiles_beside_thumbnail(tiles)
        if not places:
            budgets += shares(sizes[tiles], total, caps[tiles])
            continue
        budgets += [thumbnail] * (tiles.stop - tiles.start)
        others.append(places)
        rest.append(total - thumbnail)
    found = torch.tensor(budgets, device=seen.device)
    if not others:
        return found
    places = [place for own in others for place in own]
    own = share(torch.cat(list(weights)), rest, [caps[place] for place in places], tiles=list(map(len, others)))
    return found.index_copy(0, torch.tensor(places, device=seen.device), own)


def best_of_images(scores: Tensor, layout: TokenLayout, budgets: Sequence[int]) -> Picks:
    """In each image, whatever its tiles, the candidates with the highest scores, [T]; the lowest index wins ties."""
    whole = TokenLayout(
        tuple((1, tokens.stop - tokens.start) for _, tokens in layout.images()), (1,) * len(layout.tiles)
    )
    if layout.candidates is not None:
        whole = whole.with_candidates(layout.candidates)
    picks = best_of_tiles(scores, whole, budgets)
    if len(layout.tiles) == len(layout.grids):
        return picks
    return picks._replace(counts=_counts(picks.roles, layout))


def best_first(scores: Tensor) -> Tensor:
    """Places in descending order of their scores; the lowest of equals first, NaN behind everything."""
    scores = scores.masked_fill(scores.isnan(), -math.inf)
    return scores.sort(descending=True, stable=True).indices


def picks_of_tiles(
    chosen: Sequence[Tensor], budgets: Sequence[int], layout: TokenLayout, device: torch.device
) -> Picks:
    """Picks of each tile's tokens, ascending, all of one role; a tile that has fewer than its budget is filled up."""
    parts = []
    for own, budget in zip(chosen, budgets):
        parts += [own, own.new_full((budget - len(own),), -1)]
    roles = torch.zeros(sum(layout.sizes), dtype=torch.uint8, device=device)
    roles[torch.cat(list(chosen))] = 1
    return Picks(torch.cat(parts), roles, budgets, fills=any(map(len, parts[1::2])))


def tokens_of_tiles(seen: Seen) -> list[Tensor]:
    """The candidates of each tile, counted in T, ascending."""
    sizes, candidates = seen.layout.sizes, seen.layout.candidates
    tokens = torch.arange(sum(sizes)).split(sizes)
    if candidates is not None:
        tokens = [own[candidates[own]] for own in tokens]
    return [own.to(seen.device) for own in tokens]


def candidates_of_images(seen: Seen) -> list[Tensor]:
    """The candidates of each image, whatever its tiles, counted in T, ascending."""
    tiles = tokens_of_tiles(seen)
    return [torch.cat(tiles[own]) for own, _ in seen.layout.images()]


def picks_of(indices: Tensor, layout: TokenLayout, kept: Sequence[int] | None = None) -> Picks:
    """The picks of some tokens, [K], in any order, all of one role.

    Args:
        kept: how many of each image, if the caller knows.

    Example:
        >>> picks = picks_of(torch.tensor([5, 0]), TokenLayout(((2, 2), (2, 2)), (2,)))
        >>> picks.indices, picks.counts
        (tensor([0, 5]), tensor([1, 1]))
    """
    indices = indices.sort().values
    roles = torch.zeros(sum(layout.sizes), dtype=torch.uint8, device=indices.device)
    roles[indices] = 1
    one_tile_each = len(layout.tiles) == len(layout.grids)
    return Picks(indices, roles, _counts(roles, layout) if kept is None or not one_tile_each else kept)


def _counts(roles: Tensor, layout: TokenLayout) -> Tensor:
    """How many tokens each tile keeps, [R] int64, by roles [T]."""
    return torch.stack([(part > 0).sum() for part in roles.split(layout.sizes)])


# -------------------------------------------------------------------------------------- what third parties may do wrong


def checked_needs(method: Method, encoder: EncoderFacts) -> Needs:
    """What a method needs of this encoder, if that is to be had.

    Raises:
        TypeError, ValueError: naming the method, what was expected and what came.
    """
    needs, name = method.needs(encoder), type(method).__name__

    def refuse(what: str, expected: str, got: Any) -> None:
        raise ValueError(f"{name}: expected {what} {expected}, got {got!r}")

    if not isinstance(needs, Needs):
        raise TypeError(f"{name}: expected Needs from `needs`, got {type(needs).__name__}")
    scores: Any = needs.scores  # whatever a third party's code gives
    if not isinstance(scores, Mapping):
        got = type(scores).__name__
        raise TypeError(f"{name}: expected scores to be a mapping from layers to queries, got {got}")
    layers = f"of layers 1 to {encoder.feature_layer} (1-based, up to the layer whose output are the features)"
    for layer, queries in needs.scores.items():
        if type(layer) is not int or not 1 <= layer <= encoder.feature_layer:
            refuse("scores", layers, layer)
        if queries not in _QUERIES:
            refuse("scores", f"of one of {_QUERIES}", queries)
        if queries == "cls" and not encoder.has_cls:
            refuse("scores", f'of "all" or "mean", as {encoder.name} has no CLS token', queries)
    if needs.features not in _FEATURES:
        refuse("features", f"to be one of {_FEATURES}", needs.features)
    region = needs.region_features
    if region is not None and (type(region) is not int or not 1 <= region <= encoder.feature_layer):
        refuse("region_features", layers, region)
    if needs.stage(encoder) is Stage.LANGUAGE and not encoder.decoder_layers:
        wanted = "text" if needs.text or needs.text_attention else "features of the language model"
        raise ValueError(f"{name}: needs {wanted}, expected a model with a language model, got {encoder.name} alone")
    if needs.text_attention is not None:
        pair: Any = needs.text_attention
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            refuse("text_attention", "to be (decoder layer, reduction)", pair)
        layer, reduction = pair
        if type(layer) is not int or not 1 <= layer <= encoder.decoder_layers:
            refuse("text_attention", f"of decoder layers 1 to {encoder.decoder_layers}", layer)
        if encoder.attention_layers and layer not in encoder.attention_layers:
            one_of = list(encoder.attention_layers)
            refuse("text_attention", f"of a decoder layer with softmax attention, one of {one_of}", layer)
        if reduction not in _REDUCTIONS:
            refuse("text_attention", f"reduced by one of {_REDUCTIONS}", reduction)
    if merges(method) and needs.features == "none":
        refuse("features", 'to be "encoder" or "language", as it merges them', needs.features)
    return needs._replace(scores=dict(needs.scores))  # a copy of the model copies them, which a mapping proxy forbids


def checked_kept(method: Method, layout: TokenLayout) -> list[int]:
    """How many tokens of each image a method keeps.

    Raises:
        ValueError: naming the method, if these are not numbers of tokens that the images have.
    """
    kept, images = method.kept(layout), [tokens.stop - tokens.start for _, tokens in layout.images()]
    right = isinstance(kept, (list, tuple)) and len(kept) == len(images)
    if not right or not all(type(count) is int and 1 <= count <= size for count, size in zip(kept, images)):
        raise ValueError(
            f"{type(method).__name__}.kept: expected a list of {len(images)} ints, from 1 to the images' tokens "
            f"{images}, got {kept!r}"
        )
    return list(kept)


def checked_picks(
    method: Method, picks: Picks, layout: TokenLayout, kept: Sequence[int], device: torch.device
) -> Picks:
    """A method's picks, if they are right: as many of each image as were announced.

    Raises:
        TypeError, ValueError: naming the method, what was expected and what came.
    """
    name, sizes = f"{type(method).__name__}.select", layout.sizes
    if not isinstance(picks, Picks):
        raise TypeError(f"{name}: expected Picks, got {type(picks).__name__}")
    indices, roles, counts = picks[:3]
    for what, tensor, dtype in (("indices", indices, torch.int64), ("roles", roles, torch.uint8)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected {what} to be a tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype or tensor.ndim != 1:
            raise ValueError(f"{name}: expected {what} [n] of {dtype}, got {list(tensor.shape)} of {tensor.dtype}")
        if tensor.device != device:
            raise ValueError(f"{name}: expected {what} on {device}, got {what} on {tensor.device}")
    if len(roles) != sum(sizes):
        raise ValueError(f"{name}: expected roles of {sum(sizes)} tokens, got {len(roles)}")
    if isinstance(counts, Tensor):
        if counts.dtype != torch.int64 or tuple(counts.shape) != (len(sizes),) or counts.device != device:
            got = f"{list(counts.shape)} of {counts.dtype} on {counts.device}"
            raise ValueError(f"{name}: expected counts [{len(sizes)}] of {torch.int64} on {device}, got {got}")
        if _is_guaranteed(type(method)) and len(indices) == sum(kept):
            return picks
        counts = counts.tolist()
        picks = picks._replace(counts=counts)
    right = isinstance(counts, (list, tuple)) and len(counts) == len(sizes)
    if not right or not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError(f"{name}: expected counts of {len(sizes)} tiles, got {counts!r}")
    found = [sum(counts[tiles]) for tiles, _ in layout.images()]
    if found != list(kept) or len(indices) != sum(kept):
        raise ValueError(
            f"{name}: expected {list(kept)} tokens of each image, as `kept` says, got counts of {found} and "
            f"{len(indices)} indices"
        )
    return picks if _is_guaranteed(type(method)) else _checked_values(name, picks, len(method.roles), layout)


def _is_guaranteed(method: type[Method]) -> bool:
    """Whether the class that `select` comes from, and not one that it inherits from, gives its word."""
    return next(vars(cls).get("guaranteed", False) for cls in method.__mro__ if "select" in vars(cls))


def _checked_values(name: str, picks: Picks, num_roles: int, layout: TokenLayout) -> Picks:
    indices, roles = picks.indices.cpu(), picks.roles.cpu()
    first = 0
    for tile, (part, size) in enumerate(zip(indices.split(picks.host_counts()), layout.sizes)):
        here = part[part >= 0]
        for index in part[: len(here)][part[: len(here)] < 0].tolist():
            raise ValueError(f"{name}: expected fill at the end of tile {tile}'s indices, got {index} before others")
        for index in here[(here < first) | (here >= first + size)].tolist():
            raise ValueError(f"{name}: expected indices {first} to {first + size - 1} in tile {tile}, got {index}")
        for step in (here.diff() <= 0).nonzero()[:, 0].tolist():
            pair = f"{int(here[step])}, {int(here[step + 1])}"
            raise ValueError(f"{name}: expected ascending indices, each once, in tile {tile}, got {pair}")
        first += size
    chosen = indices[indices >= 0]
    if layout.candidates is not None:
        for token in chosen[~layout.candidates[chosen]].tolist():
            raise ValueError(
                f"{name}: expected no padding, got token {token}, which is none of the layout's candidates"
            )
    expected = torch.zeros(len(roles), dtype=torch.bool)
    expected[chosen] = True
    for token in ((roles > 0) != expected).nonzero()[:, 0].tolist():
        kept = "a kept" if expected[token] else "a dropped"
        raise ValueError(
            f"{name}: expected roles above 0 for the kept tokens alone, got {int(roles[token])} for {kept}"
        )
    if len(roles) and int(roles.max()) > num_roles:
        raise ValueError(
            f"{name}: expected roles up to {num_roles}, as the method has names for, got {int(roles.max())}"
        )
    return picks._replace(fills=len(chosen) < len(indices))
