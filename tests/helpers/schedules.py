"""The schedules that tests run over."""

from __future__ import annotations

import numpy as np

from fastdiff import NoiseSchedule

LINEAR = NoiseSchedule.linear_beta()
SCHEDULES = {
    "linear": LINEAR,
    "cosine": NoiseSchedule.cosine(),
    "logsnr_cosine": NoiseSchedule.logsnr_cosine(),
    "ve": NoiseSchedule.ve(),
    "edm": NoiseSchedule.edm(),
    "flow": NoiseSchedule.flow(3.0),
    "zero_snr": NoiseSchedule.from_alphas_cumprod(np.linspace(0.9999, 0.0, 50)),
}
# Stable Diffusion's, as diffusers' schedulers take them.
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
