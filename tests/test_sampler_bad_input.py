"""What the sampler refuses, and where NaN and infinity go."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import Sampler, build_tableau
from tests.helpers.asserts import refused
from tests.helpers.networks import STRUCTURES, affine, conditional
from tests.helpers.schedules import LINEAR
from tests.helpers.tensors import normal


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("solver", STRUCTURES)
def test_nan_and_inf_stay_in_their_own_sample(solver: str, bad: float) -> None:
    x = normal(3, 2, 5)
    for options in ({}, {"clip": 1.0}, {"prediction": "v_prediction"}):
        sampler = Sampler(affine, LINEAR, solver=solver, steps=5, **options)
        good = sampler(x, seeds=range(3))
        poisoned = x.clone()
        poisoned[1, 0, 2] = bad
        result = sampler(poisoned, seeds=range(3))
        assert torch.equal(result[[0, 2]], good[[0, 2]])
        if solver != "predictor_corrector":  # whose steps have the length of the whole sample
            assert torch.equal(result[1, 1], good[1, 1])  # nor does it leave its pixel
    guided = Sampler(affine, LINEAR, solver=solver, steps=5)(poisoned, guidance_scale=2.0)
    assert guided[[0, 2]].isfinite().all()


def test_a_nan_is_not_clipped_away() -> None:
    x = normal(2, 3)
    x[0, 0] = math.nan
    result = Sampler(affine, LINEAR, solver="ddim", steps=3, clip=1.0)(x)
    assert result[0, 0].isnan() and result.isnan().sum() == 1


def test_bad_construction_is_named() -> None:
    with refused("denoiser must be callable; got int", TypeError):
        Sampler(3, LINEAR, steps=5)
    with refused("dtype must be torch.float32 or torch.float64; got torch.float16"):
        Sampler(affine, LINEAR, steps=5, dtype=torch.float16)
    with refused("schedule must be given unless tableau is"):
        Sampler(affine, steps=5)
    tableau = build_tableau("ddim", LINEAR, 5)
    for extra in ({"schedule": LINEAR}, {"steps": 5}, {"eta": 1.0}):
        with refused("tableau stands for schedule, steps and options"):
            Sampler(affine, tableau=tableau, **extra)
    with refused("solver must be one of"):
        Sampler(affine, LINEAR, solver="euler_a", steps=5)
    with refused("prediction must be one of"):
        Sampler(affine, LINEAR, prediction="eps", steps=5)
    with refused("steps must be a whole number >= 1; got None"):
        Sampler(affine, LINEAR)
    with refused("steps must be at most 1000.*got 1001"):
        Sampler(affine, LINEAR, steps=1001)
    with refused("ipndm has no option 'eta'", TypeError):
        Sampler(affine, LINEAR, steps=5, eta=1.0)


def test_bad_noise_and_seeds_are_named() -> None:
    sampler = Sampler(affine, LINEAR, solver="ddim", steps=3, eta=1.0)
    x = normal(2, 3)
    with refused("noise must be given, or seeds and shape"):
        sampler()
    with refused("noise must be given, or seeds and shape"):
        sampler(seeds=[1, 2])
    with refused("noise must be a floating-point tensor.*got torch.int64", TypeError):
        sampler(torch.ones(2, 3, dtype=torch.int64))
    with refused("noise must be a floating-point tensor.*got ndarray", TypeError):
        sampler(x.numpy())
    with refused("noise must have a batch dimension"):
        sampler(torch.tensor(1.0))
    with refused("seeds must be 2, one per image; got 3"):
        sampler(x, seeds=[1, 2, 3])
    for seeds in ([0.5, 1.0], torch.ones(2, 2, dtype=torch.int64), 2**64, [1, -(2**63) - 1], "ab"):
        with refused("seeds must be whole numbers"):
            sampler(x, seeds=seeds)
    with refused(r"shape must be \(3,\), noise's; got \(4,\)"):
        sampler(x, shape=(4,))
    with refused("stage_noise must hold 2 tensors, one per stochastic stage"):
        sampler(x, stage_noise=[x])
    with refused(r"stage_noise must be \(2, 3\) each; got \(3, 2\)"):
        sampler(x, stage_noise=[normal(3, 2)] * 2)
    each = Sampler(affine, LINEAR, solver="ddim", steps=3, eta=np.array([0.0, 0.5, 1.0]))
    with refused("noise must have the 3 samples the tableau has rows for; got 2"):
        each(x)


def test_bad_guidance_is_named() -> None:
    sampler = Sampler(conditional, LINEAR, steps=3)
    x, given_ = normal(2, 3), {"shift": torch.zeros(2), "label": torch.zeros(2)}
    with refused("uncond must come with guidance_scale"):
        sampler(x, uncond={}, **given_)
    for scale in (torch.ones(3), torch.ones(2, 1)):
        with refused(r"guidance_scale must be a number or a tensor \[2\]; got shape"):
            sampler(x, guidance_scale=scale, **given_)
    with refused(r"uncond\['label'\] must have shape \(2,\) or expand to it; got \(3,\)"):
        sampler(x, guidance_scale=2.0, uncond={"label": torch.zeros(3)}, **given_)


@pytest.mark.parametrize(
    ("returned", "message", "error"),
    [
        (lambda x: (x,), "denoiser must return a tensor; got tuple", TypeError),
        (lambda x: x[:, :1], r"denoiser must return \(2, 3, 4\); got \(2, 1, 4\)", ValueError),
        (lambda x: x[:1], r"denoiser must return \(2, 3, 4\); got \(1, 3, 4\)", ValueError),
        (lambda x: x[..., None], r"denoiser must return \(2, 3, 4\)", ValueError),
        (lambda x: x.to("meta"), "denoiser must return a tensor on cpu; got meta", ValueError),
        (lambda x: x.to(torch.int32), "denoiser must return .*float", TypeError),
        (lambda x: x.to(torch.complex64), "denoiser must return .*float", TypeError),
    ],
)
def test_bad_network_outputs_are_named(returned: Any, message: str, error: type[Exception]) -> None:
    with refused(message, error):
        Sampler(lambda x, t: returned(x), LINEAR, steps=2)(normal(2, 3, 4))
    if error is ValueError and "meta" not in message:
        with refused(r"denoiser must return \(2, 6, 4\)"):
            Sampler(lambda x, t: returned(x), LINEAR, steps=2, prediction="both")(normal(2, 3, 4))
