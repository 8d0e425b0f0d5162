"""The committed digits model and the classifier that measures it.

Both were trained by `fastdiff train digits`; recipe, seed and held-out losses are in the JSON
beside them.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.files import read_tensors
from fastdiff.models.assets import asset_path
from fastdiff.models.checkpoint import read_denoiser
from fastdiff.models.unet import UNet


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
    with asset_path("digits.safetensors") as path:
        found = read_denoiser(path)
    return found.network, found.words


def load_digits_features() -> DigitFeatures:
    """The committed classifier, float32, in eval mode."""
    with asset_path("digits.safetensors") as path:
        found = read_denoiser(path)
    model = DigitFeatures(**found.words["features"])
    model.load_state_dict({k.removeprefix("features."): v for k, v in found.others.items()})
    return model.eval().requires_grad_(False)


def load_digits_reference() -> dict[str, Tensor]:
    """The converged samples of the committed denoiser for seeds 0..63.

    "noise" [64, 1, 8, 8] float32, "labels" [64] int64, "x0" [64, 1, 8, 8] float64: what a solver of
    the probability-flow ODE should make of that noise and those labels.
    """
    with asset_path("digits_reference.safetensors") as path:
        return read_tensors(path)[0]
