"""What the experiments share: arrays that are measured once, tables in JSON, intervals in words."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.app.machine import cpu_model

Row = dict[str, Any]


def machine() -> dict[str, str]:
    """What numbers were made on."""
    return {"machine": cpu_model(), "torch": torch.__version__}


class Store:
    """Arrays on disk, one file for each key and model: a run that broke off goes on from them."""

    def __init__(self, folder: Path, model: str) -> None:
        self.folder, self.model = folder, model
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        name = hashlib.sha256(f"{self.model} {key}".encode()).hexdigest()[:24]
        path = self.folder / f"{name}.npy"
        if not path.exists():
            temporary = path.with_suffix(".tmp.npy")
            np.save(temporary, make().numpy())
            temporary.replace(path)
        return torch.from_numpy(np.load(path))


def folded(rows: Sequence[Row], by: Sequence[str]) -> Row:
    """Rows as groups of those that agree in `by`: each key is written once, not once a row."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in by))
    groups: dict[tuple[Any, ...], list[list[Any]]] = {}
    for row in rows:
        values = [row.get(column) for column in columns]
        groups.setdefault(tuple(row[key] for key in by), []).append(values)
    return {
        "columns": columns,
        "groups": [
            {**dict(zip(by, where, strict=True)), "rows": found} for where, found in groups.items()
        ],
    }


def unfolded(table: Row) -> list[Row]:
    """The rows of `folded`, group by group; a value that is None was not there."""
    rows = []
    for group in table["groups"]:
        where = {key: value for key, value in group.items() if key != "rows"}
        for values in group["rows"]:
            named = zip(table["columns"], values, strict=True)
            rows.append(where | {key: value for key, value in named if value is not None})
    return rows


def selected(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.3f} ({low:.3f} .. {high:.3f})"
