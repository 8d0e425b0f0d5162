"""`fastdiff.ops.multistep_step`: the launches of real solver runs, and a copy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.baselines import compiled_step, scheduler
from bench.inputs import step_sizes
from bench.published import plms_step
from bench.registry import Baseline, Call, Case, Entry
from bench.steps import Row, Step, flops, moved_bytes, step_of
from fastdiff.ops import multistep_step_ref, multistep_step_unchecked
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


def defined(steps: Sequence[Step]) -> Call:
    """The definition in plain PyTorch."""

    def call(i: int) -> Tensor:
        multistep_step_ref(*steps[i])
        return steps[i].slots[steps[i].written[0]]

    return call


def randn(steps: Sequence[Step]) -> Call:
    """torch's generator alone, for the noise that the launch draws inside."""
    buffers = [torch.empty_like(step.slots[0]) for step in steps]
    return lambda i: buffers[i].normal_()


def copied(steps: Sequence[Step]) -> Call:
    return lambda i: steps[i].slots[1].copy_(steps[i].slots[0])


COMPILED = {
    "torch.compile": Baseline(partial(compiled_step, "default"), compiles=True),
    "torch.compile max-autotune": Baseline(
        partial(compiled_step, "max-autotune-no-cudagraphs"), compiles=True, quick=False
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
    "plms guided bf16": {"reference": Baseline(defined, quick=False)},
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
            definition=defined,
            leaves=lambda step: step.results,
            bytes=moved_bytes(row, shape),
            flops=flops(row, shape),
            baselines=BASELINES[name],
        )


ENTRY = Entry("multistep_step", "op", ("multistep_step",), cases)
