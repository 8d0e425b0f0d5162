"""The ops in plain PyTorch: the definition that the kernels equal."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import product, wide_dtype
from ..constants import EXPANSION_NOISE, PYRAMID_NOISE
from ..layout import per_sample
from ..philox import philox_normal_ref
from .pyramid import HaarPyramid, bands, sides


def haar_split_ref(x: Tensor, levels: int) -> HaarPyramid:
    """`haar_split` in plain PyTorch, in the arithmetic's dtype (float32 or float64)."""
    low, details = x.to(wide_dtype(x)), []
    for _ in range(levels):
        low = torch.nn.functional.pad(low, (0, low.shape[3] % 2, 0, low.shape[2] % 2))
        a, b, c, d = (low[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
        left, right, left_difference, right_difference = a + c, b + d, a - c, b - d
        low = (left + right) * 0.5
        v = (left_difference + right_difference) * 0.5
        h, d = (left - right) * 0.5, (left_difference - right_difference) * 0.5
        details.append(torch.stack([v, h, d], 1))
    return HaarPyramid(tuple(details), low)


def haar_merge_ref(pyramid: HaarPyramid, size: Sequence[int]) -> Tensor:
    """`haar_merge` in plain PyTorch, in the arithmetic's dtype."""
    wide = wide_dtype(pyramid.coarse)
    low = pyramid.coarse.to(wide)
    sizes = [size, *(detail.shape[3:] for detail in pyramid.details)]
    for detail, (height, width) in zip(reversed(pyramid.details), sizes[-2::-1], strict=True):
        v, h, d = detail.to(wide).unbind(1)
        left, right, left_difference, right_difference = low + h, low - h, v + d, v - d
        quads = (
            (left + left_difference) * 0.5,
            (right + right_difference) * 0.5,
            (left - left_difference) * 0.5,
            (right - right_difference) * 0.5,
        )
        batch, channels, rows, columns = low.shape
        low = torch.stack(quads, -1).view(batch, channels, rows, columns, 2, 2)
        low = low.transpose(3, 4).reshape(batch, channels, 2 * rows, 2 * columns)
        low = low[:, :, :height, :width]
    return low


def haar_normal_ref(
    seeds: Tensor,
    shape: Sequence[int],
    levels: int,
    stage: int = 0,
    purpose: int = PYRAMID_NOISE,
) -> HaarPyramid:
    """The noise of the Haar ops for images of that shape [B, C, H, W], float32."""
    batch, channels, *size = shape
    counts = [3 * channels * math.prod(sides(size, j)) for j in range(1, levels + 1)]
    counts.append(channels * math.prod(sides(size, levels)))
    z = philox_normal_ref(seeds, sum(counts), stage, purpose)
    *details, coarse = z.split(counts, 1)
    return HaarPyramid(
        tuple(
            detail.reshape(batch, 3, channels, *sides(size, j))
            for j, detail in enumerate(details, 1)
        ),
        coarse.reshape(batch, channels, *sides(size, levels)),
    )


def haar_step_ref(
    x: Tensor, score: Tensor | None, coefficients: Tensor, seeds: Tensor | None, stage: int
) -> Tensor:
    """`haar_step` in plain PyTorch, in the arithmetic's dtype."""
    levels, wide = coefficients.shape[1] - 1, wide_dtype(x)
    operands = [haar_split_ref(x, levels)]
    columns = [0]
    if score is not None:
        operands.append(haar_split_ref(score.to(wide), levels))
        columns.append(1)
    if seeds is not None:
        operands.append(haar_normal_ref(seeds, x.shape, levels, stage))
        columns.append(coefficients.shape[2] - 1)
    weights = coefficients[:, :, columns]

    def updated(level: int, of_level: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(of_level[0])
        for column, band in enumerate(of_level):
            weight = per_sample(weights[:, level, column], band)
            total = total + product(weight, band.to(wide))
        return total

    details = [updated(j, [o.details[j] for o in operands]) for j in range(levels)]
    coarse = updated(levels, [o.coarse for o in operands])
    return haar_merge_ref(HaarPyramid(tuple(details), coarse), x.shape[2:])


def haar_expand_ref(
    coarse: Tensor, coefficients: Tensor, seeds: Tensor, stage: int, size: Sequence[int]
) -> Tensor:
    """`haar_expand` in plain PyTorch, in the arithmetic's dtype."""
    wide, shape = wide_dtype(coarse), (*coarse.shape[:2], *size)
    alpha, details_sigma, sigma = (
        per_sample(coefficients[:, i, j], coarse) for i, j in ((1, 0), (0, 1), (1, 1))
    )
    zeros = torch.zeros((), dtype=wide, device=coarse.device)
    z = haar_normal_ref(seeds, shape, 1, stage, EXPANSION_NOISE)
    details = zeros + product(details_sigma[:, None], z.details[0].to(wide))
    low = zeros + product(alpha, coarse.to(wide)) + product(sigma, z.coarse.to(wide))
    return haar_merge_ref(HaarPyramid((details,), low), size)


def haar_loss_ref(prediction: Tensor, coefficients: Tensor, seeds: Tensor, stage: int) -> Tensor:
    """`haar_loss` in plain PyTorch; the kernels' sums may differ from it in their order."""
    levels = coefficients.shape[1] - 1
    total = torch.zeros(len(prediction), dtype=torch.float64, device=prediction.device)
    made = bands(haar_split_ref(prediction, levels))
    noise = bands(haar_normal_ref(seeds, prediction.shape, levels, stage))
    for j, (s, z) in enumerate(zip(made, noise, strict=True)):
        weight, factor = coefficients[:, j].unbind(1)
        error = per_sample(factor, s) * s + z.to(s.dtype)
        squares = error.double().square().flatten(1).sum(1)
        total = total + torch.where(weight != 0, weight * squares, 0)
    return total.to(coefficients.dtype)


def haar_loss_gradient_ref(
    prediction: Tensor, coefficients: Tensor, seeds: Tensor, stage: int, upstream: Tensor
) -> Tensor:
    """The gradient of sum(upstream * haar_loss) by prediction, in the arithmetic's dtype."""
    levels, made = coefficients.shape[1] - 1, []
    split = bands(haar_split_ref(prediction, levels))
    noise = bands(haar_normal_ref(seeds, prediction.shape, levels, stage))
    for j, (s, z) in enumerate(zip(split, noise, strict=True)):
        weight, factor = (per_sample(c, s) for c in coefficients[:, j].unbind(1))
        scale = 2 * weight * factor * per_sample(upstream, s)
        made.append(product(scale, factor * s + z.to(s.dtype)))
    return haar_merge_ref(HaarPyramid(tuple(made[:-1]), made[-1]), prediction.shape[2:])
