"""Products of matrices."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tests.helpers.ptx.operands import Reader, bits_reader, reader, vector
from tests.helpers.ptx.run import SHARED_BASE, WARP, WARP_GROUP, Run
from tests.helpers.ptx.tables import Instruction, Step, machine
from tests.helpers.ptx.types import TYPES, Array, Fault

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
    "mma.sync.aligned.m16n8k4.row.col",
    "mma.sync.aligned.m16n8k8.row.col",
    "mma.sync.aligned.m16n8k16.row.col",
)
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
