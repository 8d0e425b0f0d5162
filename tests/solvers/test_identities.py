"""Methods under two names, what their steps say of noise, and what the families refuse."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from fastdiff import NoiseSchedule, Tableau, build_tableau
from tests.helpers.oracles import run_rows
from tests.helpers.schedules import LINEAR, SCHEDULES
from tests.helpers.tableaus import NOISE


def same(a: Tableau, b: Tableau) -> None:
    assert len(a.stages) == len(b.stages) and a.times == b.times
    for number in range(len(a.stages)):
        np.testing.assert_array_equal(a.index(number), b.index(number))
        np.testing.assert_allclose(a.row(number), b.row(number), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_one_method_under_two_names(name: str) -> None:
    schedule = SCHEDULES[name]

    def make(solver: str, **options: Any) -> Tableau:
        return build_tableau(solver, schedule, 7, prediction="v_prediction", **options)

    same(make("ddpm"), make("ddim", eta=1.0))
    for eta in (0.0, 0.5, np.array([0.2, 1.0])):
        same(make("euler_ancestral", eta=eta), make("ddim", eta=eta))
    same(make("euler_ancestral"), make("ddpm"))
    same(make("dpmpp_2m_sde", eta=0.0), make("dpmpp_2m"))
    same(make("euler_churn", churn=0.0), make("euler"))
    same(make("heun_churn", churn=0.0), make("heun"))
    same(make("deis", order=1), make("ddim"))
    same(make("ipndm_v", order=1), make("ddim"))
    same(make("ipndm_v_published", order=2), make("ipndm_v", order=2))


def test_dpmpp_2m_sde_noise_fills_what_the_step_forgets() -> None:
    """For data that is one point, x0 is exact and the state's variance must come out as sigma^2."""
    for eta in (0.3, 1.0):
        for schedule in (LINEAR, NoiseSchedule.edm()):
            tableau = build_tableau("dpmpp_2m_sde", schedule, 6, prediction="sample", eta=eta)
            for stage, (t, u) in zip(tableau.stages[1:], pairwise(tableau.times), strict=True):
                kept = stage.writes[0].slots.get(stage.sees, 0.0) * schedule.sigma(t)
                assert kept**2 + stage.writes[0].noise ** 2 == pytest.approx(
                    schedule.sigma(u) ** 2, rel=1e-10
                )


def test_lcm_predicts_and_noises_again() -> None:
    tableau = build_tableau("lcm", LINEAR, 4, prediction="sample")
    for stage, u in zip(tableau.stages[1:], tableau.times[1:], strict=True):
        (w,) = stage.writes
        assert w.slots == {} and w.output == LINEAR.alpha(u) and w.noise == LINEAR.sigma(u)
    assert tableau.stochastic and not tableau.stages[-1].is_stochastic


def test_the_two_starts_of_fon() -> None:
    """The repository evaluates where the true Runge-Kutta start does, but forms its derivatives
    over one training index, the inner ones at the base state."""
    true = build_tableau("fon", LINEAR, 8, spacing="leading")
    published = build_tableau("fon", LINEAR, 8, spacing="leading", warm_up="published")
    assert [s.time for s in true.stages] == [s.time for s in published.stages]
    assert true.nfe == 8 + 9

    # The repository's first step, with its numbers: t = 875, u = 750.
    t, u, f = 875.0, 750.0, lambda x, t: 0.6 * np.tanh(1.4 * x) + 0.1 * np.sin(t / 300)

    def index_difference(e: Any, x: Any) -> Any:
        a, b = LINEAR.alpha(t) ** 2, LINEAR.alpha(t - 1) ** 2
        x0 = (x - math.sqrt(1 - a) * e) / math.sqrt(a)
        return math.sqrt(b) * x0 + math.sqrt(1 - b) * e - x

    x, h, m = NOISE, t - u, (t + u) / 2
    d1 = index_difference(f(x, t), x)
    d2 = index_difference(f(x + h / 2 * d1, m), x)
    d3 = index_difference(f(x + h / 2 * d2, m), x)
    d4 = index_difference(f(x + h * d3, u), x)
    expected = x + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4)
    one = build_tableau("fon", LINEAR, spacing=[t, u], warm_up="published")
    np.testing.assert_allclose(run_rows(one, f, NOISE), expected, rtol=1e-11, atol=1e-12)

    # The true start's derivative is that of the flow: the one of the transfer at no distance.
    of_alpha, of_sigma = LINEAR.rates(t)
    before, after = LINEAR.log_alpha(t), LINEAR.log_alpha(t + 1e-3)
    assert of_alpha == pytest.approx((after - before) / 1e-3, rel=1e-6)
    before, after = LINEAR.log_sigma(t), LINEAR.log_sigma(t + 1e-3)
    assert of_sigma == pytest.approx((after - before) / 1e-3, rel=1e-5)
    (_, stage) = build_tableau("classical_euler", LINEAR, spacing=[t, u]).stages
    assert stage.writes[0].slots[0] == pytest.approx(1 + (u - t) * of_alpha, rel=1e-12)
    slope = LINEAR.sigma(t) * (of_sigma - of_alpha)
    assert stage.writes[0].output == pytest.approx((u - t) * slope, rel=1e-12)


def test_what_the_families_refuse() -> None:
    for solver, options, message in (
        ("ipndm_v", {"order": 5}, "order must be 1, 2, 3 or 4; got 5"),
        ("ipndm_v_published", {"order": 0}, "order must be 1, 2, 3 or 4; got 0"),
        ("deis", {"kind": "tabs"}, "kind must be one of tab, rhoab, logrhoab; got 'tabs'"),
        ("unipc", {"order": 4}, "order must be 1, 2 or 3; got 4"),
        ("unipc", {"variant": "bh3"}, "variant must be bh1 or bh2; got 'bh3'"),
        ("fon", {"warm_up": "other"}, "warm_up must be true or published; got 'other'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_tableau(solver, LINEAR, 4, **options)
    with pytest.raises(ValueError, match="warm_up 'published' is for beta schedules; got edm"):
        build_tableau("fon", NoiseSchedule.edm(), 4, warm_up="published")
    for solver in ("classical_rk4", "fon"):
        with pytest.raises(ValueError, match='no time derivatives in convention "published"'):
            build_tableau(solver, LINEAR, 4, spacing="leading", convention="published")
