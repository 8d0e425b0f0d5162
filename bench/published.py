"""Published codes' arithmetic as the lists of operations they run, for baselines on any device.

Coefficients are ready as Python numbers: no table is looked up, and no host waits.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


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
