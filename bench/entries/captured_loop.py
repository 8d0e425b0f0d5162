"""Whole loops of the networks people run: stepwise, with the network in a graph, and as one graph.

Random weights: times do not depend on what they draw. Each network is run as it usually is:
diffusers' UNets in float16, Stable Diffusion's with guidance on the doubled batch, EDM's behind its
own preconditioning in float32. Stock loops are written as diffusers' pipelines are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff
from bench.registry import (
    Baseline,
    Call,
    Case,
    Entry,
    Gate,
    exact_convolutions,
    relative_error,
)

STEPS = 8
SMALL_SIDE = 32
BATCHES = (1, 4, 16)
SCALE = 7.5  # of guidance
TOKENS, WIDTH = 77, 768  # Stable Diffusion's text embeddings
DATA = 0.5  # EDM's sigma_data

# What is compared, beside ours.
STOCK = "stock loop"
EAGER = "our loop, eager"
GRAPHED = "stock loop, network in a graph"
GRAPHED_COMPILED = "stock loop, compiled network in a graph"
OURS_COMPILED = "fastdiff, compiled network"
AUTO = 'fastdiff, capture="auto"'
STOCK_COMPILED = "stock loop, compiled network"
REPLAYS = "replays of the network alone"
REPLAYS_COMPILED = "replays of the compiled network alone"

Prepare = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Method:
    """A stock scheduler and our solver of the same samples."""

    scheduler: str
    solver: str
    options: dict[str, Any] = field(default_factory=dict)

    def stock(self) -> Any:
        import diffusers

        return getattr(diffusers, self.scheduler)(**self.options)


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


STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
                    "steps_offset": 1}  # fmt: skip
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


# == Loops =========================================================================================


def plain(network: nn.Module) -> nn.Module:
    return network


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network, fullgraph=True, dynamic=False)  # type: ignore[return-value]


class Plain:
    """The raw network, as a stock loop calls it: (x [B, C, H, W], t [B] float32) -> its output."""

    def __init__(self, network: nn.Module, **kwargs: Tensor) -> None:
        self.network, self.kwargs = network, kwargs

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.network(x, t, return_dict=False, **self.kwargs)[0]


class Graphed(Plain):
    """The same in a CUDA graph: x and t are copied in, the result is its own buffer."""

    graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.graph is None:
            self.x, self.t = x.clone(), t.clone()
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(3):
                    super().__call__(self.x, self.t)
            torch.cuda.current_stream().wait_stream(aside)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.result = super().__call__(self.x, self.t)
        self.x.copy_(x)
        self.t.copy_(t)
        self.graph.replay()
        return self.result


def replaying(sampler: fastdiff.Sampler, run: Call) -> Call:
    """A call of a sampler that must replay: it raises where the loop was stepwise after all."""
    checked = False

    def call(i: int) -> Any:
        nonlocal checked
        result = run(i)
        if not checked:
            found = sampler.describe()
            reasons = [r for r in found["routed"] if r.startswith("stepwise")]
            if found["loop"] != "captured" or reasons:
                raise RuntimeError(f"the loop was not captured: {', '.join(reasons) or 'off'}")
            checked = True
        return result

    return call


@dataclass(frozen=True)
class Cell:
    """One network with one method, on one machine."""

    name: str
    method: Method
    device: torch.device
    small: bool
    steps: int

    @property
    def model(self) -> Model:
        return MODELS[self.name]

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, *sides = self.model.shape
        return (channels, SMALL_SIDE, SMALL_SIDE) if self.small else (channels, *sides)

    def noise(self, number: int, batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(batch, *self.shape, generator=generator)
        return noise.to(self.device, unet(self.name, self.device, self.small).dtype)

    def ours(self, prepare: Prepare, capture: str) -> Callable[[Sequence[Tensor]], Call]:
        """The loop as fastdiff has it."""

        def make(noises: Sequence[Tensor]) -> Call:
            network = prepare(unet(self.name, self.device, self.small))
            options: dict[str, Any] = {"solver": self.method.solver, "capture": capture}
            if self.model.edm:
                sampler = fastdiff.accelerate(Preconditioned(network), steps=self.steps, **options)
            else:
                scheduler = self.method.stock()
                scheduler.set_timesteps(self.steps)
                times = [*scheduler.timesteps.tolist(), -1]
                sampler = fastdiff.accelerate(network, scheduler, spacing=times, **options)
            extra: dict[str, Any] = {}
            if self.model.guided:
                none, text = embeddings(len(noises[0]), noises[0])
                extra = {"guidance_scale": SCALE, "encoder_hidden_states": text,
                         "uncond": {"encoder_hidden_states": none}}  # fmt: skip
            run = lambda i: sampler(noises[i], **extra)
            return replaying(sampler, run) if capture == "always" else run

        return make

    def network(self, prepare: Prepare, kind: type[Plain], like: Tensor) -> Plain:
        """The raw network, run in some way, for a batch."""
        prompts = {}
        if self.model.guided:
            prompts["encoder_hidden_states"] = torch.cat(embeddings(len(like), like))
        return kind(prepare(unet(self.name, self.device, self.small)), **prompts)

    def stock(
        self, prepare: Prepare, kind: type[Plain], host_times: bool = True
    ) -> Callable[[Sequence[Tensor]], Call]:
        """The loop as a pipeline has it, around the network run in some way.

        host_times: the scheduler is told times on the host and where it begins, so that no step
        waits for the device; else the times are on the device, as pipelines have them.
        """

        def make(noises: Sequence[Tensor]) -> Call:
            network = self.network(prepare, kind, noises[0])
            scheduler = self.method.stock()
            # EDM's schedulers would begin at sqrt(sigma_max^2 + 1), the paper at sigma_max.
            scale = scheduler.config.sigma_max if self.model.edm else scheduler.init_noise_sigma
            guided = self.model.guided

            def call(i: int) -> Tensor:
                scheduler.set_timesteps(self.steps, device="cpu" if host_times else self.device)
                if host_times and hasattr(scheduler, "set_begin_index"):
                    scheduler.set_begin_index(0)
                x = noises[i] * scale
                rows = len(x) * (2 if guided else 1)
                times = scheduler.timesteps.to(self.device, torch.float32)
                times = times[:, None].expand(-1, rows).contiguous()
                for t, time in zip(scheduler.timesteps, times, strict=True):
                    seen = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
                    output = network(seen, time)
                    if guided:
                        none, text = output.chunk(2)
                        output = none + SCALE * (text - none)
                    x = scheduler.step(output, t, x).prev_sample
                return x

            return call

        return make

    def replays(self, prepare: Prepare) -> Callable[[Sequence[Tensor]], Call]:
        """As many replays of the network as the loop has, and nothing between them: the floor."""

        def make(noises: Sequence[Tensor]) -> Call:
            x = torch.cat([noises[0]] * 2) if self.model.guided else noises[0]
            network = self.network(prepare, Graphed, noises[0])
            network(x, torch.ones(len(x), device=self.device))
            assert isinstance(network, Graphed) and network.graph is not None
            replay, result = network.graph.replay, network.result

            def call(i: int) -> Tensor:
                for _ in range(self.steps):
                    replay()
                return result

            return call

        return make

    def baselines(self, batch: int) -> dict[str, Baseline]:
        loop = functools.partial(Baseline, capturable=False, agrees=False)
        graph = functools.partial(loop, devices=("cuda",))
        found = {
            STOCK: loop(self.stock(plain, Plain, host_times=False)),
            EAGER: graph(self.ours(plain, "never")),
            AUTO: graph(self.ours(plain, "auto")),
            GRAPHED: graph(self.stock(plain, Graphed)),
            REPLAYS: graph(self.replays(plain)),
        }
        if batch == 1 or self.method is self.model.methods[0]:  # the network is the same in both
            slow = functools.partial(graph, quick=False, compiles=True)
            found |= {
                STOCK_COMPILED: slow(self.stock(compiled, Plain)),
                GRAPHED_COMPILED: slow(self.stock(compiled, Graphed)),
                OURS_COMPILED: slow(self.ours(compiled, "always")),
                REPLAYS_COMPILED: slow(self.replays(compiled)),
            }
        return found


def cells(device: torch.device, small: bool, steps: int = STEPS) -> Iterator[Cell]:
    """DDIM (EDM's Euler) over every network, then the multistep method."""
    for number, name in itertools.product(range(2), MODELS):
        yield Cell(name, MODELS[name].methods[number], device, small, steps)


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """Small networks in float32: our loop makes the stock samples, and a replay makes ours."""
    kinds = (Plain, Graphed) if device.type == "cuda" else (Plain,)
    with torch.inference_mode(), exact_convolutions():
        for cell in cells(device, True, 4):
            noises = [cell.noise(0, 2)]
            eager = cell.ours(plain, "never")(noises)(0)
            replayed = torch.equal(eager, cell.ours(plain, "always")(noises)(0))
            loops = [cell.stock(plain, Plain, host_times=False)]
            loops += [cell.stock(plain, kind) for kind in kinds]
            error = max(relative_error(eager, loop(noises)(0)) for loop in loops)
            yield {
                "case": f"{cell.name}, {cell.method.scheduler}",
                "error": error,
                "allowed": 1e-5,
                "replay is eager to the bit": replayed,
                "ok": error <= 1e-5 and replayed,
            }


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    """On a GPU; on the CPU a replay is a proof and no gain, so only a short walk through."""
    small = device.type == "cpu"
    if small and not quick:
        return
    for batch in BATCHES[:1] if quick else BATCHES:
        for cell in cells(device, small):
            yield Case(
                f"{cell.name}, {cell.method.scheduler.removesuffix('Scheduler')}",
                (batch, *cell.shape),
                inputs=lambda i, cell=cell, batch=batch: cell.noise(i, batch),
                ours=cell.ours(plain, "never" if small else "always"),
                bytes=0,
                flops=0,
                baselines=cell.baselines(batch),
                settings={"steps": cell.steps},
                capturable=False,
                graphs=True,
            )


ENTRY = Entry("captured_loop", "loop", (), gates, cases, needs="diffusers")
