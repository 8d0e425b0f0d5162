"""The photographs model: a variance-exploding denoiser of crops of scikit-learn's two photographs.

Two pictures, of which the right fifth is held out: crops of what is left teach the statistics of
natural images, whose spectrum is what preconditioned sampling is about, and not much else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.files import read_tensors
from fastdiff.models.checkpoint import write_denoiser
from fastdiff.models.noise_conditional import DEVIATION, NoiseConditional
from fastdiff.models.unet import UNetConfig
from fastdiff.training.denoising import parameter_count, warm_cosine
from fastdiff.training.loop import (
    BEST,
    Batch,
    Batches,
    LoopConfig,
    derive_seed,
    train,
)

HELD_OUT = 0.2  # of each photograph's width, at its right
HALVED = 2  # photographs are shrunk by this before they are cut


@dataclass(frozen=True)
class Preset:
    """What is trained, and for how long."""

    size: int  # of a crop
    sigma_max: float  # about the largest distance between two crops
    unet: UNetConfig
    batch: int
    loop: LoopConfig
    device: str


PRESETS = {
    "cpu": Preset(
        size=32,
        sigma_max=50.0,
        unet=UNetConfig(widths=(32, 64, 80), blocks=1, heads=4),
        batch=48,
        loop=LoopConfig(
            steps=4000, log_every=50, evaluate_every=250, save_every=250, keep_best="held_out"
        ),
        device="cpu",
    ),
    "gpu": Preset(
        size=64,
        sigma_max=90.0,
        unet=UNetConfig(widths=(96, 192, 256), blocks=2, heads=4),
        batch=256,
        loop=LoopConfig(
            steps=6000,
            ema_decay=0.9995,
            amp="bfloat16",
            log_every=100,
            evaluate_every=1000,
            save_every=1000,
            keep_best="held_out",
        ),
        device="cuda",
    ),
}
SIGMA_MIN = 0.01


def photographs() -> tuple[list[Tensor], list[Tensor]]:
    """(parts to train on, held-out parts) of both photographs, [3, H, W] float32 in [0, 1]."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise ImportError("the photographs come with scikit-learn, not installed here") from error
    fit, held = [], []
    for pixels in load_sample_images().images:
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
        image = F.avg_pool2d(image, HALVED)[0]
        cut = int(image.shape[2] * (1 - HELD_OUT))
        fit.append(image[:, :, :cut])
        held.append(image[:, :, cut:])
    return fit, held


def crops(
    images: list[Tensor], count: int, size: int, generator: torch.Generator, device: str = "cpu"
) -> Tensor:
    """Random crops [count, 3, size, size], half of them mirrored, from each image alike."""
    chosen = torch.randint(len(images), (count,), generator=generator)
    places = torch.rand(count, 2, generator=generator)
    mirrored = torch.rand(count, generator=generator) < 0.5
    found = []
    for which, (down, across), mirror in zip(
        chosen.tolist(), places.tolist(), mirrored.tolist(), strict=True
    ):
        image = images[which]
        top = int(down * (image.shape[1] - size + 1))
        left = int(across * (image.shape[2] - size + 1))
        crop = image[:, top : top + size, left : left + size]
        found.append(crop.flip(2) if mirror else crop)
    return torch.stack(found).to(device)


def noised(images: Tensor, sigma: Tensor, noise: Tensor) -> Batch:
    """What the denoiser is trained on: x = x0 + sigma noise, and the noise to find."""
    return {"x": images + sigma[:, None, None, None] * noise, "sigma": sigma, "noise": noise}


