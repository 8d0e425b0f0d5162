"""Moves through Fourier space: torch.fft's transforms of real images, and passes over half spectra.

A real image's spectrum is Hermitian, Z(-k) = conj Z(k), and kept as its half [H, W // 2 + 1]. An
inverse transform of it, torch.fft.irfft2, is the slower one: complex along one axis, then real
along the other; on a GPU it copies its input first. Here both ways are the forward real transform,
since the Hartley spectrum h = Re Z - Im Z, a real image, undoes itself (Bracewell 1983):

    y = F^-1 Z    has    Re F h - Im F h = H W y.

So a filter (`spectral_product`) or a move (`spectral_move`) is rfft2, one pass that multiplies,
adds the noise and writes h (combine), rfft2 again, and one pass that ends it and adds the state
(add). The tables hold the scale 1 / (H W).

**The noise.** For a seed, a stage and an image [C, H, W] the standard normals n(c, k, j) are
Philox's (philox.py, purpose 4) of element (c H + k) W' + j, where W' is W rounded up to even. They
are the packed half spectrum of white noise z, F z = sqrt(H W / 2) w with

    w(c, k, m) = n(c, k, 2 m) + i n(c, k, 2 m + 1)          0 < m < W / 2
    w(c, k, m) = n(c, k, e) + i n(c, H - k, e)              0 < k < H / 2,  conjugate at H - k
    w(c, k, m) = sqrt(2) n(c, k, e)                         k = 0 and k = H / 2

for the column m = 0 (e = 0) and, where W is even, m = W / 2 (e = 1). With a pixel gain noise begins
in space: it is that of `multistep_step`.

Backends: C++ on CPU tensors (csrc/half_spectrum.h), one call for the whole; on CUDA tensors the
passes are Triton's (kernels/half_spectrum.py); plain PyTorch without either.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor

from ._register import launch, register
from .common import number_of_stage, wide_dtype
from .constants import SPECTRAL_NOISE, STEPS
from .layout import per_sample
from .philox import philox_normal_ref


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


def combine_ref(
    spectrum: Tensor,
    hartley: Tensor,
    drift: Tensor,
    gain: Tensor | None,
    row: Tensor,
    noise_spectrum: Tensor | None,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    step: str,
) -> None:
    """The pass between two transforms in plain PyTorch.

    hartley <- that of row_0 drift spectrum + row_1 gain noise. spectrum: [B, C, H, W // 2 + 1],
    complex64 or complex128, the rest as wide, all contiguous; hartley: [B, C, H, W]; drift: [C or
    1, H, W // 2 + 1], real or complex; gain: real, None without noise; row: [1 or B, 2]; noise: its
    spectrum, or drawn for seeds [B] and a stage, or none.
    step: one of `STEPS`. Unless it is "given", row is (a, k) of an adaptive step (`step_row`), and
    the factors are (a h, sqrt(2 h)).
    """
    if step != "given" and noise_spectrum is None and seeds is None:
        raise ValueError("spectral_move: an adaptive step needs noise")
    of_direction, of_noise = (per_sample(factor, spectrum) for factor in row.unbind(1))
    direction = spectrum * drift * of_direction
    noise = None
    if noise_spectrum is not None and gain is not None:
        noise = noise_spectrum * gain
    elif seeds is not None and gain is not None:
        number = number_of_stage(stage, stage_number)
        noise = spectral_noise_ref(seeds, hartley.shape, number, row.dtype) * gain
    if noise is not None and step != "given":
        squares = [_whole_square(part, hartley.shape[3]) for part in (direction, noise)]
        adaptive = step_row(torch.stack(squares, 1), row[:, 1], step).to(row.dtype)
        of_direction, of_noise = (per_sample(factor, spectrum) for factor in adaptive.unbind(1))
        direction = of_direction * direction
    total = direction if noise is None else direction + of_noise * noise
    hartley.copy_(hartley_ref(total, hartley.shape[3]))


def _whole_square(value: Tensor, width: int) -> Tensor:
    """Squared norms of whole spectra, from their halves: [B], float64."""
    twice = torch.full((value.shape[3],), 2.0, device=value.device, dtype=torch.float64)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    return (value.abs().double().square() * twice).flatten(1).sum(1)


def add_ref(spectrum: Tensor, x: Tensor | None, y: Tensor) -> None:
    """The pass after the last transform in plain PyTorch: y = x + Re - Im of the whole spectrum.

    spectrum: [B, C, H, W // 2 + 1], contiguous, complex64, or complex128 where y is float64; x: y's
    shape and dtype, None for zeros; y: any float dtype and strides. y may be x: a kernel's program
    reads the elements that it writes, before it writes them, and no others.
    """
    change = hartley_ref(spectrum, y.shape[3])
    y.copy_(change if x is None else x + change)


# == Registration ==================================================================================


def _move(
    combine: Callable[..., None],
    add: Callable[..., None],
    direction: Tensor,
    x: Tensor | None,
    y: Tensor,
    drift: Tensor,
    gain: Tensor | None,
    row: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    step: int,
) -> None:
    """y = x + F^-1 [row_0 drift F direction + row_1 gain F noise], by those two passes.

    direction, noise: [B, C, H, W] in the arithmetic's dtype; x, y: of one dtype, any strides, x
    None for zeros. y may be x, and otherwise shares no memory with it. The rest is `combine_ref`'s,
    but step, a number of `STEPS`.
    """
    if not y.numel():
        return
    wide = wide_dtype(y)
    # The Hartley spectrum goes into y where y can hold it and is not x, which is read after it.
    fits = y.dtype == wide and y.is_contiguous() and (x is None or x.data_ptr() != y.data_ptr())
    hartley = y if fits else torch.empty(y.shape, dtype=wide, device=y.device)
    noise_spectrum = None if noise is None else _half_spectrum(noise)
    combine(
        _half_spectrum(direction),
        hartley,
        drift,
        gain,
        row,
        noise_spectrum,
        seeds,
        stage,
        stage_number,
        STEPS[step],
    )
    add(_half_spectrum(hartley), x, y)


def _product(
    combine: Callable[..., None], add: Callable[..., None], x: Tensor, table: Tensor
) -> Tensor:
    """F^-1 [table F x] by those two passes, in x's dtype, contiguous.

    x: [B, C, H, W], any float dtype and strides; table: [C or 1, H, W // 2 + 1], real or complex,
    in the arithmetic's dtype.
    """
    wide, y = wide_dtype(x), torch.empty_like(x, memory_format=torch.contiguous_format)
    row = _one_and_zero(wide, x.device)
    given = STEPS.index("given")
    _move(combine, add, x.to(wide), None, y, table, None, row, None, None, None, 0, given)
    return y


@cache
def _one_and_zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([[1.0, 0.0]], dtype=dtype, device=device)


def _half_spectrum(x: Tensor) -> Tensor:
    """rfft2, contiguous, which torch's need not be."""
    return torch.fft.rfft2(x).contiguous()


spectral_move_ref = partial(_move, combine_ref, add_ref)
spectral_product_ref = partial(_product, combine_ref, add_ref)
_on_triton = launch("half_spectrum", "launch_combine"), launch("half_spectrum", "launch_add")

spectral_move = register(
    "spectral_move(Tensor direction, Tensor? x, Tensor(a!) y, Tensor drift, Tensor? gain, "
    "Tensor row, Tensor? noise, Tensor? seeds, Tensor? stage, int stage_number, int step) -> ()",
    spectral_move_ref,
    triton=partial(_move, *_on_triton),
)
spectral_product = register(
    "spectral_product(Tensor x, Tensor table) -> Tensor",
    spectral_product_ref,
    triton=partial(_product, *_on_triton),
    fake=lambda x, _: x.new_empty(x.shape),
)
