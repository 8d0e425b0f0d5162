"""The benchmarks' own path, dry: what they record, and that a wrong kernel stops them."""

import json

import pytest
import torch

from bench import gpu, step
from fastdiff.ops import multistep_step_unchecked


def test_a_dry_run_records_a_cpu(tmp_path, capsys):
    path = tmp_path / "dry.json"
    assert gpu.main(dry=True, path=path) == 0
    record = json.loads(path.read_text())
    assert record["device"] == "cpu" and record["dry"]
    assert all(g["ok"] for g in record["gates"])
    assert {t["row"] for t in record["times"]} == set(step.ROWS)
    assert "no number of a GPU" in capsys.readouterr().out


def test_a_wrong_kernel_gets_no_times(tmp_path, monkeypatch):
    def wrong(slots, *rest):
        multistep_step_unchecked(slots, *rest)
        slots[-1] *= 1 + 1e-5

    monkeypatch.setattr(step, "multistep_step_unchecked", wrong)
    monkeypatch.setattr(gpu, "ROWS", {"ddim": step.ROWS["ddim"]})
    path = tmp_path / "dry.json"
    assert gpu.main(dry=True, path=path) == 1
    record = json.loads(path.read_text())
    assert not any(g["ok"] for g in record["gates"]) and "times" not in record


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_nothing_is_claimed(tmp_path, capsys):
    assert gpu.main(dry=False, path=tmp_path / "gpu.json") == 1
    assert "--dry" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_bytes_are_counted_once_per_operand():
    shape = (2, 3, 8, 8)
    elements = 2 * 3 * 8 * 8
    cpu = torch.device("cpu")
    passes = {"copy": 2, "ddim": 3, "f_pndm": 7, "unipc": 8}
    for name, count in passes.items():
        row = step.ROWS[name]
        assert step.moved_bytes(row, step.arguments(row, shape, cpu)) == count * 4 * elements
    row = step.ROWS["f_pndm guided bf16"]
    moved = step.moved_bytes(row, step.arguments(row, shape, cpu))
    assert moved == 6 * 4 * elements + (2 + 2) * 2 * elements
