"""End to end: diffusers' DDIMPipeline around a small UNet2DModel, stock against our stepping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.registry import (
    Baseline,
    Call,
    Case,
    Entry,
    Gate,
    exact_convolutions,
    relative_error,
)
from fastdiff import Sampler, wrap

SIDE = 32


def unet(device: torch.device) -> torch.nn.Module:
    """A UNet2DModel of 3.5 million parameters, random weights."""
    import diffusers

    torch.manual_seed(0)
    return (
        diffusers.UNet2DModel(
            sample_size=SIDE,
            block_out_channels=(64, 128),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        .eval()
        .to(device)
    )


def scheduler() -> Any:
    import diffusers

    return diffusers.DDIMScheduler(clip_sample=False)


def stock(device: torch.device, batch: int, steps: int) -> Callable[[Sequence[Tensor]], Call]:
    """The pipeline as it is called by everyone, its noise given by a generator."""

    def make(noises: Sequence[Tensor]) -> Call:
        import diffusers

        return _piped(diffusers.DDIMPipeline(unet(device), scheduler()), device, batch, steps)

    return make


def stepped(
    device: torch.device, steps: int, prepare: Callable[[torch.nn.Module], Any]
) -> Callable[[Sequence[Tensor]], Call]:
    """The stock scheduler's loop, the network prepared in some way."""

    def make(noises: Sequence[Tensor]) -> Call:
        network, stepper = prepare(unet(device)), scheduler()

        def call(i: int) -> Tensor:
            stepper.set_timesteps(steps, device=device)
            x = noises[i]
            for t in stepper.timesteps:
                x = stepper.step(network(x, t), t, x).prev_sample
            return x

        return call

    return make


def plain(network: torch.nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, t: network(x, t).sample


def compiled(network: torch.nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return plain(torch.compile(network, fullgraph=True, dynamic=False))


def accelerated(device: torch.device, batch: int, steps: int) -> Callable[..., Call]:
    """The stock pipeline after `fastdiff.accelerate`: only its scheduler is ours."""

    def make(noises: Sequence[Tensor]) -> Call:
        import diffusers

        import fastdiff

        pipeline = diffusers.DDIMPipeline(unet(device), scheduler())
        return _piped(fastdiff.accelerate(pipeline), device, batch, steps)

    return make


def _piped(pipeline: Any, device: torch.device, batch: int, steps: int) -> Call:
    pipeline.set_progress_bar_config(disable=True)

    def call(i: int) -> Any:
        generator = torch.Generator(device).manual_seed(i)
        return pipeline(
            batch, generator, num_inference_steps=steps, output_type="np", return_dict=False
        )[0]

    return call


def ours(device: torch.device, steps: int) -> Callable[[Sequence[Tensor]], Call]:
    """Our loop: on a GPU one captured graph, where that is faster."""

    def make(noises: Sequence[Tensor]) -> Call:
        denoiser = wrap(unet(device), schedule=scheduler())
        sampler = Sampler(denoiser, solver="ddim", steps=steps)
        return lambda i: sampler(noises[i])

    return make


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """Our stepping makes the stock scheduler's samples."""
    noise = [torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)]
    with torch.inference_mode(), exact_convolutions():
        wanted = stepped(device, 5, plain)(noise)(0)
        error = relative_error(ours(device, 5)(noise)(0), wanted)
    yield {"case": "ddim, 5 steps", "error": error, "allowed": 1e-4, "ok": error <= 1e-4}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for batch, steps in ((1, 10),) if quick else ((1, 10), (4, 10), (1, 50)):
        shape = (batch, 3, SIDE, SIDE)
        yield Case(
            "ddim",
            shape,
            inputs=lambda i, shape=shape: torch.randn(
                shape, generator=torch.Generator().manual_seed(i)
            ).to(device),
            ours=ours(device, steps),
            bytes=0,
            flops=0,
            baselines={
                "diffusers DDIMPipeline": Baseline(
                    stock(device, batch, steps), capturable=False, agrees=False
                ),
                "accelerate(DDIMPipeline)": Baseline(
                    accelerated(device, batch, steps), capturable=False, agrees=False
                ),
                "stock loop": Baseline(stepped(device, steps, plain), capturable=False),
                "stock loop, compiled network": Baseline(
                    stepped(device, steps, compiled), compiles=True, capturable=False, quick=False
                ),
            },
            settings={"steps": steps},
            capturable=False,
        )


ENTRY = Entry("pipeline", "loop", (), gates, cases, needs="diffusers")
