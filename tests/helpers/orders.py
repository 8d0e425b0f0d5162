"""Orders of convergence, measured, as `python -m tests.helpers.orders > docs/orders.md` has them.

Two mixtures on the line, five starting points, float64, the exact score in closed form, and as the
truth the probability-flow ODE solved by scipy's DOP853 at a relative tolerance of 3e-14.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastdiff import NoiseSchedule, Sampler, solver_names
from fastdiff.solvers.registry import get_solver
from tests.helpers.oracles import MILD, STIFF, Array, Mixture, NumericTrace, as_denoiser

SCHEDULE = NoiseSchedule.logsnr_cosine(-6.0, 6.0)
PROBLEMS = {"mild": MILD, "stiff": STIFF}
STARTS = np.array([-2.0, -0.9, 0.1, 0.7, 1.8])
STEPS = (20, 40, 80, 160, 320, 640)

# Besides every deterministic solver with its defaults.
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("deis", {"order": 1}),
    ("deis", {"order": 2}),
    ("deis", {"order": 4}),
    ("deis", {"kind": "rhoab"}),
    ("deis", {"kind": "logrhoab"}),
    ("dpmpp_3m", {"lower_order_final": False}),
    ("dpmpp_3m_exact", {"lower_order_final": False}),
    ("ipndm_v", {"order": 2}),
    ("ipndm_v", {"order": 3}),
    ("ipndm_v_published", {"order": 2}),
    ("ipndm_v_published", {"order": 3}),
    ("unipc", {"order": 1}),
    ("unipc", {"order": 2, "lower_order_final": False}),
    ("unipc", {"order": 3}),
    ("unipc", {"order": 3, "lower_order_final": False}),
    ("unipc", {"variant": "bh1"}),
)

# With exact values at as many nodes as the method looks back: solver, options, nodes, the order.
EXACT_STARTS: tuple[tuple[str, dict[str, Any], int, int], ...] = (
    ("fon", {}, 3, 4),
    ("ipndm", {}, 3, 2),
    *(("ipndm_v", {"order": k}, k - 1, k) for k in (1, 2, 3, 4)),
    *(("deis", {"order": k, "kind": "tab"}, k - 1, k) for k in (1, 2, 3, 4)),
    *(("deis", {"order": k, "kind": "logrhoab"}, k - 1, k) for k in (1, 2, 3, 4)),
    ("dpmpp_2m", {}, 1, 2),
    ("dpmpp_3m", {"lower_order_final": False}, 2, 2),
    ("dpmpp_3m_exact", {"lower_order_final": False}, 2, 3),
    ("dpmpp_3m_exact", {}, 2, 2),
    *(("unipc", {"order": p, "lower_order_final": False}, p - 1, p + 1) for p in (1, 2, 3)),
    ("unipc", {"order": 2, "variant": "bh1", "lower_order_final": False}, 1, 3),
    ("unipc", {"order": 2}, 1, 2),
    ("unipc", {"order": 3}, 2, 2),
)


def angle(t: float) -> float:
    return float(np.arctan2(SCHEDULE.sigma(t), SCHEDULE.alpha(t)))


def deterministic_solvers() -> list[str]:
    """The solvers that follow the ODE: those that draw no noise."""
    return [name for name in solver_names() if get_solver(name).order is not None]


def errors(
    solver: str, problem: Mixture, steps: tuple[int, ...] = STEPS, **options: Any
) -> np.ndarray:
    """RMS distance to the true end points, one for each number of steps."""
    truth = problem.flow(STARTS, angle(SCHEDULE.first), angle(SCHEDULE.last))
    denoiser = as_denoiser(lambda x, t: problem.epsilon(x, SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    result = []
    for count in steps:
        sampler = Sampler(
            denoiser, SCHEDULE, solver=solver, steps=count, dtype=torch.float64, **options
        )
        ends = sampler(torch.from_numpy(STARTS)[:, None])[:, 0].numpy()
        result.append(np.sqrt(np.mean((ends - truth) ** 2)))
    return np.array(result)


class ExactStart(NumericTrace):
    """Runs a solver on arrays whose first steps are right whatever the solver makes of them.

    Up to and with node `exact`, the state that the network is asked about is overwritten in place
    by the true one, so that the solver goes on from there with exact predictions at every node
    behind. What UniPC keeps is its corrected state, and is overwritten too.
    """

    def __init__(self, problem: Mixture, times: Array, exact: int, solves_for: str) -> None:
        network = lambda x, t: problem.epsilon(x, SCHEDULE.alpha(t), SCHEDULE.sigma(t))
        super().__init__(SCHEDULE, times, network, STARTS, solves_for=solves_for)
        self.problem, self.until = problem, self.times[exact]
        self.now = self.times[0]

    def net(self, x: Array, t: float) -> Array:
        self.now = t
        return super().net(self._corrected(x), t)

    def keep(self, x: Array) -> Array:
        return self._corrected(x) if self.solves_for == "sample" else x

    def _corrected(self, x: Array) -> Array:
        if self.until <= self.now < self.times[0]:
            x[:] = self.problem.flow(STARTS, angle(self.times[0]), angle(self.now))
        return x


def errors_after_exact_start(
    solver: str, problem: Mixture, exact: int, steps: tuple[int, ...] = STEPS, **options: Any
) -> np.ndarray:
    """As `errors`, where the solver has true values at its first `exact` + 1 nodes."""
    truth = problem.flow(STARTS, angle(SCHEDULE.first), angle(SCHEDULE.last))
    known, result = get_solver(solver), []
    for count in steps:
        run = ExactStart(problem, SCHEDULE.times(count), exact, known.solves_for)
        ends = known.function(run, **options).astype(np.float64)
        result.append(np.sqrt(np.mean((ends - truth) ** 2)))
    return np.array(result)


def slopes(errors: np.ndarray) -> np.ndarray:
    """log2 of the error's ratio at every halving of the step."""
    return np.log2(errors[:-1] / errors[1:])


