"""A run's record: what it was taken on, written after every case, gone on with if it broke off."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastdiff import _ext
from fastdiff.app.machine import cpu_model

from .merging import together, write_whole

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
SAME = ("schema", "device", "cpu", "torch", "triton", "quick", "dry", "threads")
SCHEMA = 2


class Record:
    """What a run found: a JSON file that is valid at every moment.

    An unfinished file of the same machine and settings is gone on with, each case with its own
    commit; any other one at the same path is begun anew.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            **head, "gates": {}, "skipped": {}, "cases": {}, "failed": {}
        }  # fmt: skip
        self.resumed = False
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        if isinstance(before, dict) and not before.get("complete") and all(
            before.get(key) == head.get(key) for key in SAME
        ):  # fmt: skip
            self.data, self.resumed = before, True

    def gates(self, entry: str, gates: list[dict[str, Any]]) -> None:
        self.data["gates"][entry] = gates
        self.write()

    def skipped(self, entry: str, why: str) -> None:
        self.data["skipped"][entry] = why
        self.write()

    def case(self, name: str, row: dict[str, Any]) -> None:
        """Times of a case; of one that has some, the baselines that were missing."""
        self.data["failed"].pop(name, None)
        self.data["cases"][name] = together(self.data["cases"].get(name), row)
        self.write()

    def failed(self, name: str, said: str) -> None:
        self.data["failed"][name] = said
        self.write()

    def complete(self) -> None:
        """The end of a run: whether another one would have anything to do."""
        self.data["complete"] = not self.data["failed"]
        self.write()

    def write(self) -> None:
        write_whole(self.path, json.dumps(self.data, indent=1) + "\n")


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers are taken on and with."""
    import triton

    record: dict[str, Any] = {
        "schema": SCHEMA,
        "device": "cpu",
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "load_average_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "extension": _ext.build_info() or _ext.reason,
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


def slug(device: torch.device) -> str:
    """<device>-<today>: what a record is called."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{name}-{datetime.date.today().isoformat()}"


def result_path(device: torch.device, only: Sequence[str] = ()) -> Path:
    """In bench/results/; with the entries in its name where it has not all."""
    return RESULTS / f"{'-'.join([slug(device), *only])}.json"


def latest(name: str) -> Path | None:
    """The newest committed result of a device: its file names end in a date."""
    dated = re.compile(re.escape(name) + r"-\d{4}-\d\d-\d\d")
    found = sorted(path for path in RESULTS.glob("*.json") if dated.fullmatch(path.stem))
    return found[-1] if found else None


def completed(whole: Path) -> dict[str, Any]:
    """A whole record with the entries that were measured apart since, named in its "parts"."""
    data = json.loads(whole.read_text())
    name, date = whole.stem[: -len("-2026-01-01")], whole.stem[-len("2026-01-01") :]
    apart = re.compile(re.escape(name) + r"-(\d{4}-\d\d-\d\d)-.+")
    data["parts"] = {}
    for path in sorted(RESULTS.glob(f"{name}-*.json")):
        found = apart.fullmatch(path.stem)
        if not found or found[1] < date:
            continue
        part = json.loads(path.read_text())
        if part["quick"] or not part.get("complete") or any(
            part[key] != data[key] for key in ("schema", "device", "cpu", "torch", "threads")
        ):  # fmt: skip
            raise SystemExit(f"{path.name} does not go with {whole.name}: measure again")
        for entry in part["entries"]:
            kept = {n: case for n, case in data["cases"].items() if case["entry"] != entry}
            data["cases"] = kept | part["cases"]
            data["parts"][entry] = {"file": path.name, "commit": part["commit"],
                                    "date": part["date"]}  # fmt: skip
        data["gates"] |= part["gates"]
    return data


@cache
def commit() -> str:
    """The checked-out commit, and whether what is measured has been changed since.

    In a copy without its .git FASTDIFF_COMMIT in the environment says it.
    """
    head = _first_line("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    sources = ("fastdiff", "kernels", "csrc", "setup.py", "bench")
    changed = _first_line("git", "-C", str(ROOT), "status", "--porcelain", "--", *sources,
                          ":(exclude)bench/results")  # fmt: skip
    if not head:
        return os.environ.get("FASTDIFF_COMMIT", "unknown")
    return f"{head}, with changes" if changed else head


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
