"""The `fastdiff` command: demo, sample, eval, train, precondition, solvers, doctor."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

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
precondition = typer.Typer(help="Masks of preconditioned sampling.", no_args_is_help=True)
app.add_typer(precondition, name="precondition")

# How a model is sampled, for `sample` and `eval`; what is not given is left to `generate`.
MODEL = typer.Option(help='"digits", or a local diffusers folder.')
Solver = Annotated[str | None, typer.Option(help="One of `fastdiff solvers`; ipndm.")]
Steps = Annotated[int | None, typer.Option(help="Intervals of the time grid; 10.")]
Spacing = Annotated[str | None, typer.Option(help="Of the time grid; the model's own.")]
Convention = Annotated[str | None, typer.Option(help="aligned, published or offset; aligned.")]
SeedStart = Annotated[int | None, typer.Option(help="Seed of the first image; 0.")]
Batch = Annotated[int | None, typer.Option(help="Images per network call; 64.")]
Label = Annotated[int | None, typer.Option(help="Class of all images; in turn if not given.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("out"),
) -> None:
    """Sample real digits live with every solver; measure speed and closeness; draw both."""
    from fastdiff.app.demo import run

    run(out)


@app.command()
def sample(
    num_images: Annotated[int, typer.Option(help="How many, of seeds that count up.")] = 16,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder, resumed if it has some; out/MODEL_SOLVER_STEPS."),
    ] = None,
    model: Annotated[str, MODEL] = "digits",
    solver: Solver = None,
    steps: Steps = None,
    spacing: Spacing = None,
    convention: Convention = None,
    seed_start: SeedStart = None,
    batch: Batch = None,
    label: Label = None,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw the first 100 images into this picture.")
    ] = None,
) -> None:
    """Sample a model into a folder, one PNG per seed; under torchrun, with all its processes."""
    from fastdiff.app.generate import first_process, generate, load_model
    from fastdiff.images import contact_sheet, image_files

    with _clear_errors():
        options = _given(
            solver=solver,
            steps=steps,
            spacing=spacing,
            convention=convention,
            seed_start=seed_start,
            batch=batch,
            label=label,
        )
        folder = generate(load_model(model), num_images, out, **options)
        if first_process():
            if sheet is not None:
                contact_sheet(image_files(folder, "out")[:100], sheet)
            print(f"{num_images} images: {folder}" + (f", {sheet}" if sheet else ""))


@app.command("eval")
def evaluate(
    images: Annotated[
        Path | None, typer.Option(help="Folder of images; with --model, where they are sampled to.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help='A folder, statistics (.npz), or "digits" for the held-out scans.'),
    ] = None,
    features: Annotated[
        str | None, typer.Option(help="digits, pixels or inception; the reference's own.")
    ] = None,
    save_stats: Annotated[
        Path | None, typer.Option(help="Write the images' statistics to this .npz.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The report to write; out/eval.json.")] = None,
    model: Annotated[str | None, MODEL] = None,
    all_solvers: Annotated[
        bool, typer.Option("--all-solvers", help="Every solver on the digits model; takes an hour.")
    ] = False,
    num_images: Annotated[int | None, typer.Option(help="To sample; 5000.")] = None,
    solver: Solver = None,
    steps: Steps = None,
    spacing: Spacing = None,
    convention: Convention = None,
    seed_start: SeedStart = None,
    batch: Batch = None,
    label: Label = None,
) -> None:
    """Measure images, or a model by its images, against a reference: Frechet distance, interval."""
    from fastdiff.app import evaluate as evaluation
    from fastdiff.app.digits_quality import evaluate_digits
    from fastdiff.app.generate import first_process, generate, load_model
    from fastdiff.files import write_json

    with _clear_errors():
        options = _given(
            solver=solver,
            steps=steps,
            spacing=spacing,
            convention=convention,
            seed_start=seed_start,
            batch=batch,
            label=label,
        )
        count = 5000 if num_images is None else num_images
        if count < 2:
            raise ValueError(f"num_images must be at least 2; got {count}")
        if all_solvers:
            others = _given(
                images=images,
                reference=reference,
                features=features,
                save_stats=save_stats,
                **options,
            )
            if model != "digits" or others:
                needless = "".join(f" without {_flag(name)}" for name in list(others)[:1])
                raise ValueError(f"--all-solvers goes with --model digits{needless}")
            evaluate_digits(out or Path("runs/digits_quality.json"), count)
            return
        if model is not None:
            if model == "digits" and reference is None and save_stats is None:
                reference = "digits"
            evaluation.resolve(reference, features, save_stats)  # before hours of sampling
            folder = generate(load_model(model), count, images, **options)
            if not first_process():
                return
        elif options or num_images is not None:
            name = next(iter(_given(num_images=num_images, **options)))
            raise ValueError(f"{_flag(name)} is about sampling and needs --model")
        elif images is not None:
            folder = images
        else:
            raise ValueError("--images or --model must be given")
        report = evaluation.evaluate(folder, reference, features=features, save_stats=save_stats)
        out = out or Path("out/eval.json")
        write_json(out, report)
        print(f"{evaluation.summary(report)}\n{'report':>12}  {out}")


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
    from fastdiff.training.recipes.digits import train_digits

    with _clear_errors():
        train_digits(out, steps=steps, seed=seed)


@train.command()
def ve(
    out: Annotated[Path, typer.Option(help="Folder of the run; resumed if it has one.")] = Path(
        "runs/photographs"
    ),
    preset: Annotated[str, typer.Option(help="cpu (32 px, half an hour) or gpu (64 px).")] = "cpu",
    steps: Annotated[
        int | None, typer.Option(help="Optimiser steps; the preset's own if not given.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches and noise.")] = 0,
) -> None:
    """Train a variance-exploding model of crops of scikit-learn's two photographs."""
    from fastdiff.training.recipes.photographs import train_photographs

    with _clear_errors():
        train_photographs(out, preset, steps=steps, seed=seed)


