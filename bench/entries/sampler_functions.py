"""k-diffusion's sampler functions: its loops' operations against ours, without a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import published
from bench.registry import Baseline, Call, Case, Entry, Gate, relative_error

STEPS = 20
FUNCTIONS = ("euler", "ipndm", "dpmpp_2m")


def karras(device: torch.device) -> Tensor:
    """STEPS levels of Karras et al. 2022, eq. 5, and 0."""
    root = torch.linspace(14.6 ** (1 / 7), 0.03 ** (1 / 7), STEPS, device=device)
    return torch.cat([root**7, root.new_zeros(1)])


def ours(name: str) -> Callable[..., Tensor]:
    from fastdiff.integrations import k_diffusion

    function = getattr(k_diffusion, f"sample_{name}")
    return lambda model, x, sigmas: function(model, x, sigmas, disable=True)


def theirs(name: str) -> Callable[..., Tensor]:
    return getattr(published, f"k_diffusion_{name}")


def run(
    sampler: Callable[[str], Callable[..., Tensor]], name: str, device: torch.device
) -> Callable[[Sequence[Any]], Call]:
    """A whole run; the "model" returns a tensor it has."""

    def make(sets: Sequence[tuple[Tensor, Tensor]]) -> Call:
        function, sigmas = sampler(name), karras(device)

        def call(i: int) -> Tensor:
            x, denoised = sets[i]
            with torch.no_grad():
                return function(lambda x, sigma: denoised, x, sigmas)

        return call

    return make


def inputs(number: int, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(number)
    x, denoised = (torch.randn(shape, generator=random).to(device) for _ in range(2))
    return 14.6 * x, denoised


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """With a model that is not constant, ours end where the formulas end."""
    x = inputs(0, (2, 3, 16, 16), device)[0]
    model = lambda x, sigma: torch.tanh(x / (1 + sigma.view(-1, 1, 1, 1)))
    for name in FUNCTIONS:
        with torch.no_grad():
            found, wanted = (f(name)(model, x, karras(device)) for f in (ours, theirs))
        error = relative_error(found, wanted)
        yield {"case": name, "error": error, "allowed": 5e-5, "ok": error <= 5e-5}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    sizes = [(1, 4, 64, 64)] if quick else [(1, 3, 32, 32), (4, 4, 64, 64), (16, 3, 256, 256)]
    for shape in sizes:
        for name in FUNCTIONS:
            yield Case(
                name,
                shape,
                inputs=lambda i, shape=shape: inputs(i, shape, device),
                ours=run(ours, name, device),
                bytes=0,
                flops=0,
                baselines={
                    "published operations": Baseline(
                        run(theirs, name, device), capturable=False, agrees=False
                    )
                },
                settings={"steps": STEPS},
                capturable=False,
            )


ENTRY = Entry("sampler_functions", "loop", (), gates, cases)
