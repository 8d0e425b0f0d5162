"""The photographs model: a noise-conditional denoiser of small crops, variance exploding.

It was trained by `fastdiff train ve` on crops of scikit-learn's two photographs; recipe, seed and
held-out losses are in the JSON beside it. Images lie in [0, 1].
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.assets import read_asset
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.schedule import NoiseSchedule

MEAN, DEVIATION = 0.42, 0.32  # of a pixel of a crop


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


def load_photographs() -> tuple[NoiseConditional, dict[str, Any]]:
    """The committed denoiser of 32x32 colour crops, float32, in eval mode, and its metadata.

    It predicts epsilon for its `schedule`; images [B, 3, 32, 32] in [0, 1].
    """
    halves, metadata = read_asset("photographs.safetensors")
    tensors = {name: half.float() for name, half in halves.items()}
    model = NoiseConditional(UNetConfig.from_dict(metadata["unet"]), *metadata["sigmas"])
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False), metadata
