"""Results as Markdown: pure functions of the JSON and of the registry's formulas."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from ..entries import captured_loop
from ..entries.multistep_step import ROWS, Row, flops, moved_bytes
from ..measure import OURS
from ..registry import Case, entries

Json = dict[str, Any]

SIZES = ((1, 3, 32, 32), (4, 4, 64, 64), (16, 3, 256, 256))  # of the README
LARGE = SIZES[-1]
# Assumptions about an H200, until one has been measured.
H200_COPY = 4.3e12  # bytes a second
H200_LAUNCH = 2e-6  # seconds of the least kernel in a replay
H200_RATE = 132 * 128 * 1.7e9  # instructions a second: multiprocessors, lanes, clock
AIM = 0.9  # of a copy
NOT_YET = "not measured yet"

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

# == Words =========================================================================================


def scaled(value: float, units: Sequence[str]) -> str:
    """Three digits and a unit; each unit is a thousand of the one before."""
    if not value:
        return f"0 {units[0]}".strip()
    power = 0
    while value >= 999.5 and power < len(units) - 1:
        value, power = value / 1e3, power + 1
    return f"{f'{value:#.3g}'.rstrip('.')} {units[power]}".strip()


def time(us: float) -> str:
    return scaled(us * 1e3, ("ns", "us", "ms", "s"))


def size(count: float) -> str:
    return scaled(count, ("B", "kB", "MB", "GB"))


def times(ratio: float) -> str:
    """Theirs over ours; bold where they are faster."""
    word = f"{ratio:.2f}x" if ratio < 9.995 else f"{ratio:.1f}x"
    return f"**{word}**" if ratio < 1 else word


def shape(numbers: Iterable[int]) -> str:
    return "x".join(map(str, numbers))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine(data: Json) -> str:
    """The processor or GPU, and what ran on it."""
    if data["device"] != "cpu":
        return f"{data['device']}, driver {data['driver']}, CUDA {data['cuda']}"
    extension = data["extension"]
    target = extension["cpu_target"] if isinstance(extension, dict) else "no extension"
    return f"{data['cpu']}, {data['cores']} cores, {target}"


# == README ========================================================================================


def speed(records: dict[str, Json]) -> str:
    """The solver step alone at three sizes, most threads."""
    blocks = []
    for name, data in records.items():
        rows = [
            [shape(numbers), *_speeds(data, numbers)] for numbers in SIZES if _speeds(data, numbers)
        ]
        threads = f", {max(data['threads'])} threads" if data["device"] == "cpu" else ""
        blocks.append(
            f"The solver step alone, float32, medians within one run: `{data['command']}` on\n"
            f"{machine(data)}{threads}, torch {data['torch']}, {data['date'][:10]}\n"
            f"([JSON](bench/results/{name}), [all of it](docs/benchmarks.md)).\n\n"
            + table(
                ("batch", "diffusers PNDM / ours", "diffusers UniPC / ours")
                + ("torch.compile / ours", "ours (PLMS row)", "share of the measured copy"),
                rows,
            )
        )
        blocks.append(_drop_ins(data))
    return "\n\n".join(blocks)


def _drop_ins(data: Json) -> str:
    """Runs of the drop-ins against what they stand for, at the README's sizes, most threads."""
    suffix = f" threads={max(data['threads'])}" if data["device"] == "cpu" else ""
    rows = []
    for entry, baseline in (("scheduler_step", "stock"),
                            ("sampler_functions", "published operations")):  # fmt: skip
        cases = {n: c for n, c in data["cases"].items() if c["entry"] == entry}
        for row in dict.fromkeys(case["row"] for case in cases.values()):
            steps = next(case["steps"] for case in cases.values() if case["row"] == row)
            names = [f"{entry} {row} {shape(size)} steps={steps}{suffix}" for size in SIZES]
            label = f"{row}Scheduler" if entry == "scheduler_step" else f"sample_{row}"
            if all(name in cases for name in names):
                ratios = (times(cases[name]["over_ours"][baseline]) for name in names)
                rows.append((f"`{label}`, {steps} steps", *ratios))
    return (
        "Drop-in classes and functions without a network, the stock class (or k-diffusion's "
        "formulas) over ours,\nsame run:\n\n" + table(("run", *map(shape, SIZES)), rows)
    )


