"""The state of one run: its slots, and the launch that follows each evaluation."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from fastdiff.execution.table import Table
from fastdiff.ops import SpectralGains, allocate_slots, row, spectral_filter
from fastdiff.ops.layout import dense, memory_format, per_sample


class Stepper:
    """Slots [B, ...] that a tableau's rows change in place; it knows no network.

    Attributes:
        table: the tableau's numbers on this device.
        rows: what each launch is told [1 or B, K]: the table's, which something else than the host
            may replace or fill while the run is under way.
        slots: [S, B, ...]; views: each of them.
        network_input: [B or 2B, ...], what the network is shown next, written by each launch; None:
            it is shown the slot itself.
        routed: counts what does not go through the fused launch, by its reason.
    """

    def __init__(self, table: Table, noise: Tensor, routed: Counter[str]) -> None:
        tableau = table.tableau
        if tableau.samples not in (None, noise.shape[0]):
            raise ValueError(
                f"noise must have the {tableau.samples} samples the tableau has "
                f"rows for; got {noise.shape[0]}"
            )
        self.table, self.rows, self.routed = table, table.rows, routed
        self.noise = dense(noise).to(table.dtype)
        self.slots = allocate_slots(tableau.slots, self.noise)
        self.views = list(self.slots.unbind(0))
        self.views[0].copy_(
            self.noise if table.gains is None else _coloured(self.noise, table.gains)
        )
        self.network_input: Tensor | None = None

    def allocate_input(self, dtype: torch.dtype, copies: int) -> None:
        """A network input of its own, where the network is not shown the slots themselves."""
        if dtype != self.table.dtype or copies > 1 or self.table.scales_input:
            shape = (copies * len(self.noise), *self.noise.shape[1:])
            self.network_input = torch.empty(
                shape,
                dtype=dtype,
                device=self.noise.device,
                memory_format=memory_format(self.noise),
            )

    def launch(
        self,
        number: int,
        output: Tensor | None,
        guidance: Tensor | None = None,
        seeds: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> None:
        """A stage's change of the state; the arguments are those of `multistep_step`."""
        table = self.table
        if not (table.identity[number] and self.network_input is None):
            table.apply[number](self, number, output, guidance, seeds, noise)

    def show(self, number: int) -> None:
        """Write the network input from the state after a stage, where no launch did."""
        if self.network_input is not None:
            state = self.views[self.table.tableau.stages[number].writes[0].slot]
            shown = per_sample(row.head(self.rows[number]).input_scale, state) * state
            copies = len(self.network_input) // max(len(state), 1)
            self.network_input.copy_(shown.repeat(copies, *(1 for _ in state.shape[1:])))


def _coloured(noise: Tensor, gains: SpectralGains) -> Tensor:
    """M z: the noise that a preconditioned run begins with."""
    fits = noise.ndim == 4 and gains.channels in (1, noise.shape[1])
    if not fits or noise.shape[2:] != gains.size:
        raise ValueError(
            f"noise must be [B, {gains.channels}, {gains.size[0]}, {gains.size[1]}], which the "
            f"preconditioner is for; got {tuple(noise.shape)}"
        )
    z = noise if gains.pixel is None else gains.pixel.to(noise.dtype) * noise
    return spectral_filter(z, gains.gain)
