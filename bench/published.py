"""Published codes' arithmetic as the lists of operations they run, for baselines on any device.

Coefficients are ready as Python numbers: no table is looked up, and no host waits.
"""

from __future__ import annotations

import importlib.resources
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def plms_step(
    x: Tensor, output: Tensor, past: Sequence[Tensor], a: float, c: float, d: float
) -> Tensor:
    """diffusers' PNDMScheduler from its fifth call on: 12 operations, 28 passes over an image.

    x' = a x - c (55 F - 59 F1 + 37 F2 - 9 F3) / 24 / d, all [B, ...]; past: F1, F2, F3.
    """
    e1, e2, e3 = past
    mixed = (1 / 24) * (55 * output - 59 * e1 + 37 * e2 - 9 * e3)  # 8 operations, 19 passes
    return a * x - c * mixed / d  # 4 operations, 9 passes


def clipped_ddim_step(
    x: Tensor,
    output: Tensor,
    alpha: float,
    sigma: float,
    alpha_next: float,
    sigma_next: float,
) -> Tensor:
    """diffusers' DDIMScheduler with clip_sample and eta 0: 7 operations, 16 passes over an image.

    x' = alpha' clamp((x - sigma F) / alpha, -1, 1) + sigma' F, all [B, ...].
    """
    x0 = ((x - sigma * output) / alpha).clamp(-1, 1)  # 4 operations, 9 passes
    return alpha_next * x0 + sigma_next * output  # 3 operations, 7 passes


def k_diffusion_euler(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """k-diffusion's Euler loop: 6 operations, 16 passes a step, coefficients on the device."""
    ones = x.new_ones([len(x)])
    for i in range(len(sigmas) - 1):
        slope = (x - model(x, sigmas[i] * ones)) / sigmas[i]
        x = x + slope * (sigmas[i + 1] - sigmas[i])
    return x


def k_diffusion_ipndm(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """iPNDM in the form that k-diffusion's users run: 12 operations a step at order four."""
    blends = ((1,), (3, -1), (23, -16, 5), (55, -59, 37, -9))
    ones, past = x.new_ones([len(x)]), list[Tensor]()
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones)
        if sigmas[i + 1] == 0:
            return denoised
        past = [(x - denoised) / sigmas[i], *past[:3]]
        weights = blends[len(past) - 1]
        mixed = weights[0] * past[0]
        for weight, slope in zip(weights[1:], past[1:], strict=True):
            mixed = mixed + weight * slope
        x = x + (sigmas[i + 1] - sigmas[i]) * mixed / sum(weights)
    return x


def k_diffusion_dpmpp_2m(model: Any, x: Tensor, sigmas: Tensor) -> Tensor:
    """k-diffusion's DPM++ 2M loop: x' = u/s x - (e^-h - 1) D, D by extrapolation; 6 operations."""
    ones, before = x.new_ones([len(x)]), None
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * ones)
        h = (sigmas[i] / sigmas[i + 1]).log()
        mixed = denoised
        if before is not None and sigmas[i + 1] != 0:
            half = h / (2 * (sigmas[i - 1] / sigmas[i]).log())
            mixed = (1 + half) * denoised - half * before
        x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * mixed
        before = denoised
    return x


# == Wavelet packages ==============================================================================


def load_pytorch_wavelets() -> ModuleType:
    """pytorch_wavelets; its tables come by pkg_resources, which setuptools no longer has."""
    if importlib.util.find_spec("pkg_resources") is None and "pkg_resources" not in sys.modules:
        stand_in = ModuleType("pkg_resources")
        stand_in.resource_stream = lambda package, name: (
            importlib.resources.files(package).joinpath(name).open("rb")
        )
        sys.modules["pkg_resources"] = stand_in
        try:
            return importlib.import_module("pytorch_wavelets")
        finally:
            del sys.modules["pkg_resources"]
    return importlib.import_module("pytorch_wavelets")


