"""Single-step solvers of higher order."""

from __future__ import annotations

from fastdiff.solvers.registry import solver
from fastdiff.tableau import Form, Trace


def improved_euler(trace: Trace, x: Form, t: float, u: float) -> tuple[Form, Form]:
    """One trapezoidal step from t to u in sigma / alpha (Heun; PNDM's pseudo improved Euler).

    Two calls. Returns the new state and the prediction at the old one.
    """
    d = trace.net(x, t)
    ahead = trace.net(trace.transfer(x, d, t, u), u)
    return trace.transfer(x, (d + ahead) / 2, t, u), d


def heun_step(trace: Trace, x: Form, t: float, u: float) -> Form:
    """`improved_euler` where it can be taken; Euler to the clean image and over a leap."""
    if trace.is_clean(u) or trace.is_leap(t, u):
        return trace.transfer(x, trace.net(x, t), t, u)
    return improved_euler(trace, x, t, u)[0]


@solver("heun", order=2, nfe="2 S - 1", family="Runge-Kutta")
def heun(trace: Trace) -> Form:
    """Heun's second-order method in sigma / alpha (Karras et al. 2022, alg. 1, without churn).

    2 steps - 1 calls: the last step, to the clean image, is Euler's; so is one that leaps (see
    `Trace.is_leap`), such as the first from pure noise.
    """
    x = trace.x
    for t, u in trace.intervals:
        x = heun_step(trace, x, t, u)
    return x
