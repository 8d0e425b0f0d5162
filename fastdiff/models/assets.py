"""Tensors that come with the package."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import Any

from torch import Tensor

from fastdiff.files import read_tensors


def read_asset(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata of a file in fastdiff/assets."""
    with as_file(files("fastdiff") / "assets" / name) as path:
        return read_tensors(path)
