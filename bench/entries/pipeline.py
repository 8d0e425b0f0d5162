"""End to end: diffusers' DDIMPipeline around a small UNet2DModel, stock against our stepping."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff
from bench.baselines import loop
from bench.inputs import cpu_normals
from bench.loops import Plain, compiled, plain, scheduler, stock
from bench.registry import Baseline, Call, Case, Entry

SIDE = 32


def unet(device: torch.device) -> nn.Module:
    """A UNet2DModel of 3.5 million parameters, random weights."""
    import diffusers

    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=SIDE,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return network.eval().to(device)


def ddim() -> Any:
    return scheduler("DDIMScheduler", clip_sample=False)


def piped(
    device: torch.device,
    batch: int,
    steps: int,
    prepare: Callable[[Any], Any],
    noises: Sequence[Tensor],
) -> Call:
    """The pipeline as it is called by everyone, its noise given by a generator."""
    import diffusers

    pipeline = prepare(diffusers.DDIMPipeline(unet(device), ddim()))
    pipeline.set_progress_bar_config(disable=True)

    def call(i: int) -> Any:
        generator = torch.Generator(device).manual_seed(i)
        return pipeline(
            batch, generator, num_inference_steps=steps, output_type="np", return_dict=False
        )[0]

    return call


def stepped(
    device: torch.device,
    steps: int,
    prepare: Callable[[nn.Module], nn.Module],
    noises: Sequence[Tensor],
) -> Call:
    """The stock scheduler's loop, the network prepared in some way."""
    return stock(Plain(prepare(unet(device))), ddim, steps, noises)


def ours(device: torch.device, steps: int, noises: Sequence[Tensor]) -> Call:
    """Our loop: on a GPU one captured graph, where that is faster."""
    denoiser = fastdiff.wrap(unet(device), schedule=ddim())
    sampler = fastdiff.Sampler(denoiser, solver="ddim", steps=steps)
    return lambda i: sampler(noises[i])


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for batch, steps in ((1, 10),) if quick else ((1, 10), (4, 10), (1, 50)):
        shape = (batch, 3, SIDE, SIDE)
        slow = partial(stepped, device, steps, compiled)
        yield Case(
            "ddim",
            shape,
            inputs=lambda i, shape=shape: cpu_normals(1, shape, device, i)[0],
            ours=partial(ours, device, steps),
            definition=partial(stepped, device, steps, plain),
            allowed=1e-4,
            baselines={
                "diffusers DDIMPipeline": loop(partial(piped, device, batch, steps, plain)),
                # Only its scheduler becomes ours.
                "accelerate(DDIMPipeline)": loop(
                    partial(piped, device, batch, steps, fastdiff.accelerate)
                ),
                "stock loop": Baseline(partial(stepped, device, steps, plain), capturable=False),
                "stock loop, compiled network": Baseline(
                    slow, compiles=True, capturable=False, quick=False
                ),
            },
            settings={"steps": steps},
            capturable=False,
        )


ENTRY = Entry("pipeline", "loop", (), cases, needs="diffusers")
