"""Whole loops of published networks, run plainly, compiled or in graphs; stock ones and ours.

Each network is run as it usually is: diffusers' UNets in float16, Stable Diffusion's with guidance
on the doubled batch, EDM's behind its own preconditioning in float32. Stock loops are written as
diffusers' pipelines are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff

from .inputs import cpu_normals
from .loops import Graphed, Plain, replaying
from .networks import MODELS, Method, Model, Preconditioned, embeddings, unet
from .registry import Call

SMALL_SIDE = 32
SCALE = 7.5  # of guidance

Prepare = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Cell:
    """One network with one method, on one machine."""

    name: str
    method: Method
    device: torch.device
    small: bool
    steps: int

    @property
    def model(self) -> Model:
        return MODELS[self.name]

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, *sides = self.model.shape
        return (channels, SMALL_SIDE, SMALL_SIDE) if self.small else (channels, *sides)

    @property
    def unet(self) -> nn.Module:
        return unet(self.name, self.device, self.small)

    def noise(self, number: int, batch: int) -> Tensor:
        (noise,) = cpu_normals(1, (batch, *self.shape), self.device, number)
        return noise.to(self.unet.dtype)

    def ours(self, prepare: Prepare, capture: str, noises: Sequence[Tensor]) -> Call:
        """The loop as fastdiff has it."""
        network = prepare(self.unet)
        options: dict[str, Any] = {"solver": self.method.solver, "capture": capture}
        if self.model.edm:
            sampler = fastdiff.accelerate(Preconditioned(network), steps=self.steps, **options)
        else:
            scheduler = self.method.stock()
            scheduler.set_timesteps(self.steps)
            times = [*scheduler.timesteps.tolist(), -1]
            sampler = fastdiff.accelerate(network, scheduler, spacing=times, **options)
        given: dict[str, Any] = {}
        if self.model.guided:
            none, text = embeddings(len(noises[0]), noises[0])
            given = {"guidance_scale": SCALE, "encoder_hidden_states": text}
            given["uncond"] = {"encoder_hidden_states": none}
        run = lambda i: sampler(noises[i], **given)
        return replaying(sampler, run) if capture == "always" else run

    def network(self, prepare: Prepare, kind: type[Plain], like: Tensor) -> Plain:
        """The raw network, run in some way, for a batch."""
        prompts = {}
        if self.model.guided:
            prompts["encoder_hidden_states"] = torch.cat(embeddings(len(like), like))
        return kind(prepare(self.unet), **prompts)

    def stock(
        self, prepare: Prepare, kind: type[Plain], host_times: bool, noises: Sequence[Tensor]
    ) -> Call:
        """The loop as a pipeline has it, around the network run in some way.

        host_times: the scheduler is told times on the host and where it begins, so that no step
        waits for the device; else the times are on the device, as pipelines have them.
        """
        network = self.network(prepare, kind, noises[0])
        scheduler = self.method.stock()
        # EDM's schedulers would begin at sqrt(sigma_max^2 + 1), the paper at sigma_max.
        scale = scheduler.config.sigma_max if self.model.edm else scheduler.init_noise_sigma
        guided = self.model.guided

        def call(i: int) -> Tensor:
            scheduler.set_timesteps(self.steps, device="cpu" if host_times else self.device)
            if host_times and hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)
            x = noises[i] * scale
            rows = len(x) * (2 if guided else 1)
            times = scheduler.timesteps.to(self.device, torch.float32)
            times = times[:, None].expand(-1, rows).contiguous()
            for t, time in zip(scheduler.timesteps, times, strict=True):
                seen = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
                output = network(seen, time)
                if guided:
                    none, text = output.chunk(2)
                    output = none + SCALE * (text - none)
                x = scheduler.step(output, t, x).prev_sample
            return x

        return call

    def replays(self, prepare: Prepare, noises: Sequence[Tensor]) -> Call:
        """As many replays of the network as the loop has, and nothing between them: the floor."""
        x = torch.cat([noises[0]] * 2) if self.model.guided else noises[0]
        network = self.network(prepare, Graphed, noises[0])
        network(x, torch.ones(len(x), device=self.device))
        assert isinstance(network, Graphed) and network.graph is not None
        replay, result = network.graph.replay, network.result

        def call(i: int) -> Tensor:
            for _ in range(self.steps):
                replay()
            return result

        return call
