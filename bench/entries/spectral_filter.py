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
from bench.gates import ON_BOTH, Gate, norm_error, within
from bench.inputs import Shape, normals
from bench.published import pds_filter
from bench.registry import Baseline, Call, Case, Entry, Maker
from fastdiff.ops import SpectralResponse, spectral_filter, spectral_filter_ref
from fastdiff.ops.spectral_operators import mirrored

TIERS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
FAST = 2e-4
QUICK = {  # the gates of --quick: on CUDA two sizes in one launch, and one in several
    (5, 7): (torch.float32, torch.bfloat16),
    (33, 64): (torch.float64, torch.float16),
    (101, 37): (torch.float32, torch.bfloat16),
}


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


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """Every dtype, layout and kind of size, relative in norm to complex transforms in float64.

    quick: two dtypes at each of three sizes.
    """
    random = torch.Generator().manual_seed(0)
    if device.type != "cpu":
        yield on_both(device)
    sizes = [(5, 7), (33, 64), (101, 37), (1, 1), (28, 28), (32, 32), (64, 64), (63, 20), (96, 128)]
    for size, dtype, last in itertools.product(sizes, TIERS, (False, True)):
        if quick and dtype not in QUICK.get(size, ()):
            continue
        values = gain(3, *size, torch.float64)
        x = torch.randn(2, 3, *size, generator=random).to(dtype)
        ready, there = SpectralResponse(values.to(device)), x.to(device)
        wanted = spectral_filter_ref(there.double(), values.to(device))
        if last:
            there = there.contiguous(memory_format=torch.channels_last)
        layout = "channels_last" if last else "contiguous"
        for precision, tier in (("exact", TIERS[dtype]), ("fast", max(TIERS[dtype], FAST))):
            found = spectral_filter(there, ready, precision=precision).double()
            case = f"{size} {dtype} {layout} {precision}: {ready.describe(there)}"
            yield within(case, norm_error(found, wanted), tier)


def on_both(device: torch.device) -> Gate:
    """The complex transforms on the device against the CPU's, in float64."""
    x, values = torch.randn(2, 3, 33, 64, dtype=torch.float64), gain(3, 33, 64, torch.float64)
    wanted = spectral_filter_ref(x, values)
    found = spectral_filter_ref(x.to(device), values.to(device)).cpu()
    return within(ON_BOTH, norm_error(found, wanted), 1e-14)


def ours(precision: str) -> Maker:
    return each(lambda b: spectral_filter(b.x, b.response, precision=precision))


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
            bytes=8 * elements,
            flops=int(transform_flops(shape) * elements),
            baselines={
                "torch.fft": Baseline(partial(real_transforms, False)),
                "torch.fft, norm folded": Baseline(partial(real_transforms, True)),
                "published operations": Baseline(each(lambda b: pds_filter(b.x, b.gain))),
            },
        )


ENTRY = Entry("spectral_filter", "op", ("spectral_filter",), gates, cases)
