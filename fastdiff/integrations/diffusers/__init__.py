"""diffusers: its networks, schedulers and pipelines. The package is imported when one is met."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastdiff.frameworks import Framework, register
from fastdiff.integrations.diffusers import networks, schedule


class Diffusers(Framework):
    """What diffusers brings, with the adapters (peft) and hooks (accelerate) of its networks."""

    def denoiser(self, network: Any) -> Callable[..., Any] | None:
        families = (networks.DiffusersUNet, networks.FlowTransformer)
        return next((family for family in families if family.recognises(network)), None)

    def schedule(self, scheduler: Any) -> Any | None:
        return schedule.schedule_of(scheduler)

    def prediction(self, scheduler: Any) -> str | None:
        return schedule.prediction_of(scheduler)

    def tableau_options(self, scheduler: Any, given: dict[str, Any]) -> dict[str, Any] | None:
        return schedule.tableau_options(scheduler, given)

    def load(self, folder: str | Path) -> tuple[Any, Any] | None:
        return networks.load_diffusers(folder)

    def has_pipeline(self, what: Any) -> bool:
        diffusers = sys.modules.get("diffusers")  # who has a pipeline has imported it
        return diffusers is not None and isinstance(what, diffusers.DiffusionPipeline)

    def accelerate(self, pipeline: Any, solver: str | None, **options: Any) -> Any:
        given = [name for name in options if name not in ("capture", "preconditioner")]
        if given:
            raise TypeError(
                "a pipeline takes solver=, capture= and preconditioner= (steps and the rest are "
                f"the arguments of its own call); got {', '.join(given)}"
            )
        from fastdiff.integrations.diffusers.pipelines import accelerate_pipeline

        return accelerate_pipeline(pipeline, solver=solver, **options)

    def restore(self, pipeline: Any) -> Any:
        from fastdiff.integrations.diffusers.pipelines import restore

        return restore(pipeline)

    def watched(self, module: Any, adapters: bool) -> Sequence[str]:
        from fastdiff.capture import NotCapturable

        if "_hf_hook" in vars(module):
            raise NotCapturable(f"{type(module).__name__} has an offloading hook")
        if not adapters and type(module).__module__.startswith("peft."):
            raise NotCapturable(
                f"{type(module).__name__} is an adapter's layer: fuse and unload "
                "it, or give capture_key="
            )
        return "processor", "s1", "s2", "b1", "b2"  # attention processors, and FreeU's numbers


register(Diffusers())
