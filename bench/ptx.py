"""The Triton kernels' GPU tests and gates on their machine code: `python -m bench.ptx`, no GPU.

What Triton compiles for an H100 is executed on the CPU (tests/helpers/ptx.py), in processes
of their own, one a core. Prints what ran of each kernel; exit code 1 where a test failed.
The first run compiles some 700 variants, minutes of it; Triton's cache keeps them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLUGIN = "tests.helpers.ptx_device"
GATES = "tests/kernels/test_gates.py"
TESTS = (  # of a process each, the longest first
    *((GATES, "-k", entry) for entry in ("weighted_sums", "multistep_step")),
    ("tests/kernels/test_spectral_update.py",),
    *((GATES, "-k", entry) for entry in ("spectral_filter", "spectral_update")),
    *((f"tests/kernels/test_{name}.py",)
      for name in ("half_spectrum", "weighted_sums", "multistep_step", "spectral_filter")),
    (GATES, "-k", "seeded_noise"),
)  # fmt: skip


FILES = tuple(dict.fromkeys(test[0] for test in TESTS))
ARCH = 90


@dataclass
class Count:
    """Of one kernel."""

    launches: int = 0
    bfloat16: int = 0  # launches with an operand or a result of it
    variants: set[str] = field(default_factory=set)
    tests: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        tests, variants = len(self.tests), len(self.variants)
        return (f"{tests} tests, {variants} variants, {self.launches} launches "
                f"({self.bfloat16} with bfloat16)")  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """What can be added to the counts of other processes."""
        return {"tests": sorted(self.tests), "variants": sorted(self.variants),
                "launches": self.launches, "bfloat16": self.bfloat16}  # fmt: skip

    def add(self, other: dict[str, Any]) -> None:
        self.tests |= set(other["tests"])
        self.variants |= set(other["variants"])
        self.launches += other["launches"]
        self.bfloat16 += other["bfloat16"]


def run(
    *arguments: str, plugin: str = PLUGIN, path: Sequence[Path] = ()
) -> subprocess.CompletedProcess[str]:
    """pytest with launches that run as PTX, its output kept."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"  # a process a core: threads beside them only wait
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider", "-m", "gpu",
         *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ptx", description="Kernels as PTX.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the counts, if all pass")
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        counts = [Path(folder) / f"{number}.json" for number in range(len(TESTS))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            done = list(pool.map(
                lambda test, to: run("--ptx-json", str(to), *test), TESTS, counts
            ))  # fmt: skip
        totals: dict[str, Count] = defaultdict(Count)
        for file in filter(Path.exists, counts):
            for kernel, count in json.loads(file.read_text()).items():
                totals[kernel].add(count)
    for test, result in zip(TESTS, done, strict=True):
        if result.returncode:
            print(result.stdout[-6000:] + result.stderr[-2000:])
        print(
            f"{' '.join(test)}: {result.stdout.strip().splitlines()[-1:] or result.stderr[-500:]}"
        )
    for kernel, total in sorted(totals.items()):
        print(f"{kernel}: {total}")
    red = any(result.returncode for result in done)
    if options.json and not red:
        import triton

        gates = {t for total in totals.values() for t in total.tests if t.startswith(GATES)}
        head = {"command": "python -m bench.ptx", "triton": triton.__version__, "arch": ARCH,
                "date": datetime.date.today().isoformat()}  # fmt: skip
        kernels = {
            kernel: {
                "tests": len(total.tests - gates), "entries of gates": len(total.tests & gates),
                "variants": len(total.variants), "launches": total.launches,
                "with bfloat16": total.bfloat16,
            }
            for kernel, total in sorted(totals.items())
        }  # fmt: skip
        options.json.write_text(json.dumps({**head, "kernels": kernels}, indent=1) + "\n")
    return int(red)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
