"""A whole sampling loop around a network that costs next to nothing: the solver's own cost.

On a GPU every solver's, captured, beside its own loop from Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.entries.captured_loop import replaying
from bench.registry import Baseline, Call, Case, Entry, Gate, relative_error
from fastdiff import NoiseSchedule, Sampler, solver_names

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


def ours(solver: str, steps: int, capture: str) -> Callable[[Sequence[Tensor]], Call]:
    def make(noises: Sequence[Tensor]) -> Call:
        schedule = NoiseSchedule.linear_beta()
        sampler = Sampler(network, schedule, solver=solver, steps=steps, capture=capture)
        given = {}
        if sampler.tableau.stochastic:
            given["seeds"] = torch.arange(len(noises[0]), device=noises[0].device)
        run = lambda i: sampler(noises[i], **given)
        return replaying(sampler, run) if capture == "always" else run

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
    """In float32 as in float64 for the pairs; every solver's replay as its loop, to the bit."""
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for solver in solver_names():
        eager = ours(solver, 10, "never")([noise.to(device)])(0)
        replayed = torch.equal(ours(solver, 10, "always")([noise.to(device)])(0), eager)
        gate = {"case": solver, "replay is eager to the bit": replayed, "ok": replayed}
        if solver in PAIRS:
            schedule = NoiseSchedule.linear_beta()
            exact = Sampler(network, schedule, solver=solver, steps=10, dtype=torch.float64)
            error = relative_error(eager, exact(noise.double()))
            gate |= {"error": error, "allowed": 1e-5, "ok": replayed and error <= 1e-5}
        yield gate


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Beside the stock schedulers; on a GPU then every solver beside its own loop from Python."""
    gpu = device.type == "cuda"
    capture = "always" if gpu else "never"
    shapes = [(1, 4, 64, 64)] if quick else [(1, 4, 64, 64), (4, 4, 64, 64), (16, 4, 64, 64)]
    wanted = [(shape, solver, 10) for shape in shapes for solver in PAIRS]
    if not quick:
        wanted += [(shape, "ipndm", steps) for shape in shapes for steps in (5, 20, 50)]
    if gpu:
        wanted += [(shapes[0], name, 10) for name in solver_names() if name not in PAIRS]
    for shape, solver, steps in wanted:
        loop = functools.partial(Baseline, capturable=False, agrees=False)
        baselines = {EAGER: loop(ours(solver, steps, "never"), devices=("cuda",))}
        if solver in PAIRS:
            label, name, options = PAIRS[solver]
            baselines[label] = loop(stock(name, options, steps), "diffusers")
        yield Case(
            solver,
            shape,
            inputs=lambda i, shape=shape: torch.randn(shape, device=device),
            ours=ours(solver, steps, capture),
            bytes=0,
            flops=0,
            baselines=baselines,
            settings={"steps": steps},
            capturable=False,
        )


EAGER = "our loop, eager"
ENTRY = Entry("solver_loop", "loop", (), gates, cases)
