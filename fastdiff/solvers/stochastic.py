"""Samplers that add noise on the way, in the normal form y = x / alpha, s = sigma / alpha."""

from __future__ import annotations

import math
from typing import Any

from fastdiff.solvers.ddim import ddim
from fastdiff.solvers.registry import solver
from fastdiff.solvers.runge_kutta import heun_step
from fastdiff.tableau import Form, Trace


@solver("ddpm", noise="always")
def ddpm(trace: Trace) -> Form:
    """DDPM's ancestral sampling with the posterior's variance (Ho et al. 2020): DDIM at eta = 1."""
    return ddim(trace, eta=1.0)


@solver("euler_ancestral", noise="eta")
def euler_ancestral(trace: Trace, eta: Any = 1.0) -> Form:
    """Euler steps with part of the noise renewed: the same method as ddim with eta.

    In y and s: down to sqrt(s_u^2 - n^2), then up with n = eta s_u sqrt(1 - s_u^2 / s_t^2).
    """
    return ddim(trace, eta=eta)


@solver("lcm", solves_for="sample", noise="always")
def lcm(trace: Trace) -> Form:
    """Multistep consistency sampling (Luo et al. 2023, alg. 3): predict x0, noise it again.

    One call a step, for latent consistency models.
    """
    x = trace.x
    for t, u in trace.intervals:
        x0 = trace.net(x, t)
        x = trace.alpha(u) * x0 + trace.sigma(u) * trace.noise()
    return x


@solver("euler_churn", noise="churn")
def euler_churn(
    trace: Trace,
    churn: float = 40.0,
    s_min: float = 0.05,
    s_max: float = 50.0,
    s_noise: float = 1.003,
) -> Form:
    """EDM's stochastic sampler with Euler steps (Karras et al. 2022, alg. 2, first order).

    Where s_min <= sigma / alpha <= s_max, each step first adds noise, raising s by the factor
    1 + min(churn / steps, sqrt(2) - 1).
    """
    x = trace.x
    for t, u in trace.intervals:
        x, t = _churned(trace, x, t, churn, s_min, s_max, s_noise)
        x = trace.transfer(x, trace.net(x, t), t, u)
    return x


@solver("heun_churn", noise="churn", nfe="2 S - 1")
def heun_churn(
    trace: Trace,
    churn: float = 40.0,
    s_min: float = 0.05,
    s_max: float = 50.0,
    s_noise: float = 1.003,
) -> Form:
    """EDM's stochastic sampler (Karras et al. 2022, alg. 2): churn, then Heun's step.

    2 steps - 1 calls; options as euler_churn.
    """
    x = trace.x
    for t, u in trace.intervals:
        x, t = _churned(trace, x, t, churn, s_min, s_max, s_noise)
        x = heun_step(trace, x, t, u)
    return x


def _churned(
    trace: Trace, x: Form, t: float, churn: float, s_min: float, s_max: float, s_noise: float
) -> tuple[Form, float]:
    """x with noise added, and the noisier time it is then at (never past the schedule's first)."""
    s = trace.sigma(t) / trace.alpha(t)
    gamma = min(churn / (len(trace.times) - 1), math.sqrt(2) - 1)
    if not s_min <= s <= s_max or gamma <= 0:
        return x, t
    noisier = min(trace.schedule.time(-2 * math.log(s * (1 + gamma))), trace.schedule.first)
    raised = trace.sigma(noisier) / trace.alpha(noisier)
    grown = max(raised**2 - s**2, 0.0) ** 0.5
    alpha = trace.alpha(noisier)
    return (alpha / trace.alpha(t)) * x + (alpha * grown * s_noise) * trace.noise(), noisier