def denoising_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Squared error of the noise, in units of what normal pixels would leave unknown of it."""
    error = model(batch["x"], batch["sigma"]).float() - batch["noise"]
    weight = (batch["sigma"] / DEVIATION).square() + 1
    return (weight * error.square().mean((1, 2, 3))).mean()


def noise_levels(at: Tensor, sigma_max: float) -> Tensor:
    """sigma for numbers in [0, 1]: geometric, float32."""
    span = math.log(sigma_max / SIGMA_MIN)
    return (math.log(SIGMA_MIN) + span * at.double()).exp().float()


def denoising_batches(images: list[Tensor], preset: Preset, device: str) -> Batches:
    """Batches of crops with their noise levels, stratified over the whole range."""

    def batch(step: int, generator: torch.Generator) -> Batch:
        # A CPU generator of the same seed would repeat, as noise, the numbers that chose the crops.
        host = torch.Generator().manual_seed(derive_seed(generator.initial_seed(), 1))
        x = crops(images, preset.batch, preset.size, host, device)
        at = (torch.arange(preset.batch) + torch.rand(preset.batch, generator=host)) / preset.batch
        noise = torch.randn(x.shape, generator=generator, device=device)
        return noised(x, noise_levels(at, preset.sigma_max).to(device), noise)

    return batch


def held_out_denoising(
    images: list[Tensor], preset: Preset, name: str, device: str, number: int = 192
) -> Callable[[nn.Module], dict[str, float]]:
    """Denoising loss at fixed crops, noises and levels, the same at every evaluation."""
    generator = torch.Generator().manual_seed(1)
    x = crops(images, number, preset.size, generator)
    noise = torch.randn(x.shape, generator=generator)
    sigma = noise_levels((torch.arange(number) + 0.5) / number, preset.sigma_max)
    batches = [
        {key: value.to(device) for key, value in noised(*parts).items()}
        for parts in zip(x.split(96), sigma.split(96), noise.split(96), strict=True)
    ]

    def evaluate(model: nn.Module) -> dict[str, float]:
        losses = [float(denoising_loss(model, batch)) for batch in batches]
        return {name: sum(losses) / len(losses)}

    return evaluate


def train_photographs(
    out: str | os.PathLike[str],
    preset: str = "cpu",
    steps: int | None = None,
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> dict[str, Any]:
    """Train the denoiser and write `out`/photographs.safetensors and photographs.json.

    out: folder of the result, and of the checkpoint in `out`/denoiser. preset: "cpu" (32 px, half
    an hour on two cores) or "gpu" (64 px). steps: the preset's own number when None.
    Returns the metadata written. The committed file is this function's, copied into the package.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    chosen = PRESETS[preset]
    if chosen.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("preset 'gpu' needs a CUDA device, and PyTorch sees none")
    config = replace(chosen.loop, steps=steps or chosen.loop.steps, seed=seed)
    fit, held = photographs()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NoiseConditional(chosen.unet, SIGMA_MIN, chosen.sigma_max)
        model = model.to(device=chosen.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    on_held = held_out_denoising(held, chosen, "held_out", chosen.device)
    on_fit = held_out_denoising(fit, chosen, "fit", chosen.device)
    trained = train(
        model,
        torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01),
        denoising_loss,
        denoising_batches(fit, chosen, chosen.device),
        config,
        learning_rate=warm_cosine(config.steps, 200),
        evaluate=lambda ema: on_held(ema) | on_fit(ema),
        out=Path(out) / "denoiser",
        resume=resume,
        progress=progress,
    )
    best = read_tensors(Path(out) / "denoiser" / BEST)[0]
    curve = [entry for entry in trained.progress.history if "held_out" in entry]
    sigmas = {"sigma_min": SIGMA_MIN, "sigma_max": chosen.sigma_max}
    words = {
        "parameters": parameter_count(model),
        "data": {
            "source": "sklearn.datasets.load_sample_images, shrunk by 2, in [0, 1]",
            "split": "the right fifth of each photograph held out",
            "crops": f"{chosen.size} px, anywhere, half of them mirrored",
        },
        "recipe": asdict(config)
        | {
            "preset": preset,
            "batch": chosen.batch,
            "levels": "sigma stratified, geometric",
            "optimizer": "AdamW, rate 1e-3, betas (0.9, 0.99), weight decay 0.01",
            "learning_rate": "200 steps of warm-up, cosine to zero",
            "weights": "averaged; lowest held-out denoising loss; stored in float16",
        },
        "seed": seed,
        "command": f"fastdiff train ve --preset {preset} --steps {config.steps} --seed {seed}",
        "torch": torch.__version__,
        "best": trained.progress.best,
        "held_out_curve": [[e["step"], round(e["held_out"], 6), round(e["fit"], 6)] for e in curve],
    }
    return write_denoiser(
        Path(out) / "photographs.safetensors",
        "noise_conditional",
        {"unet": chosen.unet.to_dict(), **sigmas},
        {name: value.half() for name, value in best.items()},
        prediction="epsilon",
        schedule=("ve", sigmas),
        words=words,
    )