def _speeds(data: Json, numbers: Sequence[int]) -> list[str]:
    """A line of the README's table; empty where that size was not measured."""
    suffix = f" threads={max(data['threads'])}" if data["device"] == "cpu" else ""
    plms, unipc = (
        data["cases"].get(f"multistep_step {row} {shape(numbers)}{suffix}")
        for row in ("plms", "unipc")
    )
    if not plms or not unipc:
        return []
    ratios = [
        times(case["over_ours"][baseline]) if baseline in case["over_ours"] else "-"
        for case, baseline in (
            (plms, "diffusers PNDM"),
            (unipc, "diffusers UniPC"),
            (plms, "torch.compile"),
        )
    ]
    return [*ratios, time(plms["p50_us"]), f"{plms['of_copy']:.0%}"]


# == docs/benchmarks.md ============================================================================


def device(name: str, data: Json) -> str:
    """Everything that one record holds."""
    gates = [gate for found in data["gates"].values() for gate in found]
    red = [f"{entry}: {g}" for entry, found in data["gates"].items() for g in found if not g["ok"]]
    slug = name[: -len("-2026-01-01.json")]
    threads = ", ".join(map(str, data["threads"]))
    parts = [
        f"## {machine(data)}",
        f"`{data['command']}`, {data['date'][:10]}, commit {data['commit']}, "
        f"torch {data['torch']}, triton {data['triton']},\nPython {data['python']}, "
        f"threads: {threads}, load average before {data['load_average_before']}. "
        f"[JSON](../bench/results/{name}).\n"
        f"{len(gates) - len(red)} of {len(gates)} gates are green.",
        *(
            f"Measured apart: `{entry}`, {part['date'][:10]}, commit {part['commit']} "
            f"([JSON](../bench/results/{part['file']}))."
            for entry, part in data["parts"].items()
        ),
        *(f"Red, so without times: {gate}." for gate in red),
        f"![Share of the copy's bandwidth](bench-{slug}-copy.png)",
        "### Where we lose",
        _losses(data),
    ]
    for entry in dict.fromkeys(case["entry"] for case in data["cases"].values()):
        cases = {n: c for n, c in data["cases"].items() if c["entry"] == entry}
        figure = f"![Latency](bench-{slug}-{entry}.png)" if entry in loops(data) else ""
        parts += [f"### {entry}", figure, _cases(entry, cases), _skipped(cases)]
    parts += [f"Left out: {entry}, {why}." for entry, why in data["skipped"].items()]
    parts += [f"Failed: `{name}`, {why}." for name, why in data.get("failed", {}).items()]
    if not data.get("complete"):
        parts.append("The run was cut: what is not here was not measured.")
    return "\n\n".join(part for part in parts if part)


def loops(data: Json) -> list[str]:
    """The entries that are loops."""
    return list(dict.fromkeys(c["entry"] for c in data["cases"].values() if c["kind"] == "loop"))


def _losses(data: Json) -> str:
    lines = [
        f"- `{name}`: {baseline} takes {times(ratio)} of our time"
        for name, case in data["cases"].items()
        for baseline, ratio in case["over_ours"].items()
        if ratio < 1
    ]
    return "\n".join(lines) or "Nowhere among these."


def _cases(entry: str, cases: dict[str, Json]) -> str:
    """A line for our call and one for each baseline, which stands where its own group put it."""
    rows = []
    for name, case in cases.items():
        found = {
            label: q for group in reversed(case["times"].values()) for label, q in group.items()
        }
        for label in (OURS, *case["over_ours"]):
            ours, q = label == OURS, found[label]
            measured = ours and "of_copy" in case
            rows.append(
                (
                    f"`{name.removeprefix(entry + ' ')}`" if ours else "",
                    label,
                    "" if ours else times(case["over_ours"][label]),
                    time(q["p50_us"]),
                    f"{time(q['p20_us'])} .. {time(q['p80_us'])}",
                    f"{case['gbytes_per_s']:.1f}" if measured else "",
                    f"{case['of_copy']:.0%}" if measured else "",
                    str(case["launches"] or "") if ours else "",
                    size(case["peak_bytes"][label]),
                    time(case["first_call_ms"][label] * 1e3),
                )
            )
    head = ("case", "", "theirs / ours", "p50", "p20 .. p80", "GB/s", "of the copy")
    return table((*head, "launches", "peak memory", "first call"), rows)


def _skipped(cases: dict[str, Json]) -> str:
    words: dict[str, int] = {}
    for case in cases.values():
        for baseline, why in case["skipped"].items():
            words[f"{baseline} ({why})"] = words.get(f"{baseline} ({why})", 0) + 1
    return "Not measured: " + "; ".join(words) + "." if words else ""


