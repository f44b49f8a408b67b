"""Metadata checks shared by the public operators: every error names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(name: str, value: object, dims: str) -> None:
    """`dims` names the dimensions, for instance "B Hq M D"."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor [{dims}], got {type(value).__name__}")
    if value.dim() != dims.count(" ") + 1:
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


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {tuple(choices)}, got {value!r}")


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_grid(name: str, grid: Sequence[int]) -> list[int]:
    """(h, w) or (t, h, w) as [t, h, w]."""
    sides = [1, *grid] if len(grid) == 2 else [*grid]
    if len(sides) != 3 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{name}: expected (h, w) or (t, h, w), positive integers, got {tuple(grid)}")
    return sides


def check_budget(name: str, budget: int, grid: Sequence[int]) -> None:
    if type(budget) is not int:
        raise TypeError(f"{name}: expected an int, got {type(budget).__name__}")
    if not 1 <= budget <= math.prod(grid):
        raise ValueError(f"{name}: expected 1..{math.prod(grid)} for a grid of {tuple(grid)}, got {budget}")
