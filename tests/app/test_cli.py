"""The command line, as a user types it, and the pieces of the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdiff

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from fastdiff.app import cli, demo, doctor

# 8x8 images leave nothing to share, and a busy machine disturbs one thread least.
pytestmark = pytest.mark.usefixtures("one_thread")


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
        (("sample", "--label", "10"), "label must be 0 .. 9"),
        (("sample", "--num-images", "0"), "num_images must be at least 1"),
        (("sample", "--solver", "nope"), "solver must be one of"),
        (("sample", "--model", "nowhere"), "there is no folder 'nowhere'"),
        (("eval",), "--images or --model must be given"),
        (("eval", "--images", "nowhere", "--reference", "digits"), "nowhere does not exist"),
        (("eval", "--images", "nowhere"), "reference must be"),
        (("eval", "--images", "nowhere", "--steps", "3"), "--steps is about sampling"),
        (("eval", "--model", "digits", "--num-images", "1"), "num_images must be at least 2"),
        (("eval", "--model", "digits", "--reference", "nowhere"), "reference must exist"),
        (("eval", "--model", "digits", "--features", "nope"), "features must be one of"),
        (("eval", "--all-solvers"), "--all-solvers goes with --model digits"),
        (("eval", "--model", "digits", "--all-solvers", "--steps", "3"), "without --steps"),
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


def test_sample_writes_images_and_a_sheet(tmp_path: Path) -> None:
    import matplotlib.pyplot as plt

    out, sheet = tmp_path / "new" / "digits", tmp_path / "sheets" / "digits.png"
    result = run("sample", "--steps", "3", "--num-images", "3", "--seed-start", "5", "--label",
                 "7", "--out", str(out), "--sheet", str(sheet))  # fmt: skip
    assert result.exit_code == 0, result.output
    assert f"3 images: {out}, {sheet}" in result.output
    names = ["000005.png", "000006.png", "000007.png", "recipe.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert json.loads((out / "recipe.json").read_text())["labels"] == 7
    assert plt.imread(sheet).shape[:2] == (2 + 66, 2 + 3 * 66)


def test_sample_depends_on_the_seed_alone(tmp_path: Path) -> None:
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        run("sample", "--steps", "3", "--num-images", "2", "--seed-start", seed, "--label", "1",
            "--out", str(tmp_path / name))  # fmt: skip
    five = (tmp_path / "a" / "000005.png").read_bytes()
    six = (tmp_path / "a" / "000006.png").read_bytes()
    assert five == (tmp_path / "b" / "000005.png").read_bytes()
    assert six == (tmp_path / "c" / "000006.png").read_bytes()
    assert five != six


def test_eval_samples_a_model_and_measures_it(tmp_path: Path) -> None:
    images, report, stats = tmp_path / "images", tmp_path / "report.json", tmp_path / "stats.npz"
    sampling = ("--model", "digits", "--num-images", "40", "--steps", "2", "--images", str(images))
    result = run(
        "eval", *sampling, "--out", str(report), "--save-stats", str(stats), "--reference", "digits"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text())
    assert (found["images"]["count"], found["reference"]["source"]) == (40, "digits")
    assert f"{found['frechet'][0]:.4g}" in result.output
    again = tmp_path / "again.json"
    result = run("eval", "--images", str(images), "--reference", str(stats), "--out", str(again))
    assert result.exit_code == 0, result.output
    found = json.loads(again.read_text())
    assert found["features"]["name"] == "digits"
    assert found["frechet_with_bias"] == pytest.approx(0, abs=1e-6)  # against itself


def test_the_command_of_the_committed_evaluation_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastdiff.app import digits_quality

    asked = []
    monkeypatch.setattr(digits_quality, "evaluate_digits", lambda *given: asked.append(given))
    result = run(
        *digits_quality.COMMAND.split()[1:], "--num-images", "7", "--out", str(tmp_path / "q")
    )
    assert result.exit_code == 0, result.output
    assert asked == [(tmp_path / "q", 7)]


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


def test_the_preconditioned_panel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noises: other images with a preconditioner, all of them in range."""
    monkeypatch.setattr(demo, "PHOTOGRAPH_STEPS", 3)
    monkeypatch.setattr(demo, "PHOTOGRAPHS", 2)
    (_, real), (_, plain), *others = demo.photograph_rows()
    for images in (real, plain, *(images for _, images in others)):
        assert images.shape == (2, 3, 32, 32) and 0 <= images.min() and images.max() <= 1
    assert all(not torch.allclose(images, plain) for _, images in others)
    demo.draw_photographs(tmp_path / "preconditioned.png")
    assert (tmp_path / "preconditioned.png").stat().st_size > 10_000


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
    code = "import sys; sys.modules['typer'] = None; import fastdiff.app.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "needs typer and rich" in result.stderr
    assert "Traceback" not in result.stderr
