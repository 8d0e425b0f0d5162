"""What a launch of `multistep_step` is told of one stage: the columns of a row and of an index.

    row    p, q, low, high, input_scale;  for each write: sample, output, noise, slot 0, slot 1, ...
    index  stage, purpose, the slots read, the slots written

With F the network's output and x the first slot read, x0 = clamp(p F + q x, low, high); a write is
the sum of sample * x0, output * F, noise * z and the slots read, each by its factor; the first one
times input_scale is what the network is shown next. This file alone knows the order: ask it for
columns, also of tensors and arrays with rows along their first axis. csrc's header and the Triton
kernel repeat it, and tests compare them with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .constants import READS

STAGE, PURPOSE = 0, 1  # entries of an index; slots follow
INDEX_HEAD = 2


class Head(NamedTuple):
    """What all writes of a row share, [1 or B] each, or numbers."""

    p: Any
    q: Any
    low: Any
    high: Any
    input_scale: Any


class Weights(NamedTuple):
    """The factors of one write, [1 or B] each, or numbers; `slots` has one for each slot read."""

    sample: Any
    output: Any
    noise: Any
    slots: Sequence[Any]


HEAD = len(Head._fields)
EACH = len(Weights._fields) - 1  # columns of a write before its slots


def width(reads: int, writes: int) -> int:
    """Columns of a row."""
    return HEAD + writes * (EACH + reads)


def variant(reads: int) -> int:
    """R, the kernel variant that serves a launch with so many reads."""
    return next(r for r in READS if r >= reads)


def columns(head: Head, writes: Sequence[Weights]) -> list[Any]:
    """A row's entries in their order."""
    entries: list[Any] = [*head]
    for w in writes:
        entries += [w.sample, w.output, w.noise, *w.slots]
    return entries


def head(rows: Any) -> Head:
    """The head of rows [1 or B, K], as views."""
    return Head(*(rows[:, i] for i in range(HEAD)))


def weights(rows: Any, reads: int) -> list[Weights]:
    """The writes of rows [1 or B, K], as views."""
    entries, made = [rows[:, i] for i in range(rows.shape[1])], []
    for start in range(HEAD, len(entries), EACH + reads):
        sample, output, noise, *slots = entries[start : start + EACH + reads]
        made.append(Weights(sample, output, noise, slots))
    return made


def index(stage: int, purpose: int, reads: Sequence[int], writes: Sequence[int]) -> list[int]:
    """An index's entries in their order."""
    return [stage, purpose, *reads, *writes]
