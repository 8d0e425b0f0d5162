"""Files that are whole at every moment, and rows of one case from two runs. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """To a temporary name, then renamed: whoever reads finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def together(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """A case's row with what a later run added: ratios are of one run each, so they stay right.

    Times of ours are the first run's; those of the second are kept as groups "..., again".
    """
    if first is None:
        return second
    merged = dict(first)
    for key in ("over_ours", "peak_bytes", "held_bytes", "first_call_ms"):
        merged[key] = {**second.get(key, {}), **first.get(key, {})}
    kept = {n: why for n, why in first["skipped"].items() if n not in second["over_ours"]}
    merged["skipped"] = {**second["skipped"], **kept}
    for key in ("times", "rounds"):
        again = {f"{group}, again" if group in first[key] else group: value
                 for group, value in second[key].items()}  # fmt: skip
        merged[key] = {**first[key], **again}
    if first.get("commit") != second.get("commit"):
        late = dict.fromkeys(second["over_ours"], second.get("commit"))
        merged["commits"] = {**late, **first.get("commits", {})}
    return merged
