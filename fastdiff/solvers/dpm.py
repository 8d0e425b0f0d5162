"""DPM-Solver and DPM-Solver++ (Lu et al. 2022): exponential integrators in log-SNR."""

from __future__ import annotations

import math
from typing import Any

from fastdiff.schedule import namespace
from fastdiff.solvers.registry import solver
from fastdiff.tableau import Form, Trace


@solver("dpm_solver_2", order=2, nfe="2 S - 1", family="Runge-Kutta")
def dpm_solver_2(trace: Trace) -> Form:
    """DPM-Solver-2 (Lu et al. 2022, alg. 1): the midpoint rule in log-SNR.

    2 steps - 1 calls: the last step, to the clean image, is of first order.
    """
    x = trace.x
    for t, u in trace.intervals:
        e = trace.net(x, t)
        if not (trace.is_clean(u) or trace.is_leap(t, u)):
            m = trace.schedule.time(trace.half_logsnr(t) + trace.half_logsnr(u))
            e = trace.net(trace.transfer(x, e, t, m), m)
        x = trace.transfer(x, e, t, u)
    return x


@solver("dpmpp_2m", solves_for="sample", order=2, family="exponential")
def dpmpp_2m(trace: Trace) -> Form:
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2): second order in log-SNR, one call a step.

    The first step and the one that ends at the clean image are of first order.
    """
    return dpmpp_2m_sde(trace, eta=0.0)


@solver("dpmpp_2m_sde", solves_for="sample", noise="eta")
def dpmpp_2m_sde(trace: Trace, eta: Any = 1.0) -> Form:
    """DPM-Solver++(2M) for the reverse SDE (Lu et al. 2022, appendix), midpoint form.

    eta scales the noise: 1 is the SDE, 0 the ODE. A number, or an array [B].
    """
    x, before, h_before = trace.x, None, 0.0
    for t, u in trace.intervals:
        x0 = trace.net(x, t)
        h = trace.half_logsnr(u) - trace.half_logsnr(t)
        d = x0
        if before is not None and not trace.is_clean(u):
            # Extrapolate x0 to the middle of the step, half a step past t.
            d = x0 + (h / (2 * h_before)) * (x0 - before)
        x = _diffuse(trace, x, d, t, u, eta)
        before, h_before = x0, h
    return x


def _diffuse(trace: Trace, x: Form, x0: Form, t: float, u: float, eta: Any) -> Form:
    """The step at constant x0 of the SDE whose noise is scaled by sqrt(eta): exact in log-SNR."""
    h = trace.half_logsnr(u) - trace.half_logsnr(t)
    if trace.is_clean(u):
        return trace.transfer(x, x0, t, u)
    expm1 = namespace(h).expm1
    shrunk = namespace(h).exp(-eta * h)
    alpha, sigma = trace.alpha(u), trace.sigma(u)
    return (
        (sigma / trace.sigma(t)) * shrunk * x
        - (alpha * expm1(-(1 + eta) * h)) * x0
        + (sigma * (-expm1(-2 * eta * h)) ** 0.5) * trace.noise()
    )


@solver("dpmpp_3m", solves_for="sample", order=2, family="exponential")
def dpmpp_3m(trace: Trace, lower_order_final: bool = True) -> Form:
    """DPM-Solver++(3M) as published: its second difference is half of what third order needs.

    One call a step. The step to the clean image is of first order; lower_order_final makes the
    one before it second.
    """
    return _three_step(trace, curvature=1.0, lower_order_final=lower_order_final)


@solver("dpmpp_3m_exact", solves_for="sample", order=2, family="exponential")
def dpmpp_3m_exact(trace: Trace, lower_order_final: bool = True) -> Form:
    """DPM-Solver++(3M) with the second difference doubled: third order in log-SNR.

    One call a step; otherwise as dpmpp_3m.
    """
    return _three_step(trace, curvature=2.0, lower_order_final=lower_order_final)


def _three_step(trace: Trace, curvature: float, lower_order_final: bool) -> Form:
    x = trace.x
    past: list[tuple[float, Form]] = []  # (lambda, x0), newest first
    intervals = list(trace.intervals)
    for i, (t, u) in enumerate(intervals):
        x0 = trace.net(x, t)
        past = [(trace.half_logsnr(t), x0), *past[:2]]
        order = min(3, i + 1)
        if lower_order_final:
            order = min(order, len(intervals) - i)
        if trace.is_clean(u):
            order = 1
        x_u = trace.transfer(x, x0, t, u)
        if order > 1:
            h = trace.half_logsnr(u) - past[0][0]
            phi1 = math.expm1(-h)
            phi2 = phi1 / h + 1
            r0 = (past[0][0] - past[1][0]) / h
            slope = (x0 - past[1][1]) / r0
            alpha = trace.alpha(u)
            if order == 2:
                x_u = x_u - (alpha * phi1 / 2) * slope
            else:
                r1 = (past[1][0] - past[2][0]) / h
                difference = slope - (past[1][1] - past[2][1]) / r1
                first = slope + (r0 / (r0 + r1)) * difference
                second = (curvature / (r0 + r1)) * difference
                x_u = x_u + (alpha * phi2) * first - (alpha * (phi2 / h - 0.5)) * second
        x = x_u
    return x
