"""What is measured: one entry for each op of `fastdiff.ops` and for each loop.

An entry names its cases: of each the inputs, our call, its definition, baselines and bytes. The
harness (measure.py) does the rest the same way for all. To add one: a file in bench/entries/ with
an `ENTRY`, and its name in bench/entries/__init__.py.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .entries import NAMES

Call = Callable[[int], Any]  # one run on the buffers of that number
Maker = Callable[[Sequence[Any]], Call]  # from the sets of buffers to the call


@dataclass(frozen=True)
class Baseline:
    """Another way to what a case computes, in its strongest form.

    Attributes:
        make: from the buffer sets to the call. Imports what it needs.
        needs: the module it comes from; where that is absent the
            baseline is left out and the record says why.
        compiles: whether torch.compile makes it, which takes its time first. On the CPU it is timed
            in a group of its own, beside ours only: compiled code brings a second pool of spinning
            threads there, which would slow down whatever runs after it.
        capturable: whether it can be captured into a CUDA graph (it never reads from the host).
        agrees: whether its result must be ours on the same buffers. A scheduler that keeps its own
            time cannot be held to that.
        devices: the kinds of device it is for.
        quick: whether --quick has time for it.
    """

    make: Maker
    needs: str = ""
    compiles: bool = False
    capturable: bool = True
    agrees: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = True

    def lacks(self, device: torch.device, quick: bool) -> str:
        """Why it cannot be timed here; "" where it can."""
        if device.type not in self.devices:
            return f"for {' and '.join(self.devices)} only"
        if quick and not self.quick:
            return "left out by --quick"
        return absent(self.needs)


@dataclass(frozen=True)
class Case:
    """One way of calling the thing, at one size.

    Attributes:
        row, shape, settings: what is called; together its name.
        inputs: the buffers of one set, a function of their number.
        ours: from the buffer sets to fastdiff's call, which returns its result: tensors.
        definition: the same in plain PyTorch, or by a stock loop; checked before any time.
        allowed: largest difference from it over its largest value; 0 asks for the same bits.
        leaves: what a call writes into its buffers, besides what it returns.
        checked: the case that is checked in this one's place, where the definition takes too long
            at this size.
        bytes: moved to and from memory, every operand once; 0 for loops, whose network moves more.
        flops: arithmetic on image elements.
        capturable: as `Baseline.capturable`.
        graphs: whether calls keep CUDA graphs: their pools are measured, and freed after the case.
    """

    row: str
    shape: tuple[int, ...]
    inputs: Callable[[int], Any]
    ours: Maker
    definition: Maker
    allowed: float = 0
    leaves: Callable[[Any], Sequence[torch.Tensor]] = lambda buffers: ()
    checked: Case | None = None
    bytes: int = 0
    flops: int = 0
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    capturable: bool = True
    graphs: bool = False

    @property
    def name(self) -> str:
        size = "x".join(map(str, self.shape))
        return " ".join([self.row, size, *(f"{k}={v}" for k, v in self.settings.items())])


@dataclass(frozen=True)
class Entry:
    """An op or a loop.

    Attributes:
        name: its name on the command line (--op) and in the JSON.
        kind: "op" or "loop".
        covers: the public names of `fastdiff.ops` that it measures.
        cases: what is timed, in order of worth; fewer of them for --quick.
        needs: the module without which nothing of it runs: then the entry is left out, and the
            record says why.
    """

    name: str
    kind: str
    covers: tuple[str, ...]
    cases: Callable[[torch.device, bool], Iterable[Case]]
    needs: str = ""

    def lacks(self) -> str:
        """Why it cannot be run here; "" where it can."""
        return absent(self.needs)


def absent(module: str) -> str:
    """A sentence where a module of the bench extra is not installed, else ""."""
    if not module or importlib.util.find_spec(module):
        return ""
    return f"{module} is not installed: pip install '.[bench]'"


def entries() -> tuple[Entry, ...]:
    """All entries, in order of worth."""
    return tuple(importlib.import_module(f"bench.entries.{name}").ENTRY for name in NAMES)


def named(name: str) -> Entry:
    return next(entry for entry in entries() if entry.name == name)


def all_cases(device: torch.device, quick: bool) -> Iterator[tuple[str, Entry, Case]]:
    """Every case, with the name of its row in a GPU's record (a CPU's adds the threads)."""
    for entry in entries():
        for case in entry.cases(device, quick):
            yield f"{entry.name} {case.name}", entry, case
