"""diffusers' own pipelines around small networks."""

import diffusers
import numpy as np
import pytest
import torch

from tests.helpers.networks import loops_of


def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def unconditional(kind, scheduler):
    pipe = getattr(diffusers, f"{kind}Pipeline")(unet(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampled(pipe, steps=6, seed=3, **options):
    generator = torch.Generator().manual_seed(seed)
    options = {"batch_size": 2, "output_type": "np"} | options
    return pipe(generator=generator, num_inference_steps=steps, return_dict=False, **options)[0]


def close(found, wanted):
    assert np.abs(found - wanted).max() <= 1e-4 * np.abs(wanted).max()


def tiny_stable_diffusion():
    """Makes pipelines, text to image and image to image, around the same tiny networks."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    network = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(16, 32), norm_num_groups=8, cross_attention_dim=16,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            vocab_size=100,
            projection_dim=16,
            max_position_embeddings=10,
            pad_token_id=1,
            bos_token_id=0,
            eos_token_id=2,
        )
    )
    parts = {
        "unet": network.eval(), "vae": vae.eval(), "text_encoder": text.eval(), "tokenizer": None,
        "safety_checker": None, "feature_extractor": None,
    }  # fmt: skip

    def make(scheduler, kind="StableDiffusionPipeline"):
        pipe = getattr(diffusers, kind)(**parts, scheduler=scheduler, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def prompts(batch=1):
    random = torch.Generator().manual_seed(7)
    shape = (batch, 10, 16)
    return {
        "prompt_embeds": torch.randn(shape, generator=random),
        "negative_prompt_embeds": torch.randn(shape, generator=random),
    }


SD = {
    "PNDMScheduler": {"skip_prk_steps": True, "steps_offset": 1},
    "DDIMScheduler": {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "DPMSolverMultistepScheduler": {},
    "UniPCMultistepScheduler": {},
    "EulerDiscreteScheduler": {},
    "DDPMScheduler": {"clip_sample": False},
}


def loops(pipe):
    """The recorded loops of a pipeline's network."""
    return loops_of(pipe.unet)
