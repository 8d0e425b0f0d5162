"""The solvers: textbook functions on a `Trace`, one file per family, registered by name."""

from __future__ import annotations

from fastdiff.solvers import (
    adams,
    classical,
    ddim,
    dpm,
    pndm,
    published,
    runge_kutta,
    score_sde,
    stochastic,
    unipc,
)
from fastdiff.solvers.registry import Solver, build_tableau, register_solver, solver, solver_names

__all__ = [
    "Solver",
    "adams",
    "build_tableau",
    "classical",
    "ddim",
    "dpm",
    "pndm",
    "published",
    "register_solver",
    "runge_kutta",
    "score_sde",
    "solver",
    "solver_names",
    "stochastic",
    "unipc",
]
