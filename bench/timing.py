"""Clocks, rotation of buffers, and the record of a run."""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

Variants = dict[str, Callable[[int], object]]  # name -> a call on the buffers of that number


def quantiles(seconds: list[float]) -> dict[str, float]:
    """The 20th, 50th and 80th percentile, in microseconds."""
    p20, p40, p60, p80 = statistics.quantiles(seconds, n=5, method="inclusive")
    return {
        "p20_us": p20 * 1e6,
        "p50_us": statistics.median(seconds) * 1e6,
        "p80_us": p80 * 1e6,
    }


def interleaved(variants: Variants, sets: int, rounds: int) -> dict[str, dict[str, float]]:
    """Host time of each variant from call to return, over rotating buffers, in random order."""
    for call in variants.values():
        for number in range(min(sets, 3)):
            call(number)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order, shuffle = list(variants.items()), random.Random(0).shuffle
    for number in range(rounds):
        shuffle(order)  # what ran before leaves its mark on caches and threads
        for name, call in order:
            start = time.perf_counter()
            call(number % sets)
            seconds[name].append(time.perf_counter() - start)
    return {name: quantiles(taken) for name, taken in seconds.items()}


def replayed(variants: Variants, sets: int, replays: int = 40) -> dict[str, dict[str, float]]:
    """Device time per call: each variant captured over all its buffers, replays taken in turns.

    A replay holds enough calls for about a millisecond, so that its own launch does not count.
    """
    graphs, calls = {}, {}
    for name, call in variants.items():
        call(0)
        torch.cuda.synchronize()
        start, end = _events()
        start.record()
        for number in range(sets):
            call(number)
        end.record()
        torch.cuda.synchronize()
        passes = max(1, min(200 // sets, int(1.0 / max(start.elapsed_time(end), 1e-3))))
        calls[name] = passes * sets
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name]):
            for _ in range(passes):
                for number in range(sets):
                    call(number)
    warm_until = time.perf_counter() + 0.3  # clocks rise under load
    while time.perf_counter() < warm_until:
        for graph in graphs.values():
            graph.replay()
        torch.cuda.synchronize()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(replays):
        for name, graph in graphs.items():
            start, end = _events()
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            seconds[name].append(start.elapsed_time(end) / 1e3 / calls[name])
    return {name: quantiles(taken) for name, taken in seconds.items()}


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def machine(device: torch.device) -> dict[str, object]:
    """What the numbers were taken on and with."""
    import triton

    record: dict[str, object] = {
        "device": "cpu",
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["device"] = properties.name
        record["multiprocessors"] = properties.multi_processor_count
        record["l2_bytes"] = properties.L2_cache_size
        record["cuda"] = torch.version.cuda
        record["driver"] = _first_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
    return record


def write_json(record: dict[str, object], path: Path) -> None:
    """Write to a temporary name, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def result_path(name: str) -> Path:
    """bench/results/<name>-<today>.json"""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return RESULTS / f"{slug}-{datetime.date.today().isoformat()}.json"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.processor()


def _commit() -> str:
    head = _first_line("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    changed = _first_line("git", "-C", str(ROOT), "status", "--porcelain")
    return f"{head}, with changes" if head and changed else head or "unknown"


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
