"""What each solver supports, found by trying: the table in docs/solvers.md and `fastdiff solvers`.

Trying takes ten seconds, so the result is kept in assets/support.json, which this renews, with the
table between the page's two markers: `python -m fastdiff.app.solver_table docs/solvers.md`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.prediction import PREDICTIONS
from fastdiff.sampler import Sampler
from fastdiff.schedule import CONVENTIONS, NoiseSchedule
from fastdiff.solvers.registry import build_tableau, get_solver, solver_names
from fastdiff.tableau import Tableau

ASSET = Path(__file__).parents[1] / "assets" / "support.json"
BEGIN, END = "<!-- support matrix: begin -->", "<!-- support matrix: end -->"

_BETA = NoiseSchedule.linear_beta()
_SMOOTH = NoiseSchedule.logsnr_cosine(-6.0, 6.0)


def support_matrix() -> list[dict[str, str]]:
    """One row per solver, column name to text; every entry is tried, none is kept by hand."""
    return [_row(name) for name in solver_names()]


def load_support() -> list[dict[str, str]]:
    """The support matrix as it was when it was last made."""
    return json.loads(ASSET.read_text())


def support_markdown(rows: list[dict[str, str]]) -> str:
    """A support matrix as a table in markdown."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def renew(page: str, rows: list[dict[str, str]]) -> str:
    """A page's text with this table between its markers.

    Raises:
        ValueError: the page lacks a marker.
    """
    for marker in (BEGIN, END):
        if marker not in page:
            raise ValueError(f"the page must have the line {marker}")
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{support_markdown(rows)}\n{END}{rest.partition(END)[2]}"


def _row(name: str) -> dict[str, str]:
    def build(**options: Any) -> Tableau:
        return build_tableau(name, _BETA, **{"steps": 6, **options})

    plain = build()
    return {
        "solver": name,
        "order": "-" if plain.stochastic else str(_order(name)),
        "calls at S steps": _calls(build),
        "noise": _noise(name, build),
        "per-sample rows": _per_sample(name, build),
        "AFS": _yes(build(afs=True).nfe == plain.nfe - 1),
        "dynamic threshold": _yes(_estimates_sample(build(clip=1.0))),
        "img2img": _yes(build(from_image=True, start=600.0).from_image),
        "inpainting": _yes(_shows_first_write(plain)),
        "predictions": _tried(PREDICTIONS, lambda kind: build(prediction=kind)),
        "conventions": _tried(
            CONVENTIONS, lambda convention: build(convention=convention, spacing="leading")
        ),
    }


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _tried(names: tuple[str, ...], build: Callable[[str], Tableau]) -> str:
    """Those names with which a tableau can be built."""

    def builds(name: str) -> bool:
        try:
            build(name)
        except ValueError:
            return False
        return True

    good = [name for name in names if builds(name)]
    return "all" if len(good) == len(names) else ", ".join(good)


def _calls(build: Callable[..., Tableau]) -> str:
    """Network calls as a S + b, from two numbers of steps."""
    few, many = build(steps=20).nfe, build(steps=30).nfe
    slope = (many - few) // 10
    rest = few - 20 * slope
    return ("S" if slope == 1 else f"{slope} S") + (
        f" {'+-'[rest < 0]} {abs(rest)}" if rest else ""
    )


def _amount(name: str, build: Callable[..., Tableau]) -> str | None:
    """The first option that scales a solver's noise: without any at 0, with some at 1."""
    for option, default in get_solver(name).options.items():
        if isinstance(default, float):
            if not build(**{option: 0.0}).stochastic and build(**{option: 1.0}).stochastic:
                return option
    return None


def _noise(name: str, build: Callable[..., Tableau]) -> str:
    return _amount(name, build) or ("always" if build().stochastic else "none")


def _per_sample(name: str, build: Callable[..., Tableau]) -> str:
    """The option of the noise, where it may be an array [B]."""
    option = _amount(name, build)
    if option is None:
        return "none"
    try:
        rows = build(**{option: np.array([0.0, 0.5, 1.0])}).samples
    except (TypeError, ValueError):
        return "none"
    return option if rows == 3 else "none"


def _estimates_sample(tableau: Tableau) -> bool:
    """Whether every network call makes an x0 estimate that can be thresholded."""
    return all(np.any(stage.to_sample[0]) for stage in tableau.stages if stage.time is not None)


def _shows_first_write(tableau: Tableau) -> bool:
    """Whether all the network sees, and the result, is a first write: what a mask is applied to."""
    shown = [stage.sees for stage in tableau.stages[1:]] + [tableau.result]
    return [stage.writes[0].slot for stage in tableau.stages] == shown


def _order(name: str) -> int:
    """The order of convergence as shipped, measured at 80 and 160 steps.

    On normal data, where the end of the ODE is known in closed form.
    """
    mean, std, schedule = 0.3, 0.4, _SMOOTH

    def power(t: float) -> float:
        return schedule.alpha(t) ** 2 * std**2 + schedule.sigma(t) ** 2

    def epsilon(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        time = float(t[0])
        return schedule.sigma(time) * (x - schedule.alpha(time) * mean) / power(time)

    first, last = schedule.first, schedule.last
    scale = (power(last) / power(first)) ** 0.5
    start = torch.full((1, 1), 1.5, dtype=torch.float64)
    exact = schedule.alpha(last) * mean + scale * (1.5 - schedule.alpha(first) * mean)
    few, many = (
        abs(
            Sampler(epsilon, schedule, solver=name, steps=steps, dtype=torch.float64)(start).item()
            - exact
        )
        for steps in (80, 160)
    )
    return round(np.log2(few / many))


if __name__ == "__main__":
    path, matrix = Path(sys.argv[1]), support_matrix()
    path.write_text(renew(path.read_text(), matrix))
    ASSET.write_text(json.dumps(matrix, indent=1) + "\n")
