"""Launches of `multistep_step` as solver runs make them: their numbers and their buffers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import NoiseSchedule, build_tableau
from fastdiff.ops import allocate_slots, multistep_step_unchecked
from fastdiff.ops import row as columns

from .inputs import Shape

STEPS = 1000  # of the runs the launches are taken from: the state hardly changes in one
NOISE_FLOPS = 70  # integer and float operations of a normal


@dataclass(frozen=True)
class Row:
    """A launch from the middle of a solver's run, its slots as the sampler assigns them.

    Without a solver: `reads` and `writes` slots of their own, random coefficients.
    """

    solver: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    reads: int = 0
    writes: int = 0
    output: torch.dtype | None = torch.float32
    network_input: torch.dtype | None = None
    guided: bool = False
    seeded: bool = False


class Launch(NamedTuple):
    """The numbers of a launch: coefficients float64 [1, K], index, and how many slots there are."""

    coefficients: Tensor
    index: Tensor
    slots: int
    reads: int
    writes: int

    @property
    def weights(self) -> Tensor:
        """[writes, EACH + reads]: a view of the coefficients."""
        return self.coefficients[0, columns.HEAD :].view(self.writes, -1)


@cache
def launch_of(row: Row) -> Launch:
    if row.solver:
        schedule = NoiseSchedule.linear_beta()
        tableau = build_tableau(row.solver, schedule, STEPS, **dict(row.options))
        middle = STEPS // 2
        coefficients = torch.from_numpy(tableau.row(middle))
        index, writes = torch.from_numpy(tableau.index(middle)), len(tableau.stages[middle].writes)
        reads = len(index) - columns.INDEX_HEAD - writes
        return Launch(coefficients, index, tableau.slots, reads, writes)
    slots = row.reads + row.writes
    index = columns.index(1, 0, range(row.reads), range(row.reads, slots))
    random = torch.Generator().manual_seed(0)
    width = columns.width(row.reads, row.writes)
    coefficients = torch.rand(1, width, generator=random, dtype=torch.float64) + 0.1
    head = columns.head(coefficients)
    head.low.fill_(-math.inf)
    head.high.fill_(math.inf)
    index = torch.tensor(index, dtype=torch.int32)
    return Launch(coefficients, index, slots, row.reads, row.writes)


class Step(NamedTuple):
    """What `multistep_step_unchecked` takes."""

    slots: Tensor
    output: Tensor | None
    coefficients: Tensor
    index: Tensor
    guidance: Tensor | None
    seeds: Tensor | None
    noise: Tensor | None
    network_input: Tensor | None
    reads: int
    writes: int

    def run(self) -> Tensor:
        """The launch; returns the slot of the first write."""
        multistep_step_unchecked(*self)
        return self.slots[self.written[0]]

    @property
    def results(self) -> list[Tensor]:
        """What a launch writes."""
        return [self.slots] + ([] if self.network_input is None else [self.network_input])

    @property
    def read(self) -> list[int]:
        """The slots that are read."""
        return self.index[columns.INDEX_HEAD :].tolist()[: self.reads]

    @property
    def written(self) -> list[int]:
        """The slots that are written."""
        return self.index[columns.INDEX_HEAD :].tolist()[self.reads :]


def step_of(
    row: Row,
    shape: Shape,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    per_sample: bool = False,
    seed: int = 0,
) -> Step:
    """The launch of a row at [B, ...], on random tensors."""
    random = torch.Generator(device).manual_seed(seed)
    forward = (2 * shape[0] if row.guided else shape[0], *shape[1:])

    def normal(size: Shape, of: torch.dtype) -> Tensor:
        value = torch.randn(size, generator=random, device=device).to(of)
        return value.to(memory_format=torch.channels_last) if channels_last else value

    launch = launch_of(row)
    rows = shape[0] if per_sample else 1
    slots = allocate_slots(launch.slots, normal(shape, dtype))
    for slot in slots:
        slot.copy_(normal(shape, dtype))
    return Step(
        slots=slots,
        output=normal(forward, row.output) if row.output else None,
        coefficients=launch.coefficients.to(dtype).expand(rows, -1).contiguous().to(device),
        index=launch.index.to(device),
        guidance=torch.full((rows,), 3.0, dtype=dtype, device=device) if row.guided else None,
        seeds=torch.arange(shape[0], device=device) if row.seeded else None,
        noise=None,
        network_input=(
            torch.empty_like(normal(forward, row.network_input)) if row.network_input else None
        ),
        reads=launch.reads,
        writes=launch.writes,
    )


def moved_bytes(row: Row, shape: Shape) -> int:
    """Bytes of one float32 launch: every operand that a coefficient asks for, once."""
    launch = launch_of(row)
    reads = int((launch.weights[:, columns.EACH :] != 0).any(0).sum())
    itemsizes = [t.itemsize for t in (row.output, row.network_input) if t is not None]
    per_element = 4 * (reads + launch.writes) + (1 + row.guided) * sum(itemsizes)
    return per_element * math.prod(shape)


def flops(row: Row, shape: Shape) -> int:
    """Multiplications and additions of the weighted sums, and the noise's operations."""
    sums = 2 * int((launch_of(row).weights != 0).sum())
    return (sums + NOISE_FLOPS * row.seeded) * math.prod(shape)
