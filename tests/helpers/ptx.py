"""PTX executed on the CPU: what Triton compiled for a GPU runs on memory of this machine.

`Program(text).run(grid, parameters, memory)` takes all threads of all programs through the code at
once: a register is a NumPy array with an element for each of them, its lanes. A register in which
all lanes agree is one element long. Lanes part at branches: those at the earliest block of the code
run next, so they meet again where the code joins. Errors (`Fault`) are: an access out of bounds or
misaligned, an instruction that is not known, a barrier or a warp's instruction that not all its
lanes reach, and a register's value that was never written, where it comes to matter: in an address,
a store, a branch or a product of matrices. (Compiled code does compute with such values, in lanes
whose results nobody uses.)

**A new instruction** is one function in one of the two tables: `@pure("add.rn", "T,T->T")` above
what computes values, `@machine("bar.sync")` above what touches memory, other lanes or the order.
The name is the instruction's without the types at its end.

Numbers are the hardware's: round to nearest even, one rounding for fma, bfloat16 and float16
conversions to the bit, tensor cores' tf32 operands cut to 10 mantissa bits. What hardware leaves
open is rounded correctly here: division `.full` (within 2 ulp there), `sqrt.approx` (relative
2^-23), and sums inside a tensor core's product, whose order and width are not documented.

What this does not show: races. All lanes of a block of code take each instruction together, so a
missing barrier between warps changes nothing here; nor does a missing fence.
"""

from __future__ import annotations

import ctypes
import operator
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
WARP, WARP_GROUP = 32, 128
SHARED_BASE = 1024  # where a program's shared memory begins: the first KiB is the system's
LANES = 8192  # that run together: programs are taken in groups, which stay in a cache


class Fault(Exception):
    """What the hardware would not do, or leave undefined; or what is not known here."""


# == Types =========================================================================================
# A register holds bits. A type says what they mean: `decode` makes numbers of bits, `encode` bits.


class Type(NamedTuple):
    bytes: int
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]
    dtype: Any


def _plain(dtype: Any) -> Type:
    size = np.dtype(dtype).itemsize
    bits = np.dtype(f"u{size}")
    return Type(size, lambda b: b.view(dtype), lambda v: v.astype(dtype, copy=False).view(bits),
                dtype)  # fmt: skip


def _to_odd(value: Array, error: Array) -> Array:
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
        narrow = _to_odd(narrow, value - narrow)
    bits = narrow.view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(narrow), np.uint16(0x7FFF), nearest.astype(np.uint16))


def to_float16(value: Array) -> Array:
    bits = value.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), bits)


def _halves(bits: Array) -> Array:
    """[N, 2] halves of 32-bit registers, the lower first."""
    return np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2)


def _whole(halves: Array) -> Array:
    return np.ascontiguousarray(halves.astype(np.uint16, copy=False)).view(np.uint32).reshape(-1)


TYPES: dict[str, Type] = {
    **{f"{kind}{8 * size}": _plain(f"{'i' if kind == 's' else 'u'}{size}")
       for kind in "sub" for size in (1, 2, 4, 8)},
    "f32": _plain(np.float32),
    "f64": _plain(np.float64),
    "f16": Type(2, lambda b: b.view(np.float16), to_float16, np.float16),
    "bf16": Type(2, from_bfloat16, to_bfloat16, np.float32),
    # Sums of two bfloat16 numbers are exact in float64 where they are not plain: one rounding.
    "bf16x2": Type(4, lambda b: from_bfloat16(_halves(b)).astype(np.float64),
                   lambda v: _whole(to_bfloat16(v)), np.float64),
    "f16x2": Type(4, lambda b: _halves(b).view(np.float16), lambda v: _whole(to_float16(v)),
                  np.float16),
    "tf32": Type(4, lambda b: (b & np.uint32(0xFFFFE000)).view(np.float32),
                 lambda v: v.view(np.uint32), np.float32),
    "pred": Type(0, lambda b: b, lambda v: v, np.bool_),
}  # fmt: skip
_WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}


# == Memory ========================================================================================


