"""Launch configurations: those measured for the present GPU, else a heuristic.

`python -m bench gpu --only tune` makes what configs/<gpu>/<op>.json beside this file hold: for each
kernel variant the threads of a program and the bytes of an access. Nothing is read at import.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

CONFIGS = Path(__file__).resolve().parent / "configs"


class Config(NamedTuple):
    """Threads of a program (a power of two from 32 to 1024), and bytes each reads of an operand."""

    threads: int = 256
    bytes_per_thread: int = 16


HEURISTIC = Config()
# What a sweep tries; the ahead-of-time check compiles every one of them. 512 threads of 32 bytes
# leave 128 registers a thread, and the largest variant spills.
CHOICES = (
    *(Config(threads, 16) for threads in (128, 256, 512)),
    *(Config(threads, 32) for threads in (128, 256)),
)


def gpu_slug(name: str) -> str:
    """A GPU's name as a folder's: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@cache
def config(op: str, variant: str, device: torch.device) -> Config:
    """The configuration of a variant ("R4 W2") on a device; the heuristic where none was measured.

    Raises ValueError for a file that does not hold configurations.
    """
    if device.type != "cuda":
        return HEURISTIC
    return _measured(op, gpu_slug(torch.cuda.get_device_name(device))).get(variant, HEURISTIC)


@cache
def _measured(op: str, gpu: str) -> dict[str, Config]:
    path = CONFIGS / gpu / f"{op}.json"
    if not path.is_file():
        return {}
    try:
        read = json.loads(path.read_text())["configs"]
        found = {variant: Config(**numbers) for variant, numbers in read.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} must hold configurations; reading it failed: {error!r}") from None
    for variant, chosen in found.items():
        if chosen not in CHOICES:
            raise ValueError(f"{path} must name one of {CHOICES} for {variant}; got {chosen}")
    return found


def live(op: str, device: torch.device) -> str:
    """In words, for `fastdiff doctor`: where an op's configurations come from."""
    name = torch.cuda.get_device_name(device)
    count = len(_measured(op, gpu_slug(name)))
    return f"{count} variants tuned for {name}" if count else f"the heuristic ({name} is not tuned)"
