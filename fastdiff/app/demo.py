"""`fastdiff demo`: sample real digits live, say what each solver costs and how good it is, draw it.

The model is small, so these pictures are 8x8 scans and the milliseconds are this machine's; what
carries over to large networks is the count of network calls and the distance per call.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdiff
from fastdiff.app.distances import Estimate, paired_error
from fastdiff.app.doctor import examine, warnings
from fastdiff.app.machine import cpu_model
from fastdiff.files import write_whole
from fastdiff.models import load_digits, load_digits_reference
from fastdiff.models.photographs import load_photographs
from fastdiff.ops import allocate_slots, multistep_step_ref, multistep_step_unchecked
from fastdiff.training.recipes.photographs import crops, photographs

SEEDS = 64
STEP_SIZES = ((1, 3, 32, 32), (4, 4, 64, 64), (16, 3, 256, 256))
# (label, solver, steps): what is sampled live, in the order of the columns.
PHOTOGRAPH_STEPS, PHOTOGRAPHS = 50, 8  # noise levels of the preconditioned panel, and its images
COLUMNS = (
    ("DDIM", "ddim", 50),
    ("DDIM", "ddim", 10),
    ("iPNDM", "ipndm", 10),
    ("S-PNDM", "s_pndm", 12),
    ("S-PNDM", "s_pndm", 19),
    ("F-PNDM", "f_pndm", 4),
    ("F-PNDM", "f_pndm", 11),
    ("DPM++ 2M", "dpmpp_2m", 10),
)


@dataclass(frozen=True)
class Column:
    """One solver's samples of the common seeds: [64, 1, 8, 8], and what they cost."""

    label: str
    calls: int
    milliseconds: float  # per image, in a batch of all seeds
    distance: Estimate  # RMS per pixel to the converged solution from the same noises
    images: Tensor


def run(out: Path) -> None:
    """The whole demo on one thread: tables on the terminal, three pictures in `out`."""
    from rich.console import Console
    from rich.table import Table

    torch.set_num_threads(1)  # other work on the machine disturbs one thread least
    console = Console()
    console.print("[bold]fastdiff[/bold]")
    for topic, finding in examine():
        console.print(f"{topic:>14}  {finding}", highlight=False)
    for warning in warnings():
        console.print(f"{'warning':>14}  {warning}", style="yellow")

    title = "\nThe solver step: diffusers' scheduler against one launch, one thread"
    speeds = Table("one solver step", "image batch", "stock", "fused", "ratio", title=title)
    for name, shape, stock, fused in step_speeds():
        speeds.add_row(
            name,
            "x".join(map(str, shape)),
            f"{stock * 1e6:.0f} us",
            f"{fused * 1e6:.0f} us",
            f"{stock / fused:.1f}x",
        )
    console.print(speeds)

    console.print(f"\nSampling {SEEDS} digits from the same {SEEDS} noises with each solver ...")
    columns = [sample_column(*column) for column in COLUMNS]
    quality = Table(
        "solver",
        "calls",
        "ms per image",
        "distance to the converged solution",
        title="\nWhat each solver costs and how close it comes",
    )
    for c in columns:
        d = c.distance
        interval = f"{d.value:.4f}  ({d.low:.4f} .. {d.high:.4f})"
        quality.add_row(c.label, str(c.calls), f"{c.milliseconds:.2f}", interval)
    console.print(quality)

    out.mkdir(parents=True, exist_ok=True)
    draw_columns(columns, out / "demo.png")
    draw_quality(out / "quality.png")
    draw_photographs(out / "preconditioned.png")
    names = ("demo.png", "quality.png", "preconditioned.png")
    console.print(f"\nPictures: {', '.join(str(out / name) for name in names)}")

    slow = sample_column("DDIM", "ddim", 1000)
    fast = next(c for c in columns if (c.label, c.calls) == ("iPNDM", 10))
    console.print(
        f"\nFrom DDIM with 1000 calls to iPNDM with 10: "
        f"{slow.milliseconds / fast.milliseconds:.0f} times faster on this machine, at a distance "
        f"of {fast.distance.value:.4f} from the converged solution (DDIM-1000: "
        f"{slow.distance.value:.4f}; pixels run from -1 to 1).",
        highlight=False,
    )


# == The fused step against stock schedulers =======================================================


def step_speeds() -> list[tuple[str, tuple[int, ...], float, float]]:
    """(name, batch shape, seconds of the stock scheduler's step, seconds of the fused launch)."""
    rows: list[tuple[str, tuple[int, ...], float, float]] = []
    for shape in STEP_SIZES:
        for name, solver in (("PNDM", "plms"), ("UniPC", "unipc")):
            x, output = torch.randn(shape), torch.randn(shape)
            stock = stock_step(name, x, output)
            fused = fused_step(solver, x, output)
            seconds, ours = interleaved((stock, fused))
            rows.append((name, shape, seconds, ours))
    return rows


