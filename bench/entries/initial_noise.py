"""`fastdiff.ops.seeded_noise`: initial noise of a batch, each image from its own seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench.registry import Baseline, Call, Case, Entry, Gate
from fastdiff.ops import seeded_noise
from fastdiff.ops.constants import INITIAL_NOISE
from fastdiff.ops.philox import philox_normal_ref

FLOPS = 70  # an element's integer and float operations


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """Bits against the definition, and that neighbours do not matter."""
    seeds = torch.tensor([0, 1, -5, 2**40 + 7])
    for shape in ((4, 3, 32, 32), (4, 1, 7, 9)):
        found = seeded_noise(seeds.to(device), shape).cpu()
        wanted = philox_normal_ref(seeds, math.prod(shape[1:]), 0, INITIAL_NOISE).view(shape)
        alone = seeded_noise(seeds[2:3].to(device), (1, *shape[1:])).cpu()
        same = torch.equal(found, wanted) and torch.equal(found[2:3], alone)
        yield {"case": f"seeded_noise {shape}", "bit_equal": same, "ok": same}


def per_image_generators(sets: Sequence[tuple[Tensor, tuple[int, ...]]]) -> Call:
    """What pipelines do for per-image seeds: a torch.Generator for each image, then a stack."""

    def call(i: int) -> Tensor:
        seeds, shape = sets[i]
        made = []
        for seed in seeds.tolist():
            generator = torch.Generator(seeds.device).manual_seed(seed)
            made.append(torch.randn(shape[1:], generator=generator, device=seeds.device))
        return torch.stack(made)

    return call


def randn(sets: Sequence[tuple[Tensor, tuple[int, ...]]]) -> Call:
    """One generator for the whole batch: no image can be made again by itself."""
    return lambda i: torch.randn(sets[i][1], device=sets[i][0].device)


BASELINES = {
    "a torch.Generator per image": Baseline(per_image_generators, capturable=False, agrees=False),
    "torch.randn": Baseline(randn, agrees=False),
}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for shape in ((16, 3, 256, 256), (16, 4, 64, 64)):
        yield Case(
            "seeded_noise",
            shape,
            inputs=lambda i, shape=shape: (torch.arange(shape[0], device=device) + i, shape),
            ours=lambda sets: lambda i: seeded_noise(*sets[i]),
            bytes=4 * math.prod(shape),
            flops=FLOPS * math.prod(shape),
            baselines=BASELINES,
            capturable=False,
        )


ENTRY = Entry("seeded_noise", "op", ("seeded_noise",), gates, cases)
