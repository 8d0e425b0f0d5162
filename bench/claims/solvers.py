"""Error against network calls for every deterministic solver: `python -m bench.claims.solvers`.

The RMS distance per pixel to the converged solution, digits model, from the same 64 noises, on the
default grid, goes to bench/results/solvers.json; `python -m bench report` draws it.
"""

from __future__ import annotations

import torch
from tqdm import tqdm

from fastdiff import Sampler, build_tableau, solver_names
from fastdiff.app.distances import paired_error
from fastdiff.models import load_digits, load_digits_reference
from fastdiff.training.recipes.digits import digits_schedule

from ..files import RESULTS, write_json
from ..machine import machine

CALLS = (5, 8, 10, 13, 20, 30)
PATH = RESULTS / "solvers.json"
FAMILIES = {
    "first order": ("ddim", "classical_euler"),
    "pseudo multistep": ("s_pndm", "f_pndm", "plms", "ipndm"),
    "exact multistep": ("ipndm_v", "ipndm_v_published", "deis"),
    "Runge-Kutta": ("heun", "pseudo_rk4", "dpm_solver_2"),
    "classical": ("classical_heun", "classical_rk4", "fon"),
    "exponential": ("dpmpp_2m", "dpmpp_3m", "dpmpp_3m_exact", "unipc"),
}
SAME = ("euler",)  # as ddim


def curve(solver: str) -> tuple[list[int], list[float]]:
    """Numbers of calls, and the RMS distance per pixel to the converged solution at each."""
    network, _ = load_digits()
    reference = load_digits_reference()
    calls, errors = [], []
    for target in CALLS:
        fitting = [
            tableau
            for steps in range(1, target + 1)
            if (tableau := build_tableau(solver, digits_schedule(), steps)).nfe <= target
        ]
        tableau = fitting[-1]
        if tableau.nfe in calls or tableau.steps < 2:
            continue
        found = Sampler(network, tableau=tableau)(reference["noise"], labels=reference["labels"])
        calls.append(tableau.nfe)
        errors.append(paired_error(found.double(), reference["x0"]).value)
    return calls, errors


def main() -> None:
    torch.set_num_threads(1)
    deterministic = {
        name for name in solver_names() if not build_tableau(name, digits_schedule(), 5).stochastic
    }
    shown = [name for names in FAMILIES.values() for name in names]
    missing = deterministic.symmetric_difference({*shown, *SAME})
    assert not missing, f"solvers without a place in the figure: {sorted(missing)}"
    record = {
        "command": "python -m bench.claims.solvers",
        **machine(torch.device("cpu")),
        "threads": 1,
    }
    curves = {}
    for name in tqdm(shown):
        calls, errors = curve(name)
        curves[name] = {"calls": calls, "errors": errors}
        tqdm.write(name + "".join(f" {c}:{e:.4f}" for c, e in zip(calls, errors, strict=True)))
    record["families"] = {
        family: {name: curves[name] for name in names} for family, names in FAMILIES.items()
    }
    write_json(PATH, record)


if __name__ == "__main__":
    main()
