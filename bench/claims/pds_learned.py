"""PDS on a learned score: `python -m bench.claims.pds_learned`, then `bench.claims.pds --page`.

The committed photographs model samples 32 px crops with T noise levels, plain and preconditioned;
their spectrum and their distance to crops of the photographs say how good they are, and a picture.
"""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from torch import Tensor

from fastdiff import Preconditioner, Sampler, estimate_masks
from fastdiff.app.demo import draw_rows
from fastdiff.models.photographs import load_photographs
from fastdiff.training.recipes.photographs import crops, photographs

from ..files import RESULTS, ROOT, write_json
from .common import Row, machine
from .pds import ALPHAS, band_edges

JSON, PICTURE = RESULTS / "claims-pds-learned.json", ROOT / "docs" / "claims" / "pds-learned.png"
STEPS = (200, 100, 66, 50)
SNR = 0.16  # the published one of CIFAR-10, the data set of this size
IMAGES, REFERENCE, SHOWN = 128, 4096, 8


def spectrum(images: Tensor) -> np.ndarray:
    """Mean power of each band of frequency that has any, without the mean colour: [bands]."""
    size = images.shape[-1]
    power = torch.fft.fft2(images.double(), norm="ortho").abs().square().mean((0, 1)).numpy()
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    edges = band_edges(size)
    bands = [(radius >= low) & (radius < high) for low, high in zip(edges, edges[1:], strict=False)]
    return np.array([power[band].mean() for band in bands if band.any()])


def spectrum_error(images: Tensor, wanted: np.ndarray) -> float:
    """RMS over the bands of the log of the ratio."""
    return float(np.sqrt(np.mean(np.log(spectrum(images) / wanted) ** 2)))


def energy_distance(a: Tensor, b: Tensor) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of images pooled to 8 x 8, unbiased."""
    pool = lambda t: torch.nn.functional.avg_pool2d(t, t.shape[-1] // 8).flatten(1).double()
    x, y = pool(a), pool(b)
    apart = lambda t: torch.cdist(t, t).sum() / (len(t) * (len(t) - 1))
    return float(2 * torch.cdist(x, y).mean() - apart(x) - apart(y))


def interval(images: Tensor, reference: Tensor, draws: int = 200) -> list[float]:
    """Of the distance, 90 %, by drawing half of the images again and again."""
    random = np.random.default_rng(0)
    half = len(images) // 2
    found = [energy_distance(images[random.choice(len(images), half, replace=False)],
                             reference[random.choice(len(reference), 512, replace=False)])
             for _ in range(draws)]  # fmt: skip
    return [float(q) for q in np.quantile(found, (0.05, 0.95))]


def draw(shown: dict[tuple[int, str], Tensor]) -> None:
    """The first images of each T and alpha."""
    rows = [
        (f"T = {steps}, {alpha if alpha == 'plain' else f'alpha {alpha}'}", shown[steps, alpha])
        for steps in STEPS
        for alpha in ALPHAS
    ]
    draw_rows(rows, PICTURE, "predictor and corrector, the same noises")


def measure() -> Row:
    model, metadata = load_photographs()
    fit, _ = photographs()
    random = torch.Generator().manual_seed(1)
    reference = crops(fit, REFERENCE, 32, random)
    floor = crops(fit, IMAGES, 32, random)
    wanted, statistics = spectrum(reference), estimate_masks(reference, flip=True)
    start, rows, shown = time.time(), list[Row](), dict[tuple[int, str], Tensor]()
    for alpha in ALPHAS:
        for steps in STEPS:
            value = {"plain": math.inf, "5": 5.0, "auto": "auto"}[alpha]
            made = Preconditioner.from_statistics(
                statistics, alpha=value, steps=steps, sigma_min=model.sigma_min,
                sigma_max=model.sigma_max,
            )  # fmt: skip
            sampler = Sampler(model, model.schedule, solver="predictor_corrector", steps=steps,
                              snr=SNR, preconditioner=made)  # fmt: skip
            images = sampler(seeds=list(range(IMAGES)), shape=(3, 32, 32))
            shown[steps, alpha] = images[:SHOWN].clamp(0, 1)
            rows.append({
                "alpha": alpha, "steps": steps, "spectrum": spectrum_error(images, wanted),
                "distance": energy_distance(images, reference),
                "interval": interval(images, reference),
            })  # fmt: skip
            print(rows[-1], flush=True)
    draw(shown)
    return {
        **machine(), "model": metadata["command"],
        "seconds": round(time.time() - start), "images": IMAGES, "rows": rows,
        "floor": {"spectrum": spectrum_error(floor, wanted),
                  "distance": energy_distance(floor, reference),
                  "interval": interval(floor, reference)},
    }  # fmt: skip


if __name__ == "__main__":
    write_json(JSON, measure())
