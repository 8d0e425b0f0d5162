"""A visit with scripted processes in place of real ones: does the schedule keep its word?

Units last half, exactly or three times what they should, hang, abort, end with a red gate or test;
diffusers and the extension are not there. Two calls share the seconds as on a real visit. Checked
is what is promised of a schedule, whatever its units do.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from .lines import Line, Lines, reds
from .plan import BUDGET_S, BUILD, PLAN, RESERVE_S, Unit, follow_up, missing
from .schedule import Visit

FIRST = 0.775  # the first call's share of the seconds
LATE_S = 3.0  # how much later than its budget a call may end
SCRIPT: dict[str, tuple[float, str]] = {  # how much of its seconds a unit takes, and how it ends
    "smoke": (0.5, ""),
    "step": (1.0, "red gate"),
    "spectral": (3.0, ""),
    "haar": (0.5, ""),
    "profiler": (1.0, "abort"),
    "checks": (0.6, "red test"),
    "compiled rows": (1.0, "hang"),
    "tune": (0.5, ""),
    "build": (0.3, ""),
}


def main(given: list[str]) -> int:
    """A scripted process: `python -m bench.visit.rehearsal UNIT PART SECONDS FAULT OUT CASES`."""
    name, part, seconds, fault, out, cases = given
    lines, claimed = Lines(Path(out)), Path(out).parent / "claimed.jsonl"
    if name == "doctor":
        lines.append("head", device="a rehearsal", slug="rehearsal",
                     machine={"extension": False, "diffusers": False})  # fmt: skip
    until, number = time.time() + float(seconds), 0
    while number < int(cases) or time.time() < until:
        time.sleep(min(0.05, float(seconds) / max(int(cases), 1)))
        if number < int(cases):
            case = f"{name} {part} {number}"
            row = {"entry": name, "kind": "op", "p20_us": 1.0, "p50_us": 1.0, "p80_us": 1.0,
                   "over_ours": {"x": 2.0}, "skipped": {}, "times": {}, "rounds": {}}  # fmt: skip
            lines.append("case", name=case, row=row)
            # After the append: whatever stands here must be in the record.
            with claimed.open("a") as file:
                file.write(json.dumps(case) + "\n")
        number += 1
        if fault == "abort":
            os._exit(134)
        while fault == "hang":
            time.sleep(1)
    if fault == "red gate":
        lines.append("gates", entry=name, gates=[{"case": "planted", "ok": False}])
    if fault == "red test":
        lines.append("test", name="tests/planted.py::test", ok=False, outcome="failed")
    return 1 if fault else 0


def rehearse(seconds: float) -> int:
    """Both calls within so many seconds, and what was checked of them; 0 where all holds."""
    with tempfile.TemporaryDirectory() as folder:
        wrong = _rehearsed(seconds, Path(folder) / "visit")
    for complaint in wrong:
        print(f"RED {complaint}")
    print("rehearsal RED" if wrong else "rehearsal green")
    return 1 if wrong else 0


def _rehearsed(seconds: float, out: Path) -> list[str]:
    scale = seconds * FIRST / BUDGET_S

    def scaled(unit: Unit) -> Unit:
        return replace(unit, seconds=unit.seconds * scale, most=unit.most * scale)

    plan = [scaled(unit) for unit in PLAN]

    def command(unit: Unit, part: str, until: float) -> list[str]:
        share, fault = SCRIPT.get(unit.name, (1.0, ""))
        cases = 0 if unit.name == "doctor" else 3
        given = unit.name, part, share * unit.seconds, fault, out, cases
        return [sys.executable, "-m", "bench.visit.rehearsal", *map(str, given)]

    def call(units: list[Unit], budget: float) -> tuple[list[Line], float]:
        before, begun = len(Lines(out).read()), time.time()
        env = {**os.environ, "PYTHONPATH": os.getcwd()}
        Visit(list(units), out, begun + budget - RESERVE_S * scale, command, scaled(BUILD), env,
              again=lambda name: f"again {name}", say=print).run()  # fmt: skip
        return Lines(out).read()[before:], time.time() - begun

    out.mkdir(parents=True)
    wrong: list[str] = []
    stop, reader = _reader(out / "record.json", wrong)
    try:
        Lines(out).append("head", command="rehearsal", dry=True, quick=True)
        print(f"first call: {seconds * FIRST:.1f} s")
        first, took = call(plan, seconds * FIRST)
        wrong += _late("the first call", took, seconds * FIRST) + _in_order(first, plan)
        record = Lines(out).record()
        ahead, rest = (
            [scaled(unit) for unit in units]
            for units in (follow_up(record, reds(record)), missing(record))
        )
        print(f"second call: {seconds * (1 - FIRST):.1f} s")
        second, took = call([plan[0], *ahead, *rest], seconds * (1 - FIRST))
        wrong += _late("the second call", took, seconds * (1 - FIRST))
        wrong += _in_order(second, [plan[0], *ahead, *rest])
    finally:
        stop.set()
        reader.join()
    return wrong + _kept(out, first, second)


def _reader(path: Path, wrong: list[str]) -> tuple[threading.Event, threading.Thread]:
    """A thread that reads the record again and again: it must be whole at every moment."""
    stop = threading.Event()

    def read() -> None:
        while not stop.wait(0.02):
            try:
                json.loads(path.read_text())
            except FileNotFoundError:
                continue
            except ValueError as error:
                wrong.append(f"the record was not whole at a moment: {error}")

    thread = threading.Thread(target=read)
    thread.start()
    return stop, thread


def _late(name: str, took: float, budget: float) -> list[str]:
    return [] if took <= budget + LATE_S else [f"{name} ended {took - budget:.1f} s late"]


def _in_order(lines: list[Line], plan: list[Unit]) -> list[str]:
    """Units begin in the plan's order, but for what waits for the build, and only if they fit."""
    wrong = [
        f"{line['name']} began with {line['left']} s left of {line['seconds']:.1f}"
        for line in lines
        if line["kind"] == "begin" and line.get("left", 1e9) < line["seconds"] - 0.01
    ]
    begun = [line["name"] for line in lines if line["kind"] == "begin" and "aside" not in line]
    free = [unit.name for unit in plan if not unit.needs]
    order = [name for name in begun if name in free]
    if order != [name for name in free if name in order]:
        wrong.append(f"units began in another order than planned: {', '.join(order)}")
    if needy := [u.name for u in plan if "diffusers" in u.needs and u.name in begun]:
        wrong.append(f"without diffusers began: {', '.join(needy)}")
    return wrong


