"""Images, tables and bands of the tests of Haar pyramids."""

import math

import torch

from tests.helpers.tensors import normal

SHAPES = [(2, 3, 32, 32), (1, 2, 5, 7), (2, 1, 33, 130), (3, 4, 18, 35), (1, 3, 64, 1100)]


def most(shape):
    return min(5, math.ceil(math.log2(min(shape[2:]))))


def bands(pyramid):
    return [*pyramid.details, pyramid.coarse]


def layouts(x):
    """The same numbers in five memory layouts."""
    batch, channels, height, width = x.shape
    room = torch.full((batch, channels + 1, height + 2, width + 3), torch.nan, dtype=x.dtype)
    inside = room[:, 1:, 1:-1, 2:-1]
    yield "contiguous", x.contiguous()
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "a slice", inside.copy_(x)
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield (
        "every other column",
        torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
    )


def table(batch, levels, columns, dtype, per_sample=False, seed=5):
    return normal(batch if per_sample else 1, levels + 1, columns, seed=seed, dtype=dtype)
