"""A whole sampling loop around a network that costs next to nothing: the solver's own cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.registry import Baseline, Call, Case, Entry, Gate, relative_error
from fastdiff import NoiseSchedule, Sampler

PAIRS = {  # ours, and the diffusers scheduler of the same method
    "ipndm": ("diffusers PNDM", "PNDMScheduler", {"skip_prk_steps": True}),
    "ddim": ("diffusers DDIM", "DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": (
        "diffusers DPM-Solver++ 2M",
        "DPMSolverMultistepScheduler",
        {"beta_end": 0.02, "timestep_spacing": "leading"},
    ),
    "unipc": (
        "diffusers UniPC",
        "UniPCMultistepScheduler",
        {"beta_end": 0.02, "timestep_spacing": "leading"},
    ),
}


def network(x: Tensor, t: Any) -> Tensor:
    """One pass over the image."""
    return x * 0.1


def ours(solver: str, steps: int) -> Callable[[Sequence[Tensor]], Call]:
    def make(noises: Sequence[Tensor]) -> Call:
        sampler = Sampler(network, NoiseSchedule.linear_beta(), solver=solver, steps=steps)
        return lambda i: sampler(noises[i])

    return make


def stock(name: str, options: dict[str, Any], steps: int) -> Callable[[Sequence[Tensor]], Call]:
    """The loop that diffusers' pipelines write."""

    def make(noises: Sequence[Tensor]) -> Call:
        import diffusers

        scheduler = getattr(diffusers, name)(**options)

        def call(i: int) -> Tensor:
            scheduler.set_timesteps(steps, device=noises[i].device)
            x = noises[i] * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
            return x

        return call

    return make


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """In float32 as in float64, for every solver of the cases."""
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for solver in PAIRS:
        schedule = NoiseSchedule.linear_beta()
        exact = Sampler(network, schedule, solver=solver, steps=10, dtype=torch.float64)
        wanted = exact(noise.double())
        error = relative_error(ours(solver, 10)([noise.to(device)])(0), wanted)
        yield {"case": solver, "error": error, "allowed": 1e-5, "ok": error <= 1e-5}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    shapes = [(1, 4, 64, 64)] if quick else [(1, 4, 64, 64), (4, 4, 64, 64), (16, 4, 64, 64)]
    for shape in shapes:
        for solver, (label, name, options) in PAIRS.items():
            for steps in (10,) if quick else (5, 10, 20, 50):
                if steps != 10 and solver != "ipndm":
                    continue
                yield Case(
                    solver,
                    shape,
                    inputs=lambda i, shape=shape: torch.randn(shape, device=device),
                    ours=ours(solver, steps),
                    bytes=0,
                    flops=0,
                    baselines={
                        label: Baseline(
                            stock(name, options, steps), "diffusers", capturable=False, agrees=False
                        )
                    },
                    settings={"steps": steps},
                    capturable=False,
                )


ENTRY = Entry("solver_loop", "loop", (), gates, cases)