@precondition.command("estimate")
def estimate(
    data: Annotated[Path, typer.Argument(help="Folder of 8-bit images of one size.")],
    out: Annotated[Path, typer.Option(help="The safetensors file.")] = Path("out/mask.safetensors"),
    limit: Annotated[int | None, typer.Option(help="Images to read, by name; all.")] = None,
    flip: Annotated[bool, typer.Option(help="Count mirror images too.")] = False,
) -> None:
    """Estimate the masks of preconditioned sampling from images."""
    from fastdiff.preconditioning import Preconditioner, estimate_masks

    with _clear_errors():
        statistics = estimate_masks(data, flip=flip, limit=limit)
        statistics.save(out)
        shape = "x".join(map(str, statistics.shape))
        print(f"{statistics.count} images of {shape}: wrote {out}")
        print(f"at alpha 5: {Preconditioner.from_statistics(statistics, use_pixels=True)}")


@app.command()
def solvers(
    show: Annotated[str | None, typer.Option(help="Print this solver's tableau.")] = None,
    steps: Annotated[int, typer.Option(help="Intervals of that tableau.")] = 5,
) -> None:
    """What each solver supports, or one of them as a table."""
    import fastdiff

    if show is not None:
        with _clear_errors():
            schedule = fastdiff.NoiseSchedule.linear_beta()
            print(fastdiff.build_tableau(show, schedule, steps))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from fastdiff.app.solver_table import OF_ALL, solver_rows

    rows = solver_rows()
    table = Table(box=box.SIMPLE)
    for heading in rows[0]:
        table.add_column(heading, no_wrap=heading == "solver")
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    console.print(table)
    console.print(OF_ALL)


@app.command()
def doctor() -> None:
    """Say what is installed, which backend serves, and what is wrong."""
    from fastdiff.app.doctor import examine, warnings

    for topic, finding in examine():
        print(f"{topic:>14}  {finding}")
    for warning in warnings():
        print(f"{'warning':>14}  {warning}")


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class _clear_errors:
    """Bad input ends with its one sentence, not with a traceback."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | TypeError | OSError | ImportError):
            sys.exit(f"fastdiff: {error}")


def main() -> None:
    """Entry point of the console script."""
    app()
