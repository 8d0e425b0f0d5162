"""What the trainings of denoisers share."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn


def warm_cosine(steps: int, warm: int) -> Callable[[int], float]:
    """Learning-rate factor: linear warm-up, then half a cosine to zero."""
    return lambda step: min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * step / steps)))


def parameter_count(module: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in module.parameters())
