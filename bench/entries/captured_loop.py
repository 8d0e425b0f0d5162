"""Whole loops of published networks: stepwise, with the network in a graph, and as one graph."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch

from bench.baselines import loop
from bench.cells import Cell
from bench.loops import Graphed, Plain, compiled, plain
from bench.networks import MODELS
from bench.registry import Baseline, Case, Entry

STEPS = 8
BATCHES = (1, 4, 16)

# What is compared, beside ours.
STOCK = "stock loop"
EAGER = "our loop, eager"
GRAPHED = "stock loop, network in a graph"
GRAPHED_COMPILED = "stock loop, compiled network in a graph"
OURS_COMPILED = "fastdiff, compiled network"
AUTO = 'fastdiff, capture="auto"'
STOCK_COMPILED = "stock loop, compiled network"
REPLAYS = "replays of the network alone"
REPLAYS_COMPILED = "replays of the compiled network alone"


def baselines(cell: Cell, batch: int) -> dict[str, Baseline]:
    graph = partial(loop, devices=("cuda",))
    slow = partial(graph, quick=False, compiles=True)
    found = {
        STOCK: loop(partial(cell.stock, plain, Plain, False)),
        EAGER: graph(partial(cell.ours, plain, "never")),
        AUTO: graph(partial(cell.ours, plain, "auto")),
        GRAPHED: graph(partial(cell.stock, plain, Graphed, True)),
        REPLAYS: graph(partial(cell.replays, plain)),
    }
    if batch == 1 or cell.method is cell.model.methods[0]:  # the network is the same in both
        found |= {
            STOCK_COMPILED: slow(partial(cell.stock, compiled, Plain, True)),
            GRAPHED_COMPILED: slow(partial(cell.stock, compiled, Graphed, True)),
            OURS_COMPILED: slow(partial(cell.ours, compiled, "always")),
            REPLAYS_COMPILED: slow(partial(cell.replays, compiled)),
        }
    return found


def cells(device: torch.device, small: bool, steps: int = STEPS) -> Iterator[Cell]:
    """DDIM (EDM's Euler) over every network, then the multistep method."""
    for number, name in itertools.product(range(2), MODELS):
        yield Cell(name, MODELS[name].methods[number], device, small, steps)


def case_of(cell: Cell, batch: int) -> Case:
    """Ours is a replay on a GPU; on the CPU that is a proof and no gain."""
    return Case(
        f"{cell.name}, {cell.method.scheduler.removesuffix('Scheduler')}",
        (batch, *cell.shape),
        inputs=lambda i: cell.noise(i, batch),
        ours=partial(cell.ours, plain, "never" if cell.device.type == "cpu" else "always"),
        definition=partial(cell.stock, plain, Plain, False),
        allowed=1e-5,
        baselines=baselines(cell, batch),
        settings={"steps": cell.steps},
        capturable=False,
        graphs=True,
    )


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """On a GPU; on the CPU only a short walk through. Checked on small networks, in float32."""
    small = device.type == "cpu"
    if small and not quick:
        return
    for batch, cell in itertools.product(BATCHES[:1] if quick else BATCHES, cells(device, small)):
        yield replace(case_of(cell, batch), checked=case_of(replace(cell, small=True, steps=4), 2))


ENTRY = Entry("captured_loop", "loop", (), cases, needs="diffusers")
