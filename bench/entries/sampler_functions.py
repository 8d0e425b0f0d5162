"""k-diffusion's sampler functions: its loops' operations against ours, without a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from bench import published
from bench.baselines import loop
from bench.gates import Gate, relative_error, within
from bench.inputs import Shape, cpu_normals, loop_sizes
from bench.registry import Call, Case, Entry

STEPS = 20
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
    sets: Sequence[tuple[Tensor, Tensor]],
) -> Call:
    """A whole run; the "model" returns a tensor it has."""
    function, sigmas = sampler(name), karras(device)

    def call(i: int) -> Tensor:
        x, denoised = sets[i]
        with torch.no_grad():
            return function(lambda x, sigma: denoised, x, sigmas)

    return call


def inputs(number: int, shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    x, denoised = cpu_normals(2, shape, device, number)
    return SIGMA * x, denoised


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """With a model that is not constant, ours end where the formulas end."""
    x = inputs(0, (2, 3, 16, 16), device)[0]
    model = lambda x, sigma: torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1)))
    for name in FUNCTIONS:
        with torch.no_grad():
            found, wanted = (f(name)(model, x, karras(device)) for f in (ours, theirs))
        yield within(name, relative_error(found, wanted), 5e-5)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for shape, name in itertools.product(loop_sizes(quick), FUNCTIONS):
        yield Case(
            name,
            shape,
            inputs=lambda i, shape=shape: inputs(i, shape, device),
            ours=partial(run, ours, name, device),
            baselines={"published operations": loop(partial(run, theirs, name, device))},
            settings={"steps": STEPS},
            capturable=False,
        )


ENTRY = Entry("sampler_functions", "loop", (), gates, cases)
