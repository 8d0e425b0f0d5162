"""Comparisons with references, which come before any time: what an entry's gates are made of."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

Gate = dict[str, Any]  # what was compared, and "ok"


def relative_error(found: Tensor | Sequence[Tensor], wanted: Tensor | Sequence[Tensor]) -> float:
    """Largest difference over the largest magnitude wanted; infinite where NaN meets a number."""
    if not isinstance(found, Tensor):
        return max(relative_error(*pair) for pair in zip(found, wanted, strict=True))
    wanted = wanted.detach().double()
    found = found.detach().to(wanted.device).double()
    return float(((found - wanted).abs().amax() / wanted.abs().amax()).nan_to_num(torch.inf))


def norm_error(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of what is wanted."""
    return float((found - wanted).norm() / wanted.norm())


def within(case: str, error: float, allowed: float) -> Gate:
    return {"case": case, "error": error, "allowed": allowed, "ok": error <= allowed}


def same_bits(case: str, found: Iterable[Tensor], wanted: Iterable[Tensor]) -> Gate:
    """Whether all are equal, wherever they lie."""
    pairs = zip(found, wanted, strict=True)
    same = all(torch.equal(one.to(two.device), two) for one, two in pairs)
    return {"case": case, "bit_equal": same, "ok": same}


def as_defined(
    gate: Gate, found: Sequence[Tensor], defined: Sequence[Tensor], exact: Sequence[Tensor]
) -> Gate:
    """`same_bits` of an op and its definition in plain PyTorch, and the error against float64.

    That may be twice the definition's own, plus 1e-6. Definitions run on the op's device, which is
    quick; a gate of its own holds them to the CPU's.
    """
    error, allowed = (relative_error(made, exact) for made in (found, defined))
    bounded = within(gate["case"], error, 2 * allowed + 1e-6)
    return gate | bounded | {"ok": gate["ok"] and bounded["ok"]}


ON_BOTH = "the definition on the device as on the CPU"


def exact_convolutions() -> contextlib.AbstractContextManager[Any]:
    """For comparisons: cuDNN in float32 proper, and the same algorithm each time."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
