"""What users expect of a sampler and a tableau cannot hold: three operations done by PyTorch.

Each runs between a network call and the launch after it, or right after a launch; the sampler
counts them in `describe()["routed"]`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rescaled_guidance(output: Tensor, scale: Tensor, rescale: float) -> Tensor:
    """Guided output with part of its excess contrast taken back (Lin et al. 2023, eq. 15-16).

    output: [2B, ...], unconditional half first; scale: [1 or B]; returns [B, ...] in scale's dtype:
    rescale times the guided output at the conditional one's standard deviation, per image, plus
    1 - rescale times the guided output.
    """
    uncond, cond = output.to(scale.dtype).chunk(2)
    guided = uncond + scale.view(-1, *(1 for _ in uncond.shape[1:])) * (cond - uncond)
    over = tuple(range(1, guided.ndim))
    ratio = cond.std(over, keepdim=True) / guided.std(over, keepdim=True)
    return guided * (rescale * ratio + (1 - rescale))


def thresholded(
    output: Tensor, x: Tensor, to_sample: tuple[Tensor, Tensor], quantile: float, bound: float
) -> Tensor:
    """The raw output whose x0 is dynamically thresholded (Saharia et al. 2022, section 2.3).

    output, x: [B, ...]; to_sample: (p, q), each [1 or B], of x0 = p F + q x. Each image's x0 is
    clamped to s, its quantile of |x0|, and divided by s / bound, where s > bound.
    """
    p, q = (c.view(-1, *(1 for _ in x.shape[1:])) for c in to_sample)
    x0 = p * output.to(x.dtype) + q * x
    # torch.quantile takes at most 2^24 numbers, and reads on the host in torch 2.11.
    ordered = x0.flatten(1).abs().sort(dim=1).values
    last = ordered.shape[1] - 1
    below = int(quantile * last)
    above = ordered[:, min(below + 1, last)]
    s = torch.lerp(ordered[:, below], above, quantile * last - below).clamp(min=bound)
    s = s.view(-1, *(1 for _ in x.shape[1:]))
    return (x0.clamp(-s, s) * (bound / s) - q * x) / p


def keep_known(
    state: Tensor, known: Tensor, noise: Tensor, mask: Tensor, rates: tuple[Tensor, Tensor]
) -> None:
    """Put the kept part of an image, noised to a level, back into the state, in place.

    state, known, noise: [B, ...]; mask: broadcastable, 1 where the state stays; rates: (alpha,
    sigma), each [1 or B].
    """
    alpha, sigma = (c.view(-1, *(1 for _ in state.shape[1:])) for c in rates)
    state.copy_(mask * state + (1 - mask) * (alpha * known + sigma * noise))
