"""Every kind of network output says the same thing, at both ends of the schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff import PREDICTIONS, NoiseSchedule, Prediction, Sampler, build_tableau
from fastdiff.prediction import prediction
from tests.helpers.networks import STRUCTURES
from tests.helpers.oracles import GAUSSIAN, ODE_SOLVERS, as_denoiser, express, run_rows, textbook
from tests.helpers.schedules import LINEAR

ZERO_SNR = NoiseSchedule.from_alphas_cumprod(
    np.linspace(0.99995, 0.0, 1000) ** 2  # sqrt(alpha-bar) linear in time, zero at the end
)
X, *STAGE_NOISE = np.random.default_rng(0).standard_normal((50, 3, 2, 4))


def knowing(kind: str, schedule: NoiseSchedule):  # noqa: ANN201
    """A network that knows x0 and epsilon of the Gaussian and returns them as `kind`."""

    def network(x: np.ndarray, t: float) -> np.ndarray:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        variance = alpha**2 * GAUSSIAN.std**2 + sigma**2
        epsilon = sigma * (x - alpha * GAUSSIAN.mean) / variance
        x0 = GAUSSIAN.mean + alpha * GAUSSIAN.std**2 * (x - alpha * GAUSSIAN.mean) / variance
        return express(kind, x0, epsilon, alpha, sigma)

    return network


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_conversions_invert_the_definitions(kind: str) -> None:
    """p F + q x = x0 and a F + b x = epsilon, for arrays, tensors and numbers."""
    rng = np.random.default_rng(1)
    x0, epsilon = rng.standard_normal((2, 5))
    for alpha, sigma in [(0.8, 0.6), (1.0, 1e-3), (1e-3, 1.0), (0.3, 0.7), (1.0, 80.0)]:
        x, known = alpha * x0 + sigma * epsilon, prediction(kind)
        if kind == "both":
            m0, m1 = known.blend(alpha, sigma)
            output = m0 * x0 + m1 * epsilon
        else:
            output = express(kind, x0, epsilon, alpha, sigma)
        for cast in (float, np.float64, torch.tensor):
            p, q = known.to_sample(cast(alpha), cast(sigma))
            a, b = known.to_epsilon(cast(alpha), cast(sigma))
            # Absolute in units of the larger of the two terms that make the result.
            noise = 1e-7 if cast is torch.tensor else 1e-14
            size = max(1, sigma / alpha, alpha / sigma)
            np.testing.assert_allclose(float(p) * output + float(q) * x, x0, atol=noise * size)
            np.testing.assert_allclose(float(a) * output + float(b) * x, epsilon, atol=noise * size)


@pytest.mark.parametrize("solver", STRUCTURES)
@pytest.mark.parametrize("kind", [k for k in PREDICTIONS if k != "epsilon"])
def test_every_prediction_gives_the_result_of_epsilon(solver: str, kind: str) -> None:
    """From t = 999 to the clean image, where epsilon says nothing about x0 and the reverse."""
    results = [
        run_rows(
            build_tableau(solver, LINEAR, 9, prediction=each, spacing="trailing"),
            knowing(each, LINEAR),
            X,
            stage_noise=STAGE_NOISE,
        )
        for each in ("epsilon", kind)
    ]
    np.testing.assert_allclose(results[1], results[0], atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow", "score", "both"])
@pytest.mark.parametrize("times", [(999, 998, 996, -1), (3, 2, 0.5, 0, -1)], ids=["T", "0"])
def test_ends_of_the_schedule_are_well_conditioned(kind: str, times: tuple[float, ...]) -> None:
    """DDIM and DPM++ 2M against the same updates in extended precision."""
    schedule = NoiseSchedule.cosine()
    for solver in ("ddim", "dpmpp_2m"):
        tableau = build_tableau(solver, schedule, spacing=times, prediction=kind)
        network = knowing("epsilon", schedule)
        expected = textbook(solver, schedule, times, network, X)
        result = run_rows(tableau, knowing(kind, schedule), X)
        # alpha(999) of the cosine schedule is 5e-5: epsilon loses that much of float64, no more.
        np.testing.assert_allclose(result, expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_v_prediction_works_from_zero_terminal_snr(solver: str) -> None:
    """With trailing steps the first network call is at pure noise, and has to count."""
    results = []
    for kind in ("v_prediction", "sample", "flow", "both"):
        tableau = build_tableau(solver, ZERO_SNR, 100, prediction=kind, spacing="trailing")
        assert tableau.stages[1].time == 999
        results.append(run_rows(tableau, knowing(kind, ZERO_SNR), X))
    exact = GAUSSIAN.flow(X, (0.0, 1.0), (1.0, 0.0))
    for result in results:
        np.testing.assert_allclose(result, results[0], rtol=0, atol=1e-10)
        np.testing.assert_allclose(result, exact, rtol=0, atol=0.07)


@pytest.mark.parametrize("solver", ODE_SOLVERS)
@pytest.mark.parametrize(
    "schedule", [NoiseSchedule.cosine(), NoiseSchedule.flow()], ids=lambda s: s.name
)
def test_no_solver_blows_up_on_a_first_step_from_pure_noise(
    solver: str, schedule: NoiseSchedule
) -> None:
    """Averages of epsilon over a step that shrinks sigma / alpha a thousandfold would."""
    tableau = build_tableau(solver, schedule, 20, prediction="v_prediction", spacing="trailing")
    result = run_rows(tableau, knowing("v_prediction", schedule), X)
    start = schedule.alpha(schedule.first), schedule.sigma(schedule.first)
    np.testing.assert_allclose(result, GAUSSIAN.flow(X, start, (1.0, 0.0)), rtol=0, atol=0.1)


@pytest.mark.parametrize("kind", ["epsilon", "score"])
def test_epsilon_is_refused_at_zero_terminal_snr(kind: str) -> None:
    with pytest.raises(ValueError, match=f"prediction '{kind}' says nothing.*time 999"):
        build_tableau("ddim", ZERO_SNR, 10, prediction=kind, spacing="trailing")
    below = build_tableau("ddim", ZERO_SNR, 10, prediction=kind, spacing="leading")
    assert below.times[0] == 900  # leading steps never visit the last time


@pytest.mark.parametrize("solver", ["s_pndm", "f_pndm", "plms", "ipndm", "dpmpp_2m", "unipc"])
@pytest.mark.parametrize("kind", ["v_prediction", "sample", "flow"])
def test_history_is_kept_in_the_canonical_prediction(solver: str, kind: str) -> None:
    """A v-network is converted before it enters the history (diffusers' PNDM blends raw v)."""
    runs = {
        each: Sampler(
            as_denoiser(knowing(each, LINEAR)),
            LINEAR,
            solver=solver,
            steps=20,
            prediction=each,
            dtype=torch.float64,
        )(torch.from_numpy(X))
        for each in ("epsilon", kind)
    }
    torch.testing.assert_close(runs[kind], runs["epsilon"], atol=1e-11, rtol=0)


def test_learned_variance_is_cut_off() -> None:
    network = as_denoiser(knowing("epsilon", LINEAR))

    def with_variance(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(x, t), torch.full_like(x, torch.nan)], dim=1)

    for x in (torch.from_numpy(X), torch.from_numpy(X)[..., None].expand(-1, -1, -1, 3)):
        plain, wide = (
            Sampler(each, LINEAR, steps=5, dtype=torch.float64)(x)
            for each in (network, with_variance)
        )
        torch.testing.assert_close(wide, plain, rtol=0, atol=0)


