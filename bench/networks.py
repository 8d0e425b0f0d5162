"""Published architectures, with random weights: times do not depend on what they draw."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .loops import scheduler

TOKENS, WIDTH = 77, 768  # Stable Diffusion's text embeddings
DATA = 0.5  # EDM's sigma_data


@dataclass(frozen=True)
class Method:
    """A stock scheduler and our solver of the same samples."""

    scheduler: str
    solver: str
    options: dict[str, Any] = field(default_factory=dict)

    def stock(self) -> Any:
        return scheduler(self.scheduler, **self.options)


@dataclass(frozen=True)
class Model:
    """A published architecture.

    Attributes:
        config: of diffusers' class.
        small: what of it is changed for a walk through on the CPU.
        shape: of one image or latent.
        methods: what is compared over it.
        dtype: of its weights.
        guided: whether it attends to text, sampled with classifier-free guidance.
        edm: whether it is called through EDM's preconditioning.
    """

    config: dict[str, Any]
    small: dict[str, Any]
    shape: tuple[int, int, int]
    methods: tuple[Method, Method]
    dtype: torch.dtype = torch.float16
    guided: bool = False
    edm: bool = False


def _ddpm(side: int, widths: tuple[int, ...], attention: int) -> dict[str, Any]:
    """Ho et al.'s UNet: attention at one resolution, counted from the finest."""
    down = ["AttnDownBlock2D" if i == attention else "DownBlock2D" for i in range(len(widths))]
    return {
        "sample_size": side,
        "block_out_channels": widths,
        "layers_per_block": 2,
        "down_block_types": tuple(down),
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(down)),
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "attention_head_dim": None,
    }


def _methods(**options: Any) -> tuple[Method, Method]:
    ddim = options | {"clip_sample": False}
    return (
        Method("DDIMScheduler", "ddim", ddim),
        Method("UniPCMultistepScheduler", "unipc", options),
    )


STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
MODELS = {
    "DDPM CIFAR-10": Model(
        _ddpm(32, (128, 256, 256, 256), 1),  # 35.7 million parameters
        {"block_out_channels": (32, 32, 32, 32)},
        (3, 32, 32),
        _methods(),
    ),
    "EDM 64 px": Model(
        {  # Dhariwal and Nichol's, which EDM trained for ImageNet; 295 million, without classes
            "sample_size": 64,
            "block_out_channels": (192, 384, 576, 768),
            "layers_per_block": 3,
            "down_block_types": ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3),
            "up_block_types": (*("AttnUpBlock2D",) * 3, "ResnetUpsampleBlock2D"),
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attention_head_dim": 64,
        },
        {"block_out_channels": (32, 32, 32, 32), "attention_head_dim": 32},
        (3, 64, 64),
        (
            Method("EDMEulerScheduler", "ddim"),
            Method("EDMDPMSolverMultistepScheduler", "dpmpp_2m"),
        ),
        dtype=torch.float32,
        edm=True,
    ),
    "DDPM LSUN 256": Model(
        _ddpm(256, (128, 128, 256, 256, 512, 512), 4),  # 113.7 million
        {"block_out_channels": (64,) * 6},
        (3, 256, 256),
        _methods(),
    ),
    "Stable Diffusion 1.5": Model(
        {"sample_size": 64, "cross_attention_dim": WIDTH},  # 859.5 million
        {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
        (4, 64, 64),
        _methods(**STABLE_DIFFUSION),
        guided=True,
    ),
}


class Preconditioned(nn.Module):
    """D(x; sigma) = c_skip x + c_out F(c_in x; ln(sigma) / 4), Karras et al. 2022, table 1."""

    img_resolution, label_dim, sigma_data = 64, 0, DATA

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma.reshape(-1, 1, 1, 1)
        size = (sigma**2 + DATA**2).sqrt()
        output = self.network(x / size, sigma.flatten().log() / 4, return_dict=False)[0]
        return (DATA / size) ** 2 * x + sigma * DATA / size * output


@functools.lru_cache(maxsize=len(MODELS))
def unet(name: str, device: torch.device, small: bool) -> nn.Module:
    import diffusers

    model = MODELS[name]
    config = model.config | (model.small if small else {})
    torch.manual_seed(0)
    with device:
        kind = diffusers.UNet2DConditionModel if model.guided else diffusers.UNet2DModel
        network = kind(**config).eval().requires_grad_(False)
    return network if small else nn.Module.to(network, model.dtype)


def embeddings(batch: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two prompts' text embeddings for every image: without and with what is asked for."""
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(2, 1, TOKENS, WIDTH, generator=generator).to(like)
    none, text = both.expand(2, batch, TOKENS, WIDTH)
    return none, text
