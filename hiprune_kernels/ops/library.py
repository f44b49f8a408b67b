"""The `torch.ops.hiprune` library, the C++ CPU kernels behind it, and what is active where."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

library = torch.library.Library("hiprune", "FRAGMENT")

# Importing the module registers the private `hiprune::_cpu_*` operators. It is absent from a pure-Python install; where
# it is present and does not load, the ImportError is the user's to see.
CPU_KERNELS = importlib.util.find_spec("hiprune_kernels._C") is not None
if CPU_KERNELS:
    import hiprune_kernels._C  # noqa: F401

TRITON = importlib.util.find_spec("triton") is not None  # imported at the first CUDA call
NO_TRITON = "Triton is not installed"
NO_CPU_KERNELS = "the C++ kernels were not built (install with torch present and --no-build-isolation)"


def transformed() -> bool:
    """Whether a transform of torch.func, or forward-mode differentiation, is at work around the call.

    A custom operator has no derivative there: it would lose tangents without a word, and `torch.func.grad` would raise
    from inside. PyTorch's own operators have, so the reference serves these calls.
    """
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


@functools.cache
def warn_without_cpu_kernels() -> None:
    """Say once per process that CPU calls go to the slower PyTorch reference."""
    warnings.warn(f"hiprune_kernels: {NO_CPU_KERNELS}; CPU calls use the PyTorch reference", stacklevel=3)


@functools.cache
def compute_capability(device: torch.device) -> int:
    """90 for 9.0. Cached, as every call asks for it."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def gpu_gap(device: torch.device) -> str:
    """Why the Triton attention kernels do not serve a GPU, or "" where they do."""
    if not TRITON:
        return NO_TRITON
    if torch.version.hip is not None:
        return "an AMD GPU, where the kernels are not tested"
    if compute_capability(device) < 80:
        return "a GPU older than compute capability 8.0"
    return ""


class KernelStatus(NamedTuple):
    """What serves one family of operators on one device."""

    device: str
    operators: str
    implementation: str
    reason: str  # why not something faster; empty when the best there is, is active


_INSTRUCTION_SETS = ("baseline", "AVX2", "AVX-512", "AVX-512 with BF16")


def kernel_status() -> list[KernelStatus]:
    """What `hiprune info` prints: which implementation serves which operators on which device, and why.

    Example:
        >>> kernel_status()[0].device
        'cpu'
    """
    status = []
    if CPU_KERNELS:
        best = torch.ops.hiprune._cpu_instruction_sets().bit_length() - 1
        status.append(KernelStatus("cpu", "attention", f"C++ ({_INSTRUCTION_SETS[best]})", ""))
        status.append(KernelStatus("cpu", "selection", f"C++ ({_INSTRUCTION_SETS[min(best, 2)]})", ""))  # has no BF16
    else:
        status += [KernelStatus("cpu", family, "PyTorch", NO_CPU_KERNELS) for family in ("attention", "selection")]
    if torch.cuda.is_available():
        gap = gpu_gap(torch.device("cuda", torch.cuda.current_device()))
        status.append(KernelStatus("cuda", "attention", "PyTorch" if gap else "Triton", gap))
        triton = ("Triton", "") if TRITON else ("PyTorch", NO_TRITON)
        status.append(KernelStatus("cuda", "selection", *triton))
    return status
