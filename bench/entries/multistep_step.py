"""`fastdiff.ops.multistep_step`: the launches of real solver runs, and a copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gates import ON_BOTH, Gate, as_defined, relative_error, same_bits, within
from bench.inputs import step_sizes
from bench.published import plms_step
from bench.registry import Baseline, Call, Case, Entry
from bench.steps import STEPS, Row, Step, flops, moved_bytes, step_of
from fastdiff.ops import multistep_step_ref, multistep_step_unchecked
from fastdiff.ops.constants import READS, WRITES
from fastdiff.ops.row import weights

BF16 = torch.bfloat16
ROWS = {
    "plms": Row("plms"),  # 7 passes: the state, three past outputs and this one; two are kept
    "unipc": Row("unipc"),  # 8: corrector and predictor share an evaluation
    "ddim": Row("ddim"),  # 3
    "plms guided bf16": Row("plms", output=BF16, network_input=BF16, guided=True),
    "ddim stochastic": Row("ddim", (("eta", 1.0),), seeded=True),
    "copy": Row(reads=1, writes=1, output=None),
}


def gate(case: str, step: Step) -> Gate:
    """One launch against its definition in the same dtype and in float64."""
    plain, exact = step.moved(step.slots.device), step.widened()
    step.run()
    multistep_step_ref(*plain)
    multistep_step_ref(*exact)
    same = same_bits(case, step.results, plain.results)
    return as_defined(same, [step.slots], [plain.slots], [exact.slots])


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """Every row over output dtypes, layouts and sizes, then every R x W; and PLMS as diffusers'."""
    step = step_of(ROWS["plms"], (2, 3, 16, 16), device)
    wanted = published([step])(0).clone()
    error = relative_error(step.run(), wanted)
    yield within("the plms row against the published formula", error, 1e-6)
    if device.type != "cpu":
        yield on_both(device)
    shapes = [(2, 3, 31, 33), (3, 4, 16, 16)] + ([] if quick else [(2, 3, 256, 256)])
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    for (name, row), dtype, shape, last in itertools.product(
        ROWS.items(), dtypes, shapes, (False, True)
    ):
        row = replace(row, output=row.output and dtype, network_input=dtype)
        step = step_of(row, shape, device, channels_last=last, per_sample=True)
        case = f"{name} {shape} output {row.output} state {step.slots.dtype}"
        yield gate(case + " channels_last" * last, step)
    shape = (2, 5, 7, 9)
    for r, w, state in itertools.product(READS, WRITES, (torch.float32, torch.float64)):
        row = Row(reads=r, writes=w, seeded=True)
        step = step_of(row, shape, device, dtype=state, per_sample=True)
        yield gate(f"R={r} W={w} {shape} output {row.output} state {state}", step)


def on_both(device: torch.device) -> Gate:
    """The definition of every row on the device and on the CPU, on the same numbers."""
    found, wanted = list[Tensor](), list[Tensor]()
    for row in ROWS.values():
        there = step_of(row, (2, 3, 31, 33), device, per_sample=True)
        here = there.moved(torch.device("cpu"))
        for step, results in ((there, found), (here, wanted)):
            multistep_step_ref(*step)
            results += step.results
    return same_bits(ON_BOTH, found, wanted)


# == Ours and baselines ============================================================================


def launched(steps: Sequence[Step]) -> Call:
    """The launch alone: the slot that holds its result is looked up beforehand."""
    results = [step.slots[step.written[0]] for step in steps]

    def call(i: int) -> Tensor:
        multistep_step_unchecked(*steps[i])
        return results[i]

    return call


def published(steps: Sequence[Step]) -> Call:
    """diffusers' PLMS operations, coefficients ready: bench/published.py."""

    def prepare(step: Step) -> tuple[Any, ...]:
        (first, *_) = weights(step.coefficients, step.reads)
        state, newest = float(first.slots[0]), float(first.output) / (55 / 24)
        x, *past = (step.slots[i] for i in step.read[:4])
        return x, step.output, past, state, -newest, 1.0

    prepared = [prepare(step) for step in steps]
    return lambda i: plms_step(*prepared[i])


def compiled(mode: str, steps: Sequence[Step]) -> Call:
    """torch.compile of the row's definition, in place like ours."""
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
    """A diffusers scheduler in its steady state: each call is one `step`."""

    def make(steps: Sequence[Step]) -> Call:
        import diffusers

        outputs = [step.output for step in steps]
        made = getattr(diffusers, name)(**options)
        sample, times = outputs[0].clone(), iter(())

        def call(i: int) -> Tensor:
            nonlocal sample, times
            time = next(times, None)
            if time is None:  # far more steps than calls, as a rule
                made.set_timesteps(STEPS)
                times = iter(made.timesteps)
                time = next(times)
            sample = made.step(outputs[i], time, sample).prev_sample
            return sample

        for number in range(8):  # its history is full
            call(number % len(outputs))
        return call

    return Baseline(make, "diffusers", capturable=False, agrees=False)


def eager(steps: Sequence[Step]) -> Call:
    """The definition in plain PyTorch."""
    results = [step.slots[step.written[0]] for step in steps]

    def call(i: int) -> Tensor:
        multistep_step_ref(*steps[i])
        return results[i]

    return call


def randn(steps: Sequence[Step]) -> Call:
    """torch's generator alone, for the noise that the launch draws inside."""
    buffers = [torch.empty_like(step.slots[0]) for step in steps]
    return lambda i: buffers[i].normal_()


def copied(steps: Sequence[Step]) -> Call:
    return lambda i: steps[i].slots[1].copy_(steps[i].slots[0])


COMPILED = {
    "torch.compile": Baseline(partial(compiled, "default"), compiles=True),
    "torch.compile max-autotune": Baseline(
        partial(compiled, "max-autotune-no-cudagraphs"), compiles=True, quick=False
    ),
}
BASELINES = {
    "plms": {
        "diffusers PNDM": scheduler("PNDMScheduler", skip_prk_steps=True),
        "published operations": Baseline(published),
        **COMPILED,
    },
    "unipc": {"diffusers UniPC": scheduler("UniPCMultistepScheduler"), **COMPILED},
    "ddim": {"diffusers DDIM": scheduler("DDIMScheduler"), **COMPILED},
    "plms guided bf16": {"reference": Baseline(eager, quick=False)},
    "ddim stochastic": {"torch.randn alone": Baseline(randn, agrees=False)},
    "copy": {"torch copy_": Baseline(copied, agrees=False)},
}


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    for shape, (name, row) in itertools.product(step_sizes(device), ROWS.items()):
        yield Case(
            name,
            shape,
            inputs=lambda i, row=row, shape=shape: step_of(row, shape, device, seed=i),
            ours=launched,
            bytes=moved_bytes(row, shape),
            flops=flops(row, shape),
            baselines=BASELINES[name],
        )


ENTRY = Entry("multistep_step", "op", ("multistep_step",), gates, cases)
