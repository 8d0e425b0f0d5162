"""Samplers of the reverse SDE: predictors, and correctors by Langevin steps (Song et al. 2021).

With r = alpha_t / alpha_u < 1 and G^2 = sigma_t^2 - r^2 sigma_u^2 the data's noising from time u to
t is x_t = r x_u + G z, for any schedule: alpha = 1 explodes variance, r^2 = 1 - beta preserves it.
Each stage is an increment x + (b x + a F) + c z, so a preconditioner can act on all of them.
"""

from __future__ import annotations

import math
from typing import Any

from fastdiff.solvers.registry import solver
from fastdiff.tableau import Form, Trace

PREDICTORS = ("reverse_diffusion", "euler_maruyama", "none")


@solver("reverse_diffusion", noise="always")
def reverse_diffusion(trace: Trace, probability_flow: bool = False) -> Form:
    """The noising's own steps reversed (Song et al. 2021, appendix E); the last one adds no noise.

    x_u = x_t + (1 - r) x_t + G^2 score + G z; with probability_flow half the score and no noise.
    """
    x = trace.x
    for t, u in trace.intervals:
        score = trace.net(x, t) * (-1.0 / trace.sigma(t))
        x = _reverse_diffusion_step(trace, x, score, t, u, probability_flow)
    return x


@solver("euler_maruyama", noise="always", differentiates=True)
def euler_maruyama(trace: Trace) -> Form:
    """Euler steps of the reverse SDE in the schedule's time; the last one adds no noise.

    dx = (f x - g^2 score) dt + g dw with f = (log alpha)' and g^2 = 2 sigma^2 (log sigma / alpha)'.
    """
    x = trace.x
    for t, u in trace.intervals:
        score = trace.net(x, t) * (-1.0 / trace.sigma(t))
        x = _euler_maruyama_step(trace, x, score, t, u)
    return x


@solver("predictor_corrector", noise="always", nfe="2 S")
def predictor_corrector(
    trace: Trace,
    snr: Any = 0.16,
    corrections: int = 1,
    predictor: str = "reverse_diffusion",
    norms: str = "sample",
) -> Form:
    """At each noise level Langevin steps, then a predictor's step (Song et al. 2021, algorithm 1).

    The Langevin step is 2 r^2 snr^2 (|z| / |score|)^2; norms: of each "sample", or their means
    over the "batch", as published. predictor: "reverse_diffusion", "euler_maruyama" or "none"
    (annealed Langevin dynamics). corrections + 1 calls a step.
    """
    if predictor not in PREDICTORS:
        raise ValueError(f"predictor must be one of {', '.join(PREDICTORS)}; got {predictor!r}")
    if isinstance(corrections, bool) or not isinstance(corrections, int) or corrections < 0:
        raise ValueError(f"corrections must be a whole number >= 0; got {corrections!r}")
    if predictor == "none" and not corrections:
        raise ValueError('corrections must be at least 1 with predictor "none"; got 0')
    if norms not in ("sample", "batch"):
        raise ValueError(f'norms must be "sample" or "batch"; got {norms!r}')
    x = trace.x
    for t, u in trace.intervals:
        ratio = trace.alpha(t) / trace.alpha(u)
        for _ in range(corrections):
            score = trace.net(x, t) * (-1.0 / trace.sigma(t))
            factor = 2 * ratio**2 * snr**2
            x = trace.langevin(x, score, factor, norms=norms)
        if predictor == "none":
            continue
        score = trace.net(x, t) * (-1.0 / trace.sigma(t))
        if predictor == "euler_maruyama":
            x = _euler_maruyama_step(trace, x, score, t, u)
        else:
            x = _reverse_diffusion_step(trace, x, score, t, u, False)
    return x


def _reverse_diffusion_step(
    trace: Trace, x: Form, score: Form, t: float, u: float, probability_flow: bool
) -> Form:
    ratio = trace.alpha(t) / trace.alpha(u)
    power = trace.sigma(t) ** 2 - (ratio * trace.sigma(u)) ** 2
    share = 0.5 if probability_flow else 1.0
    x = (2 - ratio) * x + (share * power) * score
    if probability_flow or u == trace.times[-1]:
        return x
    return x + math.sqrt(power) * trace.noise()


def _euler_maruyama_step(trace: Trace, x: Form, score: Form, t: float, u: float) -> Form:
    of_alpha, of_sigma = trace.schedule.rates(t)
    if not math.isfinite(of_alpha):
        raise ValueError(f"start must be below {t:g} for Euler-Maruyama steps: alpha is zero there")
    power = 2 * trace.sigma(t) ** 2 * (of_sigma - of_alpha) * (t - u)
    x = (1 - of_alpha * (t - u)) * x + power * score
    return x if u == trace.times[-1] else x + math.sqrt(power) * trace.noise()
