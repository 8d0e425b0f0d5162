"""Files that come with the package."""

from __future__ import annotations

from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from pathlib import Path


def asset_path(name: str) -> AbstractContextManager[Path]:
    """Where a file of fastdiff/assets lies, for as long as the block runs."""
    return as_file(files("fastdiff") / "assets" / name)
