"""Truths the tests compare with: closed-form problems and executors that share no code with ours.

Nothing here uses the tableau, the fused step, `Prediction` or the schedules' conversions: x0 and
epsilon come from solving their definitions, steps from the textbook's own formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from scipy.integrate import solve_ivp

from fastdiff import NoiseSchedule, Tableau, ops, solver_names
from fastdiff.solvers.registry import get_solver

Array = np.ndarray
Network = Callable[[Array, float], Array]  # (x [B, ...], the time it is told) -> F


# The solvers that draw noise, and those that only reproduce published slips or compare.
STOCHASTIC = tuple(name for name in solver_names() if get_solver(name).order is None)
CLASSICAL = ("classical_euler", "classical_heun", "classical_rk4", "fon")  # on dx/dt
COMPARISONS = (*CLASSICAL, "ipndm_v_published")
ODE_SOLVERS = tuple(n for n in solver_names() if n not in STOCHASTIC + COMPARISONS)


# == Problems ======================================================================================


@dataclass(frozen=True)
class Gaussian:
    """Data N(mean, std^2) in every coordinate: everything is a one-line formula."""

    mean: float = 0.3
    std: float = 0.5

    def epsilon(self, x: Any, alpha: Any, sigma: Any) -> Any:
        return sigma * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2)

    def flow(self, x: Any, start: tuple[Any, Any], end: tuple[Any, Any]) -> Any:
        """The probability-flow ODE from (alpha, sigma) to (alpha, sigma): quantiles are kept."""
        (a, s), (b, r) = start, end
        scale = ((b**2 * self.std**2 + r**2) / (a**2 * self.std**2 + s**2)) ** 0.5
        return b * self.mean + scale * (x - a * self.mean)


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians on the line (every coordinate by itself)."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def epsilon(self, x: Array, alpha: float, sigma: float) -> Array:
        """-sigma times the score of the mixture of N(alpha m, alpha^2 s^2 + sigma^2)."""
        x = np.asarray(x)[..., None]
        variance = alpha**2 * np.square(self.stds) + sigma**2
        distance = x - alpha * np.asarray(self.means)
        log = np.log(self.weights) - 0.5 * np.log(variance) - 0.5 * distance**2 / variance
        share = np.exp(log - log.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        return sigma * (share * distance / variance).sum(-1)

    def flow(self, x: Array, start: float, end: float) -> Array:
        """The variance-preserving ODE from angle to angle (alpha = cos, sigma = sin), to 1e-12.

        In the angle its right-hand side is v = alpha epsilon - sigma x0: nothing is divided.
        """

        def velocity(angle: float, x: Array) -> Array:
            alpha, sigma = np.cos(angle), np.sin(angle)
            epsilon = self.epsilon(x, alpha, sigma)
            return alpha * epsilon - sigma * (x - sigma * epsilon) / alpha

        solution = solve_ivp(velocity, (start, end), x, method="DOP853", rtol=3e-14, atol=1e-14)
        return solution.y[:, -1]


GAUSSIAN = Gaussian()
MILD = Mixture((0.3, 0.5, 0.2), (-1.0, 0.2, 1.1), (0.5, 0.4, 0.3))
STIFF = Mixture((0.3, 0.5, 0.2), (-1.0, 0.2, 1.1), (0.15, 0.12, 0.1))


# == Predictions ===================================================================================

# alpha x0 + sigma epsilon = x, and each kind of output as a combination of x0 and epsilon.
OUTPUT = {
    "epsilon": lambda a, s: (0, 1),
    "sample": lambda a, s: (1, 0),
    "v_prediction": lambda a, s: (-s, a),
    "flow": lambda a, s: (-1, 1),
    "score": lambda a, s: (0, -1 / s),
}


def express(kind: str, x0: Array, epsilon: Array, alpha: float, sigma: float) -> Array:
    """What a network that knows x0 and epsilon returns; "both" stacks them along axis 1."""
    if kind == "both":
        return np.concatenate([x0, epsilon], axis=1)
    c, d = OUTPUT[kind](alpha, sigma)
    return c * x0 + d * epsilon


def understand(
    kind: str, output: Array, x: Array, alpha: float, sigma: float
) -> tuple[Array, Array]:
    """(x0, epsilon) from a network's output, by solving the two equations that define them."""
    if kind == "both":
        first, second = np.split(output, 2, axis=1)
        power = alpha**2 + sigma**2
        x0 = (sigma**2 * first + alpha * (x - sigma * second)) / power
        return x0, (x - alpha * x0) / sigma
    c, d = OUTPUT[kind](alpha, sigma)
    determinant = alpha * d - sigma * c
    return (d * x - sigma * output) / determinant, (alpha * output - c * x) / determinant


