"""Each example runs as its first lines say."""

import runpy
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
ARGUMENTS = {
    "diffusers_unet.py": ["--fake", "--steps", "3"],
    "edm_checkpoint.py": ["--fake"],
    "flow_matching.py": ["--fake", "--steps", "3"],
    "k_diffusion_samplers.py": ["--steps", "8"],
}


def run(monkeypatch, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_all_examples_are_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "out.file"
    run(monkeypatch, name, *ARGUMENTS[name], "--out", str(out.with_suffix(".png")))
    assert out.with_suffix(".png").stat().st_size > 100
    assert "wrote" in capsys.readouterr().out


def test_the_edm_example_finds_the_distribution(tmp_path, monkeypatch):
    """Its exact denoiser draws images around the mean, 0.1 from it."""
    made = run(monkeypatch, "edm_checkpoint.py", "--fake", "--out", str(tmp_path / "x.png"))
    spread = made["images"] - made["network"].mean
    assert 0.09 < float(spread.detach().std()) < 0.11


def test_a_real_folder(tmp_path, monkeypatch, capsys):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8,), norm_num_groups=8, layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "model")
    run(monkeypatch, "diffusers_unet.py", str(tmp_path / "model"), "--solver", "unipc",
        "--out", str(tmp_path / "x.png"))  # fmt: skip
    assert "unipc, 10 steps" in capsys.readouterr().out


def test_without_arguments_it_says_what_it_needs(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, "edm_checkpoint.py")
    assert "--repository and --network, or --fake" in capsys.readouterr().err
