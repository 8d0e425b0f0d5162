"""The other solver families against diffusers, and churn against EDM's algorithm 2 as printed."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch

from fastdiff import NoiseSchedule, Sampler
from tests.helpers.parity import KINDS, NOISES, Case, X, agree, in_float64, network, ours, run
from tests.helpers.schedules import BETAS, LINEAR

SCALED = NoiseSchedule.scaled_linear_beta()
MULTISTEP = diffusers.DPMSolverMultistepScheduler


class NoisyCase(Case):
    """A case whose scheduler draws its own noise: every run is handed the same."""

    def __call__(self) -> Any:
        self.noises = iter(NOISES)
        return super().__call__()

    def drawn(self, shape: Any, *, dtype: torch.dtype, **_: Any) -> torch.Tensor:
        return next(self.noises).to(dtype)


@pytest.fixture
def given_noise(monkeypatch: pytest.MonkeyPatch) -> Any:
    def patched(case: NoisyCase) -> NoisyCase:
        monkeypatch.setattr(sys.modules[case.kind.__module__], "randn_tensor", case.drawn)
        return case

    return patched


# == Where we agree ================================================================================


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("kind", KINDS)
def test_dpmpp_3m_agrees(kind: str, steps: int) -> None:
    case = Case(MULTISTEP, {**BETAS, "solver_order": 3, "prediction_type": kind}, steps)
    agree(case, lambda times: ours("dpmpp_3m", SCALED, [*times, -1], prediction=kind))


@pytest.mark.parametrize("steps", [8, 20])
def test_dpmpp_3m_without_a_lower_order_at_the_end(steps: int) -> None:
    """What diffusers does from 15 steps on, whatever it is told."""
    config = {**BETAS, "solver_order": 3, "lower_order_final": steps >= 15}
    case = Case(MULTISTEP, config, steps)
    agree(case, lambda t: ours("dpmpp_3m", SCALED, [*t, -1], lower_order_final=False))


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_dpmpp_2m_sde_agrees(kind: str, steps: int) -> None:
    config = {**BETAS, "algorithm_type": "sde-dpmsolver++", "prediction_type": kind}
    case = Case(MULTISTEP, config, steps, noises=NOISES)
    agree(
        case,
        lambda t: ours("dpmpp_2m_sde", SCALED, [*t, -1], prediction=kind, noises=NOISES),
    )


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_of_every_order_and_variant_agrees(order: int, variant: str, steps: int) -> None:
    """Both ends for bh2; bh1's B(h) = h has no limit at a clean end, where diffusers gives NaN."""
    for end, last in (("zero", -1), ("sigma_min", 0))[variant == "bh1" :]:
        config = {**BETAS, "solver_order": order, "solver_type": variant, "final_sigmas_type": end}
        case = Case(diffusers.UniPCMultistepScheduler, config, steps)
        options = {"order": order, "variant": variant}
        agree(case, lambda t, last=last, o=options: ours("unipc", SCALED, [*t, last], **o))


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_agrees(order: int, steps: int) -> None:
    """Its basis is log rho. It ends at alpha-bar[0]."""
    config = {**BETAS, "solver_order": order, "lower_order_final": False}
    case = Case(diffusers.DEISMultistepScheduler, config, steps)
    agree(case, lambda t: ours("deis", SCALED, [*t, 0], order=order, kind="logrhoab"))


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_euler_ancestral_agrees(kind: str, steps: int, given_noise: Any) -> None:
    """diffusers' state is x / alpha = x sqrt(1 + sigma^2)."""
    case = NoisyCase(
        diffusers.EulerAncestralDiscreteScheduler,
        {**BETAS, "prediction_type": kind, "timestep_spacing": "trailing"},
        steps,
        start=lambda sigma: (1 + sigma**2) ** 0.5,
    )
    agree(
        given_noise(case),
        lambda t: ours("euler_ancestral", SCALED, [*t, -1], prediction=kind, noises=NOISES),
    )


@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_ddpm_agrees(kind: str, clip: bool, steps: int, given_noise: Any) -> None:
    """Its posterior mean follows from the clipped x0, as ours does."""
    case = NoisyCase(diffusers.DDPMScheduler, {"clip_sample": clip, "prediction_type": kind}, steps)
    agree(
        given_noise(case),
        lambda t: ours(
            "ddpm",
            LINEAR,
            [*t, -1],
            prediction=kind,
            clip=1.0 if clip else None,
            noises=NOISES,
        ),
    )


# == Where we differ on purpose ====================================================================


def test_our_exact_third_order_is_not_diffusers_dpmpp_3m() -> None:
    """Its second difference is half of what third order takes; docs/orders.md shows both."""
    with in_float64(MULTISTEP):
        theirs, times = run(MULTISTEP(**BETAS, solver_order=3), 12)
    exact = ours("dpmpp_3m_exact", SCALED, [*times, -1])
    assert (exact - theirs).abs().max() > 1e-4


