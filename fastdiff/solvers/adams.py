"""Adams-Bashforth methods with the exact weights of a non-uniform grid: iPNDM-v and DEIS."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from fastdiff.solvers.lagrange import lagrange_means
from fastdiff.solvers.pndm import combine
from fastdiff.solvers.registry import solver
from fastdiff.tableau import Form, Trace

# Newest first; given the times behind and the interval (t, u), a weight for each.
Weights = Callable[[Trace, list[float], float, float], list[float]]


def adams(trace: Trace, order: int, weights: Weights) -> Form:
    """A variable-step multistep method: blend the history with `weights`, move once."""
    if order not in (1, 2, 3, 4):
        raise ValueError(f"order must be 1, 2, 3 or 4; got {order}")
    history: deque[tuple[float, Form]] = deque(maxlen=order)
    x = trace.x
    for t, u in trace.intervals:
        history.appendleft((t, trace.net(x, t)))
        times, past = zip(*history, strict=True)
        x = trace.transfer(x, combine(weights(trace, list(times), t, u), past), t, u)
    return x


def ratio(trace: Trace, t: float) -> float:
    """s = sigma / alpha."""
    return trace.sigma(t) / trace.alpha(t)


def in_sigma(trace: Trace, times: list[float], t: float, u: float) -> list[float]:
    """Exact for polynomials in s = sigma / alpha."""
    return lagrange_means([ratio(trace, time) for time in times], ratio(trace, t), ratio(trace, u))


def in_time(trace: Trace, times: list[float], t: float, u: float) -> list[float]:
    """Exact for polynomials in time, integrated over s (DEIS eq. 15)."""
    return lagrange_means(
        times,
        ratio(trace, t),
        ratio(trace, u),
        lambda s: np.asarray(trace.schedule.time(-2 * np.log(s))),
    )


def in_log_sigma(trace: Trace, times: list[float], t: float, u: float) -> list[float]:
    """Exact for polynomials in log s, integrated over s. First order into the clean image."""
    if trace.is_clean(u):
        return [1.0] + [0.0] * (len(times) - 1)
    nodes = [float(np.log(ratio(trace, time))) for time in times]
    return lagrange_means(nodes, ratio(trace, t), ratio(trace, u), np.log)


_KINDS: dict[str, Weights] = {"tab": in_time, "rhoab": in_sigma, "logrhoab": in_log_sigma}


@solver("ipndm_v", order=2, family="exact multistep")
def ipndm_v(trace: Trace, order: int = 4) -> Form:
    """iPNDM with the exact Adams-Bashforth weights of the grid in sigma / alpha; one call a step.

    The widely copied published weights have three slips; `ipndm_v_published` has those.
    """
    return adams(trace, order, in_sigma)


@solver("deis", order=2, family="exact multistep")
def deis(trace: Trace, order: int = 3, kind: str = "tab") -> Form:
    """DEIS (Zhang & Chen 2023): Adams-Bashforth in time (tab), sigma (rhoab) or its logarithm.

    One call a step. kind: "tab", "rhoab" or "logrhoab".
    """
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}; got {kind!r}")
    return adams(trace, order, _KINDS[kind])
