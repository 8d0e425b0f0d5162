"""PDS's claims where the truth is known: `python -m bench.claims_pds`, then `--page`.

Gaussian fields whose power falls as frequency^-2, as natural images' does, with their exact scores.
All modes of one frequency behave alike, and the sampler's variances follow a recursion that the
tests hold the real sampler to (tests/test_preconditioned_sampling.py); so sizes up to 1024 px cost
seconds, and are exact. Langevin chains with acceptance (MALA) are run for real at the small sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.machine import cpu_model
from fastdiff.ops import SpectralGains, spectral_predictor
from fastdiff.preconditioned import power_law_masks

from .record import RESULTS, ROOT

JSON, PAGE = RESULTS / "claims-pds.json", ROOT / "docs" / "claims" / "pds.md"

SIZES = (64, 128, 256, 512, 1024)
# Two of the published settings: sigma_max, snr (LSUN 256 px; FFHQ 1024 px); sigma_min is 0.01.
SETTINGS = {"LSUN": (378.0, 0.075), "FFHQ": (1348.0, 0.15)}
SIGMA_MIN = 0.01
PUBLISHED_STEPS = (2000, 400, 200, 133, 100, 66)
ERRORS = (0.05, 0.02, 0.01)
MOST_STEPS = 6000  # an error that is not reached, and kept, within these is not reached
ALPHAS = ("plain", "5", "auto")

ACCEPTANCE = 0.574  # at which MALA moves farthest in many dimensions
MALA_SIZES = (32, 64)  # run for real; of the others the recursion without rejections
CHAINS = 16


class Field(NamedTuple):
    """A Gaussian field: its modes by kinds.

    power: the variance of a mode of each kind; gain: R there at alpha, as a function; weight: how
    many modes are of the kind, over all.
    """

    power: np.ndarray
    m: np.ndarray  # the published statistic over its maximum
    weight: np.ndarray

    def gain(self, alpha: str, steps: int, sigma_max: float) -> np.ndarray:
        """R at alpha "plain", "5" or "auto"."""
        if alpha == "plain":
            return np.ones_like(self.m)
        value = 5.0
        if alpha == "auto":  # as Preconditioner.from_statistics takes it
            root = math.sqrt(1 + math.log(sigma_max / SIGMA_MIN) / steps)
            order = np.argsort(self.m)
            share = np.cumsum(self.weight[order])
            median = self.m[order][np.searchsorted(share, 0.5)]
            value = root * (1 - median) / (root - 1)
        return value / (self.m + value - 1)


def field(size: int, kinds: int = 512) -> Field:
    """The power-law field of that size, its modes gathered into kinds of like frequency."""
    statistics = power_law_masks(1, size, size)
    log_power = statistics.log_power[0].numpy()
    power = np.expm1(log_power) / size**2
    inside = np.ones_like(power, dtype=bool)
    inside[0, 0] = False  # the mean is no part of the law
    m = (log_power / log_power.max())[inside]
    logs = np.log(power[inside])
    edges = np.linspace(logs.min(), logs.max(), kinds)
    which = np.clip(np.searchsorted(edges, logs), 0, kinds - 1)
    counts = np.bincount(which, minlength=kinds)
    there = counts > 0
    mean = lambda values: np.bincount(which, values, kinds)[there] / counts[there]
    return Field(np.exp(mean(logs)), mean(m), counts[there] / counts.sum())


# == The whole sampler =============================================================================


def sampled_variances(
    law: Field, r: np.ndarray, steps: int, sigma_max: float, snr: float
) -> np.ndarray:
    """The variances that predictor and corrector end with, one call each a step."""
    sigmas = np.append(np.geomspace(SIGMA_MIN, sigma_max, steps)[::-1], 0.0)
    d = r**2
    u = d * sigma_max**2
    total = (law.weight * d).sum()
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        v = law.power + sigma**2
        h = 2 * snr**2 * total / (law.weight * d**2 * u / v**2).sum()
        u = (1 - h * d / v) ** 2 * u + 2 * h * d
        g2 = sigma**2 - after**2
        u = (1 - g2 * d / v) ** 2 * u + (g2 * d if after else 0.0)
    return u


def spectrum_error(law: Field, u: np.ndarray) -> float:
    """RMS over the modes of log(variance / true variance)."""
    return float(np.sqrt((law.weight * np.log(u / law.power) ** 2).sum()))


def error_of(law: Field, alpha: str, sigma_max: float, snr: float) -> Callable[[int], float]:
    return lambda steps: spectrum_error(
        law, sampled_variances(law, law.gain(alpha, steps, sigma_max), steps, sigma_max, snr)
    )


def tried_steps() -> list[int]:
    """All numbers of steps up to 200, then every hundredth part of themselves."""
    steps = list(range(2, 201))
    while steps[-1] < MOST_STEPS:
        steps.append(min(MOST_STEPS, math.ceil(steps[-1] * 1.01)))
    return steps


def least_steps(errors: dict[int, float], allowed: float) -> int | None:
    """The least T with an error of at most that for it and for every larger T that was tried."""
    least = None
    for steps in sorted(errors, reverse=True):
        if errors[steps] > allowed:
            break
        least = steps
    return least


def sampler_rows(sizes: tuple[int, ...] = SIZES) -> Iterator[dict[str, Any]]:
    for size in sizes:
        law = field(size)
        for setting, (sigma_max, snr) in SETTINGS.items():
            for alpha in ALPHAS:
                error = error_of(law, alpha, sigma_max, snr)
                errors = {steps: error(steps) for steps in tried_steps()}
                errors |= {steps: error(steps) for steps in PUBLISHED_STEPS}
                yield {
                    "size": size, "setting": setting, "alpha": alpha,
                    "errors": {str(steps): errors[steps] for steps in PUBLISHED_STEPS},
                    "least": {str(e): least_steps(errors, e) for e in ERRORS},
                }  # fmt: skip


# == Langevin with acceptance ======================================================================

PRECONDITIONERS = ("plain", "published", "D = Sigma")


def operator(law_power: np.ndarray, name: str, m: np.ndarray) -> np.ndarray:
    """D on the modes."""
    if name == "plain":
        return np.ones_like(law_power)
    if name == "published":
        return (5.0 / (m + 4.0)) ** 2
    return law_power / law_power.max()


def log_acceptance(power: np.ndarray, d: np.ndarray, h: float, x: np.ndarray, z: np.ndarray):
    """log of MALA's acceptance for proposals from x, all modes: [...]; and the proposals."""
    y = x - h * d * x / power + np.sqrt(2 * h * d) * z
    back = x - y + h * d * y / power
    forth = y - x + h * d * x / power
    change = -0.5 * (y**2 - x**2) / power - (back**2 - forth**2) / (4 * h * d)
    return change.sum(-1), y


