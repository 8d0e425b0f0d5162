"""Units within a budget of seconds: each in process groups of its own, each with a limit.

A unit begins only where its estimate fits what is left. What it outstays, crashes on or poisons is
lost to it alone. After every unit the record is merged anew.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import ROOT, write_json
from .lines import CUT, Lines, reds
from .plan import Unit

Command = Callable[[Unit, str, float], list[str]]  # unit, part, epoch seconds it must end by
TAIL = 4000  # characters of a unit's log that its line keeps


class Running:
    """The processes of a unit."""

    def __init__(
        self, unit: Unit, until: float, command: Command, env: Mapping[str, str], log: Path
    ) -> None:
        self.unit, self.until, self.begun, self.log = unit, until, time.time(), log
        with log.open("a") as file:
            print(f"\n== {unit.name} ==", file=file)
        self.from_byte = log.stat().st_size
        blocking = {"CUDA_LAUNCH_BLOCKING": "1"} if unit.blocking else {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for part in unit.parts:
            with log.open("ab") as file:
                self.processes[part] = subprocess.Popen(
                    command(unit, part, until), env={**env, **blocking}, stdout=file,
                    stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                    cwd=ROOT,
                )  # fmt: skip

    @property
    def ended(self) -> bool:
        return all(process.poll() is not None for process in self.processes.values())

    def end(self) -> dict[str, Any]:
        """Kill what still runs; how it went, for the unit's line."""
        killed = [part for part, process in self.processes.items() if process.poll() is None]
        for process in self.processes.values():
            try:
                os.killpg(process.pid, signal.SIGKILL)  # the whole group: children of a process too
            except ProcessLookupError:
                continue
        for process in self.processes.values():
            try:
                process.wait(timeout=1)
            except subprocess.TimeoutExpired:  # The driver may hold a killed process for a while.
                continue
        codes = {part: process.poll() for part, process in self.processes.items()}
        bad = {part: code for part, code in codes.items() if code != 0}
        with self.log.open("rb") as file:
            file.seek(self.from_byte)
            said = file.read().decode(errors="replace")
        return {
            "ok": not bad,
            "seconds": round(time.time() - self.begun, 1),
            "codes": {part or "all": code for part, code in bad.items()},
            "killed": bool(killed),
            "said": said[-TAIL:] if bad else said[-200:],
        }


@dataclass
class Visit:
    """One call: the units that are `waiting`, until `deadline`, into the folder `out`.

    Attributes:
        waiting: what is to be done, in order.
        deadline: epoch seconds; the last unit has ended by then.
        command: the process that does a part of a unit.
        build: the unit that makes the extension, beside others.
        env: of the processes.
        again: a unit's name to the command that does what did not fit.
        say: prints a line.
    """

    waiting: list[Unit]
    out: Path
    deadline: float
    command: Command
    build: Unit
    env: Mapping[str, str]
    again: Callable[[str], str]
    say: Callable[[str], None]
    running: Running | None = None
    building: Running | None = None

    def __post_init__(self) -> None:
        self.lines, self.log = Lines(self.out), self.out / "log.txt"

    def run(self) -> bool:
        """Whether nothing is red. What did not fit is in the record, with its command."""
        try:
            return self._all()
        finally:  # SIGTERM ends this process by an exception too.
            for running in (self.running, self.building):
                if running is not None:
                    running.end()

    def _all(self) -> bool:
        while self.waiting:
            unit = self._next()
            if unit is None:
                if self.building is None or time.time() > self.deadline:
                    break
                time.sleep(0.05)  # All that is left waits for the extension.
                self._look_at_build()
                continue
            self.waiting.remove(unit)
            self._run(unit)
            self._look_at_build()
        if self.building is not None:
            self._built()
        left = {unit.name: {"seconds": unit.seconds, "needs": unit.needs,
                            "command": self.again(unit.name)}
                for unit in self.waiting if "cold" not in unit.needs}  # fmt: skip
        self.lines.append("left", units=left)
        self.merge()
        return not any(reds(self.lines.record()).values())

    def _next(self) -> Unit | None:
        """The first unit that fits and has what it needs."""
        left, there = self.deadline - time.time(), self._there()
        return next(
            (u for u in self.waiting if u.seconds <= left and there.issuperset(u.needs)), None
        )

    def _there(self) -> set[str]:
        machine = self.lines.record().get("machine", {})
        return {need for need in ("extension", "diffusers", "cold") if machine.get(need) is True}

    def _run(self, unit: Unit) -> None:
        left = self.deadline - time.time()
        self.lines.append("begin", name=unit.name, seconds=unit.seconds, left=round(left, 2))
        until = time.time() + min(unit.limit_s, left)
        self.running = running = Running(unit, until, self.command, self.env, self.log)
        while not running.ended and time.time() < until:
            time.sleep(0.02)
        self._keep(running)
        self.running = None
        if unit.kind == "doctor":
            self._start_build()

    def _keep(self, running: Running) -> None:
        unit, went = running.unit, running.end()
        self.lines.append("unit", name=unit.name, **went)
        self.merge()
        cut = set(went["codes"].values()) == {CUT}
        word = "ok " if went["ok"] else "cut" if cut else "RED"
        killed = ", killed at its limit" if went["killed"] else ""
        self.say(f"{unit.name:28} {word} {went['seconds']:6.1f} s of {unit.seconds:.1f}{killed}")

    # -- the extension, where none that fits was brought along ------------------------------------

    def _start_build(self) -> None:
        machine = self.lines.record().get("machine", {})
        if machine.get("extension") is False and any("extension" in u.needs for u in self.waiting):
            unit = self.build
            self.lines.append("begin", name=unit.name, seconds=unit.seconds, aside=True)
            self.building = Running(unit, self.deadline, self.command, self.env, self.log)

    def _look_at_build(self) -> None:
        if self.building is not None and self.building.ended:
            self._built()

    def _built(self) -> None:
        assert self.building is not None
        building, self.building = self.building, None
        ok = building.ended and all(p.returncode == 0 for p in building.processes.values())
        self._keep(building)
        machine = self.lines.record().get("machine", {})
        self.lines.append("head", machine={**machine, "extension": ok})

    def merge(self) -> None:
        write_json(self.out / "record.json", self.lines.record())
