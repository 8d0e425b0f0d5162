"""A noise-conditional denoiser for variance-exploding schedules, around a UNet."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.schedule import NoiseSchedule

MEAN, DEVIATION = 0.42, 0.32  # what the pixels of the photographs have


class NoiseConditional(nn.Module):
    """Finds the noise in x = x0 + sigma epsilon: what normal pixels would say, mended by a UNet.

    forward(x [B, C, H, W], sigma [B] or scalar) -> epsilon [B, C, H, W]. For normal pixels of
    mean m and deviation d the noise is expected to be sigma (x - m) / v, v = sigma^2 + d^2, and is
    known to a deviation of d / sqrt(v); the UNet finds the rest in units of it. So an error of one
    in what it finds costs x0 = x - sigma epsilon at most d, however large sigma is. It is shown
    (x - m) / sqrt(v) and a time of 0 .. 1000, linear in log sigma.
    """

    def __init__(self, config: UNetConfig, sigma_min: float, sigma_max: float) -> None:
        super().__init__()
        self.unet = UNet(config)
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    @classmethod
    def from_settings(cls, settings: dict[str, Any]) -> NoiseConditional:
        """Of its constructor's arguments as JSON knows them; `unet` is a `UNetConfig`'s fields."""
        unet = UNetConfig.from_dict(settings["unet"])
        return cls(unet, settings["sigma_min"], settings["sigma_max"])

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        span = math.log(self.sigma_max / self.sigma_min)
        time = 1000 * (sigma.double() / self.sigma_min).log() / span
        size = (sigma.square() + DEVIATION**2).rsqrt()
        unit, noise, rest = (
            part.to(x.dtype)[:, None, None, None] for part in (size, sigma * size, DEVIATION * size)
        )
        shown = (x - MEAN) * unit
        return noise * shown + rest * self.unet(shown, time)

    @property
    def schedule(self) -> NoiseSchedule:
        """What it was trained with."""
        return NoiseSchedule.ve(self.sigma_min, self.sigma_max)
