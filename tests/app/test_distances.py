"""Distances against closed forms, and intervals against their promise."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastdiff.app.distances import (
    frechet_distance,
    frechet_estimate,
    frechet_jackknife,
    memorisation,
    moments,
    nearest_distances,
    paired_error,
)
from tests.helpers import tensors

normal = partial(tensors.normal, dtype=torch.float64)


def with_moments(mean: torch.Tensor, covariance: torch.Tensor, seed: int) -> torch.Tensor:
    """Features whose sample mean and covariance are exactly these."""
    x = normal(500, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def test_frechet_distance_of_normals_in_closed_form() -> None:
    # Commuting covariances: sum of (sqrt a_i - sqrt b_i)^2, in a rotated basis.
    rotation = torch.linalg.qr(normal(4, 4, seed=0)).Q
    a, b = torch.tensor([1.0, 4.0, 9.0, 0.25]).double(), torch.tensor([4.0, 1.0, 9.0, 1.0]).double()
    shift = torch.tensor([1.0, -2.0, 0.0, 0.5]).double()
    x = with_moments(shift, rotation @ a.diag() @ rotation.T, seed=1)
    y = with_moments(torch.zeros(4).double(), rotation @ b.diag() @ rotation.T, seed=2)
    expected = float(shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_of_general_covariances() -> None:
    # Two-dimensional: tr (AB)^(1/2) = sqrt(tr AB + 2 sqrt det AB).
    a = torch.tensor([[2.0, 0.7], [0.7, 1.0]]).double()
    b = torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    zero = torch.zeros(2).double()
    cross = ((a @ b).trace() + 2 * (a.det() * b.det()).sqrt()).sqrt()
    distance = frechet_distance(with_moments(zero, a, 3), with_moments(zero, b, 4))
    assert distance == pytest.approx(float(a.trace() + b.trace() - 2 * cross), rel=1e-10)


def test_frechet_interval_covers_the_truth() -> None:
    """95 % of intervals should hold the distance of the distributions; 120 trials allow 88 %."""
    reference = with_moments(torch.zeros(3).double(), torch.eye(3).double(), seed=5)
    mean, scale = torch.tensor([0.5, 0.0, 0.0]).double(), torch.tensor([1.0, 1.3, 0.8]).double()
    truth = 0.25 + 0.3**2 + 0.2**2
    hits, values = 0, []
    for trial in range(120):
        estimate = frechet_estimate(normal(300, 3, seed=trial) * scale + mean, reference)
        hits += estimate.low <= truth <= estimate.high
        values.append(estimate.value)
    assert 106 <= hits < 120
    mean_value, error = torch.tensor(values).mean(), torch.tensor(values).std() / 120**0.5
    assert abs(mean_value - truth) < 3 * error  # the bias of 300 samples is gone


def test_jackknife_of_wide_features_covers_the_truth() -> None:
    """As above, in 80 dimensions, where the bias is many times the error."""
    size = 80
    reference = torch.zeros(size).double(), torch.eye(size).double()
    scale = torch.linspace(0.8, 1.2, size).double()
    truth = float((1 - scale).square().sum()) + 0.25
    hits, values, plain = 0, [], []
    for trial in range(60):
        samples = normal(1500, size, seed=trial) * scale
        samples[:, 0] += 0.5
        estimate = frechet_jackknife(samples, reference)
        hits += estimate.low <= truth <= estimate.high
        values.append(estimate.value)
        plain.append(frechet_distance(samples, reference))
    error = torch.tensor(values).std()
    assert 50 <= hits
    bias = torch.tensor(plain).mean() - truth
    assert bias > 10 * error
    assert abs(torch.tensor(values).mean() - truth) < 0.05 * bias  # what is left goes like 1 / N^2


def test_jackknife_by_leaving_groups_out() -> None:
    x, reference = normal(205, 4, seed=0) + 3, moments(normal(90, 4, seed=1))
    order = torch.randperm(205, generator=torch.Generator().manual_seed(7))
    left_out = []
    for group in order.tensor_split(20):
        kept = torch.ones(205, dtype=torch.bool)
        kept[group] = False
        left_out.append(frechet_distance(x[kept], reference))
    values = torch.tensor(left_out, dtype=torch.float64)
    value = 20 * frechet_distance(x, reference) - 19 * float(values.mean())
    half = 2.093024 * float((19 / 20 * (values - values.mean()).square().sum()).sqrt())
    estimate = frechet_jackknife(x, reference, seed=7)
    assert estimate.value == pytest.approx(value, rel=1e-9)
    assert (estimate.low, estimate.high) == pytest.approx((value - half, value + half), rel=1e-6)
    with pytest.raises(ValueError, match="at least 60"):
        frechet_jackknife(x[:59], reference)


def test_moments_stand_for_their_features() -> None:
    a, b = normal(50, 3, seed=0), normal(40, 3, seed=1) + 1
    assert frechet_distance(moments(a), moments(b)) == frechet_distance(a, b)
    assert frechet_estimate(a, moments(b)) == frechet_estimate(a, b)
    with pytest.raises(ValueError, match="N >= 2"):
        moments(a[:1])


def test_paired_error_by_hand() -> None:
    reference = torch.zeros(3, 1, 2, 2)
    samples = torch.tensor([1.0, 1.0, 2.0]).view(3, 1, 1, 1).expand(3, 1, 2, 2)
    estimate = paired_error(samples, reference)
    assert estimate.value == pytest.approx(2**0.5)
    assert (estimate.low, estimate.high) == (1.0, 2.0)  # all ones or all twos, both likely enough


def test_paired_interval_covers_the_truth() -> None:
    hits = 0
    for trial in range(150):
        samples = normal(64, 8, seed=trial)
        estimate = paired_error(samples, torch.zeros_like(samples))
        hits += estimate.low <= 1.0 <= estimate.high
    assert 130 <= hits < 150


def test_paired_error_refuses_what_is_not_paired() -> None:
    with pytest.raises(ValueError, match="one shape"):
        paired_error(torch.zeros(3, 2), torch.zeros(4, 2))
    with pytest.raises(ValueError, match="one shape"):
        paired_error(torch.zeros(1, 2), torch.zeros(1, 2))


def test_nearest_distances_by_hand() -> None:
    others = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    images = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    torch.testing.assert_close(
        nearest_distances(images, others), torch.tensor([0.0, 0.5**0.5], dtype=torch.float64)
    )


def test_memorisation_tells_copies_from_fresh_draws() -> None:
    train, held_out, fresh = (normal(n, 6, seed=s) for n, s in ((400, 0), (200, 1), (600, 2)))
    honest = memorisation(fresh, train, held_out)
    assert honest.low < 0.5 < honest.high
    copies = memorisation(train[:300] + 0.01 * normal(300, 6, seed=3), train, held_out)
    assert copies.low > 0.98
