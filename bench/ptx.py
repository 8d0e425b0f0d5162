"""The Triton kernels' GPU tests on their machine code: `python -m bench.ptx`, no GPU.

What Triton compiles for an H100 is executed on the CPU (tests/helpers/ptx.py), in a process a
core. Prints what ran of each kernel; exit code 1 where a test failed. The first run compiles
hundreds of variants, minutes of it; Triton's cache keeps them.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import ROOT, write_json

PLUGIN = "tests.helpers.ptx_device"
TESTS = tuple(  # of the files in kernels/
    f"tests/kernels/test_{kernel.stem}.py"
    for kernel in sorted((ROOT / "kernels").glob("[!_]*.py"))
    if (ROOT / f"tests/kernels/test_{kernel.stem}.py").is_file()
)
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
    *arguments: str, plugin: str = PLUGIN, path: Sequence[Path] = (), capture: bool = True
) -> subprocess.CompletedProcess[str]:
    """pytest with launches that run as PTX, its output kept or shown."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"  # a process a core: threads beside them only wait
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (*path, ROOT)))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", plugin, "-p", "no:cacheprovider", "-m", "gpu",
         *arguments],
        cwd=ROOT, env=environment, capture_output=capture, text=True, check=False,
    )  # fmt: skip


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ptx", description="Kernels as PTX.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the counts, if all pass")
    options = parser.parse_args(given)
    totals: dict[str, Count] = defaultdict(Count)
    with tempfile.TemporaryDirectory() as folder:
        done = run(
            "-n", "auto", "--maxschedchunk", "1", "--ptx-counts", folder, *TESTS, capture=False
        )
        for file in Path(folder).iterdir():
            for kernel, count in json.loads(file.read_text()).items():
                totals[kernel].add(count)
    for kernel, total in sorted(totals.items()):
        print(f"{kernel}: {total}")
    red = done.returncode != 0
    if options.json and not red:
        import triton

        head = {"command": "python -m bench.ptx", "triton": triton.__version__, "arch": ARCH,
                "date": datetime.date.today().isoformat()}  # fmt: skip
        kernels = {
            kernel: {
                "tests": len(total.tests), "variants": len(total.variants),
                "launches": total.launches, "with bfloat16": total.bfloat16,
            }
            for kernel, total in sorted(totals.items())
        }  # fmt: skip
        write_json(options.json, {**head, "kernels": kernels})
    return int(red)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
