"""How calls and baselines are made: of one set of buffers, compiled, or as a loop's rival."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .registry import Baseline, Call, Maker


def each(function: Callable[[Any], Any]) -> Maker:
    """The call that applies a function to one set of buffers."""
    return lambda sets: lambda i: function(sets[i])


def compiled(body: Callable[..., Any], pick: Callable[[Any], Sequence[Any]]) -> Baseline:
    """torch.compile of a body, on what `pick` takes of a set."""

    def make(sets: Sequence[Any]) -> Call:
        fused = torch.compile(body, fullgraph=True, dynamic=False)
        return lambda i: fused(*pick(sets[i]))

    return Baseline(make, compiles=True)


# Of a loop: it reads from the host, and a scheduler that keeps its own time need not agree with us
# on the same buffers; the entry has a gate instead.
loop = functools.partial(Baseline, capturable=False, agrees=False)
