"""What each solver declares, as a table: `fastdiff solvers`, and in docs/solvers.md.

`python -m fastdiff.app.solver_table docs/solvers.md` renews the table between the page's markers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastdiff.solvers.registry import get_solver, solver_names

BEGIN, END = "<!-- solvers: begin -->", "<!-- solvers: end -->"
OF_ALL = (
    "All of them: the analytical first step (afs), dynamic thresholding, image to image, "
    "inpainting, every prediction."
)


def solver_rows() -> list[dict[str, str]]:
    """One row per solver, column name to text."""
    return [_row(name) for name in solver_names()]


def solver_markdown(rows: list[dict[str, str]]) -> str:
    """Rows as a table in markdown."""
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
    return f"{before}{BEGIN}\n{solver_markdown(rows)}\n{END}{rest.partition(END)[2]}"


def _row(name: str) -> dict[str, str]:
    solver = get_solver(name)
    return {
        "solver": name,
        "order": "-" if solver.order is None else str(solver.order),
        "NFE at S steps": solver.nfe,
        "noise": solver.noise or "none",
        "conventions": "aligned, offset" if solver.differentiates else "all",
    }


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renew(path.read_text(), solver_rows()))
