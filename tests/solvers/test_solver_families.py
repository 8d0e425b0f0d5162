"""The solver families: weights against exact integrals, identities, orders, options."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff import (
    PREDICTIONS,
    NoiseSchedule,
    Sampler,
    Tableau,
    build_tableau,
    solver_names,
)
from fastdiff.solvers import adams, pndm, published, unipc
from fastdiff.solvers.lagrange import lagrange_means
from fastdiff.solvers.registry import get_solver
from fastdiff.tableau import Trace
from tests.helpers import orders
from tests.helpers.oracles import as_denoiser, run_rows
from tests.tableau.test_tableau import NOISE, SCHEDULES, STAGE_NOISE, check

LINEAR = NoiseSchedule.linear_beta()
VE = NoiseSchedule.ve(0.01, 50.0)  # time is sigma / alpha

# == Weights =======================================================================================


def exact_means(nodes: list[str], end: str) -> list[float]:
    """Means of the Lagrange polynomials over [first node, end], in rational arithmetic."""
    s, b = [Fraction(n) for n in nodes], Fraction(end)
    means = []
    for j, node in enumerate(s):
        polynomial = [Fraction(1)]  # ascending powers
        for other in s[:j] + s[j + 1 :]:
            factor = (-other / (node - other), 1 / (node - other))
            product = [Fraction(0)] * (len(polynomial) + 1)
            for power, c in enumerate(polynomial):
                product[power] += c * factor[0]
                product[power + 1] += c * factor[1]
            polynomial = product
        powers = ((b ** (k + 1) - s[0] ** (k + 1)) / (k + 1) for k in range(len(s)))
        integral = sum(c * power for c, power in zip(polynomial, powers, strict=True))
        means.append(float(integral / (b - s[0])))
    return means


GRIDS = [
    (["5.2", "7", "10", "14"], "4.1"),
    (["0.5", "2", "9", "80"], "0.002"),
    (["1", "2", "3", "4"], "0"),
]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("nodes", "end"), GRIDS)
def test_lagrange_means_are_exact_integrals(nodes: list[str], end: str, order: int) -> None:
    nodes = nodes[:order]
    found = lagrange_means([float(n) for n in nodes], float(nodes[0]), float(end))
    np.testing.assert_allclose(found, exact_means(nodes, end), rtol=1e-12)
    assert sum(found) == pytest.approx(1, abs=1e-13)


def weights(function: adams.Weights, schedule: NoiseSchedule, times: list[float], u: float) -> Any:
    run = Trace(schedule, [*reversed(times), u], solves_for="epsilon", prediction=None)
    return np.array(function(run, times, times[0], u))


def printed_weights(s: list[float], end: float) -> list[float]:
    """The closed forms of variable-step Adams-Bashforth, newest first, from the step sizes."""
    h, (h1, h2, h3) = end - s[0], [a - b for a, b in zip(s, s[1:], strict=False)]
    first = 0.5 * (1 - h / (3 * (h + h1)))
    T1 = first * h * (h + h1) / (h1 * (h1 + h2))
    T2 = (first - (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))) * (
        h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
    )
    q = h1 * (h1 + h2) / (h2 * (h2 + h3))
    return [
        1 + h / (2 * h1) + T1 + T2,
        -h / (2 * h1) - (1 + h1 / h2) * T1 - (1 + h1 / h2 + q) * T2,
        (h1 / h2) * T1 + (h1 / h2 + q * (1 + h2 / h3)) * T2,
        -q * (h2 / h3) * T2,
    ]


@pytest.mark.parametrize("s", [[5.2, 7.0, 10.0, 14.0], [0.47, 2.5, 9.7, 30.2]])
def test_ipndm_v_has_the_weights_of_variable_steps(s: list[float]) -> None:
    found = weights(adams.in_sigma, VE, s, 0.5 * s[0])
    np.testing.assert_allclose(found, printed_weights(s, 0.5 * s[0]), rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_v_in_equal_steps_is_adams_bashforth(order: int) -> None:
    times = [2.0 + k for k in range(order)]
    found = weights(adams.in_sigma, VE, times, 1.0)
    np.testing.assert_allclose(found, pndm.ADAMS_BASHFORTH[order - 1], rtol=1e-12)
    grid = {"spacing": np.linspace(9.0, 1.0, 9)}
    whole, uniform = build_tableau("ipndm_v", VE, **grid), build_tableau("ipndm", VE, **grid)
    for number in range(len(whole.stages)):
        np.testing.assert_allclose(whole.row(number), uniform.row(number), rtol=1e-10, atol=1e-13)


def test_published_weights_have_their_slips() -> None:
    """Numbers found by running the published code; the exact ones beside them."""
    grid = [4.1, 5.2, 7.0, 10.0]
    three = weights(published._published, VE, grid[:3], 3.3)
    np.testing.assert_allclose(three, [1.830, -1.115, 0.285], atol=5e-4)
    exact = weights(adams.in_sigma, VE, grid[:3], 3.3)
    np.testing.assert_allclose(exact, [1.568, -0.694, 0.125], atol=1e-3)
    uniform = weights(published._published, VE, [4.0, 5.0, 6.0, 7.0], 3.0)
    np.testing.assert_allclose(uniform, [2.375, -2.708, 1.792, -0.458], atol=5e-4)
    # EDM's seven-point grid, i = 2 and 3; there the weights do not even sum to one.
    edm = [80.0, 30.1833, 9.7232, 2.5152, 0.46998]
    np.testing.assert_allclose(
        weights(published._published, VE, [9.7232, 30.1833, 49.0], 2.5152).sum(), 1, atol=1e-12
    )
    schedule = NoiseSchedule.edm()
    third = weights(published._published, schedule, edm[2::-1], edm[3])
    np.testing.assert_allclose(third, [1.670, -0.873, 0.203], atol=5e-4)
    np.testing.assert_allclose(
        weights(adams.in_sigma, schedule, edm[2::-1], edm[3]), [1.239, -0.265, 0.026], atol=1e-3
    )
    fourth = weights(published._published, schedule, edm[3::-1], edm[4])
    assert fourth.sum() == pytest.approx(1.00014, abs=5e-6)
    for order in (1, 2):  # where it has none
        found = weights(published._published, VE, grid[:order], 3.3)
        np.testing.assert_allclose(found, weights(adams.in_sigma, VE, grid[:order], 3.3))


@pytest.mark.parametrize("kind", ["tab", "rhoab", "logrhoab"])
@pytest.mark.parametrize("name", ["linear", "logsnr_cosine", "flow", "edm"])
def test_deis_weights_are_integrals(kind: str, name: str) -> None:
    """Against mpmath's adaptive quadrature in 30 digits, written in the other variable."""
    schedule = SCHEDULES[name]
    times = [schedule.last + f * (schedule.first - schedule.last) for f in (0.4, 0.55, 0.8)]
    u = schedule.last + 0.3 * (schedule.first - schedule.last)
    if name == "linear":
        times, u = [np.round(t) for t in times], np.round(u)
    ratio = lambda t: float(schedule.sigma(t) / schedule.alpha(t))
    begin, end = ratio(times[0]), ratio(u)
    position = {
        "rhoab": lambda s: s,
        "logrhoab": mpmath.log,
        "tab": lambda s: mpmath.mpf(schedule.time(-2 * math.log(s))),
    }[kind]
    nodes = [times[k] if kind == "tab" else position(mpmath.mpf(ratio(times[k]))) for k in range(3)]
    found = weights(adams._KINDS[kind], schedule, times, u)
    assert found.sum() == pytest.approx(1, abs=1e-12)
    # Beta schedules are interpolated, so their integrand has a kink at every whole time.
    kinks = [ratio(t) for t in np.arange(times[0], u - 1, -1)] if name == "linear" else [begin, end]
    for j in range(3):

        def polynomial(s: Any, j: int = j) -> Any:
            where, others = position(s), [n for k, n in enumerate(nodes) if k != j]
            return mpmath.fprod((where - n) / (nodes[j] - n) for n in others)

        integral = mpmath.quad(polynomial, kinks, maxdegree=3 if len(kinks) > 2 else 8)
        expected = float(integral / (end - begin))
        assert found[j] == pytest.approx(expected, rel=1e-9 if kind != "tab" else 2e-6)


