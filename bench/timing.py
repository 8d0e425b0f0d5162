"""Clocks, rotation of buffers, and ratios."""

from __future__ import annotations

import ctypes
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

Call = Callable[[int], Any]  # a run on the buffers of that number
Seconds = dict[str, list[float]]  # name -> a time of each round; all names have as many

WARM_S = 0.3  # of warming up: clocks rise under load


def keep_freed_memory() -> None:
    """Let the C library keep what is freed, for this process.

    Else PyTorch's larger temporaries go back to the system and fault in page by page at the next
    call: time that belongs to no operation, and that comes and goes. It favours the baselines.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, in microseconds."""
    p20, _, _, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "p20_us": p20 * 1e6,
        "p50_us": statistics.median(seconds) * 1e6,
        "p80_us": p80 * 1e6,
    }


def ratio(theirs: list[float], ours: list[float]) -> float:
    """The median over rounds of theirs over ours: a machine that slows down slows both."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def interleaved(
    calls: Mapping[str, Call],
    sets: int,
    budget_s: float,
    device: torch.device,
    least: int,
    most: int = 20_000,
) -> Seconds:
    """Each call's time from the host, over rotating buffers, in random order, warm.

    On the CPU from call to return; on a GPU until the device has done it.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rounds, begun, once = 0, time.perf_counter(), math.inf
    while rounds < 3 or time.perf_counter() - begun < WARM_S:
        start = time.perf_counter()
        for call in calls.values():
            call(rounds % sets)
        wait()
        once = min(once, time.perf_counter() - start)
        rounds += 1
    rounds = min(most, max(least, int(budget_s / once)))
    seconds: Seconds = {name: [] for name in calls}
    order, shuffle = list(calls.items()), random.Random(0).shuffle
    for number in range(rounds):
        shuffle(order)  # a call inherits caches and threads from the one before
        for name, call in order:
            start = time.perf_counter()
            call(number % sets)
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


class Replay(NamedTuple):
    """A graph of `calls` calls."""

    graph: torch.cuda.CUDAGraph
    calls: int


def recorded(call: Call, sets: int) -> Replay:
    """A call as a graph, over all its buffers in turn.

    It holds enough of them for about a millisecond, so that a replay's own launch does not count.
    """
    call(0)
    torch.cuda.synchronize()
    start, end = _events()
    start.record()
    for number in range(sets):
        call(number)
    end.record()
    torch.cuda.synchronize()
    passes = max(1, min(200 // sets, int(1.0 / max(start.elapsed_time(end), 1e-3))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(passes):
            for number in range(sets):
                call(number)
    return Replay(graph, passes * sets)


def replayed(replays: Mapping[str, Replay], budget_s: float) -> Seconds:
    """Device time per call, the replays taken in turns."""
    begun, rounds = time.perf_counter(), 0
    while rounds < 2 or time.perf_counter() - begun < WARM_S:
        for replay in replays.values():
            replay.graph.replay()
        torch.cuda.synchronize()
        rounds += 1
    most = min(60, max(10, int(budget_s * rounds / (time.perf_counter() - begun))))
    seconds: Seconds = {name: [] for name in replays}
    for _ in range(most):
        for name, (graph, calls) in replays.items():
            start, end = _events()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / calls)
    return seconds


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
