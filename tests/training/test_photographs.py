"""The photographs model's data, recipe and network."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import fastdiff.models.photographs
from fastdiff.models.noise_conditional import DEVIATION, MEAN, NoiseConditional
from fastdiff.models.photographs import load_photographs
from fastdiff.models.unet import UNetConfig
from fastdiff.training.recipes import photographs

pytest.importorskip("sklearn")
ASSETS = Path(fastdiff.models.photographs.__file__).parents[1] / "assets"
TINY = UNetConfig(widths=(8, 16), blocks=1, heads=2)


@pytest.fixture
def tiny(monkeypatch):
    preset = photographs.PRESETS["cpu"]
    loop = replace(preset.loop, log_every=1, evaluate_every=2, save_every=2)
    small = replace(preset, unet=TINY, batch=4, size=16, loop=loop)
    monkeypatch.setitem(photographs.PRESETS, "cpu", small)


def test_the_held_out_part_is_never_trained_on():
    """Two photographs, cut once: left to train on, right to judge by."""
    fit, held = photographs.photographs()
    assert [tuple(image.shape) for image in fit] == [(3, 213, 256)] * 2
    assert [tuple(image.shape) for image in held] == [(3, 213, 64)] * 2
    for image in (*fit, *held):
        assert 0 <= float(image.min()) and float(image.max()) <= 1


def test_crops_are_parts_of_the_images():
    image = torch.arange(3 * 20 * 30).view(3, 20, 30) / 1800
    found = photographs.crops([image], 200, 8, torch.Generator().manual_seed(0))
    assert found.shape == (200, 3, 8, 8)
    steps = (found[:, 0, 0, 1] - found[:, 0, 0, 0]) * 1800
    assert set(steps.round().tolist()) == {1, -1}  # half of them mirrored
    corners = {(int(c // 30), int(c % 30)) for c in (found.amin((1, 2, 3)) * 1800).round()}
    assert max(row for row, _ in corners) == 12 and max(column for _, column in corners) == 22


def test_levels_are_geometric_and_batches_depend_on_the_step_alone():
    preset = photographs.PRESETS["cpu"]
    levels = photographs.noise_levels(torch.tensor([0.0, 0.5, 1.0]), preset.sigma_max)
    assert levels.tolist() == pytest.approx([0.01, math.sqrt(0.5), 50.0], rel=1e-6)
    fit, _ = photographs.photographs()
    batches = photographs.denoising_batches(fit, preset, "cpu")
    one, two, other = (batches(0, torch.Generator().manual_seed(s)) for s in (4, 4, 5))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["x"], other["x"])
    clean = one["x"] - one["sigma"].view(-1, 1, 1, 1) * one["noise"]
    assert -1e-4 <= float(clean.min()) and float(clean.max()) <= 1 + 1e-4


def test_noise_and_crops_are_drawn_from_different_numbers(monkeypatch):
    """Levels are uniform numbers: noise made of the same ones depends on them."""
    drawn, taken = torch.Generator().manual_seed(4), []

    def seen(images, count, size, generator, device):
        taken.append(generator.get_state())
        return torch.zeros(count, 3, size, size)

    monkeypatch.setattr(photographs, "crops", seen)
    photographs.denoising_batches([], photographs.PRESETS["cpu"], "cpu")(0, drawn)
    assert not torch.equal(taken[0], torch.Generator().manual_seed(4).get_state())


class Spy(torch.nn.Module):
    """In the UNet's place: keeps what it is shown and finds `value` everywhere."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x, t):
        self.x, self.t = x, t
        return torch.full_like(x, self.value)


SIGMAS = torch.tensor([0.01, math.sqrt(0.5), 50.0])


def spied(value):
    model = NoiseConditional(TINY, 0.01, 50.0)
    model.unet = Spy(value)
    return model


