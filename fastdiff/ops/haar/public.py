"""The public functions: each checks its arguments and calls one op of register.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common import (
    forbid_gradient,
    require_device,
    require_dtype,
    require_seeds,
    require_shape,
    stage_argument,
)
from ..layout import channels_innermost
from .checks import check_coefficients, check_image, check_levels, check_pyramid, check_size
from .pyramid import HaarPyramid, views
from .register import expand, loss, merge, split, step


def haar_split(x: Tensor, levels: int) -> HaarPyramid:
    """Split images into their Haar pyramid, all levels in one launch.

    x: [B, C, H, W], any float dtype, any strides (none is copied). levels: 0 to 5, at most as many
    as halve the shorter side to one, rounded up.

    Returns bands of x's dtype, each contiguous, or channels_last as [B, 3 C, h, w] where x is.
    Differentiable (the gradient is one merge); while gradients are recorded the bands may not be
    changed in place, being views of one buffer. Raises TypeError or ValueError naming the argument.
    """
    check_image("x", x)
    check_levels(levels, x.shape[2:])
    last = channels_innermost(x)
    flat = split(x, levels, last)
    return views(flat, x.shape, levels, last)


def haar_merge(pyramid: HaarPyramid | Sequence, size: Sequence[int] | None = None) -> Tensor:
    """The images of a pyramid: the inverse of `haar_split`, all levels in one launch.

    pyramid: details and coarse as `HaarPyramid` explains them, of one float dtype, any strides.
    size: (H, W) of the images, each side twice that of the finest details or one less; by default
    the pyramid's own, and where it has none twice.

    Returns [B, C, H, W] in the pyramid's dtype, channels_last where the finest details are (without
    any, the coarse image). Differentiable (the gradient is one split). Raises TypeError or
    ValueError naming the argument.
    """
    details, coarse = tuple(pyramid[0]), pyramid[1]
    if size is None and isinstance(pyramid, HaarPyramid):
        size = pyramid.size
    height, width = check_pyramid(details, coarse, size)
    last = channels_innermost(details[0][:, 0] if details else coarse)
    return merge(details, coarse, height, width, last)


def haar_step(
    x: Tensor,
    score: Tensor | None,
    coefficients: Tensor,
    seeds: Tensor | None = None,
    stage: int | Tensor = 0,
) -> Tensor:
    """One multi-scale solver step: split, update each band, merge, in one launch.

    With bands b of x, s of score and fresh noise z, level by level:

        b <- c_x b + c_s s + c_z z

    Reads x and score and writes the result, three passes; the pyramid is never stored. A zero
    coefficient means that the operand does not count, NaN included.

    x, score: [B, C, H, W], any float dtypes and strides; score may be None (two passes).
    coefficients: [1 or B, levels + 1, 3]: c_x, c_s, c_z for each level, finest first, and for the
        coarse image; float32, or float64 where x is. Without score [1 or B, levels + 1, 2].
    seeds: [B] int64, one an image; None: no noise.
    stage: which draw it is: another one at each step. A number, or int32 [1] on the device (so that
        a captured loop can be told another).

    Returns x's dtype and layout (contiguous or channels_last). Not differentiable. Raises TypeError
    or ValueError naming the argument.
    """
    check_image("x", x)
    forbid_gradient("haar_step", x, score, coefficients)
    columns = 2
    if score is not None:
        columns = 3
        check_image("score", score)
        require_shape("score", score, tuple(x.shape))
        require_device("score", score, x)
    levels = check_coefficients(coefficients, x, columns, x.shape[2:])
    if seeds is not None:
        require_seeds(seeds, x)
    told, number = stage_argument(stage, x)
    row = coefficients.contiguous()
    return step(x, score, row, seeds, told, number, levels, channels_innermost(x))


def haar_noise(x: Tensor, coefficients: Tensor, seeds: Tensor, stage: int | Tensor = 0) -> Tensor:
    """Noisy images with a noise level of their own in each band: alpha b + sigma z, in one launch.

    x: [B, C, H, W] clean images. coefficients: [1 or B, levels + 1, 2]: alpha and sigma for each
    level, finest first, and for the coarse image. Else as `haar_step`, whose noise it is; two
    passes. `haar_loss` with the same seeds and stage knows the noise again.
    """
    require_dtype("seeds", seeds, torch.int64)
    return haar_step(x, None, coefficients, seeds, stage)


def haar_expand(
    coarse: Tensor,
    coefficients: Tensor,
    seeds: Tensor,
    stage: int | Tensor = 0,
    size: Sequence[int] | None = None,
) -> Tensor:
    """The change to the next finer scale: the coarse image with fresh details, in one launch.

    Details are sigma z; the low band is alpha coarse + sigma z.

    coarse: [B, C, h, w], any float dtype and strides. coefficients: [1 or B, 2, 2]: alpha (which
    counts for the low band alone) and sigma of the details, then of the low band; float32, or
    float64 where coarse is. seeds, stage: as `haar_step`. size: (H, W) of the result, (2 h, 2 w)
    by default, and each side may be one less.

    Returns [B, C, H, W] in coarse's dtype and layout. Not differentiable. Raises TypeError or
    ValueError naming the argument.
    """
    check_image("coarse", coarse)
    forbid_gradient("haar_expand", coarse, coefficients)
    height, width = check_size(size, coarse.shape[2:], "coarse")
    check_coefficients(coefficients, coarse, 2, (height, width), only=1)
    require_seeds(seeds, coarse)
    told, number = stage_argument(stage, coarse)
    row, last = coefficients.contiguous(), channels_innermost(coarse)
    return expand(coarse, row, seeds, told, number, height, width, last)


def haar_loss(
    prediction: Tensor, coefficients: Tensor, seeds: Tensor, stage: int | Tensor = 0
) -> Tensor:
    """A weighted loss on every band against the noise that `haar_noise` drew.

    With bands s of the prediction and that noise z, for each image the sum over levels and
    coefficients of

        weight * (factor * s + z)^2

    so factor = -1 trains a noise prediction, factor = sigma a score. Nothing but the prediction is
    read; its gradient is one more pass that draws the noise again.

    prediction: [B, C, H, W], any float dtype and strides. coefficients: [1 or B, levels + 1, 2]:
    weight and factor; float32, or float64 where prediction is. seeds, stage: as they were given to
    `haar_noise`.

    Returns [B] in the coefficients' dtype. Differentiable with respect to prediction. Raises
    TypeError or ValueError naming the argument.
    """
    check_image("prediction", prediction)
    levels = check_coefficients(coefficients, prediction, 2, prediction.shape[2:])
    require_seeds(seeds, prediction)
    if torch.is_grad_enabled() and coefficients.requires_grad:
        raise ValueError("haar_loss is not differentiable in its coefficients: detach them")
    told, number = stage_argument(stage, prediction)
    return loss(prediction, coefficients.contiguous(), seeds, told, number, levels)
