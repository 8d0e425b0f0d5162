"""What a visit to a GPU is for, in order of worth, with the seconds that each unit should take.

A unit that was never run has an estimate from a CPU's rehearsal and the bytes that it moves; one
that was has the measured seconds rounded up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..entries import NAMES as ENTRIES

BUDGET_S = 515.0
RESERVE_S = 2.0  # for the last merge


@dataclass(frozen=True)
class Unit:
    """A part of a visit: processes that begin together, killed where they outstay their limit.

    Attributes:
        name: on the command line and in the record.
        kind: the function of child.py that does it.
        seconds: the estimate; it begins only where so much is left.
        entries: of bench/registry.py, for times and gates.
        cases: a regular expression that finds the cases' names; "" all of them.
        compiled: baselines of torch.compile: left out, alone (True), or with the others (None).
        parts: what its processes do, one each, all at once.
        needs: what must be there: "extension" (with CUDA kernels), "diffusers"; or "cold": a Triton
            cache that does not serve.
        names: tests or cases, where it is for some alone.
        blocking: whether launches wait, so that an error's traceback names its launch.
        most: seconds after which it is killed; 0: two and a half times the estimate.
    """

    name: str
    kind: str
    seconds: float
    entries: tuple[str, ...] = ()
    cases: str = ""
    compiled: bool | None = False
    parts: tuple[str, ...] = ("",)
    needs: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    blocking: bool = False
    most: float = 0

    @property
    def limit_s(self) -> float:
        return self.most or max(2.5 * self.seconds, 2.0)


def times(name: str, seconds: float, *entries: str, cases: str = "", **options: Any) -> Unit:
    return Unit(name, "times", seconds, entries, cases, **options)


PROBES = ("generator", "broken_capture", "compiled_bits", "workspace", "transforms", "haar",
          "launches", "deterministic")  # fmt: skip
WITH_DIFFUSERS = {"captured_loop", "scheduler_step", "pipeline"}
SIZES = "(64x4x512x512|16x3x256x256|4x4x64x64|1x3x32x32)$"

PLAN = (
    Unit("doctor", "doctor", 15, most=90),
    Unit("warm", "warm", 40, needs=("cold",)),
    Unit("smoke", "probe", 30, parts=PROBES),
    Unit("profiler", "probe", 8, parts=("profiler",)),  # by itself, because it times launches
    times("step", 45, "multistep_step", cases=f"^(copy|ddim|plms|unipc) {SIZES}"),
    times("captured DDPM", 40, "captured_loop", cases="^DDPM CIFAR-10, .* 1x",
          needs=("diffusers",)),
    times("haar", 30, "haar", needs=("extension",),
          cases="^(split|merge|step|noise|loss|expand).* (16x3x256x256|64x3x128x128)"),
    times("spectral", 30, "spectral_filter", "spectral_update",
          cases="64x3x32x32|64x3x64x64|256x3x64x64|4x3x256x256"),
    times("captured Stable Diffusion", 45, "captured_loop", cases="^Stable Diffusion 1.5, .* 1x",
          needs=("diffusers",)),
    Unit("checks", "check", 110, parts=("tests", "memcheck", "racecheck", *ENTRIES), most=170),
    times("captured DDPM, compiled", 60, "captured_loop", cases="^DDPM CIFAR-10, DDIM 1x",
          compiled=True, needs=("diffusers",)),
    times("compiled rows", 35, "multistep_step", "haar", compiled=True, needs=("extension",),
          cases="^(plms|ddim|split|step) .*(16x3x256x256|4x4x64x64)"),
    Unit("tune", "tune", 35),
    Unit("launches", "launches", 15),
    times("sums and noise", 30, "weighted_sums", "seeded_noise"),
    Unit("counters", "counters", 40),
    times("solver loops", 45, "solver_loop", cases="^(ipndm|plms|ddim|unipc|dpmpp_2m) .*steps=10"),
    times("captured larger networks", 70, "captured_loop", cases="^(EDM|DDPM LSUN).* 1x",
          needs=("diffusers",)),
    times("captured batch of 4", 80, "captured_loop", cases="^(DDPM CIFAR-10|Stable).* 4x",
          needs=("diffusers",)),
    *(times(f"the rest of {entry}", 60 if entry != "captured_loop" else 240, entry, compiled=None,
            needs=(("diffusers",) if entry in WITH_DIFFUSERS else
                   ("extension",) if entry == "haar" else ()))
      for entry in ENTRIES),
)  # fmt: skip
BUILD = Unit(
    "build", "build", 90
)  # of the extension, beside other units, if no fitting one was brought

NOISY = 1.1  # times its 20th percentile: a case whose 80th is above that is measured again


CAPTURES = ("capture/test_gpu", "pipelines")  # tests whose captures blocking launches might disturb


def follow_up(record: dict[str, Any], wrong: dict[str, list[str]]) -> tuple[Unit, ...]:
    """What a second call does first: failures with their whole story, then what was noisy."""
    entries = {record["cases"].get(name, {}).get("entry") or name.partition(" ")[0]
               for name in wrong["cases"]} | set(wrong["gates"])  # fmt: skip
    crashed = [unit for unit in PLAN if unit.name in wrong["units"] and unit.kind == "times"]
    entries |= {entry for unit in crashed for entry in unit.entries}
    noisy = [name for name, row in record["cases"].items()
             if row["p80_us"] > NOISY * row["p20_us"] and row.get("kind") == "op"]  # fmt: skip
    of_graphs = [test for test in wrong["tests"] if any(word in test for word in CAPTURES)]
    others = [test for test in wrong["tests"] if test not in of_graphs]
    units = []
    if others:
        units.append(Unit("red tests again", "test", 40, names=tuple(others), blocking=True))
    if of_graphs:
        units.append(Unit("red captures again", "test", 30, names=tuple(of_graphs)))
    if wrong["probes"]:
        units.append(
            Unit("red probes again", "probe", 15, parts=tuple(wrong["probes"]), blocking=True)
        )
    if entries:
        units.append(Unit("red entries again", "explain", 30, tuple(sorted(entries)),
                          names=tuple(wrong["cases"]), blocking=True))  # fmt: skip
    if noisy:
        units.append(Unit("noisy cases again", "again", 30, names=tuple(noisy)))
    return tuple(units)


def missing(record: dict[str, Any]) -> tuple[Unit, ...]:
    """Of the plan what is not done; of a unit of several parts those that were killed or crashed.

    Red tests, gates and probes are done: `follow_up` has them.
    """
    left = []
    for unit in PLAN[1:]:
        went = record["units"].get(unit.name)
        if went is None:
            left.append(unit)
        elif not went["ok"] and unit.kind in ("check", "probe"):
            crashed = tuple(p for p, code in went["codes"].items() if code not in (0, 1))
            if crashed:
                left.append(replace(unit, parts=crashed if len(unit.parts) > 1 else unit.parts))
        elif not went["ok"]:
            left.append(unit)
    return tuple(left)