# == Executors =====================================================================================


class NumericTrace:
    """A twin of `fastdiff.Trace` that computes with arrays, in extended precision by default.

    A solver runs on it as it runs on the symbols, and its result is what the tableau must give.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        times: Sequence[float],
        network: Network,
        noise: Array,
        *,
        solves_for: str,
        prediction: str = "epsilon",
        clip: tuple[float, float] | None = None,
        image: Array | None = None,
        stage_noise: Sequence[Array] = (),
        afs: bool = False,
        precision: type = np.longdouble,
    ) -> None:
        self.precision, self.afs = precision, afs
        self.schedule, self.times, self.network = schedule, [float(t) for t in times], network
        self.solves_for, self.prediction, self.clip = solves_for, prediction, clip
        self.stage_noise, self.calls = stage_noise, 0
        alpha, sigma = self.alpha(times[0]), self.sigma(times[0])
        noise = noise.astype(precision)
        if image is not None:
            self.x = alpha * image + sigma * noise
        else:
            preserving = abs(alpha**2 + sigma**2 - 1) < 1e-9
            self.x = noise if preserving else sigma * noise

    @property
    def intervals(self) -> Any:
        return pairwise(self.times)

    def alpha(self, t: float) -> Any:
        return self.precision(self.schedule.alpha(t))

    def sigma(self, t: float) -> Any:
        return self.precision(self.schedule.sigma(t))

    def half_logsnr(self, t: float) -> float:
        with np.errstate(divide="ignore"):
            return float(np.log(self.alpha(t) / self.sigma(t)))

    def is_clean(self, t: float) -> bool:
        return bool(self.sigma(t) == 0)

    def is_leap(self, t: float, u: float) -> bool:
        left = self.sigma(u) / self.alpha(u)
        return bool(self.sigma(t) / self.alpha(t) > left + 20 * max(left, 1))

    def net(self, x: Array, t: float) -> Array:
        self.calls += 1
        alpha, sigma = self.alpha(t), self.sigma(t)
        if self.afs:  # the first prediction is that of data N(0, 1), from Bayes' rule
            self.afs, x0 = False, alpha * x / (alpha**2 + sigma**2)
            self.raw = x0, (x - alpha * x0) / sigma
            return self.raw[self.solves_for == "epsilon"]
        told = self.schedule.time_scale * max(t, self.schedule.last)
        output = self.network(x, told)
        self.raw = x0, epsilon = understand(self.prediction, output, x, alpha, sigma)
        if self.clip is not None:
            x0 = np.clip(x0, *self.clip)
            epsilon = (x - alpha * x0) / sigma
        return epsilon if self.solves_for == "epsilon" else x0

    def unclipped(self) -> Array:
        return self.raw[self.solves_for == "epsilon"]

    def keep(self, x: Array) -> Array:
        return x

    def noise(self) -> Array:
        return self.stage_noise[self.calls] if len(self.stage_noise) else np.zeros_like(self.x)

    def langevin(self, x: Array, direction: Array, factor: Any, *, norms: str = "sample") -> Array:
        z = self.noise()
        sizes = [np.sqrt((v**2).reshape(len(x), -1).sum(1)) for v in (z, direction)]
        if norms == "batch":
            sizes = [size.mean() for size in sizes]
        h = np.reshape(factor * (sizes[0] / sizes[1]) ** 2, (-1, *(1 for _ in x.shape[1:])))
        return x + h * direction + np.sqrt(2 * h) * z

    def transfer(self, x: Array, d: Array, t: float, u: float) -> Array:
        """DDIM's step, written with x0 and epsilon both."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        if self.solves_for == "epsilon":
            x0, epsilon = (x - sigma * d) / alpha, d
        else:
            x0, epsilon = d, (x - alpha * d) / sigma
        return self.alpha(u) * x0 + self.sigma(u) * epsilon

    def expm1_step(self, t: float, u: float) -> Any:
        return (self.sigma(u) * self.alpha(t)) / (self.alpha(u) * self.sigma(t)) - 1


