"""What a process of a visit does: one part of one unit, its finds appended as lines."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastdiff import _ext
from fastdiff.ops import seeded_noise

from .. import measure
from .. import tune as tuning
from ..files import ROOT
from ..machine import machine, slug
from ..record import Record, first_line
from ..registry import Case, Entry, all_cases, named
from ..timing import keep_freed_memory
from . import probes
from .brought import source_digest
from .lines import CUT, Lines
from .plan import Unit

FINDING = 99  # the exit code with which the sanitizer reports a finding
COUNTERS = ("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum",
            "dram__throughput.avg.pct_of_peak_sustained_elapsed",
            "sm__throughput.avg.pct_of_peak_sustained_elapsed")  # fmt: skip


class Child:
    """What this process is to do, and what its lines go to.

    `part`: of the unit's; `until`: epoch seconds; `out`: the visit's folder; `dry`: on the CPU.
    """

    def __init__(self, unit: Unit, part: str, until: float, out: str, dry: bool) -> None:
        self.unit, self.part, self.dry = unit, part, dry
        self.out, self.lines = Path(out), Lines(Path(out))
        self.device = torch.device("cpu" if dry else "cuda")
        self.kernels = {"compiled": 0, "cached": 0}
        self.deadline = time.monotonic() + until - time.time()


# == Kinds of unit =================================================================================


def doctor(child: Child) -> bool:
    """The machine and what is installed on it."""
    found: dict[str, Any] = {
        name: importlib.util.find_spec(name) is not None
        for name in ("diffusers", "xdist", "pytest_timeout", "ptwt", "pytorch_wavelets")
    }
    child.lines.append("head", machine=found)  # Now: what follows may outlast the unit.
    begun = time.perf_counter()
    if not child.dry:
        torch.zeros(1, device="cuda").cpu()
    ready = time.perf_counter()
    built = _ext.build_info()
    found |= {
        # On the CPU the extension serves without CUDA kernels.
        "extension": built.get("sources") == source_digest() and (child.dry or _ext.HAS_CUDA),
        "built_from": built.get("sources", _ext.reason), "sources": source_digest(),
        "first_cuda_s": round(ready - begun, 1),
        "clocks": first_line("nvidia-smi", "--format=csv,noheader",
                             "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw"),
        "cold": not child.dry and not cache_serves(child),
    }  # fmt: skip
    child.lines.append("head", **machine(child.device), threads=[torch.get_num_threads()],
                       slug=slug(child.device), machine=found)  # fmt: skip
    print(found)
    return True


def cache_serves(child: Child) -> bool:
    """Whether a launch that `python -m bench warm` compiles is in the cache here."""
    before = dict(child.kernels)
    seeded_noise(torch.arange(4, device=child.device), (4, 3, 32, 32))
    return child.kernels["compiled"] == before["compiled"]


def warm(child: Child) -> bool:
    """All kernels at once, a process a core: where the cache that was brought does not serve."""
    if child.dry:
        return True
    command = [sys.executable, "-m", "bench", "warm", "--cache", os.environ["TRITON_CACHE_DIR"]]
    return subprocess.run(command).returncode == 0


def build(child: Child) -> bool:
    """The extension, for this GPU alone."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    if child.dry:
        print(f"dry: not run: {' '.join(command)}")
        return True
    architecture = "{}.{}".format(*torch.cuda.get_device_capability())
    env = {**os.environ, "TORCH_CUDA_ARCH_LIST": architecture}
    return subprocess.run(command, cwd=ROOT, env=env).returncode == 0


def probe(child: Child) -> bool:
    """One of the questions in probes.py, answered."""
    begun = time.perf_counter()
    try:
        said: Any = "for a GPU only"
        if not child.dry or child.part in probes.ANYWHERE:
            said = probes.PROBES[child.part](child.device)
        ok = True
    except Exception as error:
        traceback.print_exc()
        said, ok = f"{type(error).__name__}: {error}", False
    seconds = round(time.perf_counter() - begun, 1)
    child.lines.append("probe", name=child.part, ok=ok, said=said, seconds=seconds)
    print(f"{child.part}: {said}")
    return ok


def times(child: Child) -> bool:
    """The chosen cases with the chosen baselines, their gates first."""
    unit = child.unit

    def choose(case: Case) -> Case | None:
        if not re.search(unit.cases, case.name):
            return None
        kept = {name: b for name, b in case.baselines.items()
                if unit.compiled in (None, b.compiles)}  # fmt: skip
        return replace(case, baselines=kept) if kept or not unit.compiled else None

    keep_freed_memory()
    entries, record = map(named, child.unit.entries), Streamed(child.lines)
    return measure.run_entries(
        entries, record, child.device, quick=child.dry, threads=[torch.get_num_threads()],
        say=lambda line: print(line, flush=True), deadline=child.deadline, choose=choose,
    )  # fmt: skip


