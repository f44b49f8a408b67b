"""Versions, devices, active kernels and supported models: what `hiprune info` prints, and every report states."""

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


def supported_models() -> dict[str, list[dict[str, Any]]]:
    """The tables of what can be patched ("models") and recorded ("encoders"), ready for JSON.

    The layer numbers, 1-based, are those of transformers' default configuration of each model type.
    """
    from transformers import CONFIG_MAPPING, AutoModel

    from .patch import FAMILIES
    from .patch.encoders import ENCODERS, find_encoder

    models, encoders = [], []
    for model_type, family in FAMILIES.items():
        with torch.device("meta"):  # the shell of a model of real size: no memory, some milliseconds
            host = family.host(AutoModel.from_config(CONFIG_MAPPING[model_type]()))
        encoder_family, _, layers = find_encoder(family.encoders(host)[0])
        feature_layer = family.feature_layer(host, {})
        models.append(
            {
                "name": family.kind.name,
                "model_type": model_type,
                "budget_per": family.kind.budget_per,
                "object_layer": encoder_family.kind.object_layer(len(layers), feature_layer),
                "feature_layer": feature_layer,
                "layers": len(layers),
                "notes": family.kind.notes,
            }
        )
    for model_type, encoder in ENCODERS.items():
        encoders.append(
            {
                "name": encoder.kind.name,
                "model_type": model_type,
                "prefix_tokens": encoder.kind.num_prefix_tokens(CONFIG_MAPPING[model_type]()),
                "object_share": encoder.kind.object_share,
                "notes": encoder.kind.notes,
            }
        )
    return {"models": models, "encoders": encoders}


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
