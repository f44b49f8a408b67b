"""`hiprune prune IMAGE`: which tokens of a picture a method keeps, drawn and as JSON.

A method is watched where it works, in a forward of the patched model, which ends as soon as the method has picked: the
vision side runs, and of the language model only what the method reads.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .cli_common import (
    DTYPES,
    PICTURES,
    add_method_options,
    check_writable,
    checked_device,
    has_random_weights,
    method_of,
    open_image,
    progress,
    watched,
)
from .methods import METHODS, HiPrune, Method, Picks, Seen, TokenLayout, options_of
from .visualize import counted, draw_views, optional_import

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from .facts import EncoderFacts
    from .loading import LoadedModel
    from .methods import Needs

_READS = {"all": "the sum of attention", "mean": "mean attention", "cls": "the CLS token's attention"}


def add_arguments(prune: argparse.ArgumentParser) -> None:
    prune.add_argument(
        "image",
        metavar="IMAGE",
        help="an image file that pillow can read; 16 bits a channel become 8, what is transparent becomes white",
    )
    prune.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="local directory or hub id of a checkpoint of a type in `hiprune info --models`; without it, "
        "CLIP-L/14-336 at its real size with random weights, so that the choice of tokens means nothing",
    )
    add_method_options(
        prune, seed_help="of Random, and of the random weights used without --model (default: 0)", amount_needed=False
    )
    prune.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    prune.add_argument("--device", default="cpu", help="as PyTorch writes it, e.g. cuda:0 (default: cpu)")
    prune.add_argument(
        "--out", type=Path, metavar="PNG", help="picture to write (default: IMAGE's stem + .hiprune.png)"
    )
    prune.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write indices, roles and settings as JSON (without FILE: print them); no picture then, unless --out",
    )
    prune.set_defaults(run=prune_image)


def prune_image(args: argparse.Namespace) -> None:
    method, image = method_of(args), open_image(args.image)
    wants_picture = args.json is None or args.out is not None
    picture = args.out or Path(f"{Path(args.image).stem}.hiprune.png")
    if wants_picture:
        optional_import("matplotlib")  # rather now than after the work
        check_writable("out", picture, PICTURES)
    if args.json not in (None, "-"):
        check_writable("json", Path(args.json), ())

    import torch

    from . import loading

    device, dtype = checked_device(args.device), getattr(torch, args.dtype)
    if has_random_weights(args):
        loaded = loading.load_encoder(dtype=dtype, device=device, seed=args.seed or 0).up_to_features()
    else:
        loaded = loading.load_model(args.model, method, dtype=dtype, device=device)
    with progress("encoding the image"):
        look = look_at(loaded, loaded.fitted(method), image)

    report = sys.stderr if args.json == "-" else sys.stdout
    _print_summary(loaded, look, args, report)
    if args.json is not None:
        text = json.dumps(_as_json(loaded, look, args, device))
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n")
            print(f"wrote {args.json}", file=report)
    if wants_picture:
        draw_look(loaded, look, image).save(picture)
        print(f"wrote {picture}", file=report)


# ------------------------------------------------------------------------------------------------------------- looking


@dataclass(frozen=True)
class Look:
    """What a method made of one image."""

    method: Method
    needs: Needs
    encoder: EncoderFacts
    inputs: dict[str, Any]
    layout: TokenLayout
    seen: Seen | None  # None where every token stays, and the method was not asked
    indices: torch.Tensor  # [K] int64 on the CPU, ascending
    roles: torch.Tensor  # [T] uint8 on the CPU
    note: str  # what the method says of this image


class _Picked(Exception):
    """Ends a forward: the method has picked."""

    def __init__(self, layout: TokenLayout, seen: Seen | None = None, picks: Picks | None = None) -> None:
        self.layout, self.seen, self.picks = layout, seen, picks


def look_at(loaded: LoadedModel, method: Method, image: Image, inputs: dict[str, Any] | None = None) -> Look:
    """Let a method pick from an image, through the patched model, whose forward ends with that.

    Args:
        loaded: the model.
        method: which is applied, and taken off again.
        image: to pick from.
        inputs: what the processor made of it, by `vision_inputs`. None: made here.

    Raises:
        ValueError: if the method cannot be applied, its budget is out of range, or what it reads is not finite.
    """
    import torch

    from .loading import encoder_of, reads_language
    from .patch import apply_method, remove_method
    from .processing import quiet_transformers, vision_inputs

    def picked(seen: Seen, picks: Picks) -> None:
        raise _Picked(seen.layout, seen, picks)

    def whole(layout: TokenLayout) -> None:
        raise _Picked(layout)

    model, found = loaded.model, None
    apply_method(model, watched(method, picked, whole))
    try:
        encoder = encoder_of(model)
        made = inputs or vision_inputs(model, loaded.processor, image, language=reads_language(encoder))
        with torch.inference_mode(), quiet_transformers():
            model(**made, **({"use_cache": False} if "input_ids" in made else {}))
    except _Picked as end:
        found = end
    finally:
        remove_method(model)
    if found is None:
        raise RuntimeError(f"model: the forward of {type(model).__name__} ended before the method was asked")
    layout, notes = found.layout, () if found.picks is None else found.picks.notes
    if found.picks is None:
        indices = torch.arange(sum(layout.sizes))
        roles = torch.full((len(indices),), len(method.roles), dtype=torch.uint8)
    else:
        indices, roles = found.picks.indices.cpu(), found.picks.roles.cpu()
        indices = indices[indices >= 0]
    return Look(
        method,
        encoder.needs,
        encoder.facts,
        made,
        layout,
        found.seen,
        indices,
        roles,
        "; ".join(dict.fromkeys(filter(None, notes))),
    )


# ----------------------------------------------------------------------------------------------------------- reporting


def candidates_of(look: Look) -> int:
    """How many tokens there were to choose from."""
    return len(look.roles) if look.layout.candidates is None else int(look.layout.candidates.sum())


def _chosen_by(look: Look) -> dict[int, str]:
    """Layer -> what its scores chose."""
    if not isinstance(look.method, HiPrune):
        return {layer: _READS[queries] for layer, queries in look.needs.scores.items()}
    layers = {min(look.needs.scores): ["anchors"]}
    layers.setdefault(max(look.needs.scores), []).append("registers")
    return {layer: f"scores: {' and '.join(roles)}" for layer, roles in layers.items()}


def _print_summary(loaded: LoadedModel, look: Look, args: argparse.Namespace, report: TextIO) -> None:
    print(f"{loaded.name}, {args.dtype} on {args.device}", file=report)
    for remark in loaded.remarks:
        print(f"note: {remark}", file=report)
    if loaded.random:
        print(
            "note: the weights are random, so the choice of tokens means nothing; --model takes real ones", file=report
        )
    if look.seen is None:
        print("note: the budget is all that there is, so nothing was chosen and no scores were read", file=report)
    if look.note:
        print(f"note: {look.note}", file=report)
    kept = f"{len(look.indices)} of {candidates_of(look)} tokens kept"
    names = look.method.roles
    if isinstance(look.method, HiPrune):
        layers = {"anchor": min(look.needs.scores), "register": max(look.needs.scores)}
    else:
        kept, layers = f"{kept} by {type(look.method).__name__}", {}
        read = [f"{_READS[queries]} in layer {layer}" for layer, queries in look.needs.scores.items()]
        kept += f", which read {' and '.join(read)}" * bool(read)
    if len(names) > 1:
        counts = look.roles.long().bincount(minlength=len(names) + 1).tolist()[1:]
        places = {name: f" (layer {layer})" for name, layer in layers.items()}
        kept += ": " + ", ".join(counted(name, n) + places.get(name, "") for name, n in zip(names, counts) if n)
    print(kept, file=report)
    if look.layout.grids[1:]:
        print(f"the image is cut into {len(look.layout.grids)} views: {shapes_of(look.layout)} tokens", file=report)


def shapes_of(layout: TokenLayout) -> str:
    shapes = dict.fromkeys(" x ".join(map(str, grid)) for grid in layout.grids)
    return " and ".join(shapes)


def _as_json(loaded: LoadedModel, look: Look, args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    layout, method = look.layout, look.method
    grids = layout.grids
    same = len(set(grids)) == 1
    grid = grids[0] if len(grids) == 1 else (len(grids), *grids[0]) if same else grids
    options = {name: getattr(method, name) for name in options_of(type(method)) if name not in ("budget", "retention")}
    result = {
        "model": loaded.name,
        "random_weights": loaded.random,
        "dtype": args.dtype,
        "device": str(device),
        "method": next(name for name, cls in METHODS.items() if cls is type(method)),
        "grid": grid,
        "budget": len(look.indices),
        "tokens": candidates_of(look),
        **options,
    }
    if isinstance(method, HiPrune):
        result["object_layer"] = min(look.needs.scores)
        result["deep_layer"] = look.encoder.feature_layer  # the name that it had before
    result |= {
        "feature_layer": look.encoder.feature_layer,
        "role_names": method.roles,
        "indices": look.indices.tolist(),
        "roles": look.roles.tolist(),
    }
    if len(grids) > 1:
        result["tiles"] = _tiles(look)
    return result


def _tiles(look: Look) -> list[dict[str, Any]]:
    """Of each tile what is its own, counted within it."""
    tiles, first = [], 0
    for grid in look.layout.grids:
        size = math.prod(grid)
        own = look.indices[(look.indices >= first) & (look.indices < first + size)] - first
        roles = look.roles[first : first + size].tolist()
        tiles.append({"grid": grid, "indices": own.tolist(), "roles": roles})
        first += size
    return tiles


def draw_look(loaded: LoadedModel, look: Look, image: Image) -> Image:
    """What the model sees, the scores that the method read, and the kept tokens."""
    from .processing import image_processor_of
    from .views import views_of

    size = image.height, image.width
    processor = image_processor_of(loaded.processor)
    views = views_of(look.inputs, look.layout, loaded.model.config, processor, size)
    scores, titles = [], ["what the model sees"]
    if look.seen is not None:
        for layer, text in _chosen_by(look).items():
            scores.append(look.seen.scores[layer])
            titles.append(f"layer {layer} {text}" if isinstance(look.method, HiPrune) else f"layer {layer}: {text}")
        if look.seen.text_scores is not None:
            scores.append(look.seen.text_scores)
            titles.append("attention of the text")
    titles.append(f"{len(look.indices)} of {candidates_of(look)} tokens kept")
    roles, candidates = look.method.roles, look.layout.candidates
    return draw_views(
        views,
        look.roles,
        scores,
        titles=titles,
        role_names=roles,
        candidates=candidates,
        merged=look.method.merged_roles,
    )
