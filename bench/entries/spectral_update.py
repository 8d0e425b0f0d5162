"""`fastdiff.ops.spectral_predictor` and `spectral_langevin`: whole preconditioned updates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.baselines import each
from bench.entries.spectral_filter import QUICK, gain, on_both, transform_flops
from bench.gates import Gate, norm_error, within
from bench.inputs import Shape, normals
from bench.published import pds_langevin, pds_predictor
from bench.registry import Baseline, Call, Case, Entry
from fastdiff.ops import SpectralGains, spectral_langevin, spectral_predictor, spectral_update_ref
from fastdiff.ops.half_spectrum import spectral_noise_ref
from fastdiff.ops.spectral_filter import PRECISIONS

MOVES = ("predictor", "langevin")
TIERS = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
STEP, SNR = 0.3, 0.16


class Buffers(NamedTuple):
    x: Tensor
    score: Tensor
    seeds: Tensor
    gains: SpectralGains
    gain: Tensor  # [C, H, W]
    space: Tensor  # [1]: ones


def buffers(number: int, shape: Shape, device: torch.device) -> Buffers:
    x, score = normals(2, tuple(shape), device, number)
    values = gain(*shape[1:]).to(device)
    seeds = torch.arange(shape[0], device=device) + 1000 * number
    return Buffers(x, score, seeds, SpectralGains(values), values, torch.ones(1, device=device))


def coefficients(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    row = [STEP**2, STEP] if name == "predictor" else [1.0, 2 * SNR**2]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.tensor([row], dtype=wide, device=device)


def move(name: str, b: Buffers, row: Tensor) -> Tensor:
    call = spectral_predictor if name == "predictor" else spectral_langevin
    return call(b.x, b.score, b.gains, row, b.seeds, 3)


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """Every dtype and kind of size, noise included, against complex transforms in float64.

    quick: two dtypes at each of three sizes.
    """
    if device.type != "cpu":
        yield on_both(device)
    sizes = [(5, 7), (33, 64), (101, 37), (1, 1), (32, 32), (64, 64), (63, 20), (96, 128)]
    for size, (dtype, tier) in itertools.product(sizes, TIERS.items()):
        if quick and dtype not in QUICK.get(size, ()):
            continue
        there = buffers(0, (2, 3, *size), device)
        there = there._replace(x=there.x.to(dtype), score=there.score.to(dtype))
        spectrum = spectral_noise_ref(there.seeds, torch.Size((2, 3, *size)), 3, torch.float64)
        z = torch.fft.irfft2(spectrum, s=size)
        gains, form = SpectralGains(there.gain.double()), there.gains.describe(there.x)
        x, score = there.x.double(), there.score.double()
        for name, norms in (("predictor", ""), ("langevin", "sample")):
            row = coefficients(name, device, dtype)
            wanted = spectral_update_ref(x, score, gains, row.double(), z, norms)
            error = norm_error(move(name, there, row).double(), wanted)
            allowed = max(tier, PRECISIONS["exact"]) if form.startswith("whole") else tier
            yield within(f"{name} {size} {dtype}: {form}", error, allowed)


def ours(name: str, sets: Sequence[Buffers]) -> Call:
    row = coefficients(name, sets[0].x.device)
    return lambda i: move(name, sets[i], row)


PUBLISHED = {
    "predictor": each(lambda b: pds_predictor(b.x, b.score, b.gain, b.space, STEP)),
    "langevin": each(lambda b: pds_langevin(b.x, b.score, b.gain, b.space, SNR)),
}


def well_written(name: str, sets: Sequence[Buffers]) -> Call:
    """Two real transforms with the scale folded in, noise drawn in space and transformed too."""
    halves = []
    for b in sets:
        half = b.gain[..., : b.x.shape[3] // 2 + 1]
        scaled = half / (b.x.shape[2] * b.x.shape[3])
        halves.append((scaled * half, scaled))

    def call(i: int) -> Tensor:
        x, (drift, colour) = sets[i].x, halves[i]
        direction = torch.fft.rfft2(sets[i].score) * drift
        noise = torch.fft.rfft2(torch.randn_like(x)) * colour
        if name == "langevin":  # norms of half spectra: the edges' weight is left out
            sizes = [torch.linalg.vector_norm(v, dim=(1, 2, 3)) for v in (noise, direction)]
            h = (2 * SNR**2 * (sizes[0] / sizes[1]).square()).view(-1, 1, 1, 1)
            total = h * direction + (2 * h).sqrt() * noise
        else:
            total = STEP**2 * direction + STEP * noise
        return x + torch.fft.irfft2(total, s=x.shape[2:], norm="forward")

    return call


SHAPES = ((64, 3, 64, 64), (4, 3, 256, 256), (64, 3, 32, 32), (1, 3, 1024, 1024), (1, 3, 32, 32))


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for shape, name in itertools.product(SHAPES[:2] if quick else SHAPES, MOVES):
        elements = math.prod(shape)
        yield Case(
            name,
            shape,
            inputs=lambda i, shape=shape: buffers(i, shape, device),
            ours=partial(ours, name),
            bytes=12 * elements,
            flops=int((transform_flops(shape) + 60) * elements),
            baselines={  # with noise of their own
                "published operations": Baseline(PUBLISHED[name], agrees=False),
                "torch.fft, norm folded": Baseline(partial(well_written, name), agrees=False),
            },
        )


OPS = ("spectral_predictor", "spectral_langevin")
ENTRY = Entry("spectral_update", "op", OPS, gates, cases)
