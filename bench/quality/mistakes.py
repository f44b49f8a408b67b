"""Which mistakes the quality check catches: each is planted into HiPrune, and the shipped LLaVA is asked.

    python -m bench.quality.mistakes

A mistake is one that an implementation could make; whoever changes the check reads here what it is worth.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import hiprune_kernels as hk
from hiprune_kernels.methods import HiPrune, Needs, Picks, Seen
from hiprune_kernels.quality import ask, load, scenes_of

BUDGET, SIDE = 16, 12
Change = Callable[[Any], Any]


def planted(name: str, *, select: Any = None, needs: Any = None, merge: Any = None) -> type[HiPrune]:
    functions = {"select": select, "needs": needs, "merge": merge}
    return type(name, (HiPrune,), {key: value for key, value in functions.items() if value is not None})


def moved(change: Callable[[Tensor], Tensor]) -> Any:
    """Kept tokens of each image [B, K], counted within it, that are not those that were chosen; roles move along."""

    def select(self: HiPrune, seen: Seen) -> Picks:
        picks = HiPrune.select(self, seen)
        images, size = len(seen.layout.tiles), SIDE**2
        starts = torch.arange(0, images * size, size)[:, None]
        wrong = change(picks.indices.view(images, -1) - starts).sort(dim=1).values
        roles = torch.zeros_like(picks.roles).view(images, size).scatter(1, wrong, 3)
        return picks._replace(indices=(wrong + starts).flatten(), roles=roles.flatten())

    return select


def rescored(change: Callable[[Tensor], Tensor]) -> Any:
    """Scores of each image [B, N] that are not those of its tokens."""

    def select(self: HiPrune, seen: Seen) -> Picks:
        images = len(seen.layout.tiles)
        scores = {layer: change(values.view(images, -1)).flatten() for layer, values in seen.scores.items()}
        return HiPrune.select(self, seen._replace(scores=scores))

    return select


def layers_exchanged(self: HiPrune, seen: Seen) -> Picks:
    first, last = sorted(seen.scores)
    return HiPrune.select(self, seen._replace(scores={first: seen.scores[last], last: seen.scores[first]}))


def with_features(self: HiPrune, encoder: Any) -> Needs:
    return HiPrune.needs(self, encoder)._replace(features="encoder")


def features_from(places: Callable[[int, int], Tensor]) -> Any:
    """Kept tokens that carry the features of others."""

    def merge(self: HiPrune, features: Tensor, seen: Seen, picks: Picks) -> Tensor:
        images = len(seen.layout.tiles)
        return features[places(images, SIDE**2)]

    return merge


def another_image(images: int, size: int) -> Tensor:
    return torch.arange(images * size).view(images, size).roll(9, dims=0).flatten()  # of another scene


def another_order(images: int, size: int) -> Tensor:
    order = torch.arange(size).view(SIDE, SIDE).flip(1).flatten()
    return (torch.arange(images)[:, None] * size + order).flatten()


def anything(kept: Tensor) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(SIDE**2, generator=draw)[: kept.shape[1]] for _ in kept])


MISTAKES: dict[str, type[HiPrune]] = {
    "none": HiPrune,
    "indices shuffled": planted("Shuffled", select=moved(anything)),
    "indices of another image": planted("OtherImage", select=moved(lambda kept: kept.roll(9, dims=0))),
    "grid transposed": planted("Transposed", select=moved(lambda kept: kept % SIDE * SIDE + kept // SIDE)),
    "lowest scores kept": planted("Lowest", select=rescored(lambda scores: -scores)),
    "constant scores": planted("Constant", select=rescored(torch.ones_like)),
    "scores off by one": planted("OffByOne", select=rescored(lambda scores: scores.roll(1, dims=1))),
    "layers exchanged": planted("Exchanged", select=layers_exchanged),
    "features of another image": planted("OtherFeatures", needs=with_features, merge=features_from(another_image)),
    "features in another order": planted("OtherOrder", needs=with_features, merge=features_from(another_order)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=60, help="nine questions each (default: 60)")
    args = parser.parse_args()
    model, processor = load()
    scenes = scenes_of(args.scenes)
    print(f"| mistake | right answers, %, {BUDGET} of {SIDE**2} tokens | kept tokens on digits, % |\n|---|---:|---:|")
    for name, cls in MISTAKES.items():
        _line(name, ask(model, processor, scenes, cls(budget=BUDGET)))
    for layer in (1, 2, 4, 5):
        _line(
            f"object layer {layer} for 3", ask(model, processor, scenes, hk.HiPrune(budget=BUDGET, object_layer=layer))
        )
    for step in (-1, 1):
        model.config.vision_feature_layer += step
        name = f"feature layer one {'early' if step < 0 else 'late'}"
        _line(name, ask(model, processor, scenes, hk.HiPrune(budget=BUDGET)))
        model.config.vision_feature_layer -= step


def _line(name: str, answers: Any) -> None:
    mean, error = answers.accuracy
    share = float(answers.share_on_digits.mean())
    print(f"| {name} | {100 * mean:.1f} +- {100 * error:.1f} | {100 * share:.1f} |", flush=True)


if __name__ == "__main__":
    main()
