"""diffusers pipelines with fused scheduler steps, and with this package's solvers.

`accelerate_pipeline(pipe)` puts the fused twin of the pipeline's own scheduler in its place: the
same calls, the same generator, the same images to rounding. With `solver=` another method samples:
a `TableauScheduler`. Nothing else of the pipeline is touched, so callbacks, interrupts, previews
and adapters work as before. `restore(pipe)` puts the stock scheduler back.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, DiffusionPipeline, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.capture import captures
from fastdiff.integrations.diffusers import schedulers
from fastdiff.integrations.diffusers.captured_pipelines import CapturedLoop, captured_class
from fastdiff.integrations.diffusers.score_sde import PreconditionedScoreSdeVe
from fastdiff.ops import allocate_slots, multistep_step_unchecked
from fastdiff.preconditioning import Preconditioner
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import build_tableau
from fastdiff.tableau import Tableau

STOCK = "_fastdiff_stock_scheduler"  # the attribute that holds what restore() puts back
TWINS = {
    name: value
    for name, value in vars(schedulers).items()
    if isinstance(value, type) and issubclass(value, SchedulerMixin)
}


def accelerate_pipeline(
    pipe: Any,
    *,
    solver: str | None = None,
    capture: str = "auto",
    preconditioner: Preconditioner | None = None,
) -> Any:
    """Give a diffusers pipeline fused steps; returns the same pipeline.

    Args:
        pipe: a pipeline with a `scheduler` of one of the classes in schedulers.py.
        solver: None keeps the method (and its results); else a name of `fastdiff.solver_names()`.
        capture: as of `fastdiff.Sampler`; for DDPM, DDIM, PNDM and Stable Diffusion pipelines,
            where nothing needs the middle of the loop.
        preconditioner: for a pipeline with a ScoreSdeVeScheduler: what its steps pass through.

    Raises:
        TypeError: not a diffusers pipeline with a scheduler.
        ValueError: a scheduler that has no fused twin, or an unknown solver.
    """
    if not isinstance(pipe, DiffusionPipeline) or not hasattr(pipe, "scheduler"):
        raise TypeError(
            f"pipe must be a diffusers pipeline with a scheduler; got {type(pipe).__name__}"
        )
    stock = getattr(pipe, STOCK, pipe.scheduler)
    if preconditioner is not None:
        if solver is not None:
            raise ValueError("solver must be left out with preconditioner=, which keeps the method")
        scheduler = PreconditionedScoreSdeVe.of(stock, preconditioner)
    elif solver is not None:
        scheduler = TableauScheduler.of(stock, solver)
    else:
        name = type(stock).__name__
        if name not in TWINS:
            raise ValueError(
                f"pipe.scheduler must be one of {', '.join(sorted(TWINS))} (or give solver=); "
                f"got {name}"
            )
        scheduler = TWINS[name].of(stock)
    captures(capture, torch.device("cpu"))  # names a mode that is none
    vars(pipe)[STOCK] = stock
    pipe.scheduler = scheduler
    kind = captured_class(type(pipe))
    if kind is not None:
        pipe.__class__ = kind
    if isinstance(pipe, CapturedLoop):
        vars(pipe)["fastdiff_capture"] = capture
    return pipe


def restore(pipe: Any) -> Any:
    """Put back the scheduler that `accelerate` replaced; returns the same pipeline.

    Raises ValueError for a pipeline that was not accelerated.
    """
    if STOCK not in vars(pipe):
        raise ValueError(f"pipe must be one that accelerate() was given; got {type(pipe).__name__}")
    pipe.scheduler = vars(pipe).pop(STOCK)
    if isinstance(pipe, CapturedLoop):
        pipe.__class__ = pipe.stock_class
        del vars(pipe)["fastdiff_capture"]
    return pipe


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
        self._slots: Tensor | None = None
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
            raise ValueError(f"eta must be 0 and use_clipped_model_output off; got {eta} and "
                             f"{use_clipped_model_output}")  # fmt: skip
        if self._tableau is None:
            raise ValueError("call set_timesteps() before step()")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output must have the sample's shape {tuple(sample.shape)}; "
                f"got {tuple(model_output.shape)}"
            )
        if self._index is None:
            self._start(sample)
        assert self._index is not None and self._slots is not None
        if self._index >= len(self._run.stages) - 1:
            raise ValueError(f"the run of {self._run.nfe} calls is over; call set_timesteps()")
        self._index += 1
        number, stage = self._index, self._run.stages[self._index]
        # Of inference tensors it is not known whether they were changed.
        known = sample is self._given and not sample.is_inference()
        if not known or sample._version != self._version:
            self._slots[stage.sees].copy_(sample)
        noise = None
        if stage.is_stochastic:
            noise = randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=model_output.dtype
            ).to(self._slots.dtype)
        result = torch.empty_like(self._slots[0], dtype=sample.dtype)
        row, index = self._rows[number]
        multistep_step_unchecked(
            self._slots, model_output.contiguous(), row, index, None, None, noise, result,
            self._run.read_width(number), len(stage.writes),
        )  # fmt: skip
        self._given = result
        self._version = 0 if result.is_inference() else result._version
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    # -- a run ------------------------------------------------------------------------------------

    def _begin(self, first: int | None = None) -> None:
        self._first, self._index = first, None
        self._slots = self._given = None

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
        self._run = self._known[run]
        self._slots = allocate_slots(self._run.slots, sample.contiguous())
        place = *run, self._slots.device, self._slots.dtype
        if place not in self._known:
            self._known[place] = [
                (
                    torch.from_numpy(self._run.row(n)).to(self._slots),
                    torch.from_numpy(self._run.index(n)).to(sample.device),
                )
                for n in range(len(self._run.stages))
            ]
        self._rows = self._known[place]
        self._index = 0

    def _from_later(self, tableau: Tableau) -> Tableau:
        run = self._build(times=list(tableau.times[self._first :]))
        if self._calls(run) != self._calls(tableau)[self._first :]:
            raise ValueError(
                "image to image through a pipeline needs a solver with one call a step (ddim, "
                f"ipndm, dpmpp_2m, unipc, ...); got {self.config.solver}"
            )
        return run
