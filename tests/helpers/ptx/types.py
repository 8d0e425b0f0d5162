"""What the bits of a register mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Fault(Exception):
    """What the hardware would not do, or leave undefined; or what is not known here."""


# A register holds bits. A type says what they mean: `decode` makes numbers of bits, `encode` bits.


class Type(NamedTuple):
    bytes: int
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]
    dtype: Any


def _plain(dtype: Any) -> Type:
    size = np.dtype(dtype).itemsize
    bits = np.dtype(f"u{size}")
    return Type(
        size, lambda b: b.view(dtype), lambda v: v.astype(dtype, copy=False).view(bits), dtype
    )


def to_odd(value: Array, error: Array) -> Array:
    """value + error rounded to odd, for value = the nearest float: a later rounding is then right.

    Boldo and Melquiond (2008), "Emulation of a FMA and correctly rounded sums: proved algorithms
    using rounding to odd".
    """
    bits = value.view(f"i{value.itemsize}")
    away = np.where((error > 0) == (value > 0), 1, -1).astype(bits.dtype)
    inexact = ((error > 0) | (error < 0)) & (bits & 1 == 0) & np.isfinite(value)
    return np.where(inexact, bits + away, bits).view(value.dtype)


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(value: Array) -> Array:
    """To the nearest, ties to even; NaN is 0x7FFF."""
    narrow = value.astype(np.float32, copy=False)
    if value.dtype == np.float64:
        narrow = to_odd(narrow, value - narrow)
    bits = narrow.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(narrow), np.uint16(0x7FFF), nearest.astype(np.uint16))


def to_float16(value: Array) -> Array:
    bits = value.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), bits)


def halves_of(bits: Array) -> Array:
    """[N, 2] halves of 32-bit registers, the lower first."""
    return np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2)


def of_halves(halves: Array) -> Array:
    return np.ascontiguousarray(halves.astype(np.uint16, copy=False)).view(np.uint32).reshape(-1)


TYPES: dict[str, Type] = {
    **{f"{kind}{8 * size}": _plain(f"{'i' if kind == 's' else 'u'}{size}")
       for kind in "sub" for size in (1, 2, 4, 8)},
    "f32": _plain(np.float32),
    "f64": _plain(np.float64),
    "f16": Type(2, lambda b: b.view(np.float16), to_float16, np.float16),
    "bf16": Type(2, from_bfloat16, to_bfloat16, np.float32),
    # Sums of two bfloat16 numbers are exact in float64 where they are not plain: one rounding.
    "bf16x2": Type(4, lambda b: from_bfloat16(halves_of(b)).astype(np.float64),
                   lambda v: of_halves(to_bfloat16(v)), np.float64),
    "f16x2": Type(4, lambda b: halves_of(b).view(np.float16), lambda v: of_halves(to_float16(v)),
                  np.float16),
    "tf32": Type(4, lambda b: (b & np.uint32(0xFFFFE000)).view(np.float32),
                 lambda v: v.view(np.uint32), np.float32),
    "pred": Type(0, lambda b: b, lambda v: v, np.bool_),
}  # fmt: skip
WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
