"""Problems whose converged solution is known: mixtures of Gaussians, and the digits model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fastdiff import NoiseSchedule, Sampler, Tableau, build_tableau
from fastdiff.models import load_digits, load_digits_reference
from fastdiff.ops import seeded_noise
from fastdiff.training.recipes.digits import CLEAN


@dataclass(frozen=True)
class Mixture:
    """A mixture of K Gaussians with axes of their own in D dimensions, float64.

    weights: [K]; means and stds: [K, D].
    """

    name: str
    weights: tuple[float, ...]
    means: tuple[tuple[float, ...], ...]
    stds: tuple[tuple[float, ...], ...]
    points: int = 256

    @cached_property
    def noise(self) -> Tensor:
        shape = (self.points, len(self.means[0]))
        return seeded_noise(range(self.points), shape, dtype=torch.float64)

    @cached_property
    def _numbers(self) -> tuple[Tensor, Tensor, Tensor]:
        weights, means, stds = (
            torch.tensor(v, dtype=torch.float64) for v in (self.weights, self.means, self.stds)
        )
        return weights.log(), means, stds**2

    def _shares(self, x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior of the component [B, K], distances and variances [B, K, D]."""
        log_weights, means, squares = self._numbers
        variance = alpha**2 * squares + sigma**2
        distance = x[:, None] - alpha * means
        log = log_weights - 0.5 * (variance.log() + distance**2 / variance).sum(-1)
        return log.softmax(1), distance, variance

    def epsilon(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """-sigma times the score of the mixture of N(alpha mean, alpha^2 std^2 + sigma^2)."""
        share, distance, variance = self._shares(x, alpha, sigma)
        return sigma * (share[..., None] * distance / variance).sum(1)

    def data(self, x: Tensor, alpha: float, sigma: float) -> Tensor:
        """The mean of x0 given x; nothing is divided by alpha or sigma."""
        share, distance, variance = self._shares(x, alpha, sigma)
        _, means, squares = self._numbers
        return (share[..., None] * (means + alpha * squares / variance * distance)).sum(1)

    def solve(self, schedule: NoiseSchedule, tableau: Tableau) -> Tensor:
        """[B, D] the samples of a tableau."""

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            time = float(t[0])
            return self.epsilon(x, schedule.alpha(time), schedule.sigma(time))

        return Sampler(denoiser, tableau=tableau, dtype=torch.float64)(self.noise)

    def converged(self, schedule: NoiseSchedule, start: float) -> Tensor:
        """[B, D]: the end of the flow that has the noises for its state at `start`.

        By scipy's DOP853 in the angle (alpha = cos, sigma = sin), where dx = v d(angle).
        """
        from scipy.integrate import solve_ivp

        def velocity(angle: float, flat: np.ndarray) -> np.ndarray:
            x, alpha, sigma = torch.from_numpy(flat).view_as(self.noise), *_circle(angle)
            v = alpha * self.epsilon(x, alpha, sigma) - sigma * self.data(x, alpha, sigma)
            return v.numpy().ravel()

        span = (math.atan2(schedule.sigma(start), schedule.alpha(start)), 0.0)
        flat = self.noise.numpy().ravel()
        done = solve_ivp(velocity, span, flat, method="DOP853", rtol=1e-10, atol=1e-12)
        return torch.from_numpy(done.y[:, -1]).view_as(self.noise)

    def moved(self, ends: Tensor, truth: Tensor) -> float:
        """Share of samples that belong to another component than the truth's."""
        ours, theirs = (self._shares(x, 1.0, 0.0)[0].argmax(1) for x in (ends, truth))
        return float((ours != theirs).double().mean())


def _circle(angle: float) -> tuple[float, float]:
    return math.cos(angle), math.sin(angle)


_WEIGHTS = (0.3, 0.25, 0.25, 0.2)
_MEANS = ((-0.9, 0.3, 0.1), (0.2, -0.8, 0.6), (0.7, 0.5, -0.5), (0.0, 0.9, 0.8))
MILD = Mixture(
    "mild mixture",
    _WEIGHTS,
    _MEANS,
    ((0.5, 0.4, 0.45), (0.4, 0.5, 0.4), (0.45, 0.4, 0.5), (0.5, 0.45, 0.4)),
)
STIFF = Mixture(
    "stiff mixture",
    _WEIGHTS,
    _MEANS,
    ((0.1, 0.05, 0.02), (0.05, 0.02, 0.1), (0.02, 0.1, 0.05), (0.1, 0.02, 0.05)),
)


@dataclass(frozen=True)
class Digits:
    """The committed digits model, float32, and the first of its 64 reference noises."""

    name: str = "digits"
    points: int = 64

    @cached_property
    def unet(self) -> torch.nn.Module:
        return load_digits()[0]

    @cached_property
    def reference(self) -> dict[str, Tensor]:
        return {key: value[: self.points] for key, value in load_digits_reference().items()}

    def solve(self, schedule: NoiseSchedule, tableau: Tableau) -> Tensor:
        sampler = Sampler(self.unet, tableau=tableau)
        return sampler(self.reference["noise"], labels=self.reference["labels"])

    def converged(self, schedule: NoiseSchedule, start: float) -> Tensor:
        """The committed one from the first time; from later ones by iPNDM on a fine grid."""
        if start == schedule.first:
            return self.reference["x0"]
        tableau = build_tableau("ipndm_v", schedule, spacing=fine_times(start))
        sampler = Sampler(self._widened, tableau=tableau, dtype=torch.float64)
        return sampler(self.reference["noise"].double(), labels=self.reference["labels"])

    def _widened(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The float32 network under float64 states: its rounding is all that is lost."""
        return self.unet(x.float(), t, labels).double()


def fine_times(start: float, body: int = 200, end: int = 16) -> list[float]:
    """A fine grid from `start`: denser towards time 0, then uniform in sigma to the clean image."""
    falling = start * np.linspace(1, 0, body + 1)[:-1] ** 1.5
    return [*falling, *(np.linspace(1, 0, end + 1) ** 2 + CLEAN)]
