"""Files that are there whole or not at all: any, JSON, and tensors with words about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under a temporary name and rename it; its folder is made where it lacks.

    The temporary name depends on the file's alone, so what a killed process left is overwritten by
    the one that takes up its work.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON for people to read, too."""
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, lambda part: part.write_text(text))


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], *, beside: bool = False
) -> None:
    """Write a safetensors file, with the metadata as JSON in its header: one atomic unit.

    beside: also as a .json file beside it, for people.
    """
    from safetensors.torch import save  # late: importing fastdiff must stay cheap

    text = {key: json.dumps(value) for key, value in metadata.items()}
    copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    content = save(copies, metadata=text)
    write_whole(path, lambda part: part.write_bytes(content))
    if beside:
        write_json(path.with_suffix(".json"), metadata)


def read_tensors(
    path: Path | str, what: str = "a safetensors file"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the metadata that `write_tensors` wrote.

    what: what errors say that the file must be. Words that are no JSON are taken as they are.
    Raises ValueError for another kind of file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} must be {what}: {error}") from None
    return tensors, {key: _decoded(value) for key, value in text.items()}


def _decoded(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