def textbook(
    solver: str,
    schedule: NoiseSchedule,
    times: Sequence[float],
    network: Network,
    noise: Array,
    *,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Array:
    """The result of a registered solver's function run on arrays, no tableau involved."""
    known = get_solver(solver)
    trace = NumericTrace(schedule, times, network, noise, solves_for=known.solves_for, **settings)
    return np.asarray(known.function(trace, **(options or {})))


def as_denoiser(network: Network) -> Callable[..., torch.Tensor]:
    """A network on arrays as a denoiser on tensors."""

    def denoiser(x: torch.Tensor, t: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(network(x.numpy(), float(t[0])), dtype=x.numpy().dtype))

    return denoiser


def run_rows(
    tableau: Tableau,
    network: Network,
    noise: Array,
    *,
    image: Array | None = None,
    stage_noise: Sequence[Array] = (),
    poison: bool = False,
) -> Array:
    """Run a tableau row by row through the public op, in float64; only inputs are set beforehand.

    `poison` overwrites with NaN, before every launch and at the end, each slot whose content the
    rest of the run does not ask for.
    """
    slots = ops.allocate_slots(tableau.slots, torch.from_numpy(noise))
    slots.fill_(np.nan)
    slots[0] = torch.from_numpy(noise)
    if image is not None:
        slots[1] = torch.from_numpy(image)
    for number, stage in enumerate(tableau.stages):
        if poison:
            slots[sorted(set(range(tableau.slots)) - _wanted(tableau, number))] = np.nan
        output = seen = None
        if stage.time is not None:
            seen = stage.input_scale * slots[stage.sees].numpy()
            output = torch.from_numpy(np.asarray(network(seen, float(stage.time)), np.float64))
            if tableau.blend is not None:
                first, second = output.chunk(2, dim=1)
                output = tableau.blend[number][0] * first + tableau.blend[number][1] * second
        row = torch.from_numpy(tableau.row(number))
        if stage.langevin is not None:
            row = _stepped(row, stage.langevin, slots[stage.sees], output, stage_noise[number])
        ops.multistep_step(
            slots,
            output,
            row,
            torch.from_numpy(tableau.index(number)),
            noise=torch.from_numpy(stage_noise[number]) if stage.is_stochastic else None,
            reads=tableau.read_width(number),
            writes=len(stage.writes),
        )
    return slots[tableau.result].numpy()


def _stepped(
    row: torch.Tensor, langevin: Any, x: torch.Tensor, output: torch.Tensor | None, z: Array
) -> torch.Tensor:
    """A Langevin step of the direction [p, q, low, high, c_in, of x0, of F, of z, of x]."""
    p, q, low, high, _, of_x0, of_f, _, of_x = row.T.view(9, -1, *(1 for _ in x.shape[1:]))
    model = torch.zeros_like(x) if output is None else output
    x0 = torch.minimum(torch.maximum(p * model + q * x, low), high)
    x0 = torch.where(of_x0 != 0, x0, 0)
    direction = of_x * x + of_x0 * x0 + of_f * model
    sizes = [v.reshape(len(x), -1).norm(dim=1) for v in (torch.from_numpy(z), direction)]
    if langevin.norms == "batch":
        sizes = [size.mean() for size in sizes]
    h = (
        torch.as_tensor(langevin.factor, dtype=torch.float64)
        * (sizes[0] / sizes[1]) ** 2
        * torch.ones(len(x))
    )
    new = row.expand(len(x), -1).clone()
    new[:, 5:7] *= h[:, None]
    new[:, 7] = (2 * h).sqrt()
    new[:, 8] = 1 + h * row[:, 8]
    return new


def _wanted(tableau: Tableau, number: int) -> set[int]:
    """The slots whose content, before the launch of a stage, matters to anything after."""
    wanted = {tableau.result}
    for stage in reversed(tableau.stages[number:]):
        wanted -= {w.slot for w in stage.writes}
        wanted |= {slot for w in stage.writes for slot, c in w.slots.items() if np.any(c)}
        if stage.time is not None or stage.langevin is not None:
            wanted.add(stage.sees)
    return wanted
