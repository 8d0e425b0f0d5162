"""--base: two revisions of the library, each driven by its own benchmarks."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from bench import base

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def repository(tmp_path):
    """A repository of its own with the present tree committed, and the extension as built."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("fastdiff", "kernels", "csrc", "bench", "setup.py", "pyproject.toml"):
        source = ROOT / name
        if source.is_dir():
            skip = shutil.ignore_patterns("__pycache__", "results", "assets")
            shutil.copytree(source, copy / name, ignore=skip)
        else:
            shutil.copy(source, copy)
    (copy / ".gitignore").write_text("*.so\n__pycache__/\n")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "base"]):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *identity, *command], cwd=copy, check=True)
    return copy


def test_the_sides_take_turns_and_their_ratio_is_shown(monkeypatch, tmp_path, capsys):
    ran, factor = [], {"here": 2.0, "there": 1.0}
    monkeypatch.setattr(base, "worktree", lambda revision: nullcontext(tmp_path))

    def run(root, options):
        side = "there" if root == tmp_path else "here"
        ran.append((side, options))
        return {"a case": 10.0 * factor[side] * len(ran)}

    monkeypatch.setattr(base, "_run", run)
    given = ["--quick", "--base", "abc", "--op", "x", "--json=here.json", "--threads", "1"]
    assert base.compare("abc", given) == 0
    assert ran == [(side, ["--quick", "--op", "x", "--threads", "1"])
                   for side in ("there", "here") * base.TURNS]  # fmt: skip
    assert "2.67x" in capsys.readouterr().out  # of 4, 2.67 and 2.4


@pytest.mark.slow
def test_a_planted_slow_down_shows(repository):
    op = repository / "fastdiff" / "ops" / "multistep_step.py"
    text = op.read_text()
    signature = "    seeds = torch.as_tensor(seeds, device=device)\n"
    assert text.count(signature) == 1
    op.write_text(text.replace(signature, signature + "    __import__('time').sleep(0.05)\n"))
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--base", "HEAD", "--op", "seeded_noise", "--quick"],
        cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith("seeded_noise")]
    assert len(rows) == 2
    for row in rows:
        assert float(row[row.index("us", row.index("us") + 1) + 1].rstrip("x")) > 2
    kept = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True)
    assert len(kept.stdout.splitlines()) == 1


def test_an_unknown_revision_is_named():
    with pytest.raises(SystemExit, match="--base must be a revision.*no_such_revision"):
        with base.worktree("no_such_revision"):
            pass
