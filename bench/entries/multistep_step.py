"""`fastdiff.ops.multistep_step`: the launches of real solver runs, and a copy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.entries.initial_noise import FLOPS as NOISE_FLOPS
from bench.published import plms_step
from bench.registry import Baseline, Call, Case, Entry, Gate, relative_error
from fastdiff import NoiseSchedule, build_tableau
from fastdiff.ops import allocate_slots, multistep_step_ref, multistep_step_unchecked
from fastdiff.ops.constants import READS, WRITES

STEPS = 1000  # of the runs the launches are taken from: the state hardly changes in one


@dataclass(frozen=True)
class Row:
    """A launch from the middle of a solver's run, its slots as the sampler assigns them.

    Without a solver: `reads` and `writes` slots of their own, random coefficients.
    """

    solver: str = ""
    options: tuple[tuple[str, Any], ...] = ()
    reads: int = 0
    writes: int = 0
    output: torch.dtype | None = torch.float32
    network_input: torch.dtype | None = None
    guided: bool = False
    seeded: bool = False


ROWS = {
    "plms": Row("plms"),  # 7 passes: the state, three past outputs and this one; two are kept
    "unipc": Row("unipc"),  # 8: corrector and predictor share an evaluation
    "ddim": Row("ddim"),  # 3
    "plms guided bf16": Row(
        "plms", output=torch.bfloat16, network_input=torch.bfloat16, guided=True
    ),
    "ddim stochastic": Row("ddim", (("eta", 1.0),), seeded=True),
    "copy": Row(reads=1, writes=1, output=None),
}


class Launch(NamedTuple):
    """The numbers of a launch: coefficients float64 [1, K], index, and how many slots there are."""

    coefficients: Tensor
    index: Tensor
    slots: int
    weights: Tensor  # [W, 3 + R], a view of the coefficients


@cache
def _launch_of(row: Row) -> Launch:
    if row.solver:
        schedule = NoiseSchedule.linear_beta()
        tableau = build_tableau(row.solver, schedule, STEPS, **dict(row.options))
        middle = STEPS // 2
        coefficients = torch.from_numpy(tableau.row(middle))
        index, writes = torch.from_numpy(tableau.index(middle)), len(tableau.stages[middle].writes)
        slots = tableau.slots
    else:
        writes, slots = row.writes, row.reads + row.writes
        index = torch.tensor([1, 0, *range(slots)], dtype=torch.int32)
        random = torch.Generator().manual_seed(0)
        width = 5 + writes * (3 + row.reads)
        coefficients = torch.rand(1, width, generator=random, dtype=torch.float64) + 0.1
        coefficients[:, 2], coefficients[:, 3] = -math.inf, math.inf
    return Launch(coefficients, index, slots, coefficients[0, 5:].view(writes, -1))


class Step(NamedTuple):
    """What `multistep_step_unchecked` takes."""

    slots: Tensor
    output: Tensor | None
    coefficients: Tensor
    index: Tensor
    guidance: Tensor | None
    seeds: Tensor | None
    noise: Tensor | None
    network_input: Tensor | None
    reads: int
    writes: int

    def run(self) -> Tensor:
        """The launch; returns the slot of the first write."""
        multistep_step_unchecked(*self)
        return self.slots[self.first_write]

    def moved(self, device: torch.device) -> Step:
        """A copy on a device."""
        return Step(*(_moved(value, device) for value in self))

    def wrote_as(self, other: Step) -> bool:
        """Whether both wrote the same bits."""
        pairs = [(self.slots, other.slots), (self.network_input, other.network_input)]
        return all(
            torch.equal(one.to(two.device), two)
            for one, two in pairs
            if one is not None and two is not None
        )

    @property
    def first_write(self) -> int:
        return int(self.index[2 + self.reads])


def step_of(
    row: Row,
    shape: tuple[int, ...],
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    per_sample: bool = False,
    seed: int = 0,
) -> Step:
    """The launch of a row at [B, ...], on random tensors."""
    random = torch.Generator(device).manual_seed(seed)
    forward = (2 * shape[0] if row.guided else shape[0], *shape[1:])

    def normal(size: tuple[int, ...], of: torch.dtype) -> Tensor:
        value = torch.randn(size, generator=random, device=device).to(of)
        return value.to(memory_format=torch.channels_last) if channels_last else value

    launch = _launch_of(row)
    writes, reads = len(launch.weights), launch.weights.shape[1] - 3
    rows = shape[0] if per_sample else 1
    slots = allocate_slots(launch.slots, normal(shape, dtype))
    for slot in slots:
        slot.copy_(normal(shape, dtype))
    return Step(
        slots,
        normal(forward, row.output) if row.output else None,
        launch.coefficients.to(dtype).expand(rows, -1).contiguous().to(device),
        launch.index.to(device),
        torch.full((rows,), 3.0, dtype=dtype, device=device) if row.guided else None,
        torch.arange(shape[0], device=device) if row.seeded else None,
        None,
        torch.empty_like(normal(forward, row.network_input)) if row.network_input else None,
        reads,
        writes,
    )


def moved_bytes(row: Row, shape: tuple[int, ...]) -> int:
    """Bytes of one float32 launch: every operand that a coefficient asks for, once."""
    launch = _launch_of(row)
    reads = int((launch.weights[:, 3:] != 0).any(0).sum())
    itemsizes = [t.itemsize for t in (row.output, row.network_input) if t is not None]
    per_element = 4 * (reads + len(launch.weights)) + (1 + row.guided) * sum(itemsizes)
    return per_element * math.prod(shape)


def flops(row: Row, shape: tuple[int, ...]) -> int:
    """Multiplications and additions of the weighted sums, and the noise's operations."""
    sums = 2 * int((_launch_of(row).weights != 0).sum())
    return (sums + NOISE_FLOPS * row.seeded) * math.prod(shape)


