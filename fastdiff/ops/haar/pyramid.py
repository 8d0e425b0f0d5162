"""What a Haar pyramid is in memory: its bands, their sides, and views of them in one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


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


def bands(pyramid: HaarPyramid) -> tuple[Tensor, ...]:
    """All of them, level by level, the coarse image last."""
    return (*pyramid.details, pyramid.coarse)


def sides(size: Sequence[int], level: int) -> tuple[int, int]:
    """Sides of a level's bands, rounded up."""
    height, width = (-(-side // (1 << level)) for side in size)
    return height, width


def views(flat: Tensor, shape: Sequence[int], levels: int, channels_last: bool) -> HaarPyramid:
    """The pyramid of images of that shape [B, C, H, W] in a flat buffer, level by level."""
    batch, channels, height, width = shape
    blocks, counts = [], []
    for level in range(1, levels + 2):
        if level <= levels:
            height, width = (height + 1) // 2, (width + 1) // 2
        directions = 3 if level <= levels else 1  # V, H and D, or the coarse image alone
        blocks.append((directions, height, width))
        counts.append(batch * directions * channels * height * width)
    made = []
    parts = flat.split_with_sizes(counts)  # its gradient is one concatenation
    for part, (directions, height, width) in zip(parts, blocks, strict=True):
        if channels_last:
            view = part.view(batch, height, width, directions, channels).permute(0, 3, 4, 1, 2)
        else:
            view = part.view(batch, directions, channels, height, width)
        made.append(view)
    return HaarPyramid(tuple(made[:-1]), made[-1].squeeze(1), (shape[2], shape[3]), flat)