def step_size(power: np.ndarray, weight: np.ndarray, d: np.ndarray, modes: int) -> float:
    """The h at which a stationary chain of that many modes accepts as it should.

    The sum over modes is normal in many dimensions: acceptance 2 Phi(-s / 2) for a variance of s^2,
    which is 2 sum q^3 (1 + q) / 4 ... of q = h d / power; computed from draws instead.
    """
    random = np.random.default_rng(0)
    draws = 512
    x = np.sqrt(power) * random.standard_normal((draws, len(power)))
    z = random.standard_normal((draws, len(power)))

    def acceptance(h: float) -> float:
        y = x - h * d * x / power + np.sqrt(2 * h * d) * z
        back, forth = x - y + h * d * y / power, y - x + h * d * x / power
        each = -0.5 * (y**2 - x**2) / power - (back**2 - forth**2) / (4 * h * d)
        mean, variance = each.mean(0), each.var(0)
        total, spread = modes * (weight * mean).sum(), modes * (weight * variance).sum()
        deviates = total + math.sqrt(spread) * random_normals
        return float(np.minimum(1.0, np.exp(np.minimum(deviates, 0.0))).mean())

    random_normals = np.random.default_rng(1).standard_normal(20_000)
    low, high = 1e-12, 2.0 * float((power / d).min())
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if acceptance(middle) > ACCEPTANCE else (low, middle)
    return math.sqrt(low * high)


def chain_iterations(law: Field, d: np.ndarray, h: float, allowed: float, share: float) -> int:
    """Iterations from variance zero to a spectrum error, every move taken with that probability."""
    rate = h * d / law.power
    limit = law.power / (1 - rate / 2)  # of the chain without rejections

    def error(n: float) -> float:
        moved = np.exp(2 * n * share * np.log1p(-rate)) if (rate < 1).all() else 0 * rate
        return float(np.sqrt((law.weight * np.log(limit * (1 - moved) / law.power) ** 2).sum()))

    low, high = 1, 2
    while error(high) > allowed:
        high *= 2
        if high > 1 << 50:
            return -1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= allowed else (middle + 1, high)
    return low


