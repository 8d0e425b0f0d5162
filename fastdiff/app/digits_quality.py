"""What each solver costs on the committed digits model, and how good it is: the committed numbers.

The converged solution of a noise starts at time 999, the noisiest there is. A grid that starts
later (the default one does) takes the same noise for its start, and pays for that in its distance.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.app.distances import (
    frechet_estimate,
    memorisation,
    nearest_distances,
    paired_error,
)
from fastdiff.app.machine import cpu_model
from fastdiff.files import write_json, write_tensors
from fastdiff.models import (
    DigitFeatures,
    load_digits,
    load_digits_features,
    load_digits_reference,
)
from fastdiff.ops import seeded_noise
from fastdiff.sampler import Sampler
from fastdiff.solvers import build_tableau
from fastdiff.training.recipes.digits import CLASSES, CLEAN, NOISIEST, digits_schedule, digits_split

COMMAND = "fastdiff eval --model digits --all-solvers"
SHAPE = (1, 8, 8)
PAIRED = 64  # seeds of the paired error: 0 .. 63
FIRST_SEED = 1_000_000  # of the samples for the Frechet distance
CHUNK = 250

CALLS = (5, 6, 8, 10, 13, 20, 30, 50)
SOLVERS: dict[str, tuple[int, ...]] = {
    "ipndm": CALLS,
    "s_pndm": CALLS,
    "f_pndm": (13, 20, 30, 50),  # needs nine calls beyond its steps
    "plms": CALLS,
    "dpmpp_2m": CALLS,
    "unipc": CALLS,
    "heun": (5, 7, 9, 13, 19, 29, 49),  # always odd
    "ddim": (*CALLS, 100, 250, 1000),
}

# The spacings compared at a few numbers of calls, by paired error alone.
SPACINGS = ("leading", "trailing", "linspace", "quadratic", "karras", "logsnr")
SPACING_CALLS = (10, 20)

# Whose samples are compared with the nearest training images.
MEMORISATION = ("ipndm", 20)

# Solvers of the converged solution and their refinements of the grid: the first is what is kept,
# the others show how far from it one may doubt.
REFERENCES = (("f_pndm", 2), ("f_pndm", 1), ("ipndm", 2), ("heun", 1))


def wants_frechet(solver: str, calls: int) -> bool:
    """Whether a row is worth thousands of samples: few calls, and what they are compared with."""
    return calls in (5, 9, 10, 19, 20) or (solver, calls) in {
        ("f_pndm", 13),
        ("ddim", 50),
        ("ddim", 100),
    }


def steps_for(solver: str, calls: int) -> int:
    """The number of steps at which a solver makes that many network calls.

    Raises ValueError where there is none.
    """
    schedule = digits_schedule()
    for steps in range(calls, 0, -1):
        if build_tableau(solver, schedule, steps).nfe == calls:
            return steps
    raise ValueError(f"calls must be a number {solver} can make, got {calls}")


def converged_times(refinement: int) -> list[float]:
    """The grid of the converged solution, from time 999 to the clean image at -1.

    `refinement` intervals per unit of time down to 0, so that every integer, where the schedule's
    interpolation has its kinks, is a node; then 16 times as many to the clean image, uniform in
    sigma, which goes like the square root of the time left.
    """
    body = np.linspace(NOISIEST, 0, int(NOISIEST) * refinement + 1)[:-1]
    return [*body, *(np.linspace(1, 0, 16 * refinement + 1) ** 2 + CLEAN)]


def converged_digits(path: str | os.PathLike[str], progress: bool = True) -> dict[str, Any]:
    """Solve the probability-flow ODE for 64 seeds in float64; write noises, labels and solutions.

    Writes `path` (safetensors: noise [64, 1, 8, 8] float32, labels [64] int64, x0 [64, 1, 8, 8]
    float64) and a .json beside it; returns the metadata, with the distances of other solvers and
    grids from the solution written.
    """
    unet, model = load_digits()
    unet.double()
    schedule, labels = digits_schedule(), torch.arange(PAIRED) % CLASSES
    noise = seeded_noise(range(PAIRED), (PAIRED, *SHAPE))

    def solve(solver: str, refinement: int) -> Tensor:
        tableau = build_tableau(solver, schedule, spacing=converged_times(refinement))
        sampler = Sampler(unet, tableau=tableau, dtype=torch.float64, progress=progress)
        return sampler(noise.double(), labels=labels)

    def name(solver: str, refinement: int) -> str:
        return f"{solver}, {len(converged_times(refinement)) - 1} intervals, float64"

    kept, *others = REFERENCES
    x0 = solve(*kept)
    metadata = {
        "ode": "dy/ds = epsilon; y = x / alpha, s = sigma / alpha; from time 999 to -1 (s = 0)",
        "solution": name(*kept),
        "rms_distance_of": {name(*o): paired_error(solve(*o), x0).value for o in others},
        "seeds": f"0..{PAIRED - 1}, fastdiff.ops.seeded_noise",
        "labels": "seed modulo 10",
        "model": model["best"],
        "made_by": "fastdiff.app.digits_quality.converged_digits",
        "torch": torch.__version__,
    }
    write_tensors(Path(path), {"noise": noise, "labels": labels, "x0": x0}, metadata, beside=True)
    return metadata


def evaluate_digits(
    out_json: str | os.PathLike[str],
    samples: int = 5000,
    solvers: dict[str, tuple[int, ...]] = SOLVERS,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Measure every solver at every number of calls on the committed digits model.

    out_json: written after every row, so that a stopped run goes on where it was.
    samples: for the Frechet distance; the same noises and labels for every row.
    solvers: names, and the numbers of calls of each.
    resume: keep the rows of `out_json` that were measured on this model and these samples.
    progress: show a bar.
    Returns what the file holds.
    """
    from tqdm.auto import tqdm  # late: importing fastdiff must stay cheap

    unet, metadata = load_digits()
    features = load_digits_features()
    (fit, _), (held, _) = digits_split()
    of_fit, of_held = features.features(fit), features.features(held)
    reference = load_digits_reference()
    report: dict[str, Any] = {
        "model": {"best": metadata["best"], "accuracy": metadata["accuracy"]},
        "samples": samples,
        "command": f"{COMMAND} --num-images {samples}",
        "units": {
            "paired": "RMS per pixel over 64 seeds, images in [-1, 1]: value, 95 % interval",
            "frechet": "squared, in the classifier's 16 features, against 360 held-out scans: "
            "value, 95 % interval; bias of the samples taken off",
            "frechet_train": "the same against the 1,437 scans of the training set",
            "agreement": "fraction that the classifier gives the label they were made for",
        },
        "grid": "the default: leading spacing, ending at the clean image; no guidance, no clipping",
        "seeds": f"paired 0..{PAIRED - 1}, Frechet {FIRST_SEED}..{FIRST_SEED + samples - 1}",
        "labels": "seed modulo 10",
        "machine": cpu_model(),
        "torch": torch.__version__,
        "floor": {
            "frechet": frechet_estimate(of_fit, of_held).to_list(),
            "what": "the 1,437 training scans against the 360 held-out ones",
        },
        "memorisation": None,
        "rows": [],
        "spacings": [],
    }
    path = Path(out_json)
    if resume and path.exists():
        before = json.loads(path.read_text())
        if all(before[key] == report[key] for key in ("model", "samples", "grid", "torch")):
            report |= {key: before[key] for key in ("rows", "memorisation", "spacings")}
    if not report["spacings"]:
        report["spacings"] = compare_spacings(solvers)
    done = {(row["solver"], row["calls"]) for row in report["rows"]}
    wanted = [(name, calls) for name, numbers in solvers.items() for calls in numbers]
    todo = [row for row in wanted if row not in done]
    for name, calls in (bar := tqdm(todo, disable=not progress)):
        bar.set_description(f"{name} {calls}")
        steps = steps_for(name, calls)
        sampler = Sampler(unet, digits_schedule(), solver=name, steps=steps)
        paired = sampler(reference["noise"], labels=reference["labels"])
        row = {
            "solver": name,
            "steps": steps,
            "calls": calls,
            "paired": paired_error(paired, reference["x0"]).to_list(),
        }
        if wants_frechet(name, calls):
            images = sample_digits(sampler, samples)
            found = features.features(images)
            row["frechet"] = frechet_estimate(found, of_held).to_list()
            row["frechet_train"] = frechet_estimate(found, of_fit).to_list()
            row["agreement"] = round(agreement(features, images), 4)
            if (name, calls) == MEMORISATION:
                report["memorisation"] = {"solver": name, "calls": calls}
                report["memorisation"] |= nearest_report(images, fit, held)
        report["rows"].append(row)
        write_json(path, report)
    return report


