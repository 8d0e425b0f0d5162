"""Instructions that move bits: between registers, to memory and back, among the lanes of a warp."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.helpers.ptx.operands import address_reader, bits_reader, reader, vector
from tests.helpers.ptx.run import WARP, Run, register_bytes
from tests.helpers.ptx.tables import Instruction, Maker, Step, carrying, machine
from tests.helpers.ptx.types import TYPES, Array, Fault, halves_of, of_halves

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
    wide = register_bytes(to)

    def step(run: Run) -> None:
        value = np.frombuffer(run.parameters[name][:size], dtype)
        run.write(to, value.astype(f"{value.dtype.kind}{wide}").view(f"u{wide}")
                  if wide != size else value.view(f"u{size}"))  # fmt: skip

    return step


def _vectors(name: str) -> list[str]:
    return [name, f"{name}.v2", f"{name}.v4"]


@machine(*_vectors("ld.global"), *_vectors("ld.shared"))
def _ld(instruction: Instruction) -> Step:
    space = instruction.name.split(".")[1]
    size, to = TYPES[instruction.types[0]].bytes, vector(instruction.operands[0])
    if any(register_bytes(register) != size for register in to):
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
            run.write(register, run.spread(of_halves(values[:, i].reshape(-1, 2))))

    def store_them(run: Run) -> None:
        rows = _matrix_rows(run, address(run), len(registers))
        for i, register in enumerate(registers):
            values = halves_of(run.chosen(run.full(run.read(register)))).reshape(-1, 8, 8)
            values = values.swapaxes(-1, -2) if trans else values
            run.shared.view(np.uint16)[rows[:, i, :, None] + np.arange(8)] = values

    return load_them if load else store_them
