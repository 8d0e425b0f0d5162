"""A run of a scheduler's steps: diffusers' class against our twin of it, without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.registry import Baseline, Call, Case, Entry, Gate, relative_error

STEPS = 20
SCHEDULERS: dict[str, dict[str, Any]] = {
    "PNDM": {"skip_prk_steps": True},
    "DDIM": {},
    "DPMSolverMultistep": {},
    "UniPCMultistep": {},
    "DEISMultistep": {},
    "EulerDiscrete": {},
    "HeunDiscrete": {},
}


def run(module: str, name: str, device: torch.device) -> Callable[[Sequence[Tensor]], Call]:
    """All steps of a run, from `set_timesteps` on; the "network" returns a tensor it has."""

    def make(sets: Sequence[tuple[Tensor, Tensor]]) -> Call:
        import importlib

        kind = getattr(importlib.import_module(module), f"{name}Scheduler")
        with torch.inference_mode(False):  # it is made where the pipeline is, before any run
            scheduler = kind(**SCHEDULERS[name])

        def call(i: int) -> Tensor:
            x, output = sets[i]
            scheduler.set_timesteps(STEPS, device=device)
            for t in scheduler.timesteps:
                scheduler.scale_model_input(x, t)
                x = scheduler.step(output, t, x).prev_sample
            return x

        return call

    return make


OURS, STOCK = "fastdiff.integrations.diffusers.schedulers", "diffusers"


def inputs(number: int, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(number)
    x, output = (torch.randn(shape, generator=random).to(device) for _ in range(2))
    return x, output


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """Our runs end where the stock ones end."""
    for name in SCHEDULERS:
        tensors = [inputs(0, (2, 3, 16, 16), device)]
        theirs, ours = (run(module, name, device)(tensors)(0) for module in (STOCK, OURS))
        error = relative_error(ours, theirs)
        yield {"case": name, "error": error, "allowed": 1e-4, "ok": error <= 1e-4}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    sizes = [(1, 4, 64, 64)] if quick else [(1, 3, 32, 32), (4, 4, 64, 64), (16, 3, 256, 256)]
    for shape in sizes:
        for name in SCHEDULERS:
            yield Case(
                name,
                shape,
                inputs=lambda i, shape=shape: inputs(i, shape, device),
                ours=run(OURS, name, device),
                bytes=0,
                flops=0,
                baselines={
                    "stock": Baseline(run(STOCK, name, device), capturable=False, agrees=False)
                },
                settings={"steps": STEPS},
                capturable=False,
            )


ENTRY = Entry("scheduler_step", "loop", (), gates, cases, needs="diffusers")
