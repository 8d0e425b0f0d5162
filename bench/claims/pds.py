"""PDS's claims where the truth is known: `python -m bench.claims.pds`, then `--page`.

Gaussian fields whose power falls as frequency^-2, as natural images' does, with their exact scores.
All modes of one frequency behave alike, and the sampler's variances follow a recursion that
tests/execution/test_preconditioned_sampling.py holds the real sampler to; so sizes up to 1024 px
cost seconds, and are exact. The acceptance of Langevin chains (MALA) is measured by running them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from fastdiff.ops import SpectralGains, spectral_predictor
from fastdiff.preconditioning import power_law_masks

from ..files import RESULTS, ROOT, write_json, write_whole
from .common import Row, machine

JSON, PAGE = RESULTS / "claims-pds.json", ROOT / "docs" / "claims" / "pds.md"
LEARNED = RESULTS / "claims-pds-learned.json"  # of pds_learned.py

SIZES = (64, 128, 256, 512, 1024)
# Two of the published settings: sigma_max, snr (LSUN 256 px; FFHQ 1024 px); sigma_min is 0.01.
SETTINGS = {"LSUN": (378.0, 0.075), "FFHQ": (1348.0, 0.15)}
SIGMA_MIN = 0.01
PUBLISHED_STEPS = (2000, 400, 200, 133, 100, 66)
ERRORS = (0.05, 0.02, 0.01)
MOST_STEPS = 6000  # more are not tried
ALPHAS = ("plain", "5", "auto")

BANDS = 12
ACCEPTANCE = 0.574  # at which MALA moves farthest in many dimensions
MALA_ERROR = 0.1
MALA_SIZES = (32, 64, 128)  # where acceptance is measured by running
RUN = 200  # iterations of each chain
CHAINS = 16


class Field(NamedTuple):
    """A Gaussian field: its modes by kinds.

    power: the variance of a mode of each kind; m: the published statistic there over its maximum;
    weight: the share of modes that are of the kind; bands: [BANDS, kinds], the share of a band of
    frequency that each kind makes up.
    """

    power: np.ndarray
    m: np.ndarray
    weight: np.ndarray
    bands: np.ndarray

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
    power, weight = np.exp(mean(logs)), counts[there] / counts.sum()
    radius = (power / power.max()) ** -0.5 / size  # the largest power is at frequency 1 / size
    band = np.digitize(radius, band_edges(size)[1:-1])
    shares = np.stack([weight * (band == b) for b in range(BANDS)])
    shares = shares[shares.sum(1) > 0]
    return Field(power, mean(m), weight, shares / shares.sum(1, keepdims=True))


def band_edges(size: int) -> np.ndarray:
    """Of `BANDS` bands of equal width in log frequency, from one cycle an image to the corner."""
    return np.geomspace(0.9 / size, 0.72, BANDS + 1)


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
    """RMS over the bands of log(mean of variance / true variance)."""
    return float(np.sqrt(np.mean(np.log(law.bands @ (u / law.power)) ** 2)))


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


def sampler_rows(sizes: tuple[int, ...] = SIZES) -> Iterator[Row]:
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


def step_size(law: Field, d: np.ndarray, modes: int) -> float:
    """The h at which a stationary chain of that many modes accepts as it should.

    With q = h d / power a mode adds q (x^2 - y^2) / (4 power) to the logarithm of the acceptance:
    in law of mean -q^3 / 4 and variance q^3 / 2 + q^6 / 8. The sum s^2 of these variances over many
    modes makes the acceptance 2 Phi(-s / 2).
    """
    ratio = d / law.power

    def acceptance(h: float) -> float:
        cubes = (h * ratio) ** 3
        variance = modes * float((law.weight * (cubes / 2 + cubes**2 / 8)).sum())
        return math.erfc(math.sqrt(variance / 8))

    low, high = 1e-12, 2.0 / float(ratio.max())
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if acceptance(middle) > ACCEPTANCE else (low, middle)
    return low


def chain_iterations(law: Field, d: np.ndarray, h: float, allowed: float, share: float) -> int:
    """Iterations from variance zero to a spectrum error, every move taken with that probability."""
    rate = h * d / law.power
    limit = law.power / (1 - rate / 2)  # of the chain without rejections

    def error(n: float) -> float:
        moved = np.exp(2 * n * share * np.log1p(-rate)) if (rate < 1).all() else 0 * rate
        return spectrum_error(law, limit * (1 - moved))

    low, high = 1, 2
    while error(high) > allowed:
        high *= 2
        if high > 1 << 50:
            return -1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= allowed else (middle + 1, high)
    return low


def measured_acceptance(size: int, name: str, h: float) -> float:
    """Of chains of images through the op, begun in the field's own law, by its exact density."""
    statistics = power_law_masks(1, size, size)
    log_power = statistics.log_power[0]
    power = log_power.expm1() / size**2
    power[0, 0] = power[0, 1]
    m = (log_power / log_power.max()).numpy()
    d = torch.from_numpy(operator(power.numpy(), name, m))
    gains = SpectralGains(d.sqrt()[None])
    row = torch.tensor([[h, math.sqrt(2 * h)]], dtype=torch.float64)
    random, seeds = torch.Generator().manual_seed(0), torch.arange(CHAINS)
    white = torch.randn(CHAINS, 1, size, size, generator=random, dtype=torch.float64)
    x_hat = power.sqrt() * torch.fft.fft2(white, norm="ortho")
    taken = 0.0
    for n in range(RUN):
        x, score = (torch.fft.ifft2(f, norm="ortho").real for f in (x_hat, -x_hat / power))
        y_hat = torch.fft.fft2(spectral_predictor(x, score, gains, row, seeds, n), norm="ortho")
        back = (x_hat - y_hat + h * d * y_hat / power).abs().square()
        forth = (y_hat - x_hat + h * d * x_hat / power).abs().square()
        change = -0.5 * (y_hat.abs().square() - x_hat.abs().square()) / power
        change = (change - (back - forth) / (4 * h * d)).flatten(1).sum(1)
        accepted = torch.rand(CHAINS, generator=random, dtype=torch.float64).log() < change
        x_hat = torch.where(accepted[:, None, None, None], y_hat, x_hat)
        taken += float(accepted.double().mean())
    return taken / RUN


