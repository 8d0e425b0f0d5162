"""The solvers against published values, closed forms and their orders of convergence."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastdiff import NoiseSchedule, Sampler, build_tableau, register_solver, solver_names
from fastdiff.solvers import pndm, registry
from fastdiff.solvers.registry import get_solver
from fastdiff.tableau import Form, Trace, trace_solver
from tests.helpers import orders
from tests.helpers.oracles import GAUSSIAN, MILD, Gaussian, Mixture, as_denoiser
from tests.helpers.schedules import LINEAR


def golden_run(solver: str, steps: int, convention: str = "aligned") -> float:
    """One pixel that starts at 1, data N(0.3, 0.5^2), the exact epsilon of the aligned times."""
    network = as_denoiser(lambda x, t: GAUSSIAN.epsilon(x, LINEAR.alpha(t), LINEAR.sigma(t)))
    sampler = Sampler(
        network,
        LINEAR,
        solver=solver,
        steps=steps,
        spacing="leading",
        convention=convention,
        dtype=torch.float64,
    )
    return sampler(torch.ones(1, 1, dtype=torch.float64)).item()


# Made once with an independent implementation, and for ddim, s_pndm and f_pndm under "published"
# with the published code itself, its table in float64.
SOLVERS = ("ddim", "s_pndm", "f_pndm", "plms", "ipndm")
GOLDENS = {
    ("aligned", 10): "0.672283391331 0.743559022432 0.792521676056 0.792308928942 0.791979660662",
    ("aligned", 50): "0.771350104878 0.796320235014 0.799413244975 0.799413184891 0.799412993851",
    ("published", 10): "0.675372550115 0.745042027675 0.793142031039 0.792920175893 0.792612884996",
}


@pytest.mark.parametrize(("convention", "steps"), GOLDENS)
def test_solvers_give_their_golden_values(convention: str, steps: int) -> None:
    found = [golden_run(solver, steps, convention) for solver in SOLVERS]
    expected = [float(number) for number in GOLDENS[convention, steps].split()]
    assert found == pytest.approx(expected, abs=1e-12, rel=0)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(10, 0.797584561288), (20, 0.798475173407), (50, 0.798858506290), (100, 0.798965817469)],
)
def test_the_exact_flow_of_the_gaussian(steps: int, expected: float) -> None:
    t = LINEAR.times(steps, spacing="leading")[0]
    end = GAUSSIAN.flow(1.0, (LINEAR.alpha(t), LINEAR.sigma(t)), (1.0, 0.0))
    assert end == pytest.approx(expected, abs=1e-12, rel=0)


@pytest.mark.parametrize(
    ("schedule", "t", "u", "A", "C"),
    [
        (LINEAR, 500, 480, 1.104284550624, -0.109076234311),
        (LINEAR, 980, 960, 1.216813773283, -0.216821561405),
        (LINEAR, 20, 0, 1.003096921179, -0.069394164009),
        (LINEAR, 0, -1, 1.0000500037503, -0.0100005000375),
        (NoiseSchedule.scaled_linear_beta(), 981, 961, 1.122851700962, -0.123252006285),
        (NoiseSchedule.scaled_linear_beta(), 501, 481, 1.048456331533, -0.057441992356),
    ],
)
def test_coefficients_of_one_transfer(
    schedule: NoiseSchedule, t: int, u: int, A: float, C: float
) -> None:
    (_, stage) = build_tableau("ddim", schedule, spacing=[t, u]).stages
    assert stage.writes[0].slots[0] == pytest.approx(A, abs=1e-12, rel=0)
    assert stage.writes[0].output == pytest.approx(C, abs=1e-12, rel=0)


@pytest.mark.parametrize("solves_for", ["epsilon", "sample"])
def test_a_transfer_of_no_distance_is_the_identity(solves_for: str) -> None:
    for schedule, t in ((LINEAR, 500.0), (LINEAR, 0.0), (NoiseSchedule.edm(), 3.0)):
        run = Trace(schedule, [t, -1.0], solves_for=solves_for, prediction=None)
        moved = run.transfer(run.x, Form({"d": 1.0}), t, t)
        assert moved.terms == run.x.terms


def test_ddim_is_the_first_of_the_multistep_family() -> None:
    times = LINEAR.times(12)
    ab1 = trace_solver(
        "ab1", lambda run: pndm.multistep(run, order=1), LINEAR, times, solves_for="epsilon"
    )
    assert ab1.stages == build_tableau("ddim", LINEAR, 12).stages
    assert ab1.stages == build_tableau("euler", LINEAR, 12).stages


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_adams_bashforth_weights_integrate_polynomials(order: int) -> None:
    """On past nodes 0, -1, -2, ... they give the integral over (0, 1) up to their order."""
    weights = np.array(pndm.ADAMS_BASHFORTH[order - 1])
    nodes = -np.arange(order)
    for power in range(order):
        assert weights @ nodes.astype(float) ** power == pytest.approx(1 / (power + 1), abs=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 20])
def test_network_calls(steps: int) -> None:
    warm = min(steps - 1, 3)  # the step to the clean image needs no Runge-Kutta
    expected = {
        "ddim": steps,
        "euler": steps,
        "heun": 2 * steps - 1,
        "s_pndm": steps + min(steps - 1, 1),
        "plms": steps + min(steps - 1, 1),
        "f_pndm": steps + 3 * warm,
        "ipndm": steps,
        "dpmpp_2m": steps,
        "unipc": steps,
    }
    for solver, calls in expected.items():
        tableau = build_tableau(solver, LINEAR, steps, spacing="leading")
        assert (tableau.nfe, tableau.steps) == (calls, steps), solver
    official = build_tableau("f_pndm", LINEAR, 10, spacing="leading", convention="published")
    assert official.nfe == 19
    # The official end is not clean, so with few steps all of them are Runge-Kutta steps.
    for few in (1, 2):
        official = build_tableau("f_pndm", LINEAR, few, spacing="leading", convention="published")
        assert official.nfe == 4 * few


def test_a_leap_is_not_averaged_over() -> None:
    """From pure noise, or in two steps from 999, the second call would do harm: it is not made."""
    for schedule in (NoiseSchedule.cosine(), NoiseSchedule.flow(), NoiseSchedule.logsnr_cosine()):
        options = {"prediction": "v_prediction", "spacing": "trailing"}
        calls = {
            solver: build_tableau(solver, schedule, 10, **options).nfe
            for solver in ("heun", "s_pndm", "f_pndm")
        }
        clean = schedule.clean is not None
        assert calls == {"heun": 18 if clean else 19, "s_pndm": 10, "f_pndm": 16}
    assert build_tableau("heun", LINEAR, 2, spacing="trailing").nfe == 2
    assert build_tableau("heun", LINEAR, 3, spacing="trailing").nfe == 5


def test_f_pndm_evaluates_where_the_paper_says() -> None:
    tableau = build_tableau("f_pndm", LINEAR, 5, spacing="leading")
    assert [stage.time for stage in tableau.stages[1:]] == [
        *(800, 700, 700, 600), *(600, 500, 500, 400), *(400, 300, 300, 200), 200, 0
    ]  # fmt: skip
    official = build_tableau("f_pndm", LINEAR, 1, spacing="leading", convention="published")
    assert [stage.time for stage in official.stages[1:]] == [0, 0, 0, 0]  # never below the last


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_noise_is_that_of_equation_16(eta: float) -> None:
    """And at eta = 1 the variance of DDPM's posterior q(x_u | x_t, x_0)."""
    for schedule in (LINEAR, NoiseSchedule.edm(), NoiseSchedule.flow()):
        t, u = 0.7 * schedule.first, 0.4 * schedule.first
        (_, stage) = build_tableau("ddim", schedule, spacing=[t, u], eta=eta).stages
        a_t, s_t, a_u, s_u = (
            *(f(t) for f in (schedule.alpha, schedule.sigma)),
            *(f(u) for f in (schedule.alpha, schedule.sigma)),
        )
        between = s_t**2 - (a_t / a_u) ** 2 * s_u**2  # variance of x_t given x_u
        (w,) = stage.writes
        assert w.noise == pytest.approx(eta * math.sqrt(between) * s_u / s_t, rel=1e-10)
        # Noise kept and noise added make up sigma_u.
        x, f = w.slots[0], w.output
        kept = f + x * s_t  # the coefficient of epsilon when x = alpha x0 + sigma epsilon
        assert kept**2 + w.noise**2 == pytest.approx(s_u**2, rel=1e-10)
        assert x * a_t == pytest.approx(a_u, rel=1e-12)


