"""Triton's cache, filled without a GPU and brought to another place."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from bench import compile_only, warm
from bench.visit.brought import triton_environment, unpack

ROOT = Path(__file__).resolve().parents[2]


def walked(cache, counts):
    """A seeded noise of each size, compiled for an H100: kernels compiled, and found."""
    counts.mkdir()
    env = {**os.environ, **triton_environment(cache), "TRITON_INTERPRET": "0",
           "PYTHONPATH": str(ROOT), compile_only.STUBS: "1", warm.COUNTS: str(counts)}  # fmt: skip
    command = [sys.executable, "-m", "bench.warm", "seeded_noise"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = counts.iterdir()
    return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: kernels are compiled for it")
def test_a_cache_that_was_moved_serves_without_compiling(tmp_path):
    """Neither a kernel nor a C module is made again, and the first place is gone."""
    first, second = tmp_path / "first", tmp_path / "other" / "second"
    made = walked(first, tmp_path / "a")
    assert made["compiled"] > 0
    (first / "older").mkdir()
    (first / "older" / "kernel.cubin").touch()
    assert warm.pack(first, tmp_path / "cache.tar.xz", made["folders"]) > 0
    second.parent.mkdir()
    unpack(tmp_path / "cache.tar.xz", second)
    shutil.rmtree(first)
    files = sorted(second.rglob("*"))
    assert files and not (second / "older").exists()
    found = walked(second, tmp_path / "b")
    assert found["compiled"] == 0 and found["cached"] > 0
    assert sorted(second.rglob("*")) == files


def test_half_a_cache_does_not_pass_for_a_whole_one(tmp_path):
    (tmp_path / "cache.tar.xz").write_bytes(b"cut off")
    with pytest.raises(tarfile.ReadError):
        unpack(tmp_path / "cache.tar.xz", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("walked_on_a_stand_in", "code", "expected"), [(True, 1, 0), (True, 2, 1), (False, 1, 1)]
)
def test_a_walk_that_breaks_off_is_an_error(
    walked_on_a_stand_in, code, expected, tmp_path, monkeypatch, capsys
):
    """On the stand-in alone tests may fail; a GPU is seen nowhere, so all machines do alike."""

    def ran(job, env):
        assert env["CUDA_VISIBLE_DEVICES"] == ""
        return (code if ("--walk" in job) == walked_on_a_stand_in else 0), "the last words"

    monkeypatch.setattr(warm, "_ran", ran)
    assert warm.main(["--cache", str(tmp_path)]) == expected
    assert ("the last words" in capsys.readouterr().out) == bool(expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--procs", "0"], "--procs must be 1 or more, got 0"),
        (["--check", "nowhere.xz"], "--check must be a file that --to has packed, got nowhere.xz"),
        (["--check", __file__, "--to", "any.xz"], "it goes without --cache and --to"),
        (["--check", __file__, "--cache", "any"], "it goes without --cache and --to"),
    ],
)
def test_warm_refuses(given, said, capsys):
    with pytest.raises(SystemExit):
        warm.main(given)
    assert said in capsys.readouterr().err
