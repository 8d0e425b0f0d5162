"""`fastdiff.ops.haar_*`: pyramids of three levels, and the steps that never store one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import wavelets
from bench.baselines import each
from bench.inputs import IMAGE, IMAGES, Shape, normals
from bench.registry import Baseline, Case, Entry
from bench.steps import NOISE_FLOPS
from bench.wavelets import LEVELS, bands, slices, slices_step, unfused
from fastdiff import ops
from fastdiff.ops import haar as definitions


class Buffers(NamedTuple):
    """What the calls of one set read."""

    x: Tensor
    score: Tensor
    pyramid: ops.HaarPyramid
    c: Tensor  # coefficients
    seeds: Tensor
    stage: Tensor

    @property
    def drawn(self) -> tuple[Tensor, ...]:
        """What an op that draws noise takes after the images."""
        return self.c, self.seeds, self.stage


def buffers(
    number: int, shape: Sequence[int], device: torch.device, columns: int, levels: int = LEVELS
) -> Buffers:
    x, *score = normals(columns - 1, tuple(shape), device, number)
    (c,) = normals(1, (1, levels + 1, columns), device, number)
    seeds = torch.arange(shape[0], device=device) + number
    stage = torch.zeros(1, dtype=torch.int32, device=device)
    return Buffers(x, *(score or [x]), ops.haar_split(x, LEVELS), c, seeds, stage)


class Row(NamedTuple):
    """One way of calling: columns of its coefficients, passes over the image, operations."""

    columns: int
    passes: float
    flops: float
    ours: Callable[[Buffers], Any]
    definition: Callable[[Buffers], Any]
    baselines: dict[str, Baseline]
    allowed: float = 0


SPLIT = 8 / 3  # operations of one element's way through all levels
UNFUSED = "split, update, merge"
quiet = lambda x, c, score: slices_step(x, c, score, noisy=False)
noisy = lambda x, c, score: slices_step(x, c, score, noisy=True)
doubled = lambda x: (2 * x.shape[2], 2 * x.shape[3])

ROWS = {
    "split": Row(
        2, 2, SPLIT,
        lambda b: bands(ops.haar_split(b.x, LEVELS)),
        lambda b: bands(definitions.haar_split_ref(b.x, LEVELS)),
        slices(wavelets.slices_split, lambda b: (b.x,), True) | wavelets.SPLITS,
    ),
    "merge": Row(
        2, 2, SPLIT,
        lambda b: ops.haar_merge(b.pyramid),
        lambda b: definitions.haar_merge_ref(b.pyramid, b.x.shape[2:]),
        slices(wavelets.slices_merge, lambda b: bands(b.pyramid), True) | wavelets.MERGES,
    ),
    "step": Row(
        3, 3, 3 * SPLIT + 3,
        lambda b: ops.haar_step(b.x, b.score, b.c),
        lambda b: definitions.haar_step_ref(b.x, b.score, b.c, None, 0),
        slices(quiet, lambda b: (b.x, b.c, b.score), True)
        | {UNFUSED: Baseline(each(lambda b: unfused(b, False)))},
    ),
    "step with noise": Row(
        3, 3, 3 * SPLIT + 5 + NOISE_FLOPS,
        lambda b: ops.haar_step(b.x, b.score, *b.drawn),
        lambda b: definitions.haar_step_ref(b.x, b.score, b.c, b.seeds, 0),
        slices(noisy, lambda b: (b.x, b.c, b.score))
        | {UNFUSED: Baseline(each(lambda b: unfused(b, True)), agrees=False)},
    ),
    "noise": Row(
        2, 2, 2 * SPLIT + 3 + NOISE_FLOPS,
        lambda b: ops.haar_noise(b.x, *b.drawn),
        lambda b: definitions.haar_step_ref(b.x, None, b.c, b.seeds, 0),
        slices(noisy, lambda b: (b.x, b.c, None)),
    ),
    "expand": Row(
        2, 1.25, SPLIT + NOISE_FLOPS,
        lambda b: ops.haar_expand(b.x, *b.drawn),
        lambda b: definitions.haar_expand_ref(b.x, b.c, b.seeds, 0, doubled(b.x)),
        slices(wavelets.slices_expand, lambda b: (b.x, b.c)),
    ),
    "loss": Row(
        2, 1, SPLIT + 5 + NOISE_FLOPS,
        lambda b: ops.haar_loss(b.x, *b.drawn),
        lambda b: definitions.haar_loss_ref(b.x, b.c, b.seeds, 0),
        slices(wavelets.slices_loss, lambda b: (b.x, b.c, *bands(b.pyramid))),
        1e-5,  # a sum's order is the kernel's own
    ),
}  # fmt: skip


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    sizes: list[Shape] = [IMAGES, (64, 3, 128, 128), IMAGE]
    if device.type == "cuda":
        sizes = [(64, 4, 512, 512), *sizes]
    for shape, (name, row) in itertools.product(sizes[:1] if quick else sizes, ROWS.items()):
        given, levels = shape, LEVELS
        if name == "expand":  # to that size
            given, levels = (*shape[:2], shape[2] // 2, shape[3] // 2), 1
        yield Case(
            name,
            shape,
            inputs=lambda i, given=(given, device, row.columns, levels): buffers(i, *given),
            ours=each(row.ours),
            definition=each(row.definition),
            allowed=row.allowed,
            bytes=int(4 * row.passes * math.prod(shape)),
            flops=int(row.flops * math.prod(shape)),
            baselines=row.baselines,
            settings={"levels": levels},
        )


OPS = ("haar_split", "haar_merge", "haar_step", "haar_noise", "haar_expand", "haar_loss")
ENTRY = Entry("haar", "op", OPS, cases)
