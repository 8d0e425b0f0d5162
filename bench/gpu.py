"""`python -m bench gpu`: is every kernel right on this GPU, and how near to a copy does it run?"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from fastdiff import _ext
from fastdiff.ops import multistep_step_unchecked

from . import timing
from .step import ROWS, Row, arguments, gate, moved_bytes


def build() -> str:
    """Build the extension where it is missing; how it stands after that, in words."""
    if _ext.HAS_EXT:
        return "built"
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "-e",
        str(timing.ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"{' '.join(command)} failed: {(done.stdout + done.stderr).strip()[-2000:]}"
    return "built in this run"


def gates(device: torch.device, dry: bool) -> list[dict[str, object]]:
    """Every row over output dtypes, layouts and sizes, then every R x W, against the reference."""
    shapes = [(2, 3, 31, 33), (3, 4, 16, 16)] + ([] if dry else [(2, 3, 256, 256)])
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    cases = [
        (
            replace(row, output=row.output and dtype, network_input=dtype),
            shape,
            layout,
            torch.float32,
        )
        for row, dtype, shape, layout in itertools.product(
            ROWS.values(), dtypes, shapes, (False, True)
        )
    ]
    cases += [
        (Row(reads, writes, seeded=True), (2, 5, 7, 9), False, state)
        for reads, writes in itertools.product((1, 2, 4, 8, 16), (1, 2, 3))
        for state in (torch.float32, torch.float64)
    ]
    results = []
    for row, shape, channels_last, state in tqdm(cases, desc="gates"):
        step = arguments(
            row, shape, device, dtype=state, channels_last=channels_last, per_sample=True
        )
        case = {
            "row": str(row),
            "shape": shape,
            "state": str(state),
            "channels_last": channels_last,
        }
        results.append({**case, **gate(step)})
    return results


def times(device: torch.device, dry: bool) -> list[dict[str, object]]:
    """Every row at every size beside a copy of as many bytes."""
    sizes = [(1, 3, 32, 32), (2, 4, 64, 64)]
    if not dry:
        sizes += [(4, 4, 64, 64), (16, 4, 128, 128), (16, 3, 256, 256), (64, 4, 512, 512)]
    cache = 0 if dry else torch.cuda.get_device_properties(device).L2_cache_size
    results = []
    for shape, (name, row) in tqdm(list(itertools.product(sizes, ROWS.items())), desc="times"):
        steps = [arguments(row, shape, device)]
        moved = moved_bytes(row, steps[0])
        sets = max(2, min(32, -(-4 * cache // moved)))
        steps += [arguments(row, shape, device, seed=i) for i in range(1, sets)]
        pairs = [torch.randn(2, moved // 8, device=device).unbind() for _ in range(sets)]
        variants = {
            "step": lambda i, steps=steps: multistep_step_unchecked(*steps[i]),
            "copy": lambda i, pairs=pairs: pairs[i][0].copy_(pairs[i][1]),
        }
        taken = timing.interleaved(variants, sets, 20) if dry else timing.replayed(variants, sets)
        host = timing.interleaved({"host": variants["step"]}, sets, 200)["host"]
        if not dry:
            torch.cuda.synchronize()
        results.append(
            {
                "row": name,
                "shape": shape,
                "bytes": moved,
                "buffers": sets,
                **taken,
                "call_to_return": host,
                "gbytes_per_s": moved / taken["step"]["p50_us"] / 1e3,
                "of_copy": taken["copy"]["p50_us"] / taken["step"]["p50_us"],
            }
        )
    return results


def main(dry: bool, path: Path | None) -> int:
    if not dry and not torch.cuda.is_available():
        print(
            "bench gpu needs a CUDA GPU and PyTorch sees none; --dry walks the same path on the CPU"
        )
        return 1
    device = torch.device("cpu" if dry else "cuda")
    record: dict[str, object] = {"bench": "gpu", "dry": dry, **timing.machine(device)}
    record["extension"] = build()
    record["gates"] = gates(device, dry)
    failed = [g for g in record["gates"] if not g["ok"]]
    for g in failed:
        print(f"wrong: {g}")
    if not failed:
        record["times"] = times(device, dry)
        print(f"{'row':20} {'shape':>20} {'p50 us':>10} {'GB/s':>8} {'of copy':>8} {'call us':>8}")
        for t in record["times"]:
            shape = "x".join(map(str, t["shape"]))
            print(f"{t['row']:20} {shape:>20} {t['step']['p50_us']:10.1f} {t['gbytes_per_s']:8.0f} "
                  f"{t['of_copy']:8.2f} {t['call_to_return']['p50_us']:8.1f}")  # fmt: skip
    if path is None:
        path = (
            Path(tempfile.mkdtemp()) / "dry.json" if dry else timing.result_path(record["device"])
        )
    timing.write_json(record, path)
    right = f"{len(record['gates']) - len(failed)} of {len(record['gates'])} gates passed"
    print(f"{right}; {'a dry run on the CPU, no number of a GPU; ' if dry else ''}wrote {path}")
    return 1 if failed else 0
