"""Noise schedules in float64, x_t = alpha(t) x_0 + sigma(t) epsilon, and the times of a sampler.

Everything the solvers need is a function of log alpha and log sigma, which stay accurate at both
ends where alpha or sigma vanish. All functions take a Python number, a float64 array or a torch
tensor and return the same kind, so one formula serves the host's tables, rows filled on the device
and training.

Times are what the network was trained on: the integers 0 .. T-1 for beta schedules (time -1 is the
clean image; half-integers interpolate log alpha-bar), t in [0, 1] for the cosine log-SNR and the
flow, and sigma itself for the variance-exploding schedules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch

from fastdiff.frameworks import first_answer
from fastdiff.schedule import grids

Array = Any  # a float, a float64 numpy array or a torch tensor
Spacing = Literal["leading", "trailing", "linspace", "quadratic", "karras", "logsnr"]
Convention = Literal["aligned", "published", "offset"]

SPACINGS: tuple[str, ...] = ("leading", "trailing", "linspace", "quadratic", "karras", "logsnr")
CONVENTIONS: tuple[str, ...] = ("aligned", "published", "offset")

# alpha-bar is held above this, so that a schedule with zero terminal SNR keeps finite tables: the
# conversions are composed in float64, which absorbs factors of 1 / alpha = 1e6 (error 1e-10).
_ALPHA_BAR_FLOOR = 1e-12


def namespace(value: Array) -> Any:
    """The array namespace of a value: torch for tensors, numpy for everything else."""
    return torch if isinstance(value, torch.Tensor) else np


def wide(t: Array) -> Array:
    """Times in float64: a tensor for a tensor, an array for anything else."""
    return t.double() if isinstance(t, torch.Tensor) else np.asarray(t, dtype=np.float64)


def plain(value: Array) -> Array:
    """A 0-dimensional numpy result as a Python float; anything else unchanged."""
    return float(value) if isinstance(value, np.generic | np.ndarray) and value.ndim == 0 else value


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule; made by the class methods `linear_beta`, `cosine`, `edm`, `flow`, ...

    Attributes:
        name: how the schedule was made; appears in printed tableaux.
        first: the noisiest time, where sampling starts by default.
        last: the least noisy time the network was trained on.
        clean: the time at which sigma is zero, where the sampling loop ends; None where the
            schedule never gets there, and the loop ends at `last`.
        spacing: the spacing of time steps used when none is asked for.
        time_scale: what the network is given is `time_scale * t`.
    """

    name: str
    first: float
    last: float
    clean: float | None
    spacing: str

    time_scale: float = 1.0

    _grid = staticmethod(grids.continuous)  # what spaces the times of this kind of schedule

    # -- what a schedule is: these two functions of time ------------------------------------------

    def log_alpha(self, t: Array) -> Array:
        """log alpha(t), any shape."""
        raise NotImplementedError

    def log_sigma(self, t: Array) -> Array:
        """log sigma(t), any shape; -inf at the clean time."""
        raise NotImplementedError

    def time(self, logsnr: Array) -> Array:
        """The time at which `logsnr(t)` has the given value (the inverse of `logsnr`)."""
        raise NotImplementedError

    # -- what follows from them -------------------------------------------------------------------

    def alpha(self, t: Array) -> Array:
        """The signal's factor at time t, float64, the shape of t."""
        log = self.log_alpha(t)
        return plain(namespace(log).exp(log))

    def sigma(self, t: Array) -> Array:
        """The noise's standard deviation at time t, float64, the shape of t."""
        log = self.log_sigma(t)
        return plain(namespace(log).exp(log))

    def logsnr(self, t: Array) -> Array:
        """log(alpha(t)^2 / sigma(t)^2), float64, the shape of t; +inf at the clean time."""
        return plain(2.0 * (self.log_alpha(t) - self.log_sigma(t)))

    def rates(self, t: float) -> tuple[float, float]:
        """The time derivatives of log alpha and log sigma at t, by automatic differentiation.

        On a beta schedule: the slopes towards more noise, exact where alpha-bar is interpolated.

        Raises:
            ValueError: there are none: convention "published" knows whole times only.
        """
        with torch.inference_mode(False), torch.enable_grad():
            time = torch.tensor(t, dtype=torch.float64, requires_grad=True)
            logs = self.log_alpha(time), self.log_sigma(time)
            if not logs[0].requires_grad:
                raise ValueError(f'{self.name} has no time derivatives in convention "published"')
            slopes = [torch.autograd.grad(log, time)[0] for log in logs]
        return float(slopes[0]), float(slopes[1])

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether alpha is zero at `first`, so that an epsilon-network says nothing there."""
        return bool(self.alpha(self.first) ** 2 <= 2 * _ALPHA_BAR_FLOOR)

    def prior_scale(self, t: float) -> float:
        """The standard deviation of the state from which sampling starts at time t.

        Unit-variance noise is multiplied by this: 1 where the schedule preserves variance, sigma(t)
        where the signal is drowned (VE, EDM, flow).
        """
        preserving = abs(self.alpha(t) ** 2 + self.sigma(t) ** 2 - 1.0) < 1e-9
        return 1.0 if preserving else self.sigma(t)

    # -- making one -------------------------------------------------------------------------------

    @classmethod
    def linear_beta(
        cls, beta_start: float = 1e-4, beta_end: float = 0.02, num_train_timesteps: int = 1000
    ) -> NoiseSchedule:
        """Betas linear in t (Ho et al. 2020)."""
        _check_betas(beta_start, beta_end, num_train_timesteps)
        betas = np.linspace(beta_start, beta_end, num_train_timesteps)
        return _from_betas("linear_beta", betas)

    @classmethod
    def scaled_linear_beta(
        cls, beta_start: float = 8.5e-4, beta_end: float = 0.012, num_train_timesteps: int = 1000
    ) -> NoiseSchedule:
        """Square roots of beta linear in t: latent diffusion's "linear", PNDM's "quad"."""
        _check_betas(beta_start, beta_end, num_train_timesteps)
        betas = np.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps) ** 2
        return _from_betas("scaled_linear_beta", betas)

    @classmethod
    def cosine(cls, num_train_timesteps: int = 1000, max_beta: float = 0.999) -> NoiseSchedule:
        """Betas of the squared-cosine alpha-bar (Nichol & Dhariwal 2021), clipped at `max_beta`."""
        _check_timesteps(num_train_timesteps)
        u = np.arange(num_train_timesteps + 1) / num_train_timesteps
        bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
        return _from_betas("cosine", np.minimum(1 - bar[1:] / bar[:-1], max_beta))

    @classmethod
    def from_betas(cls, betas: Sequence[float] | Array) -> NoiseSchedule:
        """From beta at times 0 .. T-1: a sequence or array [T] in (0, 1)."""
        return _from_betas("trained_betas", np.asarray(betas, dtype=np.float64))

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Sequence[float] | Array) -> NoiseSchedule:
        """From alpha-bar at times 0 .. T-1: a sequence, array or tensor [T], decreasing, in [0, 1].

        A last value of 0 is a zero terminal SNR.
        """
        bar = torch.as_tensor(alphas_cumprod, dtype=torch.float64, device="cpu").numpy()
        if bar.ndim != 1 or len(bar) < 1:
            raise ValueError(f"alphas_cumprod must have shape [T], T >= 1; got {bar.shape}")
        if not (np.isfinite(bar).all() and (bar >= 0).all() and (bar < 1).all()):
            raise ValueError("alphas_cumprod must be finite and in [0, 1)")
        if not (np.diff(bar) < 0).all():
            i = int(np.argmax(np.diff(bar) >= 0))
            raise ValueError(
                f"alphas_cumprod must decrease strictly; alphas_cumprod[{i}] = {bar[i]} and "
                f"alphas_cumprod[{i + 1}] = {bar[i + 1]}"
            )
        return _Discrete.from_log_bar("alphas_cumprod", np.log(np.maximum(bar, _ALPHA_BAR_FLOOR)))

    @classmethod
    def logsnr_cosine(cls, logsnr_min: float = -20.0, logsnr_max: float = 20.0) -> NoiseSchedule:
        """logsnr(t) = -2 log tan(a t + b), t in [0, 1], variance preserving (Salimans & Ho 2022).

        It ends at `logsnr_max`, not at a clean image.
        """
        if not logsnr_min < logsnr_max:
            raise ValueError(
                f"logsnr_min must be below logsnr_max; got {logsnr_min} and {logsnr_max}"
            )
        return _LogSNRCosine(
            "logsnr_cosine",
            1.0,
            0.0,
            None,
            "trailing",
            1.0,
            math.atan(math.exp(-logsnr_max / 2)),
            math.atan(math.exp(-logsnr_min / 2)),
        )

    @classmethod
    def ve(cls, sigma_min: float = 0.01, sigma_max: float = 50.0) -> NoiseSchedule:
        """Variance exploding (Song et al. 2021): alpha = 1, time is sigma, geometric steps."""
        _check_sigmas(sigma_min, sigma_max)
        return _VarianceExploding("ve", sigma_max, sigma_min, 0.0, "logsnr")

    @classmethod
    def edm(cls, sigma_min: float = 0.002, sigma_max: float = 80.0) -> NoiseSchedule:
        """Alpha = 1, time is sigma, steps uniform in sigma^(1/7) (Karras et al. 2022, eq. 5)."""
        _check_sigmas(sigma_min, sigma_max)
        return _VarianceExploding("edm", sigma_max, sigma_min, 0.0, "karras")

    @classmethod
    def vp(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> NoiseSchedule:
        """Variance preserving in t from 1 to 0, beta linear (Song et al. 2021, appendix B).

        alpha^2 = exp(-integral of beta), sigma^2 = 1 - alpha^2; the network is told 999 t.
        """
        _check_beta_range(beta_min, beta_max)
        return _LinearBetaSDE("vp", 1.0, 1e-3, 0.0, "linspace", 999.0, beta_min, beta_max)

    @classmethod
    def sub_vp(cls, beta_min: float = 0.1, beta_max: float = 20.0) -> NoiseSchedule:
        """As `vp` with less noise, sigma = 1 - alpha^2 (Song et al. 2021, appendix B)."""
        _check_beta_range(beta_min, beta_max)
        return _LinearBetaSDE(
            "sub_vp", 1.0, 1e-3, 0.0, "linspace", 999.0, beta_min, beta_max, less_noise=True
        )

    @classmethod
    def flow(cls, shift: float = 1.0) -> NoiseSchedule:
        """Rectified flow: alpha = 1 - t, sigma = t; time steps shifted to s t / (1 + (s - 1) t)."""
        if not (math.isfinite(shift) and shift > 0):
            raise ValueError(f"shift must be positive and finite; got {shift}")
        return _Flow("flow", 1.0, 0.001, 0.0, "trailing", 1.0, shift)

    @classmethod
    def from_diffusers(cls, scheduler: Any) -> NoiseSchedule:
        """From a diffusers scheduler (or its config): the same noise levels, in float64.

        Betas are rebuilt from the configuration where it says how; otherwise the scheduler's own
        float32 `alphas_cumprod` is taken. The scheduler's spacing becomes the default spacing.
        """
        found = first_answer(lambda framework: framework.schedule(scheduler))
        if found is None:
            raise TypeError(
                f"scheduler must be a diffusers scheduler or its config; got {scheduler}"
            )
        return found

    # -- the times a sampler visits ---------------------------------------------------------------

    def times(
        self,
        steps: int | None = None,
        *,
        spacing: str | Sequence[float] | None = None,
        start: float | None = None,
        convention: str = "aligned",
    ) -> np.ndarray:
        """The nodes of `steps` intervals, from the noisiest time to the end: float64 [steps + 1].

        Args:
            steps: the number of intervals; exactly this many, except under "published".
            spacing: one of `SPACINGS`, or the times themselves, strictly towards less noise
                (`steps` may then be left out). "leading", "trailing" and "quadratic" give whole
                numbers on beta schedules. Default: the schedule's own.
            start: begin at this time, not the noisiest (image to image); not with "published".
            convention: "aligned" (time t is alpha-bar[t], ending at the clean image), "published"
                (the PNDM repository's: stride T // steps, so that there can be more steps than
                asked for) or "offset" (leading times offset by one, ending at alpha-bar[0]).

        Raises:
            ValueError: an unknown spacing or convention, fewer than 1 step, more steps than there
                are times, or times that do not move towards less noise.
        """
        if spacing is not None and not isinstance(spacing, str):
            return grids.given(self, steps, spacing)
        spacing = self.spacing if spacing is None else spacing
        if spacing not in SPACINGS:
            raise ValueError(
                f"spacing must be one of {', '.join(SPACINGS)}, or the times "
                f"themselves; got {spacing!r}"
            )
        if convention not in CONVENTIONS:
            raise ValueError(
                f"convention must be one of {', '.join(CONVENTIONS)}; got {convention!r}"
            )
        if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
            raise ValueError(f"steps must be a whole number >= 1; got {steps!r}")
        first = self.first if start is None else float(start)
        low = self.last if self.clean is None else self.clean
        if not low < first <= self.first:
            raise ValueError(f"start must be above {low} and at most {self.first}; got {start}")
        times = self._grid(self, int(steps), spacing, start, convention)
        if not (np.diff(times) < 0).all():
            raise ValueError(
                f"steps = {steps} leaves no room between times {first:g} and {low:g} at spacing "
                f"{spacing!r}"
            )
        return times

    def with_convention(self, convention: str) -> NoiseSchedule:
        """The schedule as a convention indexes it ("published" is one index noisier)."""
        if convention != "aligned":
            raise ValueError(
                f'convention {convention!r} is for beta schedules; {self.name} takes "aligned"'
            )
        return self


@dataclass(frozen=True)
class _Discrete(NoiseSchedule):
    """Beta schedules: log alpha-bar at times -1, 0 .. T-1, linear between them."""

    _grid = staticmethod(grids.whole)
    log_bar: tuple[float, ...] = ()
    # "published": time t reads entry t + 1 of alpha-bar, fractions cut off.
    published: bool = False

    @classmethod
    def from_log_bar(cls, name: str, log_bar: np.ndarray) -> _Discrete:
        return cls(
            name, float(len(log_bar) - 1), 0.0, -1.0, "leading", 1.0, (0.0, *map(float, log_bar))
        )

    @cached_property
    def _table(self) -> np.ndarray:
        return np.asarray(self.log_bar)

    def _log_bar(self, t: Array) -> Array:
        t = wide(t)
        if isinstance(t, torch.Tensor):
            position, last = t + 1, len(self.log_bar) - 1
            # clamp has no slope at its own bounds in torch 2.15, and `first` lies on one.
            within = (position >= 0) & (position <= last)
            position = torch.where(within, position, position.detach().clamp(0, last))
            on_device = torch.from_numpy(self._table).to(t.device)
            if self.published:
                return on_device[(t.trunc() + 2).clamp(0, len(on_device) - 1).long()]
            low = position.floor().clamp(max=max(len(on_device) - 2, 0)).long()
            return torch.lerp(on_device[low], on_device[low + 1], position - low)
        table = self._table
        if self.published:
            return table[np.clip(np.trunc(t).astype(int) + 2, 0, len(table) - 1)]
        return np.interp(t + 1, np.arange(len(table)), table)

    def log_alpha(self, t: Array) -> Array:
        return plain(0.5 * self._log_bar(t))

    def log_sigma(self, t: Array) -> Array:
        log_bar = self._log_bar(t)
        xp = namespace(log_bar)
        if xp is torch:
            return 0.5 * torch.log(-torch.expm1(log_bar))
        with np.errstate(divide="ignore"):
            return plain(0.5 * np.log(-np.expm1(log_bar)))

    def time(self, logsnr: Array) -> Array:
        # alpha-bar = sigmoid(logsnr); the table decreases, np.interp wants it increasing.
        log_bar = -np.logaddexp(0.0, -np.asarray(logsnr, dtype=np.float64))
        times = np.arange(len(self.log_bar), dtype=np.float64) - 1
        return plain(np.interp(log_bar, self._table[::-1], times[::-1]))

    def with_convention(self, convention: str) -> NoiseSchedule:
        return replace(self, published=True) if convention == "published" else self


@dataclass(frozen=True)
class _LogSNRCosine(NoiseSchedule):
    """alpha = cos(phi), sigma = sin(phi), phi linear in t."""

    phi_min: float = 0.0
    phi_max: float = 0.0

    def _phi(self, t: Array) -> Array:
        return self.phi_min + (self.phi_max - self.phi_min) * wide(t)

    def log_alpha(self, t: Array) -> Array:
        xp = namespace(t)
        return plain(xp.log(xp.cos(self._phi(t))))

    def log_sigma(self, t: Array) -> Array:
        xp = namespace(t)
        return plain(xp.log(xp.sin(self._phi(t))))

    def time(self, logsnr: Array) -> Array:
        phi = np.arctan(np.exp(-0.5 * np.asarray(logsnr)))
        return plain((phi - self.phi_min) / (self.phi_max - self.phi_min))


@dataclass(frozen=True)
class _VarianceExploding(NoiseSchedule):
    """alpha = 1 and time is sigma."""

    def log_alpha(self, t: Array) -> Array:
        return plain(wide(t) * 0.0)

    def log_sigma(self, t: Array) -> Array:
        t = wide(t)
        with np.errstate(divide="ignore"):
            return plain(namespace(t).log(t))

    def time(self, logsnr: Array) -> Array:
        return plain(np.exp(-0.5 * np.asarray(logsnr)))


@dataclass(frozen=True)
class _LinearBetaSDE(NoiseSchedule):
    """log alpha = -(beta_min t + (beta_max - beta_min) t^2 / 2) / 2."""

    beta_min: float = 0.0
    beta_max: float = 0.0
    less_noise: bool = False

    def log_alpha(self, t: Array) -> Array:
        t = wide(t)
        return plain(-0.25 * (self.beta_max - self.beta_min) * t * t - 0.5 * self.beta_min * t)

    def log_sigma(self, t: Array) -> Array:
        power = 2.0 * self.log_alpha(t)  # of alpha, its logarithm
        xp = namespace(power)
        with np.errstate(divide="ignore"):
            log = xp.log(-xp.expm1(power))
        return plain(log if self.less_noise else 0.5 * log)

    def time(self, logsnr: Array) -> Array:
        half = 0.5 * np.asarray(logsnr, dtype=np.float64)
        if self.less_noise:  # alpha / (1 - alpha^2) = e^half
            log_alpha = -np.arcsinh(np.exp(-half) / 2)
        else:
            log_alpha = -0.5 * np.logaddexp(0.0, -2 * half)
        slope = self.beta_max - self.beta_min
        root = np.sqrt(self.beta_min**2 - 4 * slope * log_alpha)
        return plain(-4 * log_alpha / (self.beta_min + root))

    def prior_scale(self, t: float) -> float:
        return 1.0


@dataclass(frozen=True)
class _Flow(NoiseSchedule):
    """alpha = 1 - t, sigma = t. Steps are spaced in unshifted time, then shifted."""

    _grid = staticmethod(grids.shifted)
    shift: float = 1.0

    def log_alpha(self, t: Array) -> Array:
        t = wide(t)
        with np.errstate(divide="ignore"):
            log = namespace(t).log1p(-t)
        return plain(log.clip(min=0.5 * math.log(_ALPHA_BAR_FLOOR)))

    def log_sigma(self, t: Array) -> Array:
        t = wide(t)
        with np.errstate(divide="ignore"):
            return plain(namespace(t).log(t))

    def time(self, logsnr: Array) -> Array:
        return plain(1 / (1 + np.exp(0.5 * np.asarray(logsnr))))


def _from_betas(name: str, betas: np.ndarray) -> NoiseSchedule:
    if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
        raise ValueError("betas must have shape [T] and lie in (0, 1)")
    # A sum of logarithms: alpha-bar to full relative accuracy however small it gets.
    return _Discrete.from_log_bar(name, np.cumsum(np.log1p(-betas)))


def _check_timesteps(num_train_timesteps: int) -> None:
    if isinstance(num_train_timesteps, bool) or not isinstance(num_train_timesteps, int):
        raise TypeError(f"num_train_timesteps must be an int; got {num_train_timesteps!r}")
    if num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be >= 1; got {num_train_timesteps}")


def _check_betas(beta_start: float, beta_end: float, num_train_timesteps: int) -> None:
    _check_timesteps(num_train_timesteps)
    if not 0 < beta_start <= beta_end < 1:
        raise ValueError(
            f"beta_start and beta_end must satisfy 0 < beta_start <= beta_end < 1; "
            f"got {beta_start} and {beta_end}"
        )


def _check_beta_range(beta_min: float, beta_max: float) -> None:
    if not 0 < beta_min <= beta_max < math.inf:
        raise ValueError(
            f"beta_min and beta_max must satisfy 0 < beta_min <= beta_max; got "
            f"{beta_min} and {beta_max}"
        )


def _check_sigmas(sigma_min: float, sigma_max: float) -> None:
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(
            f"sigma_min and sigma_max must satisfy 0 < sigma_min < sigma_max; "
            f"got {sigma_min} and {sigma_max}"
        )