def langevin_rows(sizes: tuple[int, ...] = (32, *SIZES)) -> Iterator[Row]:
    for size in sizes:
        law = field(size)
        condition = float(law.power.max() / law.power.min())
        for name in PRECONDITIONERS:
            d = operator(law.power, name, law.m)
            ratio = d / law.power
            h = step_size(law, d, size * size - 1)
            row = {
                "size": size, "preconditioner": name, "condition": condition,
                "left": float(ratio.max() / ratio.min()), "h": h,
                "iterations": chain_iterations(law, d, h, MALA_ERROR, ACCEPTANCE),
            }  # fmt: skip
            if size in MALA_SIZES:
                row["acceptance"] = measured_acceptance(size, name, h)
            yield row


# == The run ======================================================================================


def measure() -> Row:
    start = time.time()
    rows = {"sampler": list(sampler_rows()), "langevin": list(langevin_rows())}
    return {**machine(), "seconds": round(time.time() - start), **rows}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.claims.pds", description=__doc__)
    parser.add_argument("--page", action="store_true", help="write docs/claims/pds.md instead")
    options = parser.parse_args()
    if options.page:
        from .pds_page import page

        write_whole(PAGE, page(*committed()))
    else:
        write_json(JSON, measure())


def committed() -> tuple[Row, Row]:
    """What this file measured, and what pds_learned.py did."""
    return json.loads(JSON.read_text()), json.loads(LEARNED.read_text())


if __name__ == "__main__":
    main()
