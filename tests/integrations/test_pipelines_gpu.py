"""Accelerated pipelines as CUDA graphs; skipped where there is no GPU."""

import pytest
import torch

pytest.importorskip("diffusers")

import diffusers

import fastdiff
from fastdiff.capture import CudaRecording, cache_of
from tests.helpers.pipelines import SD, close, loops, prompts, sampled, unconditional
from tests.helpers.schedules import BETAS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.usefixtures("one_thread", "quiet"),
]


@pytest.fixture(autouse=True)
def _as_written():
    """Products in float32, and the same kernels at each call."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


@pytest.mark.parametrize("solver", [None, "ipndm"])
@pytest.mark.parametrize(
    "kind, scheduler",
    [("DDIM", diffusers.DDIMScheduler(clip_sample=False)), ("PNDM", diffusers.PNDMScheduler())],
    ids=lambda v: type(v).__name__,
)
def test_unconditional_loops_replay(kind, scheduler, solver):
    pipe = unconditional(kind, scheduler).to("cuda")
    fastdiff.accelerate(pipe, solver=solver, capture="never")
    wanted = [sampled(pipe, seed=s) for s in (1, 2)]
    fastdiff.accelerate(pipe, solver=solver, capture="always")
    for seed, images in zip((1, 2), wanted, strict=True):
        close(sampled(pipe, seed=seed), images)
    (loop,) = loops(pipe)
    assert isinstance(loop.recordings[0], CudaRecording)


@pytest.mark.parametrize("name", ["PNDMScheduler", "DDIMScheduler", "UniPCMultistepScheduler",
                                  "DPMSolverMultistepScheduler"])  # fmt: skip
def test_text_to_image_replays_as_the_stock_pipeline(stable_diffusion, name):
    pipe = stable_diffusion(getattr(diffusers, name)(**BETAS, **SD[name])).to("cuda")
    cache_of(pipe.unet).loops.clear()  # it is shared

    def call(seed, embeds):
        return pipe(
            **{key: value.cuda() for key, value in embeds.items()}, guidance_scale=5.0,
            num_inference_steps=5, output_type="latent", height=16, width=16,
            generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip

    other = {name: 0.5 * value for name, value in prompts().items()}
    wanted = [call(1, prompts()), call(2, other)]
    fastdiff.accelerate(pipe, capture="always")
    found = [call(1, prompts()), call(2, other)]
    (loop,) = loops(pipe)
    assert isinstance(loop.recordings[0], CudaRecording)
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).abs().max() / b.abs().max()) <= 1e-4
