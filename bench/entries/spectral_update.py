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
from bench.entries.spectral_filter import gain, transform_flops
from bench.inputs import Shape, normals
from bench.published import pds_langevin, pds_predictor
from bench.registry import Baseline, Call, Case, Entry
from fastdiff.ops import SpectralGains, spectral_langevin, spectral_predictor, spectral_update_ref
from fastdiff.ops.half_spectrum import spectral_noise_ref
from fastdiff.ops.spectral_filter import PRECISIONS

MOVES = ("predictor", "langevin")
STEP, SNR, STAGE = 0.3, 0.16, 3
ALLOWED = 2 * PRECISIONS["exact"]  # twice the norm's: as spectral_filter.py says


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


def coefficients(name: str, device: torch.device) -> Tensor:
    row = [STEP**2, STEP] if name == "predictor" else [1.0, 2 * SNR**2]
    return torch.tensor([row], device=device)


def ours(name: str, sets: Sequence[Buffers]) -> Call:
    row = coefficients(name, sets[0].x.device)
    move = spectral_predictor if name == "predictor" else spectral_langevin
    return each(lambda b: move(b.x, b.score, b.gains, row, b.seeds, STAGE))(sets)


def defined(name: str, b: Buffers) -> Tensor:
    """By complex transforms in float64."""
    spectrum = spectral_noise_ref(b.seeds, b.x.shape, STAGE, torch.float64)
    noise = torch.fft.irfft2(spectrum, s=b.x.shape[2:])
    norms = "given" if name == "predictor" else "sample"
    row, gains = coefficients(name, b.x.device).double(), SpectralGains(b.gain.double())
    return spectral_update_ref(b.x.double(), b.score.double(), gains, row, noise, norms)


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
            definition=each(partial(defined, name)),
            allowed=ALLOWED,
            bytes=12 * elements,
            flops=int((transform_flops(shape) + 60) * elements),
            baselines={  # with noise of their own
                "published operations": Baseline(PUBLISHED[name], agrees=False),
                "torch.fft, norm folded": Baseline(partial(well_written, name), agrees=False),
            },
        )


OPS = ("spectral_predictor", "spectral_langevin")
ENTRY = Entry("spectral_update", "op", OPS, cases)
