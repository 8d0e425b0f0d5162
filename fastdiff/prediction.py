"""What a network predicts, as linear maps between its output, the state it saw, x0 and epsilon.

With x = alpha x0 + sigma epsilon every prediction F gives x0 = p F + q x and epsilon = a F + b x.
The coefficients are exact closed forms in alpha and sigma, float64, for numbers, arrays and tensors
alike; solvers fold them into their rows, so nothing is converted at run time unless x0 is clipped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Pair = tuple[Any, Any]


def _one(alpha: Any, sigma: Any) -> float:
    return 1.0


@dataclass(frozen=True)
class Prediction:
    """One kind of network output F: functions of (alpha, sigma).

    Attributes:
        name: the field's name for it.
        to_sample: gives (p, q) with x0 = p F + q x.
        to_epsilon: gives (a, b) with epsilon = a F + b x.
        input_scale: the network is shown `input_scale * x`.
        blend: None, or for a network that returns two tensors of the sample's shape stacked along
            the channels, gives (m0, m1) with F = m0 F0 + m1 F1.
    """

    name: str
    to_sample: Callable[[Any, Any], Pair]
    to_epsilon: Callable[[Any, Any], Pair]
    input_scale: Callable[[Any, Any], Any] = _one
    blend: Callable[[Any, Any], Pair] | None = None


def _power(a: Any, s: Any) -> Any:
    return a**2 + s**2


_ALL = (
    Prediction("epsilon", lambda a, s: (-s / a, 1 / a), lambda a, s: (1.0, 0.0)),
    Prediction("sample", lambda a, s: (1.0, 0.0), lambda a, s: (-a / s, 1 / s)),
    # alpha epsilon - sigma x0 (Salimans & Ho 2022, section 4)
    Prediction(
        "v_prediction",
        lambda a, s: (-s / _power(a, s), a / _power(a, s)),
        lambda a, s: (a / _power(a, s), s / _power(a, s)),
    ),
    # epsilon - x0, the velocity of a rectified flow
    Prediction(
        "flow", lambda a, s: (-s / (a + s), 1 / (a + s)), lambda a, s: (a / (a + s), 1 / (a + s))
    ),
    # the gradient of log p_t(x), which is -epsilon / sigma
    Prediction("score", lambda a, s: (s**2 / a, 1 / a), lambda a, s: (-s, 0.0)),
    # x0 and epsilon side by side, weighted by the noise level (Salimans & Ho 2022, section 4):
    # x0 = sigma^2 F0 + alpha (x - sigma F1) where alpha^2 + sigma^2 = 1. F is the part without x.
    Prediction(
        "both",
        lambda a, s: (1.0, a / _power(a, s)),
        lambda a, s: (-a / s, s / _power(a, s)),
        blend=lambda a, s: (s**2 / _power(a, s), -a * s / _power(a, s)),
    ),
)
_BY_NAME = {kind.name: kind for kind in _ALL}

PREDICTIONS: tuple[str, ...] = tuple(_BY_NAME)


def prediction(kind: str | Prediction) -> Prediction:
    """The prediction of a name: one of `PREDICTIONS`. A `Prediction` passes through.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(kind, Prediction):
        return kind
    if kind not in _BY_NAME:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}; got {kind!r}")
    return _BY_NAME[kind]