def stock_step(name: str, x: Tensor, output: Tensor) -> Callable[[], Any]:
    """diffusers' scheduler step in its steady state (full history), without network."""
    import diffusers

    scheduler: Any
    if name == "PNDM":
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
    else:
        scheduler = diffusers.UniPCMultistepScheduler(beta_end=0.02)

    def start() -> Any:
        scheduler.set_timesteps(500)
        times = iter(scheduler.timesteps)
        for _ in range(6):
            scheduler.step(output, next(times), x)
        return times

    times = start()
    left = 480

    def step() -> None:
        nonlocal times, left
        if left == 0:
            times, left = start(), 480
        left -= 1
        scheduler.step(output, next(times), x)

    return step


def fused_step(solver: str, x: Tensor, output: Tensor) -> Callable[[], Any]:
    """The same step as one launch of ours, checked against its definition before it is timed."""
    tableau = fastdiff.build_tableau(solver, fastdiff.NoiseSchedule.linear_beta(), 20)
    stage = 10
    slots = allocate_slots(tableau.slots, x)
    slots.copy_(torch.randn(tableau.slots, *x.shape))
    row = torch.from_numpy(tableau.row(stage)).float()
    index = torch.from_numpy(tableau.index(stage))
    variant = tableau.read_width(stage), len(tableau.stages[stage].writes)
    arguments = (slots, output, row, index, None, None, None, None, *variant)
    expected = slots.clone()
    multistep_step_ref(expected, *arguments[1:])
    multistep_step_unchecked(*arguments)
    if not torch.equal(slots, expected):
        raise RuntimeError(f"the fused {solver} step differs from its reference; nothing was timed")
    return lambda: multistep_step_unchecked(*arguments)


