"""One call on what a user already has: a pipeline, a network with its scheduler, or a folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from fastdiff.denoisers import NetworkDenoiser, wrap
from fastdiff.denoisers.diffusers import load_diffusers, scheduler_options
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
    if _is_pipeline(what):
        given = ["scheduler"] * (scheduler is not None) + [
            k for k in options if k not in ("capture", "preconditioner")
        ]
        if given:
            raise TypeError(
                "a pipeline takes solver=, capture= and preconditioner= (steps and the rest are "
                f"the arguments of its own call); got {', '.join(given)}"
            )
        from fastdiff.integrations.diffusers_pipelines import accelerate_pipeline

        return accelerate_pipeline(what, solver=solver, **options)
    denoiser: NetworkDenoiser
    if isinstance(what, str | Path):
        if scheduler is not None:
            raise TypeError("scheduler must be left out for a folder, which has its own")
        denoiser, scheduler = load_diffusers(what)
        options = scheduler_options(scheduler, options) | options
    elif isinstance(what, NetworkDenoiser):
        if scheduler is not None:
            raise TypeError("scheduler must be left out for a wrapped network: give it to wrap()")
        denoiser = what
    else:
        denoiser = wrap(what, prediction=options.pop("prediction", None), schedule=scheduler)
        if scheduler is not None:
            options = scheduler_options(scheduler, options) | options
    if "tableau" not in options and (
        options.get("spacing") is None or isinstance(options["spacing"], str)
    ):
        options.setdefault("steps", 10)
    return Sampler(denoiser, solver=solver or "ipndm", **options)


def restore(pipe: Any) -> Any:
    """Undo `accelerate(pipe)`; returns the pipeline, as it was.

    Raises ValueError for anything that was not accelerated.
    """
    if not _is_pipeline(pipe):
        raise ValueError(f"pipe must be a pipeline that accelerate() was given; got "
                         f"{type(pipe).__name__}")  # fmt: skip
    from fastdiff.integrations.diffusers_pipelines import restore

    return restore(pipe)


def _is_pipeline(what: Any) -> bool:
    diffusers = sys.modules.get("diffusers")  # who has a pipeline has imported it
    return diffusers is not None and isinstance(what, diffusers.DiffusionPipeline)
