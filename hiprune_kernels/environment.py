"""Versions, devices and active kernels: what `hiprune info` prints, and every report states."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .ops import kernel_status


def environment() -> dict[str, Any]:
    """Versions, devices and active kernels of this process, ready for JSON."""
    versions = {"hiprune-kernels": __version__, "python": platform.python_version(), "torch": torch.__version__}
    versions |= {package: _version(package) for package in ("triton", "transformers", "pillow", "matplotlib")}
    devices = [f"cpu: {processor_name()}, {os.cpu_count()} logical cores, {torch.get_num_threads()} threads in use"]
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        devices.append(f"cuda:{i}: {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}")
    return {
        "versions": versions,
        "platform": platform.platform(),
        "devices": devices,
        "kernels": [status._asdict() for status in kernel_status()],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def processor_name() -> str:
    """The processor's name as Linux knows it, else Python's guess."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