def test_a_prediction_of_ones_own() -> None:
    """A preconditioned network (Karras et al. 2022) is a Prediction like any other."""
    std = 0.5

    def scales(a: float, s: float) -> tuple[float, float, float]:
        r = s / a  # the network is trained on x / alpha
        return std**2 / (r**2 + std**2), r * std / np.hypot(r, std), 1 / np.hypot(r, std)

    edm = Prediction(
        "edm",
        to_sample=lambda a, s: (scales(a, s)[1], scales(a, s)[0] / a),
        to_epsilon=lambda a, s: (-a / s * scales(a, s)[1], (1 - scales(a, s)[0]) / s),
        input_scale=lambda a, s: scales(a, s)[2] / a,
    )
    schedule = NoiseSchedule.edm()

    def preconditioned(scaled: np.ndarray, sigma: float) -> np.ndarray:
        skip, out, into = scales(1.0, sigma)
        x = scaled / into
        return (knowing("sample", schedule)(x, sigma) - skip * x) / out

    for solver in ("heun", "dpmpp_2m", "unipc"):
        expected = run_rows(
            build_tableau(solver, schedule, 6, prediction="sample"), knowing("sample", schedule), X
        )
        tableau = build_tableau(solver, schedule, 6, prediction=edm)
        np.testing.assert_allclose(run_rows(tableau, preconditioned, X), expected, rtol=1e-12)
        sampler = Sampler(as_denoiser(preconditioned), tableau=tableau, dtype=torch.float64)
        result = sampler(torch.from_numpy(X)).numpy()
        np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_unknown_predictions_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction must be one of epsilon, sample, .*; got 'v'"):
        build_tableau("ddim", LINEAR, 10, prediction="v")
    assert prediction(prediction("flow")) is prediction("flow")
