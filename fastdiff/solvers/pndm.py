"""Pseudo linear multistep methods (Liu et al. 2022, PNDM) and iPNDM (Zhang & Chen 2023, DEIS).

All of them blend past predictions with the Adams-Bashforth weights of a uniform grid and move once
with `transfer`; they differ in how they come by a history.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from fastdiff.solvers.registry import solver
from fastdiff.solvers.runge_kutta import improved_euler
from fastdiff.tableau import Form, Trace

# Newest first (PNDM eq. 12 and its lower orders).
ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def blend(history: deque[Form]) -> Form:
    """The Adams-Bashforth combination of a history, newest first; its length is the order."""
    return combine(ADAMS_BASHFORTH[len(history) - 1], history)


def combine(weights: Sequence[float], forms: Iterable[Form]) -> Form:
    """The sum of weights times forms, one each."""
    first, *others = (w * form for w, form in zip(weights, forms, strict=True))
    return sum(others, first)


def runge_kutta(trace: Trace, x: Form, t: float, u: float) -> tuple[Form, Form]:
    """One pseudo Runge-Kutta step from t to u (PNDM eq. 13): four calls.

    Returns the new state and the prediction at the old one.
    """
    m = (t + u) / 2
    d1 = trace.net(x, t)
    d2 = trace.net(trace.transfer(x, d1, t, m), m)
    total = trace.keep(d1 + 2 * d2)  # a running sum: one buffer in place of two
    d3 = trace.net(trace.transfer(x, d2, t, m), m)
    total = trace.keep(total + 2 * d3)
    d4 = trace.net(trace.transfer(x, d3, t, u), u)
    return trace.transfer(x, (total + d4) / 6, t, u), d1


def multistep(trace: Trace, order: int, warm_up: int = 0, start: str = "") -> Form:
    """Adams-Bashforth of an order, with `warm_up` single steps of a kind before it.

    A warm-up step that would end at the clean image, where a network says nothing, or that leaps
    (see `Trace.is_leap`) is replaced by the blend at hand.
    """
    single = {"improved_euler": improved_euler, "runge_kutta": runge_kutta}.get(start)
    history: deque[Form] = deque(maxlen=order)
    x = trace.x
    for i, (t, u) in enumerate(trace.intervals):
        if single and i < warm_up and not (trace.is_clean(u) or trace.is_leap(t, u)):
            x, d = single(trace, x, t, u)
            history.appendleft(d)
        else:
            history.appendleft(trace.net(x, t))
            x = trace.transfer(x, blend(history), t, u)
    return x


@solver("s_pndm", order=2, nfe="S + 1", family="pseudo multistep")
def s_pndm(trace: Trace) -> Form:
    """S-PNDM (Liu et al. 2022): second order; one improved Euler step, then two-step blends.

    steps + 1 calls.
    """
    return multistep(trace, order=2, warm_up=1, start="improved_euler")


@solver("f_pndm", order=2, nfe="S + 9", family="pseudo multistep")
def f_pndm(trace: Trace) -> Form:
    """F-PNDM (Liu et al. 2022, alg. 2): three Runge-Kutta steps, then four-step blends.

    steps + 9 calls from 4 steps on.
    """
    return multistep(trace, order=4, warm_up=3, start="runge_kutta")


@solver("plms", order=2, nfe="S + 1", family="pseudo multistep")
def plms(trace: Trace) -> Form:
    """PLMS (Rombach et al. 2022): one improved Euler step, then blends of growing order up to 4.

    steps + 1 calls.
    """
    return multistep(trace, order=4, warm_up=1, start="improved_euler")


@solver("ipndm", order=2, family="pseudo multistep")
def ipndm(trace: Trace) -> Form:
    """iPNDM (Zhang & Chen 2023): blends of growing order up to 4 from the first step on.

    One call a step.
    """
    return multistep(trace, order=4)


@solver("pseudo_rk4", order=2, nfe="4 S - 3", family="Runge-Kutta")
def pseudo_rk4(trace: Trace) -> Form:
    """Pseudo Runge-Kutta at every step (PNDM eq. 13): four calls a step but the last.

    A step that leaps (see `Trace.is_leap`) is of first order.
    """
    x = trace.x
    for t, u in trace.intervals:
        if trace.is_clean(u) or trace.is_leap(t, u):
            x = trace.transfer(x, trace.net(x, t), t, u)
        else:
            x, _ = runge_kutta(trace, x, t, u)
    return x
