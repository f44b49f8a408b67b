"""Triton kernels for GPUs and their launchers, imported at the first CUDA call only."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. Triton's own, made for kernels too, takes microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


_COMPILED: dict[tuple[Any, ...], tuple[Any, itemgetter]] = {}
_MOST_COMPILED = 4096  # entries; images of ever new sizes must not fill the memory


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], constants: dict[str, Any], warps: int, stages: int
) -> None:
    """Launch a Triton kernel, the short way where it was compiled for such arguments before.

    With every launch Triton works out anew which of the compiled forms serves it: 20 to 37 us for as many arguments as
    these kernels have (measured on an H200's host). It compiles for dtypes, for pointers that 16 divides and for what
    integers are; equal ones are the same in all of that, and finding them takes a fraction of it.

    Args:
        arguments, constants: by the names of the kernel's parameters; together all of them, the first one a tensor.
    """
    described = [(x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x for x in arguments.values()]
    device = next(iter(arguments.values())).device
    key = (kernel, device, warps, stages, *described, *constants.values())
    found = _COMPILED.get(key)
    if found is not None:
        compiled, in_order = found
        compiled[(*grid, 1, 1)[:3]](*in_order({**arguments, **constants}))
        return
    compiled = kernel[grid](**arguments, **constants, num_warps=warps, num_stages=stages)
    if compiled is not None:  # as from Triton's interpreter
        if len(_COMPILED) >= _MOST_COMPILED:
            _COMPILED.clear()
        _COMPILED[key] = compiled, itemgetter(*kernel.arg_names)
