"""The table of rooms in docs/architecture.md, held against what the files import."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
FACES = {"fastdiff/__init__.py", "fastdiff/__main__.py"}  # what users import and call: the roof


def rooms() -> dict[str, int]:
    """Room to floor, as the page says."""
    lines = re.findall(r"^\| (\d) \| `([^`]+)` \|", PAGE.read_text(), re.MULTILINE)
    return {room: int(floor) for floor, room in lines}


def room_of(path: str) -> str:
    """The room of a file of fastdiff/ or kernels/: its folder, or the file itself."""
    parts = Path(path).parts
    if parts[0] == "kernels":
        return "kernels/"
    return parts[1] if len(parts) == 2 else f"{parts[1]}/"


def sources() -> list[str]:
    found = [*ROOT.glob("fastdiff/**/*.py"), *ROOT.glob("kernels/*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in found)


def module_file(name: str) -> str | None:
    """The file of a module of ours; None for another package's."""
    if name.split(".")[:2] == ["fastdiff", "kernels"]:
        path = Path("kernels", *name.split(".")[2:])
    else:
        path = Path(*name.split("."))
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (ROOT / candidate).is_file():
            return str(candidate)
    return None


def imports(path: str) -> set[str]:
    """The files of ours that a file imports, anywhere in it, also relatively."""
    package = ["fastdiff", *Path(path).parts] if path.startswith("kernels") else [*Path(path).parts]
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: -node.level] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        else:
            continue
        files = [module_file(name) for name in names if name.startswith("fastdiff")]
        # Of `from package import name` the name's own file counts, if it has one.
        found |= {file for file in files[1:] if file} or {file for file in files[:1] if file}
    return found - {path}


def test_every_file_has_a_room_and_every_room_is_there() -> None:
    known, there = rooms(), {room_of(path) for path in sources() if path not in FACES}
    assert known.keys() - {"csrc/"} == there
    assert (ROOT / "csrc").is_dir()


@pytest.mark.parametrize("path", [path for path in sources() if path not in FACES])
def test_imports_run_downwards(path: str) -> None:
    known = rooms()
    floor = known[room_of(path)]
    above = [f for f in imports(path) - FACES if known[room_of(f)] > floor]
    # The face of the package: its version and where it lies, for those who report them.
    faces = imports(path) & FACES if not path.startswith("fastdiff/app/") else set()
    assert not above and not faces, f"{path} imports {above or sorted(faces)}"


def test_rooms_import_in_no_circle() -> None:
    arrows: dict[str, set[str]] = defaultdict(set)
    for path in sources():
        if path not in FACES:
            arrows[room_of(path)] |= {room_of(f) for f in imports(path) - FACES}
    state: dict[str, int] = {}

    def visit(room: str, way: tuple[str, ...]) -> None:
        assert state.get(room) != 1, f"circle: {' -> '.join((*way, room))}"
        if room not in state:
            state[room] = 1
            for other in sorted(arrows[room] - {room}):
                visit(other, (*way, room))
            state[room] = 2

    for room in sorted(arrows):
        visit(room, ())


def test_files_import_in_no_circle() -> None:
    state: dict[str, int] = {}

    def visit(path: str, way: tuple[str, ...]) -> None:
        assert state.get(path) != 1, f"circle: {' -> '.join((*way, path))}"
        if path not in state:
            state[path] = 1
            for other in sorted(f for f in imports(path) - FACES if not f.endswith("__init__.py")):
                visit(other, (*way, path))
            state[path] = 2

    for path in sources():
        visit(path, ())


def test_frameworks_do_not_know_each_other() -> None:
    for path in sources():
        if path.startswith("fastdiff/integrations/"):
            mine = Path(path).parts[2]
            others = {Path(f).parts[2] for f in imports(path) if "integrations/" in f} - {mine}
            assert not others or Path(path).name in ("__init__.py", "diffusers_schedulers.py"), path


def test_the_index_names_every_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    pages = {str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")}
    linked = set(re.findall(r"\]\(([^)#]+\.md)\)", index))
    assert linked == pages - {"index.md"}


def test_no_test_imports_a_test() -> None:
    for path in ROOT.glob("tests/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
                assert node.module.startswith("tests.helpers"), f"{path} imports {node.module}"