def test_deis_rhoab_is_ipndm_v() -> None:
    for order in (1, 2, 3, 4):
        a = build_tableau("deis", LINEAR, 9, order=order, kind="rhoab")
        assert a.stages == build_tableau("ipndm_v", LINEAR, 9, order=order).stages


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_unipc_weights_solve_the_order_conditions(count: int, variant: str) -> None:
    """The integral of e^(s - h) s^k over [0, h] for every power, from 30-digit quadrature."""
    h, positions = 0.7, [-1.3, -0.6, 1.0][-count:]
    found = unipc._weights(positions, h, variant)
    if count == 1:  # section 3.4: one half of B(h), where the condition would give phi_2
        expected = {"bh1": -h, "bh2": math.expm1(-h)}[variant] / 2
        assert found == [pytest.approx(expected, rel=1e-15)]
        return
    for k in range(1, count + 1):
        # x_u = ... + alpha integral of e^(s - h) x0(s) ds, with x0(s) = (s / h)^k.
        integral = mpmath.quad(lambda s, k=k: mpmath.exp(s - h) * (s / h) ** k, [0, h])
        total = sum(a * r ** (k - 1) for a, r in zip(found, positions, strict=True))
        assert -total == pytest.approx(float(integral), rel=1e-10)
    assert unipc._weights(positions, h, "bh1") == unipc._weights(positions, h, "bh2")


