"""Metadata checks shared by the public operators: every error names the argument, what was expected and what came."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STRIDED = torch.strided  # the layout of dense tensors
_LARGEST = sys.float_info.max


def check_dense(name: str, value: object, dims: str = "") -> None:
    """`dims` names the dimensions, for instance " [B Hq M D]"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor{dims}, got {type(value).__name__}")
    if value.layout is not STRIDED or value.is_nested or value.is_quantized:
        kind = "a nested one" if value.is_nested else "a quantized one" if value.is_quantized else str(value.layout)
        raise TypeError(f"{name}: expected a dense tensor{dims}, got {kind}")


def check_tensor(name: str, value: object, dims: str) -> None:
    """`dims` names the dimensions, for instance "B Hq M D". A quantized tensor is left to the check of its dtype."""
    if not isinstance(value, Tensor) or value.layout is not STRIDED or value.is_nested:
        check_dense(name, value, f" [{dims}]")  # raises
    elif value.dim() != dims.count(" ") + 1:
        raise ValueError(f"{name}: expected [{dims}], got shape {tuple(value.shape)}")


def check_floating(name: str, value: Tensor) -> None:
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")


def check_like(name: str, value: Tensor, other_name: str, other: Tensor, *, dtype: bool = True) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name}, got {value.device}")
    if dtype and value.dtype != other.dtype:
        raise TypeError(f"{name}: expected dtype {other.dtype} as {other_name}, got {value.dtype}")


def check_shape(name: str, value: Tensor, dims: str, shape: tuple[int, ...]) -> None:
    check_tensor(name, value, dims)
    if value.shape != shape:
        raise ValueError(f"{name}: expected [{dims}] = {tuple(shape)}, got shape {tuple(value.shape)}")


def check_mask(
    name: str, mask: Tensor | None, dims: str, shape: tuple[int, ...], other_name: str, other: Tensor
) -> None:
    if mask is None:
        return
    check_shape(name, mask, dims, shape)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool (True = visible, counted), got {mask.dtype}")
    check_like(name, mask, other_name, other, dtype=False)


def check_scale(scale: float | None) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale: expected a number, got {type(scale).__name__}")
    if not -_LARGEST <= scale <= _LARGEST:  # also catches NaN
        raise ValueError(f"scale: expected a finite number, got {scale}")


def check_bool(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
