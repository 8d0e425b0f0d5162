"""diffusers' ScoreSdeVeScheduler through a preconditioner (Ma et al. 2022): fewer iterations.

    fastdiff.accelerate(pipe, preconditioner=p)
    pipe(num_inference_steps=100)

The same pipeline, generator and calls; drift, noise and the initial noise pass through D and M.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_sde_ve import SdeVeOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.ops import SpectralGains, spectral_langevin, spectral_predictor
from fastdiff.ops.common import wide_dtype
from fastdiff.preconditioning import Preconditioner


class PriorScale:
    """What a pipeline multiplies its unit noise by: sigma_max M. `noise * scale` colours it."""

    def __init__(self, sigma: float, preconditioner: Preconditioner) -> None:
        self.sigma, self.preconditioner = sigma, preconditioner

    def __float__(self) -> float:
        return self.sigma

    def __rmul__(self, noise: Tensor) -> Tensor:
        return self.sigma * self.preconditioner.to(noise.device).noise(noise)


class PreconditionedScoreSdeVe(diffusers.ScoreSdeVeScheduler):
    """The stock scheduler with a preconditioner; made by `fastdiff.accelerate`, or by `of`.

    Norms are means over the batch, as the stock corrector has them.
    """

    # The stock name: pipelines save a scheduler by it, and then load without this package.
    __module__ = diffusers.ScoreSdeVeScheduler.__module__
    preconditioner: Preconditioner
    config: Any
    timesteps: Any
    discrete_sigmas: Tensor
    init_noise_sigma: Any

    @classmethod
    def of(cls, stock: Any, preconditioner: Preconditioner) -> PreconditionedScoreSdeVe:
        """The twin of a stock scheduler, in its present state.

        Raises TypeError or ValueError for another scheduler and for what is no preconditioner.
        """
        if not isinstance(stock, diffusers.ScoreSdeVeScheduler):
            raise ValueError(
                f"preconditioner= needs a ScoreSdeVeScheduler; got {type(stock).__name__}"
            )
        if not isinstance(preconditioner, Preconditioner) or preconditioner.is_identity:
            raise TypeError(
                "preconditioner must be a fastdiff.Preconditioner with a gain; got "
                f"{preconditioner!r}"
            )
        twin = object.__new__(cls)
        vars(twin).update(vars(stock))
        twin.preconditioner = preconditioner
        twin.init_noise_sigma = PriorScale(float(vars(stock)["init_noise_sigma"]), preconditioner)
        return twin

    def describe(self, sample: Tensor) -> dict[str, Any]:
        """What runs on samples like this one."""
        moves = self._gains(sample).describe(sample)
        return {
            "scheduler": "ScoreSdeVeScheduler",
            "preconditioner": repr(self.preconditioner),
            "moves": moves,
        }

    def step_pred(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """x + G^2 D s + G M z and the same without noise; G^2 = sigma_i^2 - sigma_(i-1)^2."""
        if self.timesteps is None:
            raise ValueError("timesteps must be set: call set_timesteps first")
        # As the stock step reckons it, in float32.
        index = int(torch.as_tensor(timestep).cpu().float() * (len(self.timesteps) - 1))
        sigma = float(self.discrete_sigmas[index])
        power = sigma**2 - (float(self.discrete_sigmas[index - 1]) ** 2 if index else 0.0)
        row = sample.new_tensor([[power, 0.0]], dtype=wide_dtype(sample))
        noise = randn_tensor(
            sample.shape,
            layout=sample.layout,
            generator=generator,
            device=sample.device,
            dtype=sample.dtype,
        )
        gains = self._gains(sample)
        mean = spectral_predictor(sample, model_output, gains, row)
        coloured = self.preconditioner.to(sample.device).noise(noise)
        moved = mean + power**0.5 * coloured
        if not return_dict:
            return moved, mean
        return SdeVeOutput(prev_sample=moved, prev_sample_mean=mean)

    def step_correct(
        self,
        model_output: Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> Any:
        """A Langevin step through D and M with h = 2 (snr |M z| / |D s|)^2."""
        if self.timesteps is None:
            raise ValueError("timesteps must be set: call set_timesteps first")
        noise = randn_tensor(sample.shape, layout=sample.layout, generator=generator)
        row = sample.new_tensor([[1.0, 2 * self.config.snr**2]], dtype=wide_dtype(sample))
        moved = spectral_langevin(
            sample,
            model_output,
            self._gains(sample),
            row,
            noise=noise.to(sample.device),
            norms="batch",
        )
        return SchedulerOutput(prev_sample=moved) if return_dict else (moved,)

    def _gains(self, sample: Tensor) -> SpectralGains:
        self.preconditioner = self.preconditioner.to(sample.device)
        assert self.preconditioner.gains is not None
        return self.preconditioner.gains


PreconditionedScoreSdeVe.__name__ = "ScoreSdeVeScheduler"
