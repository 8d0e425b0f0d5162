"""Numbers and tables as pages show them: Markdown, three digits, units."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Json = dict[str, Any]


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
