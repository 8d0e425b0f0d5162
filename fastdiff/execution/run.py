"""One run of a tableau over a denoiser: its network calls, guidance, noise, masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastdiff.execution.guidance import doubled_conditioning, guidance_scale
from fastdiff.execution.nonlinear import keep_known, rescaled_guidance, thresholded
from fastdiff.execution.stepper import Stepper
from fastdiff.execution.table import Table
from fastdiff.ops import row
from fastdiff.ops.layout import memory_format, per_sample, same_strides


class Inputs(NamedTuple):
    """The arguments of one run, as `Sampler.__call__` explains them."""

    noise: Tensor
    seeds: Tensor | None = None
    image: Tensor | None = None
    mask: Tensor | None = None
    stage_noise: Iterable[Tensor] | None = None
    guidance_scale: float | Tensor | None = None
    guidance_rescale: float = 0.0
    uncond: dict[str, Any] | None = None
    conditioning: dict[str, Any] = {}


class Run:
    """One run: what is evaluated and launched, stage by stage.

    Args:
        denoiser: the network, called as (x, t, **conditioning).
        network_dtype: what it is fed.
        dynamic_threshold: as of the sampler.
        routed: counts what does not go through the fused launch, by its reason.
    """

    def __init__(
        self,
        denoiser: Callable[..., Tensor],
        inputs: Inputs,
        table: Table,
        network_dtype: torch.dtype,
        dynamic_threshold: float | None,
        routed: Counter[str],
    ) -> None:
        self.denoiser, self.tableau, self.table = denoiser, table.tableau, table
        self.dynamic_threshold, self.routed = dynamic_threshold, routed
        self.batch = inputs.noise.shape[0]
        self.stepper = Stepper(table, inputs.noise, routed)
        self.views, self.noise = self.stepper.views, self.stepper.noise
        self._place_image(inputs.image, inputs.mask)
        self.seeds, self.stage_noise = self._noise_source(inputs.seeds, inputs.stage_noise)
        uncond, rescale = inputs.uncond, inputs.guidance_rescale
        self.guidance = guidance_scale(inputs.guidance_scale, uncond, self.batch, self.noise)
        if not 0 <= rescale <= 1 or (rescale and self.guidance is None):
            raise ValueError(
                f"guidance_rescale must be in [0, 1] and come with guidance_scale; got {rescale}"
            )
        self.guidance_rescale, self.conditioning = rescale, inputs.conditioning
        self.copies = 1
        if self.guidance is not None:
            self.conditioning = doubled_conditioning(inputs.conditioning, uncond or {}, self.batch)
            self.copies = 2
        self.stepper.allocate_input(network_dtype, self.copies)
        # Networks embed times in float32 whatever their own dtype; half precision has too few bits.
        wide = network_dtype == torch.float64
        self.time_dtype = torch.float64 if wide else torch.float32
        self.read_times()

    def tensors(self) -> list[Tensor]:
        """All tensors that its stages read or write."""
        owned = (vars(self), vars(self.stepper))
        return [leaf for leaf in tree_leaves(owned) if isinstance(leaf, Tensor)]

    def read_times(self) -> None:
        """What the network is told at each stage, from the times of the table."""
        times = self.table.times.to(self.time_dtype).expand(-1, self.batch)
        self.times = torch.cat([times] * self.copies, dim=1).unbind(0)

    def evaluate(self, number: int) -> Tensor:
        """The network's raw output F at a stage, [B or 2B, ...], dense like the state."""
        x = self.stepper.network_input
        if x is None:
            x = self.views[self.tableau.stages[number].sees]
        output = self.denoiser(x, self.times[number], **self.conditioning)
        return self._checked(output, x, number)

    def launch(self, number: int, output: Tensor | None) -> None:
        """What follows a stage's evaluation: extras that no row can hold, then the fused step."""
        guidance = None if output is None else self.guidance
        if output is not None and (self.guidance_rescale or self.dynamic_threshold):
            output, guidance = self._adjusted(number, output, guidance)
        seeds = noise = None
        if self.table.stochastic[number]:
            seeds = self.seeds
            noise = self._given_noise() if self.stage_noise is not None else None
        self.stepper.launch(number, output, guidance, seeds, noise)
        if self.mask is not None:
            self._keep_known(number, self.mask)

    def _adjusted(
        self, number: int, output: Tensor, guidance: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The output after the extras that no row can hold; guided where it had to be."""
        quantile = self.dynamic_threshold
        if guidance is not None:
            output, guidance = rescaled_guidance(output, guidance, self.guidance_rescale), None
            self.routed["guidance combined by PyTorch (rescale or dynamic threshold)"] += 1
        if quantile is not None:
            p, q, *_ = row.head(self.stepper.rows[number])
            x = self.views[self.tableau.stages[number].sees]
            bound = self.tableau.clip[1] if self.tableau.clip else 1.0
            output = thresholded(output, x, (p, q), quantile, bound)
            self.routed["dynamic threshold by PyTorch"] += 1
        return output, guidance

    def _keep_known(self, number: int, mask: Tensor) -> None:
        """After a launch: the kept part of the image again, and what the network sees with it."""
        state = self.views[self.tableau.stages[number].writes[0].slot]
        keep_known(state, self.known, self.noise, mask, self.table.rates[number])
        self.stepper.show(number)
        self.routed["kept part of the image blended by PyTorch"] += 1

    def _checked(self, output: Tensor, x: Tensor, number: int) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"denoiser must return a tensor; got {type(output).__name__} (fastdiff.wrap "
                "unpacks what diffusers' networks, tuples and objects with a sample return)"
            )
        if not output.is_floating_point():
            raise TypeError(f"denoiser must return floating-point numbers; got {output.dtype}")
        blend = self.table.blend
        wide = output.ndim == x.ndim > 1 and output.shape[1] == 2 * x.shape[1]
        if blend is not None and wide:
            m0, m1 = (per_sample(m, x) for m in blend[number])
            first, second = output.chunk(2, dim=1)
            output = m0 * first + m1 * second
            self.routed['the two halves of prediction "both" merged by PyTorch'] += 1
        elif wide:
            output = output[:, : x.shape[1]]
        if output.shape != x.shape:
            expected = tuple(x.shape)
            if blend is not None:
                expected = (expected[0], 2 * expected[1], *expected[2:])
            raise ValueError(f"denoiser must return {expected}; got {tuple(output.shape)}")
        if output.device != x.device:
            raise ValueError(f"denoiser must return a tensor on {x.device}; got {output.device}")
        if x.numel() and not same_strides(output, x):
            self.routed["network output copied into the state's memory layout"] += 1
            output = output.contiguous(memory_format=memory_format(x))
        return output

    def _place_image(self, image: Tensor | None, mask: Tensor | None) -> None:
        wanted = self.tableau.from_image or mask is not None
        if wanted != (image is not None):
            raise ValueError(
                "image must be given exactly where the tableau was built with from_image=True "
                "or a mask comes with it"
            )
        self.mask: Tensor | None = None
        if image is None:
            return
        state = self.views[0]
        if image.shape != state.shape or image.device != state.device:
            raise ValueError(
                f"image must be {tuple(state.shape)} on {state.device}; "
                f"got {tuple(image.shape)} on {image.device}"
            )
        if self.tableau.from_image and self.tableau.slots > 1:
            self.views[1].copy_(image)
        if mask is not None:
            try:
                self.mask = mask.to(state).expand_as(state)
            except RuntimeError:
                raise ValueError(
                    f"mask must have shape {tuple(state.shape)} or expand to it; "
                    f"got {tuple(mask.shape)}"
                ) from None
            self.known = image.to(state)

    def _noise_source(
        self, seeds: Tensor | None, stage_noise: Iterable[Tensor] | None
    ) -> tuple[Tensor | None, Any]:
        if not self.tableau.stochastic:
            return None, None
        if stage_noise is not None:
            return None, iter(stage_noise)
        if seeds is None:
            seeds = torch.randint(2**62, (self.batch,)).to(self.noise.device)
        return seeds, None

    def _given_noise(self) -> Tensor:
        noise = next(self.stage_noise, None)
        state = self.views[0]
        if noise is None:
            wanted = sum(s.is_stochastic for s in self.tableau.stages)
            raise ValueError(f"stage_noise must hold {wanted} tensors, one per stochastic stage")
        if noise.shape != state.shape:
            raise ValueError(
                f"stage_noise must be {tuple(state.shape)} each; got {tuple(noise.shape)}"
            )
        return noise.to(state).contiguous(memory_format=memory_format(state))
