"""Whole pipelines with fused steps and with native solvers, real classes at small sizes."""

import diffusers
import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.integrations.diffusers.pipelines import TableauScheduler, accelerate_pipeline, restore
from tests.helpers.pipelines import SD, close, prompts, sampled, unconditional
from tests.helpers.schedules import BETAS

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread", "quiet"),
]


# == The same method, fused ========================================================================


@pytest.mark.parametrize(
    "kind, scheduler, options",
    [
        ("DDPM", diffusers.DDPMScheduler(), {}),
        ("DDIM", diffusers.DDIMScheduler(), {}),
        ("DDIM", diffusers.DDIMScheduler(clip_sample=False), {"eta": 0.7}),
        ("PNDM", diffusers.PNDMScheduler(), {}),
        ("PNDM", diffusers.PNDMScheduler(skip_prk_steps=True), {}),
        ("ScoreSdeVe", diffusers.ScoreSdeVeScheduler(), {}),
    ],
    ids=lambda v: type(v).__name__,
)
def test_unconditional_pipelines_make_the_stock_images(kind, scheduler, options):
    pipe = unconditional(kind, scheduler)
    wanted = sampled(pipe, **options)
    assert fastdiff.accelerate(pipe) is pipe
    close(sampled(pipe, **options), wanted)
    report = pipe.scheduler.describe()
    assert report["fused_steps"] > 0
    # The Langevin correction takes norms of the images: no weighted sum does that.
    assert bool(report["stock_steps"]) == (kind == "ScoreSdeVe")
    close(sampled(pipe, **options), wanted)


