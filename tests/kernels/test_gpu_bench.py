"""The benchmarks' GPU path, dry: steps, resuming, tuning; nothing is claimed without a GPU."""

import json

import pytest
import torch

from bench import gpu, measure, timing, tune
from fastdiff.kernels import _tuning

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(timing, "WARM_S", 0.0)
    monkeypatch.setattr(measure, "budget_s", lambda quick, device: 0.0)
    monkeypatch.setattr(measure, "FOOTPRINT", 1 << 20)


class Ran(list):
    """The names of the steps that ran."""


@pytest.fixture
def steps(monkeypatch):
    """Steps that only say that they ran; `steps.fail(name)` makes one red."""
    ran = Ran()

    def step(name, ok=True):
        return lambda dry: ran.append(name) or {"ok": ok, "said": f"{name} said so"}

    made = {name: step(name) for name in gpu.STEPS}
    monkeypatch.setattr(gpu, "STEPS", made)
    ran.fail = lambda name: made.update({name: step(name, ok=False)})
    return ran


def run(path, *options):
    code = gpu.main(["--dry", "--json", str(path), *options])
    return code, json.loads(path.read_text())


def test_the_real_steps_on_a_dry_run(tmp_path, capsys):
    code, record = run(tmp_path / "dry.json", "--only", "build", "--only", "tests")
    assert code == 0 and record["steps"]["tests"]["ok"]
    assert "passed" in record["steps"]["tests"]["said"]
    assert "not run" in record["steps"]["build"]["said"]
    assert "no number of a GPU" in capsys.readouterr().out


def test_a_dry_run_measures_every_op(tmp_path, steps):
    code, record = run(tmp_path / "dry.json", "--only", "seeded_noise", "--only", "build")
    assert code == 0 and record["dry"] and record["device"] == "cpu" and record["complete"]
    assert all(gate["ok"] for gate in record["gates"]["seeded_noise"])
    assert {row["entry"] for row in record["cases"].values()} == {"seeded_noise"}
    assert steps == ["build"]


def test_a_cut_run_goes_on_and_repeats_nothing(tmp_path, steps):
    path = tmp_path / "dry.json"
    only = ("--only", "seeded_noise", "--only", "tests")
    code, record = run(path, *only, "--budget", "0")
    assert code == 0 and not record["cases"] and "complete" not in record
    code, record = run(path, *only)
    assert code == 0 and record["complete"] and len(record["cases"]) == 2
    assert steps == ["tests"]
    run(path, *only)  # a finished one begins anew
    assert steps == ["tests", "tests"]


@pytest.mark.parametrize("name", gpu.STEPS)
def test_a_red_step_ends_it_without_times(tmp_path, steps, name, capsys):
    steps.fail(name)
    code, record = run(tmp_path / "dry.json")
    assert code == 1 and not record["cases"] and not record["steps"][name]["ok"]
    assert f"{name} said so" in capsys.readouterr().out


def test_an_unknown_name_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--dry", "--only", "nothing"])
    assert "seeded_noise" in capsys.readouterr().err


@NO_GPU
def test_without_a_gpu_nothing_is_claimed(tmp_path, capsys):
    assert gpu.main(["--json", str(tmp_path / "gpu.json")]) == 1
    assert "--dry" in capsys.readouterr().out and not list(tmp_path.iterdir())


# == Tuning ========================================================================================


@NO_GPU
def test_a_dry_sweep_walks_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(_tuning, "CONFIGS", tmp_path)
    assert gpu.main(["--tune", "--dry"]) == 0
    assert "no configuration of a GPU was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_wrong_configuration_stops_the_sweep(monkeypatch, capsys):
    monkeypatch.setattr(tune, "right", lambda row, device, chosen: chosen == _tuning.HEURISTIC)
    assert tune.tune(torch.device("cpu")) == 1
    assert "RED" in capsys.readouterr().out


@pytest.fixture
def on(monkeypatch, tmp_path):
    """A GPU by name, and a configurations folder of its own."""

    def named(name, text=None):
        _tuning.config.cache_clear()
        _tuning._measured.cache_clear()
        monkeypatch.setattr(_tuning, "CONFIGS", tmp_path)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        if text is not None:
            folder = tmp_path / _tuning.gpu_slug(name)
            folder.mkdir(exist_ok=True)
            (folder / "multistep_step.json").write_text(text)
        return lambda variant: _tuning.config("multistep_step", variant, torch.device("cuda"))

    yield named
    _tuning.config.cache_clear()
    _tuning._measured.cache_clear()


def test_a_measured_gpu_gets_its_own_and_others_the_heuristic(on):
    configs = {"configs": {"R4 W2": {"threads": 128, "bytes_per_thread": 32}}}
    found = on("NVIDIA Example 9000", json.dumps(configs))
    assert found("R4 W2") == (128, 32) and found("R1 W1") == _tuning.HEURISTIC
    assert "1 variants tuned" in _tuning.live("multistep_step", torch.device("cuda"))
    assert on("Another")("R4 W2") == _tuning.HEURISTIC
    assert "heuristic" in _tuning.live("multistep_step", torch.device("cuda"))
    assert _tuning.config("multistep_step", "R4 W2", torch.device("cpu")) == _tuning.HEURISTIC


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"configs": {"R1 W1": {"warps": 4}}}',
     '{"configs": {"R1 W1": {"threads": 96, "bytes_per_thread": 16}}}'],
)  # fmt: skip
def test_a_broken_file_is_named(on, text):
    with pytest.raises(ValueError, match="broken/multistep_step.json"):
        on("Broken", text)("R1 W1")
