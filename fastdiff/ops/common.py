"""What the ops share: the arithmetic of their references, and checks of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def product(weight: Tensor, operand: Tensor) -> Tensor:
    """weight * operand, where a zero weight hides whatever the operand holds."""
    return weight * torch.where(weight != 0, operand, 0)


def clamped(value: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """The value within [lo, hi]; NaN stays."""
    value = torch.where(value < lo, lo, value)
    return torch.where(value > hi, hi, value)


def require_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    """Raise TypeError unless this is a tensor of one of the dtypes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must be {' or '.join(map(str, allowed))}, got {tensor.dtype}")


def require_shape(name: str, tensor: Tensor, *allowed: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor has one of the shapes."""
    if tuple(tensor.shape) not in allowed:
        raise ValueError(
            f"{name} must have the shape {' or '.join(map(str, allowed))}, "
            f"got {tuple(tensor.shape)}"
        )
