"""What solvers declare of themselves, held to what they do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastdiff import PREDICTIONS, Tableau, build_tableau, solver_names
from fastdiff.app import solver_table
from fastdiff.schedule import CONVENTIONS
from fastdiff.solvers.registry import get_solver
from tests.helpers import orders
from tests.helpers.schedules import LINEAR

PAGE = Path(__file__).parents[2] / "docs" / "solvers.md"


def built(name: str) -> Callable[..., Tableau]:
    return lambda **options: build_tableau(name, LINEAR, **{"steps": 6, **options})


def builds(build: Callable[..., Tableau], **options: Any) -> bool:
    try:
        build(**options)
    except ValueError:
        return False
    return True


def nfe(build: Callable[..., Tableau]) -> str:
    """Network evaluations as a S + b, from two numbers of steps."""
    few, many = build(steps=20).nfe, build(steps=30).nfe
    slope = (many - few) // 10
    rest = few - 20 * slope
    text = "S" if slope == 1 else f"{slope} S"
    return f"{text} {'+-'[rest < 0]} {abs(rest)}" if rest else text


@pytest.mark.parametrize("name", solver_names())
def test_a_solver_does_what_it_declares(name: str) -> None:
    solver, build = get_solver(name), built(name)
    plain = build()
    assert solver.nfe == nfe(build)
    # An order where no noise is drawn with the defaults; the option of the noise turns it on.
    assert (solver.order is None) == plain.stochastic
    if solver.noise not in ("", "always"):
        assert isinstance(solver.options[solver.noise], float)
        assert not build(**{solver.noise: 0.0}).stochastic
        assert build(**{solver.noise: 1.0}).stochastic
    else:
        assert plain.stochastic == (solver.noise == "always")
    if solver.noise == "eta":  # one value for each sample
        assert build(eta=np.array([0.0, 0.5, 1.0])).samples == 3
    allowed = [c for c in CONVENTIONS if builds(build, convention=c, spacing="leading")]
    wanted = [c for c in CONVENTIONS if c != "published"] if solver.differentiates else CONVENTIONS
    assert allowed == list(wanted)


@pytest.mark.parametrize("name", solver_names())
def test_every_solver_supports_what_the_page_says_of_all(name: str) -> None:
    build = built(name)
    plain, clipped = build(), build(clip=1.0)
    assert build(afs=True).nfe == plain.nfe - 1
    assert all(builds(build, prediction=kind) for kind in PREDICTIONS)
    assert build(from_image=True, start=600.0).from_image
    # Each network call makes an x0 estimate that can be thresholded.
    assert all(np.any(s.to_sample[0]) for s in clipped.stages if s.time is not None)
    # All that the network sees, and the result, is a first write: what a mask is applied to.
    shown = [stage.sees for stage in plain.stages[1:]] + [plain.result]
    assert [stage.writes[0].slot for stage in plain.stages] == shown


def test_the_page_shows_what_is_declared() -> None:
    page = PAGE.read_text()
    rows = {row["solver"]: row for row in solver_table.solver_rows()}
    before, _, table = page.partition(solver_table.BEGIN)
    lines = table.partition(solver_table.END)[0].strip().splitlines()
    shown = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert shown[0] == list(rows["ddim"]) and len(shown) > 25
    for cells in shown[2:]:
        assert cells == list(rows[cells[0]].values())
    assert solver_table.renew(solver_table.renew(page, [rows["ddim"]]), [*rows.values()]) == (
        solver_table.renew(page, [*rows.values()])
    )
    with pytest.raises(ValueError, match="the page must have the line <!-- solvers: begin"):
        solver_table.renew("no table here", [rows["ddim"]])


def test_declarations_known_from_elsewhere() -> None:
    assert get_solver("f_pndm").nfe == "S + 9" and get_solver("heun").nfe == "2 S - 1"
    assert get_solver("ddim").noise == "eta" and get_solver("heun_churn").noise == "churn"
    assert get_solver("lcm").order is None and get_solver("fon").differentiates
    assert get_solver("dpmpp_2m").solves_for == "sample"
    assert set(orders.deterministic_solvers()) >= {"ddim", "ipndm", "unipc", "fon"}
