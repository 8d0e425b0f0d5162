"""The photographs model: a denoiser of small crops, variance exploding.

It was trained by `fastdiff train ve` on crops of scikit-learn's two photographs; recipe, seed and
held-out losses are in the JSON beside it. Images lie in [0, 1].
"""

from __future__ import annotations

from typing import Any

from fastdiff.models.assets import asset_path
from fastdiff.models.checkpoint import read_denoiser
from fastdiff.models.noise_conditional import NoiseConditional


def load_photographs() -> tuple[NoiseConditional, dict[str, Any]]:
    """The committed denoiser of 32x32 colour crops, float32, in eval mode, and its metadata.

    It predicts epsilon for its `schedule`; images [B, 3, 32, 32] in [0, 1].
    """
    with asset_path("photographs.safetensors") as path:
        found = read_denoiser(path)
    return found.network, found.words
