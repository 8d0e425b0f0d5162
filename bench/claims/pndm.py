"""PNDM's claims in small, each member by itself: `python -m bench.claims.pndm`, then `--page`.

Mixtures of Gaussians whose epsilon is known, and the committed digits model. A comparison is
paired: every solver starts from the same noises, and a claim holds, or does not, by more than two
standard errors of the paired difference. What a run has measured lies in its work folder, row by
row; run it again to go on, delete the folder to begin anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from fastdiff import NoiseSchedule, Sampler, build_tableau
from fastdiff.app.digits_quality import sample_digits
from fastdiff.app.distances import (
    Moments,
    frechet_distance,
    frechet_estimate,
    moments,
    paired_error,
)
from fastdiff.models import load_digits, load_digits_features
from fastdiff.training.recipes.digits import digits_schedule, digits_split

from ..files import RESULTS, ROOT, write_json, write_whole
from .common import Row, Store, folded, machine, unfolded
from .problems import MILD, STIFF, Digits, Mixture

JSON, PAGE = RESULTS / "claims-pndm.json", ROOT / "docs" / "claims" / "pndm.md"
WORK = ROOT / "runs" / "claims-pndm"

SCHEDULES: dict[str, Callable[[], NoiseSchedule]] = {
    "linear": NoiseSchedule.linear_beta,
    "scaled-linear": NoiseSchedule.scaled_linear_beta,
    "cosine": NoiseSchedule.cosine,
}
NAMES = {
    "ddim": "DDIM",
    "s_pndm": "S-PNDM",
    "f_pndm": "F-PNDM",
    "plms": "PLMS",
    "ipndm": "iPNDM",
    "classical_euler": "classical Euler",
    "heun": "pseudo Heun",
    "classical_heun": "classical Heun",
    "pseudo_rk4": "pseudo RK4",
    "classical_rk4": "classical RK4",
    "fon": "FON",
}
MEMBERS = ("s_pndm", "f_pndm", "plms", "ipndm")
# Pseudo and classical: the same formula, moved by the transfer or along dx/dt.
PAIRS = {
    "Euler": ("ddim", "classical_euler"),
    "Heun": ("heun", "classical_heun"),
    "RK4": ("pseudo_rk4", "classical_rk4"),
    "multistep": ("f_pndm", "fon"),
}
RIVALS = tuple(name for pair in PAIRS.values() for name in pair if name not in MEMBERS)

HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
ERRORS = 2.0  # a verdict needs more than this many standard errors


# == What is run ===================================================================================

Problem = Mixture | Digits
Run = tuple[str, int]  # solver, steps


@dataclass(frozen=True)
class Plan:
    """What is compared with what.

    cells: problem, schedule and spacing.
    steps: of the members. ddim: calls of DDIM, few, many and very many. budgets: calls at which
    all methods are compared. images: of the Frechet distances, on the digits' leading grid.
    draws: of the paired bootstrap of two Frechet distances.
    """

    cells: tuple[tuple[Problem, str, str], ...]
    steps: tuple[int, int] = (20, 50)
    ddim: tuple[int, int, int] = (50, 250, 1000)
    budgets: tuple[int, ...] = (21, 49)
    images: int = 5000
    draws: int = 200


FULL = Plan(
    tuple(
        (problem, schedule, spacing)
        for spacing in ("trailing", "leading")
        for problem, schedules in (
            (MILD, SCHEDULES),
            (STIFF, SCHEDULES),
            (Digits(), ("linear",)),  # what the model was trained with
        )
        for schedule in schedules
    )
)
QUICK = Plan(
    (
        (replace(STIFF, points=16), "cosine", "leading"),
        (Digits(points=4), "linear", "trailing"),
    ),
    steps=(4, 6),
    ddim=(5, 8, 12),
    budgets=(9,),
    images=20,
    draws=10,
)


def within(solver: str, schedule: NoiseSchedule, calls: int, spacing: str) -> int:
    """The largest number of steps that makes at most this many calls."""
    return next(
        steps
        for steps in range(calls, 0, -1)
        if build_tableau(solver, schedule, steps, spacing=spacing).nfe <= calls
    )


@dataclass
class Cell:
    """One problem on one schedule and spacing: squared errors of runs, image by image."""

    plan: Plan
    problem: Problem
    schedule_name: str
    spacing: str
    store: Store

    def __post_init__(self) -> None:
        self.schedule = SCHEDULES[self.schedule_name]()
        self.rows: dict[Run, Row] = {}
        self.squares: dict[Run, Tensor] = {}
        self.where = {
            "problem": self.problem.name,
            "schedule": self.schedule_name,
            "spacing": self.spacing,
        }

    def run(self, solver: str, steps: int) -> Tensor:
        """Squared errors [B] of a run; measured once."""
        run = (solver, steps)
        if run not in self.squares:
            tableau = build_tableau(solver, self.schedule, steps, spacing=self.spacing)
            start = tableau.times[0]
            ends = self.store.get(
                f"{self.problem!r} {tableau.to_json()}",
                lambda: self.problem.solve(self.schedule, tableau),
            ).double()
            truth = self.store.get(
                f"{self.problem!r} {self.schedule_name} converged from {start}",
                lambda: self.problem.converged(self.schedule, start),
            )
            if not ends.isfinite().all():
                raise FloatingPointError(f"{solver}, {steps} steps, {self.where}: not finite")
            row = {**self.where, "solver": solver, "steps": steps, "calls": tableau.nfe}
            row |= {"start": start, "distance": _short(paired_error(ends, truth).to_list(15))}
            if isinstance(self.problem, Mixture):
                row["moved"] = self.problem.moved(ends, truth)
            self.rows[run] = row
            self.squares[run] = (ends - truth).square().flatten(1).mean(1)
        return self.squares[run]

    def against(self, ours: Run, theirs: Run) -> Row:
        """The paired comparison of two runs: does ours err less?"""
        difference = self.run(*theirs) - self.run(*ours)
        error = float(difference.std() / len(difference) ** 0.5)
        return judged(float(difference.mean()), error)

    def calls(self, run: Run) -> int:
        self.run(*run)
        return int(self.rows[run]["calls"])

    def ddim_comparisons(self) -> Iterable[Row]:
        """Each member at each number of steps against DDIM at each number of calls."""
        for member in MEMBERS:
            for steps in self.plan.steps:
                ours = (member, steps)
                equal = self.calls(ours)
                for number, calls in enumerate((*self.plan.ddim, equal)):
                    yield {
                        **self.where,
                        "member": member,
                        "steps": steps,
                        "ddim": calls,
                        "equal_calls": number == len(self.plan.ddim),
                        **self.against(ours, ("ddim", calls)),
                    }

    def equal_calls(self) -> Iterable[Row]:
        """At each budget: classical against pseudo, and each member against all that is no member.

        A member is best where it errs less than each of them; it is not where one errs less.
        """
        for budget in self.plan.budgets:
            runs = {
                name: (name, within(name, self.schedule, budget, self.spacing))
                for name in (*MEMBERS, *RIVALS)
            }
            pairs = {
                kind: self.against(runs[pseudo], runs[classical])
                for kind, (pseudo, classical) in PAIRS.items()
            }
            best = {}
            for member in MEMBERS:
                verdicts = {r: self.against(runs[member], runs[r])["verdict"] for r in RIVALS}
                best[member] = {
                    "verdict": overall(verdicts.values()),
                    "beaten_by": [r for r, verdict in verdicts.items() if verdict == FAILS],
                    "level_with": [r for r, verdict in verdicts.items() if verdict == OPEN],
                }
            yield {
                **self.where,
                "budget": budget,
                "steps": {name: steps for name, steps in runs.values()},
                "pseudo_better": pairs,
                "best": best,
            }


def judged(difference: float, error: float) -> Row:
    """A difference, positive in favour of the claim, with its standard error and the verdict."""
    verdict = OPEN
    if abs(difference) > ERRORS * error:
        verdict = HOLDS if difference > 0 else FAILS
    difference, error = _short([difference, error])
    return {"difference": difference, "standard_error": error, "verdict": verdict}


def overall(verdicts: Iterable[str]) -> str:
    """The verdict on a claim that is made of several."""
    found = set(verdicts)
    return FAILS if FAILS in found else OPEN if OPEN in found else HOLDS


def _short(numbers: Iterable[float]) -> list[float]:
    return [float(f"{number:.4g}") for number in numbers]


# == Frechet distances of the digits model =========================================================


def frechet_runs(plan: Plan) -> list[Run]:
    """All runs whose images are compared, cheap ones first."""
    few, many, most = plan.ddim
    members = [(member, steps) for steps in plan.steps for member in MEMBERS]
    return [*members, ("ddim", few), ("ddim", many), ("ddim", most)]


def frechet_features(run: Run, images: int, store: Store) -> Tensor:
    """Classifier features [images, 16] of a run's samples, the same seeds for every run."""
    solver, steps = run
    tableau = build_tableau(solver, digits_schedule(), steps)

    def make() -> Tensor:
        images_made = sample_digits(Sampler(load_digits()[0], tableau=tableau), images)
        return load_digits_features().features(images_made).detach()

    return store.get(f"features {images} {tableau.to_json()}", make).double()


