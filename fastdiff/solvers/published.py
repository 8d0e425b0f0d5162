"""Published variants that differ from the method they name: for reproducing published numbers."""

from __future__ import annotations

from fastdiff.solvers.adams import adams, ratio
from fastdiff.solvers.registry import solver
from fastdiff.tableau import Form, Trace


@solver("ipndm_v_published", order=1, family="exact multistep")
def ipndm_v_published(trace: Trace, order: int = 4) -> Form:
    """iPNDM-v with the weights of its published code (three slips; see ipndm_v for the exact ones).

    One call a step.
    """
    return adams(trace, order, _published)


def _published(trace: Trace, times: list[float], t: float, u: float) -> list[float]:
    s = [ratio(trace, time) for time in times]
    h = ratio(trace, u) - s[0]
    if len(s) == 1:
        return [1.0]
    h1 = s[0] - s[1]
    if len(s) == 2:
        return [1 + h / (2 * h1), -h / (2 * h1)]
    h2 = s[1] - s[2]
    # The parenthesis closes after the last factor instead of before it.
    third = 0.5 * (1 - h / (3 * (h + h1)) * h * (h + h1) / (h1 * (h1 + h2)))
    weights = [
        1 + h / (2 * h1) + third,
        -h / (2 * h1) - (1 + h1 / h2) * third,
        (h1 / h2) * third,
    ]
    if len(s) == 3:
        return weights
    h3 = s[2] - s[3]
    # A plus in place of a minus ...
    fourth = (
        (0.5 * (1 - h / (3 * (h + h1))) + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2)))
        * (h * (h + h1) * (h + h1 + h2))
        / (h1 * (h1 + h2) * (h1 + h2 + h3))
    )
    q = h1 * (h1 + h2) / (h2 * (h2 + h3))
    return [
        weights[0] + fourth,
        weights[1] - (1 + h1 / h2 + q) * fourth,
        weights[2] + (h1 / h2 + q * (1 + h2 / h3)) * fourth,
        -q * (h1 / h2) * fourth,  # ... and h1 / h2 in place of h2 / h3
    ]