# == Correctness ===================================================================================


def gate(step: Step) -> Gate:
    """One launch against the reference in the same dtype (bits) and in float64 (error).

    The float64 error may be twice that of plain PyTorch in the same dtype, plus 1e-6. The reference
    runs on the launch's device, which is quick; a gate of its own holds it to the CPU's.
    """
    plain = step.moved(step.slots.device)
    exact = Step(
        *(
            value.to(torch.float64, copy=True)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for value in plain
        )
    )
    step.run()
    multistep_step_ref(*plain)
    multistep_step_ref(*exact)
    error, allowed = (relative_error(s.slots, exact.slots) for s in (step, plain))
    allowed = 2 * allowed + 1e-6
    same = step.wrote_as(plain)
    return {"bit_equal": same, "error": error, "allowed": allowed, "ok": same and error <= allowed}


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """Every row over output dtypes, layouts and sizes, then every R x W; and PLMS as diffusers'."""
    yield {"case": "the plms row against the published formula", **published_gate(device)}
    if device.type != "cpu":
        yield {"case": "the definition on the device as on the CPU", **definition_gate(device)}
    shapes = [(2, 3, 31, 33), (3, 4, 16, 16)] + ([] if quick else [(2, 3, 256, 256)])
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    cases = [
        (name, replace(row, output=row.output and dtype, network_input=dtype), shape, layout, None)
        for (name, row), dtype, shape, layout in itertools.product(
            ROWS.items(), dtypes, shapes, (False, True)
        )
    ]
    cases += [
        (f"R={r} W={w}", Row(reads=r, writes=w, seeded=True), (2, 5, 7, 9), False, state)
        for r, w in itertools.product(READS, WRITES)
        for state in (torch.float32, torch.float64)
    ]
    for name, row, shape, channels_last, state in cases:
        step = step_of(
            row,
            shape,
            device,
            dtype=state or torch.float32,
            channels_last=channels_last,
            per_sample=True,
        )
        case = f"{name} {shape} output {row.output} state {step.slots.dtype}"
        yield {"case": case + (" channels_last" if channels_last else ""), **gate(step)}


def definition_gate(device: torch.device) -> Gate:
    """The reference on the device and on the CPU, in every row, on the same numbers."""
    same = True
    for row in ROWS.values():
        there = step_of(row, (2, 3, 31, 33), device, per_sample=True)
        here = there.moved(torch.device("cpu"))
        multistep_step_ref(*there)
        multistep_step_ref(*here)
        same = same and there.wrote_as(here)
    return {"bit_equal": same, "ok": same}


