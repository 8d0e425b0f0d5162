"""The solvers: textbook functions on a `Trace`, one file per family, registered by name."""

from __future__ import annotations

from fastdiff.solvers import ddim, dpm, pndm, runge_kutta, unipc
from fastdiff.solvers.registry import Solver, build_tableau, register_solver, solver, solver_names

__all__ = [
    "Solver",
    "build_tableau",
    "ddim",
    "dpm",
    "pndm",
    "register_solver",
    "runge_kutta",
    "solver",
    "solver_names",
    "unipc",
]
