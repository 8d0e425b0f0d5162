"""Samples by the thousand: one PNG per seed, the same files however many processes make them.

The seeds are cut into micro-batches of one fixed size. The last one is filled up with the seeds
that would come next, which are not written; so every image is made in a batch of the same shape,
and its bits depend on its seed and the recipe, not on how many images or processes there are. On
the CPU every process runs on one thread, because sums depend on how many there are: to use a
machine's cores, start as many processes.

Under `torchrun` the processes share the micro-batches that are missing. A file is there whole or
not at all, so a run that was killed goes on where it was.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastdiff
from fastdiff.app.machine import cpu_model
from fastdiff.files import write_json
from fastdiff.images import RECIPE, ROUNDING, SUFFIXES, to_bytes, write_png
from fastdiff.integrations.diffusers.networks import load_diffusers, read_configs
from fastdiff.models import load_digits
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule

T = TypeVar("T")

DIGITS = "digits"


@dataclass(frozen=True)
class Model:
    """A network and what has to be known to sample it.

    name: goes into the recipe and the folder's default name.
    denoiser: called as (x [B, C, H, W], t [B]), and with labels [B] int64 where there are classes;
        in eval mode.
    shape: (C, H, W) of an image, C 1 (grey) or 3 (RGB).
    classes: number of labels; 0 for an unconditional network.
    labels: the name of the argument that takes them.
    """

    name: str
    denoiser: nn.Module
    schedule: NoiseSchedule
    shape: tuple[int, int, int]
    prediction: str = "epsilon"
    classes: int = 0
    labels: str = "labels"


def load_model(name: str) -> Model:
    """The committed digits model ("digits"), or that of a local diffusers folder.

    The folder is what `save_pretrained` of an unconditional pipeline (DDPMPipeline and its like)
    or of a UNet2DModel beside its scheduler writes. Nothing is downloaded.
    Raises FileNotFoundError or ValueError for a folder that is not there or holds something else.
    """
    if name == DIGITS:
        unet, _ = load_digits()
        return Model(DIGITS, unet, NoiseSchedule.linear_beta(), (1, 8, 8), classes=10)
    folder = Path(name)
    if not folder.is_dir():
        raise FileNotFoundError(
            f'model must be "{DIGITS}" or a local diffusers folder; there is no folder {name!r}'
        )
    return _diffusers_model(folder)


def generate(
    model: Model,
    num_images: int,
    out: Path | None = None,
    *,
    solver: str = "ipndm",
    steps: int = 10,
    spacing: str | None = None,
    convention: str = "aligned",
    seed_start: int = 0,
    batch: int = 64,
    label: int | None = None,
    progress: bool = True,
) -> Path:
    """Write the images of seeds seed_start .. seed_start + num_images - 1 into a folder.

    out: the folder, seen by all processes; out/<model>_<solver>_<steps> when None. It gets one PNG
        per image, named by its seed (000000.png), and recipe.json. Images that are there already
        are kept, so the number of images may grow.
    solver, steps, spacing, convention: see `fastdiff.build_tableau`; no guidance, no clipping.
    batch: size of the micro-batch; part of the recipe.
    label: of every image; the seed modulo the number of classes when None.
    progress: show a bar, in the first process.

    Runs on the process's GPU if there is one. Under `torchrun` every process calls this; it returns
    in all of them when the folder is complete. Returns the folder.
    Raises ValueError for a folder of another recipe, or of more images than asked for.
    """
    for name, value, least in (
        ("num_images", num_images, 1),
        ("batch", batch, 1),
        ("seed_start", seed_start, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if label is not None and not 0 <= label < model.classes:
        allowed = f"0 .. {model.classes - 1}" if model.classes else "left out: it has no classes"
        raise ValueError(f"label must be {allowed}; got {label}")
    if model.shape[0] not in (1, 3):
        raise ValueError(f"model must make images of 1 or 3 channels; got {model.shape}")
    folder = Path("out") / f"{model.name}_{solver}_{steps}" if out is None else out

    rank, world = _processes()
    with _same_bits():
        device = _device()
        sampler = Sampler(
            model.denoiser.to(device),
            model.schedule,
            solver=solver,
            steps=steps,
            prediction=model.prediction,
            spacing=spacing,
            convention=convention,
        )
        recipe = {
            "model": {"name": model.name, "weights": _digest(model.denoiser)},
            "shape": model.shape,
            "schedule": _schedule(model.schedule),
            "prediction": model.prediction,
            "solver": solver,
            "steps": steps,
            "calls": sampler.tableau.nfe,
            "spacing": model.schedule.spacing if spacing is None else spacing,
            "convention": convention,
            "guidance": None,
            "clip": None,
            "labels": _label_rule(model, label),
            "noise": "fastdiff.seeded_noise",
            "seed_start": seed_start,
            "batch": batch,
            "dtype": "float32",
            "rounding": ROUNDING,
        }
        missing = _decided(lambda: _prepare(folder, recipe, num_images, device), rank, world)
        for first, wanted in _bar(missing[rank::world], progress and rank == 0):
            seeds = range(first, first + batch)
            labels: dict[str, Any] = {}
            if model.classes:
                labels[model.labels] = _labels(model, seeds, label, device)
            images = sampler(seeds=seeds, shape=model.shape, **labels)
            finite = images.isfinite().flatten(1).all(1).tolist()
            for seed in wanted:
                if not finite[seed - first]:
                    raise ValueError(f"the image of seed {seed} is not finite: NaN or infinity")
            images = to_bytes(images[[seed - first for seed in wanted]]).cpu()
            for seed, image in zip(wanted, images, strict=True):
                write_png(folder / _file_name(seed), image)
        if world > 1:
            dist.barrier()
    return folder


def first_process() -> bool:
    """Whether this process is the one that speaks and writes what there is one of."""
    return int(os.environ.get("RANK", "0")) == 0


# == The folder ====================================================================================

Missing = list[tuple[int, list[int]]]
"""Micro-batches to make: (its first seed, the seeds to write)."""


def _file_name(seed: int) -> str:
    return f"{seed:06d}.png"


def _prepare(folder: Path, recipe: dict[str, Any], count: int, device: torch.device) -> Missing:
    """Check that the folder is of this recipe, write it there, and list what is missing."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"out must be a folder; {folder} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    names = {path.name for path in folder.iterdir()}
    recipe, made_on = json.loads(json.dumps(recipe)), []
    if RECIPE in names:
        before = json.loads((folder / RECIPE).read_text())
        for key, value in recipe.items():
            if before.get(key) != value:
                raise ValueError(
                    f"out must be a new folder, or {key} stay {before.get(key)!r} as in "
                    f"{folder / RECIPE}; got {value!r}"
                )
        if before["num_images"] > count:
            raise ValueError(
                f"num_images must be at least {before['num_images']}, which {folder} was made "
                f"for; got {count}"
            )
        made_on = before["made_on"]
    elif any(Path(name).suffix.lower() in SUFFIXES for name in names if name[0] != "."):
        raise ValueError(
            f"out must be a new folder or one of samples; {folder} holds images but no {RECIPE}"
        )
    here = {
        "device": _device_name(device),
        "torch": torch.__version__,
        "fastdiff": fastdiff.__version__,
    }
    if here not in made_on:
        made_on.append(here)
    write_json(folder / RECIPE, recipe | {"num_images": count, "made_on": made_on})

    start, batch = recipe["seed_start"], recipe["batch"]
    missing: Missing = []
    for first in range(start, start + count, batch):
        seeds = range(first, min(first + batch, start + count))
        wanted = [seed for seed in seeds if _file_name(seed) not in names]
        if wanted:
            missing.append((first, wanted))
    return missing


