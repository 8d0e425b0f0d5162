"""The committed digits model and the classifier that measures it.

Both were trained by `fastdiff train digits`; recipe, seed and held-out losses are in the JSON
beside them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.models.assets import read_asset
from fastdiff.models.unet import UNet, UNetConfig


class DigitFeatures(nn.Module):
    """A small classifier of 8x8 digits whose last hidden layer is the space of the Frechet
    distance.

    forward(x): x [B, 1, 8, 8] in [-1, 1] -> logits [B, 10]; features(x) -> [B, size].
    """

    def __init__(self, size: int = 16, dropout: float = 0.2) -> None:
        super().__init__()
        self.size = size
        self.body = nn.Sequential(
            nn.Conv2d(1, 24, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(48 * 16, 64),
            nn.SiLU(),
            nn.Dropout(dropout),
            nn.Linear(64, size),
        )
        self.head = nn.Linear(size, 10)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.features(x)))


def load_digits() -> tuple[UNet, dict[str, Any]]:
    """The committed denoiser of 8x8 digits, float32, in eval mode, and its metadata.

    It predicts epsilon for `NoiseSchedule.linear_beta(1e-4, 0.02, 1000)`, images [B, 1, 8, 8] in
    [-1, 1], labels 0..9 and 10 for none.
    """
    tensors, metadata = read_asset("digits.safetensors")
    unet = UNet(UNetConfig.from_dict(metadata["unet"]))
    unet.load_state_dict(_part(tensors, "unet."))
    return unet.eval().requires_grad_(False), metadata


def load_digits_features() -> DigitFeatures:
    """The committed classifier, float32, in eval mode."""
    tensors, metadata = read_asset("digits.safetensors")
    model = DigitFeatures(**metadata["features"])
    model.load_state_dict(_part(tensors, "features."))
    return model.eval().requires_grad_(False)


def load_digits_reference() -> dict[str, Tensor]:
    """The converged samples of the committed denoiser for seeds 0..63.

    "noise" [64, 1, 8, 8] float32, "labels" [64] int64, "x0" [64, 1, 8, 8] float64: what a solver of
    the probability-flow ODE should make of that noise and those labels.
    """
    return read_asset("digits_reference.safetensors")[0]


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
