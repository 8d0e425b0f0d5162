"""Sampling moves through a preconditioner: two transforms for the whole, a third of given noise.

Preconditioned diffusion sampling (Ma et al. 2022) passes the drift of an update through D = M M^T
and its noise through M = F^-1 R F A, with a gain R for each frequency and A for each pixel:

    x' = x + D (b x + a s) + c M z                                     the predictors
    x' = x + h D (b x + a s) + sqrt(2 h) M z,   h = k (|M z| / |D (b x + a s)|)^2   Langevin

with x the state, s the score (or the network's output) and z white noise. Without a pixel gain
both parts live in Fourier space, x' = x + F^-1 [R^2 (b x^ + a s^) + c R z^], and the noise is born
there; the norms of an adaptive step come from the spectra (Parseval), on the device. A skew part
may be added to D: S = F^-1 i q F with q odd, which leaves the stationary law of Langevin dynamics
alone.

Backends, named by `SpectralGains.describe`:

- whole image: one Triton launch (two for an adaptive step) of products with real bases
  (kernels/spectral_update.py), for CUDA tensors of up to 64 x 64 (32 x 32 before sm_90), in float32
  or half precision, without a pixel gain, a skew part or noise that is given.
- transforms: torch.fft's real transforms, a fused pass between them and one after
  (half_spectrum.py, which also defines the noise): C++ on CPU tensors, Triton on CUDA tensors,
  plain PyTorch without either.

Arithmetic is float32, float64 for float64 images.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._register import launch, register
from .common import (
    FLOATS,
    forbid_gradient,
    require_device,
    require_dtype,
    require_seeds,
    require_shape,
    stage_argument,
    wide_dtype,
)
from .constants import STEPS
from .half_spectrum import spectral_move, spectral_product, step_row
from .layout import per_sample
from .multistep_step import drawn_noise
from .spectral_filter import PRECISIONS
from .spectral_operators import SpectralGains, SpectralResponse, gains_ready

NORMS = STEPS[1:]


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
    precision: of the whole-image kernel, relative in norm to the change x' - x: "exact" 2e-5,
        "fast" 1e-3. Transforms are exact.

    Returns x's dtype and layout. Not differentiable. Raises TypeError or ValueError naming the
    argument.
    """
    return _moved(
        "spectral_predictor", x, score, gains, coefficients, seeds, stage, noise, precision, "given"
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
        raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got {precision!r}")
    made = gains_ready(gains)
    if made.channels not in (1, x.shape[1]) or made.size != tuple(x.shape[2:]):
        raise ValueError(
            f"gains must be [{x.shape[1]} or 1, {x.shape[2]}, {x.shape[3]}], "
            f"got {(made.channels, *made.size)}"
        )
    require_device("gains", made.gain.full, x)
    row = coefficients.contiguous()
    told, number = stage_argument(stage, x)
    return spectral_update_unchecked(
        x, score, made, row, seeds, told, number, noise, precision, norms
    )


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
    y: Tensor | None = None,
) -> Tensor:
    """Either move on checked arguments, into y, which is returned.

    norms: how the step is found, one of `STEPS`; "given" for the predictor's.
    y: x's shape and dtype, any strides. It may be x itself, which is then moved in place, and
        otherwise shares no memory with x. None: a fresh tensor in x's memory order.
    """
    step = STEPS.index(norms)
    y = torch.empty_like(x) if y is None else y
    tables = gains.tables(x) if noise is None else None
    if tables is not None:
        _update_whole(
            x, score, y, coefficients, *tables, seeds, stage, stage_number, precision, step
        )
        return y
    wide = wide_dtype(x)
    drift, gain = gains.drift.half(wide), gains.gain.half(wide)
    # As one op only where a graph is traced: to dispatch it costs as much as a small image.
    run = _update if torch.compiler.is_compiling() else _transforms
    run(
        x, score, y, coefficients, drift, gain, gains.pixel, noise, seeds, stage, stage_number, step
    )
    return y


# == References ====================================================================================


def spectral_update_ref(
    x: Tensor,
    score: Tensor,
    gains: SpectralGains,
    coefficients: Tensor,
    z: Tensor | None = None,
    norms: str = "given",
) -> Tensor:
    """Either move by complex transforms, with the noise z [B, C, H, W] given: the definition."""
    wide = wide_dtype(x)
    *b, a, last = (per_sample(c, x) for c in coefficients.unbind(1))
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
    if norms != "given":
        assert coloured is not None
        sizes = torch.stack([image.flatten(1).norm(dim=1) for image in (direction, coloured)], 1)
        found = step_row(sizes.square(), last.flatten(), norms)
        h, last = (per_sample(c, x) for c in found.unbind(1))
        direction = h * direction
    changed = x.to(wide) + direction
    return (changed if coloured is None else changed + last * coloured).to(x.dtype)


# == Registration ==================================================================================


def _transforms(
    x: Tensor,
    score: Tensor,
    y: Tensor,
    coefficients: Tensor,
    drift: Tensor,
    gain: Tensor,
    pixel: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    step: int,
) -> None:
    """Real transforms and the passes between and after them; the tables hold the scale."""
    wide = wide_dtype(x)
    direction, row = _direction(x, score, coefficients)
    direction = direction if direction.dtype == wide else direction.to(wide)
    if pixel is not None:
        direction = spectral_product(direction, gain) * pixel.to(wide).square()
        if noise is None and seeds is not None:
            noise = drawn_noise(x, seeds, stage, stage_number)
        noise, seeds = None if noise is None else pixel.to(wide) * noise.to(wide), None
    noise = None if noise is None else noise.to(wide)
    spectral_move(direction, x, y, drift, gain, row, noise, seeds, stage, stage_number, step)


def _direction(x: Tensor, score: Tensor, coefficients: Tensor) -> tuple[Tensor, Tensor]:
    """What is transformed, the score or b x + a s, and the factors [1 or B, 2] that are left."""
    if coefficients.shape[1] == 2:
        return score, coefficients
    b, a = (per_sample(c, x) for c in coefficients[:, :2].unbind(1))
    direction = torch.addcmul(a * score.to(b.dtype), b, x.to(b.dtype))
    return direction, torch.cat([torch.ones_like(coefficients[:, :1]), coefficients[:, 2:]], 1)


_update = register(
    "spectral_update(Tensor x, Tensor score, Tensor(a!) y, Tensor coefficients, Tensor drift, "
    "Tensor gain, Tensor? pixel, Tensor? noise, Tensor? seeds, Tensor? stage, int stage_number, "
    "int step) -> ()",
    _transforms,
)


_launch_whole = launch("spectral_update", "launch_whole")


def _launched_whole(
    x: Tensor,
    score: Tensor,
    y: Tensor,
    coefficients: Tensor,
    drift: Tensor,
    gain: Tensor,
    row_basis: Tensor,
    column_basis: Tensor,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    precision: str,
    step: int,
) -> None:
    """One launch, two for an adaptive step. y may be x: a program reads its image before it writes
    it, and no other's."""
    direction, row = _direction(x, score, coefficients)
    tables = drift, gain, row_basis, column_basis
    _launch_whole(x, y, row, direction, *tables, seeds, stage, stage_number, precision, STEPS[step])


_update_whole = register(
    "spectral_update_whole(Tensor x, Tensor score, Tensor(a!) y, Tensor coefficients, "
    "Tensor drift, Tensor gain, Tensor row_basis, Tensor column_basis, Tensor? seeds, "
    "Tensor? stage, int stage_number, str precision, int step) -> ()",
    None,  # without Triton nothing makes its tables
    triton=_launched_whole,
)
