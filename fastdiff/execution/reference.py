"""The probability-flow ODE solved adaptively: a reference, not a sampler (no table, no launch)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.prediction import Prediction, prediction
from fastdiff.schedule import NoiseSchedule

_prediction = prediction  # the function below has an argument of the same name


@torch.no_grad()
def probability_flow(
    denoiser: Callable[..., Tensor],
    schedule: NoiseSchedule,
    noise: Tensor,
    *,
    prediction: str | Prediction = "epsilon",
    rtol: float = 1e-5,
    atol: float = 1e-5,
    **conditioning: Any,
) -> tuple[Tensor, int]:
    """PF: adaptive RK45 (scipy) on dy/ds = epsilon, y = x / alpha, s = sigma / alpha.

    From the schedule's noisiest time to s = 0, in float64, with one step size for the whole batch;
    times below the last one trained are shown to the network as that one. Needs scipy.

    Args:
        denoiser: `(x [B, ...] float64, t [B], **conditioning)` -> output of the prediction.
        noise: [B, ...] unit-variance noise.
        rtol, atol: scipy's tolerances on y.

    Returns:
        x0 [B, ...] float64, and how many network calls it took.

    Raises:
        ValueError: an unknown prediction, or one of two halves ("both"); scipy gave up.
    """
    from scipy.integrate import solve_ivp

    kind = _prediction(prediction)
    if kind.blend is not None:
        raise ValueError(f"prediction must be of one tensor; got {kind.name!r}")
    start = schedule.first
    scale = schedule.prior_scale(start) / schedule.alpha(start)
    smallest = schedule.sigma(schedule.last) / schedule.alpha(schedule.last)

    def epsilon(s: float, y: np.ndarray) -> np.ndarray:
        t = schedule.time(-2 * math.log(max(s, smallest)))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x = torch.from_numpy(alpha * y).view(noise.shape).to(noise.device)
        times = torch.full((len(noise),), schedule.time_scale * t, dtype=torch.float64)
        of_output, of_state = kind.to_epsilon(alpha, sigma)
        shown = x * kind.input_scale(alpha, sigma)
        output = denoiser(shown, times.to(noise.device), **conditioning)
        return (of_output * output.double() + of_state * x).cpu().numpy().reshape(-1)

    y = (scale * noise.double()).cpu().numpy().reshape(-1)
    span = (schedule.sigma(start) / schedule.alpha(start), 0.0)
    solution = solve_ivp(epsilon, span, y, method="RK45", rtol=rtol, atol=atol, t_eval=[0.0])
    if not solution.success:
        raise ValueError(f"rtol = {rtol}, atol = {atol}: {solution.message}")
    found = torch.from_numpy(solution.y[:, -1].copy()).view(noise.shape)
    return found.to(noise.device), int(solution.nfev)
