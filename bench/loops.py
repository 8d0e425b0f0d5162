"""Sampling loops around networks that are run in some way: plainly, compiled, or in a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff

from .registry import Call

Network = Callable[[Tensor, Any], Tensor]


def scheduler(name: str, **options: Any) -> Any:
    """A scheduler of diffusers."""
    import diffusers

    return getattr(diffusers, name)(**options)


def stock(network: Network, make: Callable[[], Any], steps: int, noises: Sequence[Tensor]) -> Call:
    """The loop that diffusers' pipelines write; `make` makes its scheduler."""
    stepper = make()

    def call(i: int) -> Tensor:
        stepper.set_timesteps(steps, device=noises[i].device)
        x = noises[i] * stepper.init_noise_sigma
        for t in stepper.timesteps:
            x = stepper.step(network(stepper.scale_model_input(x, t), t), t, x).prev_sample
        return x

    return call


def plain(network: Any) -> Any:
    return network


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network, fullgraph=True, dynamic=False)  # type: ignore[return-value]


class Plain:
    """The raw network, as a stock loop calls it: (x [B, C, H, W], t) -> its output."""

    def __init__(self, network: nn.Module, **kwargs: Tensor) -> None:
        self.network, self.kwargs = network, kwargs

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, return_dict=False, **self.kwargs)[0]


class Graphed(Plain):
    """The same in a CUDA graph: x and t are copied in, the result is its own buffer."""

    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.graph is None:
            self.x, self.t = x.clone(), t.clone()
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    super().__call__(self.x, self.t)
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = super().__call__(self.x, self.t)
        self.x.copy_(x)
        self.t.copy_(t)
        self.graph.replay()
        return self.result


def replaying(sampler: fastdiff.Sampler, run: Call) -> Call:
    """A call of a sampler that must replay: it raises where the loop was stepwise after all."""
    checked = False

    def call(i: int) -> Any:
        nonlocal checked
        result = run(i)
        if not checked:
            found = sampler.describe()
            reasons = [r for r in found["routed"] if r.startswith("stepwise")]
            if found["loop"] != "captured" or reasons:
                raise RuntimeError(f"the loop was not captured: {', '.join(reasons) or 'off'}")
            checked = True
        return result

    return call
