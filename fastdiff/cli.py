"""The `fastdiff` command: demo, sample, train, solvers, doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

NO_TYPER = (
    "the fastdiff command needs typer and rich; in the source checkout: "
    "pip install --no-build-isolation '.[demo]'"
)

try:
    import typer
except ModuleNotFoundError:
    sys.exit(NO_TYPER)

app = typer.Typer(
    help="Few-step sampling of diffusion models.", no_args_is_help=True, add_completion=False
)
train = typer.Typer(help="Train a model.", no_args_is_help=True)
app.add_typer(train, name="train")
evaluate = typer.Typer(help="Measure a model.", no_args_is_help=True)
app.add_typer(evaluate, name="evaluate")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out"),
) -> None:
    """Sample real digits live with every solver; measure speed and closeness; draw both."""
    from fastdiff.demo import run

    run(out)


@app.command()
def sample(
    solver: Annotated[str, typer.Option(help="One of `fastdiff solvers`.")] = "ipndm",
    steps: Annotated[int, typer.Option(help="Intervals of the time grid.")] = 10,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones count up.")] = 0,
    count: Annotated[int, typer.Option(help="How many images.")] = 16,
    digit: Annotated[int | None, typer.Option(help="0 .. 9; all in turn by default.")] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("out/sample.png"),
) -> None:
    """Sample digits from the model that comes with fastdiff."""
    from fastdiff.demo import sample_digits

    with _clear_errors():
        sampler = sample_digits(out, solver, steps, seed, count, digit)
    print(f"{count} digits, {sampler}: {out}")


@train.command()
def digits(
    out: Annotated[Path, typer.Option(help="Folder of the run; resumed if it has one.")] = Path(
        "runs/digits"
    ),
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps; the recipe's own if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches and noise.")] = 0,
) -> None:
    """Train the digits model: class-conditional, scikit-learn's 8x8 scans."""
    from fastdiff.training.digits import train_digits

    with _clear_errors():
        train_digits(out, steps=steps, seed=seed)


@evaluate.command("digits")
def evaluate_digits_model(
    out: Annotated[Path, typer.Option(help="The JSON to write; resumed if there.")] = Path(
        "runs/digits_quality.json"
    ),
    samples: Annotated[int, typer.Option(help="For the Frechet distance.")] = 5000,
) -> None:
    """Measure every solver on the digits model: distances, their intervals, calls and time."""
    from fastdiff.training.evaluate import evaluate_digits

    with _clear_errors():
        evaluate_digits(out, samples)


@app.command()
def solvers(
    show: Annotated[str | None, typer.Option(help="Print this solver's tableau.")] = None,
    steps: Annotated[int, typer.Option(help="Intervals of that tableau.")] = 5,
) -> None:
    """List the solvers, or print one as a table."""
    import fastdiff
    from fastdiff.solvers.registry import get_solver

    schedule = fastdiff.NoiseSchedule.linear_beta()
    if show is not None:
        with _clear_errors():
            print(fastdiff.build_tableau(show, schedule, steps))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table("solver", "calls", "slots", "passes", "options", "", box=box.SIMPLE,
                  caption="calls, buffers and passes over the image at 10 steps")  # fmt: skip
    for name in fastdiff.solver_names():
        chosen, tableau = get_solver(name), fastdiff.build_tableau(name, schedule, 10)
        table.add_row(name, str(tableau.nfe), str(tableau.slots), str(tableau.passes),
                      ", ".join(chosen.options), chosen.summary)  # fmt: skip
    Console().print(table)


@app.command()
def doctor() -> None:
    """Say what is installed, which backend serves, and what is wrong."""
    from fastdiff.doctor import examine, warnings

    for topic, finding in examine():
        print(f"{topic:>14}  {finding}")
    for warning in warnings():
        print(f"{'warning':>14}  {warning}")


class _clear_errors:
    """Bad input ends with its one sentence, not with a traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | TypeError | FileNotFoundError):
            sys.exit(f"fastdiff: {error}")


def main() -> None:
    """Entry point of the console script."""
    app()