def frechet_difference(ours: Tensor, theirs: Tensor, reference: Moments, count: int) -> Row:
    """Theirs minus ours; the standard error from drawing the same seeds for both, `count` times."""
    generator, draws = torch.Generator().manual_seed(0), []
    for _ in range(count):
        chosen = torch.randint(len(ours), (len(ours),), generator=generator)
        a, b = (frechet_distance(x[chosen], reference) for x in (theirs, ours))
        draws.append(a - b)
    value = frechet_distance(theirs, reference) - frechet_distance(ours, reference)
    return judged(value, float(torch.tensor(draws, dtype=torch.float64).std()))


def frechet_report(plan: Plan, features: dict[Run, Tensor], held_out: Moments) -> Row:
    """Estimates of the runs there are, and the members against DDIM."""
    rows, comparisons = [], []
    for (solver, steps), found in features.items():
        calls = build_tableau(solver, digits_schedule(), steps).nfe
        estimate = _short(frechet_estimate(found, held_out).to_list(15))
        rows.append({"solver": solver, "steps": steps, "calls": calls, "frechet": estimate})
        if solver not in MEMBERS:
            continue
        for ddim in plan.ddim:
            if ("ddim", ddim) in features:
                verdict = frechet_difference(found, features["ddim", ddim], held_out, plan.draws)
                comparisons.append({"member": solver, "steps": steps, "ddim": ddim, **verdict})
    return {"images": plan.images, "rows": rows, "comparisons": comparisons}


