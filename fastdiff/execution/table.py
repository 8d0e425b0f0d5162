"""A tableau on a device: its numbers uploaded once, and what a loop asks of each stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.capture import NotCapturable
from fastdiff.execution.apply import Apply, applied_by
from fastdiff.ops import SpectralGains
from fastdiff.tableau import Tableau

LONGEST_PERIOD = 8  # recorded stages of a loop whose stages are of several kinds


class Table:
    """The numbers of a tableau on a device, stage by stage.

    Attributes:
        rows, indices: what each launch is told (`fastdiff.ops.row`).
        times: what the network is told, float64 [stages, 1 or B].
        increments: e, b, a, c of each stage [1 or B, 4] (`Tableau.increment`); None where nobody
            asks for them.
        rates: (alpha, sigma) after each stage, [1 or B] each.
        blend: for two-part outputs the factors of both parts, [1 or B] each; None otherwise.
        variants: reads and writes of each launch.
        apply: what makes each stage's change.
        buffers: all of these numbers; those of another table of this structure may be copied in.
        structure: everything that a recorded loop fixes of a table but for the numbers.

    Raises ValueError for gains where a stage is no increment.
    """

    def __init__(
        self,
        tableau: Tableau,
        dtype: torch.dtype,
        device: torch.device,
        gains: SpectralGains | None = None,
    ) -> None:
        self.tableau, self.dtype, self.gains = tableau, dtype, gains
        if gains is not None:
            tableau.require_increments()
        stages, numbers = tableau.stages, range(len(tableau.stages))
        self.buffers: list[Tensor] = []
        self.rows = self._upload([tableau.row(i) for i in numbers], dtype, device)
        self.indices = self._upload([tableau.index(i) for i in numbers], torch.int32, device)
        self.variants = [(tableau.read_width(i), len(stages[i].writes)) for i in numbers]
        self.apply: list[Apply] = [applied_by(i, stages[i], gains) for i in numbers]
        self.increments: list[Tensor] | None = None
        # Whether any stage has a factor of x0, of x: else its increment needs fewer operands.
        self.increments_sample, self.increments_state = False, False
        if gains is not None or any(stage.langevin is not None for stage in stages):
            found = [
                tableau.increment(i) if stages[i].is_increment else np.zeros((1, 4))
                for i in numbers
            ]
            self.increments = self._upload(found, dtype, device)
            self.increments_sample, self.increments_state = (
                any(bool(columns[:, column].any()) for columns in found[1:]) for column in (0, 1)
            )
        self.identity = [stage.is_identity for stage in stages]
        self.stochastic = [stage.is_stochastic for stage in stages]
        self.scales_input = any(np.any(np.asarray(s.input_scale) != 1) for s in stages)
        times = [0.0 if stage.time is None else stage.time for stage in stages]
        width = tableau.samples or 1
        self.times = torch.tensor(
            np.stack([np.broadcast_to(t, width) for t in times]), device=device
        )
        self.buffers.append(self.times)
        rates = [np.atleast_1d(c) for stage in stages for c in stage.rates]
        uploaded = iter(self._upload(rates, dtype, device))
        self.rates = list(zip(uploaded, uploaded, strict=True))
        self.blend: list[list[Tensor]] | None = None
        if tableau.blend is not None:
            self.blend = [
                self._upload([np.atleast_1d(c) for c in pair], dtype, device)
                for pair in tableau.blend
            ]
        self.structure: tuple[Any, ...] = (
            tuple(self.variants),
            tuple(self.identity),
            tuple(self.stochastic),
            self.scales_input,
            tuple((s.sees, s.writes[0].slot, s.time is None, s.step) for s in stages),
            *(gains, self.increments_sample, self.increments_state),
            *(tableau.slots, tableau.result, tableau.samples, tableau.from_image, tableau.clip),
            tuple(buffer.shape for buffer in self.buffers),
        )

    def _upload(
        self, arrays: list[np.ndarray], dtype: torch.dtype, device: torch.device
    ) -> list[Tensor]:
        """Views, in their shapes, of one buffer that holds all arrays."""
        flat = torch.from_numpy(np.concatenate([a.reshape(-1) for a in arrays])).to(device, dtype)
        self.buffers.append(flat)
        parts = flat.split([a.size for a in arrays])
        return [part.view(a.shape) for part, a in zip(parts, arrays, strict=True)]


class StageTable(Table):
    """The table of a tableau in which a stage can stand in the place of others.

    All launches are padded to the widest one, so that only numbers tell the stages apart; a
    recording of stage 1 then runs whatever stage is copied over it. Where kinds of stages take
    turns, as predictors and correctors do, stage 1 + j serves the stages j + `period`, ....

    Attributes:
        numbers: all numbers of each stage as one row of bytes: one copy brings them all.

    Raises:
        NotCapturable: a stage differs from the others in more than numbers; says in what.
    """

    def __init__(
        self,
        tableau: Tableau,
        dtype: torch.dtype,
        device: torch.device,
        gains: SpectralGains | None = None,
    ) -> None:
        stages = tableau.stages[1:]
        if any(stage.time is None for stage in stages) or not stages:
            raise NotCapturable("a stage has no evaluation")
        self.period = _period([stage.step for stage in stages])
        super().__init__(tableau.padded(), dtype, device, gains)
        count = len(tableau.stages)
        # Every launch writes the network's input, so none is left out.
        self.identity, self.scales_input = [False] * count, True
        self.stochastic = [tableau.stochastic] * count
        increments = [[part] for part in self.increments] if self.increments else [[]] * count
        blend = self.blend or [[]] * count
        parts = [
            [self.rows[i], self.indices[i], self.times[i], *increments[i], *blend[i]]
            for i in range(count)
        ]
        shapes = {tuple(part.shape for part in stage) for stage in parts}
        if len(shapes) > 1:
            raise NotCapturable("numbers of a stage are per sample, and those of others are not")
        self._pack(parts)
        self.structure = (
            *(self.variants[1], tableau.stochastic, self.tableau.slots),
            *(tableau.samples, tableau.from_image, self.blend is None),
            *(gains, self.increments_sample, self.increments_state),
            tuple(stage.step for stage in stages[: self.period]),
            *shapes,
        )

    def _pack(self, parts: list[list[Tensor]]) -> None:
        """Move the numbers of each stage into one row of bytes."""
        sizes = [-(-part.nbytes // 8) * 8 for part in parts[0]]
        width = -(-sum(sizes) // 64) * 64
        packed = torch.zeros((len(parts), width), dtype=torch.uint8, device=self.times.device)
        self.numbers = packed.unbind(0)
        moved = []
        for row, stage in zip(self.numbers, parts, strict=True):
            places, views = row.split([*sizes, width - sum(sizes)]), []
            for place, part in zip(places[:-1], stage, strict=True):
                views.append(place[: part.nbytes].view(part.dtype).view(part.shape).copy_(part))
            moved.append(views)
        self.rows, self.indices = [views[0] for views in moved], [views[1] for views in moved]
        start, length = sum(sizes[:2]), parts[0][2].nbytes
        self.times = packed[:, start : start + length].view(self.times.dtype)
        if self.increments is not None:
            self.increments = [views[3] for views in moved]
        if self.blend is not None:
            self.blend = [views[-2:] for views in moved]


def _period(kinds: Sequence[str]) -> int:
    """The least number after which the kinds repeat."""
    for period in range(1, LONGEST_PERIOD + 1):
        if all(kind == kinds[i - period] for i, kind in enumerate(kinds) if i >= period):
            return period
    raise NotCapturable(f"the kinds of its stages do not repeat within {LONGEST_PERIOD}")
