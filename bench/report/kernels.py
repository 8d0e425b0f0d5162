"""docs/kernels.md: the passes of the rows; of each op its times and its machine code."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..entries.multistep_step import ROWS
from ..registry import Case, entries
from ..steps import Row, flops, moved_bytes
from ..words import Json, scaled, shape, size, table, time
from .tables import LARGE, most_threads

# Assumptions about an H200, until one has been measured.
H200_COPY = 4.3e12  # bytes a second
H200_LAUNCH = 2e-6  # seconds of the least kernel in a replay
H200_RATE = 132 * 128 * 1.7e9  # instructions a second: multiprocessors, lanes, clock
AIM = 0.9  # of a copy
NOT_YET = "not measured yet"
NO_GPU = "No GPU has run these yet."

PASSES = {
    "ddim": Row("ddim"),
    "dpmpp_2m": Row("dpmpp_2m"),
    "ipndm": Row("ipndm"),
    "plms": Row("plms"),
    "unipc": Row("unipc"),
    "plms, float32 network input": Row("plms", network_input=torch.float32),
    "plms, guidance": Row("plms", guided=True),
    "plms, guidance, both in bfloat16": ROWS["plms guided bf16"],
    "ddim with seeded noise": ROWS["ddim stochastic"],
}
CODE = {"seeded_noise": "multistep_step R=1 W=1 seeded noise alone"}  # else all of the op's name


def kernels(records: dict[str, Json], code: Json) -> dict[str, str]:
    """The passes of the rows, then for each op its times and its machine code."""
    on = {kind: {} for kind in ("cpu", "gpu")}
    for data in records.values():
        on["cpu" if data["device"] == "cpu" else "gpu"] = data
    blocks = {"passes": _passes(on["cpu"])}
    for entry in entries():
        if entry.kind == "op":
            cases = entry.cases(torch.device("cuda"), False)
            blocks[f"times {entry.name}"] = _times(entry.name, cases, on["cpu"], on["gpu"])
            blocks[f"code {entry.name}"] = _code(CODE.get(entry.name, entry.name), code)
    modules = {kernel["name"].split(" ", 1)[0] for kernel in code["kernels"]}
    for module in sorted(modules):  # kernels that several ops share among them
        blocks.setdefault(f"code {module}", _code(f"{module} ", code))
    return blocks


def _passes(data: Json) -> str:
    """Bytes and operations of the rows, and the floors they set."""
    copy = data["cases"][f"multistep_step plms {shape(LARGE)}{most_threads(data)}"]
    bandwidth = copy["bytes"] / _copy_us(copy) * 1e6
    rows = []
    for name, row in PASSES.items():
        one, all = moved_bytes(row, (1,)), moved_bytes(row, LARGE)
        operations = flops(row, (1,))
        rows.append(
            (name, f"{one / 4:g}", str(one), str(operations), f"{operations / one:.2f}")
            + (size(all), time(all / bandwidth * 1e6), time(all / H200_COPY * 1e6))
        )
    head = ("row", "passes", "bytes an element", "FLOPs an element", "FLOPs a byte")
    large = shape(LARGE)
    here = f"floor here, at {bandwidth / 1e9:.1f} GB/s"
    return table((*head, large, here, f"floor at {H200_COPY / 1e12:g} TB/s, assumed"), rows)


def _copy_us(case: Json) -> float:
    """The copy of as many bytes, timed in turns with ours."""
    return next(iter(case["times"].values()))["copy"][1]


def _times(entry: str, cases: Iterable[Case], cpu: Json, gpu: Json) -> str:
    """A line for each case; a column for the GPU where one has run any of them."""
    rows, on_gpu = [], gpu.get("cases", {})
    for case in cases:
        name = f"{entry} {case.name}"
        here = cpu["cases"].get(name + most_threads(cpu))
        there = on_gpu.get(name)
        seconds = max(H200_LAUNCH, case.bytes / (AIM * H200_COPY), case.flops / H200_RATE)
        rows.append(
            (
                f"`{case.name}`",
                size(case.bytes),
                scaled(case.flops, ("", "k", "M", "G")),
                time(_copy_us(here)) if here else "-",
                time(here["p50_us"]) if here else "-",
                f"{here['of_copy']:.0%}" if here else "-",
                time(case.bytes / H200_COPY * 1e6),
                time(seconds * 1e6),
                time(there["p50_us"]) if there else NOT_YET,
            )
        )
    head = ("case", "bytes", "FLOPs", "floor here (copy)", "measured here", "of the copy")
    head += ("H200 floor, assumed", "H200 predicted", f"{gpu.get('device')} measured")
    if any(row[-1] != NOT_YET for row in rows):
        return table(head, rows)
    return f"{NO_GPU}\n\n" + table(head[:-1], (row[:-1] for row in rows))


def _code(prefix: str, code: Json) -> str:
    """A line for each variant, the architectures beside each other where they differ."""
    variants: dict[str, list[Json]] = {}
    for kernel in code["kernels"]:
        if kernel["name"].startswith(prefix):
            variants.setdefault(kernel["name"], []).append(kernel)
    columns = {
        "registers": "registers",
        "stack": "stack",
        "shared memory": "shared",
        "local accesses": "local_accesses",
        "128-bit loads": "wide_loads",
        "128-bit stores": "wide_stores",
        "instructions": "instructions",
    }
    rows = [
        [name.split(" ", 1)[1], *(_joined(k[key] for k in found) for key in columns.values())]
        for name, found in variants.items()
    ]
    archs = " / ".join(f"sm_{arch}" for arch in dict.fromkeys(k["arch"] for k in code["kernels"]))
    return (
        f"`{code['command']}`, triton {code['triton']}, {code['date']}, commit {code['commit']}; "
        f"{archs} where they differ.\n[JSON](../bench/results/aot.json).\n\n"
        + table(("variant", *columns), rows)
    )


def _joined(values: Iterable[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(set(words)) == 1 else " / ".join(words)
