"""The Triton kernels' GPU tests and gates on their machine code: `python -m bench.ptx`, no GPU.

What Triton compiles for an H100 is executed on the CPU (tests/helpers/ptx.py), in processes
of their own, one a core. Prints what ran of each kernel; exit code 1 where a test failed.
The first run compiles some 700 variants, minutes of it; Triton's cache keeps them.
"""

from __future__ import annotations

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


@dataclass
class Count:
    """Of one kernel."""

    launches: int = 0
    variants: set[str] = field(default_factory=set)
    tests: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        tests, variants = len(self.tests), len(self.variants)
        return f"{tests} tests, {variants} variants, {self.launches} launches"

    def to_json(self) -> dict[str, Any]:
        """What can be added to the counts of other processes."""
        return {"tests": sorted(self.tests), "variants": sorted(self.variants),
                "launches": self.launches}  # fmt: skip

    def add(self, other: dict[str, Any]) -> None:
        self.tests |= set(other["tests"])
        self.variants |= set(other["variants"])
        self.launches += other["launches"]


def run(
    *arguments: str, plugin: str = PLUGIN, path: Sequence[Path] = ()
) -> subprocess.CompletedProcess[str]:
    """pytest with launches that run as PTX, its output kept."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider", "-m", "gpu",
         *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


def main() -> int:
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
    return int(any(result.returncode for result in done))


if __name__ == "__main__":
    sys.exit(main())