def msdiff_weight(channels: int, device: torch.device) -> Tensor:
    """The filters of one level, [4 C, 1, 2, 2]: V, low, H, D of each colour in turn."""
    signs = [[1, 1, -1, -1], [1, 1, 1, 1], [1, -1, 1, -1], [1, -1, -1, 1]]
    weight = torch.tensor(signs, dtype=torch.float32, device=device).view(4, 1, 2, 2) / 2
    return weight.repeat(channels, 1, 1, 1)


def msdiff_split(x: Tensor, levels: int, weight: Tensor) -> list[Tensor]:
    """MSDiff's Haar split of colour images [B, 3, H, W], its weight ready: 14 operations a level.

    A grouped convolution, then band after band and colour after colour copied into their order.
    Returns details [B, 9, h, w] finest first and the coarse image.
    """
    channels, scales = x.shape[1], []
    for _ in range(levels):
        raw = functional.conv2d(x, weight, stride=2, groups=channels)
        ordered = torch.zeros_like(raw)
        for place, band in enumerate(MSDIFF_BANDS):
            for colour in range(channels):
                ordered[:, place * channels + colour] = raw[:, 4 * colour + band]
        x = ordered[:, :channels]
        scales.append(ordered[:, channels:])
    return [*scales, x]


def msdiff_merge(scales: Sequence[Tensor], weight: Tensor) -> Tensor:
    """The way back: 15 operations a level."""
    *details, x = scales
    channels = x.shape[1]
    for detail in reversed(details):
        ordered = torch.cat([x, detail], 1)
        raw = torch.zeros_like(ordered)
        for place, band in enumerate(MSDIFF_BANDS):
            for colour in range(channels):
                raw[:, 4 * colour + band] = ordered[:, place * channels + colour]
        x = functional.conv_transpose2d(raw, weight, stride=2, groups=channels)
    return x


MSDIFF_BANDS = (1, 0, 2, 3)  # where low, V, H, D are among a colour's four


# == Preconditioned diffusion sampling =============================================================


def pds_filter(x: Tensor, gain: Tensor) -> Tensor:
    """The frequency mask of the published code: four complex transforms of one axis each.

    x [B, C, H, W], gain [C, H, W]. 6 operations and a real part that stays a view of stride two.
    """
    spectrum = torch.fft.fft(torch.fft.fft(x, dim=2), dim=3) * gain
    return torch.fft.ifft(torch.fft.ifft(spectrum, dim=3), dim=2).real


def pds_langevin(x: Tensor, score: Tensor, gain: Tensor, space: Tensor, snr: float) -> Tensor:
    """The published corrector, one step of it: about 45 operations, 107 passes over an image.

    x, score [B, C, H, W]; gain [C, H, W]; space [1]: the mask of ones where there is none.
    """
    noise = pds_filter(torch.randn_like(x) * space, gain)
    drift = _pds_drift(score, gain, space)
    size = torch.norm(drift.reshape(len(x), -1), dim=-1).mean()
    noise_size = torch.norm(noise.reshape(len(x), -1), dim=-1).mean()
    h = (snr * noise_size / size) ** 2 * 2
    return x + h * drift + torch.sqrt(h * 2) * noise


def pds_predictor(x: Tensor, score: Tensor, gain: Tensor, space: Tensor, step: float) -> Tensor:
    """The published reverse-diffusion predictor for exploding variance: x + G^2 D s + G M z."""
    noise = pds_filter(torch.randn_like(x) * space, gain)
    drift = -(step**2) * score
    return x - _pds_drift(drift, gain, space) + step * noise


def _pds_drift(score: Tensor, gain: Tensor, space: Tensor) -> Tensor:
    """D s: two filters with the squared pixel mask between, the real part taken once."""
    spectrum = torch.fft.fft(torch.fft.fft(score, dim=2), dim=3) * gain
    between = torch.fft.ifft(torch.fft.ifft(spectrum, dim=3), dim=2) * space.pow(2)
    return pds_filter(between, gain)
