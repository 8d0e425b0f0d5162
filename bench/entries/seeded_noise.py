"""`fastdiff.ops.seeded_noise`: initial noise of a batch, each image from its own seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bench.baselines import each
from bench.inputs import IMAGES, Shape
from bench.registry import Baseline, Case, Entry
from bench.steps import NOISE_FLOPS
from fastdiff.ops import seeded_noise
from fastdiff.ops.constants import INITIAL_NOISE
from fastdiff.ops.philox import philox_normal_ref


class Seeds(NamedTuple):
    seeds: Tensor
    shape: Shape


def defined(of: Seeds) -> Tensor:
    normals = philox_normal_ref(of.seeds, math.prod(of.shape[1:]), 0, INITIAL_NOISE)
    return normals.view(of.shape)


def per_image_generators(of: Seeds) -> Tensor:
    """What pipelines do for per-image seeds: a torch.Generator for each image, then a stack."""
    made = []
    for seed in of.seeds.tolist():
        generator = torch.Generator(of.seeds.device).manual_seed(seed)
        made.append(torch.randn(of.shape[1:], generator=generator, device=of.seeds.device))
    return torch.stack(made)


def randn(of: Seeds) -> Tensor:
    """One generator for the whole batch: no image can be made again by itself."""
    return torch.randn(of.shape, device=of.seeds.device)


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for shape in (IMAGES, (16, 4, 64, 64)):
        yield Case(
            "seeded_noise",
            shape,
            inputs=lambda i, shape=shape: Seeds(torch.arange(shape[0], device=device) + i, shape),
            ours=each(lambda of: seeded_noise(*of)),
            definition=each(defined),
            bytes=4 * math.prod(shape),
            flops=NOISE_FLOPS * math.prod(shape),
            baselines={
                "a torch.Generator per image": Baseline(
                    each(per_image_generators), capturable=False, agrees=False
                ),
                "torch.randn": Baseline(each(randn), agrees=False),
            },
            capturable=False,
        )


ENTRY = Entry("seeded_noise", "op", ("seeded_noise",), cases)
