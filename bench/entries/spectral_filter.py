"""`fastdiff.ops.spectral_filter`: a gain for each frequency, as preconditioned sampling applies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.baselines import each
from bench.inputs import Shape, normals
from bench.published import pds_filter
from bench.registry import Baseline, Call, Case, Entry, Maker
from fastdiff.ops import SpectralResponse, spectral_filter, spectral_filter_ref
from fastdiff.ops.spectral_operators import mirrored

# Bounds of the norm's error, twice: the largest error may stand out more than the largest value.
ALLOWED = {"exact": 2 * 2e-6, "fast": 2 * 2e-4}


class Buffers(NamedTuple):
    x: Tensor
    response: SpectralResponse
    gain: Tensor  # [C, H, W]


def gain(channels: int, height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Like the published masks': even, between 1 and 1.25."""
    random = torch.Generator().manual_seed(1)
    values = 1 + torch.rand(channels, height, width, generator=random, dtype=torch.float64) / 4
    return ((values + mirrored(values)) / 2).to(dtype)


def buffers(number: int, shape: Shape, device: torch.device) -> Buffers:
    values = gain(*shape[1:]).to(device)
    return Buffers(*normals(1, shape, device, number), SpectralResponse(values), values)


def ours(precision: str) -> Maker:
    return each(lambda b: spectral_filter(b.x, b.response, precision=precision))


def defined(b: Buffers) -> Tensor:
    return spectral_filter_ref(b.x.double(), b.gain.double())


def real_transforms(folded: bool, sets: list[Buffers]) -> Call:
    """As one writes it; or the inverse's scale folded into the response: no pass of its own."""
    norm = "forward" if folded else "backward"
    halves = [b.gain[..., : b.x.shape[3] // 2 + 1].contiguous() for b in sets]
    if folded:
        halves = [h / (b.x.shape[2] * b.x.shape[3]) for h, b in zip(halves, sets, strict=True)]
    return lambda i: torch.fft.irfft2(
        torch.fft.rfft2(sets[i].x) * halves[i], s=sets[i].x.shape[2:], norm=norm
    )


def transform_flops(shape: Shape) -> float:
    """Of a real transform and its inverse, an element."""
    return 10 * math.log2(math.sqrt(shape[2] * shape[3]))


SHAPES = ((64, 3, 32, 32), (64, 3, 64, 64), (4, 3, 256, 256), (1, 3, 1024, 1024), (1, 3, 32, 32),
          (1, 3, 64, 64))  # fmt: skip


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes, rows = SHAPES[:3] if quick else SHAPES, ("exact",)
    if device.type == "cuda":
        rows += ("fast",)
        shapes += () if quick else ((256, 3, 64, 64), (16, 3, 128, 128))
    for shape, row in itertools.product(shapes, rows):
        elements = math.prod(shape)
        yield Case(
            row,
            shape,
            inputs=lambda i, shape=shape: buffers(i, shape, device),
            ours=ours(row),
            definition=each(defined),
            allowed=ALLOWED[row],
            bytes=8 * elements,
            flops=int(transform_flops(shape) * elements),
            baselines={
                "torch.fft": Baseline(partial(real_transforms, False)),
                "torch.fft, norm folded": Baseline(partial(real_transforms, True)),
                "published operations": Baseline(each(lambda b: pds_filter(b.x, b.gain))),
            },
        )


ENTRY = Entry("spectral_filter", "op", ("spectral_filter",), cases)
