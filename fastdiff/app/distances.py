"""How good samples are: distances with intervals, because a distance without one says little.

Everything is computed in float64 from tensors of any dtype; the bootstrap is seeded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

DRAWS = 1000
GROUPS, STUDENT = 20, 2.0930240544  # groups of the jackknife; Student's 97.5 % at 19 degrees

Moments = tuple[Tensor, Tensor]
"""Mean [D] and covariance [D, D] of a set of features, float64."""


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def to_list(self, digits: int = 6) -> list[float]:
        """[value, low, high], rounded, as the committed JSON files hold it."""
        return [round(number, digits) for number in (self.value, self.low, self.high)]


def paired_error(samples: Tensor, reference: Tensor, seed: int = 0) -> Estimate:
    """Root mean square difference of samples from what they should be, image by image.

    samples, reference: [B, ...], row i of both from the same noise. The mean is over images and
    pixels; the interval over images (percentile bootstrap).
    Raises ValueError for different shapes or fewer than two images.
    """
    if samples.shape != reference.shape or len(samples) < 2:
        raise ValueError(
            f"samples and reference must have one shape [B >= 2, ...], "
            f"got {tuple(samples.shape)} and {tuple(reference.shape)}"
        )
    squares = (samples.double() - reference.double()).square().flatten(1).mean(1)
    low, high = _quantiles((_weights(len(squares), seed) @ squares).sqrt())
    return Estimate(float(squares.mean().sqrt()), low, high)


def moments(features: Tensor) -> Moments:
    """Mean and covariance (over N - 1) of features [N, D], N > 1."""
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features must have shape [N >= 2, D], got {tuple(features.shape)}")
    x = features.double()
    return x.mean(0), torch.cov(x.T).view(x.shape[1], x.shape[1])


def frechet_distance(a: Tensor | Moments, b: Tensor | Moments) -> float:
    """Frechet (2-Wasserstein) distance, squared, between normals fitted to two sets of features.

    a, b: [N, D], N > 1, or their moments. |mean_a - mean_b|^2 + tr(A + B - 2 (A^(1/2) B A^(1/2))
    ^(1/2)); Heusel et al. 2017 call this the FID of their features. Biased upwards by about 1/N.
    """
    return float(_frechet(*_as_moments(a), *_as_moments(b)))


def frechet_estimate(samples: Tensor, reference: Tensor | Moments, seed: int = 0) -> Estimate:
    """Frechet distance of samples from a fixed reference set, without its bias, and its interval.

    samples: [N, D], N >= 5,000 for a claim; reference: [M, D] or its moments. Only the samples are
    drawn again: the interval says what another N samples of the same sampler would give against the
    same reference. The bias of N samples is taken off (value and basic bootstrap interval); that of
    the reference is common to everything measured against it.
    """
    mean_r, cov_r = _as_moments(reference)
    x = samples.double()
    x = x - x.mean(0)  # the outer products below stay small
    weights = _weights(len(x), seed)
    means = weights @ x
    outer = (x[:, :, None] * x[:, None, :]).flatten(1)
    covs = (weights @ outer).view(-1, x.shape[1], x.shape[1]) - means[:, :, None] * means[:, None]
    covs = covs * len(x) / (len(x) - 1)
    draws = _frechet(means + samples.double().mean(0), covs, mean_r, cov_r)
    value = frechet_distance(samples, reference)
    low, high = _quantiles(draws)
    return Estimate(2 * value - float(draws.mean()), 2 * value - high, 2 * value - low)


def frechet_jackknife(samples: Tensor, reference: Tensor | Moments, seed: int = 0) -> Estimate:
    """`frechet_estimate` for wide features (Inception's 2,048), where 1,000 draws cost too much.

    The samples are dealt into 20 groups and each is left out in turn (Quenouille 1956, Tukey 1958):
    that gives the bias of order 1/N, which is taken off, and the standard error; the interval is
    Student's. samples: [N, D], N >= 60.
    """
    count = len(samples)
    if count < 3 * GROUPS:
        raise ValueError(f"samples must be at least {3 * GROUPS}, got {count}")
    mean_r, cov_r = _as_moments(reference)
    x = samples.double()
    centre = x.mean(0)
    x = x - centre
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(x.device)
    whole = x.T @ x
    means, covs = [], []
    for chosen in order.tensor_split(GROUPS):
        group, left = x[chosen], count - len(chosen)
        mean = -group.sum(0) / left
        means.append(centre + mean)
        covs.append((whole - group.T @ group - left * torch.outer(mean, mean)) / (left - 1))
    without = _frechet(torch.stack(means), torch.stack(covs), mean_r, cov_r)
    plain = frechet_distance(samples, (mean_r, cov_r))
    value = GROUPS * plain - (GROUPS - 1) * float(without.mean())
    error = float(((GROUPS - 1) * without.var(correction=0)).sqrt())
    return Estimate(value, value - STUDENT * error, value + STUDENT * error)


def nearest_distances(images: Tensor, others: Tensor) -> Tensor:
    """RMS distance of each image to the nearest of others, [N] float64, for images [N, ...]."""
    pixels = images[0].numel()
    distances = torch.cdist(images.double().flatten(1), others.double().flatten(1))
    return distances.amin(1) / pixels**0.5


def memorisation(samples: Tensor, train: Tensor, held_out: Tensor, seed: int = 0) -> Estimate:
    """Chance that a sample lies nearer to the training images than a held-out image does.

    All [N, ...]. A sampler of the data's distribution gives 1/2, one that repeats its training
    images 1. The interval is over both samples and held-out images (percentile bootstrap).
    """
    ours, theirs = nearest_distances(samples, train), nearest_distances(held_out, train)
    nearer = (ours[:, None] < theirs).double() + 0.5 * (ours[:, None] == theirs).double()
    a, b = _weights(len(ours), seed), _weights(len(theirs), seed + 1)
    low, high = _quantiles(((a @ nearer) * b).sum(1))
    return Estimate(float(nearer.mean()), low, high)


def _as_moments(x: Tensor | Moments) -> Moments:
    return moments(x) if isinstance(x, Tensor) else x


def _frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    """Squared distance of normals; the first may be a batch of them."""
    values, vectors = torch.linalg.eigh(cov_b)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_a @ root).clamp(min=0).sqrt().sum(-1)
    trace_a = cov_a.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (mean_a - mean_b).square().sum(-1) + trace_a + cov_b.trace() - 2 * cross


def _weights(count: int, seed: int) -> Tensor:
    """How often each of `count` items is drawn with replacement, over `count`: [DRAWS, count]."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(count, (DRAWS, count), generator=generator)
    ones = torch.full(drawn.shape, 1.0 / count, dtype=torch.float64)
    return torch.zeros(DRAWS, count, dtype=torch.float64).scatter_add_(1, drawn, ones)


def _quantiles(draws: Tensor) -> tuple[float, float]:
    low, high = draws.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)
