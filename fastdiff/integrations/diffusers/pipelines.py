"""diffusers pipelines with fused scheduler steps, and with this package's solvers.

`accelerate_pipeline(pipe)` puts the fused twin of the pipeline's own scheduler in its place: the
same calls, the same generator, the same images to rounding. With `solver=` another method samples:
a `TableauScheduler`. Nothing else of the pipeline is touched, so callbacks, interrupts, previews
and adapters work as before. `restore(pipe)` puts the stock scheduler back.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin

from fastdiff.capture import captures
from fastdiff.integrations.diffusers import schedulers
from fastdiff.integrations.diffusers.captured_pipelines import CapturedLoop, captured_class
from fastdiff.integrations.diffusers.score_sde import PreconditionedScoreSdeVe
from fastdiff.integrations.diffusers.tableau_scheduler import TableauScheduler
from fastdiff.preconditioning import Preconditioner

STOCK = "_fastdiff_stock_scheduler"  # the attribute that holds what restore() puts back
TWINS = {
    name: value
    for name, value in vars(schedulers).items()
    if isinstance(value, type) and issubclass(value, SchedulerMixin)
}


def accelerate_pipeline(
    pipe: Any,
    *,
    solver: str | None = None,
    capture: str = "auto",
    preconditioner: Preconditioner | None = None,
) -> Any:
    """Give a diffusers pipeline fused steps; returns the same pipeline.

    Args:
        pipe: a pipeline with a `scheduler` of one of the classes in schedulers.py.
        solver: None keeps the method (and its results); else a name of `fastdiff.solver_names()`.
        capture: as of `fastdiff.Sampler`; for DDPM, DDIM, PNDM and Stable Diffusion pipelines,
            where nothing needs the middle of the loop.
        preconditioner: for a pipeline with a ScoreSdeVeScheduler: what its steps pass through.

    Raises:
        TypeError: not a diffusers pipeline with a scheduler.
        ValueError: a scheduler that has no fused twin, or an unknown solver.
    """
    if not isinstance(pipe, DiffusionPipeline) or not hasattr(pipe, "scheduler"):
        raise TypeError(
            f"pipe must be a diffusers pipeline with a scheduler; got {type(pipe).__name__}"
        )
    stock = getattr(pipe, STOCK, pipe.scheduler)
    if preconditioner is not None:
        if solver is not None:
            raise ValueError("solver must be left out with preconditioner=, which keeps the method")
        scheduler = PreconditionedScoreSdeVe.of(stock, preconditioner)
    elif solver is not None:
        scheduler = TableauScheduler.of(stock, solver)
    else:
        name = type(stock).__name__
        if name not in TWINS:
            raise ValueError(
                f"pipe.scheduler must be one of {', '.join(sorted(TWINS))} (or give solver=); "
                f"got {name}"
            )
        scheduler = TWINS[name].of(stock)
    captures(capture, torch.device("cpu"))  # Raise on an unknown mode before anything is changed.
    vars(pipe)[STOCK] = stock
    pipe.scheduler = scheduler
    kind = captured_class(type(pipe))
    if kind is not None:
        pipe.__class__ = kind
    if isinstance(pipe, CapturedLoop):
        vars(pipe)["fastdiff_capture"] = capture
    return pipe


def restore(pipe: Any) -> Any:
    """Put back the scheduler that `accelerate` replaced; returns the same pipeline.

    Raises ValueError for a pipeline that was not accelerated.
    """
    if STOCK not in vars(pipe):
        raise ValueError(f"pipe must be one that accelerate() was given; got {type(pipe).__name__}")
    pipe.scheduler = vars(pipe).pop(STOCK)
    if isinstance(pipe, CapturedLoop):
        pipe.__class__ = pipe.stock_class
        del vars(pipe)["fastdiff_capture"]
    return pipe
