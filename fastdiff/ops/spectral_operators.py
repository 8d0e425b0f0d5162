"""Operators in Fourier space, made ready: checked once, with the tables that the backends read.

`SpectralResponse` is what `spectral_filter` applies, `SpectralGains` what the moves of
spectral_update.py do. Tables for transforms are halves with the scale in them (half_spectrum.py);
those for whole images hold the response in real bases (kernels/spectral_filter.py).
"""

from __future__ import annotations

import math
import warnings
import weakref
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import _ext
from ._register import HAS_TRITON
from .common import require_device, require_dtype
from .constants import LARGEST_WHOLE

_NUMBERS = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_UNEVEN = 1e-6  # of the largest entry: a response further from its mirror image is warned of


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
        require_dtype("response", values, *_NUMBERS)
        if values.ndim != 3 or not values.numel():
            raise ValueError(f"response must be [C or 1, H, W], got shape {tuple(values.shape)}")
        values = values.detach()
        numbers = torch.view_as_real(values) if values.is_complex() else values
        if not bool(torch.isfinite(numbers).all()):
            raise ValueError("response must be finite, got NaN or infinite entries")
        even = (values + mirrored(values).conj()) / 2
        off, largest = float((even - values).abs().max()), float(values.abs().max())
        if off > _UNEVEN * largest:
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
            kept = kept.to(like(kept, dtype)) / (self.height * self.width)
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
                raise ValueError(
                    f"{name} must be [C or 1, {gain.height}, {gain.width}], "
                    f"got {tuple(other.shape)}"
                )
            require_device(name, other, gain.full)
        counts = {len(t) for t in (gain.full, pixel, skew) if t is not None} - {1}
        if len(counts) > 1:
            raise ValueError(f"frequency, pixel and skew must agree in channels, got {counts}")
        self.channels = max({1, *counts})
        if pixel is not None:
            if skew is not None:
                raise ValueError("skew must come without pixel: it adds to D = F^-1 R^2 F alone")
            self.drift = gain  # D = F^-1 R F A^2 F^-1 R F: R comes before and after the pixels
        else:
            squared = gain.full.double().square()
            if skew is not None:
                squared = torch.complex(*torch.broadcast_tensors(squared, _odd(skew).to(squared)))
            self.drift = SpectralResponse(squared)
        self._tables: tuple[Tensor, ...] | None = None
        if self.drift.whole is not None and pixel is None:
            drift, *bases = self.drift.whole
            self._tables = (drift, whole_image_tables(gain.full, less=0.0)[0], *bases)

    @property
    def size(self) -> tuple[int, int]:
        return self.gain.height, self.gain.width

    @property
    def device(self) -> torch.device:
        return self.gain.device

    def tables(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """What the whole-image kernel reads; None where it does not serve."""
        if not x.is_cuda or self._tables is None or x.dtype == torch.float64:
            return None
        return self._tables if fits_a_program(*self.size, x.device) else None

    def describe(self, x: Tensor) -> str:
        """Which backend serves images like x."""
        if self.tables(x) is not None:
            return "whole image: one Triton launch, two for an adaptive step"
        if self.pixel is not None:
            return "transforms: torch.fft around the pixel gain, twice and once more for the noise"
        here = {"cuda": HAS_TRITON and "Triton", "cpu": _ext.HAS_EXT and "C++"}
        by = here.get(x.device.type) or "PyTorch"
        return f"transforms: torch.fft, a pass between and one after by {by}"


# == Made once for each tensor =====================================================================

_prepared: dict[int, tuple[weakref.ref[Tensor], int, SpectralResponse]] = {}


def ready(response: Tensor, name: str = "response") -> SpectralResponse:
    """The response of a tensor, made once for each of its states."""
    require_dtype(name, response, *_NUMBERS)
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


def gains_ready(gains: SpectralGains | SpectralResponse | Tensor) -> SpectralGains:
    """The gains themselves, or those of a response, made once for it."""
    if isinstance(gains, SpectralGains):
        return gains
    response = gains if isinstance(gains, SpectralResponse) else ready(gains, "gains")
    if "gains" not in response.kept:
        response.kept["gains"] = SpectralGains(response)
    return response.kept["gains"]


# == Symmetries ====================================================================================


def mirrored(values: Tensor) -> Tensor:
    """values(-k): both last axes reversed around their first entry."""
    return values.flip((-2, -1)).roll((1, 1), (-2, -1))


def _odd(skew: Tensor) -> Tensor:
    """The skew part's q, checked."""
    off, largest = float((skew + mirrored(skew)).abs().max()), float(skew.abs().max())
    if not off <= 1e-6 * largest:
        raise ValueError(f"skew must be odd, q(-k) = -q(k), got entries off by {off:.2g}")
    return skew


def like(values: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The real or complex dtype of values, as wide as dtype."""
    return dtype.to_complex() if values.is_complex() else dtype


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


@cache
def fits_a_program(height: int, width: int, device: torch.device) -> bool:
    """Whether the whole-image kernel serves that size on that GPU."""
    if not HAS_TRITON:
        return False
    from fastdiff.kernels.spectral_filter import serves

    return serves(height, width, torch.cuda.get_device_capability(device))
