"""How calls and baselines are made: of one set of buffers, compiled, or as a loop's rival."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops.row import weights

from .registry import Baseline, Call, Maker
from .steps import Step


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
# on the same buffers.
loop = functools.partial(Baseline, capturable=False, agrees=False)


def compiled_step(mode: str, steps: Sequence[Step]) -> Call:
    """torch.compile of the definition of a launch of `multistep_step`, in place like ours."""
    launch = [
        [float(factor) for factor in (write.output, *write.slots)]
        for write in weights(steps[0].coefficients, steps[0].reads)
    ]

    def rows(states: list[Tensor], output: Tensor, written: list[Tensor]) -> None:
        new = [
            sum(w * t for w, t in zip(factors, (output, *states), strict=True) if w)
            for factors in launch
        ]
        for slot, value in zip(written, new, strict=True):
            slot.copy_(value)

    fused = torch.compile(rows, mode=mode, fullgraph=True, dynamic=False)

    def prepare(step: Step) -> tuple[Any, ...]:
        # Tensors of their own: for views of one arena Inductor makes copies.
        slots = [slot.clone() for slot in step.slots]
        return [slots[i] for i in step.read], step.output, [slots[i] for i in step.written]

    prepared = [prepare(step) for step in steps]

    def call(i: int) -> Tensor:
        fused(*prepared[i])
        return prepared[i][2][0]

    return call


def scheduler(name: str, **options: Any) -> Baseline:
    """A diffusers scheduler in its steady state: each call is one `step` of many."""

    def make(steps: Sequence[Step]) -> Call:
        import diffusers

        outputs = [step.output for step in steps]
        made = getattr(diffusers, name)(**options)
        sample, times = outputs[0].clone(), iter(())

        def call(i: int) -> Tensor:
            nonlocal sample, times
            time = next(times, None)
            if time is None:  # far more steps than calls, as a rule
                made.set_timesteps(1000)
                times = iter(made.timesteps)
                time = next(times)
            sample = made.step(outputs[i], time, sample).prev_sample
            return sample

        for number in range(8):  # its history is full
            call(number % len(outputs))
        return call

    return Baseline(make, "diffusers", capturable=False, agrees=False)
