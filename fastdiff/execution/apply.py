"""How a stage's row is applied to the state: pointwise, in Fourier space, or by a Langevin step.

An `Apply` makes one stage's change of the slots and of what the network is shown next. To apply
rows in another way, in bands for instance, is to write one more here and to choose it in
`applied_by`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.execution.nonlinear import rescaled_guidance
from fastdiff.ops import SpectralGains, multistep_step_unchecked, row, spectral_update_unchecked
from fastdiff.ops.common import clamped
from fastdiff.ops.half_spectrum import step_row
from fastdiff.ops.layout import per_sample
from fastdiff.ops.multistep_step import drawn_noise
from fastdiff.tableau import Stage


class State(Protocol):
    """What rows are applied to: `fastdiff.execution.stepper.Stepper` says what these are."""

    table: Any
    slots: Tensor
    views: list[Tensor]
    rows: list[Tensor]
    network_input: Tensor | None
    routed: Counter[str]

    def show(self, number: int) -> None: ...


Apply = Callable[[State, int, Tensor | None, Tensor | None, Tensor | None, Tensor | None], None]
"""(state, number of the stage, output, guidance, seeds, noise); the tensors are
`multistep_step`'s."""


def applied_by(number: int, stage: Stage, gains: SpectralGains | None) -> Apply:
    """What applies a stage's row; gains: what all increments after the start pass through."""
    if number and gains is not None:
        return through_gains
    return along_direction if number and stage.langevin is not None else pointwise


def pointwise(
    state: State,
    number: int,
    output: Tensor | None,
    guidance: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
    rows: Tensor | None = None,
) -> None:
    """The stage's own row, or the one given [1 or B, K]: one launch."""
    table = state.table
    multistep_step_unchecked(
        state.slots,
        output,
        state.rows[number] if rows is None else rows,
        table.indices[number],
        guidance,
        seeds,
        noise,
        state.network_input,
        *table.variants[number],
    )


def through_gains(
    state: State,
    number: int,
    output: Tensor | None,
    guidance: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
) -> None:
    """x + M (b x + e x0 + a F) + c M z: an increment, its parts passed through a preconditioner."""
    table, stage = state.table, state.table.tableau.stages[number]
    x, y = state.views[stage.sees], state.views[stage.writes[0].slot]
    factors = table.increments[number]
    output = _guided(state, output, guidance)
    if output is None or table.increments_sample:
        output = _direction(state, number, output)
        factors = torch.cat([torch.ones_like(factors[:, :1]), factors[:, 3:]], 1)
    else:
        factors = factors[:, 1:] if table.increments_state else factors[:, 2:]
    spectral_update_unchecked(
        x,
        output,
        table.gains,
        factors.contiguous(),
        seeds,
        _number(state, number),
        0,
        noise,
        "exact",
        stage.step,
        y,
    )
    state.show(number)


def along_direction(
    state: State,
    number: int,
    output: Tensor | None,
    guidance: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
) -> None:
    """x + h g + sqrt(2 h) z with the row's direction g: h is found first, then one launch."""
    table, stage = state.table, state.table.tableau.stages[number]
    x, rows = state.views[stage.sees], state.rows[number]
    output = _guided(state, output, guidance)
    if noise is None:
        assert seeds is not None
        noise = drawn_noise(x, seeds, _number(state, number))
    e, b, a, factor = table.increments[number].unbind(1)
    direction = _direction(state, number, output)
    # One axis more: samples may be numbers, and a batch may be empty.
    squares = [t[..., None].flatten(1).square().sum(1) for t in (direction, noise)]
    h, root = step_row(torch.stack(squares, 1), factor, stage.step).unbind(1)
    reads, _ = table.variants[number]
    head, (weights,) = row.head(rows), row.weights(rows, reads)
    slots = [1 + h * b, *weights.slots[1:]]
    found = row.columns(head, [row.Weights(h * e, h * a, root, slots)])
    stepped = torch.stack([column.expand(len(x)) for column in found], 1)
    state.routed["length of a Langevin step found by PyTorch"] += 1
    pointwise(state, number, output, None, None, noise, stepped)


def _number(state: State, number: int) -> Tensor:
    """The stage's number as the noise counts it, int32 [1] on the device."""
    return state.table.indices[number][row.STAGE : row.STAGE + 1]


def _guided(state: State, output: Tensor | None, guidance: Tensor | None) -> Tensor | None:
    """The output with its guidance applied, which these launches do not do."""
    if output is None or guidance is None:
        return output
    state.routed["guidance combined by PyTorch before a move"] += 1
    return rescaled_guidance(output, guidance, 0.0)


def _direction(state: State, number: int, output: Tensor | None) -> Tensor:
    """b x + e x0 + a F of a stage's increment, [B, ...]."""
    table = state.table
    x = state.views[table.tableau.stages[number].sees]
    e, b, a, _ = (per_sample(c, x) for c in table.increments[number].unbind(1))
    direction = b * x
    if output is not None:
        model = output.to(x.dtype)
        direction = direction + a * model
        if table.increments_sample:
            p, q, low, high, _ = (per_sample(c, x) for c in row.head(state.rows[number]))
            direction = direction + e * clamped(p * model + q * x, low, high)
    return direction
