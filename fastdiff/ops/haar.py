"""Haar pyramids: split and merge of all levels in one launch, and steps that never store one.

One level takes each 2 x 2 block a b / c d of each channel to four bands, and back, orthonormally:

    low = (a + b + c + d) / 2    V = (a + b - c - d) / 2    H = (a - b + c - d) / 2
    D = (a - b - c + d) / 2                                 a = (low + V + H + D) / 2,  ...

and goes on with the low band. V is top minus bottom, H left minus right. An odd side is padded by a
zero at its end, at each level, and cut off by the merge: reconstruction is perfect for every size,
and split and merge(size) are each other's adjoint. In "Non-uniform diffusion models" (Batzolis et
al. 2022) a pyramid's bands diffuse at their own rates; `haar_step`, `haar_expand`, `haar_noise` and
`haar_loss` take that in one launch each, without storing a pyramid.

Arithmetic is float32, float64 for float64 images: half-precision images are rounded once, at the
end. Every operation is rounded by itself, in this order:

    left = a + c;  right = b + d;  left' = a - c;  right' = b - d
    low, H = (left +- right) / 2;  V, D = (left' +- right') / 2

Noise is counted through a sample's pyramid in logical order, details finest first ([3, C, h, w]
each), then the coarse image: Philox (ops/philox.py) with purpose 2, that of an expansion with 3.

Backends: C++ for CPU tensors (csrc/cpu), CUDA C++ for CUDA tensors (csrc/cuda) where the extension
was built with them, and plain PyTorch elsewhere. Split, merge and steps agree bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .common import (
    FLOATS,
    forbid_gradient,
    number_of_stage,
    product,
    require_device,
    require_dtype,
    require_seeds,
    require_shape,
    stage_argument,
    wide_dtype,
)
from .philox import philox_normal_ref

MAX_LEVELS = 5
PYRAMID_NOISE, EXPANSION_NOISE = 2, 3  # Philox purposes


class HaarPyramid(NamedTuple):
    """The bands of an image batch [B, C, H, W].

    Attributes:
        details: for each level, finest first, [B, 3, C, h, w] with bands V, H, D; h and w are half
            those of the level before, rounded up.
        coarse: [B, C, h, w] of the last level.
        size: (H, W) of the image, where `haar_split` made them; None: of even sides.
        flat: where `haar_split` made them, the one buffer that all of them are views of, level by
            level.
    """

    details: tuple[Tensor, ...]
    coarse: Tensor
    size: tuple[int, int] | None = None
    flat: Tensor | None = None


def haar_split(x: Tensor, levels: int) -> HaarPyramid:
    """Split images into their Haar pyramid, all levels in one launch.

    x: [B, C, H, W], any float dtype, any strides (none is copied). levels: 0 to 5, at most as many
    as halve the shorter side to one, rounded up.

    Returns bands of x's dtype, each contiguous, or channels_last as [B, 3 C, h, w] where x is.
    Differentiable (the gradient is one merge); while gradients are recorded the bands may not be
    changed in place, being views of one buffer. Raises TypeError or ValueError naming the argument.
    """
    _check_image("x", x)
    _check_levels(levels, x.shape[2:])
    last = _is_channels_last(x)
    flat = torch.ops.fastdiff.haar_split.default(x, levels, last)
    return _views(flat, x.shape, levels, last)


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
    height, width = _check_pyramid(details, coarse, size)
    last = _is_channels_last(details[0][:, 0] if details else coarse)
    return torch.ops.fastdiff.haar_merge.default(details, coarse, height, width, last)


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
    _check_image("x", x)
    forbid_gradient("haar_step", x, score, coefficients)
    columns = 2
    if score is not None:
        columns = 3
        _check_image("score", score)
        require_shape("score", score, tuple(x.shape))
        require_device("score", score, x)
    levels = _check_coefficients(coefficients, x, columns, x.shape[2:])
    if seeds is not None:
        require_seeds(seeds, x)
    return torch.ops.fastdiff.haar_step.default(
        x,
        score,
        coefficients.contiguous(),
        seeds,
        *stage_argument(stage, x),
        levels,
        _is_channels_last(x),
    )


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
    _check_image("coarse", coarse)
    forbid_gradient("haar_expand", coarse, coefficients)
    height, width = _check_size(size, coarse.shape[2:], "coarse")
    _check_coefficients(coefficients, coarse, 2, (height, width), only=1)
    require_seeds(seeds, coarse)
    return torch.ops.fastdiff.haar_expand.default(
        coarse, coefficients.contiguous(), seeds, *stage_argument(stage, coarse), height, width,
        _is_channels_last(coarse),
    )  # fmt: skip


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
    _check_image("prediction", prediction)
    levels = _check_coefficients(coefficients, prediction, 2, prediction.shape[2:])
    require_seeds(seeds, prediction)
    if torch.is_grad_enabled() and coefficients.requires_grad:
        raise ValueError("haar_loss is not differentiable in its coefficients: detach them")
    return torch.ops.fastdiff.haar_loss.default(
        prediction, coefficients.contiguous(), seeds, *stage_argument(stage, prediction), levels
    )


# == References: the definition that the kernels equal =============================================


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
            (left + left_difference) * 0.5, (right + right_difference) * 0.5,
            (left - left_difference) * 0.5, (right - right_difference) * 0.5,
        )  # fmt: skip
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
    counts = [3 * channels * math.prod(_sides(size, j)) for j in range(1, levels + 1)]
    counts.append(channels * math.prod(_sides(size, levels)))
    z = philox_normal_ref(seeds, sum(counts), stage, purpose)
    *details, coarse = z.split(counts, 1)
    return HaarPyramid(
        tuple(
            detail.reshape(batch, 3, channels, *_sides(size, j))
            for j, detail in enumerate(details, 1)
        ),
        coarse.reshape(batch, channels, *_sides(size, levels)),
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

    def updated(level: int, bands: Sequence[Tensor]) -> Tensor:
        total = torch.zeros_like(bands[0])
        for column, band in enumerate(bands):
            weight = weights[:, level, column].view(-1, *(1 for _ in band.shape[1:]))
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
        coefficients[:, i, j].view(-1, 1, 1, 1) for i, j in ((1, 0), (0, 1), (1, 1))
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
    bands = haar_split_ref(prediction, levels)
    noise = haar_normal_ref(seeds, prediction.shape, levels, stage)
    for j, (s, z) in enumerate(zip((*bands.details, bands.coarse), (*noise.details, noise.coarse),
                                   strict=True)):  # fmt: skip
        weight, factor = coefficients[:, j].unbind(1)
        error = factor.view(-1, *(1 for _ in s.shape[1:])) * s + z.to(s.dtype)
        squares = error.double().square().flatten(1).sum(1)
        total = total + torch.where(weight != 0, weight * squares, 0)
    return total.to(coefficients.dtype)


# == Checks ========================================================================================


def _check_image(name: str, x: Tensor) -> None:
    require_dtype(name, x, *FLOATS)
    if x.ndim != 4:
        raise ValueError(f"{name} must be [B, C, H, W], got shape {tuple(x.shape)}")


def _check_levels(levels: int, size: Sequence[int]) -> None:
    if not isinstance(levels, int) or not 0 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels must be 0 to {MAX_LEVELS}, got {levels!r}")
    shorter = min(size)
    if levels and shorter <= 1 << (levels - 1):
        most = max(0, int(shorter) - 1).bit_length()
        raise ValueError(
            f"levels must be at most {most}, which halve the shorter side of {tuple(size)} to one, "
            f"got {levels}"
        )


def _check_pyramid(
    details: Sequence[Tensor], coarse: Tensor, size: Sequence[int] | None
) -> tuple[int, int]:
    """The size of its images."""
    _check_image("coarse", coarse)
    if len(details) > MAX_LEVELS:
        raise ValueError(f"details must be at most {MAX_LEVELS} levels, got {len(details)}")
    batch, channels, height, width = coarse.shape
    for j in reversed(range(len(details))):
        detail = details[j]
        require_dtype(f"details[{j}]", detail, coarse.dtype)
        require_device(f"details[{j}]", detail, coarse)
        shape = tuple(detail.shape)
        inner = j < len(details) - 1  # it may be one short of twice the level before
        sides = ((2 * height, 2 * height - 1), (2 * width, 2 * width - 1))
        heights, widths = sides if inner else ((height,), (width,))
        fits = shape[:3] == (batch, 3, channels) and len(shape) == 5
        if not (fits and shape[3] in heights and shape[4] in widths):
            wanted = ((batch, 3, channels, h, w) for h in heights for w in widths)
            require_shape(f"details[{j}]", detail, *wanted)
        height, width = shape[3:]
    if not details:
        if size is not None and tuple(size) != tuple(coarse.shape[2:]):
            raise ValueError(f"size must be {tuple(coarse.shape[2:])} without details, got {size}")
        return height, width
    return _check_size(size, (height, width), "the finest details")


def _check_size(size: Sequence[int] | None, half: Sequence[int], of: str) -> tuple[int, int]:
    full = (2 * half[0], 2 * half[1])
    if size is None:
        return full
    if len(size) != 2 or any(
        not max(s - 1, 0) <= got <= s for s, got in zip(full, size, strict=True)
    ):
        raise ValueError(
            f"size must be {full}, twice that of {of}, or one less in a side, got {tuple(size)}"
        )
    return size[0], size[1]


def _check_coefficients(
    coefficients: Tensor, x: Tensor, columns: int, size: Sequence[int], only: int | None = None
) -> int:
    """The number of levels they are for."""
    require_dtype("coefficients", coefficients, wide_dtype(x))
    require_device("coefficients", coefficients, x)
    shape = tuple(coefficients.shape)
    rows = "levels + 1" if only is None else str(only + 1)
    if (
        len(shape) != 3 or shape[0] not in (1, len(x)) or shape[2] != columns or shape[1] < 1
        or (only is not None and shape[1] != only + 1)
    ):  # fmt: skip
        raise ValueError(f"coefficients must have the shape (1 or {len(x)}, {rows}, {columns}), "
                         f"got {shape}")  # fmt: skip
    if only is None:
        _check_levels(shape[1] - 1, size)
    return shape[1] - 1


def _is_channels_last(x: Tensor) -> bool:
    """Whether channels, more than one, lie side by side in memory."""
    return x.shape[1] > 1 and x.stride(1) == 1 and x.stride(3) != 1


def _sides(size: Sequence[int], level: int) -> tuple[int, int]:
    """Sides of a level's bands, rounded up."""
    height, width = (-(-side // (1 << level)) for side in size)
    return height, width


def _views(flat: Tensor, shape: Sequence[int], levels: int, channels_last: bool) -> HaarPyramid:
    """The bands in a flat buffer."""
    batch, channels, height, width = shape
    sides, counts = [], []
    for level in range(1, levels + 2):
        if level <= levels:
            height, width = (height + 1) // 2, (width + 1) // 2
        bands = 3 if level <= levels else 1
        sides.append((bands, height, width))
        counts.append(batch * bands * channels * height * width)
    views = []
    parts = flat.split_with_sizes(counts)  # whose gradient is one concatenation
    for part, (bands, height, width) in zip(parts, sides, strict=True):
        if channels_last:
            view = part.view(batch, height, width, bands, channels).permute(0, 3, 4, 1, 2)
        else:
            view = part.view(batch, bands, channels, height, width)
        views.append(view)
    return HaarPyramid(tuple(views[:-1]), views[-1].squeeze(1), (shape[2], shape[3]), flat)


# == Registration ==================================================================================

_library = torch.library.Library("fastdiff", "FRAGMENT")
_library.define("haar_split(Tensor x, int levels, bool channels_last) -> Tensor")
_library.define(
    "haar_merge(Tensor[] details, Tensor coarse, SymInt height, SymInt width, bool channels_last) "
    "-> Tensor"
)
_library.define(
    "haar_step(Tensor x, Tensor? score, Tensor coefficients, Tensor? seeds, Tensor? stage, "
    "int stage_number, int levels, bool channels_last) -> Tensor"
)
_library.define(
    "haar_expand(Tensor coarse, Tensor coefficients, Tensor seeds, Tensor? stage, "
    "int stage_number, SymInt height, SymInt width, bool channels_last) -> Tensor"
)
_library.define(
    "haar_loss(Tensor prediction, Tensor coefficients, Tensor seeds, Tensor? stage, "
    "int stage_number, int levels) -> Tensor"
)
_library.define(
    "haar_loss_gradient(Tensor prediction, Tensor coefficients, Tensor seeds, Tensor? stage, "
    "int stage_number, Tensor upstream, int levels, bool channels_last) -> Tensor"
)


def _empty(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _fake_split(x: Tensor, levels: int, channels_last: bool) -> Tensor:
    batch, channels, *size = x.shape
    count = sum(3 * math.prod(_sides(size, j)) for j in range(1, levels + 1))
    return x.new_empty((batch * channels * (count + math.prod(_sides(size, levels))),))


def _fake_merge(
    details: Sequence[Tensor], coarse: Tensor, height: int, width: int, channels_last: bool
) -> Tensor:
    return _empty(coarse, (*coarse.shape[:2], height, width), channels_last)


def _fake_same(x: Tensor, *rest: Any) -> Tensor:
    """Of the first argument's shape; the last one says the layout."""
    return _empty(x, x.shape, rest[-1])


def _fake_expand(coarse: Tensor, *rest: Any) -> Tensor:
    *_, height, width, channels_last = rest
    return _empty(coarse, (*coarse.shape[:2], height, width), channels_last)


def _fake_loss(prediction: Tensor, coefficients: Tensor, *_: Any) -> Tensor:
    return coefficients.new_empty((len(prediction),))


# The same in plain PyTorch, where no other backend is there.


def _plain_split(x: Tensor, levels: int, channels_last: bool) -> Tensor:
    flat = _fake_split(x, levels, channels_last)
    views, made = _views(flat, x.shape, levels, channels_last), haar_split_ref(x, levels)
    for view, band in zip(
        (*views.details, views.coarse), (*made.details, made.coarse), strict=True
    ):
        view.copy_(band)
    return flat


def _plain_merge(
    details: Sequence[Tensor], coarse: Tensor, height: int, width: int, channels_last: bool
) -> Tensor:
    made = haar_merge_ref(HaarPyramid(tuple(details), coarse), (height, width))
    return _fake_merge(details, coarse, height, width, channels_last).copy_(made)


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
    made = haar_expand_ref(
        coarse, coefficients, seeds, number_of_stage(stage, stage_number), (height, width)
    )
    return _empty(coarse, made.shape, channels_last).copy_(made)


def _plain_loss(
    prediction: Tensor,
    coefficients: Tensor,
    seeds: Tensor,
    stage: Tensor | None,
    stage_number: int,
    levels: int,
) -> Tensor:
    return haar_loss_ref(prediction, coefficients, seeds, number_of_stage(stage, stage_number))


def _plain_loss_gradient(
    prediction: Tensor,
    coefficients: Tensor,
    seeds: Tensor,
    stage: Tensor | None,
    stage_number: int,
    upstream: Tensor,
    levels: int,
    channels_last: bool,
) -> Tensor:
    bands = haar_split_ref(prediction, levels)
    noise = haar_normal_ref(seeds, prediction.shape, levels, number_of_stage(stage, stage_number))
    made = []
    for j, (s, z) in enumerate(zip((*bands.details, bands.coarse), (*noise.details, noise.coarse),
                                   strict=True)):  # fmt: skip
        broadcast = (-1, *(1 for _ in s.shape[1:]))
        weight, factor = (c.view(broadcast) for c in coefficients[:, j].unbind(1))
        scale = 2 * weight * factor * upstream.view(broadcast)
        made.append(product(scale, factor * s + z.to(s.dtype)))
    gradient = haar_merge_ref(HaarPyramid(tuple(made[:-1]), made[-1]), prediction.shape[2:])
    return _empty(prediction, prediction.shape, channels_last).copy_(gradient)


for _name, _fake, _plain in (
    ("haar_split", _fake_split, _plain_split),
    ("haar_merge", _fake_merge, _plain_merge),
    ("haar_step", _fake_same, _plain_step),
    ("haar_expand", _fake_expand, _plain_expand),
    ("haar_loss", _fake_loss, _plain_loss),
    ("haar_loss_gradient", _fake_same, _plain_loss_gradient),
):
    torch.library.register_fake(f"fastdiff::{_name}", _fake, lib=_library)
    _library.impl(_name, _plain, "CompositeExplicitAutograd")  # the extension's come before it


# Gradients: split and merge are each other's adjoint, for every size.


def _keep_split(ctx, inputs, output) -> None:
    x, ctx.levels, ctx.last = inputs
    ctx.shape = x.shape


def _split_gradient(ctx, flat: Tensor):
    details, coarse, *_ = _views(flat.contiguous(), ctx.shape, ctx.levels, ctx.last)
    height, width = ctx.shape[2:]
    image = torch.ops.fastdiff.haar_merge.default(details, coarse, height, width, ctx.last)
    return image, None, None


def _keep_merge(ctx, inputs, output) -> None:
    details, _, _, _, ctx.last = inputs
    ctx.levels = len(details)


def _merge_gradient(ctx, image: Tensor):
    flat = torch.ops.fastdiff.haar_split.default(image, ctx.levels, ctx.last)
    details, coarse, *_ = _views(flat, image.shape, ctx.levels, ctx.last)
    return list(details), coarse, None, None, None


def _keep_loss(ctx, inputs, output) -> None:
    *tensors, ctx.number, ctx.levels = inputs
    ctx.save_for_backward(*tensors)


def _loss_gradient(ctx, upstream: Tensor):
    prediction, coefficients, seeds, stage = ctx.saved_tensors
    gradient = torch.ops.fastdiff.haar_loss_gradient.default(
        prediction, coefficients, seeds, stage, ctx.number, upstream.contiguous(), ctx.levels,
        _is_channels_last(prediction),
    )  # fmt: skip
    return gradient, None, None, None, None, None


def _keep_loss_gradient(ctx, inputs, output) -> None:
    prediction, coefficients, seeds, stage, ctx.number, upstream, ctx.levels, ctx.last = inputs
    ctx.save_for_backward(prediction, coefficients, seeds, stage, upstream)


def _loss_curvature(ctx, v: Tensor):
    """The gradient is linear in prediction and upstream: 2 w f (f s + z) upstream in each band."""
    prediction, coefficients, seeds, stage, upstream = ctx.saved_tensors
    weight, factor = coefficients.unbind(2)
    curvature = 2 * weight * factor.square() * upstream[:, None]
    table = torch.stack([curvature, torch.zeros_like(curvature)], 2)
    by_prediction = torch.ops.fastdiff.haar_step.default(
        v, None, table, None, None, 0, ctx.levels, ctx.last
    )
    unit = torch.ops.fastdiff.haar_loss_gradient.default(
        prediction, coefficients, seeds, stage, ctx.number, torch.ones_like(upstream), ctx.levels,
        ctx.last,
    )  # fmt: skip
    by_upstream = (unit.to(upstream.dtype) * v.to(upstream.dtype)).flatten(1).sum(1)
    return by_prediction, None, None, None, None, by_upstream, None, None


torch.library.register_autograd(
    "fastdiff::haar_split", _split_gradient, setup_context=_keep_split, lib=_library
)
torch.library.register_autograd(
    "fastdiff::haar_merge", _merge_gradient, setup_context=_keep_merge, lib=_library
)
torch.library.register_autograd(
    "fastdiff::haar_loss", _loss_gradient, setup_context=_keep_loss, lib=_library
)
torch.library.register_autograd(
    "fastdiff::haar_loss_gradient",
    _loss_curvature,
    setup_context=_keep_loss_gradient,
    lib=_library,
)
