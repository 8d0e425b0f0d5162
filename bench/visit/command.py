"""The command line of a visit: `python -m bench gpu`."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import ROOT
from .brought import prepared
from .lines import Lines, reds
from .plan import BUDGET_S, BUILD, PLAN, RESERVE_S, Unit, follow_up, missing
from .schedule import Visit


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench gpu",
        description="Evidence from a GPU, in order of worth, within a number of seconds. A second "
        "call with the same --out goes on: first what failed, then what did not fit.",
    )
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS",
                        help="it ends by then; %(default)s")  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "visit", metavar="DIR",
                        help="where all results go; %(default)s")  # fmt: skip
    parser.add_argument("--only", action="append", metavar="UNIT",
                        help=f"one of: {', '.join(u.name for u in PLAN)} (repeatable)")  # fmt: skip
    parser.add_argument(
        "--dry", action="store_true", help="the same on the CPU, small sizes: no number of a GPU"
    )
    parser.add_argument(
        "--rehearse", type=float, metavar="SECONDS", help="the schedule with scripted processes"
    )
    return parser


def main(given: list[str]) -> int:
    """0 where all that ran is green."""
    begun = time.time()
    parser = arguments()
    options = parser.parse_args(given)
    if options.budget <= 0 or (options.rehearse or 1) <= 0:
        parser.error("--budget and --rehearse must be more than 0 seconds")
    known = [unit.name for unit in PLAN]
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"--only must be one of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    if options.rehearse:
        from .rehearsal import rehearse

        return rehearse(options.rehearse)
    if not options.dry and not has_gpu():
        print("bench gpu needs a CUDA GPU and nvidia-smi finds none; "
              "--dry walks the same path on the CPU")  # fmt: skip
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` ends the children
    out = options.out.resolve()
    lines = Lines(out)
    before = lines.record() if lines.path.exists() else None
    if before and bool(before.get("dry")) != options.dry:
        parser.error(f"--out must be of the same kind of run: {out} holds "
                     f"{'a dry run' if before.get('dry') else 'a real one'}")  # fmt: skip
    lines.append(
        "head",
        command=" ".join(["python -m bench gpu", *map(shlex.quote, given)]),
        dry=options.dry,
        quick=options.dry,
        visited=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    env = {**os.environ, **prepared(), "PYTHONUNBUFFERED": "1"}
    env |= {"TRITON_INTERPRET": "1"} if options.dry else {}
    visit = Visit(
        chosen(options.only, before),
        out,
        deadline=begun + options.budget - RESERVE_S,
        command=lambda unit, part, until: child(unit, part, until, out, options.dry),
        build=BUILD,
        env=env,
        again=lambda name: again(name, options),
        say=lambda line: print(line, flush=True),
    )
    green = visit.run()
    print(summary(lines.record(), time.time() - begun, out))
    return 0 if green else 1


def has_gpu() -> bool:
    """Whether the driver lists one; torch is not asked, so that this process stays small."""
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0 and "GPU" in done.stdout


def chosen(only: list[str] | None, before: dict[str, Any] | None) -> list[Unit]:
    """The units of a call: of a second one, failures first, then what is not done."""
    if only:
        return [unit for unit in PLAN if unit.name in {*only, "doctor"}]
    if before is None:
        return list(PLAN)
    # The doctor runs again, because this may be another machine.
    return [PLAN[0], *follow_up(before, reds(before)), *missing(before)]


def child(unit: Unit, part: str, until: float, out: Path, dry: bool) -> list[str]:
    """The process that does a part of a unit; it begins nothing in its last seconds."""
    until -= min(3.0, 0.1 * unit.limit_s)
    order = {"unit": asdict(unit), "part": part, "until": until, "out": str(out), "dry": dry}
    return [sys.executable, "-m", "bench.visit.child", json.dumps(order)]


def again(name: str, options: argparse.Namespace) -> str:
    """The command that does a unit that did not fit."""
    dry = " --dry" if options.dry else ""
    return f"python -m bench gpu --out {shlex.quote(str(options.out))} --only {name!r}{dry}"


def summary(record: dict[str, Any], seconds: float, out: Path) -> str:
    """A table of the visit's cases, and its outcome in a few lines."""
    lines = []
    for name, row in record["cases"].items():
        ratios = "  ".join(f"{other} {ratio:.2f}x" for other, ratio in row["over_ours"].items())
        copy = f"{row['of_copy']:4.0%} of copy  " if "of_copy" in row else ""
        lines.append(f"{name:56} {row['p50_us']:10.1f} us  {copy}{ratios}")
    wrong = reds(record)
    for kind, names in wrong.items():
        if names:
            lines.append(f"RED {kind}: {', '.join(names[:12])}" + " ..." * (len(names) > 12))
    if record["left"]:
        lines.append("did not fit: " + ", ".join(record["left"]))
    triton = record["triton"]
    if triton:
        lines.append(
            f"Triton: {triton['cached']} variants from the cache, {triton['compiled']} compiled"
        )
    tests = record["tests"].values()
    gates = record["gates"].values()
    checked = sum(found["checked"] for found in gates)
    red = sum(len(found["red"]) for found in gates)
    lines.append(
        f"{sum(t['ok'] for t in tests)} of {len(tests)} tests, {checked - red} of "
        f"{checked} gates, {len(record['cases'])} cases in {seconds:.0f} s"
    )
    dry = " (dry: no number of a GPU)" if record.get("dry") else ""
    lines.append(f"{'RED' if any(wrong.values()) else 'green'}{dry}: {out / 'record.json'}")
    if not record.get("dry"):
        lines.append(f"to publish: cp {out / 'record.json'} bench/results/{record.get('slug')}.json"
                     " && python -m bench report")  # fmt: skip
    return "\n".join(lines)
