"""Results as pictures: share of a copy by bytes, latency of the loops, error by calls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ..measure import OURS
from ..words import Json, machine, shape
from .tables import loops

BLUE, ORANGE, BLACK = "#1f77b4", "#ff7f0e", "#222222"
OTHERS = ("#2ca02c", "#9467bd", "#d62728", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f")
MARKERS = "osD^vPX*"


def draw(records: dict[str, Json], solvers: Json, docs: Path) -> Iterator[Path]:
    """Write every picture that docs/benchmarks.md and docs/solvers.md show."""
    for name, data in records.items():
        slug = name[: -len("-2026-01-01.json")]
        yield _save(_copy(data), docs / f"bench-{slug}-copy.png")
        for entry in loops(data):
            yield _save(_loop(entry, data), docs / f"bench-{slug}-{entry}.png")
    yield _save(_errors(solvers), docs / "solvers.png")


def _save(figure: plt.Figure, path: Path) -> Path:
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def _copy(data: Json) -> plt.Figure:
    """Share of the measured copy's bandwidth against bytes, a panel for each number of threads."""
    cases = [case for case in data["cases"].values() if "of_copy" in case]
    panels = sorted({case.get("threads", 0) for case in cases})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.2 + 4.6 * len(panels), 5), sharey=True, squeeze=False
    )
    rows = list(dict.fromkeys((case["entry"], case["row"]) for case in cases))
    for axis, threads in zip(axes.flat, panels, strict=True):
        for number, (entry, row) in enumerate(rows):
            points = sorted(
                (case["bytes"], case["of_copy"])
                for case in cases
                if (case["entry"], case["row"], case.get("threads", 0)) == (entry, row, threads)
            )
            axis.plot(
                *zip(*points, strict=True),
                color=(BLUE, ORANGE, BLACK, *OTHERS)[number % 11],
                marker=MARKERS[number % 8],
                label=row if entry in (row, "multistep_step") else f"{entry} {row}",
            )
        axis.axhline(1, color=BLACK, lw=1, ls="--")
        axis.set(xscale="log", xlabel="bytes moved", title=f"{threads} threads" if threads else "")
        axis.yaxis.set_major_formatter("{x:.0%}")
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylim=(0, None), ylabel="share of the bandwidth of a copy, same run")
    axes[0, -1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), frameon=False)
    figure.suptitle(f"What a launch reaches of a copy of as many bytes, {machine(data)}")
    figure.tight_layout()
    return figure


def _loop(entry: str, data: Json) -> plt.Figure:
    """A loop's latency: every row against size, then against steps where there are several."""
    most = max(data["threads"])
    cases = [c for c in data["cases"].values() if c["entry"] == entry]
    cases = [c for c in cases if c.get("threads", most) == most]
    usual = statistics.mode(case["steps"] for case in cases)
    panels: dict[str, list[tuple[Any, Json]]] = {}
    for case in sorted(cases, key=lambda case: math.prod(case["shape"])):
        if case["steps"] == usual:
            title = f"{case['row']}, {usual} steps"
            panels.setdefault(title, []).append((shape(case["shape"]), case))
    by_steps: dict[str, list[tuple[Any, Json]]] = {}
    for case in sorted(cases, key=lambda case: case["steps"]):
        title = f"{case['row']}, {shape(case['shape'])}"
        by_steps.setdefault(title, []).append((case["steps"], case))
    panels |= {title: points for title, points in by_steps.items() if len(points) > 1}

    columns = min(4, len(panels) + 1)
    lines = len(panels) // columns + 1
    figure, axes = plt.subplots(
        lines, columns, figsize=(3.3 * columns, 3 * lines + 0.5), squeeze=False
    )
    others = iter(OTHERS)
    colors: dict[str, str] = {}
    for name in (OURS, *(name for case in cases for name in case["over_ours"])):
        if name not in colors:
            stock = name == "stock" or name.startswith("diffusers")
            colors[name] = BLUE if name == OURS else ORANGE if stock else next(others)
    for axis, (title, points) in zip(axes.flat, panels.items(), strict=False):
        _latencies(axis, points, colors)
        axis.set_title(title, fontsize=10)
    for line in axes:
        line[0].set_ylabel("milliseconds")
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    handles = [Line2D([], [], color=color, marker="o", ms=4) for color in colors.values()]
    axes[-1, -1].legend(handles, colors, loc="center left", fontsize=9, frameon=False)
    threads = f", {most} threads" if data["device"] == "cpu" else ""
    figure.suptitle(f"{entry}, {machine(data)}{threads}")
    figure.tight_layout()
    return figure


def _latencies(axis: Axes, points: list[tuple[Any, Json]], colors: dict[str, str]) -> None:
    """A line for each method: our time, and ours times the ratio of the method's own group."""
    ticks = [str(x) for x, _ in points]
    for name, color in colors.items():
        found = [
            (number, case["p50_us"] / 1e3 * (case["over_ours"] | {OURS: 1})[name])
            for number, (_, case) in enumerate(points)
            if name in (OURS, *case["over_ours"])
        ]
        if found:
            axis.plot(*zip(*found, strict=True), color=color, marker="o", ms=4)
    axis.set_yscale("log")
    axis.set_xticks(range(len(ticks)), ticks, fontsize=8)
    axis.margins(x=0.15)
    axis.grid(alpha=0.3)


def _errors(solvers: Json) -> plt.Figure:
    """Error against calls, a panel for each family; ipndm and ddim are in all of them."""
    families = solvers["families"]
    curves = {name: curve for family in families.values() for name, curve in family.items()}
    fixed = {"ipndm": BLUE, "ddim": BLACK}
    figure, axes = plt.subplots(2, 3, figsize=(13, 8), sharex=True, sharey=True)
    for axis, (family, own) in zip(axes.flat, families.items(), strict=True):
        for name, color in fixed.items():
            if name not in own:
                axis.plot(*curves[name].values(), color=color, lw=1, ls="--", alpha=0.6, label=name)
        others = iter((ORANGE, *OTHERS))
        for name, curve in own.items():
            color = fixed.get(name) or next(others)
            axis.plot(*curve.values(), color=color, marker="o", ms=3.5, lw=1.3, label=name)
        axis.set(xscale="log", yscale="log", title=family)
        axis.set_xticks([5, 10, 20, 30], ["5", "10", "20", "30"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for axis in axes[1]:
        axis.set_xlabel("network calls")
    for axis in axes[:, 0]:
        axis.set_ylabel("RMS distance per pixel")
    axes[0, 0].set_ylim(2e-3, 3)
    figure.suptitle("Distance to the converged solution, digits model, same 64 noises")
    figure.tight_layout()
    return figure