def test_ddim_at_eta_1_samples_the_data() -> None:
    """The exact posterior steps on a Gaussian keep its moments (4 standard errors)."""
    sampler = Sampler(
        as_denoiser(lambda x, t: GAUSSIAN.epsilon(x, LINEAR.alpha(t), LINEAR.sigma(t))),
        LINEAR,
        solver="ddim",
        steps=200,
        eta=1.0,
        dtype=torch.float64,
    )
    count = 4000
    x = sampler(seeds=range(count), shape=(1,))
    assert abs(x.mean().item() - 0.3) < 4 * 0.5 / math.sqrt(count)
    # 200 steps leave 2 % of the variance missing, on top of its scatter.
    assert abs(x.var().item() / 0.25 - 1) < 0.02 + 4 * math.sqrt(2 / count)


# == Orders ========================================================================================


def test_the_reference_solution_is_right() -> None:
    """The integrator against the one mixture whose flow has a closed form."""
    gaussian = Gaussian(0.2, 0.4)
    start, end = (orders.angle(t) for t in (orders.SCHEDULE.first, orders.SCHEDULE.last))
    found = Mixture((1.0,), (0.2,), (0.4,)).flow(orders.STARTS, start, end)
    expected = gaussian.flow(
        orders.STARTS, (np.cos(start), np.sin(start)), (np.cos(end), np.sin(end))
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    # The mixture's score is the derivative of its log density.
    x, h, alpha, sigma = np.linspace(-2, 2, 9), 1e-6, 0.8, 0.6

    def log_density(x: np.ndarray) -> np.ndarray:
        variance = alpha**2 * np.square(MILD.stds) + sigma**2
        bells = np.exp(-((x[:, None] - alpha * np.array(MILD.means)) ** 2) / (2 * variance))
        return np.log((bells / np.sqrt(variance)) @ np.array(MILD.weights))

    score = (log_density(x + h) - log_density(x - h)) / (2 * h)
    np.testing.assert_allclose(MILD.epsilon(x, alpha, sigma), -sigma * score, atol=1e-8)


# Over the last three halvings of the step, as (margin, order); docs/orders.md has the table.
ORDERS = {
    **dict.fromkeys(("ddim", "euler"), (0.02, 1)),
    **dict.fromkeys(("heun", "s_pndm", "f_pndm", "plms", "dpmpp_2m", "unipc"), (0.2, 2)),
    "ipndm": (0.4, 2),  # its error changes sign on the way to order 2
}


@pytest.mark.parametrize("problem", orders.PROBLEMS)
@pytest.mark.parametrize("solver", ORDERS)
def test_orders_of_convergence(solver: str, problem: str) -> None:
    margin, order = ORDERS[solver]
    errors = orders.errors(solver, orders.PROBLEMS[problem], orders.STEPS[-4:])
    assert orders.slopes(errors).mean() == pytest.approx(order, abs=margin)


@pytest.mark.parametrize("problem", orders.PROBLEMS)
def test_f_pndm_is_of_fourth_order_in_uniform_steps_of_sigma(problem: str) -> None:
    """There its warm-up is the classical Runge-Kutta method and its blend Adams-Bashforth's."""
    mixture, high, low = orders.PROBLEMS[problem], 3.0, 1.0
    schedule = NoiseSchedule.ve(0.01, 50.0)
    start, end = math.atan(high), math.atan(low)
    truth = mixture.flow(orders.STARTS * high * math.cos(start), start, end) / math.cos(end)
    errors = []
    for steps in (20, 40, 80, 160):
        sampler = Sampler(
            as_denoiser(lambda x, t: mixture.epsilon(x, 1.0, t)),
            schedule,
            solver="f_pndm",
            spacing=np.linspace(high, low, steps + 1),
            dtype=torch.float64,
        )
        ends = sampler(torch.from_numpy(orders.STARTS)[:, None])[:, 0].numpy()
        errors.append(np.sqrt(np.mean((ends - truth) ** 2)))
    assert orders.slopes(np.array(errors))[-1] == pytest.approx(4, abs=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("problem", orders.PROBLEMS)
def test_ipndm_is_of_second_order_on_fine_grids(problem: str) -> None:
    errors = orders.errors("ipndm", orders.PROBLEMS[problem], (640, 1280, 2560, 5120))
    assert orders.slopes(errors)[-1] == pytest.approx(2, abs=0.1)


# == The registry ==================================================================================


def test_a_solver_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """A midpoint rule in six lines is a solver like those built in."""
    monkeypatch.setattr(registry, "_SOLVERS", dict(registry._SOLVERS))

    def midpoint(trace: Trace, where: float = 0.5) -> Form:
        """The midpoint rule, with the midpoint anywhere."""
        x = trace.x
        for t, u in trace.intervals:
            m = t + where * (u - t)
            d = trace.net(trace.transfer(x, trace.net(x, t), t, m), m)
            x = trace.transfer(x, d, t, u)
        return x

    register_solver("a_midpoint_of_ones_own", midpoint)
    with pytest.raises(ValueError, match="an option 'start', an argument of build_tableau"):
        register_solver("another", lambda trace, start=0.5: trace.x)
    assert "a_midpoint_of_ones_own" in solver_names()
    known = get_solver("a_midpoint_of_ones_own")
    assert known.summary == "The midpoint rule, with the midpoint anywhere."
    assert known.options == {"where": 0.5} and known.solves_for == "epsilon"
    tableau = build_tableau("a_midpoint_of_ones_own", LINEAR, 4, where=0.25)
    assert tableau.nfe == 8 and tableau.slots == 2
    errors = orders.errors("a_midpoint_of_ones_own", MILD, (40, 80, 160))
    np.testing.assert_allclose(orders.slopes(errors), 2, atol=0.2)
    with pytest.raises(ValueError, match="'a_midpoint_of_ones_own' is registered already"):
        register_solver("a_midpoint_of_ones_own", midpoint)
    with pytest.raises(ValueError, match="solves_for must be 'epsilon' or 'sample'; got 'v'"):
        register_solver("another", midpoint, solves_for="v")
    with pytest.raises(TypeError, match="ddim has no option 'order'; its options: eta"):
        build_tableau("ddim", LINEAR, 4, order=2)
    with pytest.raises(TypeError, match="euler has no option 'eta'; its options: none"):
        build_tableau("euler", LINEAR, 4, eta=1.0)
    with pytest.raises(ValueError, match="solver must be one of .*ddim, .*; got 'dimm'"):
        build_tableau("dimm", LINEAR, 4)
    with pytest.raises(TypeError, match="schedule must be a fastdiff.NoiseSchedule; got str"):
        build_tableau("ddim", "linear", 4)
    for clip in (0, -1.0, math.inf, math.nan, (1, -1), (0.0, math.inf)):
        with pytest.raises(ValueError, match="clip must be a positive number or two ascending"):
            build_tableau("ddim", LINEAR, 4, clip=clip)


def test_every_solver_says_what_it_is() -> None:
    for name in solver_names():
        known = get_solver(name)
        assert known.summary.endswith(".") and known.solves_for in ("epsilon", "sample")
