"""Small networks, and samplers over one with and without replays of their loops."""

from __future__ import annotations

import torch
from torch import nn

import fastdiff
from fastdiff.capture import Loop, cache_of
from tests.helpers.oracles import GAUSSIAN
from tests.helpers.schedules import LINEAR

# One solver for each kind of loop: what a stage keeps, writes, draws, and how stages take turns.
STRUCTURES = (
    "ddim",  # one slot, one call a step
    "heun",  # two calls a step
    "f_pndm",  # running sums, then a history
    "ipndm",  # a history
    "unipc",  # two writes
    "ddpm",  # noise in every stage
    "heun_churn",  # noise in some stages, before the call
    "predictor_corrector",  # kinds of stages that take turns
)


class Network(nn.Module):
    """Convolutions, a time embedding and a label; counts how often its Python is entered."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.norm, self.time, self.label = nn.GroupNorm(2, 8), nn.Linear(1, 8), nn.Embedding(5, 8)
        self.requires_grad_(False)
        self.entered = 0

    def forward(self, x, t, labels=None):
        self.entered += 1
        h = self.first(x) + self.time((t[:, None] / 1000).to(x.dtype))[:, :, None, None]
        if labels is not None:
            h = h + self.label(labels)[:, :, None, None]
        return self.last(nn.functional.silu(self.norm(h)))


def pair(network=None, schedule=LINEAR, **options):
    """The same sampler with and without replays."""
    network = Network() if network is None else network
    options = {"steps": 4} | options
    return tuple(
        fastdiff.Sampler(network, schedule, capture=capture, **options)
        for capture in ("always", "never")
    )


def loops_of(network):
    """The recorded loops over a network."""
    return [v for v in cache_of(network).loops.values() if isinstance(v, Loop)]


def loops(sampler):
    return loops_of(sampler.denoiser)


def poison(sampler):
    """NaN into everything that the recorded operations made."""
    for loop in loops(sampler):
        for tensor in loop.intermediates():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            else:
                tensor.fill_(1)


# == Functions of a state and its times ============================================================


def affine(x, t):
    """Additions and products only: the same bits wherever a sample stands in its batch."""
    return 0.3 * x + (t.view(-1, *[1] * (x.ndim - 1)) * 1e-4).to(x.dtype)


def gaussian(x, t):
    """The exact epsilon for data of one Gaussian."""
    return GAUSSIAN.epsilon(x, *(f(float(t[0])) for f in (LINEAR.alpha, LINEAR.sigma)))


def conditional(x, t, *, shift, label):
    shape = (-1, *[1] * (x.ndim - 1))
    return torch.sin(x + t.view(shape) / 500 + shift.view(shape)) * (1 + 0.1 * label.view(shape))
