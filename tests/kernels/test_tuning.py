"""Launch configurations: a dry sweep, and what the files in kernels/configs/ mean."""

import json

import pytest
import torch

from bench import tune
from fastdiff.kernels import _tuning


def test_a_dry_sweep_walks_and_writes_nothing(tmp_path, capsys):
    assert tune.tune(torch.device("cpu"), tmp_path / "multistep_step.json") == 0
    assert "no configuration of a GPU was written" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_wrong_configuration_stops_the_sweep(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune, "right", lambda row, device, chosen: chosen == _tuning.HEURISTIC)
    assert tune.tune(torch.device("cpu"), tmp_path / "multistep_step.json") == 1
    assert "RED" in capsys.readouterr().out and not list(tmp_path.iterdir())


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
