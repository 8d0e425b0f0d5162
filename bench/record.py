"""A run's record: written after every case, gone on with if it broke off. No torch, as files.py.

A case's row holds, in microseconds, the 20th, 50th and 80th percentile of every call that was timed
with ours (`times`, by group), and the ratios that rounds of such a group gave (`over_ours`).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from .files import RESULTS, ROOT, write_json

SAME = ("schema", "device", "cpu", "torch", "triton", "quick", "dry", "threads")
SCHEMA = 3


class Record:
    """What a run found: a JSON file that is valid at every moment.

    An unfinished file of the same machine and settings is gone on with, each case with its own
    commit; any other one at the same path is begun anew.
    """

    def __init__(self, path: Path, head: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = dict(head)
        self.data |= {key: {} for key in ("gates", "skipped", "cases", "failed")}
        self.resumed = False
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError):
            return
        if isinstance(before, dict) and not before.get("complete"):
            if all(before.get(key) == head.get(key) for key in SAME):
                self.data, self.resumed = before, True

    def gates(self, entry: str, gates: list[dict[str, Any]]) -> None:
        self.data["gates"][entry] = summed_up(gates)
        self.write()

    def skipped(self, entry: str, why: str) -> None:
        self.data["skipped"][entry] = why
        self.write()

    def case(self, name: str, row: dict[str, Any]) -> None:
        """Add the times of a case; if it has some already, those of baselines that were missing."""
        self.data["failed"].pop(name, None)
        self.data["cases"][name] = together(self.data["cases"].get(name), row)
        self.write()

    def failed(self, name: str, said: str) -> None:
        self.data["failed"][name] = said
        self.write()

    def complete(self) -> None:
        """End a run. It is complete unless a case failed, which another run would try again."""
        self.data["complete"] = not self.data["failed"]
        self.write()

    def write(self) -> None:
        write_json(self.path, self.data)


def summed_up(gates: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Of an entry's gates: how many, the red ones, and the green one that was closest to red."""
    gates = list(gates)
    bounded = [gate for gate in gates if gate["ok"] and gate.get("allowed")]
    found = {"checked": len(gates), "red": [gate for gate in gates if not gate["ok"]]}
    if bounded:
        found["closest"] = max(bounded, key=lambda gate: gate["error"] / gate["allowed"])
    return found


def together(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """A case's row with what a later run added: ratios are of one run each, so they stay right.

    Times of ours are the first run's; those of the second are kept as groups "..., again".
    """
    if first is None:
        return second
    merged = dict(first)
    for key in ("over_ours", "peak_bytes", "held_bytes", "first_call_ms"):
        merged[key] = {**second.get(key, {}), **first.get(key, {})}
    kept = {n: why for n, why in first["skipped"].items() if n not in second["over_ours"]}
    merged["skipped"] = {**second["skipped"], **kept}
    for key in ("times", "rounds"):
        merged[key] = dict(first[key])
        for group, value in second[key].items():
            merged[key][f"{group}, again" if group in first[key] else group] = value
    if first.get("commit") != second.get("commit"):
        late = dict.fromkeys(second["over_ours"], second.get("commit"))
        merged["commits"] = {**late, **first.get("commits", {})}
    return merged


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
        same = ("schema", "device", "cpu", "torch", "threads")
        alike = all(part[key] == data[key] for key in same)
        if not alike or part["quick"] or not part.get("complete"):
            raise SystemExit(f"{path.name} does not go with {whole.name}: measure again")
        for entry in part["entries"]:
            kept = {n: case for n, case in data["cases"].items() if case["entry"] != entry}
            data["cases"] = kept | part["cases"]
            about = {"file": path.name, "commit": part["commit"], "date": part["date"]}
            data["parts"][entry] = about
        data["gates"] |= part["gates"]
    return data


@cache
def commit() -> str:
    """The checked-out commit, and whether what is measured has been changed since.

    In a copy without its .git FASTDIFF_COMMIT in the environment says it.
    """
    head = first_line("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD")
    sources = ("fastdiff", "kernels", "csrc", "setup.py", "bench")
    status = ("git", "-C", str(ROOT), "status", "--porcelain", "--")
    changed = first_line(*status, *sources, ":(exclude)bench/results")
    if not head:
        return os.environ.get("FASTDIFF_COMMIT", "unknown")
    return f"{head}, with changes" if changed else head


def first_line(*command: str) -> str:
    """What a command prints first; "" where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.partition("\n")[0].strip() if done.returncode == 0 else ""
