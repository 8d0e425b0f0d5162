"""Linear forms: what stands for a tensor while code is run on symbols."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np

Coefficient = Any  # a float, or an array [B]: one per sample
F = TypeVar("F", bound="Form")


def is_zero(coefficient: Coefficient) -> bool:
    return coefficient == 0 if isinstance(coefficient, float) else not np.any(coefficient)


def is_one(coefficient: Coefficient) -> bool:
    return bool(np.all(np.asarray(coefficient) == 1.0))


class Form:
    """A linear combination of values: {value: coefficient}. Supports + - * / with numbers.

    Values are whatever can be a key. A coefficient that is zero is left out: its value is not read.
    """

    __array_ufunc__ = None  # numpy_array * form comes here, not to numpy

    def __init__(self, terms: Mapping[Any, Coefficient]) -> None:
        self.terms = {v: c for v, c in terms.items() if not is_zero(c)}

    def _like(self: F, terms: dict[Any, Coefficient]) -> F:
        """A form of this one's kind with other terms."""
        return type(self)(terms)

    @staticmethod
    def _sum(a: Coefficient, b: Coefficient) -> Coefficient:
        """a + b, exactly zero where the two cancel to within rounding: then nothing is read."""
        total = a + b
        return total * (abs(total) > 8 * np.finfo(np.float64).eps * abs(a))

    def _added(self, other: Form) -> dict[Any, Coefficient]:
        terms = dict(self.terms)
        for value, coefficient in other.terms.items():
            terms[value] = self._sum(terms[value], coefficient) if value in terms else coefficient
        return terms

    def __add__(self: F, other: Any) -> F:
        if not isinstance(other, Form):
            raise TypeError(f"a solver must be linear: a form plus {other!r} has no tableau")
        return self._like(self._added(other))

    def __mul__(self: F, factor: Coefficient) -> F:
        if isinstance(factor, Form):
            raise TypeError("a solver must be linear: a form times a form has no tableau")
        return self._like({v: c * factor for v, c in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self: F, divisor: Coefficient) -> F:
        return self * (1.0 / divisor)

    def __neg__(self: F) -> F:
        return self * -1.0

    def __sub__(self: F, other: Any) -> F:
        return self + other * -1.0

    def __repr__(self) -> str:
        return " + ".join(f"{c} {v}" for v, c in self.terms.items()) or "0"
