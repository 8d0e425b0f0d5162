"""`python -m bench gpu`: all that one visit to a GPU is for, in one command and one JSON.

Steps, each written to the record as soon as it is done: build for this GPU, the GPU tests, a memory
check of each kernel, then gates and times of every entry in order of worth. A run that was cut goes
on where it broke off. Nothing outside the repository is needed; what is missing is said in words.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .measure import run_entries
from .record import ROOT, Record, machine, result_path
from .registry import entries
from .timing import keep_freed_memory

BUDGET_S = 450  # of 600: a case that compiles takes a minute or two
DRY_TESTS = "test_every_table_shape or test_nothing_to_do"
# One small launch of each kernel, for compute-sanitizer: odd sizes, every operand.
SANITIZED = """
import torch
from bench.entries import haar, multistep_step, spectral_filter, spectral_update, weighted_sums
from fastdiff.ops import seeded_noise, weighted_sums_unchecked
device = torch.device("cuda")
for name, row in multistep_step.ROWS.items():
    multistep_step.step_of(row, (2, 3, 31, 33), device, per_sample=True).run()
for name, row in weighted_sums.rows().items():
    weighted_sums_unchecked(*weighted_sums.sums_of(row, (2, 3, 31, 33), device))
seeded_noise(torch.arange(3, device=device), (3, 5, 7, 9))
for shape in ((2, 3, 31, 33), (2, 3, 64, 64)):
    spectral_filter.ours("exact")([spectral_filter.buffers(0, shape, device)])(0)
    for name in spectral_update.MOVES:
        spectral_update.ours(name)([spectral_update.buffers(0, shape, device)])(0)
    for name, row in haar.ROWS.items():
        levels = 1 if name == "expand" else 3
        row.ours([haar.buffers(0, shape, device, row.columns, levels)])(0)
torch.cuda.synchronize()
"""


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS",
                        help="no case starts after it; %(default)s")  # fmt: skip
    parser.add_argument("--only", action="append", metavar="NAME",
                        help=f"one of {', '.join(STEPS)} or an entry (repeatable)")  # fmt: skip
    parser.add_argument(
        "--tune",
        action="store_true",
        help="instead: sweep launch configurations into kernels/configs/",
    )
    parser.add_argument("--dry", action="store_true", help="the same path on the CPU, small sizes")
    parser.add_argument("--json", type=Path, help="the record's file, instead of bench/results/")
    return parser


def gpu_tests() -> list[str]:
    """The files with tests marked `gpu`: the others may need packages that are not here."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if "pytest.mark.gpu" in file.read_text()]


# == Steps =========================================================================================


def build(dry: bool) -> dict[str, Any]:
    """The extension, for this GPU where its architecture is not given."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation",
               "--no-deps", "-e", str(ROOT)]  # fmt: skip
    if dry:
        return {"ok": True, "said": f"dry: not run: {' '.join(command)}"}
    major, minor = torch.cuda.get_device_capability()
    environment = {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}", **os.environ}
    return _ran(command, environment)


def test(dry: bool) -> dict[str, Any]:
    """The tests marked `gpu`; dry, a few of them under Triton's interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--no-header", "-p",
               "no:cacheprovider", *gpu_tests()]  # fmt: skip
    return _ran(command + (["-k", DRY_TESTS] if dry else []), os.environ)


def sanitize(dry: bool) -> dict[str, Any]:
    """compute-sanitizer's memcheck over one launch of each kernel, where the tool works."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if dry or not Path(tool).is_file():
        return {"ok": True, "said": "dry: not run" if dry else "compute-sanitizer is not installed"}
    command = [tool, "--error-exitcode", "99", sys.executable, "-c", SANITIZED]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = _ran(command, environment, limit_s=150)
    # Anything but its own exit code for a finding is the tool's trouble, not the kernels'.
    return {**done, "ok": done["code"] != 99}


STEPS: dict[str, Callable[[bool], dict[str, Any]]] = {
    "build": build,
    "tests": test,
    "sanitizer": sanitize,
}


def _ran(command: list[str], environment: Any, limit_s: float = 400) -> dict[str, Any]:
    begun = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, env=dict(environment), capture_output=True,
                              text=True, timeout=limit_s)  # fmt: skip
        code, said = done.returncode, (done.stdout + done.stderr).strip()
    except subprocess.TimeoutExpired:
        code, said = -1, f"not done after {limit_s:.0f} s"
    seconds = round(time.monotonic() - begun, 1)
    return {"ok": code == 0, "code": code, "seconds": seconds, "said": said[-3000:]}


# == The run =======================================================================================


def main(given: list[str]) -> int:
    """0 where all that ran is green."""
    parser = arguments()
    options = parser.parse_args(given)
    if not options.dry and not torch.cuda.is_available():
        print(
            "bench gpu needs a CUDA GPU and PyTorch sees none; --dry walks the same path on the CPU"
        )
        return 1
    begun = time.monotonic()
    known = {entry.name: entry for entry in entries()}
    if unknown := set(options.only or ()) - known.keys() - STEPS.keys():
        parser.error(
            f"--only must be one of {', '.join([*STEPS, *known])}; got {', '.join(unknown)}"
        )
    device = torch.device("cpu" if options.dry else "cuda")
    if options.tune:
        from .tune import tune

        return tune(device)
    keep_freed_memory()
    only = options.only or []
    path = options.json or (
        Path(tempfile.mkdtemp()) / "dry.json" if options.dry else result_path(device, only)
    )
    threads = [torch.get_num_threads()]
    head = {
        "command": " ".join(["python -m bench gpu", *(f"--only {name}" for name in only)]),
        "quick": options.dry, "dry": options.dry, "threads": threads, **machine(device),
    }  # fmt: skip
    if only:
        head["entries"] = [name for name in only if name in known]
    record = Record(path, head)
    print(f"{'going on with' if record.resumed else 'writing'} {path}", flush=True)
    green = run_steps(record, options)
    chosen = [entry for name, entry in known.items() if name in (options.only or known)]
    if options.dry:
        chosen = [entry for entry in chosen if options.only or entry.kind == "op"]
    if green or options.only:
        deadline = begun + options.budget
        green &= run_entries(
            chosen,
            record,
            device,
            quick=options.dry,
            threads=threads,
            say=lambda line: print(line, flush=True),
            deadline=deadline,
        )
    else:
        print("no gates and no times: a step before them is red")
    ended = "complete" if record.data.get("complete") else "not complete; run it again to go on"
    dry = "; a dry run on the CPU, no number of a GPU" if options.dry else ""
    print(f"\n{'green' if green else 'RED'}, {ended}{dry}; wrote {path}")
    return 0 if green else 1


def run_steps(record: Record, options: argparse.Namespace) -> bool:
    """What comes before the times; steps that are done and green are not repeated."""
    steps = record.data.setdefault("steps", {})
    for name, step in STEPS.items():
        if options.only and name not in options.only:
            continue
        if not steps.get(name, {}).get("ok"):
            steps[name] = step(options.dry)
            record.write()
        done = steps[name]
        word, last = "ok " if done["ok"] else "RED", done["said"].splitlines()[-1:] or [""]
        print(f"{name:12} {word} {done.get('seconds', 0):6.1f} s  {last[0]}", flush=True)
        if not done["ok"]:
            print(done["said"])
    return all(done["ok"] for done in steps.values())
