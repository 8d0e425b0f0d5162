"""`fastdiff.accelerate` on networks and folders (pipelines have a test file of their own)."""

import diffusers
import pytest
import torch

import fastdiff


def network(x, t):
    return 0.3 * x


def test_a_network_with_its_scheduler():
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", timestep_spacing="trailing", prediction_type="v_prediction",
        clip_sample_range=2.0,
    )  # fmt: skip
    sampler = fastdiff.accelerate(network, scheduler, solver="dpmpp_2m", steps=6)
    assert sampler.tableau.solver == "dpmpp_2m" and sampler.tableau.steps == 6
    assert sampler.tableau.prediction == "v_prediction" and sampler.tableau.clip == (-2.0, 2.0)
    schedule = fastdiff.NoiseSchedule.from_diffusers(scheduler)
    plain = fastdiff.Sampler(
        network, schedule, solver="dpmpp_2m", steps=6, prediction="v_prediction", clip=2.0
    )
    noise = torch.randn(2, 3, 4, 4)
    assert torch.equal(sampler(noise), plain(noise))


def test_defaults_and_overrides():
    scheduler = diffusers.DDPMScheduler()
    assert fastdiff.accelerate(network, scheduler).tableau.clip == (-1.0, 1.0)
    sampler = fastdiff.accelerate(network, scheduler, clip=None)
    assert (sampler.tableau.solver, sampler.tableau.steps, sampler.tableau.clip) == (
        "ipndm", 10, None,
    )  # fmt: skip
    schedule = fastdiff.NoiseSchedule.edm()
    sampler = fastdiff.accelerate(network, schedule, prediction="sample", steps=3)
    assert sampler.tableau.prediction == "sample"
    wrapped = fastdiff.wrap(network, prediction="sample", schedule=schedule)
    assert fastdiff.accelerate(wrapped).tableau.prediction == "sample"


def test_a_variance_exploding_scheduler_brings_its_score():
    scheduler = diffusers.ScoreSdeVeScheduler()
    sampler = fastdiff.accelerate(network, scheduler, steps=5)
    assert sampler.tableau.prediction == "score"
    assert sampler.tableau.times[0] == scheduler.config.sigma_max


def test_bad_input_is_named(tmp_path):
    pipe = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8, block_out_channels=(8,), norm_num_groups=8, layers_per_block=1,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ),
        diffusers.DDPMScheduler(),
    )  # fmt: skip
    with pytest.raises(
        TypeError, match="a pipeline takes solver=, capture= and preconditioner=.*got steps"
    ):
        fastdiff.accelerate(pipe, steps=10)
    with pytest.raises(TypeError, match="got scheduler"):
        fastdiff.accelerate(pipe, pipe.scheduler)
    with pytest.raises(ValueError, match="pipe must be a pipeline.*got int"):
        fastdiff.restore(3)
    with pytest.raises(ValueError, match="that accelerate"):
        fastdiff.restore(pipe)
    with pytest.raises(ValueError, match="thresholding"):
        fastdiff.accelerate(network, diffusers.DDPMScheduler(thresholding=True))
    with pytest.raises(ValueError, match="prediction must be given"):
        fastdiff.accelerate(network)
    with pytest.raises(FileNotFoundError, match="no_such"):
        fastdiff.accelerate(tmp_path / "no_such")
    with pytest.raises(FileNotFoundError, match="has neither"):
        fastdiff.accelerate(tmp_path)
    with pytest.raises(TypeError, match="left out for a folder"):
        fastdiff.accelerate(tmp_path, diffusers.DDPMScheduler())
