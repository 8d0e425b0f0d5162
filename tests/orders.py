"""Orders of convergence, measured: `python -m tests.orders > docs/orders.md` writes the table.

Two mixtures on the line, five starting points, float64, the exact score in closed form, and as the
truth the probability-flow ODE solved by scipy's DOP853 at a relative tolerance of 3e-14.
"""

from __future__ import annotations

import numpy as np
import torch

from fastdiff import NoiseSchedule, Sampler, solver_names
from tests.oracles import MILD, STIFF, Mixture, as_denoiser

SCHEDULE = NoiseSchedule.logsnr_cosine(-6.0, 6.0)
PROBLEMS = {"mild": MILD, "stiff": STIFF}
STARTS = np.array([-2.0, -0.9, 0.1, 0.7, 1.8])
STEPS = (20, 40, 80, 160, 320, 640)


def angle(t: float) -> float:
    return float(np.arctan2(SCHEDULE.sigma(t), SCHEDULE.alpha(t)))


def errors(solver: str, problem: Mixture, steps: tuple[int, ...] = STEPS) -> np.ndarray:
    """RMS distance to the true end points, one for each number of steps."""
    truth = problem.flow(STARTS, angle(SCHEDULE.first), angle(SCHEDULE.last))
    denoiser = as_denoiser(lambda x, t: problem.epsilon(x, SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
    result = []
    for count in steps:
        sampler = Sampler(denoiser, SCHEDULE, solver=solver, steps=count, dtype=torch.float64)
        ends = sampler(torch.from_numpy(STARTS)[:, None])[:, 0].numpy()
        result.append(np.sqrt(np.mean((ends - truth) ** 2)))
    return np.array(result)


def slopes(errors: np.ndarray) -> np.ndarray:
    """log2 of the error's ratio at every halving of the step."""
    return np.log2(errors[:-1] / errors[1:])


def table() -> str:
    lines = [
        "# Orders of convergence",
        "",
        "Made by `python -m tests.orders > docs/orders.md`.",
        "",
        "RMS distance to the exact end of the probability-flow ODE, float64, from the five",
        f"starting points {', '.join(f'{x:g}' for x in STARTS)}, on the schedule",
        "`NoiseSchedule.logsnr_cosine(-6, 6)` with steps uniform in its time. The data are two",
        "mixtures of three Gaussians on the line, whose score is known in closed form; the truth",
        "is scipy's DOP853 at a relative tolerance of 3e-14. A slope is log2 of the ratio of the",
        "errors at one halving of the step; the last three are shown.",
        "",
        "The weights of F-PNDM, PLMS and iPNDM are those of uniform steps in sigma / alpha, where",
        "F-PNDM is of fourth order. On any other grid all three are of second order in the end,",
        "though with a small constant; iPNDM's error changes sign on the way there, which bends",
        "its slopes. The first and the last step of UniPC are of first order.",
    ]
    for name, problem in PROBLEMS.items():
        means, stds = (", ".join(f"{x:g}" for x in v) for v in (problem.means, problem.stds))
        weights = ", ".join(f"{x:g}" for x in problem.weights)
        lines += [
            "",
            f"## The {name} problem",
            "",
            f"Weights {weights}; means {means}; standard deviations {stds}.",
            "",
            "| solver | " + " | ".join(f"{n} steps" for n in STEPS) + " | slopes |",
            "|---" * (len(STEPS) + 2) + "|",
        ]
        for solver in solver_names():
            found = errors(solver, problem)
            cells = [f"{e:.2e}" for e in found] + [" ".join(f"{s:.2f}" for s in slopes(found)[-3:])]
            lines.append(f"| {solver} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table())