class Streamed(Record):
    """A record whose finds are appended as lines."""

    def __init__(self, lines: Lines) -> None:
        self.lines, self.data, self.resumed = lines, lines.record(), True

    def gates(self, entry: str, gates: list[dict[str, Any]]) -> None:
        self.lines.append("gates", entry=entry, gates=gates)
        self.data["gates"] = self.lines.record()["gates"]  # other processes' too

    def skipped(self, entry: str, why: str) -> None:
        self.lines.append("skipped", name=entry, said=why)

    def case(self, name: str, row: dict[str, Any]) -> None:
        self.lines.append("case", name=name, row=row)

    def failed(self, name: str, said: str) -> None:
        self.lines.append("failed", name=name, said=said)

    def complete(self) -> None:
        """Nothing: only the whole visit knows when it is complete."""


def check(child: Child) -> bool:
    """What is not timed: the tests, the sanitizer's tools, or all gates of an entry."""
    part = child.part
    if part == "tests":
        return test(child)
    if part in ("memcheck", "racecheck"):
        return sanitize(child, part)
    return gates(child, named(part))


def gates(child: Child, entry: Entry) -> bool:
    """All gates of one entry."""
    if why := entry.lacks():
        child.lines.append("skipped", name=entry.name, said=why)
        return True
    found = []
    for gate in measure.gates_of(entry.cases(child.device, child.dry), child.deadline):
        found.append(gate)
        if not gate["ok"]:
            print(f"RED {entry.name} {gate}", flush=True)
    red = sum(not gate["ok"] for gate in found)
    print(f"{entry.name}: {len(found) - red} of {len(found)} gates green")
    child.lines.append("gates", entry=entry.name, gates=found)
    return not red


class Streaming:
    """A pytest plugin: each test's end is a line."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def pytest_runtest_logreport(self, report: Any) -> None:
        # Besides calls: failures in setup and teardown, and reports of workers that died.
        if report.when == "call" or report.outcome != "passed":
            said = {} if report.passed else {"said": str(report.longrepr)[-3000:]}
            self.lines.append("test", name=report.nodeid, ok=not report.failed,
                              outcome=report.outcome, seconds=round(report.duration, 2),
                              **said)  # fmt: skip


DRY_TESTS = "test_every_table_shape or test_nothing_to_do"


def test(child: Child) -> bool:
    """The tests marked `gpu`, in several processes; named ones alone, one after the other."""
    import pytest

    command = ["-q", "-m", "gpu", "--no-header", "-p", "no:cacheprovider"]
    if child.unit.names:
        command += ["--tb=long", *child.unit.names]
    else:
        command += gpu_tests()
        if importlib.util.find_spec("xdist"):
            command += ["-n", "2" if child.dry else "8"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "90"]
    command += ["-k", DRY_TESTS] if child.dry else []
    return pytest.main(command, plugins=[Streaming(child.lines)]) == 0


def gpu_tests() -> list[str]:
    """The files with tests marked `gpu`: the others may need packages that are not here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text()]


def nvidias(tool: str) -> str:
    return shutil.which(tool) or f"/usr/local/cuda/bin/{tool}"


