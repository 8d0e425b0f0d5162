"""`python -m bench gpu --only tune`: the fastest launch configuration of each kernel variant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastdiff.kernels import _tuning
from fastdiff.kernels import multistep_step as kernels
from fastdiff.ops import multistep_step_ref

from .files import write_json
from .machine import machine
from .steps import Row, Step, step_of
from .timing import Call, interleaved, quantiles, recorded, replayed

# The variants that solvers use, at a size for the launch and one for the memory.
VARIANTS = ((1, 1), (2, 1), (4, 1), (4, 2), (4, 3), (8, 2))
SIZES = ((4, 4, 64, 64), (16, 3, 256, 256))
DRY = {"variants": VARIANTS[:1], "sizes": ((1, 3, 8, 8),)}
WORTH = 0.98  # of the heuristic's time: less of a gain is noise


def launched(step: Step, chosen: _tuning.Config) -> Call:
    """The kernel itself in one configuration, the op's lookup left out."""
    programs, arguments = kernels.plan(*step, chosen)
    return lambda i: kernels._multistep_step_kernel[(programs,)](**arguments)


def right(row: Row, device: torch.device, chosen: _tuning.Config) -> bool:
    """Whether the kernel in this configuration still equals its definition, to the bit."""
    step, plain = (step_of(row, (2, 3, 31, 33), place) for place in (device, torch.device("cpu")))
    for value, like in zip(step, plain, strict=True):
        if isinstance(value, torch.Tensor):
            value.copy_(like)
    launched(step, chosen)(0)
    multistep_step_ref(*plain)
    return torch.equal(step.slots.cpu(), plain.slots)


def tune(device: torch.device, path: Path) -> int:
    """Sweep, and write what belongs at kernels/configs/<gpu>/; on the CPU only walk the path."""
    dry = device.type == "cpu"
    variants, sizes = (DRY["variants"], DRY["sizes"]) if dry else (VARIANTS, SIZES)
    found: dict[str, dict[str, int]] = {}
    times: list[dict[str, Any]] = []
    for reads, writes in variants:
        row, total = Row(reads=reads, writes=writes), dict.fromkeys(_tuning.CHOICES, 1.0)
        if wrong := [c for c in total if not right(row, device, c)]:
            print(f"RED: R{reads} W{writes} is wrong in {wrong}; nothing was written")
            return 1
        for shape in sizes:
            step = step_of(row, shape, device)
            calls = {str(tuple(c)): launched(step, c) for c in total}
            seconds = (
                interleaved(calls, 1, 0.0, device, least=2)
                if dry
                else replayed({name: recorded(call, 1) for name, call in calls.items()}, 2.0)
            )
            p50 = {c: quantiles(seconds[str(tuple(c))])["p50_us"] for c in total}
            for c in total:
                total[c] *= p50[c] / p50[_tuning.HEURISTIC]
            times.append({"variant": f"R{reads} W{writes}", "shape": shape,
                          "p50_us": {str(tuple(c)): p50[c] for c in total}})  # fmt: skip
        best = min(total, key=total.__getitem__)
        if total[best] < WORTH ** len(sizes):
            found[f"R{reads} W{writes}"] = best._asdict()
        if not dry:
            # After every variant, because the visit may end during the next one.
            write_json(path, {**machine(device), "configs": found, "times": times})
        print(
            f"R{reads} W{writes}: {best} at {total[best] ** (1 / len(sizes)):.3f} of the heuristic"
        )
    if dry:
        print("a dry run on the CPU: no configuration of a GPU was written")
        return 0
    place = f"kernels/configs/{_tuning.gpu_slug(torch.cuda.get_device_name(device))}"
    print(f"wrote {path}: {len(found)} variants differ from the heuristic; it belongs in {place}")
    return 0
