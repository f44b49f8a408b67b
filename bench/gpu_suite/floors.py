"""What no kernel can beat: operations and bytes, over the rates that this device reached in the same run.

Times of one self-attention with H heads, N tokens and head dimension D in 16-bit floats; D counts as the next multiple
of 16, which is what the tensor cores compute. `mma` is the time of both matrix products, `exp` that of one exponential
per logit, `memory` that of reading query, key and value and writing the output once.

- output:            max(mma, exp, memory)
- output and scores: the same, plus the scores' bytes; for a kernel that keeps the probabilities, so that both products
  and the exponentials are computed once
- two passes:        output, then max(mma / 2, exp, memory / 2) once more: the logits computed again
- scores only:       twice max(mma / 2, exp, memory / 2): the sum of a row is known only when its last key was seen
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .timing import Clock

EXP_PER_CLOCK = 16  # special-function results per multiprocessor and clock, sm_80 to sm_120


class Rates(NamedTuple):
    """What the device can do in a second."""

    flops: float  # of a large bfloat16 matrix product
    bytes: float  # read and written by a large copy
    exps: float


# An NVIDIA H200's rates as measured elsewhere, for the dry run on a CPU.
H200_HERTZ = 1.98e9
H200 = Rates(790e12, 4.3e12, 132 * EXP_PER_CLOCK * H200_HERTZ)


def measured_rates(device: torch.device, clock: Clock) -> Rates:
    """Rates of a CUDA device: matrix products and copies are run, the exponentials follow from its highest clock."""
    if device.type != "cuda":
        return H200
    import triton

    size = 8192
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**32, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def best(call: Callable[[], object]) -> float:
        for _ in range(3):
            call()
        return min(clock.elapsed(call) for _ in range(10))

    flops = 2 * size**3 / best(lambda: a @ b)
    copied = 2 * source.numel() / best(lambda: target.copy_(source))
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index or 0)
    hertz = properties.get("sm_clock_rate", 0) * 1e3 or H200_HERTZ  # newer drivers may not tell
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return Rates(flops, copied, processors * EXP_PER_CLOCK * hertz)


class Floors(NamedTuple):
    """Seconds; see the module's docstring."""

    output: float
    output_and_scores: float
    two_passes: float
    scores: float


def floors(B: int, H: int, N: int, D: int, rates: Rates, windows: int = 1) -> Floors:
    """Of B times `windows` attentions over N tokens each.

    Example:
        >>> round(floors(1, 16, 577, 64, H200).two_passes * 1e6, 2)
        3.0
    """
    count = B * windows * H
    mma = 4 * count * N * N * (-(-D // 16) * 16) / rates.flops
    exp = count * N * N / rates.exps
    memory = 4 * count * N * D * 2 / rates.bytes
    scores_bytes = B * windows * N * 4
    output = max(mma, exp, memory)
    half = max(mma / 2, exp, memory / 2)
    fused = max(mma, exp, memory + scores_bytes / rates.bytes)
    return Floors(output, fused, output + half, 2 * half)