def interleaved(functions: tuple[Callable[[], Any], ...], seconds: float = 0.5) -> list[float]:
    """Median seconds of a call of each function, in turns so that all see the same machine."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 10:
        for function, found in zip(functions, times, strict=True):
            before = time.perf_counter()
            function()
            found.append(time.perf_counter() - before)
    return [median(found) for found in times]


# == Samples of common seeds =======================================================================


def sample_column(label: str, solver: str, steps: int) -> Column:
    """Sample the common seeds with one solver; every grid starts and ends at the same times."""
    sampler, reference = _digits_sampler(solver, steps), load_digits_reference()
    seeds, labels = torch.arange(SEEDS), reference["labels"]
    if sampler.tableau.nfe < 100:
        sampler(seeds=seeds, shape=(1, 8, 8), labels=labels)  # warm up
    before = time.perf_counter()
    images = sampler(seeds=seeds, shape=(1, 8, 8), labels=labels)
    elapsed = time.perf_counter() - before
    return Column(
        label,
        sampler.tableau.nfe,
        1e3 * elapsed / SEEDS,
        paired_error(images, reference["x0"]),
        images,
    )


def _digits_sampler(solver: str, steps: int) -> fastdiff.Sampler:
    unet, _ = load_digits()
    return fastdiff.Sampler(unet, fastdiff.NoiseSchedule.linear_beta(), solver=solver, steps=steps)


# == Pictures ======================================================================================


def draw_columns(columns: list[Column], path: Path, rows: int = 10) -> None:
    """One noise per row; a column per solver, between the noise and the converged solution."""
    import matplotlib.pyplot as plt

    from fastdiff.training.recipes.digits import digits_split

    scans, scan_labels = digits_split()[1]
    held_out = torch.stack([scans[scan_labels == digit][0] for digit in range(rows)])
    noise = fastdiff.seeded_noise(torch.arange(rows), (rows, 1, 8, 8)) / 3
    sheets = [("noise", "", noise)]
    sheets += [
        (c.label, f"{c.calls} calls\n{c.milliseconds:.1f} ms", c.images[:rows]) for c in columns
    ]
    sheets += [
        ("converged", "", load_digits_reference()["x0"][:rows]),
        ("held-out\nscans", "", held_out),
    ]

    figure, axes = plt.subplots(rows, len(sheets), figsize=(1.05 * len(sheets), 1.05 * rows + 0.9))
    for column, (label, cost, images) in enumerate(sheets):
        axes[0, column].set_title(label, fontsize=11, pad=26 if cost else 8)
        if cost:
            axes[0, column].text(
                0.5, 1.05, cost, transform=axes[0, column].transAxes, ha="center", fontsize=8
            )
        for row in range(rows):
            axes[row, column].imshow(images[row, 0], cmap="gray_r", vmin=-1, vmax=1)
            axes[row, column].set_axis_off()
    figure.text(
        0.5,
        0.012,
        f"8x8 digits from one noise per row; ms per image, {cpu_model()}, one thread",
        ha="center",
        fontsize=9,
        color="0.35",
    )
    figure.subplots_adjust(0.01, 0.035, 0.99, 0.915, wspace=0.06, hspace=0.06)
    _save(figure, path)


def photograph_rows() -> list[tuple[str, Tensor]]:
    """(label, crops [N, 3, 32, 32] in [0, 1]): the same noises, plain and preconditioned."""
    model, _ = load_photographs()
    fit, _ = photographs()
    real = crops(fit, 1000, 32, torch.Generator().manual_seed(0))
    statistics = fastdiff.estimate_masks(real, flip=True)
    rows = [("crops of the photographs", real[:PHOTOGRAPHS])]
    for label, alpha in (("plain", math.inf), ("alpha 5", 5.0), ("alpha auto", "auto")):
        made = fastdiff.Preconditioner.from_statistics(
            statistics,
            alpha=alpha,
            steps=PHOTOGRAPH_STEPS,
            sigma_min=model.sigma_min,
            sigma_max=model.sigma_max,
        )
        sampler = fastdiff.Sampler(
            model,
            model.schedule,
            solver="predictor_corrector",
            steps=PHOTOGRAPH_STEPS,
            preconditioner=made,
        )
        rows.append((label, sampler(seeds=list(range(PHOTOGRAPHS)), shape=(3, 32, 32)).clamp(0, 1)))
    return rows


def draw_photographs(path: Path) -> None:
    """Preconditioned sampling of the photographs model: a row for each preconditioner."""
    note = f"predictor and corrector, {PHOTOGRAPH_STEPS} noise levels, the same noises"
    draw_rows(photograph_rows(), path, note)


def draw_rows(rows: list[tuple[str, Tensor]], path: Path, note: str) -> None:
    """Rows of as many colour images [N, 3, H, W] in [0, 1], each under its label."""
    import matplotlib.pyplot as plt

    inches = 1.3 * len(rows)
    figure, axes = plt.subplots(len(rows), len(rows[0][1]), figsize=(1.1 * len(rows[0][1]), inches))
    for (label, images), line in zip(rows, axes, strict=True):
        line[0].set_title(label, fontsize=10, loc="left")
        for axis, image in zip(line, images, strict=True):
            axis.imshow(image.permute(1, 2, 0))
            axis.set_axis_off()
    figure.text(0.5, 0.06 / inches, note, ha="center", fontsize=9, color="0.35")
    figure.subplots_adjust(0.01, 0.21 / inches, 0.99, 1 - 0.31 / inches, wspace=0.04, hspace=0.3)
    _save(figure, path)


def draw_quality(path: Path) -> None:
    """Distance to the converged solution, and Frechet distance, against network calls."""
    import matplotlib.pyplot as plt

    report = json.loads((files("fastdiff") / "assets" / "digits_quality.json").read_text())
    figure, (paired, frechet) = plt.subplots(1, 2, figsize=(12, 5))
    for solver in dict.fromkeys(row["solver"] for row in report["rows"]):
        for axis, key in ((paired, "paired"), (frechet, "frechet")):
            rows = [r for r in report["rows"] if r["solver"] == solver and key in r]
            calls = [row["calls"] for row in rows]
            value, low, high = np.array([row[key] for row in rows]).T
            bars = np.maximum([value - low, high - value], 0)
            axis.errorbar(calls, value, bars, marker="o", ms=4, lw=1.2, capsize=2, label=solver)
    # Without their bias the training scans are at zero, give or take this.
    frechet.axhspan(0, report["floor"]["frechet"][2], color="0.9", label="training scans")
    for axis, title in (
        (paired, "RMS distance to the converged solution, same 64 noises"),
        (frechet, f"Frechet distance to held-out scans, {report['samples']:,} samples"),
    ):
        axis.set(xscale="log", xlabel="network calls", title=title)
        axis.set_xticks([5, 10, 20, 50, 100, 1000], ["5", "10", "20", "50", "100", "1000"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    paired.set_yscale("log")
    frechet.set_yscale("symlog", linthresh=1.0)
    frechet.set_ylim(bottom=0)
    frechet.set_xlim(right=130)
    frechet.legend(fontsize=9)
    figure.text(
        0.5,
        0.01,
        f"8x8 digits model, 95 % intervals; {report['command']}, {report['machine']}",
        ha="center",
        fontsize=8,
        color="0.35",
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write whole or not at all."""
    import matplotlib.pyplot as plt

    write_whole(path, lambda part: figure.savefig(part, dpi=110, format="png"))
    plt.close(figure)
