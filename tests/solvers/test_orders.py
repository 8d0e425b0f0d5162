"""Orders of convergence. docs/orders.md has the tables and the reasons."""

from __future__ import annotations

from typing import Any

import pytest

from fastdiff.solvers.registry import get_solver
from tests.helpers import orders

BENT = ("ipndm", "ipndm_v", "ipndm_v_published", "deis")  # on their way to their orders


def test_orders_as_shipped() -> None:
    """The last halving of those that settle early, on the mild problem."""
    for solver in orders.deterministic_solvers():
        if solver not in BENT:
            (slope,) = orders.slopes(orders.errors(solver, orders.MILD, (80, 160)))
            assert slope == pytest.approx(get_solver(solver).order, abs=0.3), solver


@pytest.mark.parametrize("case", orders.EXACT_STARTS, ids=lambda c: orders.label(*c[:2]))
def test_orders_after_an_exact_start(case: Any) -> None:
    solver, options, exact, order = case
    errors = orders.errors_after_exact_start(solver, orders.STIFF, exact, (80, 160), **options)
    (slope,) = orders.slopes(errors)
    if solver == "dpmpp_3m":  # its third-order part still hides the second
        assert 2 < slope < 3
    else:
        assert slope == pytest.approx(order, abs=0.65 if order < 4 else 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("problem", orders.PROBLEMS)
@pytest.mark.parametrize("solver", orders.deterministic_solvers())
def test_orders_as_shipped_over_three_halvings(solver: str, problem: str) -> None:
    errors = orders.errors(solver, orders.PROBLEMS[problem], orders.STEPS[-4:])
    mean = orders.slopes(errors).mean()
    if solver == "ipndm_v_published":
        assert mean < 1.2
    elif solver in BENT:
        assert 1.6 < mean < 2.6 and errors[-1] < 3e-6
    else:
        assert mean == pytest.approx(get_solver(solver).order, abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("problem", orders.PROBLEMS)
@pytest.mark.parametrize("case", orders.EXACT_STARTS, ids=lambda c: orders.label(*c[:2]))
def test_orders_after_an_exact_start_over_three_halvings(case: Any, problem: str) -> None:
    solver, options, exact, order = case
    mixture = orders.PROBLEMS[problem]
    errors = orders.errors_after_exact_start(solver, mixture, exact, orders.STEPS[-4:], **options)
    slopes = orders.slopes(errors)
    # The last halving; order 4 of ipndm_v and unipc is not there yet.
    assert slopes[-1] == pytest.approx(order, abs=0.45 if order == 4 else 0.25)
