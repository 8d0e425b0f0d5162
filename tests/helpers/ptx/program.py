"""A kernel's text, decoded and run."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from tests.helpers.ptx.operands import reader
from tests.helpers.ptx.run import SHARED_BASE, Memory, Run
from tests.helpers.ptx.tables import INSTRUCTIONS, Instruction, Step
from tests.helpers.ptx.types import TYPES, Array, Fault

LANES = 8192  # that run together: programs are taken in groups, which stay in a cache


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
