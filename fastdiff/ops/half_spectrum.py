"""Passes over half spectra: what stands between torch.fft's transforms of real images, and after.

A real image's spectrum is Hermitian, Z(-k) = conj Z(k), and kept as its half [H, W // 2 + 1]. An
inverse transform of it, torch.fft.irfft2, is the slower one: complex along one axis, then real
along the other; on a GPU it copies its input first. Here both ways are the forward real transform,
since the Hartley spectrum h = Re Z - Im Z, a real image, undoes itself (Bracewell 1983):

    y = F^-1 Z    has    Re F h - Im F h = H W y.

So a filter or a move is rfft2, one pass (`spectrum_combine`) that multiplies, adds the noise and
writes h, rfft2 again, and one pass (`hartley_add`) that ends it and adds the state. The tables hold
the scale 1 / (H W).

**The noise.** For a seed, a stage and an image [C, H, W] the standard normals n(c, k, j) are
Philox's (philox.py, purpose 4) of element (c H + k) W' + j, where W' is W rounded up to even. They
are the packed half spectrum of white noise z, F z = sqrt(H W / 2) w with

    w(c, k, m) = n(c, k, 2 m) + i n(c, k, 2 m + 1)          0 < m < W / 2
    w(c, k, m) = n(c, k, e) + i n(c, H - k, e)              0 < k < H / 2,  conjugate at H - k
    w(c, k, m) = sqrt(2) n(c, k, e)                         k = 0 and k = H / 2

for the column m = 0 (e = 0) and, where W is even, m = W / 2 (e = 1). With a pixel gain noise begins
in space: it is that of `multistep_step`.

Backends: C++ on CPU tensors (csrc/half_spectrum.h), Triton on CUDA tensors
(kernels/half_spectrum.py), plain PyTorch without either.
"""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from .. import _ext
from .common import number_of_stage, wide_dtype
from .philox import philox_normal_ref

SPECTRAL_NOISE = 4  # a Philox purpose
STEPS = ("given", "sample", "batch")  # where a move's length comes from


def spectral_noise_ref(seeds: Tensor, shape: torch.Size, stage: int, dtype: torch.dtype) -> Tensor:
    """F z of the white noise z of images [B, C, H, W]: [B, C, H, W // 2 + 1] complex."""
    batch, channels, height, width = shape
    packed = (width + 1) // 2 * 2
    n = philox_normal_ref(seeds, channels * height * packed, stage, SPECTRAL_NOISE)
    n = n.view(batch, channels, height, packed).to(dtype)
    w = torch.complex(n[..., 0::2], n[..., 1::2])
    edges = [0] if width % 2 else [0, 1]
    mirror = (-torch.arange(height, device=seeds.device)) % height
    upper = torch.arange(height, device=seeds.device) < mirror
    real = torch.arange(height, device=seeds.device) == mirror
    columns = []
    for edge in edges:
        mine, theirs = n[..., edge], n[:, :, mirror, edge]
        column = torch.complex(torch.where(upper, mine, theirs), torch.where(upper, theirs, -mine))
        columns.append(torch.where(real, (math.sqrt(2) * mine).to(column.dtype), column))
    inside = w[..., 1:]
    parts = [columns[0][..., None], inside, *(column[..., None] for column in columns[1:])]
    return math.sqrt(height * width / 2) * torch.cat(parts, -1)


def step_row(squares: Tensor, factor: Tensor, norms: str) -> Tensor:
    """(h, sqrt(2 h)) [1 or B, 2] of an adaptive step.

    squares: [B, 2], squared norms of direction and noise of each sample; factor: k [1 or B].
    """
    if norms == "batch":
        direction, noise = squares.sqrt().mean(0)
        h = factor * (noise / direction).square()
    else:
        h = factor * (squares[:, 1] / squares[:, 0])
    return torch.stack([h, (2 * h).sqrt()], 1)


