"""The adaptive reference against flows known in closed form, and against our own solvers."""

from __future__ import annotations

import pytest
import torch

from fastdiff import NoiseSchedule, Sampler
from fastdiff.execution.reference import probability_flow

pytest.importorskip("scipy")

MEAN, STD = 0.3, 0.5


def network(schedule: NoiseSchedule, kind: str):
    """The exact network for data N(0.3, 0.25)."""

    def predict(x, t):
        t = t.double() / schedule.time_scale
        a, s = (f(t).view(-1, 1, 1, 1) for f in (schedule.alpha, schedule.sigma))
        e = s * (x - MEAN * a) / (STD**2 * a**2 + s**2)
        x0 = (x - s * e) / a
        return {"epsilon": e, "flow": e - x0, "v_prediction": a * e - s * x0}[kind]

    return predict


@pytest.mark.parametrize(
    ("schedule", "kind"),
    [
        (NoiseSchedule.linear_beta(), "epsilon"),
        (NoiseSchedule.linear_beta(), "v_prediction"),
        (NoiseSchedule.edm(), "epsilon"),
    ],
)
def test_exact_flow_of_a_gaussian(schedule: NoiseSchedule, kind: str) -> None:
    noise = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    found, calls = probability_flow(
        network(schedule, kind), schedule, noise, prediction=kind, rtol=1e-8, atol=1e-8
    )
    a, s = schedule.alpha(schedule.first), schedule.sigma(schedule.first)
    x = schedule.prior_scale(schedule.first) * noise
    exact = MEAN + STD * (x - MEAN * a) / (STD**2 * a**2 + s**2) ** 0.5
    # Below the last trained s the prediction is held, s (x - mean) / std^2 -> its value there.
    smallest = schedule.sigma(schedule.last) / schedule.alpha(schedule.last)
    held = smallest**2 / (2 * STD**2) * (exact - MEAN).abs()
    assert ((found - exact).abs() <= 1.01 * held + 1e-6).all()
    assert calls > 6


def test_our_solvers_tend_to_it() -> None:
    schedule = NoiseSchedule.linear_beta()
    noise, predict = torch.randn(2, 1, 4, 4, dtype=torch.float64), network(schedule, "epsilon")
    truth, _ = probability_flow(predict, schedule, noise, rtol=1e-8, atol=1e-8)
    errors = []
    for steps in (100, 400):
        sampler = Sampler(
            predict, schedule, solver="heun", steps=steps, spacing="trailing", dtype=torch.float64
        )
        errors.append((sampler(noise) - truth).abs().max())
    assert errors[1] < errors[0] / 2 and errors[1] < 5e-3


def test_predictions_of_two_halves_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction must be of one tensor"):
        probability_flow(lambda x, t: x, NoiseSchedule.edm(), torch.ones(1, 1), prediction="both")
