"""Accelerated pipelines whose loop is a replay, on the CPU's recordings."""

import diffusers
import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.capture import cache_of
from tests.helpers.pipelines import SD, close, loops, prompts, sampled, unconditional
from tests.helpers.schedules import BETAS

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("one_thread", "quiet"),
]


@pytest.fixture(autouse=True)
def _no_loops(stable_diffusion):
    cache_of(stable_diffusion(diffusers.DDIMScheduler()).unet).loops.clear()  # it is shared


def entered(pipe):
    """Counts the calls of the UNet's Python, in a list."""
    calls, first = [], pipe.unet.conv_in
    inner = first._conv_forward  # a hook or another forward would be noticed, and recorded anew
    first._conv_forward = lambda *args: (calls.append(1), inner(*args))[1]
    return calls


@pytest.mark.parametrize("solver", [None, "ipndm"])
@pytest.mark.parametrize(
    "kind, scheduler",
    [
        ("DDPM", diffusers.DDIMScheduler()),
        ("DDIM", diffusers.DDIMScheduler(clip_sample=False)),
        ("PNDM", diffusers.PNDMScheduler()),
        ("PNDM", diffusers.PNDMScheduler(skip_prk_steps=True)),
    ],
    ids=lambda v: type(v).__name__,
)
def test_unconditional_loops_replay(kind, scheduler, solver):
    pipe = unconditional(kind, scheduler)
    fastdiff.accelerate(pipe, solver=solver, capture="never")
    wanted = [sampled(pipe, seed=s) for s in (1, 2)]
    assert fastdiff.accelerate(pipe, solver=solver, capture="always") is pipe
    close(sampled(pipe, seed=1), wanted[0])
    calls = entered(pipe)
    close(sampled(pipe, seed=2), wanted[1])
    assert calls == [] and len(loops(pipe)) == 1
    sampled(pipe, steps=4)
    assert len(loops(pipe)) == 2


@pytest.mark.parametrize(
    "name", ["PNDMScheduler", "DDIMScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler"]
)
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_text_to_image_replays(stable_diffusion, name, guidance):
    pipe = stable_diffusion(getattr(diffusers, name)(**BETAS, **SD[name]))

    def call(seed, embeds):
        return pipe(
            **embeds, guidance_scale=guidance, num_inference_steps=5, output_type="latent",
            height=16, width=16, generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip

    other = {name: 0.5 * value for name, value in prompts().items()}
    wanted = [call(1, prompts()), call(2, other)]
    fastdiff.accelerate(pipe, capture="always")
    found = [call(1, prompts())]
    calls = entered(pipe)
    found.append(call(2, other))  # another prompt, noise and guidance: copies
    assert calls == [] and len(loops(pipe)) == 1
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) <= 1e-4


@pytest.mark.parametrize("solver", [None, "dpmpp_2m"])
def test_image_to_image_replays(stable_diffusion, solver):
    scheduler = diffusers.DDIMScheduler(**BETAS, **SD["DDIMScheduler"])
    pipe = stable_diffusion(scheduler, "StableDiffusionImg2ImgPipeline")

    def call(seed, strength=0.6):
        image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
        return pipe(
            **prompts(), image=image, strength=strength, num_inference_steps=10,
            output_type="latent", generator=torch.Generator().manual_seed(1),
        ).images  # fmt: skip

    fastdiff.accelerate(pipe, solver=solver, capture="never")
    wanted = [call(0), call(1), call(1, 0.3)]
    fastdiff.accelerate(pipe, solver=solver, capture="always")
    found = [call(0)]
    calls = entered(pipe)
    found.append(call(1))
    assert calls == []
    found.append(call(1, 0.3))
    assert len(loops(pipe)) == 2
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) <= 1e-4


def test_what_needs_the_middle_enters_the_stock_loop(stable_diffusion):
    pipe = stable_diffusion(diffusers.DDIMScheduler(**BETAS, **SD["DDIMScheduler"]))
    fastdiff.accelerate(pipe, capture="always")
    calls, seen = entered(pipe), []
    common = {"num_inference_steps": 3, "output_type": "latent", "height": 16, "width": 16}

    def callback(pipe, step, t, given):
        seen.append(step)
        return given

    for extra in (
        {"callback_on_step_end": callback},
        {"eta": 0.5},
        {"guidance_rescale": 0.5},
        {"generator": [torch.Generator().manual_seed(0)]},
        {"timesteps": [800, 500, 100]},
    ):
        before = len(calls)
        if "timesteps" in extra:
            with pytest.raises(ValueError, match="does not support custom"):  # as the stock one
                pipe(**prompts(), **common, **extra)
            continue
        pipe(**prompts(), **common, **extra)
        assert len(calls) == before + 3, extra
    assert seen == [0, 1, 2] and loops(pipe) == []