INTRODUCTION = f"""\
# Orders of convergence

Made by `python -m tests.helpers.orders > docs/orders.md`.

RMS distance to the exact end of the probability-flow ODE, float64, from the five
starting points {", ".join(f"{x:g}" for x in STARTS)}, on the schedule
`NoiseSchedule.logsnr_cosine(-6, 6)` with steps uniform in its time. The data are two
mixtures of three Gaussians on the line, whose score is known in closed form; the truth
is scipy's DOP853 at a relative tolerance of 3e-14. A slope is log2 of the ratio of the
errors at one halving of the step; the last three are shown. Solvers that draw noise
follow no ODE and are left out."""

EXPLANATION = """\
What decides the order of a method as it is shipped is often its start or its end: one step
of first order leaves an error of h^2 for good. So ipndm_v, deis and the DPM-Solver++
family, which start with such a step, end at second order whatever their order is inside;
the second table of each problem shows their order when the values at the first nodes are
exact. With few steps the higher orders still have the smaller errors.

- The weights of F-PNDM, PLMS, iPNDM and of pseudo_rk4 are those of uniform steps in
  sigma / alpha, where F-PNDM is of fourth order. On any other grid all four are of second
  order in the end, though with a small constant; iPNDM's error changes sign on the way
  there, which bends its slopes.
- ipndm_v and deis of order k are of order k after an exact start; ipndm_v at order 4 is
  still on its way there.
- fon and classical_rk4, on dx/dt, are of fourth order in steps uniform in time, which
  these are; fon needs them, as its weights are those of uniform steps.
- dpmpp_3m as published is of second order even after an exact start (its error changes
  sign on the way), and of third with its second difference doubled (dpmpp_3m_exact).
- unipc of order p with its corrector is of order p + 1, and its start hardly shows, as
  the corrector mends the first step too. With its defaults, whose last step is of first
  order (lower_order_final), it is of second order.
- ipndm_v_published is of second order at orders 2 and 3. Its fourth-order weights sum to
  one only where the steps are equal, and its slopes start below 1."""


def label(solver: str, options: dict[str, Any]) -> str:
    return f"{solver}({', '.join(f'{k}={v}' for k, v in options.items())})" if options else solver


def _rows(name: str, found: np.ndarray) -> str:
    cells = [f"{e:.2e}" for e in found] + [" ".join(f"{s:.2f}" for s in slopes(found)[-3:])]
    return f"| {name} | " + " | ".join(cells) + " |"


def table() -> str:
    lines = [INTRODUCTION, "", EXPLANATION]
    head = "| solver | " + " | ".join(f"{n} steps" for n in STEPS) + " | slopes |"
    rule = "|---" * (len(STEPS) + 2) + "|"
    for name, problem in PROBLEMS.items():
        means, stds = (", ".join(f"{x:g}" for x in v) for v in (problem.means, problem.stds))
        weights = ", ".join(f"{x:g}" for x in problem.weights)
        lines += [
            "",
            f"## The {name} problem",
            "",
            f"Weights {weights}; means {means}; standard deviations {stds}.",
            "",
            "As shipped:",
            "",
            head,
            rule,
        ]
        shipped = [(solver, {}) for solver in deterministic_solvers()] + list(VARIANTS)
        for solver, options in sorted(shipped, key=lambda s: s[0]):
            lines.append(_rows(label(solver, options), errors(solver, problem, **options)))
        lines += ["", "With exact values at the first nodes:", "", head, rule]
        for solver, options, exact, _ in EXACT_STARTS:
            found = errors_after_exact_start(solver, problem, exact, **options)
            lines.append(_rows(label(solver, options), found))
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
