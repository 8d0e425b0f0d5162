"""`fastdiff.ops.weighted_sums`: steps of schedulers on the caller's tensors, into fresh ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench.baselines import compiled, each
from bench.inputs import Shape, normals, step_sizes
from bench.published import clipped_ddim_step, plms_step
from bench.registry import Baseline, Case, Entry
from fastdiff import NoiseSchedule
from fastdiff.ops import weighted_sums_ref, weighted_sums_unchecked


class Row(NamedTuple):
    """Weights of one result over x, the output and its past; clamp: the op's, or ()."""

    weights: tuple[float, ...]
    clamp: tuple[float, ...] = ()

    @property
    def operands(self) -> int:
        return len(self.weights) - bool(self.clamp)


# alpha and sigma before and after a step of fifty, from the middle of a run
LEVELS = [level for t in (500, 480) for level in NoiseSchedule.linear_beta().rates(t)]


def _plms() -> Row:
    alpha, sigma, alpha_next, sigma_next = LEVELS
    ratio = alpha_next / alpha
    mix = (sigma_next - ratio * sigma) / 24
    return Row((ratio, 55 * mix, -59 * mix, 37 * mix, -9 * mix))


def _clipped_ddim() -> Row:
    """x weighs in the clamped x0 alone."""
    alpha, sigma, alpha_next, sigma_next = LEVELS
    return Row((0, sigma_next, alpha_next), (-1, 1, 1 / alpha, -sigma / alpha))


ROWS = {"plms": _plms(), "ddim clipped": _clipped_ddim()}  # 6 passes, and 3


class Sums(NamedTuple):
    """What `weighted_sums_unchecked` takes."""

    operands: list[Tensor]
    weights: Tensor
    dtypes: list[torch.dtype]
    clamp: Tensor | None


def sums_of(row: Row, shape: Shape, device: torch.device, seed: int = 0) -> Sums:
    """A launch of the row on random float32 tensors."""
    numbers = [torch.tensor(n, dtype=torch.float32, device=device) for n in row]
    operands = normals(row.operands, shape, device, seed)
    return Sums(operands, numbers[0][None], [torch.float32], numbers[1] if row.clamp else None)


def moved_bytes(row: Row, shape: Shape) -> int:
    """Bytes of one float32 launch: every operand that a number asks for, and the result, once."""
    factors = row.clamp[2:] or (0,) * row.operands
    read = sum(bool(w or f) for w, f in zip(row.weights, factors, strict=False))
    return 4 * (read + 1) * math.prod(shape)


def published_plms(sums: Sums) -> Tensor:
    alpha, sigma, alpha_next, sigma_next = LEVELS
    x, output, *past = sums.operands
    ratio = alpha_next / alpha
    return plms_step(x, output, past, ratio, ratio * sigma - sigma_next, 1.0)


PUBLISHED = {
    "plms": published_plms,
    "ddim clipped": lambda sums: clipped_ddim_step(*sums.operands, *LEVELS),
}


def body(row: Row) -> Callable[..., Tensor]:
    """The row's definition, its numbers constants: for torch.compile."""

    def weighted(weights: Sequence[float], terms: Sequence[Tensor]) -> Tensor:
        return sum(w * t for w, t in zip(weights, terms, strict=True) if w)

    def step(*operands: Tensor) -> Tensor:
        terms = list(operands)
        if row.clamp:
            terms.append(weighted(row.clamp[2:], operands).clamp(*row.clamp[:2]))
        return weighted(row.weights, terms)

    return step


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for shape, (name, row) in itertools.product(step_sizes(device), ROWS.items()):
        yield Case(
            name,
            shape,
            inputs=lambda i, row=row, shape=shape: sums_of(row, shape, device, i),
            ours=each(lambda sums: weighted_sums_unchecked(*sums)[0]),
            definition=each(lambda sums: weighted_sums_ref(*sums)[0]),
            bytes=moved_bytes(row, shape),
            flops=2 * sum(map(bool, row.weights + row.clamp[2:])) * math.prod(shape),
            baselines={
                "published operations": Baseline(each(PUBLISHED[name])),
                "torch.compile": compiled(body(row), lambda sums: sums.operands),
            },
        )


ENTRY = Entry("weighted_sums", "op", ("weighted_sums",), cases)
