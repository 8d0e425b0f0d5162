"""The one way everything is measured: every case against its definition, then its baselines.

In one process and one run: our call, its baselines and a copy of as many bytes take turns in random
order over buffers that together span more than any cache. A ratio is the median, over the rounds of
a group of calls that were timed the same way at the same time, of their time over ours.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from .gates import Gate, exact_convolutions, gate_of, relative_error
from .record import Record, commit
from .registry import Baseline, Call, Case, Entry
from .timing import Replay, Seconds, interleaved, quantiles, ratio, recorded, replayed

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints at every start

OURS, COPY = "fastdiff", "copy"
FOOTPRINT = 600 << 20  # bytes that one round of buffers spans on the CPU
MOST_SETS = 16
AGREEMENT = 1e-4  # relative; a baseline further away computes something else


Chooser = Callable[[Case], Case | None]  # the part of a case that is wanted, or None


def run_entries(
    entries: Iterable[Entry],
    record: Record,
    device: torch.device,
    *,
    quick: bool,
    threads: Sequence[int],
    say: Callable[[str], None],
    deadline: float = float("inf"),
    choose: Chooser = lambda case: case,
) -> bool:
    """Gates and times of all entries into the record, as each is done.

    What the record has of a case is not measured again; gates are checked wherever something is.
    Returns whether every gate was green and no case failed. `deadline`: of time.monotonic(); no
    gate and no case starts after it. `choose`: leaves out cases and baselines.
    """
    green = True
    for entry in entries:
        if why := entry.lacks():
            record.skipped(entry.name, why)
            say(f"\n{entry.name}: {why}")
            continue
        chosen = [case for whole in entry.cases(device, quick) if (case := choose(whole))]
        left = []
        for case, count in itertools.product(chosen, threads):
            name = f"{entry.name} {case.name}"
            name += f" threads={count}" if device.type == "cpu" else ""
            if lacking := missing(case, record.data["cases"].get(name)):
                left.append((name, lacking, count))
        if left:
            found = list(gates_of(chosen, deadline))
            if time.monotonic() > deadline:
                say(f"\n{entry.name}: out of time in its gates")
                return green and all(gate["ok"] for gate in found)
            record.gates(entry.name, found)
        elif entry.name not in record.data["gates"]:
            continue
        checked, red = (record.data["gates"][entry.name][key] for key in ("checked", "red"))
        say(f"\n{entry.name}: {checked - len(red)} of {checked} gates green")
        if red:
            green = False
            for gate in red:
                say(f"  RED {gate}")
            say("  no times")
            _leave_if_poisoned(device, say)
            continue
        for name, case, count in left:
            if time.monotonic() > deadline:
                say("  out of time; run the same command again to go on")
                return green
            try:
                row = row_of(entry, case, device, quick=quick, threads=count)
            except Exception as error:  # Go on: the other cases can still be timed.
                green = False
                record.failed(name, _words(error))
                say(f"  RED {name}: {_words(error)}")
                _leave_if_poisoned(device, say)
            else:
                record.case(name, row)
                say(line(name, row))
    record.complete()  # Cases that failed keep it open, so that the next run tries them again.
    return green


POISONED = 70  # the exit code of a process whose CUDA context an error has spoilt


def _leave_if_poisoned(device: torch.device, say: Callable[[str], None]) -> None:
    """End the process where an error of a launch fails every later call in it too."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError:
            say("  the device fails every call after it in this process")
            os._exit(POISONED)


def missing(case: Case, row: dict[str, Any] | None) -> Case | None:
    """The case with those baselines that its row lacks; None where it has all of them."""
    if row is None:
        return case
    lacking = {name for name, why in row["skipped"].items() if not why.startswith("failed, ")}
    done = row["over_ours"].keys() | lacking
    left = {name: b for name, b in case.baselines.items() if name not in done}
    return dataclasses.replace(case, baselines=left) if left else None


