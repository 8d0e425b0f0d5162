"""Tensors of the tests, and how they are compared."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # in the order of C++'s Type


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers that depend on the seed, the shape and the dtype alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def wide(dtype: torch.dtype) -> torch.dtype:
    """What tensors of a dtype are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bits(tensor: Tensor) -> Tensor:
    """Bit patterns, with every NaN alike."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return torch.where(tensor.isnan(), 0x7FFF, tensor.contiguous().view(integers))