def hartley_ref(value: Tensor, width: int) -> Tensor:
    """Half spectra [..., H, W // 2 + 1] as Hartley spectra [..., H, W]."""
    left, right = value.real - value.imag, value.real + value.imag
    right = right[..., 1 : width // 2 + 1].flip(-1, -2).roll(1, -2)
    return torch.cat([left[..., : (width + 1) // 2], right], -1)


def spectrum_combine_ref(
    spectrum: Tensor,
    hartley: Tensor,
    drift: Tensor,
    gain: Tensor | None,
    row: Tensor,
    noise_spectrum: Tensor | None,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    step: int,
) -> None:
    """The pass between two transforms in plain PyTorch.

    hartley <- that of row_0 drift spectrum + row_1 gain noise. spectrum: [B, C, H, W // 2 + 1],
    complex64 or complex128, the rest as wide, all contiguous; hartley: [B, C, H, W]; drift: [C or
    1, H, W // 2 + 1], real or complex; gain: real, None without noise; row: [1 or B, 2]; noise: its
    spectrum, or drawn for seeds [B] and a stage, or none.
    step: a number of `STEPS`. Unless given, row is (a, k) of an adaptive step (`step_row`), and
    the factors are (a h, sqrt(2 h)).
    """
    if step and noise_spectrum is None and seeds is None:
        raise ValueError("spectrum_combine: an adaptive step needs noise")
    factors = row[..., None, None, None].unbind(1)
    direction = spectrum * drift * factors[0]
    noise = None
    if noise_spectrum is not None and gain is not None:
        noise = noise_spectrum * gain
    elif seeds is not None and gain is not None:
        number = number_of_stage(stage, stage_number)
        noise = spectral_noise_ref(seeds, hartley.shape, number, row.dtype) * gain
    if noise is not None and step:
        squares = [_whole_square(part, hartley.shape[3]) for part in (direction, noise)]
        adaptive = step_row(torch.stack(squares, 1), row[:, 1], STEPS[step]).to(row.dtype)
        factors = adaptive[..., None, None, None].unbind(1)
        direction = factors[0] * direction
    total = direction if noise is None else direction + factors[1] * noise
    hartley.copy_(hartley_ref(total, hartley.shape[3]))


def _whole_square(value: Tensor, width: int) -> Tensor:
    """Squared norms of whole spectra, from their halves: [B], float64."""
    twice = torch.full((value.shape[3],), 2.0, device=value.device, dtype=torch.float64)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    return (value.abs().double().square() * twice).flatten(1).sum(1)


def hartley_add_ref(spectrum: Tensor, x: Tensor | None, y: Tensor) -> None:
    """The pass after the last transform in plain PyTorch: y = x + Re - Im of the whole spectrum.

    spectrum: [B, C, H, W // 2 + 1], contiguous, complex64, or complex128 where y is float64; x: y's
    shape and dtype, None for zeros; y: any float dtype and strides.
    """
    change = hartley_ref(spectrum, y.shape[3])
    y.copy_(change if x is None else x + change)


def half_spectrum(x: Tensor) -> Tensor:
    """rfft2 of images in the arithmetic's dtype, contiguous, which torch's need not be."""
    return torch.fft.rfft2(x).contiguous()


def hartley_like(x: Tensor) -> Tensor:
    """Memory for a Hartley spectrum of images like x: [B, C, H, W] in the arithmetic's dtype."""
    return torch.empty_like(x, dtype=wide_dtype(x), memory_format=torch.contiguous_format)


def inverted(hartley: Tensor, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
    """y = x + rfft2's inverse of a half spectrum, given as its Hartley spectrum.

    y: where it goes; None: over the Hartley spectrum. Returned.
    """
    y = hartley if y is None else y
    torch.ops.fastdiff.hartley_add.default(torch.fft.rfft2(hartley), x, y)
    return y


# == Registration ==================================================================================

_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define(
    "spectrum_combine(Tensor spectrum, Tensor(a!) hartley, Tensor drift, Tensor? gain, Tensor row, "
    "Tensor? noise_spectrum, Tensor? seeds, Tensor? stage, int stage_number, int step) -> ()"
)
_library.define("hartley_add(Tensor spectrum, Tensor? x, Tensor(a!) y) -> ()")


def _combine_cuda(*arguments: Any) -> None:
    from ..kernels.half_spectrum import launch_combine

    *tensors, step = arguments
    launch_combine(*tensors, STEPS[step])


def _add_cuda(*arguments: Tensor) -> None:
    from ..kernels.half_spectrum import launch_add

    launch_add(*arguments)


_has_triton = importlib.util.find_spec("triton") is not None
_library.impl("spectrum_combine", _combine_cuda if _has_triton else spectrum_combine_ref, "CUDA")
_library.impl("hartley_add", _add_cuda if _has_triton else hartley_add_ref, "CUDA")
if not _ext.HAS_EXT:
    _library.impl("spectrum_combine", spectrum_combine_ref, "CPU")
    _library.impl("hartley_add", hartley_add_ref, "CPU")
for _name in ("spectrum_combine", "hartley_add"):
    torch.library.register_fake(f"fastdiff::{_name}", lambda *_: None, lib=_library)