def run_mala(size: int, name: str, h: float, allowed: float, most: int) -> dict[str, Any]:
    """Chains of images through the op, with acceptance by the exact density."""
    statistics = power_law_masks(1, size, size)
    log_power = statistics.log_power[0]
    power = log_power.expm1() / size**2
    power[0, 0] = power[0, 1]
    m = (log_power / log_power.max()).numpy()
    d = torch.from_numpy(operator(power.numpy(), name, m))
    gains = SpectralGains(d.sqrt()[None])
    row = torch.tensor([[h, math.sqrt(2 * h)]], dtype=torch.float64)
    x, seeds = torch.zeros(CHAINS, 1, size, size, dtype=torch.float64), torch.arange(CHAINS)
    random = torch.Generator().manual_seed(0)
    taken, recent, history = 0.0, [], None

    def spectrum(image: torch.Tensor) -> torch.Tensor:
        return torch.fft.fft2(image, norm="ortho")

    x_hat = spectrum(x)
    for n in range(1, most + 1):
        score = torch.fft.ifft2(-x_hat / power, norm="ortho").real
        y = spectral_predictor(x, score, gains, row, seeds, n)
        y_hat = spectrum(y)
        back = (x_hat - y_hat + h * d * y_hat / power).abs().square()
        forth = (y_hat - x_hat + h * d * x_hat / power).abs().square()
        change = -0.5 * (y_hat.abs().square() - x_hat.abs().square()) / power
        change = (change - (back - forth) / (4 * h * d)).flatten(1).sum(1)
        accepted = torch.rand(CHAINS, generator=random, dtype=torch.float64).log() < change
        keep = accepted[:, None, None, None]
        x, x_hat = torch.where(keep, y, x), torch.where(keep, y_hat, x_hat)
        taken += float(accepted.double().mean())
        if n % max(most // 50, 1) == 0:
            recent.append((n, binned_error(x_hat.abs().square().mean((0, 1)), power)))
            if recent[-1][1] <= allowed and history is None:
                history = n
    return {"acceptance": taken / most, "iterations": history, "last_error": recent[-1][1],
            "run": most}  # fmt: skip


def binned_error(found: torch.Tensor, power: torch.Tensor) -> float:
    """RMS log ratio over 12 bands of frequency, where chance is averaged out."""
    size = len(power)
    frequencies = torch.fft.fftfreq(size, dtype=torch.float64)
    radius = torch.hypot(frequencies[:, None], frequencies[None])
    bands = torch.logspace(math.log10(1.5 / size), math.log10(0.5), 13, dtype=torch.float64)
    ratios = []
    for low, high in zip(bands[:-1], bands[1:], strict=True):
        inside = (radius >= low) & (radius < high)
        if bool(inside.any()):
            ratios.append(float((found[inside] / power[inside]).mean()))
    return float(np.sqrt(np.mean(np.log(ratios) ** 2)))


def langevin_rows(sizes: tuple[int, ...] = SIZES) -> Iterator[dict[str, Any]]:
    for size in sizes:
        law = field(size)
        condition = float(law.power.max() / law.power.min())
        for name in PRECONDITIONERS:
            d = operator(law.power, name, law.m)
            ratio = d / law.power
            h = step_size(law.power, law.weight, d, size * size - 1)
            row = {
                "size": size, "preconditioner": name, "condition": condition,
                "left": float(ratio.max() / ratio.min()), "h": h,
                "iterations": chain_iterations(law, d, h, 0.1, ACCEPTANCE),
            }  # fmt: skip
            if size <= MALA_SIZES[-1] and row["iterations"] > 0:
                row["run"] = run_mala(size, name, h, 0.1, min(3 * row["iterations"], 20_000))
            yield row


# == The page ======================================================================================


def measure() -> dict[str, Any]:
    start = time.time()
    rows = {"sampler": list(sampler_rows()), "langevin": list(langevin_rows())}
    return {"machine": cpu_model(), "torch": torch.__version__,
            "seconds": round(time.time() - start), **rows}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.claims_pds", description=__doc__)
    parser.add_argument("--page", action="store_true", help="write docs/claims/pds.md instead")
    options = parser.parse_args()
    if options.page:
        PAGE.write_text(page(json.loads(JSON.read_text())))
        return
    JSON.write_text(json.dumps(measure(), indent=1) + "\n")


def page(record: dict[str, Any]) -> str:
    raise NotImplementedError


if __name__ == "__main__":
    main()