def compare_spacings(solvers: Iterable[str]) -> list[dict[str, Any]]:
    """Paired errors of each solver on each spacing of the time grid, at a few numbers of calls."""
    unet, _ = load_digits()
    reference, rows = load_digits_reference(), []
    wanted = [(s, c, g) for c in SPACING_CALLS for s in solvers for g in SPACINGS]
    for name, calls, spacing in wanted:
        try:
            steps = steps_for(name, calls)
        except ValueError:
            continue
        sampler = Sampler(unet, digits_schedule(), solver=name, steps=steps, spacing=spacing)
        found = sampler(reference["noise"], labels=reference["labels"])
        paired = paired_error(found, reference["x0"]).to_list()
        rows.append({"solver": name, "calls": calls, "spacing": spacing, "paired": paired})
    return rows


def sample_digits(sampler: Sampler, count: int) -> Tensor:
    """`count` images [count, 1, 8, 8], their labels in turn."""
    parts = []
    for begin in range(0, count, CHUNK):
        seeds = range(FIRST_SEED + begin, FIRST_SEED + min(begin + CHUNK, count))
        labels = torch.tensor(seeds) % CLASSES
        parts.append(sampler(seeds=seeds, shape=SHAPE, labels=labels))
    return torch.cat(parts)


def agreement(features: DigitFeatures, images: Tensor) -> float:
    """Fraction of images that the classifier gives the label they were made for."""
    labels = (FIRST_SEED + torch.arange(len(images))) % CLASSES
    return float((features(images).argmax(1) == labels).double().mean())


