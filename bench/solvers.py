"""Error against network calls for every deterministic solver: `python -m bench.solvers`.

Writes docs/solvers.png: the RMS distance per pixel to the converged solution, digits model, from
the same 64 noises, on the default grid.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

from fastdiff.models import load_digits, load_digits_reference
from fastdiff.sampler import Sampler
from fastdiff.solvers import build_tableau, solver_names
from fastdiff.training.digits import digits_schedule
from fastdiff.training.quality import paired_error

CALLS = (5, 8, 10, 13, 20, 30)
PATH = Path("docs/solvers.png")
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
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), sharex=True, sharey=True)
    curves = {name: curve(name) for name in tqdm(shown)}
    for axis, (family, names) in zip(axes.flat, FAMILIES.items(), strict=True):
        for name in ("ipndm", "ddim"):
            if name not in names:
                axis.plot(*curves[name], color="0.75", lw=1, ls="--", label=name)
        for name in names:
            axis.plot(*curves[name], marker="o", ms=3.5, lw=1.3, label=name)
        axis.set(xscale="log", yscale="log", title=family)
        axis.set_xticks([5, 10, 20, 30], ["5", "10", "20", "30"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("network calls")
    for axis in axes[:, 0]:
        axis.set_ylabel("RMS distance per pixel")
    axes[0, 0].set_ylim(2e-3, 3)
    figure.suptitle("Distance to the converged solution, digits model, same 64 noises")
    figure.tight_layout()
    figure.savefig(PATH, dpi=100)
    for name, (calls, errors) in sorted(curves.items()):
        print(name, " ".join(f"{c}:{e:.4f}" for c, e in zip(calls, errors, strict=True)))


if __name__ == "__main__":
    main()
