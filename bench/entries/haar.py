"""`fastdiff.ops.haar_*`: pyramids of three levels, and the steps that never store one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import wavelets
from bench.baselines import compiled, each
from bench.inputs import IMAGE, IMAGES, Shape
from bench.registry import Baseline, Case, Entry, Maker
from bench.steps import NOISE_FLOPS
from bench.wavelets import LEVELS, bands, slices_step
from fastdiff.ops import (
    HaarPyramid,
    haar_expand,
    haar_loss,
    haar_merge,
    haar_noise,
    haar_split,
    haar_step,
)
from fastdiff.ops.haar import (
    haar_expand_ref,
    haar_loss_ref,
    haar_merge_ref,
    haar_step_ref,
)


class Buffers(NamedTuple):
    """What the calls of one set read."""

    x: Tensor
    score: Tensor
    pyramid: HaarPyramid
    coefficients: Tensor
    seeds: Tensor
    stage: Tensor

    @property
    def drawn(self) -> tuple[Tensor, ...]:
        """What an op that draws noise takes after the images."""
        return self.coefficients, self.seeds, self.stage


def buffers(
    number: int, shape: Sequence[int], device: torch.device, columns: int, levels: int = LEVELS
) -> Buffers:
    random = torch.Generator(device).manual_seed(number)
    draw = lambda *size: torch.randn(size, generator=random, device=device)
    x = draw(*shape)
    return Buffers(
        x,
        draw(*shape) if columns == 3 else x,
        haar_split(x, LEVELS),
        draw(1, levels + 1, columns),
        torch.arange(shape[0], device=device) + number,
        torch.zeros(1, dtype=torch.int32, device=device),
    )


class Row(NamedTuple):
    """One way of calling: columns of its coefficients, passes over the image, operations."""

    columns: int
    passes: float
    flops: float
    ours: Maker
    definition: Maker
    baselines: dict[str, Baseline]
    allowed: float = 0


def slices(
    body: Callable[..., Any], pick: Callable[[Buffers], Sequence[Any]], agrees: bool = False
) -> dict[str, Baseline]:
    """The body by PyTorch's operations, and compiled; with noise of its own it cannot agree."""
    return {
        "PyTorch slices": Baseline(each(lambda b: body(*pick(b))), agrees=agrees),
        "torch.compile": compiled(body, pick),
    }


def packages(way: str) -> dict[str, Baseline]:
    """Of split or merge."""
    published, theirs, ptwt = (
        getattr(wavelets, f"{of}_{way}") for of in ("published", "wavelets", "ptwt")
    )
    return {
        "published operations": Baseline(published),
        "pytorch_wavelets": Baseline(theirs, "pytorch_wavelets"),
        "ptwt": Baseline(ptwt, "ptwt", capturable=False),
    }


doubled = lambda x: (2 * x.shape[2], 2 * x.shape[3])

SPLIT = 8 / 3  # operations of one element's way through all levels
UNFUSED = "split, update, merge"
quiet = lambda x, c, score: slices_step(x, c, score, noisy=False)
noisy = lambda x, c, score: slices_step(x, c, score, noisy=True)

ROWS = {
    "split": Row(
        2, 2, SPLIT,
        each(lambda b: bands(haar_split(b.x, LEVELS))),
        each(lambda b: wavelets.slices_split(b.x)),
        slices(wavelets.slices_split, lambda b: (b.x,), True) | packages("split"),
    ),
    "merge": Row(
        2, 2, SPLIT,
        each(lambda b: haar_merge(b.pyramid)),
        each(lambda b: haar_merge_ref(b.pyramid, b.x.shape[2:])),
        slices(wavelets.slices_merge, lambda b: bands(b.pyramid), True) | packages("merge"),
    ),
    "step": Row(
        3, 3, 3 * SPLIT + 3,
        each(lambda b: haar_step(b.x, b.score, b.coefficients)),
        each(lambda b: haar_step_ref(b.x, b.score, b.coefficients, None, 0)),
        slices(quiet, lambda b: (b.x, b.coefficients, b.score), True)
        | {UNFUSED: Baseline(each(lambda b: wavelets.unfused(b, False)))},
    ),
    "step with noise": Row(
        3, 3, 3 * SPLIT + 5 + NOISE_FLOPS,
        each(lambda b: haar_step(b.x, b.score, *b.drawn)),
        each(lambda b: haar_step_ref(b.x, b.score, b.coefficients, b.seeds, 0)),
        slices(noisy, lambda b: (b.x, b.coefficients, b.score))
        | {UNFUSED: Baseline(each(lambda b: wavelets.unfused(b, True)), agrees=False)},
    ),
    "noise": Row(
        2, 2, 2 * SPLIT + 3 + NOISE_FLOPS,
        each(lambda b: haar_noise(b.x, *b.drawn)),
        each(lambda b: haar_step_ref(b.x, None, b.coefficients, b.seeds, 0)),
        slices(noisy, lambda b: (b.x, b.coefficients, None)),
    ),
    "expand": Row(
        2, 1.25, SPLIT + NOISE_FLOPS,
        each(lambda b: haar_expand(b.x, *b.drawn)),
        each(lambda b: haar_expand_ref(b.x, b.coefficients, b.seeds, 0, doubled(b.x))),
        slices(wavelets.slices_expand, lambda b: (b.x, b.coefficients)),
    ),
    "loss": Row(
        2, 1, SPLIT + 5 + NOISE_FLOPS,
        each(lambda b: haar_loss(b.x, *b.drawn)),
        each(lambda b: haar_loss_ref(b.x, b.coefficients, b.seeds, 0)),
        slices(wavelets.slices_loss, lambda b: (b.x, b.coefficients, *bands(b.pyramid))),
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
            ours=row.ours,
            definition=row.definition,
            allowed=row.allowed,
            bytes=int(4 * row.passes * math.prod(shape)),
            flops=int(row.flops * math.prod(shape)),
            baselines=row.baselines,
            settings={"levels": levels},
        )


OPS = ("haar_split", "haar_merge", "haar_step", "haar_noise", "haar_expand", "haar_loss")
ENTRY = Entry("haar", "op", OPS, cases)
