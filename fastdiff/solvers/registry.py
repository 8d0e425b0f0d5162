"""Solvers by name, and from a name to a tableau."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from fastdiff.prediction import Prediction, prediction
from fastdiff.schedule import NoiseSchedule
from fastdiff.tableau import Form, Tableau, trace_solver

SolverFunction = TypeVar("SolverFunction", bound=Callable[..., Form])


@dataclass(frozen=True)
class Solver:
    """A registered solver: its textbook function, and what it declares of itself.

    Attributes:
        name: what `build_tableau` knows it by.
        function: takes a `Trace` and the solver's own options, returns the final state.
        solves_for: the prediction it is written in and keeps its history in, "epsilon" or "sample":
            what `trace.net` hands it, whatever the network predicts.
        order: of convergence as shipped, on the probability-flow ODE; None where it follows none.
        nfe: network evaluations at S steps, on a schedule that ends at a clean image.
        noise: "" where none is drawn, "always", or the option that scales it.
        differentiates: whether it needs the schedule's time derivatives.
        family: what it is compared with in the figure of docs/solvers.md; "": it is left out.
        summary: the first line of the function's docstring.
        options: its own options and their defaults.
    """

    name: str
    function: Callable[..., Form]
    solves_for: str
    order: int | None
    nfe: str
    noise: str
    differentiates: bool
    family: str
    summary: str
    options: dict[str, Any]


_SOLVERS: dict[str, Solver] = {}


def register_solver(
    name: str,
    function: Callable[..., Form],
    *,
    solves_for: str = "epsilon",
    order: int | None = None,
    nfe: str = "S",
    noise: str = "",
    differentiates: bool = False,
    family: str = "",
) -> None:
    """Make a solver available under a name: to `build_tableau`, the sampler and the command line.

    Args:
        name: a new name.
        function: called with a `Trace` (and keyword options); returns the final state.
        solves_for, order, nfe, noise, differentiates, family: what it declares, see `Solver`; all
            but the first are for readers, tables and tests.

    Raises:
        ValueError: the name is taken, `solves_for` is neither "epsilon" nor "sample", `noise` is no
            option, or an option has the name of an argument of `build_tableau`.
    """
    if name in _SOLVERS:
        raise ValueError(f"a solver called {name!r} is registered already")
    if solves_for not in ("epsilon", "sample"):
        raise ValueError(f"solves_for must be 'epsilon' or 'sample'; got {solves_for!r}")
    parameters = list(inspect.signature(function).parameters.values())[1:]
    options = {p.name: p.default for p in parameters}
    if taken := options.keys() & inspect.signature(build_tableau).parameters.keys():
        raise ValueError(f"{name} has an option {min(taken)!r}, an argument of build_tableau")
    if noise not in ("", "always", *options):
        raise ValueError(f'noise must be "", "always" or an option of {name}; got {noise!r}')
    summary = (inspect.getdoc(function) or name).splitlines()[0]
    _SOLVERS[name] = Solver(
        name, function, solves_for, order, nfe, noise, differentiates, family, summary, options
    )


def solver(name: str, **declared: Any) -> Callable[[SolverFunction], SolverFunction]:
    """`register_solver` as a decorator."""

    def register(function: SolverFunction) -> SolverFunction:
        register_solver(name, function, **declared)
        return function

    return register


def solver_names() -> list[str]:
    """The names of all registered solvers, sorted."""
    return sorted(_SOLVERS)


def get_solver(name: str) -> Solver:
    """The solver of a name.

    Raises:
        ValueError: no solver has it; the message lists those there are.
    """
    if name not in _SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(solver_names())}; got {name!r}")
    return _SOLVERS[name]


def build_tableau(
    name: str,
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    prediction: str | Prediction = "epsilon",
    spacing: str | Sequence[float] | None = None,
    start: float | None = None,
    convention: str = "aligned",
    clip: float | tuple[float, float] | None = None,
    from_image: bool = False,
    afs: bool = False,
    **options: Any,
) -> Tableau:
    """Trace a solver over a schedule into a tableau.

    Args:
        name: one of `solver_names()`.
        schedule: the schedule the network was trained with.
        steps: intervals of the time grid; see `NoiseSchedule.times`, which also takes `spacing`,
            `start` and `convention`. How many network calls that makes is `tableau.nfe`.
        prediction: what the network predicts, one of `fastdiff.PREDICTIONS` or a `Prediction`.
        clip: clamp every x0 estimate to [-clip, clip], or to the two bounds given.
        from_image: start at `start` from an image with noise added, instead of from noise.
        afs: replace the first network call by the analytical first step, which takes the data for
            normal with unit variance: one call less.
        options: the solver's own, such as `eta` of ddim.

    Raises:
        ValueError: an unknown solver, schedule times that cannot be, an epsilon or score network
            at zero terminal SNR, bounds out of order.
        TypeError: an option the solver does not have.
    """
    chosen = get_solver(name)
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(f"schedule must be a fastdiff.NoiseSchedule; got {type(schedule).__name__}")
    unknown = set(options) - set(chosen.options)
    if unknown:
        allowed = ", ".join(chosen.options) or "none"
        raise TypeError(f"{name} has no option {sorted(unknown)[0]!r}; its options: {allowed}")
    times = schedule.times(steps, spacing=spacing, start=start, convention=convention)
    kind = _prediction(prediction)
    if schedule.zero_terminal_snr and times[0] == schedule.first:
        if kind.name in ("epsilon", "score"):
            raise ValueError(
                f"prediction {kind.name!r} says nothing where the schedule has zero SNR (time "
                f"{schedule.first:g}); use a network that predicts v or x0, or start below it"
            )
    return trace_solver(
        name,
        partial(chosen.function, **options),  # here, so that no option meets an argument of trace
        schedule.with_convention(convention),
        times,
        solves_for=chosen.solves_for,
        kind=kind,
        clip=_bounds(clip),
        from_image=from_image,
        afs=afs,
    )


_prediction = prediction  # `build_tableau` has an argument of the same name


def _bounds(clip: float | tuple[float, float] | None) -> tuple[float, float] | None:
    if clip is None:
        return None
    low, high = (-clip, clip) if isinstance(clip, int | float) else clip
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"clip must be a positive number or two ascending bounds; got {clip!r}")
    return float(low), float(high)
