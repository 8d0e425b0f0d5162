"""k-diffusion's denoisers: `model(x, sigma, **extra_args)` returns the denoised image."""

from __future__ import annotations

from typing import Any

from fastdiff.denoisers import NetworkDenoiser, uncompiled
from fastdiff.schedule import NoiseSchedule


class KDiffusionDenoiser(NetworkDenoiser):
    """A denoiser around another network, as k-diffusion's wrappers are: it predicts x0.

    Where it holds its `sigmas` (those of discrete models) the schedule spans them; around
    continuous models (`Denoiser`) it has to be given: `NoiseSchedule.edm(sigma_min, sigma_max)`.
    """

    usual_prediction, only_prediction = "sample", True

    @staticmethod
    def recognises(network: Any) -> bool:
        network = uncompiled(network)
        return hasattr(network, "inner_model") and any(
            hasattr(network, name) for name in ("sigma_to_t", "get_scalings")
        )

    def own_schedule(self, network: Any) -> NoiseSchedule | None:
        sigmas = getattr(uncompiled(network), "sigmas", None)
        if sigmas is None:
            return None
        return NoiseSchedule.edm(float(sigmas.min()), float(sigmas.max()))