def sanitize(child: Child, tool: str) -> bool:
    """A tool of compute-sanitizer over a small launch of each kernel: odd sizes, every operand."""
    command = nvidias("compute-sanitizer")
    if child.dry or not Path(command).is_file():
        said = "dry: not run" if child.dry else "compute-sanitizer is not installed"
        child.lines.append("probe", name=tool, ok=True, said=said)
        return True
    # CUDA libraries probe with calls that may fail; such errors are not ours.
    only = ["--report-api-errors", "no"] if tool == "memcheck" else []
    launches = [sys.executable, "-m", "bench.visit.kernels"]
    launches.append("all" if tool == "memcheck" else "races")
    done = subprocess.run(
        [command, "--tool", tool, *only, "--error-exitcode", str(FINDING), *launches],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout + done.stderr
    print(said)
    checked = "CHECKED" in said
    # A run that broke off proves nothing. Of one that ended, only the tool's findings count.
    ok = checked and done.returncode != FINDING
    child.lines.append(
        "probe", name=tool, ok=ok, checked=checked, code=done.returncode, said=said[-2000:]
    )
    return ok


def tune(child: Child) -> bool:
    """The fastest launch configuration of each kernel variant, into the folder."""
    return tuning.tune(child.device, child.out / "multistep_step.json") == 0


def launches(child: Child) -> bool:
    """Kernels of a call of ours, for every case that has times; a profile slows nothing here."""
    rows = child.lines.record()["cases"]
    wanted = {name for name, row in rows.items() if row["launches"] is None}
    for name, _, case in all_cases(child.device, child.dry):
        if name in wanted and time.monotonic() < child.deadline:
            with torch.inference_mode():
                call = case.ours([case.inputs(0)])
                call(0)
                count = measure.launches(call, child.device)
            child.lines.append("launches", name=name, count=count)
    return True


def counters(child: Child) -> bool:
    """Bytes from the memory's own counters, of one launch of each kernel."""
    tool = nvidias("ncu")
    if child.dry or not Path(tool).is_file():
        print("dry: not run" if child.dry else "ncu is not installed")
        return True
    launches = (sys.executable, "-m", "bench.visit.kernels")
    log = child.out / "ncu.csv"  # ncu writes as it goes, so a kill loses little
    done = subprocess.run(
        [tool, "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base",
         "--log-file", str(log), "--metrics", ",".join(COUNTERS), "--kernel-name",
         "regex:multistep|spectral|combine|add|whole|haar", *launches, "counted"],
    )  # fmt: skip
    text = log.read_text() if log.exists() else ""
    print(text[-3000:])
    rows = [row for row in csv.reader(text.splitlines()) if len(row) > len(COUNTERS)]
    head, units, *found = rows if len(rows) > 2 else ([], [])
    for number, row in enumerate(found):
        named = dict(zip(head, row, strict=False))
        numbers = {
            key: f"{named[key]} {units[head.index(key)]}" for key in COUNTERS if key in named
        }
        child.lines.append("counter", name=f"{number} {named.get('Kernel Name', '?')}", **numbers)
    return done.returncode == 0


def explain(child: Child) -> bool:
    """Entries that went wrong: every gate and the failed cases once more, with whole tracebacks.

    Of these a failed gate prints its own.
    """
    green = True
    for entry in map(named, child.unit.entries):
        green &= gates(child, entry)
        for case in entry.cases(child.device, child.dry):
            if not any(name.startswith(f"{entry.name} {case.name}") for name in child.unit.names):
                continue
            buffers = [case.inputs(0)]
            makers: dict[str, Callable[..., Any]] = {"fastdiff": case.ours}
            makers |= {name: baseline.make for name, baseline in case.baselines.items()
                       if not baseline.lacks(child.device, child.dry)}  # fmt: skip
            for name, make in makers.items():
                try:
                    with torch.inference_mode():
                        make(buffers)(0)
                        print(f"{case.name}, {name}: right this time", flush=True)
                except Exception:
                    green = False
                    print(f"{case.name}, {name}:\n{traceback.format_exc()}", flush=True)
    return green


def again(child: Child) -> bool:
    """Cases whose times scattered, once more: kept beside the first ones."""
    threads = torch.get_num_threads()
    for name, entry, case in all_cases(child.device, child.dry):
        if name in child.unit.names and time.monotonic() < child.deadline:
            kept = {n: b for n, b in case.baselines.items() if not b.compiles}
            case = replace(case, baselines=kept)
            row = measure.row_of(entry, case, child.device, quick=child.dry, threads=threads)
            child.lines.append("case", name=name, row=row)
            print(measure.line(name, row), flush=True)
    return True


KINDS: dict[str, Callable[[Child], bool]] = {
    function.__name__: function
    for function in (doctor, build, warm, probe, times, check, test, tune, launches, counters,
                     explain, again)
}  # fmt: skip


@contextlib.contextmanager
def counted(child: Child) -> Iterator[None]:
    """Count kernels that Triton compiles, and those that it finds in its cache."""
    import triton

    count = child.kernels

    def listen(*, cache_hit: bool, **_: Any) -> None:
        count["cached" if cache_hit else "compiled"] += 1

    triton.knobs.compilation.listener = listen
    try:
        yield
    finally:
        if any(count.values()):
            child.lines.append("triton", unit=child.unit.name, **count)


def main(given: str) -> int:
    """`given`: JSON of what `Child` takes, as command.py writes it."""
    order = json.loads(given)
    child = Child(Unit(**order.pop("unit")), **order)
    with counted(child):
        green = KINDS[child.unit.kind](child)
        cut = child.unit.kind in ("times", "check") and time.monotonic() > child.deadline
        return CUT if green and cut else 0 if green else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
