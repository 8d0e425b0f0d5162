"""docs/claims/pndm.md: what pndm.py measured, in words and tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from ..words import table
from .common import Row, selected, with_interval
from .pndm import FAILS, HOLDS, MEMBERS, NAMES, OPEN, PAIRS

HEAD = """\
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

SUMMARY = """\
## Where each claim holds

Numbers of situations (problem and schedule; for the last claim also the number of calls)
in which it holds / does not hold / is undecided."""

BEST = """\
## Pseudo numerical multistep is the best in most situations

All methods with the same number of calls (some with up to three less where cosine's first step
is a leap). First, whether each pseudo method errs less than its classical twin: the same formula,
moved by PNDM's transfer or along dx/dt."""

MEMBER_BEST = """\
Then, whether a member is the best: it errs less than every method of the table above that is
no member; where it does not, what errs less (or, undecided, what is level with it)."""

FRECHET = """\
## Frechet distance of the digits model

Squared, in the committed classifier's 16 features, against 360 held-out scans: not FID, and not
on its scale, so that the paper's 0.4 cannot be tested, only its sign. Leading grid, {n:,} samples
from the same seeds for every row: the intervals say what other seeds would give, the differences
(DDIM's minus the member's, one standard error) leave the seeds' part out."""


Situation = tuple[str, str, str]  # problem, schedule, spacing
COLUMNS = tuple(NAMES[member] for member in MEMBERS)


def page(report: Row) -> str:
    """The report as Markdown."""
    _, many, most = report["ddim"]
    short, long = report["steps"]
    mixtures = [p for p in report["problems"] if "means" in p]
    (digits,) = (p for p in report["problems"] if "means" not in p)
    blocks = [
        HEAD.format(
            **{key: report[key] for key in ("command", "machine", "torch")},
            mixtures=" and ".join(f"a {p['name']}" for p in mixtures).capitalize(),
            points=mixtures[0]["points"],
            digits=digits["points"],
            errors=report["standard_errors"],
        ).rstrip(),
        *_summary(report),
        f"## {long} steps are at least as good as DDIM with {most}",
        *_by_grid(report, lambda spacing: _against_ddim(report, spacing, long, most)),
        f"## {long} steps beat DDIM with {many}",
        *_by_grid(report, lambda spacing: _against_ddim(report, spacing, long, many)),
        "## At equal calls, DDIM",
        *_by_grid(report, lambda spacing: _equal_ddim(report, spacing)),
        BEST,
        *_by_grid(report, lambda spacing: _pairs(report, spacing)),
        MEMBER_BEST,
        *_by_grid(report, lambda spacing: _best(report, spacing)),
        *_frechet(report),
        "## Every distance to DDIM",
        f"Each member with {short} and {long} steps, grid by grid.",
        _everything(report),
    ]
    return "\n\n".join(blocks) + "\n"


def _spacings(report: Row) -> list[str]:
    return list(dict.fromkeys(row["spacing"] for row in report["rows"]))


def _by_grid(report: Row, tabled: Callable[[str], str]) -> Iterable[str]:
    for spacing in _spacings(report):
        yield f"Grid: {spacing}."
        yield tabled(spacing)


def _situation(row: Row) -> Situation:
    return row["problem"], row["schedule"], row["spacing"]


def _distances(report: Row) -> dict[tuple[Situation, str, int], float]:
    return {
        (_situation(row), row["solver"], row["steps"]): row["distance"][0] for row in report["rows"]
    }


def _said(found: Row) -> str:
    """A verdict, and how many standard errors it stands on."""
    return f"{found['verdict']} ({found['difference'] / found['standard_error']:+.1f})"


def _counts(verdicts: Iterable[str]) -> str:
    """Held, not held, undecided."""
    found = list(verdicts)
    return " / ".join(str(found.count(kind)) for kind in (HOLDS, FAILS, OPEN)) if found else ""


def _of_members(found: list[Row]) -> list[str]:
    return [_counts(f["verdict"] for f in selected(found, member=member)) for member in MEMBERS]


def _summary(report: Row) -> list[str]:
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
        measure = f"distance, {spacing}"
        for claim, wanted in claims.items():
            found = selected(report["ddim_comparisons"], spacing=spacing, **wanted)
            rows.append([claim, measure, *_of_members(found)])
        found = selected(report["equal_calls"], spacing=spacing)
        cells = (_counts(f["best"][member]["verdict"] for f in found) for member in MEMBERS)
        rows.append(["best of all methods at equal calls", measure, *cells])
    for ddim in (most, many):
        if found := selected(report["frechet"]["comparisons"], steps=long, ddim=ddim):
            relation = "at least as good as" if ddim == most else "better than"
            claim = f"{long} steps {relation} DDIM with {ddim}"
            rows.append([claim, "Frechet, digits", *_of_members(found)])
    return [SUMMARY, table(["claim", "measure, grid", *COLUMNS], rows)]


