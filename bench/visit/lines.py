"""What a visit finds, a JSON object a line, and the record that is made of the lines.

Any number of processes append to one file. A process that is killed loses what it had not found
yet, and nothing else.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..record import summed_up, together

Line = dict[str, Any]
CUT = 75  # the exit code of a process that had no time for all that it was to do


class Lines:
    """The file of lines under a folder."""

    def __init__(self, out: Path) -> None:
        self.path = out / "visit.jsonl"

    def append(self, kind: str, **data: Any) -> None:
        """One line, in one write: lines of several processes do not mix."""
        line = json.dumps({"kind": kind, "at": round(time.time(), 2), **data}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def read(self) -> list[Line]:
        """All lines that are whole: a full disk or a kill may have left a part of one."""
        found = []
        for text in self.path.read_text().splitlines() if self.path.exists() else ():
            try:
                found.append(json.loads(text))
            except ValueError:
                continue
        return found

    def record(self) -> dict[str, Any]:
        return merged(self.read())


def merged(lines: Iterable[Line]) -> dict[str, Any]:
    """The record of a visit, shaped as those of `python -m bench`; later lines count.

    Besides gates, skipped, cases and failed: `units` (how each ended), `tests`, `probes`,
    `counters` of kernels, `triton` (variants compiled and found in the cache), `left` (units that
    did not fit, and their commands).
    """
    record: dict[str, Any] = {}
    gates: dict[str, dict[str, Any]] = {}  # by entry and by what is compared
    kept: dict[str, dict[str, Any]] = {
        key: {} for key in ("gates", "skipped", "cases", "failed", "units", "tests", "probes",
                            "counters", "triton", "left")
    }  # fmt: skip
    for line in lines:
        kind, data = line["kind"], {k: v for k, v in line.items() if k not in ("kind", "at")}
        if kind == "head":
            record |= data
        elif kind == "gates":
            gates.setdefault(data["entry"], {}).update({g["case"]: g for g in data["gates"]})
        elif kind == "case":
            name = data["name"]
            kept["failed"].pop(name, None)
            kept["cases"][name] = together(kept["cases"].get(name), data["row"])
        elif kind == "launches":
            kept["cases"][data["name"]]["launches"] = data["count"]
        elif kind in ("failed", "skipped"):
            kept[kind][data["name"]] = data["said"]
        elif kind == "left":
            kept["left"] = data["units"]
        elif kind in ("unit", "test", "probe", "counter"):
            name = data.pop("name")
            kept[kind + "s"][name] = data
        elif kind == "triton":
            for key in ("compiled", "cached"):
                kept["triton"][key] = kept["triton"].get(key, 0) + data[key]
    kept["gates"] = {entry: summed_up(found.values()) for entry, found in gates.items()}
    ended = all(unit["ok"] for unit in kept["units"].values())  # a unit that was cut is not ok
    return record | kept | {"complete": ended and not kept["left"] and not kept["failed"]}


def reds(record: dict[str, Any]) -> dict[str, list[str]]:
    """What went wrong, by kind: names of tests, probes, entries with a red gate, cases, units."""
    return {
        "tests": [name for name, test in record["tests"].items() if not test["ok"]],
        "probes": [name for name, probe in record["probes"].items() if not probe["ok"]],
        "gates": [entry for entry, found in record["gates"].items() if found["red"]],
        "cases": list(record["failed"]),
        "units": [
            name
            for name, unit in record["units"].items()
            if not unit["ok"] and set(unit["codes"].values()) != {CUT}
        ],
    }
