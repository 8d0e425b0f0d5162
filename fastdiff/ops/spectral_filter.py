"""Images through a frequency response: y = F^-1 [response * F x], batched, real to real.

Preconditioned diffusion sampling (Ma et al. 2022, "Accelerating score-based generative models with
preconditioned diffusion sampling") passes drift and noise of its updates through such operators;
the response is then real and even, a gain for each frequency. Any response with R(-k) = conj R(k)
is taken: it maps real images to real images.

Backends, named by `SpectralResponse.describe`:

- whole image: one Triton launch of products with real bases (kernels/spectral_filter.py), for CUDA
  tensors of up to 64 x 64 (32 x 32 before sm_90), float32 or half precision, and a real response.
- transforms: torch.fft's real transforms, with the scale folded into the response, a pass between
  them and one after (half_spectrum.py): everywhere else.

Arithmetic is float32, float64 for float64 images.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._register import Gradient, launch, needs_gradient, register
from .common import FLOATS, require_device, require_dtype, wide_dtype
from .half_spectrum import spectral_product
from .spectral_operators import SpectralResponse, like, ready

# Of the whole-image kernel: its error in norm, relative to the change that it makes of an image.
# A number's first part in bfloat16 leaves a root mean square of 0.42 * 2^-8 of it; bf16x3 drops
# three products of two such rests, tf32 rounds two operands by 0.42 * 2^-11. Four products in a
# chain, to frequencies and back, double it: 9e-6 and 6e-4. The tiers are about twice as wide.
PRECISIONS = {"exact": 2e-5, "fast": 1e-3}


def spectral_filter(
    x: Tensor, response: Tensor | SpectralResponse, *, precision: str = "exact"
) -> Tensor:
    """y = F^-1 [response * F x], for each image and channel.

    x: [B, C, H, W], any float dtype and strides, H and W of any size.
    response: a `SpectralResponse`, or the tensor that it is made of ([C or 1, H, W], unshifted);
        one is made of a tensor at its first use, which reads it on the host, and kept with it.
    precision: of the whole-image kernel, relative to y in norm for responses near one: "exact"
        2e-6, "fast" 2e-4. Transforms are exact.

    Returns [B, C, H, W] in x's dtype, contiguous. Differentiable in x (the adjoint has the
    conjugate response). Raises TypeError or ValueError naming the argument.
    """
    require_dtype("x", x, *FLOATS)
    if x.ndim != 4:
        raise ValueError(f"x must be [B, C, H, W], got shape {tuple(x.shape)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {tuple(PRECISIONS)}, got {precision!r}")
    made = response if isinstance(response, SpectralResponse) else ready(response)
    _, channels, height, width = x.shape
    if made.channels not in (1, channels) or made.height != height or made.width != width:
        raise ValueError(
            f"response must be [{channels} or 1, {height}, {width}], got "
            f"{(made.channels, made.height, made.width)}"
        )
    require_device("response", made.full, x)
    return _filtered(x, made, precision)


def _filtered(x: Tensor, response: SpectralResponse, precision: str) -> Tensor:
    tables = response.tables(x)
    if tables is None:
        half = response.half(wide_dtype(x))
        if not needs_gradient(x):
            # To dispatch a differentiable op costs as much as to filter a small image.
            return spectral_product(x, half)
        return _filter(x, half, response.half(wide_dtype(x), adjoint=True))
    return _filter_whole(x, *tables, precision)


def spectral_filter_ref(x: Tensor, response: Tensor) -> Tensor:
    """`spectral_filter` in complex transforms, in the arithmetic's dtype: the definition."""
    wide = wide_dtype(x)
    spectrum = torch.fft.fft2(x.to(wide)) * response.to(like(response, wide))
    return torch.fft.ifft2(spectrum).real


def whole_image_ref(x: Tensor, tables: Tensor, row_basis: Tensor, column_basis: Tensor) -> Tensor:
    """What the whole-image kernel computes, in plain PyTorch and the dtype of the tables."""
    height, width = x.shape[2:]
    value = x.to(tables.dtype)
    (row_cos, row_sin), (column_cos, column_sin) = (
        basis[:, :, :size] for basis, size in ((row_basis, height), (column_basis, width))
    )
    t_cc, t_cs, t_sc, t_ss = (
        r @ value @ c.T for r in (row_cos, row_sin) for c in (column_cos, column_sin)
    )
    a_cc, a_cs, a_sc, a_ss, coupling = tables.unbind(1)
    u_cc, u_ss = a_cc * t_cc + coupling * t_ss, a_ss * t_ss + coupling * t_cc
    u_cs, u_sc = a_cs * t_cs - coupling * t_sc, a_sc * t_sc - coupling * t_cs
    change = row_cos.T @ (u_cc @ column_cos + u_cs @ column_sin)
    return value + change + row_sin.T @ (u_sc @ column_cos + u_ss @ column_sin)


# == Registration ==================================================================================


def _empty(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _keep_rest(ctx, inputs, output) -> None:
    _, *ctx.rest = inputs


def _transforms(x: Tensor, half: Tensor, adjoint_half: Tensor) -> Tensor:
    return spectral_product(x, half)


def _adjoint(ctx, upstream: Tensor):
    half, adjoint_half = ctx.rest
    return _filter(upstream, adjoint_half, half), None, None


_filter = register(
    "spectral_filter(Tensor x, Tensor half, Tensor adjoint_half) -> Tensor",
    _transforms,
    fake=_empty,
    gradient=Gradient(_keep_rest, _adjoint),
)


def _plain_whole(
    x: Tensor, tables: Tensor, row_basis: Tensor, column_basis: Tensor, precision: str
) -> Tensor:
    return whole_image_ref(x, tables, row_basis, column_basis).to(x.dtype).contiguous()


_launch_whole = launch("spectral_filter")


def _launched_whole(x: Tensor, *arguments: Any) -> Tensor:
    y = _empty(x)
    _launch_whole(x, y, *arguments)
    return y


def _adjoint_whole(ctx, upstream: Tensor):
    return _filter_whole(upstream, *ctx.rest), *(None for _ in ctx.rest)


_filter_whole = register(
    "spectral_filter_whole(Tensor x, Tensor tables, Tensor row_basis, Tensor column_basis, "
    "str precision) -> Tensor",
    _plain_whole,
    triton=_launched_whole,
    fake=_empty,
    gradient=Gradient(_keep_rest, _adjoint_whole),
)