# == Identities ====================================================================================


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


# == Orders ========================================================================================

# docs/orders.md has the tables and the reasons.
BENT = ("ipndm", "ipndm_v", "ipndm_v_published", "deis")  # on their way to their orders


def test_orders_as_shipped() -> None:
    """The last halving of those that settle early, on the mild problem."""
    for solver in orders.deterministic_solvers():
        if solver not in BENT:
            (slope,) = orders.slopes(orders.errors(solver, orders.MILD, (80, 160)))
            assert slope == pytest.approx(get_solver(solver).order, abs=0.3), solver


@pytest.mark.parametrize("case", orders.EXACT_STARTS, ids=lambda c: orders.label(*c[:2]))
def test_orders_after_an_exact_start(case: Any) -> None:
    solver, options, exact, order = case
    errors = orders.errors_after_exact_start(solver, orders.STIFF, exact, (80, 160), **options)
    (slope,) = orders.slopes(errors)
    if solver == "dpmpp_3m":  # its third-order part still hides the second
        assert 2 < slope < 3
    else:
        assert slope == pytest.approx(order, abs=0.65 if order < 4 else 0.9)


@pytest.mark.slow
@pytest.mark.parametrize("problem", orders.PROBLEMS)
@pytest.mark.parametrize("solver", orders.deterministic_solvers())
def test_orders_as_shipped_over_three_halvings(solver: str, problem: str) -> None:
    errors = orders.errors(solver, orders.PROBLEMS[problem], orders.STEPS[-4:])
    mean = orders.slopes(errors).mean()
    if solver == "ipndm_v_published":
        assert mean < 1.2
    elif solver in BENT:
        assert 1.6 < mean < 2.6 and errors[-1] < 3e-6
    else:
        assert mean == pytest.approx(get_solver(solver).order, abs=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("problem", orders.PROBLEMS)
@pytest.mark.parametrize("case", orders.EXACT_STARTS, ids=lambda c: orders.label(*c[:2]))
def test_orders_after_an_exact_start_over_three_halvings(case: Any, problem: str) -> None:
    solver, options, exact, order = case
    mixture = orders.PROBLEMS[problem]
    errors = orders.errors_after_exact_start(solver, mixture, exact, orders.STEPS[-4:], **options)
    slopes = orders.slopes(errors)
    # The last halving; order 4 of ipndm_v and unipc is not there yet.
    assert slopes[-1] == pytest.approx(order, abs=0.45 if order == 4 else 0.25)


# == Analytical first step =========================================================================


@pytest.mark.parametrize("solver", solver_names())
def test_the_analytical_first_step_saves_one_call(solver: str) -> None:
    for schedule in (LINEAR, NoiseSchedule.edm()):
        plain, saved = (build_tableau(solver, schedule, 6, afs=afs) for afs in (False, True))
        assert saved.nfe == plain.nfe - 1 and saved.times == plain.times
        told = [[s.time for s in t.stages if s.time is not None] for t in (plain, saved)]
        assert told[1] == told[0][1:]
        assert all(not w.output and not w.sample for w in saved.stages[1].writes)


@pytest.mark.parametrize("solver", solver_names())
def test_the_analytical_first_step_is_exact_for_unit_normal_data(solver: str) -> None:
    """Then the network says at the first call what the formula does."""
    for name in ("linear", "edm", "logsnr_cosine"):
        schedule = SCHEDULES[name]

        def network(x: np.ndarray, t: float, schedule: NoiseSchedule = schedule) -> np.ndarray:
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            return sigma * x / (alpha**2 + sigma**2)

        tableaux = [build_tableau(solver, schedule, 6, afs=afs) for afs in (False, True)]
        scaled = lambda t: [1.0 if s.time is None else s.input_scale for s in t.stages]
        assert set(scaled(tableaux[0])) == {1.0}
        plain, saved = (run_rows(t, network, NOISE, stage_noise=STAGE_NOISE) for t in tableaux)
        np.testing.assert_allclose(saved, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", solver_names())
def test_rows_equal_the_textbook_with_the_analytical_first_step(solver: str) -> None:
    for kind in ("epsilon", "sample"):
        check(solver, LINEAR, steps=5, prediction=kind, afs=True, clip=1.0)
        check(solver, NoiseSchedule.edm(), steps=4, prediction=kind, afs=True)
    check(solver, LINEAR, steps=4, start=600.0, from_image=True, afs=True)


STOCHASTIC: dict[str, dict[str, Any]] = {
    "ddim": {"eta": 1.0},
    "euler_ancestral": {},
    "ddpm": {},
    "lcm": {},
    "dpmpp_2m_sde": {},
    "euler_churn": {},
    "heun_churn": {},
}


@pytest.mark.parametrize("afs", [False, True])
@pytest.mark.parametrize("solver", STOCHASTIC)
def test_noise_of_different_stages_is_independent(solver: str, afs: bool) -> None:
    """With a network that says zero the result is a sum over the stages' noises: each counts once,
    and what the seeds draw has the variance of that sum."""
    schedule, options = NoiseSchedule.edm(), STOCHASTIC[solver]
    assert build_tableau(solver, schedule, 6, **options).stochastic
    tableau = build_tableau(solver, schedule, spacing=[40.0, 20, 10, 5, 2, 1], afs=afs, **options)
    zero = lambda x, t: 0 * x
    quiet = np.zeros((1, 1))
    stages = range(len(tableau.stages))
    unit = lambda k: [np.full((1, 1), float(i == k)) for i in stages]
    share = [run_rows(tableau, zero, quiet, stage_noise=unit(k)).item() for k in stages]
    draws = [s.is_stochastic for s in tableau.stages]
    assert [bool(c) for c in share] == draws and sum(draws) > 2
    count = 20000
    sampler = Sampler(as_denoiser(zero), tableau=tableau, dtype=torch.float64)
    found = sampler(torch.zeros(count, 1, dtype=torch.float64), seeds=range(count))
    variance = sum(c**2 for c in share)
    # Stages that shared their noise would add up to (sum c)^2 instead.
    assert abs(found.var().item() / variance - 1) < 5 * math.sqrt(2 / count)
    assert sum(map(abs, share)) ** 2 > 1.2 * variance


# == Any options ===================================================================================

OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "ddim": {"eta": st.floats(0, 1)},
    "euler_ancestral": {"eta": st.floats(0, 1)},
    "dpmpp_2m_sde": {"eta": st.floats(0, 1)},
    "deis": {
        "order": st.integers(1, 4),
        "kind": st.sampled_from(["tab", "rhoab", "logrhoab"]),
    },
    "ipndm_v": {"order": st.integers(1, 4)},
    "ipndm_v_published": {"order": st.integers(1, 4)},
    "unipc": {
        "order": st.integers(1, 3),
        "variant": st.sampled_from(["bh1", "bh2"]),
        "lower_order_final": st.booleans(),
    },
    "dpmpp_3m": {"lower_order_final": st.booleans()},
    "dpmpp_3m_exact": {"lower_order_final": st.booleans()},
    "reverse_diffusion": {"probability_flow": st.booleans()},
    "predictor_corrector": {
        "snr": st.floats(0.01, 0.5),
        "corrections": st.integers(1, 3),
        "predictor": st.sampled_from(["reverse_diffusion", "euler_maruyama", "none"]),
        "norms": st.sampled_from(["sample", "batch"]),
    },
    "fon": {"warm_up": st.sampled_from(["true", "published"])},
    **{
        f"{kind}_churn": {
            "churn": st.floats(0, 100),
            "s_min": st.floats(0, 1),
            "s_max": st.floats(2, 100),
            "s_noise": st.floats(0.99, 1.01),
        }
        for kind in ("euler", "heun")
    },
}
CLASSICAL = ("classical_euler", "classical_heun", "classical_rk4", "fon")


def test_options_are_all_tried() -> None:
    assert {n: set(get_solver(n).options) for n in solver_names() if get_solver(n).options} == {
        name: set(options) for name, options in OPTIONS.items()
    }


@st.composite
def option_sets(draw: Any) -> tuple[str, NoiseSchedule, dict[str, Any]]:
    solver = draw(st.sampled_from(solver_names()))
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    schedule = SCHEDULES[name]
    discrete = name in ("linear", "cosine", "zero_snr")
    options = {k: draw(v) for k, v in OPTIONS.get(solver, {}).items()}
    if solver == "fon" and not discrete:
        options["warm_up"] = "true"
    given: dict[str, Any] = {"steps": draw(st.integers(1, 9)), **options}
    differentiates = solver in ("euler_maruyama", "predictor_corrector")  # official cannot be
    if name == "linear" and solver not in CLASSICAL and not differentiates:
        given["convention"] = draw(st.sampled_from(["aligned", "aligned", "published", "offset"]))
    if given.get("convention", "aligned") != "aligned":
        given["spacing"] = "leading"
        if given["steps"] in (3, 9):  # grids the official index does not reach
            given["steps"] = 8
    else:
        spacings = ["trailing", "linspace", "logsnr", "karras"] + ["leading"] * discrete
        given["spacing"] = draw(st.sampled_from(spacings))
        low = schedule.last if schedule.clean is None else schedule.clean
        starts = st.floats(0.3, 1.0).map(lambda f: low + f * (schedule.first - low))
        given["start"] = draw(st.none() | starts)
    if name == "flow" and differentiates:
        given["start"] = 0.9
    kinds = PREDICTIONS
    if schedule.zero_terminal_snr:
        kinds = ("sample", "v_prediction", "flow", "both")
    given["prediction"] = draw(st.sampled_from(kinds))
    given["clip"] = draw(st.sampled_from([None, 0.7, (-0.2, 1.5)]))
    given["afs"], given["from_image"] = draw(st.booleans()), draw(st.booleans())
    return solver, schedule, given


def valid(solver: str, schedule: NoiseSchedule, given: dict[str, Any]) -> None:
    """Finite, reproducible from its JSON, and consistent."""
    tableau = build_tableau(solver, schedule, **given)
    text = tableau.to_json()
    again = Tableau.from_json(text)
    assert again == tableau and again.to_json() == text and "NaN" not in text
    json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    for number in range(len(tableau.stages)):
        row = tableau.row(number)
        assert np.isfinite(np.delete(row, (2, 3), axis=1)).all()
        np.testing.assert_array_equal(again.row(number), row)
        np.testing.assert_array_equal(again.index(number), tableau.index(number))
    consistent(solver, schedule.with_convention(given.get("convention", "aligned")), given)


def consistent(solver: str, schedule: NoiseSchedule, given: dict[str, Any]) -> None:
    """Where the data is one point x0 = c and the state is on the line alpha c + sigma e, every
    epsilon is e and every x0 is c, so a solver that adds no noise must stay on the line."""
    if solver in CLASSICAL and schedule.name not in ("edm", "ve"):
        return  # dx/dt is not constant on the line: only consistent as steps shrink
    if solver in ("reverse_diffusion", "euler_maruyama", "predictor_corrector"):
        return  # nor do these stay on it; their recursions are in test_preconditioned_sampling.py
    if solver == "ipndm_v_published" and given["order"] == 4:
        return  # its weights do not sum to one
    tableau = build_tableau(solver, schedule, **{**given, "prediction": "sample", "clip": None})
    ends = tableau.times[0], tableau.times[-1]
    (a, s), (b, r) = ((schedule.alpha(t), schedule.sigma(t)) for t in ends)
    c = 0.37
    # Noise is left out of stochastic solvers by starting on the line with e = 0, where there is
    # nothing to renew; the others start with e = -1.3, or where AFS is right.
    e = 0.0 if tableau.stochastic else -1.3
    if given["afs"]:
        if a < 1e-4 or tableau.stochastic:
            return
        e = c * s / a  # so that sigma x / (alpha^2 + sigma^2) = e
    on_line = a * c + s * e
    shape = NOISE.shape
    if given["from_image"]:
        noise, image = np.full(shape, e), np.full(shape, c)
    else:
        noise, image = np.full(shape, on_line / schedule.prior_scale(tableau.times[0])), None
    zeros = [np.zeros(shape)] * len(tableau.stages)
    known = lambda x, t: np.full(x.shape, c)
    found = run_rows(tableau, known, noise, image=image, stage_noise=zeros)
    scale = 1 + abs(e) + abs(on_line)
    np.testing.assert_allclose(found, b * c + r * e, rtol=0, atol=1e-8 * scale)


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(case=option_sets())
def test_any_options_make_a_valid_tableau(case: Any) -> None:
    valid(*case)


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=option_sets())
def test_a_thousand_option_sets_make_valid_tableaux(case: Any) -> None:
    valid(*case)
