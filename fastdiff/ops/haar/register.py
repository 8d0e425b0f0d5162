"""The ops of torch: schemas, fakes, plain implementations and gradients of the Haar functions.

Bands of a pyramid cross an op in one flat buffer (pyramid.py). Split and merge are each other's
adjoint, for every size; the gradient of the loss is an op too, with a gradient of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._register import Gradient, register
from ..common import number_of_stage
from ..layout import channels_innermost
from .pyramid import HaarPyramid, bands, sides, views
from .reference import (
    haar_expand_ref,
    haar_loss_gradient_ref,
    haar_loss_ref,
    haar_merge_ref,
    haar_split_ref,
    haar_step_ref,
)


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _empty_like(x: Tensor, *rest: Any) -> Tensor:
    """Of the first argument's shape; the last one says the layout."""
    return _empty(x, x.shape, rest[-1])


# == Split =========================================================================================


def _empty_pyramid(x: Tensor, levels: int, channels_last: bool) -> Tensor:
    batch, channels, *size = x.shape
    count = sum(3 * math.prod(sides(size, j)) for j in range(1, levels + 1))
    return x.new_empty((batch * channels * (count + math.prod(sides(size, levels))),))


def plain_split(x: Tensor, levels: int, channels_last: bool) -> Tensor:
    flat = _empty_pyramid(x, levels, channels_last)
    to, made = views(flat, x.shape, levels, channels_last), haar_split_ref(x, levels)
    for view, band in zip(bands(to), bands(made), strict=True):
        view.copy_(band)
    return flat


def _keep_split(ctx, inputs, output) -> None:
    x, ctx.levels, ctx.last = inputs
    ctx.shape = x.shape


def _split_gradient(ctx, flat: Tensor):
    details, coarse, *_ = views(flat.contiguous(), ctx.shape, ctx.levels, ctx.last)
    height, width = ctx.shape[2:]
    return merge(details, coarse, height, width, ctx.last), None, None


split = register(
    "haar_split(Tensor x, int levels, bool channels_last) -> Tensor",
    plain_split,
    fake=_empty_pyramid,
    gradient=Gradient(_keep_split, _split_gradient),
)


# == Merge =========================================================================================


def _empty_merged(
    details: Sequence[Tensor], coarse: Tensor, height: int, width: int, channels_last: bool
) -> Tensor:
    return _empty(coarse, (*coarse.shape[:2], height, width), channels_last)


def _plain_merge(
    details: Sequence[Tensor], coarse: Tensor, height: int, width: int, channels_last: bool
) -> Tensor:
    made = haar_merge_ref(HaarPyramid(tuple(details), coarse), (height, width))
    return _empty_merged(details, coarse, height, width, channels_last).copy_(made)


def _keep_merge(ctx, inputs, output) -> None:
    details, _, _, _, ctx.last = inputs
    ctx.levels = len(details)


def _merge_gradient(ctx, image: Tensor):
    flat = split(image, ctx.levels, ctx.last)
    details, coarse, *_ = views(flat, image.shape, ctx.levels, ctx.last)
    return list(details), coarse, None, None, None


merge = register(
    "haar_merge(Tensor[] details, Tensor coarse, SymInt height, SymInt width, bool channels_last) "
    "-> Tensor",
    _plain_merge,
    fake=_empty_merged,
    gradient=Gradient(_keep_merge, _merge_gradient),
)


# == Step and expansion ============================================================================


def _plain_step(
    x: Tensor,
    score: Tensor | None,
    coefficients: Tensor,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    levels: int,
    channels_last: bool,
) -> Tensor:
    made = haar_step_ref(x, score, coefficients, seeds, number_of_stage(stage, stage_number))
    return _empty(x, x.shape, channels_last).copy_(made)


step = register(
    "haar_step(Tensor x, Tensor? score, Tensor coefficients, Tensor? seeds, Tensor? stage, "
    "int stage_number, int levels, bool channels_last) -> Tensor",
    _plain_step,
    fake=_empty_like,
)


def _empty_expanded(coarse: Tensor, *rest: Any) -> Tensor:
    *_, height, width, channels_last = rest
    return _empty(coarse, (*coarse.shape[:2], height, width), channels_last)


