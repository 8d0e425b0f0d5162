"""k-diffusion: its denoisers as networks, and its sampler functions with fused steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastdiff.frameworks import Framework, register
from fastdiff.integrations.k_diffusion.networks import KDiffusionDenoiser
from fastdiff.integrations.k_diffusion.samplers import (
    sample_deis,
    sample_dpm_2,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_ipndm,
    sample_ipndm_v,
    sample_lcm,
    sample_lms,
    sample_uni_pc,
    sample_uni_pc_bh2,
)

__all__ = [
    "KDiffusionDenoiser",
    "sample_deis",
    "sample_dpm_2",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_ipndm",
    "sample_ipndm_v",
    "sample_lcm",
    "sample_lms",
    "sample_uni_pc",
    "sample_uni_pc_bh2",
]


class KDiffusion(Framework):
    """What k-diffusion brings to `wrap`."""

    def denoiser(self, network: Any) -> Callable[..., Any] | None:
        return KDiffusionDenoiser if KDiffusionDenoiser.recognises(network) else None


register(KDiffusion())
