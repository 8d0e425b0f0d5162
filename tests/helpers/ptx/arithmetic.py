"""Instructions that make numbers of numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np

from tests.helpers.ptx.operands import reader
from tests.helpers.ptx.run import Run
from tests.helpers.ptx.tables import Instruction, Step, carrying, machine, pure
from tests.helpers.ptx.types import TYPES, Array, to_odd

pure("add add.rn")(np.add)
pure("sub sub.rn")(np.subtract)
pure("mul mul.rn mul.lo")(np.multiply)
pure("and")(np.bitwise_and)
pure("or")(np.bitwise_or)
pure("xor")(np.bitwise_xor)
pure("not", "T->T")(np.invert)
pure("neg", "T->T")(np.negative)
pure("abs", "T->T")(np.abs)
pure("shl", "T,u32->T")(lambda x, by: x << by.astype(x.dtype))
pure("shr", "T,u32->T")(lambda x, by: x >> by.astype(x.dtype))
pure("sqrt.rn sqrt.approx.ftz sqrt.approx", "T->T")(np.sqrt)
pure("div.rn div.full")(np.divide)
pure("selp", "T,T,pred->T")(lambda x, y, choice: np.where(choice, x, y))


@pure("mul.hi")
def _mul_hi(x: Array, y: Array) -> Array:
    wide = {np.dtype("u4"): np.uint64, np.dtype("i4"): np.int64}[x.dtype]
    return (x.astype(wide) * y.astype(wide)) >> 32


@pure("mul.wide", "T,T->W")
def _mul_wide(x: Array, y: Array) -> Array:
    wide = np.dtype(f"{x.dtype.kind}{2 * x.itemsize}")
    return x.astype(wide) * y.astype(wide)


pure("mad.lo", "T,T,T->T")(lambda x, y, z: x * y + z)
pure("mad.wide", "T,T,W->W")(lambda x, y, z: _mul_wide(x, y) + z)


@pure("div")
def _div(x: Array, y: Array) -> Array:
    """Integers, towards zero."""
    quotient = x // y
    return quotient + ((quotient < 0) & (quotient * y != x)).astype(x.dtype)


pure("rem")(np.fmod)


@pure("bfe", "T,u32,u32->T")
def _bfe(x: Array, start: Array, length: Array) -> Array:
    """`length` bits from `start` on, their top bit the sign of a signed type."""
    width = 8 * x.itemsize
    length = np.minimum(length & 255, width - np.minimum(start & 255, width)).astype(x.dtype)
    low = width - length
    moved = np.left_shift(x, (low - (start & 255).astype(x.dtype)).astype(x.dtype))
    return np.where(length == 0, 0, np.right_shift(moved, low.astype(x.dtype))).astype(x.dtype)


@pure("prmt", "b32,b32,b32->b32")
def _prmt(x: Array, y: Array, selector: Array) -> Array:
    """Each byte is one of the eight of y, x; the selector's fourth bit repeats its sign instead."""
    both = x.astype(np.uint64) | y.astype(np.uint64) << 32
    total = np.zeros(1, np.uint32)
    for i in range(4):
        pick = (selector >> 4 * i).astype(np.uint64)
        byte = both >> (pick & 7) * 8 & 0xFF
        byte = np.where(pick & 8, np.where(byte & 0x80, 0xFF, 0), byte)
        total = total | byte.astype(np.uint32) << np.uint32(8 * i)
    return total


def two_sum(x: Array, y: Array) -> tuple[Array, Array]:
    """x + y rounded, and its error."""
    total = x + y
    back = total - x
    return total, (x - (total - back)) + (y - back)


def two_product(x: Array, y: Array) -> tuple[Array, Array]:
    """x y in float64 rounded, and its error (Dekker 1971), short of overflow and underflow."""
    (x1, x2), (y1, y2) = (
        (high := v * 134217729.0 - (v * 134217729.0 - v), v - high) for v in (x, y)
    )
    product = x * y
    return product, ((x1 * y1 - product) + x1 * y2 + x2 * y1) + x2 * y2


@pure("fma.rn", "T,T,T->T")
def fma(x: Array, y: Array, z: Array) -> Array:
    """x y + z with a single rounding."""
    if x.dtype == np.float32:
        product = x.astype(np.float64) * y.astype(np.float64)  # exact
        return to_odd(*two_sum(product, z.astype(np.float64))).astype(np.float32)
    high, low = two_product(x, y)
    middle, last = two_sum(z, low)
    total, rest = two_sum(high, middle)
    exact = total + to_odd(*two_sum(last, rest))
    return np.where(np.isfinite(exact), exact, x * y + z)


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    **{name: getattr(operator, name) for name in ("eq", "lt", "le", "gt", "ge")},
    # Where a NaN is compared "ne" is false, and with a "u" each is true.
    "ne": lambda x, y: (x != y) & (x == x) & (y == y) if x.dtype.kind == "f" else x != y,
    "equ": lambda x, y: ~((x < y) | (x > y)),
    "neu": operator.ne,
    "ltu": lambda x, y: ~(x >= y),
    "leu": lambda x, y: ~(x > y),
    "gtu": lambda x, y: ~(x <= y),
    "geu": lambda x, y: ~(x < y),
    "num": lambda x, y: (x == x) & (y == y),
    "nan": lambda x, y: (x != x) | (y != y),
}
for _name, _compare in COMPARISONS.items():
    pure(f"setp.{_name}", "T,T->pred")(_compare)

# Between types: exact, or to the nearest (".rn"), as the encoding of the result does it.
pure("cvt cvt.rn", "T->D")(lambda x: x)


@machine("cvt.rn.pair")
def _cvt_pair(instruction: Instruction) -> Step:
    """Two numbers to the halves of a register, the first to the upper."""
    to, upper, lower = instruction.operands
    high, low = reader(upper, instruction.types[-1]), reader(lower, instruction.types[-1])
    encode = TYPES[instruction.types[0]].encode

    def step(run: Run) -> None:
        run.write(to, encode(np.stack(np.broadcast_arrays(low(run), high(run)), -1)))

    return carrying(step)
