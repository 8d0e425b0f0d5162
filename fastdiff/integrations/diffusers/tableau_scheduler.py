"""This package's solvers behind diffusers' scheduler interface."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.execution.stepper import Stepper
from fastdiff.execution.table import Table
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build_tableau
from fastdiff.tableau import Tableau


class TableauScheduler(SchedulerMixin, ConfigMixin):
    """A solver of this package behind diffusers' scheduler interface: one launch a step.

    The states are kept in float32 between steps (float64 for float64 samples), whatever the
    pipeline's dtype; where the pipeline hands back another sample than the one it was given
    (a callback changed it), that one is taken.
    """

    config_name: Any = "scheduler_config.json"
    config: Any
    order = 1

    @register_to_config
    def __init__(
        self,
        solver: str = "ipndm",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        prediction_type: str = "epsilon",
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
    ) -> None:
        self.schedule = NoiseSchedule.from_diffusers(self)
        self.clip = (-clip_sample_range, clip_sample_range) if clip_sample else None
        self.timesteps = torch.arange(num_train_timesteps - 1, -1, -1)
        self.num_inference_steps: int | None = None
        self._tableau: Tableau | None = None
        self._known: dict[Any, Any] = {}  # tableaux, and their rows on devices
        self._index: int | None = None
        self._stepper: Stepper | None = None
        self._given: Tensor | None = None  # the sample that was returned last
        self._version = 0
        self._begin()

    @classmethod
    def of(cls, stock: Any, solver: str) -> TableauScheduler:
        """The noise levels, prediction, spacing and clipping of a stock scheduler."""
        if not hasattr(stock, "alphas_cumprod"):
            raise ValueError(
                "solver= needs a scheduler with betas (DDPM, DDIM, PNDM, DPMSolverMultistep, ...); "
                f"got {type(stock).__name__}"
            )
        if stock.config.get("thresholding"):
            raise ValueError("solver= does not know thresholding; use fastdiff.Sampler, which does")
        made = cls.from_config(
            {k: v for k, v in stock.config.items() if not k.startswith("_")}, solver=solver
        )
        made._build(2)  # an unknown solver or prediction is named now
        return made

    @property
    def init_noise_sigma(self) -> float:
        """What the pipeline multiplies unit noise by."""
        return float(self.schedule.prior_scale(self._times[0]))

    @property
    def step_index(self) -> int | None:
        return self._index

    @property
    def begin_index(self) -> int | None:
        return self._first

    @property
    def is_stochastic(self) -> bool:
        """Whether steps draw noise."""
        if "stochastic" not in self._known:
            self._known["stochastic"] = self._build(2).stochastic
        return self._known["stochastic"]

    def clone(self) -> TableauScheduler:
        """Another scheduler at the start of the same run; what was built is shared."""
        other = copy.copy(self)
        other._begin(self._first)
        return other

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where in `timesteps` the next run starts (image to image)."""
        self._begin(begin_index)

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    def set_timesteps(
        self, num_inference_steps: int, device: torch.device | str | None = None
    ) -> None:
        """Build the table of a run; `timesteps` has an entry for each network call."""
        if num_inference_steps not in self._known:
            self._known[num_inference_steps] = self._build(num_inference_steps)
        self._tableau = self._known[num_inference_steps]
        times = self._calls(self._tableau)
        whole = all(float(t).is_integer() for t in times)
        self.timesteps = torch.tensor(
            times, dtype=torch.int64 if whole else torch.float32, device=device
        )
        self.num_inference_steps = num_inference_steps
        self._begin()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample itself: with betas networks see the state as it is."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at the timesteps [B]."""
        times = timesteps.detach().cpu().double().numpy()

        def factor(values: np.ndarray) -> Tensor:
            shape = (-1, *(1,) * (original_samples.ndim - 1))
            return torch.as_tensor(values).to(original_samples).view(shape)

        alpha, sigma = factor(self.schedule.alpha(times)), factor(self.schedule.sigma(times))
        return alpha * original_samples + sigma * noise

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """One launch: the state after this network call, [B, ...] in the sample's dtype.

        Calls are counted: `timestep` is that of the next entry of `timesteps`. `eta` and
        `use_clipped_model_output` are there because pipelines pass them; they must be off.
        """
        if eta or use_clipped_model_output:
            raise ValueError(
                f"eta must be 0 and use_clipped_model_output off; got {eta} and "
                f"{use_clipped_model_output}"
            )
        if self._tableau is None:
            raise ValueError("call set_timesteps() before step()")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the sample's shape {tuple(sample.shape)}; "
                f"got {tuple(model_output.shape)}"
            )
        if self._stepper is None:
            self._start(sample)
        assert self._stepper is not None
        run, stepper = self._stepper.table.tableau, self._stepper
        if self._index is not None and self._index >= len(run.stages) - 1:
            raise ValueError(f"the run of {run.nfe} calls is over; call set_timesteps()")
        self._index = 1 if self._index is None else self._index + 1
        stage = run.stages[self._index]
        # Of inference tensors it is not known whether they were changed.
        known = sample is self._given and not sample.is_inference()
        if not known or sample._version != self._version:
            stepper.views[stage.sees].copy_(sample)
        noise = None
        if stage.is_stochastic:
            noise = randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype
            ).to(stepper.slots.dtype)
        result = stepper.network_input = torch.empty_like(stepper.views[0], dtype=sample.dtype)
        stepper.launch(self._index, model_output.contiguous(), noise=noise)
        self._given = result
        self._version = 0 if result.is_inference() else result._version
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    # -- a run ------------------------------------------------------------------------------------

    def _begin(self, first: int | None = None) -> None:
        self._first, self._index = first, None
        self._stepper = self._given = None

    def _build(self, steps: int | None = None, times: list[float] | None = None) -> Tableau:
        return build_tableau(
            self.config.solver,
            self.schedule,
            steps,
            spacing=times,
            prediction=self.config.prediction_type,
            clip=self.clip,
        )

    @staticmethod
    def _calls(tableau: Tableau) -> list[float]:
        return [float(stage.time) for stage in tableau.stages[1:] if stage.time is not None]

    @property
    def _times(self) -> tuple[float, ...]:
        return self._tableau.times if self._tableau else self._build(1).times

    def _start(self, sample: Tensor) -> None:
        """The run's table (from a later time: one that starts there) on the sample's device."""
        assert self._tableau is not None
        run = self.num_inference_steps, self._first or 0
        if run not in self._known:
            self._known[run] = self._from_later(self._tableau) if self._first else self._tableau
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        place = *run, sample.device, dtype
        if place not in self._known:
            self._known[place] = Table(self._known[run], dtype, sample.device)
        self._stepper = Stepper(self._known[place], sample.contiguous(), Counter())

    def _from_later(self, tableau: Tableau) -> Tableau:
        run = self._build(times=list(tableau.times[self._first :]))
        if self._calls(run) != self._calls(tableau)[self._first :]:
            raise ValueError(
                "image to image through a pipeline needs a solver with one call a step (ddim, "
                f"ipndm, dpmpp_2m, unipc, ...); got {self.config.solver}"
            )
        return run