@pytest.mark.parametrize("name", SD)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_text_to_image_makes_the_stock_latents(stable_diffusion, name, guidance):
    pipe = stable_diffusion(getattr(diffusers, name)(**BETAS, **SD[name]))
    call = lambda: pipe(
        **prompts(), guidance_scale=guidance, num_inference_steps=5, output_type="latent",
        height=16, width=16, generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    wanted = call()
    fastdiff.accelerate(pipe)
    found = call()
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-4
    assert pipe.scheduler.describe()["stock_steps"] == {}


@pytest.mark.parametrize("name", SD)
def test_image_to_image_makes_the_stock_latents(stable_diffusion, name):
    pipe = stable_diffusion(
        getattr(diffusers, name)(**BETAS, **SD[name]), "StableDiffusionImg2ImgPipeline"
    )
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    call = lambda: pipe(
        **prompts(), image=image, strength=0.6, num_inference_steps=10, output_type="latent",
        generator=torch.Generator().manual_seed(1),
    ).images  # fmt: skip
    wanted = call()
    found = (fastdiff.accelerate(pipe), call())[1]
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-4
    assert pipe.scheduler.describe()["fused_steps"] > 0


def test_callbacks_and_interrupts_are_honoured(stable_diffusion):
    pipe = stable_diffusion(diffusers.PNDMScheduler(**BETAS, **SD["PNDMScheduler"]))

    def call():
        seen = []

        def callback(pipe, step, t, kwargs):
            seen.append((step, int(t)))
            pipe._interrupt = step >= 3
            return {"latents": kwargs["latents"] * 0.9}

        latents = pipe(
            **prompts(), num_inference_steps=6, output_type="latent", height=16, width=16,
            generator=torch.Generator().manual_seed(1), callback_on_step_end=callback,
        ).images  # fmt: skip
        return seen, latents

    seen, wanted = call()
    fastdiff.accelerate(pipe)
    ours, found = call()
    assert ours == seen and len(seen) < 7
    assert float((found - wanted).abs().max() / wanted.abs().max()) <= 1e-4


# == Restoring =====================================================================================


@pytest.mark.parametrize("solver", [None, "ipndm"])
def test_restore_leaves_no_trace(solver):
    pipe = unconditional("DDIM", diffusers.DDIMScheduler())
    wanted, scheduler = sampled(pipe), pipe.scheduler
    before, config = set(vars(pipe)), dict(pipe.config)
    fastdiff.accelerate(pipe, solver=solver)
    fastdiff.accelerate(pipe, solver=solver)  # twice is once
    sampled(pipe)
    assert fastdiff.restore(pipe) is pipe
    assert pipe.scheduler is scheduler and set(vars(pipe)) == before
    assert dict(pipe.config) == config and np.array_equal(sampled(pipe), wanted)
    with pytest.raises(ValueError, match="that accelerate"):
        restore(pipe)


def test_an_accelerated_pipeline_saves_as_a_stock_one(tmp_path):
    pipe = fastdiff.accelerate(unconditional("DDIM", diffusers.DDIMScheduler()))
    wanted = sampled(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDIMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is diffusers.DDIMScheduler
    close(sampled(loaded), wanted)


# == Another solver ================================================================================


@pytest.mark.parametrize("solver", ["ddim", "ipndm", "dpmpp_2m", "unipc", "f_pndm", "heun"])
def test_a_native_solver_samples_as_the_sampler_does(solver):
    stock = diffusers.DDIMScheduler(clip_sample=False)
    pipe = fastdiff.accelerate(unconditional("DDPM", stock), solver=solver)
    found = sampled(pipe, steps=7)
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    network = lambda x, t: pipe.unet(x, t).sample
    schedule = fastdiff.NoiseSchedule.from_diffusers(stock)
    with torch.no_grad():
        x0 = fastdiff.Sampler(network, schedule, solver=solver, steps=7)(noise)
    close(found, (x0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())


def test_a_native_solver_in_text_and_image_pipelines(stable_diffusion):
    """On a fine grid every solver comes to the same image, from noise and from a picture."""
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for kind, options in (
        ("StableDiffusionPipeline", {"height": 16, "width": 16}),
        ("StableDiffusionImg2ImgPipeline", {"image": image, "strength": 0.5}),
    ):
        ends = []
        for solver in ("ddim", "ipndm", "dpmpp_2m"):
            stock = diffusers.DDIMScheduler(**BETAS, **SD["DDIMScheduler"])
            pipe = fastdiff.accelerate(stable_diffusion(stock, kind), solver=solver)
            ends.append(
                pipe(**prompts(), **options, num_inference_steps=200, output_type="latent",
                     guidance_scale=1.0, generator=torch.Generator().manual_seed(1)).images
            )  # fmt: skip
        for end in ends[1:]:
            assert float((end - ends[0]).abs().max() / ends[0].abs().max()) < 0.05


def test_a_changed_sample_is_taken_up():
    scheduler = TableauScheduler(solver="ipndm")
    scheduler.set_timesteps(5)
    x = torch.randn(1, 3, 4, 4)
    first = scheduler.step(0.1 * x, scheduler.timesteps[0], x).prev_sample
    changed = first.clone()
    first.mul_(0.5)  # in place: the same object
    a = scheduler.step(0.1 * x, scheduler.timesteps[1], first).prev_sample
    other = TableauScheduler(solver="ipndm")
    other.set_timesteps(5)
    other.step(0.1 * x, other.timesteps[0], x)
    b = other.step(0.1 * x, other.timesteps[1], changed * 0.5).prev_sample
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not torch.equal(first, changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_state_is_kept_in_full_precision(dtype):
    scheduler = TableauScheduler(solver="dpmpp_2m")
    results = []
    for kind in (dtype, torch.float64):
        scheduler.set_timesteps(20)
        x = torch.ones(1, 1, 2, 2, dtype=kind)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.full_like(x, 0.25), t, x).prev_sample
        assert x.dtype == kind
        results.append(x.double())
    error = float((results[0] - results[1]).abs().max() / results[1].abs().max())
    assert error <= 4 * torch.finfo(dtype).eps


def test_a_config_round_trip_of_the_native_scheduler(tmp_path):
    stock = diffusers.PNDMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction")
    made = TableauScheduler.of(stock, "unipc")
    made.save_pretrained(tmp_path)
    loaded = TableauScheduler.from_pretrained(tmp_path)
    assert loaded.config.solver == "unipc" and loaded.config.prediction_type == "v_prediction"
    assert loaded.schedule.alpha(500.0) == made.schedule.alpha(500.0)


# == Bad input =====================================================================================


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="pipeline"):
        accelerate_pipeline(object())
    ddim = unconditional("DDIM", diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="no_such"):
        accelerate_pipeline(ddim, solver="no_such")
    assert type(ddim.scheduler) is diffusers.DDIMScheduler
    ddim.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="must be one of.*EDMEulerScheduler"):
        accelerate_pipeline(ddim)
    with pytest.raises(ValueError, match="betas.*EDMEulerScheduler"):
        accelerate_pipeline(ddim, solver="ipndm")
    ddim.scheduler = diffusers.DDIMScheduler(thresholding=True)
    with pytest.raises(ValueError, match="thresholding"):
        accelerate_pipeline(ddim, solver="ipndm")


def test_bad_calls_of_the_native_scheduler():
    scheduler, x = TableauScheduler(solver="f_pndm"), torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match="set_timesteps"):
        scheduler.step(x, 1, x)
    scheduler.set_timesteps(5)
    with pytest.raises(ValueError, match="model_output"):
        scheduler.step(x[:, :1], 1, x)
    with pytest.raises(ValueError, match="eta"):
        scheduler.step(x, 1, x, eta=0.5)
    scheduler.set_begin_index(3)
    with pytest.raises(ValueError, match="one call a step"):
        scheduler.step(x, 1, x)
    scheduler.set_timesteps(2)
    for t in scheduler.timesteps:
        scheduler.step(x, t, x)
    with pytest.raises(ValueError, match="is over"):
        scheduler.step(x, 1, x)