def gates_of(cases: Iterable[Case], deadline: float = float("inf")) -> Iterator[Gate]:
    """A gate for each case, or for the one checked in its place; an exception makes it red."""
    for case in {(case.checked or case).name: case for case in cases}.values():
        if time.monotonic() > deadline:
            return
        try:
            yield gate_of(case)
        except Exception as error:
            traceback.print_exc()
            yield {"case": case.name, "said": _words(error), "ok": False}


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def line(name: str, row: dict[str, Any]) -> str:
    """A case in one line."""
    parts = [f"  {name:52} {row['p50_us']:10.1f} us"]
    if "of_copy" in row:
        parts.append(f"{row['gbytes_per_s']:6.1f} GB/s {row['of_copy']:4.0%} of copy")
    parts += [f"{name} {ratio:.2f}x" for name, ratio in row["over_ours"].items()]
    return "  ".join(parts)


def row_of(entry: Entry, case: Case, device: torch.device, **how: Any) -> dict[str, Any]:
    """`measure`, with what the record says of the case besides."""
    found = measure(case, device, **how)
    return {"entry": entry.name, "kind": entry.kind, "commit": commit(), **found}


def measure(case: Case, device: torch.device, *, quick: bool, threads: int) -> dict[str, Any]:
    """Times and facts of one case; `over_ours`: a baseline's median over ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            return _measure(case, device, quick, threads)
    finally:
        torch.set_num_threads(before)
        if any(baseline.compiles for baseline in case.baselines.values()):
            torch.compiler.reset()
        if case.graphs:
            gc.collect()  # Networks, compiled code and graphs refer to each other in cycles.


def _measure(case: Case, device: torch.device, quick: bool, threads: int) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    sets = sets_for(case, device)
    made = {name: b for name, b in case.baselines.items() if not b.lacks(device, quick)}
    skipped = {n: why for n, b in case.baselines.items() if (why := b.lacks(device, quick))}
    buffers = [case.inputs(i) for i in range(sets)]
    calls: dict[str, Call] = {}
    first_us: dict[str, float] = {}
    held: dict[str, int] = {}
    calls[OURS], first_us[OURS], held[OURS] = _first(case, case.ours, buffers, device)
    checked = [name for name, b in made.items() if b.agrees and not b.compiles]
    if checked:
        with exact_convolutions():
            ours = case.ours([case.inputs(0)])(0)
    for name, baseline in list(made.items()):
        try:
            if name in checked:
                _same_results(case, ours, name, baseline)
            calls[name], first_us[name], held[name] = _first(case, baseline.make, buffers, device)
        except Disagreement:
            raise
        except Exception as error:  # A baseline that fails must not cost us our own times.
            skipped[name] = f"failed, {_words(error)}"
            del made[name]
    budget, least = budget_s(quick, device), 5 if on_gpu else 15
    groups: dict[str, Seconds] = {}
    apart = [n for n, b in made.items() if b.compiles and not on_gpu]
    beside = [n for n in made if n not in apart]
    pick = lambda names: {n: calls[n] for n in (OURS, *names)}
    if on_gpu and case.capturable:
        together = [n for n in beside if made[n].capturable]
        replays: dict[str, Replay] = {}
        for name, call in (pick(together) | _copy(case, sets, device)).items():
            try:
                replays[name] = recorded(call, sets)
            except Exception as error:
                if name in (OURS, COPY):
                    raise
                skipped[name] = f"failed, {_words(error)}"
        groups["replayed"] = replayed(replays, budget)
        beside = [n for n in beside if n not in together]
    if not groups or beside:
        copy = {} if groups else _copy(case, sets, device)
        groups["call to return"] = interleaved(
            pick(beside) | copy, sets, budget, device, least=least
        )
    if apart:
        groups["beside compiled code"] = interleaved(pick(apart), sets, budget, device, least=least)

    first = next(iter(groups.values()))
    row: dict[str, Any] = {
        "row": case.row,
        "shape": case.shape,
        **case.settings,
        **({} if on_gpu else {"threads": threads}),
        **quantiles(first[OURS]),
        "over_ours": {
            name: ratio(taken, seconds[OURS])
            for seconds in groups.values()
            for name, taken in seconds.items()
            if name not in (OURS, COPY)
        },
        "buffers": sets,
        "bytes": case.bytes,
        "flops": case.flops,
        # A profile may slow down later launches on a GPU, so another process counts them there.
        "launches": None if on_gpu else launches(calls[OURS], device),
        "peak_bytes": {name: _peak(call, device) for name, call in calls.items()},
        **({"held_bytes": held} if on_gpu and case.graphs else {}),
        "first_call_ms": {name: us / 1e3 for name, us in first_us.items()},
        "rounds": {group: len(seconds[OURS]) for group, seconds in groups.items()},
        "times": {
            group: {name: list(quantiles(taken).values()) for name, taken in seconds.items()}
            for group, seconds in groups.items()
        },
        "skipped": skipped,
    }
    if COPY in first:
        row["gbytes_per_s"] = case.bytes / row["p50_us"] / 1e3
        row["of_copy"] = ratio(first[COPY], first[OURS])
    return row


def budget_s(quick: bool, device: torch.device) -> float:
    """Seconds for a group of calls that take turns; a GPU's times scatter less."""
    return 1.0 if device.type == "cuda" else 3.0 if quick else 5.0


