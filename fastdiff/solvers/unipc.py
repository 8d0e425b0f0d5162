"""UniPC (Zhao et al. 2023): a predictor and a corrector that share their evaluations."""

from __future__ import annotations

import math

import numpy as np

from fastdiff.solvers.registry import solver
from fastdiff.tableau import Form, Trace


@solver("unipc", predicts="sample")
def unipc(trace: Trace) -> Form:
    """UniPC of order 2 with B(h) = e^h - 1 (Zhao et al. 2023, alg. 1 and 2), x0-prediction.

    One call a step: the evaluation at a predicted state corrects that state, then predicts on. The
    first step and the last are of first order; the result itself is not corrected.
    """
    past: list[tuple[float, Form]] = []  # (lambda, x0) at the nodes behind, newest first
    base, x = trace.x, trace.x
    nodes = list(trace.intervals)
    for i, (t, u) in enumerate(nodes):
        x0 = trace.net(x, t)
        if past:
            base = _unified(trace, base, nodes[i - 1], past, corrected=x0)
        else:
            base = x
        trace.keep(base)
        past = [(trace.half_logsnr(t), x0), *past[:1]]
        order = 1 if i in (0, len(nodes) - 1) else 2
        x = _unified(trace, base, (t, u), past[:order])
    return x


def _unified(
    trace: Trace,
    x: Form,
    interval: tuple[float, float],
    past: list[tuple[float, Form]],
    corrected: Form | None = None,
) -> Form:
    """The unified update (eqs. 3 and 8): first order plus weighted differences of x0.

    `past` holds (lambda, x0) at the nodes behind, newest first; `corrected` is x0 at the new node.
    """
    t, u = interval
    h = trace.half_logsnr(u) - trace.half_logsnr(t)
    here, x0 = past[0]
    # Differences from x0 at t, at relative positions r (the new node is at r = 1).
    differences = [((there - here) / h, other - x0) for there, other in past[1:]]
    if corrected is not None:
        differences.append((1.0, corrected - x0))
    x_u = trace.transfer(x, x0, t, u)
    scale = trace.alpha(u) * trace.expm1_step(t, u)
    for (r, difference), weight in zip(
        differences, _weights([r for r, _ in differences], h, corrected is not None), strict=True
    ):
        x_u = x_u - (scale * weight / r) * difference
    return x_u


def _weights(positions: list[float], h: float, corrects: bool) -> list[float]:
    """a_m with sum_m a_m r_m^(k-1) = k! phi_(k+1)(-h) / phi_1(-h), k = 1 .. p, in float64.

    With a single difference the first-order condition alone is kept and a_1 = 1/2, as the paper
    sets it for p = 2 (section 3.4); phi_k are the exponential integrators' functions.
    """
    count = len(positions)
    if count == 0:
        return []
    if count == 1:
        return [0.5]
    matrix = np.vander(np.asarray(positions), count, increasing=True).T
    phi, right = [math.expm1(-h) / -h], []
    for k in range(1, count + 1):
        phi.append((phi[-1] - 1 / math.factorial(k)) / -h)
        right.append(math.factorial(k) * phi[k] / phi[0])
    return [float(a) for a in np.linalg.solve(matrix, right)]
