"""diffusers pipelines whose denoising loop is one replay.

An accelerated pipeline gets a subclass of its own class, under the same name. Its call does what
the stock call does around the loop; the loop itself, network, guidance and steps, is recorded once
and replayed. The stock loop is entered where something needs its middle: a callback, noise in the
steps, a generator for each image, given timesteps, adapters' arguments.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.capture import (
    Loop,
    NotCapturable,
    cache_of,
    captures,
    leaf_key,
    modes,
)

DETERMINISTIC = (
    "PNDM",
    "DDIM",
    "DPMSolverMultistep",
    "UniPCMultistep",
    "DEISMultistep",
    "EulerDiscrete",
    "HeunDiscrete",
    "Tableau",
)


class CapturedLoop:
    """What the captured pipelines share. Mixed in before the stock class."""

    unet: Any
    scheduler: Any
    fastdiff_capture: str
    stock_class: Any

    def _may_replay(self, call: dict[str, Any], neutral: dict[str, Any]) -> bool:
        """Whether nothing in this call needs the loop's middle: arguments are None or neutral."""
        changed = any(call.get(name) not in (None, value) for name, value in neutral.items())
        name = type(self.scheduler).__name__.removesuffix("Scheduler")
        noisy = "sde" in str(self.scheduler.config.get("algorithm_type"))
        if changed or noisy or name not in DETERMINISTIC or isinstance(call["generator"], list):
            return False
        ours = hasattr(self.scheduler, "clone")  # a stock one may have been put in its place
        if not ours or getattr(self.scheduler, "is_stochastic", False):
            return False
        return captures(self.fastdiff_capture, self.unet.device)

    def _denoised(
        self, latents: Tensor, times: Tensor, embeds: Tensor | None, scale: float | None
    ) -> Tensor:
        """The samples after the steps at these times, [B, C, H, W]; one replay."""
        fresh, unet, device = self.scheduler.clone(), self.unet, latents.device
        if getattr(fresh, "begin_index", 0) is None:
            fresh.set_begin_index(0)  # else it would be looked for among the times, on the device
        guidance = None
        if scale is not None:
            guidance = torch.full((1,), scale, dtype=latents.dtype, device=device)
        leaves = [latents, embeds, guidance]

        def body(static: list[Any]) -> Tensor:
            (x, embeds, guidance), stepper = static, fresh.clone()
            given = {} if embeds is None else {"encoder_hidden_states": embeds}
            for t in times:
                seen = x if guidance is None else torch.cat([x, x])
                seen = stepper.scale_model_input(seen, t)
                output = unet(seen, t, return_dict=False, **given)[0]
                if guidance is not None:
                    without, within = output.chunk(2)
                    output = without + guidance * (within - without)
                x = stepper.step(output, t, x, return_dict=False)[0]
            return x

        cache, key = cache_of(unet), None

        def make(place: Any) -> Loop:
            held = [*cache.network.weights(), times, fresh]
            loop = Loop(body, leaves, (), held, device, place)
            plans = getattr(fresh, "_fusion", None)
            loop.held.append(plans and list(plans.plans.values()))  # they own what was uploaded
            return loop

        with torch.no_grad(), cache.turn(device, pauses=False) as mine:
            if mine:
                try:
                    key = self._key(fresh, len(times), leaves)
                    loop = cache.find(key) or cache.record(key, device, make)
                    if isinstance(loop, Loop):
                        return loop.start(leaves, ()).clone()
                except Exception as error:  # the pipeline goes on as it would without a capture
                    cache.give_up(key, error)
            return body(leaves)

    def _key(self, scheduler: Any, steps: int, leaves: list[Any]) -> Hashable:
        """Everything that a recorded loop fixes."""
        if self.unet.training:
            raise NotCapturable("the UNet is in training mode")
        options = tuple(
            (name, value.tobytes() if isinstance(value, np.ndarray) else repr(value))
            for name, value in sorted(scheduler.config.items())
        )
        return (
            *(type(scheduler).__name__, options, scheduler.num_inference_steps, steps),
            tuple(map(leaf_key, leaves)),
            cache_of(self.unet).network.look(),
            modes(leaves[0].device),
        )