def sets_for(case: Case, device: torch.device) -> int:
    """Buffer sets: together beyond the caches, as far as memory and time allow."""
    if not case.bytes:
        return 2
    span = FOOTPRINT
    if device.type == "cuda":
        span = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(MOST_SETS, -(-span // case.bytes)))


def _copy(case: Case, sets: int, device: torch.device) -> dict[str, Call]:
    """`Tensor.copy_` that moves as many bytes as the case."""
    if not case.bytes:
        return {}
    pairs = [torch.randn(2, case.bytes // 8, device=device).unbind() for _ in range(sets)]
    return {COPY: lambda i: pairs[i][0].copy_(pairs[i][1])}


class Disagreement(AssertionError):
    """A baseline computes something else."""


def _same_results(case: Case, ours: Any, name: str, baseline: Baseline) -> None:
    """Raise unless a baseline computes from the first buffers what ours did."""
    with exact_convolutions():
        error = relative_error(baseline.make([case.inputs(0)])(0), ours)
    if not error <= AGREEMENT:
        raise Disagreement(f"{case.name}: {name} differs from ours by {error:.1e}")


def _first(
    case: Case,
    make: Callable[[Sequence[Any]], Call],
    buffers: Sequence[Any],
    device: torch.device,
) -> tuple[Call, float, int]:
    """The call, microseconds of its first run, and the bytes it keeps in pools of CUDA graphs."""
    counted = case.graphs and device.type == "cuda"
    before = _pooled() if counted else 0
    call = make(buffers)
    first_us = _once(call, device)
    return call, first_us, _pooled() - before if counted else 0


def _pooled() -> int:
    """Bytes reserved in the pools of CUDA graphs."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def _once(call: Call, device: torch.device) -> float:
    """Microseconds of the first call, compilation included."""
    start = time.perf_counter()
    call(0)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e6


def launches(call: Call, device: torch.device) -> int:
    """On a GPU the kernels of one call, on the CPU its operators (those not inside another)."""
    kind = "CUDA" if device.type == "cuda" else "CPU"
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as run:
        call(0)
    events = run.events()
    if kind == "CUDA":
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in events)
    return sum(e.cpu_parent is None and "::" in e.name for e in events)


def _peak(call: Call, device: torch.device) -> int:
    """Bytes that one call holds at most beyond what was there."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as run:
        call(0)
    held, most = 0, 0
    for event in run.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most
