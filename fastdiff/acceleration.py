"""One call on what a user already has: a pipeline, a network with its scheduler, or a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastdiff.denoisers import NetworkDenoiser, wrap
from fastdiff.frameworks import first_answer, frameworks
from fastdiff.sampler import Sampler


def accelerate(
    what: Any, scheduler: Any = None, *, solver: str | None = None, **options: Any
) -> Any:
    """Sample with fastdiff what was built for something else.

    Args:
        what: one of
            a diffusers pipeline: gets fused steps in place, and is returned. Its images stay what
            they were, unless `solver` asks for another method; `restore` undoes it.
            a network (see `fastdiff.wrap`): returns a `Sampler` over it.
            a local folder that `save_pretrained` wrote, with a UNet and a scheduler: the same.
        scheduler: for a network, its `NoiseSchedule` or diffusers scheduler, whose prediction type,
            spacing and clipping are taken; may be left out where `wrap` finds the schedule.
        solver: one of `fastdiff.solver_names()`. Default: for a pipeline the method it has, else
            "ipndm".
        options: of `Sampler`, for a network or a folder: steps (10 unless given), prediction, clip,
            spacing, dtype, progress, capture, ...; of these a pipeline takes
            capture and, where its scheduler is ScoreSdeVeScheduler, preconditioner.

    Raises:
        TypeError, ValueError: something that cannot be accelerated; the message names it.
    """
    for framework in frameworks():
        if framework.has_pipeline(what):
            if scheduler is not None:
                options["scheduler"] = scheduler
            return framework.accelerate(what, solver, **options)
    denoiser: NetworkDenoiser
    if isinstance(what, str | Path):
        if scheduler is not None:
            raise TypeError("scheduler must be left out for a folder, which has its own")
        loaded = first_answer(lambda framework: framework.load(what))
        assert loaded is not None  # it raises for what is no folder of its own
        denoiser, scheduler = loaded
    elif isinstance(what, NetworkDenoiser):
        if scheduler is not None:
            raise TypeError("scheduler must be left out for a wrapped network: give it to wrap()")
        denoiser = what
    else:
        denoiser = wrap(what, prediction=options.pop("prediction", None), schedule=scheduler)
    of_scheduler = first_answer(lambda framework: framework.tableau_options(scheduler, options))
    options = (of_scheduler or {}) | options
    if "tableau" not in options and (
        options.get("spacing") is None or isinstance(options["spacing"], str)
    ):
        options.setdefault("steps", 10)
    return Sampler(denoiser, solver=solver or "ipndm", **options)


def restore(pipe: Any) -> Any:
    """Undo `accelerate(pipe)`; returns the pipeline, as it was.

    Raises ValueError for anything that was not accelerated.
    """
    for framework in frameworks():
        if framework.has_pipeline(pipe):
            return framework.restore(pipe)
    raise ValueError(
        f"pipe must be a pipeline that accelerate() was given; got {type(pipe).__name__}"
    )
