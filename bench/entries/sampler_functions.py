"""k-diffusion's sampler functions: its loops' operations against ours, without a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from bench import published
from bench.baselines import loop
from bench.inputs import Shape, cpu_normals, loop_sizes
from bench.registry import Call, Case, Entry

STEPS = 20
Model = Callable[[Tensor, Tensor], Tensor]
FUNCTIONS = ("euler", "ipndm", "dpmpp_2m")
SIGMA = 14.6  # the largest


def karras(device: torch.device) -> Tensor:
    """STEPS levels of Karras et al. 2022, eq. 5, and 0."""
    root = torch.linspace(SIGMA ** (1 / 7), 0.03 ** (1 / 7), STEPS, device=device)
    return torch.cat([root**7, root.new_zeros(1)])


def ours(name: str) -> Callable[..., Tensor]:
    from fastdiff.integrations import k_diffusion

    function = getattr(k_diffusion, f"sample_{name}")
    return lambda model, x, sigmas: function(model, x, sigmas, disable=True)


def theirs(name: str) -> Callable[..., Tensor]:
    return getattr(published, f"k_diffusion_{name}")


def run(
    sampler: Callable[[str], Callable[..., Tensor]],
    name: str,
    device: torch.device,
    sets: Sequence[tuple[Tensor, Model]],
) -> Call:
    """A whole run."""
    function, sigmas = sampler(name), karras(device)

    def call(i: int) -> Tensor:
        x, model = sets[i]
        with torch.no_grad():
            return function(model, x, sigmas)

    return call


def constant(number: int, shape: Shape, device: torch.device) -> tuple[Tensor, Model]:
    """The largest noise, and a "model" that returns a tensor it has: it takes no time."""
    x, denoised = cpu_normals(2, shape, device, number)
    return SIGMA * x, lambda x, sigma: denoised


def varying(number: int, shape: Shape, device: torch.device) -> tuple[Tensor, Model]:
    """A model that depends on its input: every run of a constant one ends at the constant."""
    x = constant(number, shape, device)[0]
    return x, lambda x, sigma: torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1)))


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for shape, name in itertools.product(loop_sizes(quick), FUNCTIONS):
        case = Case(
            name,
            shape,
            inputs=lambda i, shape=shape: constant(i, shape, device),
            ours=partial(run, ours, name, device),
            definition=partial(run, theirs, name, device),
            allowed=5e-5,
            baselines={"published operations": loop(partial(run, theirs, name, device))},
            settings={"steps": STEPS},
            capturable=False,
        )
        inputs = lambda i, shape=shape: varying(i, shape, device)
        yield replace(case, checked=replace(case, inputs=inputs))


ENTRY = Entry("sampler_functions", "loop", (), cases)