def test_diffusers_deis_falls_to_first_order_at_the_end_of_short_runs_and_ours_does_not() -> None:
    """Below 15 steps, unless told otherwise; it gets no lower order to fall to at order 1."""
    kind = diffusers.DEISMultistepScheduler
    with in_float64(kind):
        theirs, times = run(kind(**BETAS, solver_order=3), 10)
    mine = ours("deis", SCALED, [*times, 0], order=3, kind="logrhoab")
    assert (mine - theirs).abs().max() > 1e-5


def test_diffusers_unipc_bh1_fails_at_the_clean_end_and_ours_does_not() -> None:
    """The step to sigma = 0 is of first order, where B(h) does not matter."""
    kind = diffusers.UniPCMultistepScheduler
    theirs, times = run(kind(**BETAS, solver_type="bh1"), 10)
    assert theirs.isnan().all()
    assert ours("unipc", SCALED, [*times, -1], variant="bh1").isfinite().all()


def test_diffusers_deis_ends_at_residual_noise_and_ours_ends_clean() -> None:
    kind = diffusers.DEISMultistepScheduler
    scheduler = kind(**BETAS)
    scheduler.set_timesteps(10)
    left = float(scheduler.sigmas[-1])
    assert left == pytest.approx(SCALED.sigma(0) / SCALED.alpha(0), rel=1e-4)
    sampler = Sampler(network, SCALED, solver="deis", steps=10, kind="logrhoab")
    assert SCALED.sigma(sampler.tableau.times[-1]) == 0


# == Churn: Karras et al. 2022, algorithm 2, line by line ==========================================


def algorithm_2(
    times: list[float],
    noises: Iterator[torch.Tensor],
    *,
    churn: float,
    s_min: float,
    s_max: float,
    s_noise: float,
    heun: bool,
) -> torch.Tensor:
    def D(x: torch.Tensor, t: float) -> torch.Tensor:
        return x - t * network(x, t)

    N = len(times) - 1
    x = times[0] * X
    for i in range(N):
        t, t_next = times[i], times[i + 1]
        gamma = min(churn / N, math.sqrt(2) - 1) if s_min <= t <= s_max else 0.0
        epsilon = s_noise * next(noises) if gamma > 0 else torch.zeros_like(x)
        t_hat = t + gamma * t
        x_hat = x + math.sqrt(t_hat**2 - t**2) * epsilon
        d = (x_hat - D(x_hat, t_hat)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if heun and t_next != 0:
            d_next = (x - D(x, t_next)) / t_next
            x = x_hat + (t_next - t_hat) * (d / 2 + d_next / 2)
    return x


@pytest.mark.parametrize("churn", [0.0, 4.0, 40.0])
@pytest.mark.parametrize("solver", ["euler_churn", "heun_churn"])
def test_churn_is_algorithm_2(solver: str, churn: float) -> None:
    schedule = NoiseSchedule.edm()
    times = [float(t) for t in schedule.times(18)]
    options = {"churn": churn, "s_min": 0.05, "s_max": 50.0, "s_noise": 1.003}
    expected = algorithm_2(times, iter(NOISES), heun=solver == "heun_churn", **options)
    mine = ours(solver, schedule, times, noises=NOISES, **options)
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9)


def test_churn_never_goes_past_what_the_network_was_trained_on() -> None:
    """Algorithm 2 would ask the network about sigma = 113 at the first step; ours stays at 80."""
    options = {"churn": 1000.0, "s_max": math.inf}
    sampler = Sampler(network, NoiseSchedule.edm(), solver="euler_churn", steps=18, **options)
    told = [stage.time for stage in sampler.tableau.stages[1:]]
    assert told[:2] == [80.0, 80.0] and max(told) == 80.0
    assert told[2] / sampler.tableau.times[2] == pytest.approx(math.sqrt(2), rel=1e-12)


# == k-diffusion ===================================================================================


@pytest.mark.parametrize("steps", [5, 10])
def test_the_package_agrees_on_a_ve_denoiser(steps: int) -> None:
    """Its functions on a VE denoiser, where the package is installed."""
    sampling = pytest.importorskip("k_diffusion.sampling")
    schedule = NoiseSchedule.edm()
    sigmas = torch.from_numpy(schedule.times(steps))
    denoised = lambda x, sigma, **_: x - sigma.view(-1, 1, 1, 1) * network(x, sigma)
    for solver, function in (
        ("euler", "sample_euler"),
        ("heun", "sample_heun"),
        ("ipndm_v", "sample_lms"),
        ("dpmpp_2m", "sample_dpmpp_2m"),
    ):
        theirs = getattr(sampling, function)(denoised, X * 80.0, sigmas, disable=True)
        # Its Lagrange weights come from a quadrature with a relative tolerance of 1e-4.
        tolerance = 1e-3 if solver == "ipndm_v" else 1e-9
        torch.testing.assert_close(ours(solver, schedule, sigmas), theirs, rtol=0, atol=tolerance)
