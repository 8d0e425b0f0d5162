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


def require_device(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raise ValueError unless the tensor is where x is."""
    if tensor.device != x.device:
        raise ValueError(f"{name} must be on {x.device}, got {tensor.device}")


def require_seeds(seeds: Tensor, x: Tensor) -> None:
    """Raise TypeError or ValueError unless these are a seed for each sample of x."""
    require_dtype("seeds", seeds, torch.int64)
    require_shape("seeds", seeds, (len(x),))
    require_device("seeds", seeds, x)
    if not seeds.is_contiguous():
        raise ValueError(f"seeds must be contiguous, got strides {seeds.stride()}")


def stage_argument(stage: int | Tensor, x: Tensor) -> tuple[Tensor | None, int]:
    """A tensor on the device, or a number: no launch fills a tensor with it."""
    if isinstance(stage, int):
        if not 0 <= stage < 1 << 31:
            raise ValueError(f"stage must be 0 to 2^31 - 1, got {stage}")
        return None, stage
    require_dtype("stage", stage, torch.int32)
    require_shape("stage", stage, (1,))
    require_device("stage", stage, x)
    return stage, 0


def number_of_stage(stage: Tensor | None, number: int) -> int:
    """What `stage_argument` was given, read on the host: for references."""
    return number if stage is None else int(stage)


def forbid_gradient(name: str, *tensors: Tensor | None) -> None:
    """Raise ValueError where a gradient would be asked for."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(f"{name} is not differentiable: call it under torch.no_grad()")


def wide_dtype(x: Tensor) -> torch.dtype:
    """The arithmetic's dtype for x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
