"""A program's loop as one replay, recorded at the first call of its kind."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastdiff.capture import Loop, LoopCache, NotCapturable, cache_of, captures, leaf_key, modes
from fastdiff.execution.program import AfterStage, Program
from fastdiff.execution.run import Inputs, Run
from fastdiff.execution.table import StageTable, Table

WHOLE_LOOP_CALLS = 16  # beyond, a graph of the whole loop costs more to record than it saves


class Replay:
    """What stands in for `Program.stepwise` where loops may be captured.

    mode: "auto", "always" or "never", as of the sampler; key: called before each replay.
    Raises ValueError for another mode.
    """

    def __init__(self, mode: str, key: Callable[[], Hashable] | None) -> None:
        captures(mode, torch.device("cpu"))  # Raise on an unknown mode now, not at the first call.
        self.mode, self.key = mode, key

    def serves(self, program: Program, device: torch.device) -> bool:
        """Whether a call on this device may be a replay."""
        # Of another callable than a module nobody knows which weights it reads.
        known = self.mode == "always" or program.parameter is not None
        return known and captures(self.mode, device)

    def run(self, program: Program, inputs: Inputs, after: AfterStage | None) -> Tensor | None:
        """A copy of the result; None where this call goes stepwise, and `routed` counts why.

        The loop is replayed whole, or by the stage: for callbacks, and for loops of many calls.
        Whatever a recording meets, the call goes on stepwise; once `after` was called it does not,
        since that would tell it everything twice.
        """
        device, cache = inputs.noise.device, cache_of(program.denoiser)
        with cache.turn(device, pauses=after is not None) as mine:
            if not mine:
                program.routed["stepwise, another loop is between two of its stages"] += 1
                return None
            table = self._table(program, inputs, after)
            if table is None:
                return None
            key, told = None, False
            try:
                leaves, spec = tree_flatten(inputs)
                key = self._key(program, cache, table, leaves, spec)
                loop = cache.find(key)
                if loop is None:
                    loop = _recorded(program, cache, key, table, leaves, spec)
                if isinstance(loop, str):
                    program.routed[f"stepwise, {loop}"] += 1
                    return None
                if not isinstance(table, StageTable):
                    return loop.start(leaves, table.buffers).clone()
                slots = list(loop.start(leaves, table.numbers[:1]).unbind(0))
                for number, numbers in enumerate(table.numbers[1:], 1):
                    loop.stage(number - 1, [numbers])
                    if after is not None:
                        told = True
                        after(number, slots)
                return slots[program.tableau.result].clone()
            except Exception as error:
                if told:
                    raise
                program.routed[f"stepwise, {cache.give_up(key, error)}"] += 1
                return None

    def _table(self, program: Program, inputs: Inputs, after: AfterStage | None) -> Table | None:
        """The numbers that are copied into a recording: of all stages, or of one at a time."""
        device = inputs.noise.device
        if after is None and program.tableau.nfe <= WHOLE_LOOP_CALLS:
            return program.table(device)
        apart = {
            "a mask": inputs.mask,
            "stage_noise": inputs.stage_noise,
            "dynamic_threshold": program.dynamic_threshold,
        }
        try:
            for name, value in apart.items():
                if value is not None:
                    raise NotCapturable(f"{name} works on each stage in its own way")
            return program.stage_table(device)
        except NotCapturable as reason:
            if after is None:
                return program.table(device)
            program.routed[f"stepwise for the callback or progress bar: {reason}"] += 1
            return None

    def _key(
        self, program: Program, cache: LoopCache, table: Table, leaves: list[Any], spec: Any
    ) -> Hashable:
        """Everything that a recorded loop fixes."""
        extra = None if self.key is None else self.key()
        network = cache.network.look(adapters=extra is not None)
        call = tuple(leaf_key(leaf) for leaf in leaves)
        program_ = table.structure, program.dtype, program.dynamic_threshold
        return program_, spec, call, network, extra, modes(leaves[0].device)


def ready(program: Program, inputs: Inputs) -> Inputs:
    """The arguments of a run with all that the host has to do for them done."""
    device, stages = inputs.noise.device, program.tableau.stages
    scale, seeds, noises = inputs.guidance_scale, inputs.seeds, inputs.stage_noise
    if scale is not None:
        scale = torch.as_tensor(scale, dtype=program.dtype, device=device)
    if noises is not None:
        wanted = sum(stage.is_stochastic for stage in stages)
        noises = [noise.to(device) for noise in islice(noises, wanted)]
    mask = None if inputs.mask is None else inputs.mask.to(device)
    uncond = inputs.uncond and _onto(inputs.uncond, inputs.conditioning)
    if not program.tableau.stochastic:
        seeds = noises = None
    elif seeds is None and noises is None:
        seeds = torch.randint(2**62, (len(inputs.noise),)).to(device)
    return inputs._replace(
        guidance_scale=scale, seeds=seeds, stage_noise=noises, mask=mask, uncond=uncond
    )


def _recorded(
    program: Program, cache: LoopCache, key: Hashable, table: Table, leaves: list[Any], spec: Any
) -> Loop:
    """A loop over buffers and a table of its own, for calls of this key."""
    device = leaves[0].device
    weights = cache.network.weights()
    with torch.inference_mode(False):
        staged = isinstance(table, StageTable)
        own = program.new_stage_table(device) if staged else program.new_table(device)
    if not isinstance(own, StageTable):
        body = lambda static: program.stepwise(tree_unflatten(static, spec), own)
        make = lambda place: Loop(body, leaves, own.buffers, weights, device, place)
        return cache.record(key, device, make)
    run: Run

    def start(static: list[Any]) -> Tensor:
        nonlocal run
        run = program.run(tree_unflatten(static, spec), own)
        run.launch(0, None)
        return run.stepper.slots

    def stage(number: int) -> Tensor:
        run.read_times()
        run.launch(number, run.evaluate(number))
        return run.stepper.slots

    turns = [(partial(stage, i), own.numbers[i : i + 1]) for i in range(1, own.period + 1)]
    make = lambda place: Loop(start, leaves, own.numbers[:1], weights, device, place, stages=turns)
    loop = cache.record(key, device, make)
    loop.held += [*run.tensors(), own]
    return loop


def _onto(other: Any, value: Any) -> Any:
    """What stands in for tensors, as tensors like them."""
    if isinstance(value, Tensor):
        return torch.as_tensor(other, dtype=value.dtype, device=value.device)
    if isinstance(value, dict) and isinstance(other, dict):
        return {k: _onto(v, value.get(k)) for k, v in other.items()}
    return other
