"""DPM-Solver++ (Lu et al. 2022)."""

from __future__ import annotations

from fastdiff.solvers.registry import solver
from fastdiff.tableau import Form, Trace


@solver("dpmpp_2m", predicts="sample")
def dpmpp_2m(trace: Trace) -> Form:
    """DPM-Solver++(2M) (Lu et al. 2022, alg. 2): second order in log-SNR, one call a step.

    The first step and the one that ends at the clean image are of first order.
    """
    x, before, h_before = trace.x, None, 0.0
    for t, u in trace.intervals:
        x0 = trace.net(x, t)
        h = trace.half_logsnr(u) - trace.half_logsnr(t)
        d = x0
        if before is not None and not trace.is_clean(u):
            # Extrapolate x0 to the middle of the step, half a step past t.
            d = x0 + (h / (2 * h_before)) * (x0 - before)
        x = trace.transfer(x, d, t, u)
        before, h_before = x0, h
    return x
