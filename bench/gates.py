"""Comparisons of what is timed with what is right, before any time."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .registry import Case, Maker

Gate = dict[str, Any]  # "case", "error", "allowed" and "ok"


def gate_of(case: Case) -> Gate:
    """Our call and the case's definition, each on buffers of its own with the same numbers."""
    case = case.checked or case
    with torch.inference_mode(), exact_convolutions():
        found, wanted = (made(case, maker) for maker in (case.ours, case.definition))
    same = all(map(torch.equal, found, wanted)) and len(found) == len(wanted)
    error = 0.0 if same else relative_error(found, wanted)
    ok = same or error <= case.allowed and case.allowed > 0
    return {"case": case.name, "error": error, "allowed": case.allowed, "ok": ok}


def made(case: Case, maker: Maker) -> list[Tensor]:
    """All tensors that one call makes, and those that it leaves in its buffers."""
    buffers = case.inputs(0)
    result = maker([buffers])(0)
    return [*([result] if isinstance(result, Tensor) else result), *case.leaves(buffers)]


def relative_error(found: Tensor | Sequence[Tensor], wanted: Tensor | Sequence[Tensor]) -> float:
    """Largest difference over the largest magnitude wanted; infinite where NaN meets a number."""
    if not isinstance(found, Tensor):
        return max(relative_error(*pair) for pair in zip(found, wanted, strict=True))
    wanted = wanted.detach().double()
    found = found.detach().to(wanted.device).double()
    return float(((found - wanted).abs().amax() / wanted.abs().amax()).nan_to_num(torch.inf))


def exact_convolutions() -> contextlib.AbstractContextManager[Any]:
    """For comparisons: cuDNN in float32 proper, and the same algorithm each time."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
