"""A launch under way: what it may touch, and the registers of a group of programs."""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.helpers.ptx.types import Array, Fault

WARP, WARP_GROUP = 32, 128
SHARED_BASE = 1024  # where a program's shared memory begins: the first KiB is the system's


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


def register_bytes(register: str) -> int:
    """From its name: PTX may load a narrow type into a wide register."""
    return {"%rd": 8, "%fd": 8, "%rs": 2}.get(register[:3], 4)


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
            return np.zeros(1, bool if name.startswith("%p") else f"u{register_bytes(name)}")
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
