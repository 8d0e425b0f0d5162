"""Small launches of every kernel, for tools that watch a process: compute-sanitizer and ncu.

`python -m bench.visit.kernels all | races | counted`
"""

from __future__ import annotations

import sys

import torch

from fastdiff import _ext
from fastdiff.ops import seeded_noise, weighted_sums_unchecked

from ..entries import haar, multistep_step, spectral_filter, spectral_update, weighted_sums
from ..steps import step_of


def all_kernels(device: torch.device) -> None:
    """Each at an odd size, with every operand."""
    for row in multistep_step.ROWS.values():
        step_of(row, (2, 3, 31, 33), device, per_sample=True).run()
    for sums in weighted_sums.ROWS.values():
        weighted_sums_unchecked(*weighted_sums.sums_of(sums, (2, 3, 31, 33), device))
    seeded_noise(torch.arange(3, device=device), (3, 5, 7, 9))
    for shape in ((2, 3, 31, 33), (2, 3, 64, 64)):
        spectral_filter.ours("exact")([spectral_filter.buffers(0, shape, device)])(0)
        for name in spectral_update.MOVES:
            spectral_update.ours(name, [spectral_update.buffers(0, shape, device)])(0)
        for name in haar.ROWS if _ext.HAS_CUDA else ():
            pyramids(name, shape, device)


def races(device: torch.device) -> None:
    """The kernel whose blocks meet: they add to one loss."""
    for shape in ((2, 3, 31, 33), (2, 3, 128, 128)):
        pyramids("loss", shape, device)


def counted(device: torch.device) -> None:
    """One launch of each at sizes whose bytes are predicted in docs/gpu-visit.md."""
    for name in ("plms", "ddim", "copy"):
        for shape in ((64, 4, 512, 512), (4, 4, 64, 64)):
            multistep_step.launched([step_of(multistep_step.ROWS[name], shape, device)])(0)
    for name in ("exact", "fast"):
        spectral_filter.ours(name)([spectral_filter.buffers(0, (256, 3, 64, 64), device)])(0)
    for shape in ((64, 3, 64, 64), (4, 3, 256, 256)):
        spectral_update.ours("predictor", [spectral_update.buffers(0, shape, device)])(0)
    for name in ("split", "step") if _ext.HAS_CUDA else ():
        pyramids(name, (64, 3, 256, 256), device)


def pyramids(name: str, shape: tuple[int, ...], device: torch.device) -> None:
    row, levels = haar.ROWS[name], 1 if name == "expand" else haar.LEVELS
    row.ours(haar.buffers(0, shape, device, row.columns, levels))


KINDS = {"all": all_kernels, "races": races, "counted": counted}

if __name__ == "__main__":
    KINDS[sys.argv[1]](torch.device("cuda"))
    torch.cuda.synchronize()
    print("CHECKED")  # what breaks off before has shown nothing
