"""docs/gpu-visit.md and docs/capture.md: what a GPU should show, and what one has shown."""

from __future__ import annotations

import torch

from ..entries import captured_loop
from ..measure import OURS
from ..registry import Case, entries
from ..words import Json, machine, size, table, time, times
from .kernels import H200_LAUNCH, NO_GPU, NOT_YET

# == docs/capture.md ===============================================================================


def captured(records: dict[str, Json]) -> str:
    """Captured loops by what a replay of the network takes, on every GPU that was measured."""
    blocks = []
    for name, data in records.items():
        cases = [c for c in data["cases"].values() if c["entry"] == "captured_loop"]
        if not cases or data["device"] == "cpu":
            continue
        rows = [_captured(case) for case in sorted(cases, key=_replay_us)]
        blocks.append(
            f"Loops of {cases[0]['steps']} steps, medians within one run: `{data['command']}` on\n"
            f"{machine(data)}, torch {data['torch']}, {data['date'][:10]} "
            f"([JSON](../bench/results/{name})).\nTheirs over ours; in the columns of the compiled "
            "network both sides are compiled:\n\n"
            + table(
                ("network, stock scheduler", "batch", "a replay of the network")
                + ("stock loop", "our loop, eager", 'capture="auto"')
                + ("network in a graph", "loop over its replays", "of the gap to them")
                + ("compiled: network in a graph", "loop over its replays", "of the gap to them")
                + ("memory, network in a graph", "memory, ours"),
                rows,
            )
        )
    return "\n\n".join(blocks) or f"{NOT_YET.capitalize()}: `python -m bench gpu`."


def _replay_us(case: Json) -> float:
    """One replay of the network alone."""
    return case["p50_us"] * case["over_ours"].get(captured_loop.REPLAYS, 0) / case["steps"]


def _captured(case: Json) -> list[str]:
    over = case["over_ours"] | {OURS: 1.0}
    names = captured_loop
    plain = over.get(OURS), over.get(names.GRAPHED), over.get(names.REPLAYS)
    compiled = (
        over.get(names.OURS_COMPILED),
        over.get(names.GRAPHED_COMPILED),
        over.get(names.REPLAYS_COMPILED),
    )
    return [
        case["row"],
        str(case["shape"][0]),
        time(_replay_us(case)),
        *(times(over[n]) if n in over else "-" for n in (names.STOCK, names.EAGER, names.AUTO)),
        *_gap(*plain),
        *_gap(*compiled),
        *(size(case["held_bytes"][n] + case["peak_bytes"][n]) if n in case["peak_bytes"] else "-"
          for n in (names.GRAPHED, OURS)),
    ]  # fmt: skip


def _gap(ours: float | None, graphed: float | None, replays: float | None) -> list[str]:
    """Graphed network over ours, ours over the replays, and what of their difference is gone."""
    if ours is None or graphed is None or replays is None:
        return ["-"] * 3
    gone = f"{(graphed - ours) / (graphed - replays):.0%}" if graphed > replays else "-"
    return [times(graphed / ours), f"{ours / replays:.3f}", gone]


# == docs/gpu-visit.md =============================================================================

# By their vendor's data sheets: bytes a second, multiprocessors, and a clock under load.
GPUS = {"H100": (3.35e12, 132, 1.7e9), "H200": (4.8e12, 132, 1.7e9)}
REACHED = 0.75  # of that bandwidth: a right kernel may be as slow as this
REGISTERS, SHARED, WARPS, BLOCKS = 65536, 227 << 10, 64, 32  # of an sm_90 multiprocessor
HEADLINE = {
    "multistep_step": ("copy", "ddim", "plms", "unipc"),
    "haar": ("split", "merge", "step", "noise"),
    "spectral_filter": ("exact", "fast"),
    "spectral_update": ("predictor", "langevin"),
}


def visit(records: dict[str, Json], code: Json) -> dict[str, str]:
    """What a visit to a GPU should find, before and beside what one found."""
    measured = [data for data in records.values() if data["device"] != "cpu"]
    return {
        "ptx": _ptx(code["ptx"]),
        "predicted": _predicted(measured),
        "occupancy": _occupancy(code),
    }


def _ptx(ptx: Json) -> str:
    """What ran as PTX on the CPU, by kernel."""
    columns = list(next(iter(ptx["kernels"].values())))
    rows = [(f"`{name}`", *(str(of[c]) for c in columns)) for name, of in ptx["kernels"].items()]
    return (
        f"`{ptx['command']}`, all green, triton {ptx['triton']}, sm_{ptx['arch']}a, {ptx['date']} "
        "([JSON](../bench/results/ptx.json)).\n\n" + table(("kernel", *columns), rows)
    )


def _predicted(measured: list[Json]) -> str:
    """Bytes of the headline cases, and the times that they allow."""
    rows = []
    for entry in entries():
        if entry.name not in HEADLINE:
            continue
        for case in entry.cases(torch.device("cuda"), False):
            if case.row in HEADLINE[entry.name]:
                name = f"{entry.name} {case.name}"
                ranges = [_range(case, *gpu) for gpu in GPUS.values()]
                found = [d["cases"][name]["p50_us"] for d in measured if name in d["cases"]]
                last = " / ".join(map(time, found)) or NOT_YET
                rows.append((f"`{name}`", size(case.bytes), *ranges, last))
    head = ("case", "bytes", *GPUS, "measured " + " / ".join(data["device"] for data in measured))
    if any(row[-1] != NOT_YET for row in rows):
        return table(head, rows)
    return f"{NO_GPU}\n\n" + table(head[:-1], (row[:-1] for row in rows))


def _range(case: Case, bandwidth: float, processors: int, clock: float) -> str:
    """The times expected of a right kernel: full bandwidth, to the slowest that is explained."""
    least = case.bytes / bandwidth
    most = max(H200_LAUNCH * 2, least / REACHED, 2 * case.flops / (processors * 128 * clock))
    return f"{time(max(least, H200_LAUNCH / 2) * 1e6)} .. {time(most * 1e6)}"


def _occupancy(code: Json) -> str:
    """Warps that a multiprocessor holds of each kernel on sm_90, and what bounds them."""
    rows = []
    for kernel in code["kernels"]:
        name = kernel["name"]
        usual = "float64" not in name and ("aligned" in name or not name.startswith("haar"))
        if kernel["arch"] == 90 and usual:
            warps, bound = occupancy(kernel["registers"], kernel["threads"], kernel["shared"])
            found = (str(kernel["threads"]), str(kernel["registers"]), size(kernel["shared"]))
            rows.append((name, *found, f"{warps} of {WARPS}", bound))
    head = ("kernel", "threads", "registers", "shared memory", "warps", "bound by")
    return table(head, sorted(set(rows)))


def occupancy(registers: int, threads: int, shared: int) -> tuple[int, str]:
    """Warps of a kernel on an sm_90 multiprocessor, and the resource that bounds them."""
    warps = threads // 32
    of_warp = -(-registers * 32 // 256) * 256  # registers are dealt to warps in units of 256
    bounds = {
        "registers": REGISTERS // of_warp // warps,
        "shared memory": SHARED // max(shared + 1024, 1),  # 1 KB of a block is the driver's
        "warps": WARPS // warps,
        "blocks": BLOCKS,
    }
    bound = min(bounds, key=bounds.__getitem__)
    return bounds[bound] * warps, bound
