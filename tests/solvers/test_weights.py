"""Weights of the solvers: against exact integrals, closed forms and published numbers."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest

from fastdiff import NoiseSchedule, build_tableau
from fastdiff.solvers import adams, pndm, published, unipc
from fastdiff.solvers.lagrange import lagrange_means
from fastdiff.tableau import Trace
from tests.helpers.schedules import LINEAR, SCHEDULES

VE = NoiseSchedule.ve(0.01, 50.0)  # time is sigma / alpha


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
