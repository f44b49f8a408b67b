"""Diverse selection on the CPU, one thread: the operator against PyTorch.

The choices alone are made from given cosines, by the operator's private form, against a loop of PyTorch calls. The
whole operator, features in and indices out, is set beside what PyTorch takes for the product of the features with
themselves alone. Each with the best instruction set of this processor, and with AVX2.

pytest bench/bench_diverse_cpu.py        (or `make bench`)
"""

import pytest
import torch
import torch.nn.functional as F

import hiprune_kernels as hk

INSTRUCTION_SETS = {"best": 2, "AVX2": 1}
FORMS = ("farthest", "determinant")
CASES = {  # images, tokens, channels, count, dtype
    "CLIP-L/14-336": (1, 576, 1024, 64, torch.float32),
    "CLIP-L/14-336, 192": (1, 576, 1024, 192, torch.float32),
    "language model": (1, 576, 4096, 64, torch.float32),
    "CLIP-L/14-336, batch 8": (8, 576, 1024, 64, torch.float32),
    "CLIP-L/14-336, bfloat16": (1, 576, 1024, 64, torch.bfloat16),
    "LLaVA-NeXT": (1, 2880, 4096, 320, torch.float32),
}


def cosines_of(features):
    units = F.normalize(features.float(), dim=-1)
    return units @ units.T


def farthest_points(cosines, _, count):
    distances = 1 - cosines
    least = distances.clone().fill_diagonal_(torch.inf).amin(dim=1)
    chosen, least = [least.argmax()], torch.full_like(least, torch.inf)
    for _ in range(count - 1):
        least = torch.minimum(least, distances[chosen[-1]])
        least[chosen[-1]] = -torch.inf
        chosen.append(least.argmax())
    return torch.stack(chosen)


def determinant(cosines, quality, count):
    kernel = quality[:, None] * cosines * quality
    gain, covered, chosen = kernel.diagonal().clone(), kernel.new_zeros(count, len(kernel)), []
    for step in range(count):
        j = gain.argmax()
        chosen.append(j)
        torch.div(kernel[j] - covered[:step, j] @ covered[:step], gain[j].sqrt(), out=covered[step])
        gain -= covered[step].square()
        gain[j] = -torch.inf
    return torch.stack(chosen)


LOOPS = {"farthest": farthest_points, "determinant": determinant}


def draw(name, form):
    torch.set_num_threads(1)
    images, tokens, channels, count, dtype = CASES[name]
    features = torch.randn(images, tokens, channels).to(dtype)
    return features, torch.rand(images, tokens) if form == "determinant" else None, count


def operator(features, quality, count, gram, instructions):
    arguments = features, quality, None, [], [count], gram, INSTRUCTION_SETS[instructions]
    return lambda: torch.ops.hiprune._cpu_select_diverse(*arguments)[1]


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["CLIP-L/14-336", "CLIP-L/14-336, 192"])
def test_choices(side_by_side, name, form, instructions):
    features, quality, count = draw(name, form)
    cosines = cosines_of(features[0])
    ours = operator(cosines[None], quality, count, True, instructions)
    arguments = cosines, None if quality is None else quality[0], count
    assert torch.equal(ours()[0], LOOPS[form](*arguments))
    side_by_side(ours, {"torch loop": lambda: LOOPS[form](*arguments)}, 101)


@pytest.mark.parametrize("instructions", INSTRUCTION_SETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_whole(side_by_side, name, form, instructions):
    features, quality, count = draw(name, form)
    ours = operator(features, quality, count, False, instructions)

    def chain():
        qualities = [None] * len(features) if quality is None else quality
        return torch.stack([LOOPS[form](cosines_of(x), q, count) for x, q in zip(features, qualities)])

    assert torch.equal(ours(), chain())
    assert torch.equal(ours(), hk.select_diverse(features, count=count, quality=quality)[1])
    alternatives = {"product alone": lambda: features @ features.mT, "torch chain": chain}
    side_by_side(ours, alternatives, 5 if features.shape[1] > 1000 else 41)
