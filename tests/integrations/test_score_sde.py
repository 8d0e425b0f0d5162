"""diffusers' ScoreSdeVeScheduler pipelines, plain and through a preconditioner."""

import math

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

import fastdiff  # noqa: E402
from fastdiff import NoiseSchedule, Preconditioner, Sampler, power_law_masks  # noqa: E402
from fastdiff.ops import spectral_update_ref  # noqa: E402


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    ).eval()  # fmt: skip
    scheduler = diffusers.ScoreSdeVeScheduler(sigma_max=20.0, snr=0.2)
    made = diffusers.ScoreSdeVePipeline(unet=unet, scheduler=scheduler)
    made.set_progress_bar_config(disable=True)
    return made


MADE = Preconditioner.from_statistics(power_law_masks(3, 8, 8), alpha=3.0)


def images(pipe, steps=5):
    generator = torch.Generator().manual_seed(1)
    return pipe(
        batch_size=2, num_inference_steps=steps, generator=generator, output_type="np"
    ).images


def test_a_pipeline_through_a_preconditioner(pipe):
    """The stock loop with every move replaced, written out with complex transforms."""
    stock = images(pipe)
    found = images(fastdiff.accelerate(pipe, preconditioner=MADE))
    assert abs(found - stock).max() > 1e-2
    generator, steps = torch.Generator().manual_seed(1), 5
    draw = lambda: torch.randn(2, 3, 8, 8, generator=generator).double()
    sigmas = [*torch.linspace(math.log(20.0), math.log(0.01), steps).exp().tolist(), 0.0]
    x = 20.0 * MADE.noise(draw())
    told = pipe.scheduler.sigmas

    def score(x, i):
        with torch.no_grad():
            return pipe.unet(x.float(), told[i] * torch.ones(2)).sample.double()

    for i in range(steps):
        row = torch.tensor([[1.0, 2 * 0.2**2]], dtype=torch.float64)
        x = spectral_update_ref(x, score(x, i), MADE.gains, row, draw(), "batch")
        power = sigmas[i] ** 2 - sigmas[i + 1] ** 2
        row = torch.tensor([[power, math.sqrt(power) * (i + 1 < steps)]], dtype=torch.float64)
        x = spectral_update_ref(x, score(x, i), MADE.gains, row, draw())
    wanted = x.clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert abs(found - wanted).max() < 2e-4
    assert "transforms" in pipe.scheduler.describe(x)["moves"]


def test_it_can_be_undone_and_saved(pipe, tmp_path):
    stock = images(pipe)
    fastdiff.accelerate(pipe, preconditioner=MADE).save_pretrained(tmp_path)
    again = diffusers.ScoreSdeVePipeline.from_pretrained(tmp_path)
    assert type(again.scheduler) is diffusers.ScoreSdeVeScheduler
    again.set_progress_bar_config(disable=True)
    assert abs(images(again) - stock).max() < 1e-4  # its weights lie at other addresses
    assert abs(images(fastdiff.restore(pipe)) - stock).max() == 0


def test_the_native_sampler_is_the_stock_loop(pipe):
    """The same noises: predictor_corrector with the norms of the batch and no preconditioner."""
    steps, scheduler = 6, pipe.scheduler
    generator = torch.Generator().manual_seed(1)
    z0, *noises = (torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2 * steps + 1))
    score = lambda x, t: -x / (0.3 + t.view(-1, 1, 1, 1) ** 2) + 0.1
    scheduler.set_timesteps(steps, sampling_eps=1e-6)
    scheduler.set_sigmas(steps, sampling_eps=1e-6)
    x, given = z0 * scheduler.init_noise_sigma, iter(noises)
    with pytest.MonkeyPatch.context() as patch:
        import diffusers.schedulers.scheduling_sde_ve as module

        patch.setattr(module, "randn_tensor", lambda *_, **__: next(given))
        for i, t in enumerate(scheduler.timesteps):
            sigma = scheduler.discrete_sigmas[steps - 1 - i] * torch.ones(2)
            x = scheduler.step_correct(score(x, sigma), x).prev_sample
            x, mean = scheduler.step_pred(score(x, sigma), t, x, return_dict=False)
    sampler = Sampler(score, NoiseSchedule.ve(0.01, 20.0), solver="predictor_corrector",
                      steps=steps, snr=0.2, prediction="score", norms="batch")  # fmt: skip
    found = sampler(z0, stage_noise=noises[:-1])
    torch.testing.assert_close(found, mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda p: fastdiff.accelerate(p, preconditioner=MADE, solver="ddim"), ValueError,
         "solver must be left out"),
        (lambda p: fastdiff.accelerate(p, preconditioner=Preconditioner()), TypeError,
         "with a gain"),
        (lambda p: fastdiff.accelerate(p, preconditioner="mask"), TypeError, "Preconditioner"),
    ],
)  # fmt: skip
def test_bad_input_is_named(pipe, call, error, says):
    with pytest.raises(error, match=says):
        call(pipe)
    assert type(pipe.scheduler) is diffusers.ScoreSdeVeScheduler


def test_other_schedulers_are_refused(pipe):
    pipe.scheduler = diffusers.DDPMScheduler()
    with pytest.raises(ValueError, match="needs a ScoreSdeVeScheduler"):
        fastdiff.accelerate(pipe, preconditioner=MADE)
