"""For torchvision built with CUDA beside a PyTorch without: its import looks for operators that must be declared."""

import contextlib
import importlib.abc
import sys
from typing import Any

SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            for operator in ("nms", "qnms"):
                with contextlib.suppress(RuntimeError):  # declared: torchvision's own library could be loaded
                    torch.library.define(f"torchvision::{operator}", SCHEMA)


sys.meta_path.insert(0, Finder())
