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

import importlib.util
import math
import warnings
import weakref
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .common import FLOATS, require_device, require_dtype, wide_dtype
from .half_spectrum import spectral_product

LARGEST_WHOLE = 64  # sides that one program holds
# Of the whole-image kernel: its error in norm, relative to the change that it makes of an image.
# A number's first part in bfloat16 leaves a root mean square of 0.42 * 2^-8 of it; bf16x3 drops
# three products of two such rests, tf32 rounds two operands by 0.42 * 2^-11. Four products in a
# chain, to frequencies and back, double it: 9e-6 and 6e-4. The tiers are about twice as wide.
PRECISIONS = {"exact": 2e-5, "fast": 1e-3}
UNEVEN = 1e-6  # of the largest entry: a response further from its mirror image is warned of


class SpectralResponse:
    """A response made ready: checked once, with the tables that the backends read.

    Making one reads the response on the host; using it does not, so a captured loop needs it ready.

    Args:
        values: [C or 1, H, W] in torch.fft's unshifted order (zero frequency first): real, or
            complex with R(-k) = conj R(k). float32 or float64, complex64 or complex128.

    What is not point-symmetric is made so, (R(k) + conj R(-k)) / 2, with a warning: the real part
    of F^-1 [R F x] depends on that alone. Raises TypeError or ValueError for values that are no
    response.
    """

    def __init__(self, values: Tensor) -> None:
        kinds = (torch.float32, torch.float64, torch.complex64, torch.complex128)
        require_dtype("response", values, *kinds)
        if values.ndim != 3 or not values.numel():
            raise ValueError(f"response must be [C or 1, H, W], got shape {tuple(values.shape)}")
        values = values.detach()
        if not bool(torch.isfinite(torch.view_as_real(values) if values.is_complex() else values)
                    .all()):  # fmt: skip
            raise ValueError("response must be finite, got NaN or infinite entries")
        even = (values + mirrored(values).conj()) / 2
        off, largest = float((even - values).abs().max()), float(values.abs().max())
        if off > UNEVEN * largest:
            warnings.warn(
                f"response is not point-symmetric (off by {off:.2g}, largest entry {largest:.2g}): "
                "what makes an image complex is left out",
                stacklevel=2,
            )
        self.full = even.resolve_conj()
        channels, self.height, self.width = values.shape
        self.channels = channels
        self.is_real = not values.is_complex()
        self._halves: dict[tuple[torch.dtype, bool], Tensor] = {}
        self.whole: tuple[Tensor, Tensor, Tensor] | None = None  # tables for whole images
        self.kept: dict[str, Any] = {}  # what other ops make of it, for as long as it lives
        if self.is_real and max(self.height, self.width) <= LARGEST_WHOLE:
            self.whole = whole_image_tables(self.full)

    @property
    def device(self) -> torch.device:
        return self.full.device

    def half(self, dtype: torch.dtype, adjoint: bool = False) -> Tensor:
        """[C or 1, H, W // 2 + 1] over H W, for arithmetic in dtype; the adjoint's is conjugate."""
        key = (dtype, adjoint and not self.is_real)
        if key not in self._halves:
            kept = self.full[:, :, : self.width // 2 + 1]
            kept = kept.to(_like(kept, dtype)) / (self.height * self.width)
            self._halves[key] = (kept.conj() if key[1] else kept).resolve_conj().contiguous()
        return self._halves[key]

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """What the whole-image kernel reads; None where it does not serve."""
        if not x.is_cuda or self.whole is None or x.dtype == torch.float64:
            return None
        return self.whole if fits_a_program(self.height, self.width, x.device) else None

    def describe(self, x: Tensor) -> str:
        """Which backend serves images like x."""
        if self.tables(x) is not None:
            return "whole image: one Triton launch"
        return "transforms: torch.fft, the scale folded in, a pass between and one after"


@cache
def fits_a_program(height: int, width: int, device: torch.device) -> bool:
    """Whether the whole-image kernel serves that size on that GPU."""
    if not _has_triton:
        return False
    from ..kernels.spectral_filter import serves

    return serves(height, width, torch.cuda.get_device_capability(device))


_prepared: dict[int, tuple[weakref.ref[Tensor], int, SpectralResponse]] = {}


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
        if not (torch.compiler.is_compiling() or x.requires_grad):
            # The differentiable op costs as much to dispatch as a small image does.
            return spectral_product(x, half)
        adjoint = response.half(wide_dtype(x), adjoint=True)
        return torch.ops.fastdiff.spectral_filter.default(x, half, adjoint)
    return torch.ops.fastdiff.spectral_filter_whole.default(x, *tables, precision)


def ready(response: Tensor, name: str = "response") -> SpectralResponse:
    """The response of a tensor, made once for each of its states."""
    require_dtype(name, response, torch.float32, torch.float64, torch.complex64,
                  torch.complex128)  # fmt: skip
    if response.is_inference():
        return SpectralResponse(response)
    known = _prepared.get(id(response))
    if known is not None and known[0]() is response and known[1] == response._version:
        return known[2]
    made = SpectralResponse(response)
    key = id(response)
    gone = weakref.ref(response, lambda _: _prepared.pop(key, None))
    _prepared[key] = (gone, response._version, made)
    return made


def spectral_filter_ref(x: Tensor, response: Tensor) -> Tensor:
    """`spectral_filter` in complex transforms, in the arithmetic's dtype: the definition."""
    wide = wide_dtype(x)
    spectrum = torch.fft.fft2(x.to(wide)) * response.to(_like(response, wide))
    return torch.fft.ifft2(spectrum).real


def mirrored(values: Tensor) -> Tensor:
    """values(-k): both last axes reversed around their first entry."""
    return values.flip((-2, -1)).roll((1, 1), (-2, -1))


# == Tables of the whole-image kernel ==============================================================


@cache
def real_basis(size: int) -> np.ndarray:
    """Cosines and sines of an axis as [2, P / 2, P], P = 32 or 64: orthonormal, zero beyond `size`.

    Row k has frequency k; the first row of sines has the Nyquist frequency, a cosine too, or
    nothing for odd sizes.
    """
    padded = 32 if size <= 32 else 64
    basis = np.zeros((2, padded // 2, padded))
    at = np.arange(size)
    for k in range((size + 1) // 2):
        angle = 2 * np.pi * (k * at % size) / size
        basis[0, k, :size] = np.cos(angle) * math.sqrt((2 if k else 1) / size)
        if k:
            basis[1, k, :size] = np.sin(angle) * math.sqrt(2 / size)
    if size % 2 == 0:
        basis[1, 0, :size] = (1 - 2 * (at % 2)) / math.sqrt(size)
    return basis


def whole_image_tables(full: Tensor, less: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(tables [C, 5, P / 2, P' / 2] of response - less, basis of rows, basis of columns)."""
    values = full.double().cpu().numpy() - less
    height, width = values.shape[1:]
    bases = [real_basis(side) for side in (height, width)]
    half_height, half_width = (basis.shape[1] for basis in bases)
    tables = np.zeros((len(values), 5, half_height, half_width))

    def frequencies(size: int, sines: bool) -> np.ndarray:
        k = np.arange((size + 1) // 2)
        if sines:
            k[0] = size // 2  # the Nyquist frequency, where there is one
        return k

    for number, (row_sines, column_sines) in enumerate(
        ((False, False), (False, True), (True, False), (True, True))
    ):
        rows = frequencies(height, row_sines)[:, None]
        columns = frequencies(width, column_sines)[None, :]
        plus, minus = values[:, rows, columns], values[:, rows, -columns % width]
        tables[:, number, : rows.shape[0], : columns.shape[1]] = (plus + minus) / 2
        if number == 0:
            coupling = (minus - plus) / 2
            coupling[:, 0], coupling[:, :, 0] = 0, 0
            tables[:, 4, : rows.shape[0], : columns.shape[1]] = coupling
    if height % 2:  # an odd side's first sine is zero, and nothing may be drawn for it
        tables[:, 2:4, 0] = 0
    if width % 2:
        tables[:, 1:4:2, :, 0] = 0
    there = lambda array: torch.tensor(array, dtype=torch.float32, device=full.device)
    return there(tables), there(bases[0]), there(bases[1])


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

_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define("spectral_filter(Tensor x, Tensor half, Tensor adjoint_half) -> Tensor")
_library.define(
    "spectral_filter_whole(Tensor x, Tensor tables, Tensor row_basis, Tensor column_basis, "
    "str precision) -> Tensor"
)


def _fake(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _transforms(x: Tensor, half: Tensor, adjoint_half: Tensor) -> Tensor:
    return spectral_product(x, half)


def _whole(
    x: Tensor, tables: Tensor, row_basis: Tensor, column_basis: Tensor, precision: str
) -> Tensor:
    from ..kernels.spectral_filter import launch

    y = _fake(x)
    launch(x, y, tables, row_basis, column_basis, precision)
    return y


def _plain_whole(
    x: Tensor, tables: Tensor, row_basis: Tensor, column_basis: Tensor, precision: str
) -> Tensor:
    return whole_image_ref(x, tables, row_basis, column_basis).to(x.dtype).contiguous()


def _like(values: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The real or complex dtype of values, as wide as dtype."""
    return dtype.to_complex() if values.is_complex() else dtype


_has_triton = importlib.util.find_spec("triton") is not None
_library.impl("spectral_filter", _transforms, "CPU")
_library.impl("spectral_filter", _transforms, "CUDA")
_library.impl("spectral_filter_whole", _whole if _has_triton else _plain_whole, "CUDA")
_library.impl("spectral_filter_whole", _plain_whole, "CPU")
for _name in ("spectral_filter", "spectral_filter_whole"):
    torch.library.register_fake(f"fastdiff::{_name}", _fake, lib=_library)


def _keep(ctx, inputs, output) -> None:
    _, *rest = inputs
    ctx.rest = rest


def _adjoint(ctx, upstream: Tensor):
    half, adjoint_half = ctx.rest
    gradient = torch.ops.fastdiff.spectral_filter.default(upstream, adjoint_half, half)
    return gradient, None, None


def _adjoint_whole(ctx, upstream: Tensor):
    return torch.ops.fastdiff.spectral_filter_whole.default(upstream, *ctx.rest), *(None,) * 4


torch.library.register_autograd(
    "fastdiff::spectral_filter", _adjoint, setup_context=_keep, lib=_library
)
torch.library.register_autograd(
    "fastdiff::spectral_filter_whole", _adjoint_whole, setup_context=_keep, lib=_library
)