def _kept(out: Path, first: list[Line], second: list[Line]) -> list[str]:
    """Complaints unless the record has all that was appended and faults cost no other unit."""
    record, wrong = json.loads((out / "record.json").read_text()), []
    said = {json.loads(line) for line in (out.parent / "claimed.jsonl").read_text().splitlines()}
    if lost := said - record["cases"].keys():
        wrong.append(f"lost: {', '.join(sorted(lost))}")
    ended = {line["name"]: line for line in first if line["kind"] == "unit"}
    check: dict[str, Callable[[dict[str, Any]], bool]] = {
        "step": lambda unit: not unit["ok"] and not unit["killed"],
        "spectral": lambda unit: unit["killed"],
        "profiler": lambda unit: set(unit["codes"].values()) == {134},
        "checks": lambda unit: not unit["ok"] and not unit["killed"],
        "smoke": lambda unit: unit["ok"],
    }
    wrong += [
        f"{name} ended as {ended.get(name)}"
        for name, right in check.items()
        if name not in ended or not right(ended[name])
    ]
    begun = [line["name"] for line in second if line["kind"] == "begin" and "aside" not in line]
    if begun[1:2] != ["red tests again"]:
        wrong.append(f"the second call began with {', '.join(begun[:3])}")
    planned = {unit.name for unit in PLAN if "cold" not in unit.needs}
    if lost := planned - record["units"].keys() - record["left"].keys():
        wrong.append(f"neither done nor listed as left: {', '.join(sorted(lost))}")
    if files := [path.name for path in out.iterdir()][8:]:
        wrong.append(f"more than 8 files: {', '.join(files)}")
    return wrong


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
