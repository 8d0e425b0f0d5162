"""First-order solvers."""

from __future__ import annotations

from typing import Any

from fastdiff.schedule import namespace
from fastdiff.solvers.registry import solver
from fastdiff.tableau import Form, Trace


@solver("ddim", order=1, noise="eta", family="first order")
def ddim(trace: Trace, eta: Any = 0.0) -> Form:
    """DDIM (Song et al. 2021, eq. 12): first order, deterministic at eta = 0.

    eta scales the noise put back at each step; 1 is DDPM's ancestral sampling. A number, or an
    array [B] of one per sample.
    """
    x = trace.x
    for t, u in trace.intervals:
        e = trace.net(x, t)
        x = trace.transfer(x, e, t, u)
        # Eq. 16 for any alpha and sigma: the fresh noise's standard deviation ...
        h = trace.half_logsnr(u) - trace.half_logsnr(t)
        sigma, fresh = trace.sigma(u), eta * trace.sigma(u) * (-namespace(h).expm1(-2 * h)) ** 0.5
        # ... and what is left for the direction that points to x_t.
        kept = (sigma**2 - fresh**2) ** 0.5
        x = x + (kept - sigma) * e + fresh * trace.noise()
    return x


@solver("euler", order=1)
def euler(trace: Trace) -> Form:
    """Euler's method on the probability-flow ODE in sigma / alpha (Karras et al. 2022)."""
    x = trace.x
    for t, u in trace.intervals:
        x = trace.transfer(x, trace.net(x, t), t, u)
    return x
