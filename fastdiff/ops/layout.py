"""Memory orders of batches [B, C, ...]: contiguous or channels_last within each sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """Numbers [1 or B] as a tensor that broadcasts over the samples of x [B, ...]."""
    return values.view(-1, *(1 for _ in x.shape[1:]))


def sample_strides(sample: Sequence[int], channels_last: bool) -> tuple[int, ...]:
    """Strides within one dense sample (C, ...), whose batch stride is its number of elements."""
    order = list(range(len(sample)))
    if channels_last:
        order = order[1:] + order[:1]
    strides, step = [0] * len(sample), 1
    for dim in reversed(order):
        strides[dim] = step
        step *= sample[dim]
    return tuple(strides)


def has_strides(batch: Tensor, strides: Sequence[int]) -> bool:
    """Whether a batch's samples have these strides (a dimension of size one may have any)."""
    if batch.numel() == 0:
        return True
    pairs = zip(batch.shape[1:], batch.stride()[1:], strides, strict=True)
    return all(size == 1 or ours == wanted for size, ours, wanted in pairs)


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether each sample of a is laid out as in b, which has its shape."""
    return a.stride() == b.stride() or has_strides(a, b.stride()[1:])


def is_channels_last(batch: Tensor, name: str) -> bool:
    """The samples' order: False contiguous, True channels_last, else a ValueError naming it."""
    for channels_last in (False, True):
        if has_strides(batch, sample_strides(batch.shape[1:], channels_last)):
            return channels_last
    raise ValueError(f"{name} must be contiguous or channels_last, got strides {batch.stride()}")


def memory_format(x: Tensor) -> torch.memory_format:
    """Of x [B, C, ...] as torch names it, where it is dense; contiguous otherwise."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    layout = formats.get(x.ndim)
    if layout is None or x.is_contiguous() or not x.is_contiguous(memory_format=layout):
        return torch.contiguous_format
    return layout


def dense(x: Tensor) -> Tensor:
    """x itself, or a copy in its memory format."""
    return x.contiguous(memory_format=memory_format(x))


def channels_innermost(x: Tensor) -> bool:
    """Whether the channels of x [B, C, H, W], more than one, lie side by side in memory."""
    return x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) != 1
