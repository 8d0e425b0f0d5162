"""A tableau over a denoiser, ready to run: its tables on each device, and the loop in Python."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdiff.execution.run import Inputs, Run
from fastdiff.execution.table import StageTable, Table
from fastdiff.ops import SpectralGains
from fastdiff.preconditioning import Preconditioner
from fastdiff.tableau import Tableau

Denoiser = Callable[..., Tensor]
AfterStage = Callable[[int, list[Tensor]], None]
"""Called after each stage with its number, 1 .., and the slots."""


class Program:
    """What a sampler is, but for the arguments of its calls.

    Attributes:
        denoiser, tableau, preconditioner: what runs over what, through what.
        dtype: of the state and all solver arithmetic.
        dynamic_threshold: as of the sampler.
        routed: counts what did not go through the fused launch, by its reason.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tableau: Tableau,
        dtype: torch.dtype,
        dynamic_threshold: float | None = None,
        preconditioner: Preconditioner | None = None,
    ) -> None:
        self.denoiser, self.tableau, self.dtype = denoiser, tableau, dtype
        self.dynamic_threshold = dynamic_threshold
        self.preconditioner = Preconditioner() if preconditioner is None else preconditioner
        self.routed: Counter[str] = Counter()
        self._preconditioners: dict[torch.device, Preconditioner] = {}
        self._tables: dict[torch.device, Table] = {}
        self._stage_tables: dict[torch.device, StageTable] = {}

    def over(self, denoiser: Denoiser) -> Program:
        """The same over another denoiser; the uploaded tables are shared."""
        other = copy.copy(self)
        other.denoiser = denoiser
        return other

    def stepwise(
        self, inputs: Inputs, table: Table | None = None, after: AfterStage | None = None
    ) -> Tensor:
        """Run the loop; returns the slot that holds the result.

        table: None is the one on the noise's device.
        """
        run = self.run(inputs, table)
        for number, stage in enumerate(self.tableau.stages):
            run.launch(number, None if stage.time is None else run.evaluate(number))
            if number and after is not None:
                after(number, run.views)
        return run.views[self.tableau.result]

    def run(self, inputs: Inputs, table: Table | None = None) -> Run:
        """A run at its start."""
        if table is None:
            table = self.table(inputs.noise.device)
        dtype = self.network_dtype(inputs.noise)
        return Run(self.denoiser, inputs, table, dtype, self.dynamic_threshold, self.routed)

    @property
    def parameter(self) -> Tensor | None:
        """The first floating-point parameter of a denoiser that is a module."""
        if not isinstance(self.denoiser, nn.Module):
            return None
        return next((p for p in self.denoiser.parameters() if p.is_floating_point()), None)

    @property
    def network_device(self) -> torch.device:
        parameter = self.parameter
        return parameter.device if parameter is not None else torch.get_default_device()

    def network_dtype(self, noise: Tensor) -> torch.dtype:
        """What the denoiser is fed: its parameters' dtype; to a function half-precision noise's."""
        parameter = self.parameter
        if parameter is not None:
            return parameter.dtype
        return noise.dtype if noise.dtype in (torch.float16, torch.bfloat16) else self.dtype

    def gains(self, device: torch.device) -> SpectralGains | None:
        """The preconditioner's, on a device; one object for each."""
        if device not in self._preconditioners:
            self._preconditioners[device] = self.preconditioner.to(device)
        return self._preconditioners[device].gains

    def table(self, device: torch.device) -> Table:
        if device not in self._tables:
            self._tables[device] = self.new_table(device)
        return self._tables[device]

    def stage_table(self, device: torch.device) -> StageTable:
        """Raises NotCapturable where the stages differ in more than numbers."""
        if device not in self._stage_tables:
            self._stage_tables[device] = self.new_stage_table(device)
        return self._stage_tables[device]

    def new_table(self, device: torch.device) -> Table:
        return Table(self.tableau, self.dtype, device, self.gains(device))

    def new_stage_table(self, device: torch.device) -> StageTable:
        return StageTable(self.tableau, self.dtype, device, self.gains(device))
