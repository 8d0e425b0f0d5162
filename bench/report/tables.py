"""README.md, docs/benchmarks.md and docs/haar.md: what was timed, as Markdown."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ..measure import OURS
from ..words import Json, machine, shape, size, table, time, times

SIZES = ((1, 3, 32, 32), (4, 4, 64, 64), (16, 3, 256, 256))  # of the README
LARGE = SIZES[-1]


def most_threads(data: Json) -> str:
    """The end of the names of those cases that ran on the most threads; "" on a GPU."""
    return f" threads={max(data['threads'])}" if data["device"] == "cpu" else ""


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
    suffix, rows = most_threads(data), []
    compared = {"scheduler_step": "stock", "sampler_functions": "published operations"}
    for entry, baseline in compared.items():
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
    suffix = most_threads(data)
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
    checked = sum(found["checked"] for found in data["gates"].values())
    red = [f"{entry}: {g}" for entry, found in data["gates"].items() for g in found["red"]]
    slug = name[: -len("-2026-01-01.json")]
    threads = ", ".join(map(str, data["threads"]))
    parts = [
        f"## {machine(data)}",
        f"`{data['command']}`, {data['date'][:10]}, commit {data['commit']}, "
        f"torch {data['torch']}, triton {data['triton']},\nPython {data['python']}, "
        f"threads: {threads}, load average before {data['load_average_before']}. "
        f"[JSON](../bench/results/{name}).\n"
        f"{checked - len(red)} of {checked} gates are green.",
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
                    time(q[1]),
                    f"{time(q[0])} .. {time(q[2])}",
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


# == docs/haar.md ==================================================================================


def haar(records: dict[str, Json]) -> str:
    """Every row at the large size, most threads, beside all that it was measured against."""
    blocks = []
    for name, data in records.items():
        suffix = most_threads(data)
        ending = f"{shape(LARGE)} levels="
        cases = [
            case
            for label, case in data["cases"].items()
            if case["entry"] == "haar" and ending in label and label.endswith(suffix)
        ]
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
