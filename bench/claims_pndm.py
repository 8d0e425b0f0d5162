"""PNDM's claims in small, each member by itself: `python -m bench.claims_pndm`, then `--page`.

Mixtures of Gaussians whose epsilon is known, and the committed digits model. A comparison is
paired: every solver starts from the same noises, and a claim holds, or does not, by more than two
standard errors of the paired difference. What a run has measured lies in its work folder, row by
row; run it again to go on, delete the folder to begin anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import NoiseSchedule, Sampler, Tableau, build_tableau
from fastdiff.app.digits_quality import sample_digits
from fastdiff.app.distances import (
    Moments,
    frechet_distance,
    frechet_estimate,
    moments,
    paired_error,
)
from fastdiff.app.machine import cpu_model
from fastdiff.models import load_digits, load_digits_features, load_digits_reference
from fastdiff.ops import seeded_noise
from fastdiff.training.recipes.digits import CLEAN, digits_schedule, digits_split

from .record import RESULTS, ROOT

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


# == Problems ======================================================================================


@dataclass(frozen=True)
class Mixture:
    """A mixture of K Gaussians with axes of their own in D dimensions, float64.

    weights: [K]; means and stds: [K, D].
    """

    name: str
    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    stds: tuple[tuple[float, ...], ...]
    points: int = 256

    @cached_property
    def noise(self) -> Tensor:
        shape = (self.points, len(self.means[0]))
        return seeded_noise(range(self.points), shape, dtype=torch.float64)

    @cached_property
    def _numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        weights, means, stds = (
            torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds)
        )
        return weights.log(), means, stds**2

    def _shares(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior of the component [B, K], distances and variances [B, K, D]."""
        log_weights, means, squares = self._numbers
        variance = alpha**2 * squares + sigma**2
        distance = x[:, None] - alpha * means
        log = log_weights - 0.5 * (variance.log() + distance**2 / variance).sum(-1)
        return log.softmax(1), distance, variance

    def epsilon(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """-sigma times the score of the mixture of N(alpha mean, alpha^2 std^2 + sigma^2)."""
        share, distance, variance = self._shares(x, alpha, sigma)
        return sigma * (share[..., None] * distance / variance).sum(1)

    def data(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The mean of x0 given x; nothing is divided by alpha or sigma."""
        share, distance, variance = self._shares(x, alpha, sigma)
        _, means, squares = self._numbers
        return (share[..., None] * (means + alpha * squares / variance * distance)).sum(1)

    def solve(self, schedule: NoiseSchedule, tableau: Tableau) -> Tensor:
        """[B, D] the samples of a tableau."""

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            time = float(t[0])
            return self.epsilon(x, schedule.alpha(time), schedule.sigma(time))

        return Sampler(denoiser, tableau=tableau, dtype=torch.float64)(self.noise)

    def converged(self, schedule: NoiseSchedule, start: float) -> Tensor:
        """[B, D]: the end of the flow that has the noises for its state at `start`.

        By scipy's DOP853 in the angle (alpha = cos, sigma = sin), where dx = v d(angle).
        """
        from scipy.integrate import solve_ivp

        def velocity(angle: float, flat: np.ndarray) -> np.ndarray:
            x, alpha, sigma = torch.from_numpy(flat).view_as(self.noise), *_circle(angle)
            v = alpha * self.epsilon(x, alpha, sigma) - sigma * self.data(x, alpha, sigma)
            return v.numpy().ravel()

        span = (math.atan2(schedule.sigma(start), schedule.alpha(start)), 0.0)
        flat = self.noise.numpy().ravel()
        done = solve_ivp(velocity, span, flat, method="DOP853", rtol=1e-10, atol=1e-12)
        return torch.from_numpy(done.y[:, -1]).view_as(self.noise)

    def moved(self, ends: Tensor, truth: Tensor) -> float:
        """Share of samples that belong to another component than the truth's."""
        ours, theirs = (self._shares(x, 1.0, 0.0)[0].argmax(1) for x in (ends, truth))
        return float((ours != theirs).double().mean())


def _circle(angle: float) -> tuple[float, float]:
    return math.cos(angle), math.sin(angle)


_WEIGHTS = (0.3, 0.25, 0.25, 0.2)
_MEANS = ((-0.9, 0.3, 0.1), (0.2, -0.8, 0.6), (0.7, 0.5, -0.5), (0.0, 0.9, 0.8))
MILD = Mixture(
    "mild mixture",
    _WEIGHTS,
    _MEANS,
    ((0.5, 0.4, 0.45), (0.4, 0.5, 0.4), (0.45, 0.4, 0.5), (0.5, 0.45, 0.4)),
)
STIFF = Mixture(
    "stiff mixture",
    _WEIGHTS,
    _MEANS,
    ((0.1, 0.05, 0.02), (0.05, 0.02, 0.1), (0.02, 0.1, 0.05), (0.1, 0.02, 0.05)),
)


@dataclass(frozen=True)
class Digits:
    """The committed digits model, float32, and the first of its 64 reference noises."""

    name: str = "digits"
    points: int = 64

    @cached_property
    def unet(self) -> torch.nn.Module:
        return load_digits()[0]

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        return {key: value[: self.points] for key, value in load_digits_reference().items()}

    def solve(self, schedule: NoiseSchedule, tableau: Tableau) -> Tensor:
        sampler = Sampler(self.unet, tableau=tableau)
        return sampler(self.reference["noise"], labels=self.reference["labels"])

    def converged(self, schedule: NoiseSchedule, start: float) -> Tensor:
        """The committed one from the first time; from later ones by iPNDM on a fine grid."""
        if start == schedule.first:
            return self.reference["x0"]
        tableau = build_tableau("ipndm_v", schedule, spacing=fine_times(start))
        sampler = Sampler(self._widened, tableau=tableau, dtype=torch.float64)
        return sampler(self.reference["noise"].double(), labels=self.reference["labels"])

    def _widened(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The float32 network under float64 states: its rounding is all that is lost."""
        return self.unet(x.float(), t, labels).double()


def fine_times(start: float, body: int = 200, end: int = 16) -> list[float]:
    """A fine grid from `start`: denser towards time 0, then uniform in sigma to the clean image."""
    falling = start * np.linspace(1, 0, body + 1)[:-1] ** 1.5
    return [*falling, *(np.linspace(1, 0, end + 1) ** 2 + CLEAN)]


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


class Store:
    """Arrays on disk, one file for each row that was measured with this digits model."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.model = folder, load_digits()[1]["best"]
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        name = hashlib.sha256(f"{self.model} {key}".encode()).hexdigest()[:24]
        path = self.folder / f"{name}.npy"
        if not path.exists():
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, make().numpy())
            temporary.replace(path)
        return torch.from_numpy(np.load(path))


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
        self.rows: dict[Run, dict[str, Any]] = {}
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

    def against(self, ours: Run, theirs: Run) -> dict[str, Any]:
        """The paired comparison of two runs: does ours err less?"""
        difference = self.run(*theirs) - self.run(*ours)
        error = float(difference.std() / len(difference) ** 0.5)
        return judged(float(difference.mean()), error)

    def calls(self, run: Run) -> int:
        self.run(*run)
        return int(self.rows[run]["calls"])

    def ddim_comparisons(self) -> Iterable[dict[str, Any]]:
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

    def equal_calls(self) -> Iterable[dict[str, Any]]:
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


def judged(difference: float, error: float) -> dict[str, Any]:
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
    """The cheap ones first."""
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


def frechet_difference(
    ours: Tensor, theirs: Tensor, reference: Moments, count: int
) -> dict[str, Any]:
    """Theirs minus ours; the standard error from drawing the same seeds for both, `count` times."""
    generator, draws = torch.Generator().manual_seed(0), []
    for _ in range(count):
        chosen = torch.randint(len(ours), (len(ours),), generator=generator)
        a, b = (frechet_distance(x[chosen], reference) for x in (theirs, ours))
        draws.append(a - b)
    value = frechet_distance(theirs, reference) - frechet_distance(ours, reference)
    return judged(value, float(torch.tensor(draws, dtype=torch.float64).std()))


def frechet_report(plan: Plan, features: dict[Run, Tensor], held_out: Moments) -> dict[str, Any]:
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


def committed_frechet() -> list[dict[str, Any]]:
    """The rows of the committed quality report, 5,000 samples each, that belong here."""
    asset = files("fastdiff") / "assets" / "digits_quality.json"
    return [
        {key: row[key] for key in ("solver", "steps", "calls", "frechet")}
        for row in json.loads(asset.read_text())["rows"]
        if "frechet" in row and row["solver"] in ("ddim", *MEMBERS) and row["calls"] >= 20
    ]


# == The run =======================================================================================


def measure(plan: Plan, path: Path, work: Path, progress: bool = True) -> dict[str, Any]:
    """Measure what the work folder lacks, and write the report, after every cell."""
    from tqdm.auto import tqdm

    store = Store(work)
    report: dict[str, Any] = {
        "command": "python -m bench.claims_pndm",
        "machine": cpu_model(),
        "torch": torch.__version__,
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


def write(report: dict[str, Any], path: Path) -> None:
    """As JSON, a line for each row; under a temporary name, then renamed."""

    def lines(value: Any) -> str:
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return "[\n  " + ",\n  ".join(map(json.dumps, value)) + "\n ]"
        if isinstance(value, dict):
            return "{\n " + ",\n ".join(f'"{k}": {lines(v)}' for k, v in value.items()) + "\n}"
        return json.dumps(value)

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(lines(report) + "\n")
    temporary.replace(path)


# == The page ======================================================================================

_HEAD = """\
# PNDM's claims, in small

Liu, Ren, Lin and Zhao (ICLR 2022, arXiv 2202.09778) say that PNDM with 50 steps is at least as
good as DDIM with 1000, which makes it 20 times faster; that it beats DDIM with 250 steps by about
0.4 of FID; and that pseudo numerical multistep methods are the best in most situations. Their
measure is FID on CIFAR-10, CelebA and LSUN, which is not measured here. Here are the same
comparisons on problems that a CPU solves, for each member of the family by itself. Where a claim
does not hold, the table says so.

Made by `{command}` on {machine}, torch {torch}, one thread; this page by
`{command} --page`, from `bench/results/claims-pndm.json`.

- **Problems.** {mixtures}, float64, {points} starting points: four Gaussians in three dimensions
  with axes of their own, whose epsilon is known in closed form; their parameters are in the JSON.
  The committed digits model, float32, {digits} starting noises, on the linear schedule only,
  because that is what it was trained with.
- **Distance.** RMS per coordinate (per pixel) to the converged solution of the same
  probability-flow ODE from the same noise at the same start time; 95 % bootstrap intervals over
  starting points are in the JSON. The mixtures' solution is DOP853's at a relative tolerance of
  1e-10, the digits' the committed one, or, from a start below 999, iPNDM-v with 216 intervals
  (off by about 8e-5 where both are known).
- **Grids.** "trailing" starts at time 999 whatever the number of steps: the comparison. "leading"
  is the published grid; it starts at the largest multiple of the stride (950 with 20 steps, 980
  with 50, 999 with 1000) and is measured against the solution from that time, so that what the
  start itself costs is left out. Both end at the clean image.
- A small distance is not a good image: it says how well the equation was solved, as the Frechet
  distance below says how good the digits are.
- **Schedules.** linear: betas 1e-4 .. 0.02. scaled-linear: roots of beta linear, 8.5e-4 .. 0.012.
  cosine: squared cosine, betas up to 0.999; alpha at time 999 is 5e-5, so that the trailing grid's
  first step is a leap, for which every method makes a single call.
- **Verdicts** are on paired differences of squared distances: *holds* and *does not hold* by more
  than {errors:g} standard errors (in brackets: how many), *undecided* otherwise. "At least as good"
  counts as held only where it is better by that much. A starting point that one solver takes to
  another component of the mixture weighs more than all others, which leaves a row undecided; how
  many do is in the last table.
- S-PNDM and PLMS make one call more than steps, F-PNDM nine more; "equal calls" gives DDIM as many
  calls as the member made.
"""


def page(report: dict[str, Any]) -> str:
    """The report as markdown."""
    mixtures = [p for p in report["problems"] if "means" in p]
    digits = next(p for p in report["problems"] if "means" not in p)
    few, many, most = report["ddim"]
    short, long = report["steps"]
    out = [
        _HEAD.format(
            **{key: report[key] for key in ("command", "machine", "torch")},
            mixtures=" and ".join(f"a {p['name']}" for p in mixtures).capitalize(),
            points=mixtures[0]["points"],
            digits=digits["points"],
            errors=report["standard_errors"],
        ),
        *_summary(report),
    ]
    titles = {
        most: f"{long} steps are at least as good as DDIM with {most}",
        many: f"{long} steps beat DDIM with {many}",
    }
    for ddim, title in titles.items():
        out += [f"## {title}", ""]
        for spacing in _spacings(report):
            out += _against_ddim(report, spacing, long, ddim)
    out += ["## At equal calls, DDIM", ""]
    for spacing in _spacings(report):
        out += [f"Grid: {spacing}.", ""] + _equal_ddim(report, spacing)
    out += _methods(report) + _frechet(report)
    out += ["## Every distance to DDIM", ""]
    out += [f"Each member with {short} and {long} steps, grid by grid.", ""]
    out += _everything(report)
    return "\n".join(out).rstrip() + "\n"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(head)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return [*lines, *("| " + " | ".join(row) + " |" for row in rows), ""]


def _spacings(report: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["spacing"] for row in report["rows"]))


def _situation(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["problem"], row["schedule"], row["spacing"]


def _distances(report: dict[str, Any]) -> dict[tuple[tuple[str, str, str], str, int], float]:
    return {
        (_situation(row), row["solver"], row["steps"]): row["distance"][0] for row in report["rows"]
    }


def _said(found: dict[str, Any]) -> str:
    """A verdict, and how many standard errors it stands on."""
    return f"{found['verdict']} ({found['difference'] / found['standard_error']:+.1f})"


def _selected(found: Iterable[dict[str, Any]], **wanted: Any) -> list[dict[str, Any]]:
    return [row for row in found if all(row[key] == value for key, value in wanted.items())]


def _counts(verdicts: Iterable[str]) -> str:
    """Held, not held, undecided."""
    found = list(verdicts)
    return " / ".join(str(found.count(kind)) for kind in (HOLDS, FAILS, OPEN)) if found else ""


def _summary(report: dict[str, Any]) -> list[str]:
    """Claim by claim and member by member, in how many situations it holds."""
    _, many, most = report["ddim"]
    short, long = report["steps"]
    fixed = {"steps": long, "equal_calls": False}
    claims = {
        f"{long} steps at least as good as DDIM with {most}": fixed | {"ddim": most},
        f"{long} steps better than DDIM with {many}": fixed | {"ddim": many},
        f"{long} steps better than DDIM at equal calls": {"steps": long, "equal_calls": True},
        f"{short} steps better than DDIM at equal calls": {"steps": short, "equal_calls": True},
    }
    rows = []
    for spacing in _spacings(report):
        for claim, wanted in claims.items():
            found = _selected(report["ddim_comparisons"], spacing=spacing, **wanted)
            cells = (_counts(f["verdict"] for f in _selected(found, member=m)) for m in MEMBERS)
            rows.append([claim, f"distance, {spacing}", *cells])
        found = _selected(report["equal_calls"], spacing=spacing)
        cells = (_counts(f["best"][m]["verdict"] for f in found) for m in MEMBERS)
        rows.append(["best of all methods at equal calls", f"distance, {spacing}", *cells])
    for ddim in (most, many):
        found = _selected(report["frechet"]["comparisons"], steps=long, ddim=ddim)
        if found:
            cells = (_counts(f["verdict"] for f in _selected(found, member=m)) for m in MEMBERS)
            relation = "at least as good as" if ddim == most else "better than"
            rows.append([f"{long} steps {relation} DDIM with {ddim}", "Frechet, digits", *cells])
    head = ["claim", "measure, grid", *(NAMES[member] for member in MEMBERS)]
    return [
        "## Where each claim holds",
        "",
        "Numbers of situations (problem and schedule; for the last claim also the number of calls)",
        "in which it holds / does not hold / is undecided.",
        "",
        *_table(head, rows),
    ]


def _against_ddim(report: dict[str, Any], spacing: str, steps: int, ddim: int) -> list[str]:
    distance, rows = _distances(report), []
    found = _selected(
        report["ddim_comparisons"], spacing=spacing, steps=steps, ddim=ddim, equal_calls=False
    )
    for where in dict.fromkeys(map(_situation, found)):
        cells = [
            f"{distance[where, f['member'], steps]:.2e} {_said(f)}"
            for f in found
            if _situation(f) == where
        ]
        rows.append([*where[:2], f"{distance[where, 'ddim', ddim]:.2e}", *cells])
    names = (f"{NAMES[member]} {steps}" for member in MEMBERS)
    head = ["problem", "schedule", f"DDIM {ddim}", *names]
    return [f"Grid: {spacing}.", "", *_table(head, rows)]


def _equal_ddim(report: dict[str, Any], spacing: str) -> list[str]:
    distance, rows = _distances(report), []
    for steps in report["steps"]:
        found = _selected(
            report["ddim_comparisons"], spacing=spacing, steps=steps, equal_calls=True
        )
        for where in dict.fromkeys(map(_situation, found)):
            cells = []
            for f in found:
                if _situation(f) == where:
                    ours = distance[where, f["member"], steps]
                    theirs = distance[where, "ddim", f["ddim"]]
                    cells.append(f"{ours:.2e} against {theirs:.2e}, {f['ddim']} calls: {_said(f)}")
            rows.append([*where[:2], str(steps), *cells])
    head = ["problem", "schedule", "steps", *(NAMES[member] for member in MEMBERS)]
    return _table(head, rows)


def _methods(report: dict[str, Any]) -> list[str]:
    """Classical against pseudo, and the members against all others."""
    distance = _distances(report)
    out = [
        "## Pseudo numerical multistep is the best in most situations",
        "",
        "All methods with the same number of calls (some with up to three less where cosine's first"
        " step",
        "is a leap). First, whether each pseudo method errs less than its classical twin: the same"
        " formula,",
        "moved by PNDM's transfer or along dx/dt.",
        "",
    ]
    for spacing in _spacings(report):
        found, rows = _selected(report["equal_calls"], spacing=spacing), []
        for f in found:
            where, cells = _situation(f), []
            for kind, (pseudo, classical) in PAIRS.items():
                ours, theirs = (
                    distance[where, name, f["steps"][name]] for name in (pseudo, classical)
                )
                cells.append(f"{ours:.2e} against {theirs:.2e}: {_said(f['pseudo_better'][kind])}")
            rows.append([*where[:2], str(f["budget"]), *cells])
        head = ["problem", "schedule", "calls", *(
            f"{kind}: {NAMES[a]}, {NAMES[b]}" for kind, (a, b) in PAIRS.items()
        )]  # fmt: skip
        out += [f"Grid: {spacing}.", "", *_table(head, rows)]
    out += [
        "Then, whether a member is the best: it errs less than every method of the table above that"
        " is",
        "no member; where it does not, what errs less (or, undecided, what is level with it).",
        "",
    ]
    for spacing in _spacings(report):
        found, rows = _selected(report["equal_calls"], spacing=spacing), []
        for f in found:
            cells = []
            for member in MEMBERS:
                best = f["best"][member]
                others = best["beaten_by"] or best["level_with"]
                names = ", ".join(NAMES[name] for name in others)
                error = distance[_situation(f), member, f["steps"][member]]
                cells.append(f"{error:.2e} {best['verdict']}" + (f": {names}" if names else ""))
            rows.append([*_situation(f)[:2], str(f["budget"]), *cells])
        head = ["problem", "schedule", "calls", *(NAMES[member] for member in MEMBERS)]
        out += [f"Grid: {spacing}.", "", *_table(head, rows)]
    return out


def _frechet(report: dict[str, Any]) -> list[str]:
    """The digits model's Frechet distances: differences from the same seeds, then what there is."""
    frechet = report["frechet"]
    value = {(row["solver"], row["steps"]): row for row in frechet["rows"]}

    def number(row: dict[str, Any]) -> str:
        centre, low, high = row["frechet"]
        return f"{centre:.3f} ({low:.3f} .. {high:.3f})"

    rows = [
        [NAMES[solver], str(steps), str(row["calls"]), number(row)]
        + [
            f"{f['difference']:+.4f} +- {f['standard_error']:.4f}: {f['verdict']}"
            for f in _selected(frechet["comparisons"], member=solver, steps=steps)
        ]
        for (solver, steps), row in value.items()
    ]
    done = [calls for calls in report["ddim"] if ("ddim", calls) in value]
    head = ["solver", "steps", "calls", "Frechet", *(f"better than DDIM {c} by" for c in done)]
    rows = [row + [""] * (len(head) - len(row)) for row in rows]
    lacking = [str(calls) for calls in report["ddim"] if calls not in done]
    return [
        "## Frechet distance of the digits model",
        "",
        "Squared, in the committed classifier's 16 features, against 360 held-out scans: not FID,"
        " and not",
        "on its scale, so that the paper's 0.4 cannot be tested, only its sign. Leading grid,"
        f" {frechet['images']:,} samples",
        "from the same seeds for every row: the intervals say what other seeds would give, the"
        " differences",
        "(DDIM's minus the member's, one standard error) leave the seeds' part out.",
        *([f"Not measured: DDIM with {' and '.join(lacking)}."] if lacking else []),
        "",
        *_table(head, rows),
        "The rows of `fastdiff/assets/digits_quality.json` that belong here, 5,000 samples each:",
        "",
        *_table(
            head[:4],
            (
                [NAMES[r["solver"]], str(r["steps"]), str(r["calls"]), number(r)]
                for r in report["frechet_committed"]
            ),
        ),
    ]


def _everything(report: dict[str, Any]) -> list[str]:
    measured = {(_situation(row), row["solver"], row["steps"]): row for row in report["rows"]}
    rows = []
    for where in dict.fromkeys(map(_situation, report["rows"])):
        found = [f for f in report["ddim_comparisons"] if _situation(f) == where]
        for member in MEMBERS:
            for steps in report["steps"]:
                fixed = _selected(found, member=member, steps=steps, equal_calls=False)
                cells = (_said(f) for f in fixed)
                row = measured[where, member, steps]
                error, moved = f"{row['distance'][0]:.2e}", row.get("moved")
                share = "" if moved is None else f"{moved:.1%}"
                rows.append([*where, NAMES[member], str(steps), error, share, *cells])
    head = ["problem", "schedule", "grid", "member", "steps", "distance", "other component"]
    return _table([*head, *(f"DDIM {calls}" for calls in report["ddim"])], rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.claims_pndm", description=__doc__)
    parser.add_argument("--json", type=Path, default=JSON, help="the report's file")
    parser.add_argument("--work", type=Path, default=WORK, help="the folder of measured rows")
    parser.add_argument("--quick", action="store_true", help="a few points and steps, no claim")
    parser.add_argument("--page", action="store_true", help="write the page from the report only")
    parser.add_argument("--markdown", type=Path, default=PAGE, help="the page's file")
    options = parser.parse_args(arguments)
    if options.page:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text(page(json.loads(options.json.read_text())))
    else:
        measure(QUICK if options.quick else FULL, options.json, options.work)
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