def nearest_report(images: Tensor, fit: Tensor, held: Tensor) -> dict[str, Any]:
    """Distances of samples and of held-out scans to the nearest training scan: RMS per pixel."""
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)

    def quantiles(x: Tensor) -> list[float]:
        return [round(float(q), 4) for q in nearest_distances(x, fit).quantile(levels)]

    return {
        "samples_5_50_95": quantiles(images),
        "held_out_5_50_95": quantiles(held),
        "chance_nearer_than_held_out": memorisation(images, fit, held).to_list(4),
    }


def markdown(report: dict[str, Any]) -> str:
    """The committed numbers as a page."""

    def number(estimate: list[float]) -> str:
        value, low, high = (f"{x:.3g}" for x in estimate)
        return f"{value} ({low} .. {high})"

    memory = report["memorisation"]
    lines = [
        "# Quality of the digits model, by solver",
        "",
        f"Made by `{report['command']}` on {report['machine']}, torch {report['torch']};",
        "printed by `python -m fastdiff.app.digits_quality > docs/quality.md`. Intervals are 95 %.",
        "",
        f"- distance: {report['units']['paired']}; to the converged solution from the same noises.",
        f"- Frechet: {report['units']['frechet']}; {report['samples']:,} samples. Its floor,",
        f"  {report['floor']['what']}: {number(report['floor']['frechet'])}.",
        f"- agreement: {report['units']['agreement']}.",
        f"- grid: {report['grid']}.",
        "",
        "| solver | calls | distance | Frechet | agreement |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        frechet = number(row["frechet"]) if "frechet" in row else ""
        agreed = f"{row['agreement']:.3f}" if "frechet" in row else ""
        cells = (row["solver"], str(row["calls"]), number(row["paired"]), frechet, agreed)
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "## Which grid",
        "",
        "Distance to the converged solution, which starts at time 999; the smallest in bold.",
        "",
        "| solver | calls | " + " | ".join(SPACINGS) + " |",
        "|---|---|" + "---|" * len(SPACINGS),
    ]
    for solver, calls in dict.fromkeys((r["solver"], r["calls"]) for r in report["spacings"]):
        found = {
            r["spacing"]: r["paired"][0]
            for r in report["spacings"]
            if (r["solver"], r["calls"]) == (solver, calls)
        }
        best = min(found.values())
        errors = (found[spacing] for spacing in SPACINGS)
        shown = [f"**{x:.3f}**" if x == best else f"{x:.3f}" for x in errors]
        lines.append(f"| {solver} | {calls} | " + " | ".join(shown) + " |")
    lines += [
        "",
        "## Memorisation",
        "",
        f"RMS distance to the nearest training scan, 5th, 50th and 95th percentile: samples of "
        f"{memory['solver']} with",
        f"{memory['calls']} calls {memory['samples_5_50_95']}, held-out scans "
        f"{memory['held_out_5_50_95']}. A sample is nearer than a held-out scan with chance",
        f"{number(memory['chance_nearer_than_held_out'])}; copies would give 1, new scans 0.5.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    asset = Path(__file__).parents[1] / "assets" / "digits_quality.json"
    print(markdown(json.loads(asset.read_text())))