class Unconditional(CapturedLoop):
    """DDPM, DDIM and PNDM pipelines: noise, the loop, images."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        call = _arguments(stock.__call__, args, kwargs)
        if not self._may_replay(call, {"eta": 0.0, "use_clipped_model_output": False}):
            return stock.__call__(*args, **kwargs)
        config, size = self.unet.config, self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        device = self._execution_device  # type: ignore[attr-defined]
        noise = randn_tensor(
            (call["batch_size"], config.in_channels, height, width),
            generator=call["generator"],
            device=device,
            dtype=self.unet.dtype,
        )
        self.scheduler.set_timesteps(call["num_inference_steps"], device=device)
        with torch.no_grad():
            x0 = self._denoised(noise, self.scheduler.timesteps, None, None)
        images: Any = (x0 / 2 + 0.5).clamp(0, 1)
        if call["output_type"] != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if call["output_type"] == "pil":
            images = self.numpy_to_pil(images)  # type: ignore[attr-defined]
        self.maybe_free_model_hooks()  # type: ignore[attr-defined]
        if not call["return_dict"]:
            return (images,)
        return diffusers.ImagePipelineOutput(images=images)


class TextToImage(CapturedLoop):
    """Stable Diffusion: the stock call around a loop of no steps, its latents already denoised."""

    _fastdiff_run: dict[str, Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        call = _arguments(stock.__call__, args, kwargs)
        neutral = {
            "eta": 0.0,
            "guidance_rescale": 0.0,
            "cross_attention_kwargs": None,
            "ip_adapter_image": None,
            "ip_adapter_image_embeds": None,
            "timesteps": None,
            "sigmas": None,
            "callback_on_step_end": None,
        }
        timed = self.unet.config.time_cond_proj_dim is not None
        if timed or call.get("kwargs") or not self._may_replay(call, neutral):
            return stock.__call__(*args, **kwargs)
        vars(self)["_fastdiff_run"] = {}
        try:
            with self._scheduler(NoSteps(self.scheduler)):
                return stock.__call__(*args, **kwargs)
        finally:
            vars(self).pop("_fastdiff_run")

    def encode_prompt(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        embeds = stock.encode_prompt(*args, **kwargs)
        if self._fastdiff_run is not None:
            self._fastdiff_run["embeds"] = embeds
        return embeds

    def get_timesteps(self, *args: Any, **kwargs: Any) -> Any:
        """Of image to image: the part of the times that the strength leaves."""
        stock: Any = super()
        if self._fastdiff_run is None:
            return stock.get_timesteps(*args, **kwargs)
        with self._scheduler(self.scheduler.real):
            times, count = stock.get_timesteps(*args, **kwargs)
        self._fastdiff_run["times"] = times
        return times[:0], count

    def prepare_latents(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        if self._fastdiff_run is None:
            return stock.prepare_latents(*args, **kwargs)
        with self._scheduler(self.scheduler.real):
            times = self._fastdiff_run.get("times")
            if times is not None:  # image to image: (image, timestep, batch, images a prompt, ...)
                image, _, batch, each, *rest = args
                args = (image, times[:1].repeat(batch * each), batch, each, *rest)
            latents = stock.prepare_latents(*args, **kwargs)
            prompt, negative = self._fastdiff_run["embeds"]
            guided = self.do_classifier_free_guidance  # type: ignore[attr-defined]
            return self._denoised(
                latents,
                self.scheduler.timesteps if times is None else times,
                torch.cat([negative, prompt]) if guided else prompt,
                self.guidance_scale if guided else None,  # type: ignore[attr-defined]
            )

    def progress_bar(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        if self._fastdiff_run is None:
            return stock.progress_bar(*args, **kwargs)
        return contextlib.nullcontext()  # there is nothing to show of a replay

    @contextlib.contextmanager
    def _scheduler(self, scheduler: Any) -> Iterator[None]:
        """Another scheduler for a while, past the pipeline's registry of its parts."""
        before = self.scheduler
        vars(self)["scheduler"] = scheduler
        try:
            yield
        finally:
            vars(self)["scheduler"] = before


class NoSteps:
    """A scheduler as it is, but for its times: there are none left."""

    def __init__(self, real: Any) -> None:
        self.real = real

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    @property
    def timesteps(self) -> Tensor:
        return self.real.timesteps[:0]


FAMILIES: dict[Any, type[CapturedLoop]] = {
    diffusers.DDPMPipeline: Unconditional,
    diffusers.DDIMPipeline: Unconditional,
    diffusers.PNDMPipeline: Unconditional,
    diffusers.StableDiffusionPipeline: TextToImage,
    diffusers.StableDiffusionImg2ImgPipeline: TextToImage,
}


@functools.cache
def captured_class(stock: Any) -> Any:
    """The subclass whose loop is a replay; None for a pipeline of another class."""
    family = FAMILIES.get(stock)
    if family is None:
        return None
    own = {"__module__": stock.__module__, "__doc__": stock.__doc__, "stock_class": stock}
    return type(stock.__name__, (family, stock), own)


def _arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A call's arguments by name, defaults included."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments
