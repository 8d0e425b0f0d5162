"""Haar pyramids in the orders of other packages, and back: views, no arithmetic.

All four packages hold the same orthonormal numbers; they differ in names and order. The bands here
are V (top minus bottom), H (left minus right) and D; PyWavelets and ptwt call V horizontal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .haar import HaarPyramid


def to_pywt(pyramid: HaarPyramid) -> list[Any]:
    """[cA, (cH, cV, cD) coarsest, ..., finest], [B, C, h, w] each: as `pywt.wavedec2(x, "haar")`.

    For even sides under every `mode`, for odd ones under mode="zero"; ptwt's order too.
    """
    details = [tuple(detail.unbind(1)) for detail in reversed(pyramid.details)]
    return [pyramid.coarse, *details]


def from_pywt(coefficients: Sequence[Any]) -> HaarPyramid:
    """The pyramid of [cA, (cH, cV, cD), ...]; tensors [B, C, h, w]."""
    coarse, *details = coefficients
    return HaarPyramid(tuple(torch.stack(tuple(d), 1) for d in reversed(details)), coarse)


def to_pytorch_wavelets(pyramid: HaarPyramid) -> tuple[Tensor, list[Tensor]]:
    """(yl, yh) as of `pytorch_wavelets.DWTForward(wave="haar")`; yh[j] is [B, C, 3, h, w]."""
    return pyramid.coarse, [detail.transpose(1, 2) for detail in pyramid.details]


def from_pytorch_wavelets(yl: Tensor, yh: Sequence[Tensor]) -> HaarPyramid:
    """The pyramid of (yl, yh)."""
    return HaarPyramid(tuple(detail.transpose(1, 2) for detail in yh), yl)


def to_msdiff(pyramid: HaarPyramid) -> list[Tensor]:
    """[d1, ..., dL, aL], details [B, 3 C, h, w] band by band with the colours inside."""
    return [*(detail.flatten(1, 2) for detail in pyramid.details), pyramid.coarse]


def from_msdiff(scales: Sequence[Tensor]) -> HaarPyramid:
    """The pyramid of [d1, ..., dL, aL]."""
    *details, coarse = scales
    return HaarPyramid(tuple(detail.unflatten(1, (3, -1)) for detail in details), coarse)
