"""`fastdiff.ops.spectral_predictor` and `spectral_langevin`: whole preconditioned updates."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.entries.spectral_filter import QUICK, definition_gate, gain
from bench.published import pds_langevin, pds_predictor
from bench.registry import Baseline, Call, Case, Entry, Gate
from fastdiff.ops import (
    SpectralGains,
    spectral_langevin,
    spectral_predictor,
    spectral_update_ref,
)
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


def buffers(number: int, shape: Sequence[int], device: torch.device) -> Buffers:
    random = torch.Generator(device).manual_seed(number)
    x, score = (torch.randn(tuple(shape), generator=random, device=device) for _ in range(2))
    values = gain(*shape[1:]).to(device)
    seeds = torch.arange(shape[0], device=device) + 1000 * number
    return Buffers(x, score, seeds, SpectralGains(values), values, torch.ones(1, device=device))


def rows(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Coefficients of the two moves."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "predictor": torch.tensor([[STEP**2, STEP]], dtype=wide, device=device),
        "langevin": torch.tensor([[1.0, 2 * SNR**2]], dtype=wide, device=device),
    }


def move(name: str, b: Buffers, row: Tensor) -> Tensor:
    call = spectral_predictor if name == "predictor" else spectral_langevin
    return call(b.x, b.score, b.gains, row, b.seeds, 3)


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """Every dtype and kind of size, noise included, against complex transforms in float64.

    quick: two dtypes at each of three sizes.
    """
    if device.type != "cpu":
        yield definition_gate(device)
    sizes = [(5, 7), (33, 64), (101, 37), (1, 1), (32, 32), (64, 64), (63, 20), (96, 128)]
    for size, (dtype, tier) in itertools.product(sizes, TIERS.items()):
        if quick and dtype not in QUICK.get(size, ()):
            continue
        there = buffers(0, (2, 3, *size), device)
        there = there._replace(x=there.x.to(dtype), score=there.score.to(dtype))
        spectrum = spectral_noise_ref(there.seeds, torch.Size((2, 3, *size)), 3, torch.float64)
        z = torch.fft.irfft2(spectrum, s=size)
        gains = SpectralGains(there.gain.double())
        for name, row in rows(device, dtype).items():
            found = move(name, there, row).double()
            norms = "sample" if name == "langevin" else ""
            wanted = spectral_update_ref(
                there.x.double(), there.score.double(), gains, row.double(), z, norms
            )  # fmt: skip
            form = there.gains.describe(there.x)
            allowed = max(tier, PRECISIONS["exact"]) if form.startswith("whole") else tier
            error = float((found - wanted).norm() / wanted.norm())
            yield {
                "case": f"{name} {size} {dtype}: {form}",
                "error": error,
                "allowed": allowed,
                "ok": error <= allowed,
            }


def ours(name: str):
    def make(sets: Sequence[Buffers]) -> Call:
        row = rows(sets[0].x.device)[name]
        return lambda i: move(name, sets[i], row)

    return make


def published(name: str):
    def make(sets: Sequence[Buffers]) -> Call:
        if name == "langevin":
            return lambda i: pds_langevin(
                sets[i].x, sets[i].score, sets[i].gain, sets[i].space, SNR
            )
        return lambda i: pds_predictor(sets[i].x, sets[i].score, sets[i].gain, sets[i].space, STEP)

    return make


def well_written(name: str):
    """Two real transforms with the scale folded in, noise drawn in space and transformed too."""

    def make(sets: Sequence[Buffers]) -> Call:
        def half(b: Buffers) -> Tensor:
            return b.gain[..., : b.x.shape[3] // 2 + 1] / (b.x.shape[2] * b.x.shape[3])

        halves = [(half(b) * b.gain[..., : b.x.shape[3] // 2 + 1], half(b)) for b in sets]

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

    return make


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = [
        (64, 3, 64, 64),
        (4, 3, 256, 256),
        (64, 3, 32, 32),
        (1, 3, 1024, 1024),
        (1, 3, 32, 32),
    ]
    for shape, name in itertools.product(shapes[:2] if quick else shapes, MOVES):
        elements = math.prod(shape)
        yield Case(
            name,
            shape,
            inputs=lambda i, shape=shape: buffers(i, shape, device),
            ours=ours(name),
            bytes=12 * elements,
            flops=int((10 * math.log2(math.sqrt(shape[2] * shape[3])) + 60) * elements),
            baselines={  # with noise of their own
                "published operations": Baseline(published(name), agrees=False),
                "torch.fft, norm folded": Baseline(well_written(name), agrees=False),
            },
        )


ENTRY = Entry(
    "spectral_update",
    "op",
    ("spectral_predictor", "spectral_langevin"),
    gates,
    cases,
)