def test_noisy_steps_enter_the_stock_loop():
    pipe = unconditional("DDPM", diffusers.DDPMScheduler())
    wanted = sampled(pipe)
    fastdiff.accelerate(pipe, capture="always")
    close(sampled(pipe), wanted)
    pipe = unconditional("DDIM", diffusers.DDIMScheduler())
    wanted = sampled(pipe, eta=0.5)
    fastdiff.accelerate(pipe, capture="always")
    close(sampled(pipe, eta=0.5), wanted)
    assert loops(pipe) == []
    fastdiff.accelerate(pipe, solver="euler_ancestral", capture="always")
    sampled(pipe)
    assert loops(pipe) == []


def test_every_way_out_gives_the_same_images():
    pipe = fastdiff.accelerate(unconditional("DDIM", diffusers.DDIMScheduler()), capture="always")
    tuple_ = sampled(pipe)
    generator = torch.Generator().manual_seed(3)
    output = pipe(2, generator, num_inference_steps=6, output_type="np")
    assert np.array_equal(output.images, tuple_)
    generator = torch.Generator().manual_seed(3)
    pictures = pipe(batch_size=2, generator=generator, num_inference_steps=6).images
    assert pictures[0].size == (8, 8)
    found = np.asarray(pictures[0]) / 255.0
    assert np.abs(found - tuple_[0]).max() <= 0.5 / 255 + 1e-6


def test_tensors_and_stock_schedulers():
    pipe = unconditional("DDIM", diffusers.DDIMScheduler())
    call = lambda: (
        pipe(2, torch.Generator().manual_seed(3), num_inference_steps=4, output_type="pt").images
    )
    wanted = call()
    fastdiff.accelerate(pipe, capture="always")
    found = call()
    assert isinstance(found, torch.Tensor) and torch.allclose(found, wanted, atol=1e-4)
    pipe.scheduler = diffusers.DDIMScheduler()  # a stock one again: its own loop
    assert torch.allclose(call(), wanted, atol=1e-6)


@pytest.mark.parametrize("solver", [None, "ipndm"])
def test_a_recording_owns_what_it_reads(solver):
    """After the scheduler that recorded it is gone, and tables were made anew."""
    import gc
    import weakref

    pipe = unconditional("DDIM", diffusers.DDIMScheduler())
    fastdiff.accelerate(pipe, solver=solver, capture="always")
    wanted = sampled(pipe)
    (loop,) = loops(pipe)
    times = weakref.ref(loop.held[-3].untyped_storage())
    fastdiff.restore(pipe)
    fastdiff.accelerate(pipe, solver=solver, capture="always")
    gc.collect()
    assert times() is not None and np.array_equal(sampled(pipe), wanted)
    assert loops(pipe) == [loop]


def test_a_native_solver_in_inference_mode():
    pipe = fastdiff.accelerate(unconditional("DDIM", diffusers.DDIMScheduler()), solver="ipndm")
    wanted = sampled(pipe)
    with torch.inference_mode():
        close(sampled(pipe), wanted)


def test_restore_saves_and_names(tmp_path):
    pipe = unconditional("DDIM", diffusers.DDIMScheduler())
    before = set(vars(pipe))
    fastdiff.accelerate(pipe, capture="always")
    assert type(pipe).__name__ == "DDIMPipeline" and isinstance(pipe, diffusers.DDIMPipeline)
    assert type(pipe) is not diffusers.DDIMPipeline
    pipe.save_pretrained(tmp_path)
    assert type(diffusers.DDIMPipeline.from_pretrained(tmp_path)) is diffusers.DDIMPipeline
    fastdiff.accelerate(pipe, capture="never")  # twice is once
    fastdiff.restore(pipe)
    assert type(pipe) is diffusers.DDIMPipeline and set(vars(pipe)) == before
    with pytest.raises(ValueError, match="capture must be"):
        fastdiff.accelerate(pipe, capture="perhaps")
    assert type(pipe) is diffusers.DDIMPipeline and set(vars(pipe)) == before


def test_weights_in_place_and_training_mode():
    pipe = unconditional("DDIM", diffusers.DDIMScheduler())
    fastdiff.accelerate(pipe, capture="always")
    sampled(pipe)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.mul_(1.01)
    found = sampled(pipe)
    fastdiff.accelerate(pipe, capture="never")
    close(found, sampled(pipe))
    fastdiff.accelerate(pipe, capture="always")
    pipe.unet.train()
    with pytest.warns(UserWarning, match="training mode"):
        sampled(pipe)
