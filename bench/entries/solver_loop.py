"""A whole sampling loop around a network that costs next to nothing: the solver's own cost.

On a GPU every solver's, captured, beside its own loop from Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import loop
from bench.inputs import LATENT, LATENTS, cpu_normals
from bench.loops import replaying, scheduler, stock
from bench.registry import Call, Case, Entry
from fastdiff import NoiseSchedule, Sampler, solver_names

LEADING = {"beta_end": 0.02, "timestep_spacing": "leading"}
PAIRS: dict[str, tuple[str, str, dict[str, Any]]] = {  # ours, and diffusers' of the same method
    "ipndm": ("diffusers PNDM", "PNDMScheduler", {"skip_prk_steps": True}),
    "ddim": ("diffusers DDIM", "DDIMScheduler", {"clip_sample": False}),
    "dpmpp_2m": ("diffusers DPM-Solver++ 2M", "DPMSolverMultistepScheduler", LEADING),
    "unipc": ("diffusers UniPC", "UniPCMultistepScheduler", LEADING),
}
EAGER = "our loop, eager"


def network(x: Tensor, t: Any) -> Tensor:
    """One pass over the image."""
    return x * 0.1


def ours(solver: str, steps: int, capture: str, noises: Sequence[Tensor]) -> Call:
    schedule = NoiseSchedule.linear_beta()
    options = {"solver": solver, "steps": steps, "capture": capture, "dtype": noises[0].dtype}
    sampler = Sampler(network, schedule, **options)
    given = {}
    if sampler.tableau.stochastic:
        given["seeds"] = torch.arange(len(noises[0]), device=noises[0].device)
    run = lambda i: sampler(noises[i], **given)
    return replaying(sampler, run) if capture == "always" else run


def exact(solver: str, steps: int, noises: Sequence[Tensor]) -> Call:
    """The same loop in float64, from Python."""
    return ours(solver, steps, "never", [noise.double() for noise in noises])


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """Beside the stock schedulers; on a GPU then every solver beside its own loop from Python."""
    gpu = device.type == "cuda"
    shapes = [LATENT] if quick else [LATENT, LATENTS, (16, 4, 64, 64)]
    wanted = [(shape, solver, 10) for shape in shapes for solver in PAIRS]
    if not quick:
        wanted += [(shape, "ipndm", steps) for shape in shapes for steps in (5, 20, 50)]
    if gpu:
        wanted += [(shapes[0], name, 10) for name in solver_names() if name not in PAIRS]
    for shape, solver, steps in wanted:
        baselines = {EAGER: loop(partial(ours, solver, steps, "never"), devices=("cuda",))}
        if solver in PAIRS:
            label, name, options = PAIRS[solver]
            stepper = partial(scheduler, name, **options)
            baselines[label] = loop(partial(stock, network, stepper, steps), "diffusers")
        yield Case(
            solver,
            shape,
            inputs=lambda i, shape=shape: cpu_normals(1, shape, device, i)[0],
            ours=partial(ours, solver, steps, "always" if gpu else "never"),
            definition=partial(exact, solver, steps),
            allowed=1e-5,
            baselines=baselines,
            settings={"steps": steps},
            capturable=False,
        )


ENTRY = Entry("solver_loop", "loop", (), cases)
