"""The digits model: a class-conditional denoiser of scikit-learn's 8x8 scanned digits, and its
classifier.

1,797 images, so memorising is the danger: dropout, averaged weights, and of all of them the ones
whose denoising loss is lowest on 360 images that training never sees. No augmentation: a shifted
digit is not in this data set, whose digits fill their box.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.files import read_tensors
from fastdiff.models.checkpoint import write_denoiser
from fastdiff.models.digits import DigitFeatures
from fastdiff.models.unet import UNet, UNetConfig
from fastdiff.schedule import NoiseSchedule
from fastdiff.training.denoising import parameter_count, warm_cosine
from fastdiff.training.loop import (
    BEST,
    Batch,
    Batches,
    LoopConfig,
    train,
)

CLASSES = 10
CLEAN, NOISIEST = -1.0, 999.0  # the times of the schedule below
SCHEDULE: tuple[str, dict[str, Any]] = (
    "linear_beta",
    {"beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 1000},
)
HELD_OUT_PER_CLASS = 36
UNET = UNetConfig(channels=1, widths=(32, 64), blocks=1, heads=4, classes=CLASSES, dropout=0.1)
DENOISER = LoopConfig(
    steps=7000, log_every=50, evaluate_every=250, save_every=250, keep_best="held_out"
)
BATCH, NULL = 128, 0.15

FEATURES: dict[str, Any] = {"size": 16, "dropout": 0.2}
CLASSIFIER = LoopConfig(steps=1500, ema_decay=0.99, evaluate_every=250, save_every=500)
ROUGHNESS = 0.15


def digits_split(seed: int = 0) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(train images, labels), (held-out images, labels): 1,437 and 360, of which 36 per class.

    Images [N, 1, 8, 8] float32: the scans' grey levels 0..16 scaled to [-1, 1]; labels [N] int64.
    Drawn with numpy's RandomState, whose stream is frozen.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn, which is not installed") from error
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    labels = torch.from_numpy(data.target).long()
    random = np.random.RandomState(seed)
    held = np.zeros(len(labels), dtype=bool)
    for digit in range(CLASSES):
        held[random.permutation(np.flatnonzero(data.target == digit))[:HELD_OUT_PER_CLASS]] = True
    rest = torch.from_numpy(~held)
    return (images[rest], labels[rest]), (images[~rest], labels[~rest])


def digits_schedule() -> NoiseSchedule:
    """What the model is trained with: betas 1e-4..0.02 over 1,000 steps (Ho et al. 2020)."""
    return NoiseSchedule.linear_beta(**SCHEDULE[1])


def noised(images: Tensor, labels: Tensor, t: Tensor, noise: Tensor) -> Batch:
    """What the denoiser is trained on: x = alpha(t) x0 + sigma(t) noise, and the noise to find."""
    schedule = digits_schedule()
    alpha, sigma = (f(t).to(images).view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
    return {"x": alpha * images + sigma * noise, "t": t, "labels": labels, "noise": noise}


def denoising_batches(images: Tensor, labels: Tensor, size: int, null: float) -> Batches:
    """Batches of `size` images, a fraction `null` of them without their label.

    Times are stratified and continuous, from the clean image (-1) to the last noise level (999):
    solvers may ask for any of them.
    """

    def batch(step: int, generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(images), (size,), generator=generator)
        jitter = torch.rand(size, generator=generator, dtype=torch.float64)
        dropped = torch.rand(size, generator=generator) < null
        noise = torch.randn(size, *images.shape[1:], generator=generator)
        t = CLEAN + (NOISIEST - CLEAN) * (torch.arange(size) + jitter) / size
        return noised(images[chosen], labels[chosen].masked_fill(dropped, CLASSES), t, noise)

    return batch


def denoising_loss(unet: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(unet(batch["x"], batch["t"], batch["labels"]), batch["noise"])


def held_out_denoising(
    images: Tensor, labels: Tensor, name: str, repeats: int = 4
) -> Callable[[nn.Module], dict[str, float]]:
    """Denoising loss on `images` at fixed noises and times, the same at every evaluation."""
    generator = torch.Generator().manual_seed(1)
    count = len(images) * repeats
    t = CLEAN + (NOISIEST - CLEAN) * (torch.arange(count) + 0.5) / count
    order = torch.randperm(count, generator=generator) % len(images)
    noise = torch.randn(count, *images.shape[1:], generator=generator)
    batch = noised(images[order], labels[order], t, noise)

    def evaluate(unet: nn.Module) -> dict[str, float]:
        return {name: float(denoising_loss(unet, batch))}

    return evaluate


def classifying_batches(images: Tensor, labels: Tensor, size: int, noise: float) -> Batches:
    """Batches of `size` images, roughened by normal noise of that size so that none is learnt by
    heart.
    """

    def batch(step: int, generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(images), (size,), generator=generator)
        rough = noise * torch.randn(size, *images.shape[1:], generator=generator)
        return {"x": images[chosen] + rough, "labels": labels[chosen]}

    return batch


def classifying_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["labels"], label_smoothing=0.05)


def train_digits(
    out: str | os.PathLike[str],
    steps: int | None = None,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the denoiser and its classifier, and write `out`/digits.safetensors and digits.json.

    out: folder of the result, and of the checkpoints in `out`/denoiser and `out`/features.
    steps: of the denoiser; the recipe's own number when None.
    Returns the metadata written. The committed file is this function's, copied into the package.
    """
    steps = DENOISER.steps if steps is None else steps
    fit, held = digits_split()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(UNET).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        features = DigitFeatures(**FEATURES)

    on_held = held_out_denoising(*held, "held_out")
    on_fit = held_out_denoising(fit[0][::4], fit[1][::4], "fit")
    config = replace(DENOISER, steps=steps, seed=seed)
    denoiser = train(
        unet,
        torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01),
        denoising_loss,
        denoising_batches(*fit, BATCH, NULL),
        config,
        learning_rate=warm_cosine(steps, 200),
        evaluate=lambda ema: on_held(ema) | on_fit(ema),
        out=Path(out) / "denoiser",
        resume=resume,
        progress=progress,
    )
    classifier = train(
        features,
        torch.optim.AdamW(features.parameters(), lr=2e-3, weight_decay=0.05),
        classifying_loss,
        classifying_batches(*fit, BATCH, ROUGHNESS),
        replace(CLASSIFIER, seed=seed),
        learning_rate=warm_cosine(CLASSIFIER.steps, 100),
        evaluate=lambda ema: {
            "accuracy": accuracy(ema, *held),
            "fit_accuracy": accuracy(ema, *fit),
        },
        out=Path(out) / "features",
        resume=resume,
        progress=progress,
    )

    best = read_tensors(Path(out) / "denoiser" / BEST)[0]
    others = {f"features.{name}": value for name, value in classifier.ema.state_dict().items()}
    curve = [entry for entry in denoiser.progress.history if "held_out" in entry]
    words = {
        "features": FEATURES,
        "parameters": {"unet": parameter_count(unet), "features": parameter_count(features)},
        "null_class": CLASSES,
        "data": {
            "source": "sklearn.datasets.load_digits, 8x8 grey levels 0..16 scaled to [-1, 1]",
            "split": "36 images of each class held out, numpy RandomState(0)",
            "train": len(fit[0]),
            "held_out": len(held[0]),
            "augmentation": "none",
        },
        "recipe": {
            "denoiser": asdict(config)
            | {
                "batch": BATCH,
                "null_fraction": NULL,
                "times": "stratified, continuous in [-1, 999]",
                "optimizer": "AdamW, rate 1e-3, betas (0.9, 0.99), weight decay 0.01",
                "learning_rate": "200 steps of warm-up, cosine to zero",
                "weights": "averaged; lowest held-out denoising loss",
            },
            "features": asdict(replace(CLASSIFIER, seed=seed))
            | {
                "batch": BATCH,
                "noise": ROUGHNESS,
                "optimizer": "AdamW, rate 2e-3, weight decay 0.05",
                "learning_rate": "100 steps of warm-up, cosine to zero",
                "loss": "cross entropy, label smoothing 0.05",
                "weights": "averaged, last",
            },
        },
        "seed": seed,
        "command": f"fastdiff train digits --steps {steps} --seed {seed}",
        "torch": torch.__version__,
        "best": denoiser.progress.best,
        "held_out_curve": [[e["step"], round(e["held_out"], 6), round(e["fit"], 6)] for e in curve],
        "accuracy": classifier.progress.history[-1]["accuracy"],
        "fit_accuracy": classifier.progress.history[-1]["fit_accuracy"],
    }
    return write_denoiser(
        Path(out) / "digits.safetensors",
        "unet",
        UNET.to_dict(),
        best,
        prediction="epsilon",
        schedule=SCHEDULE,
        words=words,
        others=others,
    )


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Fraction of images given their label."""
    return float((model(images).argmax(1) == labels).double().mean())