def _against_ddim(report: Row, spacing: str, steps: int, ddim: int) -> str:
    distance, rows = _distances(report), []
    wanted = {"spacing": spacing, "steps": steps, "ddim": ddim, "equal_calls": False}
    found = selected(report["ddim_comparisons"], **wanted)
    for where in dict.fromkeys(map(_situation, found)):
        cells = [
            f"{distance[where, f['member'], steps]:.2e} {_said(f)}"
            for f in found
            if _situation(f) == where
        ]
        rows.append([*where[:2], f"{distance[where, 'ddim', ddim]:.2e}", *cells])
    names = (f"{name} {steps}" for name in COLUMNS)
    return table(["problem", "schedule", f"DDIM {ddim}", *names], rows)


def _equal_ddim(report: Row, spacing: str) -> str:
    distance, rows = _distances(report), []
    for steps in report["steps"]:
        wanted = {"spacing": spacing, "steps": steps, "equal_calls": True}
        found = selected(report["ddim_comparisons"], **wanted)
        for where in dict.fromkeys(map(_situation, found)):
            cells = []
            for f in found:
                if _situation(f) == where:
                    ours = distance[where, f["member"], steps]
                    theirs = distance[where, "ddim", f["ddim"]]
                    cells.append(f"{ours:.2e} against {theirs:.2e}, {f['ddim']} calls: {_said(f)}")
            rows.append([*where[:2], str(steps), *cells])
    return table(["problem", "schedule", "steps", *COLUMNS], rows)


def _pairs(report: Row, spacing: str) -> str:
    """Classical against pseudo."""
    distance, rows = _distances(report), []
    for f in selected(report["equal_calls"], spacing=spacing):
        where, cells = _situation(f), []
        for kind, pair in PAIRS.items():
            ours, theirs = (distance[where, name, f["steps"][name]] for name in pair)
            cells.append(f"{ours:.2e} against {theirs:.2e}: {_said(f['pseudo_better'][kind])}")
        rows.append([*where[:2], str(f["budget"]), *cells])
    names = (f"{kind}: {NAMES[a]}, {NAMES[b]}" for kind, (a, b) in PAIRS.items())
    return table(["problem", "schedule", "calls", *names], rows)


def _best(report: Row, spacing: str) -> str:
    """The members against all others."""
    distance, rows = _distances(report), []
    for f in selected(report["equal_calls"], spacing=spacing):
        cells = []
        for member in MEMBERS:
            best = f["best"][member]
            names = ", ".join(NAMES[name] for name in best["beaten_by"] or best["level_with"])
            error = distance[_situation(f), member, f["steps"][member]]
            cells.append(f"{error:.2e} {best['verdict']}" + (f": {names}" if names else ""))
        rows.append([*_situation(f)[:2], str(f["budget"]), *cells])
    return table(["problem", "schedule", "calls", *COLUMNS], rows)


def _frechet(report: Row) -> list[str]:
    """The digits model's Frechet distances: differences from the same seeds, then what there is."""
    frechet = report["frechet"]
    runs = {(row["solver"], row["steps"]): row for row in frechet["rows"]}
    done = [calls for calls in report["ddim"] if ("ddim", calls) in runs]
    lacking = [str(calls) for calls in report["ddim"] if calls not in done]
    rows = []
    for (solver, steps), row in runs.items():
        cells = [
            f"{f['difference']:+.4f} +- {f['standard_error']:.4f}: {f['verdict']}"
            for f in selected(frechet["comparisons"], member=solver, steps=steps)
        ]
        rows.append(_frechet_row(row) + cells + [""] * (len(done) - len(cells)))
    text = FRECHET.format(n=frechet["images"])
    if lacking:
        text += f"\nNot measured: DDIM with {' and '.join(lacking)}."
    head = ["solver", "steps", "calls", "Frechet"]
    return [
        text,
        table([*head, *(f"better than DDIM {calls} by" for calls in done)], rows),
        "The rows of `fastdiff/assets/digits_quality.json` that belong here, 5,000 samples each:",
        table(head, map(_frechet_row, report["frechet_committed"])),
    ]


def _frechet_row(row: Row) -> list[str]:
    name, frechet = NAMES[row["solver"]], with_interval(*row["frechet"])
    return [name, str(row["steps"]), str(row["calls"]), frechet]


def _everything(report: Row) -> str:
    measured = {(_situation(row), row["solver"], row["steps"]): row for row in report["rows"]}
    rows = []
    for where in dict.fromkeys(map(_situation, report["rows"])):
        found = [f for f in report["ddim_comparisons"] if _situation(f) == where]
        for member in MEMBERS:
            for steps in report["steps"]:
                fixed = selected(found, member=member, steps=steps, equal_calls=False)
                row = measured[where, member, steps]
                moved = f"{row['moved']:.1%}" if "moved" in row else ""
                numbers = [f"{row['distance'][0]:.2e}", moved, *map(_said, fixed)]
                rows.append([*where, NAMES[member], str(steps), *numbers])
    head = ["problem", "schedule", "grid", "member", "steps", "distance", "other component"]
    return table([*head, *(f"DDIM {calls}" for calls in report["ddim"])], rows)
