"""Imported at each start of Python by a .pth file in the tests' environment: torchvision there is built for CUDA.

Beside a PyTorch for CPUs it does not import unless the schemas of two of its operators are declared first.
"""

import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import contextlib

            import torch

            for operator in ("nms", "qnms"):
                with contextlib.suppress(RuntimeError):
                    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    torch.library.define(f"torchvision::{operator}", schema)


sys.meta_path.insert(0, _Declare())
