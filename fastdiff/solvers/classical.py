"""Classical methods on dx/dt, to compare with the pseudo methods, which move by `transfer`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from fastdiff.solvers.pndm import blend
from fastdiff.solvers.registry import solver
from fastdiff.tableau import Form, Trace

Derivative = Callable[[Trace, Form, Form, float], Form]


def drift(trace: Trace, x: Form, e: Form, t: float) -> Form:
    """dx/dt of the probability flow at (x, t): (log alpha)' x + alpha (sigma / alpha)' e."""
    of_alpha, of_sigma = trace.schedule.rates(t)
    return of_alpha * x + (trace.sigma(t) * (of_sigma - of_alpha)) * e


def index_difference(trace: Trace, x: Form, e: Form, t: float) -> Form:
    """The PNDM repository's derivative: what one training index of `transfer` changes."""
    return x - trace.transfer(x, e, t, t - 1)


def euler_step(trace: Trace, x: Form, t: float, u: float) -> Form:
    return x + (u - t) * drift(trace, x, trace.net(x, t), t)


def heun_step(trace: Trace, x: Form, t: float, u: float) -> Form:
    first = drift(trace, x, trace.net(x, t), t)
    ahead = x + (u - t) * first
    return x + ((u - t) / 2) * (first + drift(trace, ahead, trace.net(ahead, u), u))


def runge_kutta_step(
    trace: Trace, x: Form, t: float, u: float, derivative: Derivative = drift, at_base: bool = False
) -> tuple[Form, Form]:
    """Classical RK4 from t to u; returns the new state and the derivative at the old one.

    at_base: form the inner derivatives with the base state and time, as the PNDM repository does.
    """
    h, m = u - t, (t + u) / 2
    first = trace.keep(derivative(trace, x, trace.net(x, t), t))
    total, slope = first, first
    for factor, weight, time in ((h / 2, 2.0, m), (h / 2, 2.0, m), (h, 1.0, u)):
        stage = x + factor * slope
        e = trace.net(stage, time)
        slope = derivative(trace, x, e, t) if at_base else derivative(trace, stage, e, time)
        total = total + weight * slope
        if weight != 1.0:
            total = trace.keep(total)
    return x + (h / 6) * total, first


def _single_step(trace: Trace, step: Callable[[Trace, Form, float, float], Form]) -> Form:
    """Steps of a kind; a transfer where dx/dt is singular, which is at both ends of a flow."""
    x = trace.x
    for t, u in trace.intervals:
        if trace.is_clean(u) or trace.is_leap(t, u):
            x = trace.transfer(x, trace.net(x, t), t, u)
        else:
            x = step(trace, x, t, u)
    return x


@solver("classical_euler", order=1, differentiates=True, family="first order")
def classical_euler(trace: Trace) -> Form:
    """Euler's method on dx/dt: first order, one call a step."""
    return _single_step(trace, euler_step)


@solver("classical_heun", order=2, nfe="2 S - 1", differentiates=True, family="classical")
def classical_heun(trace: Trace) -> Form:
    """Heun's method on dx/dt: second order, two calls a step but the last."""
    return _single_step(trace, heun_step)


@solver("classical_rk4", order=4, nfe="4 S - 3", differentiates=True, family="classical")
def classical_rk4(trace: Trace) -> Form:
    """The classical Runge-Kutta method on dx/dt: fourth order, four calls a step but the last."""
    return _single_step(trace, lambda *step: runge_kutta_step(*step)[0])


@solver("fon", order=4, nfe="S + 9", differentiates=True, family="classical")
def fon(trace: Trace, warm_up: str = "true") -> Form:
    """FON, the classical fourth-order method of the PNDM paper: RK4, then Adams-Bashforth on dx/dt.

    steps + 9 calls from 4 steps on. warm_up: "true" Runge-Kutta steps on the exact derivative, or
    "published": derivatives as differences of one training index, their inner ones formed at the
    base state (beta schedules only).
    """
    if warm_up not in ("true", "published"):
        raise ValueError(f"warm_up must be true or published; got {warm_up!r}")
    at_base = warm_up == "published"
    if at_base and trace.schedule.clean != -1:
        raise ValueError(f"warm_up 'published' is for beta schedules; got {trace.schedule.name}")
    derivative = index_difference if at_base else drift
    history: deque[Form] = deque(maxlen=4)
    x = trace.x
    for t, u in trace.intervals:
        if trace.is_clean(u) or trace.is_leap(t, u):
            x = trace.transfer(x, trace.net(x, t), t, u)
        elif len(history) < 3:
            x, slope = runge_kutta_step(trace, x, t, u, derivative, at_base)
            history.appendleft(slope)
        else:
            history.appendleft(derivative(trace, x, trace.net(x, t), t))
            x = x + (u - t) * blend(history)
    return x
