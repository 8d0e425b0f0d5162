"""The two tables of instructions: what computes values, and what else a machine does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.helpers.ptx.operands import reader
from tests.helpers.ptx.run import Run
from tests.helpers.ptx.types import TYPES, WIDER, Array, Fault


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
            known = {"T": types[-1], "D": types[0], "W": WIDER.get(types[-1], "")}
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