def _digest(network: nn.Module) -> str:
    """SHA-256 of the weights by name, 16 digits: the same wherever the files lie."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _schedule(schedule: NoiseSchedule) -> str:
    ends = (schedule.logsnr(t) for t in (schedule.first, schedule.last))
    return f"{schedule.name}, log-SNR " + " .. ".join(f"{end:.6g}" for end in ends)


def _label_rule(model: Model, label: int | None) -> str | int | None:
    if label is not None or not model.classes:
        return label
    return f"seed modulo {model.classes}"


def _labels(model: Model, seeds: range, label: int | None, device: torch.device) -> Tensor:
    numbers = [seed % model.classes if label is None else label for seed in seeds]
    return torch.tensor(numbers, device=device)


def _bar(batches: Missing, show: bool) -> Any:
    from tqdm.auto import tqdm  # late: importing fastdiff must stay cheap

    return tqdm(batches, desc="sampling", unit="batch", disable=not show)


# == Processes =====================================================================================


def _processes() -> tuple[int, int]:
    """(rank, number of processes), of the group that is there, or of torchrun's."""
    if not dist.is_available():
        return 0, 1
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched():
            return 0, 1
        # Only a few words are exchanged, whatever the device. A process may wait for the slowest.
        # The group stays for the next folder: made anew it would meet what this one left behind.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
        atexit.register(dist.destroy_process_group)
    return dist.get_rank(), dist.get_world_size()


@contextlib.contextmanager
def _same_bits() -> Iterator[None]:
    """One CPU thread, and cuDNN's deterministic algorithms."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
            yield
    finally:
        torch.set_num_threads(threads)


def _decided(decide: Callable[[], T], rank: int, world: int) -> T:
    """What the first process returns or raises, in all of them."""
    box: list[Any] = [None]
    if rank == 0:
        try:
            box = [decide()]
        except (ValueError, OSError) as error:
            box = [error]
    if world > 1:
        dist.broadcast_object_list(box)
    if isinstance(box[0], Exception):
        raise box[0]
    return box[0]


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local % torch.cuda.device_count())


def _device_name(device: torch.device) -> str:
    return cpu_model() if device.type == "cpu" else torch.cuda.get_device_name(device)


# == diffusers folders =============================================================================


def _diffusers_model(folder: Path) -> Model:
    if any((folder / part).is_dir() for part in ("vae", "vqvae")):
        raise ValueError(f"model must make images, not latents; {folder} has an autoencoder")
    _, config, _ = read_configs(folder)
    kind = config.get("_class_name")
    if kind != "UNet2DModel":
        raise ValueError(f"model must be an unconditional UNet2DModel; {folder} has a {kind}")
    size = config.get("sample_size")
    if size is None:
        raise ValueError(f"model must say its sample_size; the UNet of {folder} does not")
    height, width = (size, size) if isinstance(size, int) else size
    denoiser, _ = load_diffusers(folder)
    assert denoiser.schedule is not None  # its scheduler's
    return Model(
        folder.resolve().name,
        denoiser,
        denoiser.schedule,
        (config["in_channels"], height, width),
        denoiser.prediction.name,
        config.get("num_class_embeds") or 0,
        labels="class_labels",
    )