class Span:
    """Bytes that a launch may touch, from an address on."""

    def __init__(self, base: int, size: int) -> None:
        self.base, self.end = base, base + size
        self.first = base - base % 16  # views begin here: any width is aligned with its addresses
        whole = -(-(self.end - self.first) // 16) * 16
        memory = (ctypes.c_uint8 * whole).from_address(self.first)
        self.bytes = np.frombuffer(memoryview(memory), np.uint8)

    def view(self, size: int) -> Array:
        return self.bytes.view(f"u{size}")


class Memory:
    """The spans of a launch. What lies outside all of them is a fault."""

    def __init__(self, spans: Iterable[tuple[int, int]]) -> None:
        self.spans = [Span(*span) for span in sorted(set(spans)) if span[1]]
        self.bases = [span.base for span in self.spans]

    def places(self, address: Array, size: int) -> Iterator[tuple[Span, Any]]:
        """The spans that hold `size` bytes from each address, and which addresses are theirs."""
        number = bisect_right(self.bases, int(address.min())) - 1
        span = self.spans[max(number, 0)] if self.spans else None
        if span and span.base <= address.min() and int(address.max()) + size <= span.end:
            yield span, slice(None)
            return
        numbers = np.searchsorted(np.array(self.bases, np.uint64), address, "right") - 1
        ends = np.array([span.end for span in self.spans] + [0], np.uint64)
        outside = (numbers < 0) | (address + np.uint64(size) > ends[numbers])
        if outside.any():
            where = int(address[outside][0])
            raise Fault(f"{size} bytes at {where:#x} are outside of every operand")
        for number in np.unique(numbers):
            yield self.spans[number], numbers == number


# == A run =========================================================================================


@dataclass
class Run:
    """The state of a group of programs: registers, shared memory, which lanes are active."""

    threads: int
    programs: Array  # numbers of those that run
    grid: tuple[int, int, int]
    parameters: dict[str, bytes]
    memory: Memory
    shared_bytes: int
    symbols: dict[str, int]
    registers: dict[str, Array] = field(default_factory=dict)
    undefined: dict[str, Array] = field(default_factory=dict)  # lanes with values never written
    carried: Array | None = None  # in `carrying` steps: lanes of the result made of such values
    active: Array | None = None  # None: all lanes
    flights: list[dict[str, Array]] = field(default_factory=lambda: [{}])  # see `wgmma`

    def __post_init__(self) -> None:
        self.lanes = self.threads * len(self.programs)
        self.exited = np.zeros(self.lanes, bool)
        self.pitch = -(-self.shared_bytes // 1024) * 1024
        # Nothing was written yet: NaN in every float format.
        self.shared = np.full(self.pitch * len(self.programs), 0xFF, np.uint8)
        lane = np.arange(self.lanes)
        self.thread = (lane % self.threads).astype(np.uint32)
        self.lane_in_warp = lane % WARP
        self.shared_offset = lane // self.threads * self.pitch

    # -- registers --

    def read(self, name: str) -> Array:
        value = self.registers.get(name)
        if value is None:
            if self.carried is None:
                raise Fault(f"{name} was never written")
            self.carried = np.ones(1, bool)
            return np.zeros(1, bool if name.startswith("%p") else f"u{_width(name)}")
        if self.undefined and name in self.undefined:
            never = self.undefined[name]
            if self.carried is not None:
                self.carried = self.carried | never
            elif (never if self.active is None else never & self.active).any():
                raise Fault(f"{name} was never written in some lanes that use it")
        return value

    def write(self, name: str, bits: Array) -> None:
        """Into the active lanes of a register."""
        if name == "_":
            return
        never = self.carried
        if self.active is not None:
            old, before = self.registers.get(name), self.undefined.get(name, False)
            if old is None:
                before = True
            else:
                bits = np.where(self.active, bits, old)
            never = np.where(self.active, False if never is None else never, before)
        self.registers[name] = bits
        if never is not None and never.any():
            self.undefined[name] = never
        elif self.undefined:
            self.undefined.pop(name, None)

    def full(self, value: Array) -> Array:
        """One element a lane."""
        return value if len(value) == self.lanes else np.broadcast_to(value, (self.lanes,))

    def chosen(self, value: Array) -> Array:
        """Of the active lanes."""
        return value if self.active is None else self.full(value)[self.active]

    def spread(self, value: Array) -> Array:
        """What was made of `chosen` values, at their lanes; the others are of no account."""
        if self.active is None:
            return value
        result = np.zeros(self.lanes, value.dtype)
        result[self.active] = value
        return result

    # -- warps --

    def together(self, group: int, what: str) -> None:
        """A fault unless the active lanes are whole groups, lanes aside that have returned."""
        if self.active is None:
            return
        active = self.active.reshape(-1, group)
        there = active | self.exited.reshape(-1, group)
        if (active.any(1) & ~there.all(1)).any():
            raise Fault(f"lanes of {what} have parted")

    def by_warp(self, value: Array) -> Array:
        return self.full(value).reshape(-1, WARP)

    # -- memory --

    def shared_places(self, address: Array, size: int) -> Array:
        """Byte offsets into the programs' shared memory of the active lanes' addresses."""
        offset = self.chosen(self.full(address.astype(np.int64) - SHARED_BASE))
        outside = (offset < 0) | (offset + size > self.shared_bytes)
        if outside.any():
            where = int(offset[outside][0])
            raise Fault(
                f"{size} bytes at {where} of a program's {self.shared_bytes} of shared memory"
            )
        self.aligned(offset, size)
        return offset + self.chosen(self.shared_offset)

    @staticmethod
    def aligned(address: Array, size: int) -> None:
        off = address & type(address.flat[0])(size - 1)
        if off.any():
            where = int(address[off != 0].flat[0])
            raise Fault(f"{size} bytes at {where:#x} are misaligned")

    def load(self, space: str, address: Array, size: int, count: int) -> list[Array]:
        """`count` neighbours of `size` bytes for each active lane."""
        whole = size * count
        if space == "shared":
            places = self.shared_places(address, whole) // size
            view = self.shared.view(f"u{size}")
            return [self.spread(view[places + i]) for i in range(count)]
        address = self.chosen(address)
        self.aligned(address, whole)
        loaded = np.empty((count, len(address)), f"u{size}")
        for span, which in self.memory.places(address, whole):
            view, places = span.view(size), (address[which] - np.uint64(span.first)) // size
            for i in range(count):
                loaded[i, which] = view[places.astype(np.int64) + i]
        return [self.spread(values) for values in loaded]

    def store(self, space: str, address: Array, size: int, values: list[Array]) -> None:
        whole, values = size * len(values), [self.chosen(self.full(v)) for v in values]
        if space == "shared":
            places = self.shared_places(address, whole) // size
            view = self.shared.view(f"u{size}")
            for i, value in enumerate(values):
                view[places + i] = value
            return
        address = self.chosen(self.full(address))
        self.aligned(address, whole)
        for span, which in self.memory.places(address, whole):
            view, places = span.view(size), (address[which] - np.uint64(span.first)) // size
            for i, value in enumerate(values):
                view[places.astype(np.int64) + i] = value[which]


# == Operands ======================================================================================

SPECIAL: dict[str, Callable[[Run], Array]] = {
    "%tid.x": lambda run: run.thread,
    "%tid.y": lambda run: np.zeros(1, np.uint32),
    "%tid.z": lambda run: np.zeros(1, np.uint32),
    "%ntid.x": lambda run: np.full(1, run.threads, np.uint32),
    "%laneid": lambda run: run.lane_in_warp.astype(np.uint32),
    "%ctaid.x": lambda run: _of_program(run, run.programs % run.grid[0]),
    "%ctaid.y": lambda run: _of_program(run, run.programs // run.grid[0] % run.grid[1]),
    "%ctaid.z": lambda run: _of_program(run, run.programs // (run.grid[0] * run.grid[1])),
    **{f"%nctaid.{axis}": lambda run, i=i: np.full(1, run.grid[i], np.uint32)
       for i, axis in enumerate("xyz")},
}  # fmt: skip
Reader = Callable[[Run], Array]
_ADDRESS = re.compile(r"\[\s*([%$\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


def _of_program(run: Run, numbers: Array) -> Array:
    numbers = numbers.astype(np.uint32)
    return numbers if len(numbers) == 1 else np.repeat(numbers, run.threads)


def _immediate(text: str, kind: str) -> Array | None:
    """A number in the code, as bits of that type."""
    if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
        return np.array([int(text[2:], 16)], "u4" if text[1] in "fF" else "u8")
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        number = int(text.rstrip("U"), 0)
        if kind == "pred":
            return np.array([number != 0])
        size = TYPES[kind].bytes
        return np.array([number & ((1 << 8 * size) - 1)], f"u{size}")
    return None


@cache
def bits_reader(text: str, kind: str) -> Reader:
    """Reads an operand's bits: a register, a number, a symbol or a special register."""
    number = _immediate(text, kind)
    if number is not None:
        return lambda run: number
    if text in SPECIAL:
        return SPECIAL[text]
    if text.startswith("%") or kind == "pred":
        return lambda run: run.read(text)

    def symbol(run: Run) -> Array:
        if text not in run.symbols:
            raise Fault(f"{text} is not known")
        return np.array([run.symbols[text]], f"u{TYPES[kind].bytes}")

    return symbol


@cache
def reader(text: str, kind: str) -> Reader:
    """Reads an operand as numbers of a type; "!" negates a predicate."""
    if text.startswith("!"):
        inner = bits_reader(text[1:], "pred")
        return lambda run: ~inner(run)
    bits, (size, decode, _, _) = bits_reader(text, kind), TYPES[kind]

    def read(run: Run) -> Array:
        value = bits(run)
        if size and value.itemsize != size:
            raise Fault(f"{text} has {value.itemsize} bytes, not a {kind}'s")
        return decode(value)

    return read


@cache
def address_reader(text: str) -> Reader:
    """Reads an address in brackets, as uint64."""
    found = _ADDRESS.fullmatch(text)
    if not found:
        raise Fault(f"the address {text} is not known")
    name, offset = found[1], int(found[2] or "0", 0)
    base = bits_reader(name, "b64")

    def read(run: Run) -> Array:
        value = base(run).astype(np.uint64, copy=False)
        return value + np.uint64(offset & (2**64 - 1)) if offset else value

    return read


def vector(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{} ").split(",")]


# == The two tables ================================================================================


class Instruction(NamedTuple):
    text: str
    name: str  # without the types at its end
    types: tuple[str, ...]
    operands: tuple[str, ...]
    guard: str = ""  # a predicate, perhaps with "!"


Step = Callable[[Run], None]
Maker = Callable[[Instruction], Step]
INSTRUCTIONS: dict[str, Maker] = {}


def machine(*names: str) -> Callable[[Maker], Maker]:
    """Registers a function that makes of an instruction what it does to a run."""

    def register(make: Maker) -> Maker:
        INSTRUCTIONS.update(dict.fromkeys(names, make))
        return make

    return register


def carrying(step: Step) -> Step:
    """A step that may meet values never written, and marks its results as such."""

    def carry(run: Run) -> None:
        run.carried = np.zeros(1, bool)
        try:
            step(run)
        finally:
            run.carried = None

    return carry


def pure(names: str, signature: str = "T,T->T") -> Callable[[Callable[..., Array]], Any]:
    """Registers a function of numbers: the instruction writes what it makes of its operands.

    signature: types of the operands and of the result: T is the instruction's last type, D its
    first, W twice as wide as T; else a type by its name.
    """
    sources, result = signature.split("->")

    def register(compute: Callable[..., Array]) -> Any:
        def make(instruction: Instruction) -> Step:
            types = instruction.types or ("pred",)
            known = {"T": types[-1], "D": types[0], "W": _WIDER.get(types[-1], "")}
            kinds = [known.get(kind, kind) for kind in sources.split(",")]
            to, *given = instruction.operands
            if len(given) != len(kinds):
                raise Fault(f"{len(given)} operands, not {len(kinds)}")
            readers = [reader(text, kind) for text, kind in zip(given, kinds, strict=True)]
            encode = TYPES[known.get(result, result)].encode
            return carrying(
                lambda run: run.write(to, encode(compute(*[read(run) for read in readers])))
            )

        INSTRUCTIONS.update(dict.fromkeys(names.split(), make))
        return compute

    return register


# == Arithmetic ====================================================================================

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
    )  # fmt: skip
    product = x * y
    return product, ((x1 * y1 - product) + x1 * y2 + x2 * y1) + x2 * y2


@pure("fma.rn", "T,T,T->T")
def fma(x: Array, y: Array, z: Array) -> Array:
    """x y + z with a single rounding."""
    if x.dtype == np.float32:
        product = x.astype(np.float64) * y.astype(np.float64)  # exact
        return _to_odd(*two_sum(product, z.astype(np.float64))).astype(np.float32)
    high, low = two_product(x, y)
    middle, last = two_sum(z, low)
    total, rest = two_sum(high, middle)
    exact = total + _to_odd(*two_sum(last, rest))
    return np.where(np.isfinite(exact), exact, x * y + z)


_COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
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
for _name, _compare in _COMPARISONS.items():
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


# == Moves and memory ==============================================================================


@machine("mov")
def _mov(instruction: Instruction) -> Step:
    """A register, or one from parts or to parts in braces, the lowest first."""
    (kind,), (to, source) = instruction.types, instruction.operands
    if to.startswith("{"):
        parts, whole = vector(to), bits_reader(source, kind)
        size = TYPES[kind].bytes // len(parts)

        def split(run: Run) -> None:
            value = whole(run)
            for i, part in enumerate(parts):
                run.write(part, (value >> value.dtype.type(8 * size * i)).astype(f"u{size}"))

        return carrying(split)
    if source.startswith("{"):
        parts = vector(source)
        size, wide = TYPES[kind].bytes // len(parts), f"u{TYPES[kind].bytes}"
        readers = [bits_reader(part, f"b{8 * size}") for part in parts]

        def join(run: Run) -> None:
            total = np.zeros(1, wide)
            for i, read in enumerate(readers):
                total = total | read(run).astype(wide) << total.dtype.type(8 * size * i)
            run.write(to, total)

        return carrying(join)
    read = reader(source, f"b{8 * TYPES[kind].bytes}" if kind != "pred" else kind)
    return carrying(lambda run: run.write(to, read(run)))


@machine("ld.param")
def _ld_param(instruction: Instruction) -> Step:
    (kind,), (to, source) = instruction.types, instruction.operands
    name, (size, _, _, dtype) = source.strip("[] "), TYPES[kind]
    wide = _width(to)

    def step(run: Run) -> None:
        value = np.frombuffer(run.parameters[name][:size], dtype)
        run.write(to, value.astype(f"{value.dtype.kind}{wide}").view(f"u{wide}")
                  if wide != size else value.view(f"u{size}"))  # fmt: skip

    return step


def _width(register: str) -> int:
    """Bytes of a register, from its name: PTX may load a narrow type into a wide register."""
    return {"%rd": 8, "%fd": 8, "%rs": 2}.get(register[:3], 4)


def _vectors(name: str) -> list[str]:
    return [name, f"{name}.v2", f"{name}.v4"]


@machine(*_vectors("ld.global"), *_vectors("ld.shared"))
def _ld(instruction: Instruction) -> Step:
    space = instruction.name.split(".")[1]
    size, to = TYPES[instruction.types[0]].bytes, vector(instruction.operands[0])
    if any(_width(register) != size for register in to):
        raise Fault("a load into registers of another width")
    address = address_reader(instruction.operands[1])

    def step(run: Run) -> None:
        for register, value in zip(to, run.load(space, address(run), size, len(to)), strict=True):
            run.write(register, value)

    return step


@machine(*_vectors("st.global"), *_vectors("st.shared"))
def _st(instruction: Instruction) -> Step:
    space, kind = instruction.name.split(".")[1], instruction.types[0]
    size, address = TYPES[kind].bytes, address_reader(instruction.operands[0])
    readers = [bits_reader(text, kind) for text in vector(instruction.operands[1])]

    def step(run: Run) -> None:
        values = [read(run) for read in readers]
        if any(value.itemsize != size for value in values):
            raise Fault("a store from registers of another width")
        run.store(space, address(run), size, values)

    return step


# == Warps =========================================================================================


@machine("bar.sync")
def _bar(instruction: Instruction) -> Step:
    return lambda run: run.together(run.threads, "a program")


@machine("fence.proxy.async.shared::cta", "wgmma.fence.sync.aligned")
def _fence(instruction: Instruction) -> Step:
    """Orders accesses, which are in order here."""
    return lambda run: None


def _shuffle(partner: Callable[[Array, Array, Array, Array], tuple[Array, Any]]) -> Maker:
    def make(instruction: Instruction) -> Step:
        to, *rest = instruction.operands
        to, *flag = to.split("|")
        value, by, clamp, members = (bits_reader(text, "b32") for text in rest)

        def step(run: Run) -> None:
            if (members(run) != 0xFFFFFFFF).any():
                raise Fault("a shuffle among some lanes of a warp is not known")
            run.together(WARP, "a warp")
            lane = np.arange(WARP)
            b, c = (run.by_warp(read(run)).astype(np.int64) for read in (by, clamp))
            segment = c >> 8 & 31
            other, inside = partner(
                lane, b & 31, lane & segment, lane & segment | c & 31 & ~segment
            )
            other = np.where(inside, other, lane)
            if flag:
                run.write(flag[0], np.broadcast_to(inside, other.shape).reshape(-1))
            moved = lambda v: np.take_along_axis(run.by_warp(v), other, 1).reshape(-1)
            move(run, moved)

        def move(run: Run, moved: Callable[[Array], Array]) -> None:
            run.carried = np.zeros(1, bool)
            bits, run.carried = moved(value(run)), moved(run.carried)
            run.write(to, bits)
            run.carried = None

        return step

    return make


def _shuffled_from(lane: Array, b: Array, least: Array, most: Array) -> tuple[Array, Any]:
    other = least | b
    return other, other <= most


machine("shfl.sync.idx")(_shuffle(_shuffled_from))
machine("shfl.sync.bfly")(_shuffle(lambda lane, b, least, most: (lane ^ b, lane ^ b <= most)))
machine("shfl.sync.up")(_shuffle(lambda lane, b, least, most: (lane - b, lane - b >= most)))
machine("shfl.sync.down")(_shuffle(lambda lane, b, least, most: (lane + b, lane + b <= most)))


def _matrix_rows(run: Run, address: Array, count: int) -> Array:
    """Where the rows of 8 x 8 matrices of 16 bits lie: [warps, count, 8], in units of 16 bits."""
    run.together(WARP, "a warp")
    active = run.active
    if active is not None:
        run.active = active & (run.lane_in_warp < 8 * count)
        places = run.shared_places(address, 16).reshape(-1, 8 * count)
        run.active = active
    else:
        places = run.shared_places(run.full(address), 16).reshape(-1, WARP)[:, : 8 * count]
    return places.reshape(-1, count, 8) // 2


_MATRICES = [f"{load}.sync.aligned.m8n8.x{n}{trans}.shared" for load in ("ldmatrix", "stmatrix")
             for n in (1, 2, 4) for trans in ("", ".trans")]  # fmt: skip


@machine(*_MATRICES)
def _matrices(instruction: Instruction) -> Step:
    """8 x 8 matrices of 16 bits: lane 4 i + j holds row i, columns 2 j and 2 j + 1 of each."""
    load, trans = instruction.name.startswith("ld"), ".trans" in instruction.name
    first, second = instruction.operands
    named, at = (first, second) if load else (second, first)
    registers, address = vector(named), address_reader(at)

    def load_them(run: Run) -> None:
        rows = _matrix_rows(run, address(run), len(registers))
        values = run.shared.view(np.uint16)[rows[..., None] + np.arange(8)]
        values = values.swapaxes(-1, -2) if trans else values
        for i, register in enumerate(registers):
            run.write(register, run.spread(_whole(values[:, i].reshape(-1, 2))))

    def store_them(run: Run) -> None:
        rows = _matrix_rows(run, address(run), len(registers))
        for i, register in enumerate(registers):
            values = _halves(run.chosen(run.full(run.read(register)))).reshape(-1, 8, 8)
            values = values.swapaxes(-1, -2) if trans else values
            run.shared.view(np.uint16)[rows[:, i, :, None] + np.arange(8)] = values

    return load_them if load else store_them


# == Tensor cores ==================================================================================
# Products of bfloat16, float16 and tf32 numbers are exact in float64. They are summed there, with
# the accumulator, and rounded once.


def _numbers(run: Run, names: Sequence[str], kind: str) -> Array:
    """Registers as [registers, warps, 8, 4, numbers in a register]: lane 4 i + j at i, j."""
    bits = np.stack([run.full(run.read(name)) for name in names])
    packed = {"bf16": "bf16x2", "f16": "f16x2"}.get(kind, kind)
    values = TYPES[packed].decode(bits.reshape(-1)).astype(np.float64)
    return values.reshape(len(names), -1, 8, 4, values.size // bits.size)


def _left(values: Array, rows: int = 16) -> Array:
    """A [., rows, K] of its registers; rows beyond 16 are those of the next warps."""
    registers, warps, _, _, packed = values.shape
    values = values.reshape(registers // 2, 2, warps, 8, 4, packed)
    columns = registers // 2 * 4 * packed
    return values.transpose(2, 1, 3, 0, 4, 5).reshape(-1, rows, columns)


def _right(values: Array) -> Array:
    """B [warps, K, 8] of its registers."""
    registers, warps, _, _, packed = values.shape
    return values.transpose(1, 0, 3, 4, 2).reshape(warps, registers * 4 * packed, 8)


def _sums(run: Run, names: Sequence[str], rows: int = 16) -> Array:
    """The accumulator [., rows, N] of its registers."""
    bits = np.stack([run.full(run.read(name)) for name in names])
    values = bits.view(np.float32).reshape(len(names) // 4, 2, 2, -1, 8, 4)
    columns = len(names) // 4 * 8
    return values.transpose(3, 1, 4, 0, 5, 2).reshape(-1, rows, columns)


def _to_registers(sums: Array) -> list[Array]:
    """What `_sums` undoes."""
    blocks = sums.shape[-1] // 8
    values = sums.reshape(-1, 2, 8, blocks, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return [bits.reshape(-1) for bits in values.reshape(4 * blocks, -1).view(np.uint32)]


def _multiplied(left: Array, right: Array, sums: Array | float) -> Array:
    return (np.matmul(left, right) + sums).astype(np.float32)


@machine(
    "mma.sync.aligned.m16n8k4.row.col", "mma.sync.aligned.m16n8k8.row.col",
    "mma.sync.aligned.m16n8k16.row.col",
)  # fmt: skip
def _mma(instruction: Instruction) -> Step:
    to, a, b, c = map(vector, instruction.operands)
    result, left, right, accumulator = instruction.types
    if (result, accumulator, left) != ("f32", "f32", right) or left not in ("tf32", "bf16", "f16"):
        raise Fault("a product of these types is not known")

    def step(run: Run) -> None:
        run.together(WARP, "a warp")
        product = _multiplied(
            _left(_numbers(run, a, left)), _right(_numbers(run, b, right)), _sums(run, c)
        )
        for register, bits in zip(to, _to_registers(product), strict=True):
            run.write(register, bits)

    return step


_SWIZZLES = {1: 128, 2: 64, 3: 32}  # bytes, by a descriptor's last two bits


def _described(run: Run, descriptor: Array, rows: int, k: int, size: int, across: bool) -> Array:
    """A matrix in shared memory by its descriptor, as bits [warp groups, rows, k].

    across: k is not what runs along memory. A line of `swizzle` bytes is an eighth of a tile; in
    it the pieces of 16 bytes change places, by bits 7 to 9 of their address.
    """
    first = run.full(descriptor).reshape(-1, WARP_GROUP)
    if (first != first[:, :1]).any():
        raise Fault("the lanes of a warp group differ in their descriptor")
    parts = first[:, 0]
    start, leading, stride = (
        ((parts >> np.uint64(shift)) & np.uint64(0x3FFF)).astype(np.int64) * 16
        for shift in (0, 16, 32)
    )
    kinds = {int(kind) for kind in parts >> np.uint64(62)}
    if len(kinds) != 1 or not kinds <= _SWIZZLES.keys() or ((parts >> np.uint64(49)) & 7).any():
        raise Fault("a matrix descriptor without swizzle, or with an offset, is not known")
    swizzle = _SWIZZLES[kinds.pop()]
    lines, along = np.arange(rows)[:, None], np.arange(k)[None, :] * size
    if across:
        lines, along = np.arange(k)[None, :], np.arange(rows)[:, None] * size
    elif k * size > swizzle:
        raise Fault("a matrix wider than its swizzle is not known")
    groups = lambda value: value[:, None, None]
    at = groups(start) + lines // 8 * groups(stride) + lines % 8 * swizzle
    at = at + along // swizzle * groups(leading) + along % swizzle
    at ^= (at >> 7 & (swizzle // 16 - 1)) << 4
    offset = at - SHARED_BASE
    if (offset < 0).any() or (offset + size > run.shared_bytes).any():
        raise Fault("a matrix descriptor reaches outside of a program's shared memory")
    programs = np.arange(len(parts)) * WARP_GROUP // run.threads
    return run.shared.view(f"u{size}")[(offset + groups(programs * run.pitch)) // size]


@machine(*(f"wgmma.mma_async.sync.aligned.m64n{8 * n}k{k}" for n in range(1, 33) for k in (8, 16)))
def _wgmma(instruction: Instruction) -> Step:
    """A warp group's product. Its result is in flight: a register holds it after a wait."""
    accumulator, left, right = instruction.types
    to, a, b, scale, *signs = instruction.operands
    names, trans = vector(to), [sign == "1" for sign in signs[2:]] or [False, False]
    if accumulator != "f32" or left != right or signs[:2] != ["1", "1"]:
        raise Fault("a product of these types or signs is not known")
    columns, k = map(int, re.findall(r"n(\d+)k(\d+)", instruction.name)[0])
    size = TYPES[left].bytes
    if a.startswith("{"):  # of A in registers nothing can be transposed
        trans = trans if len(trans) == 2 else [False, *trans]
    keep, b_reader = reader(scale, "pred"), bits_reader(b, "b64")
    a_reader = None if a.startswith("{") else bits_reader(a, "b64")

    def matrix(run: Run, read: Reader, rows: int, across: bool) -> Array:
        bits = _described(run, read(run), rows, k, size, across)
        return TYPES[left].decode(np.ascontiguousarray(bits)).astype(np.float64)

    def step(run: Run) -> None:
        if run.active is not None or run.threads % WARP_GROUP:
            raise Fault("lanes of a warp group have parted")
        if a_reader is None:
            first = _left(_numbers(run, vector(a), left), 64)
        else:
            first = matrix(run, a_reader, 64, trans[0])
        second = matrix(run, b_reader, columns, trans[1]).swapaxes(-1, -2)
        kept = keep(run)
        if kept.any() != kept.all():
            raise Fault("lanes differ in whether the accumulator counts")
        sums: Array | float = 0.0
        if kept.all():
            for flight in run.flights:  # a product may follow another without a wait
                run.registers.update({n: flight.pop(n) for n in names if n in flight})
            sums = _sums(run, names, 64)
        bits = _to_registers(_multiplied(first, second, sums))
        for name in names:  # nobody may read them
            run.registers.pop(name, None)
            for flight in run.flights:
                flight.pop(name, None)
        run.flights[-1].update(zip(names, bits, strict=True))

    return step


@machine("wgmma.commit_group.sync.aligned")
def _commit(instruction: Instruction) -> Step:
    return lambda run: run.flights.append({})


@machine("wgmma.wait_group.sync.aligned")
def _wait(instruction: Instruction) -> Step:
    pending = int(instruction.operands[0])

    def step(run: Run) -> None:
        *committed, last = run.flights
        landed = committed[: len(committed) - pending] if pending else committed
        for flight in landed:
            run.registers.update(flight)
        run.flights = [*committed[len(landed) :], last]

    return step


# == Programs ======================================================================================


class Block(NamedTuple):
    """Instructions without a branch among them."""

    steps: list[tuple[str, Step]]
    jump: Instruction | None  # a branch or a return at its end


@dataclass(frozen=True)
class Code:
    """A kernel's text, decoded: blocks in the order of the code."""

    name: str
    threads: int
    parameters: tuple[str, ...]
    blocks: list[Block]
    labels: dict[str, int]


_STATEMENT = re.compile(r"(?:@(!?[%\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]\s]+")
_IGNORED = (".reg", ".pragma", ".loc", ".file", ".extern", ".shared")


def decode(text: str) -> Iterator[Instruction | str]:
    """Instructions and labels of a kernel's body."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    text = re.sub(r"^\s*\.loc[^\n]*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\s*([$\w]+):(?!:)", r"\1:;", text, flags=re.MULTILINE)
    for statement in text.split(";"):
        statement = " ".join(statement.split()).lstrip("{} ").rstrip()
        if statement.endswith(":"):
            yield statement[:-1]
        elif statement and not statement.startswith(_IGNORED):
            found = _STATEMENT.fullmatch(statement)
            if not found:
                raise Fault(f"{statement!r} is not known")
            guard, name, operands = found.groups()
            parts = name.split(".")
            types: list[str] = []
            while parts[1:] and parts[-1] in TYPES:
                types.insert(0, parts.pop())
            name = ".".join(parts)
            if name == "cvt.rn" and types[0].endswith("x2"):
                name = "cvt.rn.pair"
            yield Instruction(
                statement, name, tuple(types), tuple(_OPERAND.findall(operands)), guard or ""
            )


def _step_of(instruction: Instruction) -> Step:
    make = INSTRUCTIONS.get(instruction.name)
    if make is None:
        raise Fault(f"the instruction {instruction.name} is not known")
    step = make(instruction)
    if not instruction.guard:
        return step
    guard = reader(instruction.guard, "pred")

    def guarded(run: Run) -> None:
        outer, mask = run.active, guard(run)
        if outer is not None:
            mask = mask & outer
        if mask.any():
            run.active = None if mask.all() else run.full(mask)
            step(run)
            run.active = outer

    return guarded


def parse(text: str) -> Code:
    """A kernel's code. Raises Fault for an instruction that is not known."""
    head = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)(.*?)\{", text, re.DOTALL)
    if not head:
        raise Fault("the text has no kernel")
    threads = re.search(r"\.reqntid\s+(\d+)", head[3])
    if not threads:
        raise Fault("the kernel does not say how many threads a program has (.reqntid)")
    body = text[head.end() : text.index("\n}", head.end())]
    statements = list(decode(body))
    targets = {
        s.operands[0] for s in statements if isinstance(s, Instruction) and s.name.startswith("bra")
    }
    blocks, labels = [Block([], None)], {}
    for statement in statements:
        if isinstance(statement, str):
            if statement in targets:
                blocks.append(Block([], None))
                labels[statement] = len(blocks) - 1
        elif statement.name in ("bra", "bra.uni", "ret"):
            blocks[-1] = blocks[-1]._replace(jump=statement)
            blocks.append(Block([], None))
        else:
            try:
                blocks[-1].steps.append((statement.text, _step_of(statement)))
            except Fault as fault:
                raise Fault(f"{head[1]}: {statement.text}: {fault}") from None
    names = tuple(re.findall(r"(\w+)\s*(?:,|$)", head[2].strip()))
    return Code(head[1], int(threads[1]), names, blocks, labels)


class Program:
    """A kernel, ready to run."""

    def __init__(self, text: str) -> None:
        self.code = parse(text)

    def run(
        self,
        grid: tuple[int, int, int],
        parameters: Sequence[bytes],
        memory: Iterable[tuple[int, int]],
        shared: int = 0,
    ) -> None:
        """All programs of a grid.

        parameters: each as its bytes; memory: addresses and sizes of what may be touched; shared:
        bytes of shared memory. Raises Fault naming kernel and instruction.
        """
        code = self.code
        if len(parameters) != len(code.parameters):
            raise Fault(
                f"{code.name} takes {len(code.parameters)} parameters, not {len(parameters)}"
            )
        count, group = grid[0] * grid[1] * grid[2], max(1, LANES // code.threads)
        known, spans = dict(zip(code.parameters, parameters, strict=True)), Memory(memory)
        with np.errstate(all="ignore"):
            for first in range(0, count, group):
                programs = np.arange(first, min(first + group, count))
                _execute(
                    code,
                    Run(code.threads, programs, grid, known, spans, shared,
                        {"global_smem": SHARED_BASE}),
                )  # fmt: skip


def _execute(code: Code, run: Run) -> None:
    waiting: dict[int, Array | None] = {0: None}  # lanes at the start of a block; None: all

    def join(block: int, mask: Array | None) -> None:
        if mask is None or mask.any():
            there = waiting.get(block, False)
            mask = None if mask is None or there is None else mask | there
            waiting[block] = None if mask is None or mask.all() else mask

    while waiting:
        here = min(waiting)
        run.active = mask = waiting.pop(here)
        if here == len(code.blocks):
            break
        block = code.blocks[here]
        text = block.jump.text if block.jump else ""
        try:
            for text, step in block.steps:  # noqa: B007
                step(run)
            if block.jump is None:
                if here + 1 < len(code.blocks):
                    join(here + 1, mask)
                continue
            text = block.jump.text
            go = mask
            if block.jump.guard:
                taken = run.full(reader(block.jump.guard, "pred")(run))
                go, stay = (taken, ~taken) if mask is None else (taken & mask, ~taken & mask)
                join(here + 1, stay)
            if block.jump.name == "ret":
                run.exited |= True if go is None else go
            else:
                join(code.labels[block.jump.operands[0]], go)
        except Fault as fault:
            raise Fault(f"{code.name}: {text}: {fault}") from None