def _plain_expand(
    coarse: Tensor,
    coefficients: Tensor,
    seeds: Tensor,
    stage: Tensor | None,
    stage_number: int,
    height: int,
    width: int,
    channels_last: bool,
) -> Tensor:
    number = number_of_stage(stage, stage_number)
    made = haar_expand_ref(coarse, coefficients, seeds, number, (height, width))
    return _empty(coarse, made.shape, channels_last).copy_(made)


expand = register(
    "haar_expand(Tensor coarse, Tensor coefficients, Tensor seeds, Tensor? stage, "
    "int stage_number, SymInt height, SymInt width, bool channels_last) -> Tensor",
    _plain_expand,
    fake=_empty_expanded,
)


# == Loss ==========================================================================================


def _empty_loss(prediction: Tensor, coefficients: Tensor, *_: Any) -> Tensor:
    return coefficients.new_empty((len(prediction),))


def _plain_loss(
    prediction: Tensor,
    coefficients: Tensor,
    seeds: Tensor,
    stage: Tensor | None,
    stage_number: int,
    levels: int,
) -> Tensor:
    return haar_loss_ref(prediction, coefficients, seeds, number_of_stage(stage, stage_number))


def _keep_loss(ctx, inputs, output) -> None:
    *tensors, ctx.number, ctx.levels = inputs
    ctx.save_for_backward(*tensors)


def _loss_gradient(ctx, upstream: Tensor):
    prediction, coefficients, seeds, stage = ctx.saved_tensors
    rest = upstream.contiguous(), ctx.levels, channels_innermost(prediction)
    gradient = loss_gradient(prediction, coefficients, seeds, stage, ctx.number, *rest)
    return gradient, None, None, None, None, None


loss = register(
    "haar_loss(Tensor prediction, Tensor coefficients, Tensor seeds, Tensor? stage, "
    "int stage_number, int levels) -> Tensor",
    _plain_loss,
    fake=_empty_loss,
    gradient=Gradient(_keep_loss, _loss_gradient),
)


# == Gradient of the loss ==========================================================================


def plain_loss_gradient(
    prediction: Tensor,
    coefficients: Tensor,
    seeds: Tensor,
    stage: Tensor | None,
    stage_number: int,
    upstream: Tensor,
    levels: int,
    channels_last: bool,
) -> Tensor:
    number = number_of_stage(stage, stage_number)
    made = haar_loss_gradient_ref(prediction, coefficients, seeds, number, upstream)
    return _empty(prediction, prediction.shape, channels_last).copy_(made)


def _keep_loss_gradient(ctx, inputs, output) -> None:
    prediction, coefficients, seeds, stage, ctx.number, upstream, ctx.levels, ctx.last = inputs
    ctx.save_for_backward(prediction, coefficients, seeds, stage, upstream)


def _loss_curvature(ctx, v: Tensor):
    """The gradient is linear in prediction and upstream: 2 w f (f s + z) upstream in each band."""
    prediction, coefficients, seeds, stage, upstream = ctx.saved_tensors
    weight, factor = coefficients.unbind(2)
    curvature = 2 * weight * factor.square() * upstream[:, None]
    table = torch.stack([curvature, torch.zeros_like(curvature)], 2)
    by_prediction = step(v, None, table, None, None, 0, ctx.levels, ctx.last)
    rest = torch.ones_like(upstream), ctx.levels, ctx.last
    unit = loss_gradient(prediction, coefficients, seeds, stage, ctx.number, *rest)
    by_upstream = (unit.to(upstream.dtype) * v.to(upstream.dtype)).flatten(1).sum(1)
    return by_prediction, None, None, None, None, by_upstream, None, None


loss_gradient = register(
    "haar_loss_gradient(Tensor prediction, Tensor coefficients, Tensor seeds, Tensor? stage, "
    "int stage_number, Tensor upstream, int levels, bool channels_last) -> Tensor",
    plain_loss_gradient,
    fake=_empty_like,
    gradient=Gradient(_keep_loss_gradient, _loss_curvature),
)
