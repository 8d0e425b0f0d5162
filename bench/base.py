"""`python -m bench --base REV`: the library of that revision and this one, measured in turns.

The revision is checked out into a throwaway worktree, and its extension is built there (or taken
from here where the sources are the same). Each side is driven by its own benchmarks, which know its
names; compared are the times of our calls in cases that have the same name on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import ROOT

TURNS = 3  # runs of each side, alternating
SOURCES = ("csrc", "setup.py", "pyproject.toml")


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """The revision's files, ready to import, for as long as the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base"
        added = _git("worktree", "add", "--detach", str(path), revision)
        if added.returncode:
            raise SystemExit(
                f"--base must be a revision of this repository; {added.stderr.strip()}"
            )
        try:
            _extension(path, revision)
            yield path
        finally:
            _git("worktree", "remove", "--force", str(path))


def _extension(path: Path, revision: str) -> None:
    built = list((ROOT / "fastdiff").glob("_C*.so"))
    if built and _git("diff", "--quiet", revision, "--", *SOURCES).returncode == 0:
        shutil.copy(built[0], path / "fastdiff")
        return
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{revision} does not build: {(done.stdout + done.stderr)[-2000:]}")


def compare(revision: str, given: list[str]) -> int:
    """Print each case's time here over its time there; 1 where a side has a red gate."""
    left_out = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    left_out.add_argument("--base")
    left_out.add_argument("--json")
    _, options = left_out.parse_known_args(given)  # the same run without these two
    times: dict[str, dict[str, list[float]]] = {}
    with worktree(revision) as base:
        for turn in range(TURNS):
            for side, root in ((revision, base), ("here", ROOT)):
                print(f"run {turn + 1} of {TURNS}: {side}", flush=True)
                for case, value in _run(root, options).items():
                    times.setdefault(case, {}).setdefault(side, []).append(value)
    print(f"\n{'case':58} {revision[:10]:>12} {'here':>12} {'here over it':>14}  of each turn")
    for case, sides in times.items():
        if revision not in sides or "here" not in sides:
            continue
        ratios = [
            ours / theirs for theirs, ours in zip(sides[revision], sides["here"], strict=True)
        ]
        theirs, ours = (statistics.median(sides[side]) for side in (revision, "here"))
        each = " ".join(f"{ratio:.2f}" for ratio in ratios)
        print(
            f"{case:58} {theirs:9.1f} us {ours:9.1f} us {statistics.median(ratios):13.2f}x  {each}"
        )
    return 0


def _run(root: Path, options: list[str]) -> dict[str, float]:
    """The library under `root` in a process of its own: microseconds by case."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.json"
        command = [sys.executable, "-m", "bench", *options, "--json", str(path)]
        environment = {**os.environ, "PYTHONPATH": str(root)}
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"the run in {root} failed: {(done.stdout + done.stderr)[-2000:]}")
        record = json.loads(path.read_text())
    if (root / record["library"]).resolve().parent != root.resolve():
        raise SystemExit(f"{root} was to be measured, but {record['library']} was imported")
    return {case: row["p50_us"] for case, row in record["cases"].items()}


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
    )
