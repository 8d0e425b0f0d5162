"""An instruction's operands, as functions that read them of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import numpy as np

from tests.helpers.ptx.run import Run
from tests.helpers.ptx.types import TYPES, Array, Fault

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
