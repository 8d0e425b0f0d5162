"""Sampling moves through a preconditioner: one forward and one inverse transform for the whole.

Preconditioned diffusion sampling (Ma et al. 2022) passes the drift of an update through D = M M^T
and its noise through M = F^-1 R F A, with a gain R for each frequency and A for each pixel:

    x' = x + D (b x + a s) + c M z                                     the predictors
    x' = x + h D (b x + a s) + sqrt(2 h) M z,   h = k (|M z| / |D (b x + a s)|)^2   Langevin

with x the state, s the score (or the network's output) and z white noise. Without a pixel gain
both parts live in Fourier space, x' = x + F^-1 [R^2 (b x^ + a s^) + c R z^], and the noise is born
there; the norms of an adaptive step come from the spectra (Parseval), on the device. A skew part
may be added to D: S = F^-1 i q F with q odd, which leaves the stationary law of Langevin dynamics
alone.

**The noise.** For a seed, a stage and an image [C, H, W] the standard normals n(c, k, j) are
Philox's (philox.py, purpose 4) of element (c H + k) W' + j, where W' is W rounded up to even. They
are the packed half spectrum of white noise z, F z = sqrt(H W / 2) w with

    w(c, k, m) = n(c, k, 2 m) + i n(c, k, 2 m + 1)          0 < m < W / 2
    w(c, k, m) = n(c, k, e) + i n(c, H - k, e)              0 < k < H / 2,  conjugate at H - k
    w(c, k, m) = sqrt(2) n(c, k, e)                         k = 0 and k = H / 2

for the column m = 0 (e = 0) and, where W is even, m = W / 2 (e = 1). With a pixel gain noise begins
in space: it is that of `multistep_step`.

Backends, named by `SpectralGains.describe`:

- whole image: one Triton launch (two for an adaptive step) of products with real bases
  (kernels/spectral_update.py), for CUDA tensors of up to 64 x 64 (32 x 32 before sm_90), in float32
  or half precision, without a pixel gain, a skew part or noise that is given.
- transforms: torch.fft's real transforms around one fused pass over the half spectrum, C++ on CPU
  tensors (csrc/cpu/spectral.cpp), Triton on CUDA tensors; plain PyTorch without either.

Arithmetic is float32, float64 for float64 images.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import Tensor

from .. import _ext
from .common import (
    FLOATS,
    forbid_gradient,
    number_of_stage,
    require_device,
    require_dtype,
    require_seeds,
    require_shape,
    stage_argument,
    wide_dtype,
)
from .multistep_step import stage_noise
from .philox import philox_normal_ref
from .spectral_filter import (
    PRECISIONS,
    SpectralResponse,
    fits_a_program,
    mirrored,
    multiply,
    ready,
    whole_image_tables,
)

SPECTRAL_NOISE = 4  # a Philox purpose
NORMS = ("sample", "batch")


class SpectralGains:
    """The operators M and D (+ S) of an update, made ready: checked once, with their tables.

    Args:
        frequency: R, a real `SpectralResponse`, or the tensor it is made of ([C or 1, H, W] in
            torch.fft's unshifted order).
        pixel: A [C or 1, H, W], float32 or float64; None: ones.
        skew: q [C or 1, H, W], real and odd, q(-k) = -q(k): adds F^-1 i q F to D. None: zeros.

    Raises TypeError or ValueError naming the gain.
    """

    def __init__(
        self,
        frequency: Tensor | SpectralResponse,
        pixel: Tensor | None = None,
        skew: Tensor | None = None,
    ) -> None:
        gain = (
            frequency if isinstance(frequency, SpectralResponse) else ready(frequency, "frequency")
        )
        if not gain.is_real:
            raise TypeError(f"frequency must be real, got {gain.full.dtype}")
        self.gain, self.pixel = gain, pixel
        for name, other in (("pixel", pixel), ("skew", skew)):
            if other is None:
                continue
            require_dtype(name, other, torch.float32, torch.float64)
            if other.ndim != 3 or other.shape[1:] != gain.full.shape[1:]:
                raise ValueError(f"{name} must be [C or 1, {gain.height}, {gain.width}], got "
                                 f"{tuple(other.shape)}")  # fmt: skip
            require_device(name, other, gain.full)
        counts = {len(t) for t in (gain.full, pixel, skew) if t is not None} - {1}
        if len(counts) > 1:
            raise ValueError(f"frequency, pixel and skew must agree in channels, got {counts}")
        self.channels = max({1, *counts})
        if pixel is not None:
            if skew is not None:
                raise ValueError("skew must come without pixel: it adds to D = F^-1 R^2 F alone")
            self.drift = gain  # on either side of the pixel gain
        else:
            squared = gain.full.double().square()
            if skew is not None:
                squared = torch.complex(*torch.broadcast_tensors(squared, _odd(skew).to(squared)))
            self.drift = SpectralResponse(squared)
        self._tables: tuple[Tensor, ...] | None = None
        if self.drift.has_tables and pixel is None:
            drift, row_basis, column_basis = whole_image_tables(self.drift.full)
            noise, _, _ = whole_image_tables(gain.full, less=0.0)
            self._tables = drift, noise, row_basis, column_basis

    @property
    def size(self) -> tuple[int, int]:
        return self.gain.height, self.gain.width

    @property
    def device(self) -> torch.device:
        return self.gain.device

    def tables(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """What the whole-image kernel reads; None where it does not serve."""
        if self._tables is None or x.device.type != "cuda" or x.dtype == torch.float64:
            return None
        return self._tables if fits_a_program(*self.size, x.device) else None

    def describe(self, x: Tensor) -> str:
        """Which backend serves images like x."""
        if self.tables(x) is not None:
            return "whole image: one Triton launch, two for an adaptive step"
        if self.pixel is not None:
            return "transforms: torch.fft twice around the pixel gain"
        here = {"cuda": _has_triton and "Triton", "cpu": _ext.HAS_EXT and "C++"}
        by = here.get(x.device.type) or "PyTorch"
        return f"transforms: torch.fft around one pass by {by}"


def spectral_predictor(
    x: Tensor,
    score: Tensor,
    gains: SpectralGains | SpectralResponse | Tensor,
    coefficients: Tensor,
    seeds: Tensor | None = None,
    stage: int | Tensor = 0,
    *,
    noise: Tensor | None = None,
    precision: str = "exact",
) -> Tensor:
    """x' = x + D (b x + a score) + c M z: the move of a preconditioned predictor.

    x: [B, C, H, W], any float dtype and strides. score: the same shape, any float dtype.
    gains: `SpectralGains`, or the frequency gain that they are made of.
    coefficients: [1 or B, 2]: a, c; or [1 or B, 3]: b, a, c; float32, or float64 where x is.
    seeds: [B] int64, one an image; stage: which draw it is, a number or int32 [1] on the device.
    noise: z itself, x's shape, any float dtype, in place of seeds. Neither: c is of no account.
    precision: of the whole-image kernel, relative in norm to the change x' - x: "exact" 1e-5,
        "fast" 1e-3. Transforms are exact.

    Returns x's dtype and layout. Not differentiable. Raises TypeError or ValueError naming the
    argument.
    """
    return _moved(
        "spectral_predictor", x, score, gains, coefficients, seeds, stage, noise, precision, ""
    )


def spectral_langevin(
    x: Tensor,
    score: Tensor,
    gains: SpectralGains | SpectralResponse | Tensor,
    coefficients: Tensor,
    seeds: Tensor | None = None,
    stage: int | Tensor = 0,
    *,
    norms: str = "sample",
    noise: Tensor | None = None,
    precision: str = "exact",
) -> Tensor:
    """x' = x + h g + sqrt(2 h) M z with g = D (b x + a score) and h = k (|M z| / |g|)^2.

    The Langevin corrector of Song et al. (2021, algorithm 4) through a preconditioner: k is
    2 snr^2, times the schedule's step ratio of alpha^2 where variance is preserved. A fixed step h
    is `spectral_predictor` with a = h, c = sqrt(2 h).

    coefficients: [1 or B, 2]: a, k; or [1 or B, 3]: b, a, k.
    norms: |.| of each "sample", or their means over the "batch", as published: there the result for
        an image depends on its neighbours.

    Else as `spectral_predictor`; seeds or noise must be given. A direction of zero has no step: the
    sample becomes NaN.
    """
    if norms not in NORMS:
        raise ValueError(f"norms must be one of {NORMS}, got {norms!r}")
    if seeds is None and noise is None:
        raise ValueError("seeds or noise must be given, got neither")
    return _moved(
        "spectral_langevin", x, score, gains, coefficients, seeds, stage, noise, precision, norms
    )


def _moved(
    name: str,
    x: Tensor,
    score: Tensor,
    gains: SpectralGains | SpectralResponse | Tensor,
    coefficients: Tensor,
    seeds: Tensor | None,
    stage: int | Tensor,
    noise: Tensor | None,
    precision: str,
    norms: str,
) -> Tensor:
    require_dtype("x", x, *FLOATS)
    if x.ndim != 4:
        raise ValueError(f"x must be [B, C, H, W], got shape {tuple(x.shape)}")
    forbid_gradient(name, x, score, coefficients, noise)
    for other, tensor in (("score", score), ("noise", noise)):
        if tensor is not None:
            require_dtype(other, tensor, *FLOATS)
            require_shape(other, tensor, tuple(x.shape))
            require_device(other, tensor, x)
    require_dtype("coefficients", coefficients, wide_dtype(x))
    require_shape("coefficients", coefficients, *((n, m) for n in {1, len(x)} for m in (2, 3)))
    require_device("coefficients", coefficients, x)
    if seeds is not None:
        require_seeds(seeds, x)
        if noise is not None:
            raise ValueError("at most one of seeds and noise may be given, got both")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")
    made = _made_ready(gains)
    if made.channels not in (1, x.shape[1]) or made.size != tuple(x.shape[2:]):
        raise ValueError(f"gains must be [{x.shape[1]} or 1, {x.shape[2]}, {x.shape[3]}], got "
                         f"{(made.channels, *made.size)}")  # fmt: skip
    require_device("gains", made.gain.full, x)
    return spectral_update_unchecked(
        x, score, made, coefficients.contiguous(), seeds, *stage_argument(stage, x), noise,
        precision, norms,
    )  # fmt: skip


def spectral_update_unchecked(
    x: Tensor,
    score: Tensor,
    gains: SpectralGains,
    coefficients: Tensor,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    noise: Tensor | None,
    precision: str,
    norms: str,
) -> Tensor:
    """Either move on checked arguments; norms: "" for the predictor's."""
    tables = gains.tables(x) if noise is None else None
    if tables is not None:
        return torch.ops.fastdiff.spectral_update_whole.default(
            x, score, coefficients, *tables, seeds, stage, stage_number, precision, norms
        )
    wide = wide_dtype(x)
    # As one op only where a graph is traced: to dispatch it costs as much as a small image.
    run = torch.ops.fastdiff.spectral_update.default if torch.compiler.is_compiling() else _update
    return run(
        x, score, coefficients, gains.drift.half(wide), gains.gain.half(wide), gains.pixel, noise,
        seeds, stage, stage_number, norms,
    )  # fmt: skip


def _made_ready(gains: SpectralGains | SpectralResponse | Tensor) -> SpectralGains:
    if isinstance(gains, SpectralGains):
        return gains
    response = gains if isinstance(gains, SpectralResponse) else ready(gains, "gains")
    if "gains" not in response.kept:
        response.kept["gains"] = SpectralGains(response)
    return response.kept["gains"]


def _odd(skew: Tensor) -> Tensor:
    """The skew part's q, checked."""
    off, largest = float((skew + mirrored(skew)).abs().max()), float(skew.abs().max())
    if not off <= 1e-6 * largest:
        raise ValueError(f"skew must be odd, q(-k) = -q(k), got entries off by {off:.2g}")
    return skew


# == References ====================================================================================


def spectral_update_ref(
    x: Tensor,
    score: Tensor,
    gains: SpectralGains,
    coefficients: Tensor,
    z: Tensor | None = None,
    norms: str = "",
) -> Tensor:
    """Either move by complex transforms, with the noise z [B, C, H, W] given: the definition."""
    wide = wide_dtype(x)
    *b, a, last = coefficients.T[..., None, None, None]  # [1 or B, 1, 1, 1] each
    direction = a * score.to(wide) + (b[0] * x.to(wide) if b else 0)

    def through(response: SpectralResponse, image: Tensor) -> Tensor:
        full = response.full.to(torch.complex128 if wide == torch.float64 else torch.complex64)
        return torch.fft.ifft2(torch.fft.fft2(image) * full).real

    direction, coloured = through(gains.drift, direction), None
    if gains.pixel is not None:
        direction = through(gains.gain, gains.pixel.to(wide).square() * direction)
    if z is not None:
        z = z.to(wide) if gains.pixel is None else gains.pixel.to(wide) * z.to(wide)
        coloured = through(gains.gain, z)
    if norms:
        assert coloured is not None
        sizes = torch.stack([image.flatten(1).norm(dim=1) for image in (direction, coloured)], 1)
        h, root = step_row(sizes.square(), last.flatten(), norms)[..., None, None, None].unbind(1)
        direction, last = h * direction, root
    changed = x.to(wide) + direction
    return (changed if coloured is None else changed + last * coloured).to(x.dtype)


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


# == The passes ====================================================================================


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


def _update(
    x: Tensor,
    score: Tensor,
    coefficients: Tensor,
    drift: Tensor,
    gain: Tensor,
    pixel: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    norms: str,
) -> Tensor:
    """Real transforms around one pass over the half spectrum; the tables hold the scale."""
    y = torch.empty_like(x)
    if not x.numel():
        return y
    wide = wide_dtype(x)
    direction, row = _direction(x, score, coefficients)
    direction = direction.to(wide)
    if pixel is not None:
        direction = _filtered(direction, gain) * pixel.to(wide).square()
        if noise is None and seeds is not None:
            noise = stage_noise(x, seeds, stage, stage_number)
        noise, seeds = None if noise is None else pixel.to(wide) * noise.to(wide), None
    spectrum = torch.fft.rfft2(direction)
    noise_spectrum = None if noise is None else torch.fft.rfft2(noise.to(wide))

    def combine(row: Tensor, norms: Tensor | None = None) -> None:
        torch.ops.fastdiff.spectrum_combine.default(
            _real(spectrum), x.shape[3], _real(drift), gain, row, _real(noise_spectrum), seeds,
            stage, stage_number, norms,
        )  # fmt: skip

    if norms:
        squares = torch.empty((len(x), 2), dtype=torch.float64, device=x.device)
        combine(row, squares)
        row = _stepped(row, squares.to(wide), norms)
    combine(row)
    change = torch.fft.irfft2(spectrum, s=x.shape[2:], norm="forward")
    return torch.add(x, change.to(x.dtype), out=y) if x.dtype == wide else y.copy_(x + change)


def _stepped(row: Tensor, squares: Tensor, norms: str) -> Tensor:
    """The factors (a h, sqrt(2 h)) of an adaptive step, from (a, k)."""
    steps = step_row(squares, row[:, 1], norms)
    return torch.stack([row[:, 0] * steps[:, 0], steps[:, 1]], 1)


def _direction(x: Tensor, score: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """What is transformed, the score or b x + a s, and the factors [1 or B, 2] that are left."""
    if coefficients.shape[1] == 2:
        return score, coefficients
    b, a = (c[:, None, None, None] for c in coefficients[:, :2].unbind(1))
    direction = torch.addcmul(a * score.to(b.dtype), b, x.to(b.dtype))
    return direction, torch.cat([torch.ones_like(coefficients[:, :1]), coefficients[:, 2:]], 1)


def _filtered(image: Tensor, half: Tensor) -> Tensor:
    spectrum = torch.fft.rfft2(image)
    multiply(spectrum, half, image.shape[3])
    return torch.fft.irfft2(spectrum, s=image.shape[2:], norm="forward")


def _real(values: Tensor | None) -> Tensor | None:
    """Complex numbers as pairs of real ones."""
    return torch.view_as_real(values) if values is not None and values.is_complex() else values


def spectrum_combine_ref(
    spectrum: Tensor,
    width: int,
    drift: Tensor,
    gain: Tensor | None,
    row: Tensor,
    noise_spectrum: Tensor | None,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    norms: Tensor | None,
) -> None:
    """The pass over the half spectrum in plain PyTorch; complex numbers as pairs.

    spectrum <- row_0 drift spectrum + row_1 gain noise, in place; no gain where there is no noise.
    With norms [B, 2], float64, only the squared norms of row_0 drift spectrum and gain noise, in
    one unit.
    """
    value = torch.view_as_complex(spectrum)
    factors = row[..., None, None, None].unbind(1)
    direction = value * (torch.view_as_complex(drift) if drift.ndim == 4 else drift) * factors[0]
    noise = None
    if noise_spectrum is not None and gain is not None:
        noise = torch.view_as_complex(noise_spectrum) * gain
    elif seeds is not None and gain is not None:
        shape = torch.Size((*value.shape[:3], width))
        number = number_of_stage(stage, stage_number)
        noise = spectral_noise_ref(seeds, shape, number, row.dtype) * gain
    if norms is None:
        value.copy_(direction if noise is None else direction + factors[1] * noise)
        return
    twice = torch.full((value.shape[3],), 2.0, device=row.device, dtype=torch.float64)
    twice[0] = 1
    if width % 2 == 0:
        twice[-1] = 1
    norms.zero_()
    for column, part in enumerate((direction, noise)):
        if part is not None:
            norms[:, column] = (part.abs().double().square() * twice).flatten(1).sum(1)


# == Registration ==================================================================================

_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define(
    "spectral_update(Tensor x, Tensor score, Tensor coefficients, Tensor drift, Tensor gain, "
    "Tensor? pixel, Tensor? noise, Tensor? seeds, Tensor? stage, int stage_number, str norms) "
    "-> Tensor"
)
_library.define(
    "spectral_update_whole(Tensor x, Tensor score, Tensor coefficients, Tensor drift, Tensor gain, "
    "Tensor row_basis, Tensor column_basis, Tensor? seeds, Tensor? stage, int stage_number, "
    "str precision, str norms) -> Tensor"
)
_library.define(
    "spectrum_combine(Tensor(a!) spectrum, int width, Tensor drift, Tensor? gain, Tensor row, "
    "Tensor? noise_spectrum, Tensor? seeds, Tensor? stage, int stage_number, Tensor(b!)? norms) "
    "-> ()"
)


def _whole(
    x: Tensor,
    score: Tensor,
    coefficients: Tensor,
    drift: Tensor,
    gain: Tensor,
    row_basis: Tensor,
    column_basis: Tensor,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    precision: str,
    norms: str,
) -> Tensor:
    from ..kernels.spectral_update import launch_whole

    y = torch.empty_like(x)
    direction, row = _direction(x, score, coefficients)
    tensors = (
        direction, drift, gain, row_basis, column_basis, seeds, stage, stage_number, precision
    )  # fmt: skip
    if norms:
        parts = torch.empty((*x.shape[:2], 2), dtype=torch.float32, device=x.device)
        launch_whole(x, parts, row, *tensors, norms=True)
        row = _stepped(row, parts.sum(1), norms)
    launch_whole(x, y, row, *tensors)
    return y


def _combine_cuda(*arguments: object) -> None:
    from ..kernels.spectral_update import launch_combine

    launch_combine(*arguments)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty_like(x)


_has_triton = importlib.util.find_spec("triton") is not None
for _device in ("CPU", "CUDA"):
    _library.impl("spectral_update", _update, _device)
_library.impl("spectrum_combine", _combine_cuda if _has_triton else spectrum_combine_ref, "CUDA")
if not _ext.HAS_EXT:
    _library.impl("spectrum_combine", spectrum_combine_ref, "CPU")
if _has_triton:
    _library.impl("spectral_update_whole", _whole, "CUDA")
for _name in ("spectral_update", "spectral_update_whole"):
    torch.library.register_fake(f"fastdiff::{_name}", _fake, lib=_library)
torch.library.register_fake("fastdiff::spectrum_combine", lambda *_: None, lib=_library)