def _moved(value: Any, device: torch.device) -> Any:
    """A copy of a tensor on the device, strides kept."""
    if not isinstance(value, Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return copy.copy_(value)


def published_gate(device: torch.device) -> Gate:
    """The plms launch makes what the published list of operations makes of the same tensors."""
    step = step_of(ROWS["plms"], (2, 3, 16, 16), device)
    wanted = published([step])(0).clone()
    error = relative_error(step.run(), wanted)
    return {"error": error, "allowed": 1e-6, "ok": error <= 1e-6}


# == Ours and baselines ============================================================================


def launched(steps: Sequence[Step]) -> Call:
    """The launch alone: the slot that holds its result is looked up beforehand."""
    results = [step.slots[step.first_write] for step in steps]

    def call(i: int) -> Tensor:
        multistep_step_unchecked(*steps[i])
        return results[i]

    return call


def published(steps: Sequence[Step]) -> Call:
    """diffusers' PLMS operations, coefficients ready: bench/published.py."""

    def prepare(step: Step) -> tuple[Any, ...]:
        row = step.coefficients[0].tolist()
        state, newest = row[8], row[6] / (55 / 24)
        x, *past = (step.slots[i] for i in step.index.tolist()[2:6])
        return x, step.output, past, state, -newest, 1.0

    prepared = [prepare(step) for step in steps]
    return lambda i: plms_step(*prepared[i])


def compiled(mode: str) -> Callable[[Sequence[Step]], Call]:
    """torch.compile of the row's definition, in place like ours."""

    def make(steps: Sequence[Step]) -> Call:
        launch = _step_numbers(steps[0])

        def rows(states: list[Tensor], output: Tensor, written: list[Tensor]) -> None:
            new = [
                sum(w * t for w, t in zip(weights, (output, *states), strict=True) if w)
                for weights in launch
            ]
            for slot, value in zip(written, new, strict=True):
                slot.copy_(value)

        fused = torch.compile(rows, mode=mode, fullgraph=True, dynamic=False)

        def prepare(step: Step) -> tuple[Any, ...]:
            # Tensors of their own: for views of one arena Inductor makes copies.
            slots, index = [slot.clone() for slot in step.slots], step.index[2:].tolist()
            read, written = index[: step.reads], index[step.reads :]
            return [slots[i] for i in read], step.output, [slots[i] for i in written]

        prepared = [prepare(step) for step in steps]

        def call(i: int) -> Tensor:
            fused(*prepared[i])
            return prepared[i][2][0]

        return call

    return make


def _step_numbers(step: Step) -> list[list[float]]:
    """For each write its factors of the output and of the slots read, as Python numbers."""
    weights = step.coefficients[0, 5:].view(step.writes, 3 + step.reads).tolist()
    return [[w[1], *w[3:]] for w in weights]


def scheduler(name: str, **options: Any) -> Callable[[Sequence[Step]], Call]:
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

    return make


def eager(steps: Sequence[Step]) -> Call:
    """The definition in plain PyTorch."""

    def call(i: int) -> Tensor:
        multistep_step_ref(*steps[i])
        return steps[i].slots[steps[i].first_write]

    return call


def copied(steps: Sequence[Step]) -> Call:
    """`Tensor.copy_` of a slot to the other."""

    def call(i: int) -> Tensor:
        return steps[i].slots[1].copy_(steps[i].slots[0])

    return call


def randn(steps: Sequence[Step]) -> Call:
    """torch's generator alone, for the noise that the launch draws inside."""
    buffers = [torch.empty_like(step.slots[0]) for step in steps]
    return lambda i: buffers[i].normal_()


def _scheduler(name: str, **options: Any) -> Baseline:
    return Baseline(scheduler(name, **options), "diffusers", capturable=False, agrees=False)


COMPILED = {
    "torch.compile": Baseline(compiled("default"), compiles=True),
    "torch.compile max-autotune": Baseline(
        compiled("max-autotune-no-cudagraphs"), compiles=True, quick=False
    ),
}
BASELINES = {
    "plms": {
        "diffusers PNDM": _scheduler("PNDMScheduler", skip_prk_steps=True),
        "published operations": Baseline(published),
        **COMPILED,
    },
    "unipc": {"diffusers UniPC": _scheduler("UniPCMultistepScheduler"), **COMPILED},
    "ddim": {"diffusers DDIM": _scheduler("DDIMScheduler"), **COMPILED},
    "plms guided bf16": {"reference": Baseline(eager, quick=False)},
    "ddim stochastic": {"torch.randn alone": Baseline(randn, agrees=False)},
    "copy": {"torch copy_": Baseline(copied, agrees=False)},
}


# == Cases =========================================================================================


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    sizes = [(16, 3, 256, 256), (4, 4, 64, 64), (1, 3, 32, 32)]
    if device.type == "cuda":
        sizes = [(64, 4, 512, 512), (16, 4, 128, 128), *sizes]
    for shape, (name, row) in itertools.product(sizes, ROWS.items()):
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
