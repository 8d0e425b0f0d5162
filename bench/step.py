"""The rows of `multistep_step` that are measured: tensors, bytes, and the gate before any time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.ops import allocate_slots, multistep_step_ref, multistep_step_unchecked


@dataclass(frozen=True)
class Row:
    """The kind of launch one stage of a solver makes."""

    reads: int
    writes: int
    output: torch.dtype | None = torch.float32
    network_input: torch.dtype | None = None
    guided: bool = False
    seeded: bool = False


ROWS = {
    "copy": Row(1, 1, output=None),
    "ddim": Row(1, 1),  # 3 passes over an image tensor
    "f_pndm": Row(4, 2),  # 7: the state, three past outputs and this one; state and output kept
    "unipc": Row(4, 3),  # 8: corrector and predictor share an evaluation
    "f_pndm guided bf16": Row(4, 2, torch.bfloat16, torch.bfloat16, guided=True),
    "ddim seeded": Row(1, 1, seeded=True),
}


def arguments(
    row: Row,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    per_sample: bool = False,
    seed: int = 0,
) -> tuple[object, ...]:
    """What `multistep_step_unchecked` takes for this row at [B, ...]: random, no zero weight."""
    random = torch.Generator(device).manual_seed(seed)
    forward = (2 * shape[0] if row.guided else shape[0], *shape[1:])

    def normal(size: tuple[int, ...], of: torch.dtype) -> Tensor:
        value = torch.randn(size, generator=random, device=device).to(of)
        return value.to(memory_format=torch.channels_last) if channels_last else value

    slots = allocate_slots(row.reads + row.writes, normal(shape, dtype))
    for slot in slots:
        slot.copy_(normal(shape, dtype))
    rows = shape[0] if per_sample else 1
    width = 5 + row.writes * (3 + row.reads)
    coefficients = torch.rand(rows, width, generator=random, device=device, dtype=dtype) + 0.1
    coefficients[:, 2], coefficients[:, 3] = -math.inf, math.inf
    index = torch.tensor([1, 0, *range(row.reads + row.writes)], dtype=torch.int32, device=device)
    return (
        slots,
        normal(forward, row.output) if row.output else None,
        coefficients,
        index,
        torch.full((rows,), 3.0, dtype=dtype, device=device) if row.guided else None,
        torch.arange(shape[0], device=device) if row.seeded else None,
        None,
        torch.empty_like(normal(forward, row.network_input)) if row.network_input else None,
        row.reads,
        row.writes,
    )


def moved_bytes(row: Row, step: tuple[object, ...]) -> int:
    """Bytes read and written by one launch: every operand once."""
    slots, output, network_input = step[0], step[1], step[7]
    total = (row.reads + row.writes) * slots[0].numel() * slots.element_size()
    return total + sum(
        t.numel() * t.element_size() for t in (output, network_input) if t is not None
    )


def gate(step: tuple[object, ...]) -> dict[str, object]:
    """One launch against the reference in the same dtype (bits) and in float64 (error).

    The float64 error may be twice that of plain PyTorch in the same dtype, plus 1e-6.
    """
    plain = [_moved(value, "cpu") for value in step]
    exact = [
        value.to(torch.float64, copy=True)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for value in plain
    ]
    multistep_step_unchecked(*step)
    multistep_step_ref(*plain)
    multistep_step_ref(*exact)
    got = step[0].cpu()
    scale = exact[0].abs().amax().item()
    error = (got.double() - exact[0]).abs().amax().item() / scale
    allowed = 2 * (plain[0].double() - exact[0]).abs().amax().item() / scale + 1e-6
    same = torch.equal(got, plain[0])
    if step[7] is not None:
        same = same and torch.equal(step[7].cpu(), plain[7])
    return {"bit_equal": same, "error": error, "allowed": allowed, "ok": same and error <= allowed}


def _moved(value: object, device: str) -> object:
    """A copy of a tensor on the device, strides kept."""
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return copy.copy_(value)
