"""Where results lie, and the one way in which they are written. No torch: the schedule of a visit
to a GPU, which must start at once, writes too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
WIDTH = 100  # of a line that holds a whole object


def write_whole(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_json(path: Path, data: Any) -> None:
    """Write JSON with a line for each row of its tables: see `laid_out`."""
    write_whole(path, laid_out(data) + "\n")


def laid_out(value: Any, depth: int = 0) -> str:
    """JSON in which a row is a line.

    The file and its members get a line for each of theirs, unless they fit one. Below that only
    tables do, that is objects or lists of objects; whatever is deeper is a row, on one line.
    """
    line = json.dumps(value)
    if not isinstance(value, dict | list) or depth > 2 or (depth and len(line) <= WIDTH):
        return line
    members = list(value.values()) if isinstance(value, dict) else value
    if not members or (depth == 2 and not all(isinstance(member, dict) for member in members)):
        return line
    texts = [laid_out(member, depth + 1) for member in members]
    if isinstance(value, dict):
        texts = [f"{json.dumps(key)}: {text}" for key, text in zip(value, texts, strict=True)]
    start, end = "{}" if isinstance(value, dict) else "[]"
    inner = "\n" + " " * (depth + 1)
    return start + inner + f",{inner}".join(texts) + "\n" + " " * depth + end
