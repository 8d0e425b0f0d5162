"""Buffers and the sizes at which things are measured."""

from __future__ import annotations

import torch
from torch import Tensor

Shape = tuple[int, ...]

IMAGE, LATENTS, IMAGES = (1, 3, 32, 32), (4, 4, 64, 64), (16, 3, 256, 256)
LATENT = (1, 4, 64, 64)


def step_sizes(device: torch.device) -> list[Shape]:
    """Of a solver's step; on a GPU also those that fill it."""
    larger = [(64, 4, 512, 512), (16, 4, 128, 128)] if device.type == "cuda" else []
    return [*larger, IMAGES, LATENTS, IMAGE]


def loop_sizes(quick: bool) -> list[Shape]:
    """Of a loop without a network."""
    return [LATENT] if quick else [IMAGE, LATENTS, IMAGES]


def normals(count: int, shape: Shape, device: torch.device, seed: int) -> list[Tensor]:
    """Random tensors of that shape, made where they are to lie."""
    random = torch.Generator(device).manual_seed(seed)
    return [torch.randn(shape, generator=random, device=device) for _ in range(count)]


def cpu_normals(count: int, shape: Shape, device: torch.device, seed: int) -> list[Tensor]:
    """The same numbers on every device."""
    return [value.to(device) for value in normals(count, shape, torch.device("cpu"), seed)]
