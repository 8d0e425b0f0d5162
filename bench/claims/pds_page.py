"""docs/claims/pds.md: what pds.py and pds_learned.py measured, in words and tables."""

from __future__ import annotations

from ..words import table
from .common import Row, selected, with_interval
from .pds import (
    ACCEPTANCE,
    BANDS,
    CHAINS,
    ERRORS,
    MALA_ERROR,
    MOST_STEPS,
    PUBLISHED_STEPS,
    RUN,
    SETTINGS,
)

INTRODUCTION = """# PDS's claims, where the truth is known

Ma et al. (2022, arXiv 2207.02196, and 2023, arXiv 2302.06504) say that
preconditioning lets an off-the-shelf score model sample with up to 29 times fewer iterations, at
1024 x 1024, without retraining. Their measure is image quality on LSUN and FFHQ, which is not
measured here. Here is the same sampler on Gaussian fields whose power falls as frequency^-2, as
natural images' does, with the exact score: what preconditioning does to the spectrum, and nothing
about what it does to a trained network's errors; for that a small model is the last section.

Made by `python -m bench.claims.pds` on {machine}, torch {torch};
this page by `python -m bench.claims.pds --page`, from `bench/results/claims-pds.json`.

- **Sampler.** Preconditioned prior, one Langevin correction and one reverse-diffusion step for
  each of T noise levels, sigma_min 0.01, the published sigma_max and snr of two data sets at
  every size. The variances come from the sampler's recursion, to which
  `tests/execution/test_preconditioned_sampling.py` holds the sampler itself.
- **Error.** RMS over {bands} bands of log frequency of log(variance / true variance).
- **alpha.** "plain": no preconditioner. 5: the published default. "auto": the alpha at which the
  predictor's shrinking cancels its inflation at the median frequency, for that T
  ([preconditioning](../preconditioning.md)). No other setting was tried.

## Spectrum error against T
""".replace("{bands}", str(BANDS))

LEAST = f"""
## Iterations to an error

The least T with an error of at most e for it and for every larger T up to {MOST_STEPS} (all T up
to 200, then every hundredth part); in brackets how many times fewer than plain (below 1: more).

"""

MALA = """
## Langevin with acceptance

The corrector alone, as the Metropolis-adjusted Langevin algorithm on the field's exact density:
steps of the size at which {target:g} of moves are accepted, measured ("run") over {run}
iterations of {chains} chains begun in the field's own law. Iterations: from variance zero to a
spectrum error of {error:g}, if each move is taken with that probability. The published gain
rises where the data is weak, which makes the condition worse; D = Sigma, which goes the other
way, is what Langevin dynamics ask for.

"""

LEARNT = """
## A learned score

The photographs model (`{model}`),
32 px crops of two photographs, {images} images from the same seeds for each row, snr 0.16,
sigma_max 50. Spectrum error: as above, without the mean colour, against crops it was trained on.
Distance: the energy distance of images pooled to 8 x 8; intervals from halves of the images. The
last row is another {images} crops: what chance leaves. Made by `python -m
bench.claims.pds_learned` on {machine}, torch {torch}.

With fewer levels the images' large shapes move away from the data's. By its distance alpha = 5 does
at T = 66 what plain does at 100, 1.5 times fewer iterations, but the intervals overlap and its
spectrum is the worse one at every T; auto cannot be told from plain.

![Eight images of each T, plain and preconditioned](pds-learned.png)

"""


def page(record: Row, learned: Row) -> str:
    """The page: `record` is of pds.py, `learned` of pds_learned.py."""
    parts = [INTRODUCTION.format(machine=record["machine"], torch=record["torch"])]
    for setting, (sigma_max, snr) in SETTINGS.items():
        parts.append(f"\n### {setting}: sigma_max {sigma_max:g}, snr {snr:g}\n\n")
        parts.append(_errors(selected(record["sampler"], setting=setting)))
    parts += [LEAST, _least(record["sampler"])]
    parts.append(MALA.format(error=MALA_ERROR, target=ACCEPTANCE, run=RUN, chains=CHAINS))
    parts += [_chains(record["langevin"]), LEARNT.format(**learned), _learned(learned)]
    return "".join(parts)


def _errors(found: list[Row]) -> str:
    head = ("size", "alpha", *(f"T = {steps}" for steps in PUBLISHED_STEPS))
    rows = [
        (f"{r['size']} px", r["alpha"], *(f"{error:.3f}" for error in r["errors"].values()))
        for r in found
    ]
    return table(head, rows) + "\n"


def _least(found: list[Row]) -> str:
    """The least T to each error, what plain takes over it, and the largest such ratio."""
    rows, savings = [], [1.0]
    for r in found:
        (plain,) = selected(found, alpha="plain", size=r["size"], setting=r["setting"])
        cells = []
        for error in map(str, ERRORS):
            mine, theirs = r["least"][error], plain["least"][error]
            cells.append(str(mine or "not reached"))
            if mine and theirs and r is not plain:
                cells[-1] += f" ({theirs / mine:.2g}x)"
                savings.append(theirs / mine)
        rows.append((f"{r['size']} px", r["setting"], r["alpha"], *cells))
    return (
        table(("size", "setting", "alpha", *(f"e = {error:g}" for error in ERRORS)), rows)
        + f"\n\nThe largest saving here is {max(savings):.2g} times; 29 times does not show where "
        "scores are exact.\n"
    )


def _chains(found: list[Row]) -> str:
    head = (
        "size",
        "D",
        "condition of Sigma",
        "of D^-1 Sigma",
        "h",
        "acceptance, run",
        "iterations",
    )
    rows = []
    for r in found:
        run = f"{r['acceptance']:.2f}" if "acceptance" in r else ""
        numbers = (f"{r['condition']:.3g}", f"{r['left']:.3g}", f"{r['h']:.2g}")
        rows.append((f"{r['size']} px", r["preconditioner"], *numbers, run, str(r["iterations"])))
    return table(head, rows) + "\n"


def _learned(learned: Row) -> str:
    found = (*learned["rows"], {**learned["floor"], "alpha": "crops", "steps": ""})
    rows = []
    for r in found:
        distance = with_interval(r["distance"], *r["interval"])
        rows.append((r["alpha"], str(r["steps"]), f"{r['spectrum']:.3f}", distance))
    return table(("alpha", "T", "spectrum error", "distance (90 %)"), rows) + "\n"