def committed_frechet() -> list[Row]:
    """The rows of the committed quality report, 5,000 samples each, that belong here."""
    asset = files("fastdiff") / "assets" / "digits_quality.json"
    return [
        {key: row[key] for key in ("solver", "steps", "calls", "frechet")}
        for row in json.loads(asset.read_text())["rows"]
        if "frechet" in row and row["solver"] in ("ddim", *MEMBERS) and row["calls"] >= 20
    ]


# == The run =======================================================================================


def measure(plan: Plan, path: Path, work: Path, progress: bool = True) -> Row:
    """Measure what the work folder lacks; write the report after every cell."""
    from tqdm.auto import tqdm

    store = Store(work, load_digits()[1]["best"])
    report: Row = {
        "command": "python -m bench.claims.pndm",
        **machine(),
        "steps": plan.steps,
        "ddim": plan.ddim,
        "standard_errors": ERRORS,
        "problems": [
            asdict(problem) for problem in dict.fromkeys(problem for problem, *_ in plan.cells)
        ],
        "rows": [],
        "ddim_comparisons": [],
        "equal_calls": [],
        "frechet": {},
        "frechet_committed": committed_frechet(),
    }
    for problem, schedule, spacing in (bar := tqdm(plan.cells, disable=not progress)):
        bar.set_description(f"{problem.name}, {schedule}, {spacing}")
        cell = Cell(plan, problem, schedule, spacing, store)
        report["ddim_comparisons"] += cell.ddim_comparisons()
        report["equal_calls"] += cell.equal_calls()
        report["rows"] += cell.rows.values()
        write(report, path)
    (_, _), (held, _) = digits_split()
    held_out = moments(load_digits_features().features(held).detach())
    features: dict[Run, Tensor] = {}
    for run in (bar := tqdm(frechet_runs(plan), disable=not progress)):
        bar.set_description(f"Frechet, {run[0]} {run[1]}")
        features[run] = frechet_features(run, plan.images, store)
        if run[0] == "ddim":
            report["frechet"] = frechet_report(plan, features, held_out)
            write(report, path)
    return report


SITUATION = ("problem", "schedule", "spacing")
FOLDED = {"rows": (*SITUATION, "solver"), "ddim_comparisons": (*SITUATION, "member", "steps")}


def write(report: Row, path: Path) -> None:
    """The report, its longest tables folded."""
    write_json(path, report | {key: folded(report[key], by) for key, by in FOLDED.items()})


def read(path: Path) -> Row:
    report = json.loads(path.read_text())
    return report | {key: unfolded(report[key]) for key in FOLDED}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.claims.pndm", description=__doc__)
    parser.add_argument("--json", type=Path, default=JSON, help="the report's file")
    parser.add_argument("--work", type=Path, default=WORK, help="the folder of measured rows")
    parser.add_argument("--quick", action="store_true", help="a few points and steps, no claim")
    parser.add_argument("--page", action="store_true", help="write the page from the report only")
    parser.add_argument("--markdown", type=Path, default=PAGE, help="the page's file")
    options = parser.parse_args(arguments)
    if options.page:
        from .pndm_page import page

        write_whole(options.markdown, page(read(options.json)))
    else:
        measure(QUICK if options.quick else FULL, options.json, options.work)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
