"""`python -m bench`: the entries on this machine."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import torch

import fastdiff

from .files import ROOT
from .machine import machine, result_path
from .measure import run_entries
from .record import Record
from .registry import entries
from .timing import keep_freed_memory

BUSY = 0.5  # load average


def run(options: argparse.Namespace) -> int:
    """0 where every gate is green."""
    known = {entry.name: entry for entry in entries()}
    if unknown := set(options.op or ()) - known.keys():
        raise SystemExit(f"--op must be one of {', '.join(known)}; got {', '.join(unknown)}")
    device = torch.device(options.device)
    threads = _threads(options, device)
    head: dict[str, Any] = {
        "command": "python -m bench" + " --quick" * options.quick,
        "quick": options.quick,
        "threads": threads,
        "library": os.path.relpath(Path(fastdiff.__file__).resolve().parent, ROOT),
        **machine(device),
    }
    if options.op:
        head["entries"] = options.op
    if head["load_average_before"] > BUSY:
        print(f"the machine is busy, load average {head['load_average_before']}: mistrust times")
    keep_freed_memory()
    record = Record(options.json or result_path(device, options.op or ()), head)
    if record.resumed:
        print(f"going on with {record.path}")
    chosen = [known[name] for name in options.op or known]
    green = run_entries(chosen, record, device, quick=options.quick, threads=threads, say=print)
    print(f"\nwrote {record.path}")
    return 0 if green else 1


def _threads(options: argparse.Namespace, device: torch.device) -> list[int]:
    cores = torch.get_num_threads()
    if device.type == "cuda":
        return [cores]
    return options.threads or ([cores] if options.quick else sorted({1, cores}))
