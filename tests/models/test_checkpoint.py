"""Denoisers as files: what is written is read again, whatever kind of network; else an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastdiff.files import read_tensors, write_tensors
from fastdiff.models import (
    NoiseConditional,
    UNet,
    UNetConfig,
    load_digits,
    load_photographs,
    read_denoiser,
    write_denoiser,
)

SMALL = UNetConfig(channels=1, widths=(8, 16), blocks=1, heads=2, classes=3, groups=4)
BETAS = ("linear_beta", {"beta_start": 1e-4, "beta_end": 0.02, "num_train_timesteps": 100})


def written(path: Path) -> UNet:
    network = UNet(SMALL).eval()
    write_denoiser(
        path, "unet", SMALL.to_dict(), network.state_dict(), prediction="v_prediction",
        schedule=BETAS, words={"seed": 7}, others={"more": torch.ones(2)},
    )  # fmt: skip
    return network


def test_a_unet_comes_back_with_all_that_a_sampler_needs(tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    network, found = written(path), read_denoiser(path)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 90.0]), torch.tensor([0, 3])
    torch.testing.assert_close(found.network(x, t, labels), network(x, t, labels))
    assert found.prediction == "v_prediction" and found.schedule.first == 99
    assert found.words["seed"] == 7 and found.others.keys() == {"more"}
    assert json.loads(path.with_suffix(".json").read_text()) == found.words
    assert not found.network.training
    assert not any(p.requires_grad for p in found.network.parameters())


def test_a_noise_conditional_network_in_half_precision_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "ve.safetensors"
    config = UNetConfig(channels=3, widths=(8, 16), blocks=1, heads=2, groups=4)
    network, sigmas = NoiseConditional(config, 0.1, 9.0), {"sigma_min": 0.1, "sigma_max": 9.0}
    halves = {name: value.half() for name, value in network.state_dict().items()}
    settings = {"unet": config.to_dict(), **sigmas}
    write_denoiser(
        path, "noise_conditional", settings, halves, prediction="epsilon",
        schedule=("ve", sigmas), words={},
    )  # fmt: skip
    found = read_denoiser(path)
    assert found.schedule == network.schedule and found.network.sigma_max == 9.0
    for name, value in found.network.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, halves[name].float())


def test_files_that_are_no_denoiser_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "unet.safetensors"
    with pytest.raises(ValueError, match="prediction must be one of .*; got 'velocity'"):
        write_denoiser(path, "unet", {}, {}, prediction="velocity", schedule=BETAS, words={})
    written(path)
    tensors, words = read_tensors(path)
    for changes, message in (
        ({"format": "another"}, "must be of the format 'fastdiff denoiser 1'; got 'another'"),
        ({"network": {"kind": "dit", "settings": {}}}, "must hold one of unet, .*; got 'dit'"),
    ):
        write_tensors(path, tensors, words | changes)
        with pytest.raises(ValueError, match=message):
            read_denoiser(path)
    del tensors["network.stem.weight"]
    write_tensors(path, tensors, words)
    with pytest.raises(ValueError, match="does not fit its network"):
        read_denoiser(path)
    path.write_bytes(b"no safetensors at all")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        read_denoiser(path)


def test_the_bundled_models_are_such_files() -> None:
    for load, schedule in ((load_digits, "linear_beta"), (load_photographs, "ve")):
        _, words = load()
        assert words["prediction"] == "epsilon" and words["schedule"]["kind"] == schedule
