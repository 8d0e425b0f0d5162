"""A run of a scheduler's steps: diffusers' class against our twin of it, without a network."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import loop
from bench.inputs import cpu_normals, loop_sizes
from bench.registry import Call, Case, Entry

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
OURS, STOCK = "fastdiff.integrations.diffusers.schedulers", "diffusers"


def run(module: str, name: str, device: torch.device, sets: Sequence[Sequence[Tensor]]) -> Call:
    """All steps of a run, from `set_timesteps` on; the "network" returns a tensor it has."""
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


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for shape, name in itertools.product(loop_sizes(quick), SCHEDULERS):
        yield Case(
            name,
            shape,
            inputs=lambda i, shape=shape: cpu_normals(2, shape, device, i),
            ours=partial(run, OURS, name, device),
            definition=partial(run, STOCK, name, device),
            allowed=1e-4,
            baselines={"stock": loop(partial(run, STOCK, name, device))},
            settings={"steps": STEPS},
            capturable=False,
        )


ENTRY = Entry("scheduler_step", "loop", (), cases, needs="diffusers")