def errors(solvers: Json) -> str:
    """Each solver's error at the most calls up to each number that ddim was run with."""
    curves = {n: c for family in solvers["families"].values() for n, c in family.items()}
    most = curves["ddim"]["calls"]
    rows = []
    for name, curve in curves.items():
        points = dict(zip(curve["calls"], curve["errors"], strict=True))
        line = [name]
        for low, high in itertools.pairwise((0, *most)):
            calls = max((calls for calls in points if low < calls <= high), default=None)
            at = "" if calls == high else f" at {calls}"
            line.append("-" if calls is None else f"{points[calls]:.4f}{at}")
        rows.append(line)
    return (
        "![Error against network calls](solvers.png)\n\n"
        f"`{solvers['command']}`, {solvers['date'][:10]}, commit {solvers['commit']}, "
        f"torch {solvers['torch']}, {solvers['cpu']}.\n"
        "[JSON](../bench/results/solvers.json).\n\n"
        + table(["solver", *(f"{calls} calls" for calls in most)], rows)
    )


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


# == docs/haar.md ==================================================================================


def haar(records: dict[str, Json]) -> str:
    """Every row at the large size, most threads, beside all that it was measured against."""
    blocks = []
    for name, data in records.items():
        suffix = f" threads={max(data['threads'])}" if data["device"] == "cpu" else ""
        ending = f"{shape(LARGE)} levels="
        cases = [c for n, c in data["cases"].items()
                 if c["entry"] == "haar" and ending in n and n.endswith(suffix)]  # fmt: skip
        if not cases:
            continue
        baselines = list(dict.fromkeys(b for case in cases for b in case["over_ours"]))
        rows = [
            [case["row"], time(case["p50_us"]), f"{case['of_copy']:.0%}"]
            + [times(case["over_ours"][b]) if b in case["over_ours"] else "-" for b in baselines]
            for case in cases
        ]
        blocks.append(
            f"{shape(LARGE)}, float32, three levels (an expansion one), medians within one run: "
            f"`{data['command']}` on\n{machine(data)}{', ' + suffix.strip() if suffix else ''}, "
            f"torch {data['torch']}, {data['date'][:10]} ([JSON](../bench/results/{name})). "
            "Theirs over ours:\n\n"
            + table(("row", "ours", "share of the measured copy", *baselines), rows)
        )
    return "\n\n".join(blocks)


# == docs/kernels.md ===============================================================================


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


# == docs/gpu-visit.md =============================================================================

# By their vendor's data sheets: bytes a second, multiprocessors, and a clock under load.
GPUS = {"H100": (3.35e12, 132, 1.7e9), "H200": (4.8e12, 132, 1.7e9)}
REACHED = 0.75  # of that bandwidth, by what should still pass for a right kernel
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
    return (f"`{ptx['command']}`, all green, triton {ptx['triton']}, sm_{ptx['arch']}a, "
            f"{ptx['date']} ([JSON](../bench/results/ptx.json)).\n\n"
            + table(("kernel", *columns), rows))  # fmt: skip


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
    names = " / ".join(data["device"] for data in measured)
    return table(("case", "bytes", *GPUS, f"measured {names}".strip()), rows)


def _range(case: Case, bandwidth: float, processors: int, clock: float) -> str:
    """From the bytes at full bandwidth to what memory, launches or arithmetic still excuse."""
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
            rows.append((name, str(kernel["threads"]), str(kernel["registers"]),
                         size(kernel["shared"]), f"{warps} of {WARPS}", bound))  # fmt: skip
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


def _passes(data: Json) -> str:
    """Bytes and operations of the rows, and the floors they set."""
    copy = data["cases"][f"multistep_step plms {shape(LARGE)} threads={max(data['threads'])}"]
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
    return next(iter(case["times"].values()))["copy"]["p50_us"]


def _times(entry: str, cases: Iterable[Case], cpu: Json, gpu: Json) -> str:
    rows = []
    for case in cases:
        name = f"{entry} {case.name}"
        here = cpu["cases"].get(f"{name} threads={max(cpu['threads'])}")
        there = gpu.get("cases", {}).get(name)
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
    return table(
        (*head, "H200 floor, assumed", "H200 predicted", gpu.get("device", "H200") + " measured"),
        rows,
    )


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
