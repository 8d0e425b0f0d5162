"""Our solvers beside diffusers' schedulers, on one network.

diffusers builds its tables in float32 and casts to float32 inside some steps. `in_float64` runs the
very same code with float64 in place of float32, so that both sides have the same sigmas; without
it the schedulers are stock.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastdiff import NoiseSchedule, Sampler

X = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 3, 4, 4)))


def network(x: torch.Tensor, t: Any) -> torch.Tensor:
    """Smooth in the state and in time, mixes pixels, and no solver gets it exactly."""
    t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, *[1] * (x.ndim - 1))
    return 0.7 * torch.tanh(1.5 * x + 0.3 * x.roll(1, -1)) + 0.2 * torch.sin(x + t / 150)


class _Wide:
    """A module with float64 where it has float32."""

    def __init__(self, module: Any) -> None:
        self.module, self.float32 = module, module.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@contextmanager
def in_float64(scheduler: type) -> Iterator[None]:
    """Run a scheduler's own code in float64."""
    module = sys.modules[scheduler.__module__]
    with mock.patch.multiple(module, torch=_Wide(torch), np=_Wide(np)):
        yield


def run(
    scheduler: Any,
    steps: int,
    start: Callable[[float], float] = lambda sigma: 1.0,
    **step: Any,
) -> tuple[torch.Tensor, list[float]]:
    """A diffusers loop; returns the sample and the times visited.

    `start` scales unit noise to what the scheduler starts from, given its first sigma.
    """
    scheduler.set_timesteps(steps)
    x = X.to(scheduler.alphas_cumprod.dtype)
    noises = step.pop("noises", None)
    if hasattr(scheduler, "sigmas"):
        x = x * start(float(scheduler.sigmas[0]))
    for i, t in enumerate(scheduler.timesteps):
        output = network(scheduler.scale_model_input(x, t), t)
        if noises is not None:
            step["variance_noise"] = noises[i].to(x)
        x = scheduler.step(output, t, x, **step).prev_sample
    return x, [float(t) for t in scheduler.timesteps]


def ours(solver: str, schedule: NoiseSchedule, times: Any, **settings: Any) -> torch.Tensor:
    noises = settings.pop("noises", None)
    sampler = Sampler(
        network, schedule, solver=solver, spacing=times, dtype=torch.float64, **settings
    )
    return sampler(X, stage_noise=noises)


def agree(make: Callable[[], tuple[Any, ...]], result: Callable[[list[float]], Any]) -> None:
    """Equal to 1e-9 with the same sigmas, to 5e-5 of the RMS with stock float32 ones."""
    kind = type(make())
    with in_float64(kind):
        theirs, times = run(make(), *make.arguments, **make.keywords)
    assert theirs.dtype == torch.float64
    mine = result(times)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    stock, _ = run(make(), *make.arguments, **make.keywords)
    assert stock.dtype == torch.float32
    rms = stock.double().square().mean().sqrt()
    assert (mine - stock).abs().max() <= 5e-5 * rms


class Case:
    """A scheduler's class and settings, and how its loop is run."""

    def __init__(self, kind: type, config: dict[str, Any], steps: int, **keywords: Any) -> None:
        self.kind, self.config = kind, config
        self.arguments, self.keywords = (steps,), keywords

    def __call__(self) -> Any:
        return self.kind(**self.config)


NOISES = list(torch.from_numpy(np.random.default_rng(1).standard_normal((20, *X.shape))))
KINDS = ("epsilon", "v_prediction", "sample")