def test_the_network_is_told_log_sigma_and_shown_unit_inputs():
    model = spied(0.0)
    noise = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pixels = MEAN + DEVIATION * noise.roll(1, 0)
    model(pixels + SIGMAS.view(-1, 1, 1, 1) * noise, SIGMAS)
    torch.testing.assert_close(
        model.unet.t, torch.tensor([0.0, 500.0, 1000.0]).double(), rtol=0, atol=1e-4
    )
    assert model.unet.x.std((1, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=0.05)
    assert model.schedule.first == 50.0 and model.schedule.last == 0.01


def test_a_network_that_finds_nothing_is_right_about_normal_pixels():
    """What it leaves has the size that its output is measured in, and is no part of x (regression
    of the noise on x); the loss is then one at every level."""
    generator = torch.Generator().manual_seed(0)
    pixels, noise = torch.randn(2, 3, 3, 128, 128, generator=generator)
    pixels = MEAN + DEVIATION * pixels
    batch = photographs.noised(pixels, SIGMAS, noise)
    left = noise - spied(0.0)(batch["x"], SIGMAS)
    assert (left * (batch["x"] - MEAN)).mean((1, 2, 3)).abs().max() < 0.006
    for i, sigma in enumerate(SIGMAS.tolist()):
        wanted = DEVIATION / math.hypot(sigma, DEVIATION)
        assert float(left[i].std()) == pytest.approx(wanted, rel=0.01)
        one = {name: value[i : i + 1] for name, value in batch.items()}
        assert float(photographs.denoising_loss(spied(0.0), one)) == pytest.approx(1, abs=0.02)


def test_the_networks_errors_cost_x0_at_most_the_pixels_deviation():
    """However large sigma is: x0 = x - sigma epsilon."""
    x = torch.zeros(3, 3, 8, 8)
    apart = SIGMAS.view(-1, 1, 1, 1) * (spied(1.0)(x, SIGMAS) - spied(0.0)(x, SIGMAS))
    assert 0.009 < float(apart[0].max()) <= float(apart.max()) <= DEVIATION


def test_presets_are_what_was_asked_for():
    sizes = {name: preset.size for name, preset in photographs.PRESETS.items()}
    assert sizes == {"cpu": 32, "gpu": 64}
    model = NoiseConditional(photographs.PRESETS["cpu"].unet, 0.01, 50.0)
    assert sum(p.numel() for p in model.parameters()) <= 1_000_000


def test_training_stops_resumes_and_writes(tiny, tmp_path, monkeypatch):
    """Through the command; broken off in between it is the same run."""
    from safetensors.torch import load_file

    from fastdiff.app.cli import app

    arguments = ["train", "ve", "--out", str(tmp_path / "whole"), "--steps", "4"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    loss, calls = photographs.denoising_loss, []

    def broken(model, batch):
        calls.append(model.training)
        if sum(calls) == 4:  # three steps, one after the checkpoint, and evaluations
            raise RuntimeError("the machine went down")
        return loss(model, batch)

    monkeypatch.setattr(photographs, "denoising_loss", broken)
    with pytest.raises(RuntimeError, match="went down"):
        photographs.train_photographs(tmp_path / "parts", steps=4, progress=False)
    monkeypatch.setattr(photographs, "denoising_loss", loss)
    photographs.train_photographs(tmp_path / "parts", steps=4, progress=False)
    whole, parts = (load_file(tmp_path / f / "photographs.safetensors") for f in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    metadata = json.loads((tmp_path / "whole" / "photographs.json").read_text())
    assert metadata["command"] == "fastdiff train ve --preset cpu --steps 4 --seed 0"
    assert metadata["schedule"]["arguments"] == {"sigma_min": 0.01, "sigma_max": 50.0}
    assert len(metadata["held_out_curve"]) == 2


def test_bad_presets_are_named(tmp_path):
    with pytest.raises(ValueError, match="preset must be one of cpu, gpu"):
        photographs.train_photographs(tmp_path, "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="needs a CUDA device"):
            photographs.train_photographs(tmp_path, "gpu")


def test_the_committed_model_is_what_its_metadata_say():
    model, metadata = load_photographs()
    assert (ASSETS / "photographs.safetensors").stat().st_size <= 4e6
    assert metadata == json.loads((ASSETS / "photographs.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == metadata["parameters"] <= 1_000_000
    _, held = photographs.photographs()
    preset = photographs.PRESETS["cpu"]
    assert metadata["network"]["settings"]["unet"] == json.loads(json.dumps(preset.unet.to_dict()))
    found = photographs.held_out_denoising(held, preset, "held_out", "cpu")(model)["held_out"]
    assert found == pytest.approx(metadata["best"]["held_out"], rel=1e-3)  # stored in float16
