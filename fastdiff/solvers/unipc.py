"""UniPC (Zhao et al. 2023): a predictor and a corrector that share their evaluations."""

from __future__ import annotations

import math

import numpy as np

from fastdiff.solvers.registry import solver
from fastdiff.tableau import Form, Trace


@solver("unipc", solves_for="sample", order=2, family="exponential")
def unipc(
    trace: Trace, order: int = 2, variant: str = "bh2", lower_order_final: bool = True
) -> Form:
    """UniPC (Zhao et al. 2023, alg. 1 and 2) with x0-prediction; one call a step.

    The evaluation at a predicted state corrects that state, then predicts on. Orders grow from 1 at
    the start and, with lower_order_final, fall to 1 at the end; the result is not corrected.
    order: 1, 2 or 3. variant: "bh1", B(h) = h, or "bh2", B(h) = e^h - 1.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3; got {order}")
    if variant not in ("bh1", "bh2"):
        raise ValueError(f"variant must be bh1 or bh2; got {variant!r}")
    past: list[tuple[float, Form]] = []  # (lambda, x0) at the nodes behind, newest first
    base, x = trace.x, trace.x
    nodes, used = list(trace.intervals), 1
    for i, (t, u) in enumerate(nodes):
        x0 = trace.net(x, t)
        if past:
            base = _unified(trace, base, nodes[i - 1], past[:used], variant, corrected=x0)
        else:
            base = x
        trace.keep(base)
        past = [(trace.half_logsnr(t), x0), *past[: order - 1]]
        used = min(order, i + 1)
        if lower_order_final:
            used = min(used, len(nodes) - i)
        if trace.is_clean(u):
            used = 1
        x = _unified(trace, base, (t, u), past[:used], variant)
    return x


def _unified(
    trace: Trace,
    x: Form,
    interval: tuple[float, float],
    past: list[tuple[float, Form]],
    variant: str,
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
    weights = _weights([r for r, _ in differences], h, variant)
    for (r, difference), weight in zip(differences, weights, strict=True):
        x_u = x_u - (trace.alpha(u) * weight / r) * difference
    return x_u


def _weights(positions: list[float], h: float, variant: str) -> list[float]:
    """B(-h) a_m with sum_m B a_m r_m^(k-1) = -h k! phi_(k+1)(-h), k = 1 .. p, in float64.

    With a single difference the first-order condition alone is kept and a_1 = 1/2, as the paper
    sets it (section 3.4): only there does the choice of B matter. phi_k are the exponential
    integrators' functions.
    """
    count = len(positions)
    if count == 1:
        return [(-h if variant == "bh1" else math.expm1(-h)) / 2]
    matrix = np.vander(np.asarray(positions), count, increasing=True).T
    phi, right = math.expm1(-h) / -h, []
    for k in range(1, count + 1):
        phi = (phi - 1 / math.factorial(k)) / -h
        right.append(-h * math.factorial(k) * phi)
    return [float(a) for a in np.linalg.solve(matrix, right)]
