"""The command line, as a user types it, and the pieces of the demo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastdiff

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from fastdiff import cli, demo, doctor


def run(*arguments: str):
    return CliRunner().invoke(cli.app, arguments)


def test_solvers_lists_every_solver_with_its_calls() -> None:
    result = run("solvers")
    assert result.exit_code == 0
    for name in fastdiff.solver_names():
        assert name in result.output


def test_solvers_show_prints_the_tableau() -> None:
    result = run("solvers", "--show", "ipndm", "--steps", "4")
    expected = fastdiff.build_tableau("ipndm", fastdiff.NoiseSchedule.linear_beta(), 4)
    assert result.exit_code == 0
    assert result.output.strip() == str(expected).strip()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("solvers", "--show", "nope"), "solver must be one of"),
        (("solvers", "--show", "ddim", "--steps", "0"), "steps must be a whole number >= 1"),
        (("sample", "--digit", "10"), "digit must be 0 .. 9"),
        (("sample", "--count", "0"), "count must be at least 1"),
        (("sample", "--solver", "nope"), "solver must be one of"),
    ],
)
def test_bad_input_ends_with_one_sentence(
    arguments: tuple[str, ...], word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, SystemExit)
    assert word in str(result.exception.code) + result.output
    assert "Traceback" not in result.output


def test_doctor_says_which_backend_serves() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    assert "CPU tensors" in result.output
    assert ("C++" if fastdiff._ext.HAS_EXT else "PyTorch reference") in result.output


def test_doctor_notices_the_other_package_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    original = doctor._installed
    monkeypatch.setattr(
        doctor, "_installed", lambda name: "0.9" if name == "fastdiff" else original(name)
    )
    assert any("another package named fastdiff" in warning for warning in doctor.warnings())
    monkeypatch.undo()
    assert not any("another package" in warning for warning in doctor.warnings())


def test_sample_writes_a_picture_and_nothing_else(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    out = tmp_path / "new" / "digits.png"
    result = run("sample", "--steps", "3", "--count", "3", "--digit", "7", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert plt.imread(out).shape[:2] == (10 * 8, 28 * 8)
    assert [path.name for path in out.parent.iterdir()] == ["digits.png"]


def test_sample_depends_on_the_seed_alone(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    sheets = {}
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        out = tmp_path / f"{name}.png"
        run("sample", "--steps", "3", "--count", "2", "--seed", seed, "--digit", "1",
            "--out", str(out))  # fmt: skip
        sheets[name] = plt.imread(out)
    assert np.array_equal(sheets["a"], sheets["b"])
    assert not np.array_equal(sheets["a"], sheets["c"])


def test_demo_columns_cost_the_calls_the_demo_promises() -> None:
    schedule = fastdiff.NoiseSchedule.linear_beta()
    calls = [
        (label, fastdiff.build_tableau(solver, schedule, steps).nfe)
        for label, solver, steps in demo.COLUMNS
    ]
    assert calls == [
        ("DDIM", 50), ("DDIM", 10), ("iPNDM", 10), ("S-PNDM", 13), ("S-PNDM", 20),
        ("F-PNDM", 13), ("F-PNDM", 20), ("DPM++ 2M", 10),
    ]  # fmt: skip


def test_demo_refuses_to_time_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 8, 8)
    demo.fused_step("plms", x, torch.randn_like(x))
    monkeypatch.setattr(demo, "multistep_step_unchecked", lambda slots, *rest: slots.mul_(1.001))
    with pytest.raises(RuntimeError, match="differs from its reference"):
        demo.fused_step("plms", x, torch.randn_like(x))


def test_demo_pictures(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    columns = [demo.sample_column("iPNDM", "ipndm", 3), demo.sample_column("DDIM", "ddim", 3)]
    assert columns[0].images.shape == (64, 1, 8, 8)
    assert columns[0].distance.low <= columns[0].distance.value <= columns[0].distance.high
    demo.draw_columns(columns, tmp_path / "demo.png")
    demo.draw_quality(tmp_path / "quality.png")
    for path in tmp_path.iterdir():
        assert plt.imread(path).std() > 0.01


def test_more_calls_come_closer_to_the_converged_solution() -> None:
    few, many = (demo.sample_column("iPNDM", "ipndm", steps) for steps in (5, 30))
    assert many.distance.high < few.distance.low


def test_the_command_without_its_extra_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; import fastdiff.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "needs typer and rich" in result.stderr
    assert "Traceback" not in result.stderr
