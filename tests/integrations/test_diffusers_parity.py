"""Our solvers against diffusers' schedulers on one network, and where we differ on purpose."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from fastdiff import NoiseSchedule, Sampler, build_tableau, register_solver
from fastdiff.solvers import registry
from fastdiff.tableau import Form, Trace
from tests.helpers.oracles import GAUSSIAN
from tests.helpers.parity import KINDS, NOISES, Case, X, agree, in_float64, network, ours
from tests.helpers.schedules import BETAS, LINEAR


def diffusers_ddim(trace: Trace, eta: float = 0.0) -> Form:
    """diffusers' DDIM: x0 is clipped, yet the raw epsilon is kept."""
    x = trace.x
    for t, u in trace.intervals:
        x0 = trace.net(x, t)
        epsilon = (x - trace.alpha(t) * trace.unclipped()) / trace.sigma(t)
        ratio = trace.alpha(t) * trace.sigma(u) / (trace.alpha(u) * trace.sigma(t))
        fresh = eta * trace.sigma(u) * (1 - ratio**2) ** 0.5
        kept = (trace.sigma(u) ** 2 - fresh**2) ** 0.5
        x = trace.alpha(u) * x0 + kept * epsilon + fresh * trace.noise()
    return x


@pytest.fixture(autouse=True)
def _registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_SOLVERS", dict(registry._SOLVERS))
    register_solver("diffusers_ddim_for_a_test", diffusers_ddim, solves_for="sample")


# == Where we agree ================================================================================


@pytest.mark.parametrize("steps", [1, 10])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_agrees(kind: str, eta: float, clip: bool, steps: int) -> None:
    case = Case(
        diffusers.DDIMScheduler,
        {"clip_sample": clip, "prediction_type": kind},
        steps,
        eta=eta,
        noises=NOISES if eta else None,
    )
    solver = "diffusers_ddim_for_a_test" if clip else "ddim"
    agree(
        case,
        lambda times: ours(
            solver,
            LINEAR,
            [*times, -1],
            prediction=kind,
            eta=eta,
            clip=1.0 if clip else None,
            noises=NOISES if eta else None,
        ),
    )


def test_ddim_with_the_epsilon_of_the_clipped_x0() -> None:
    """`use_clipped_model_output`: our own clipping."""
    case = Case(diffusers.DDIMScheduler, {}, 10, use_clipped_model_output=True)
    agree(case, lambda times: ours("ddim", LINEAR, [*times, -1], clip=1.0))


def test_ddim_as_stable_diffusion_has_it() -> None:
    """Offset one, ending at alpha-bar[0]."""
    config = {**BETAS, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    case = Case(diffusers.DDIMScheduler, config, 10)
    schedule = NoiseSchedule.scaled_linear_beta()
    sampler = Sampler(
        network,
        schedule,
        solver="ddim",
        steps=10,
        spacing="leading",
        convention="offset",
        dtype=torch.float64,
    )
    agree(case, lambda times: sampler(X))


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_dpmpp_2m_agrees(kind: str, steps: int) -> None:
    case = Case(diffusers.DPMSolverMultistepScheduler, {**BETAS, "prediction_type": kind}, steps)
    schedule = NoiseSchedule.scaled_linear_beta()
    agree(case, lambda times: ours("dpmpp_2m", schedule, [*times, -1], prediction=kind))


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_unipc_agrees(kind: str, steps: int) -> None:
    case = Case(diffusers.UniPCMultistepScheduler, {**BETAS, "prediction_type": kind}, steps)
    schedule = NoiseSchedule.scaled_linear_beta()
    agree(case, lambda times: ours("unipc", schedule, [*times, -1], prediction=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_euler_agrees(kind: str, steps: int) -> None:
    """diffusers' state is x / alpha = x sqrt(1 + sigma^2)."""
    case = Case(
        diffusers.EulerDiscreteScheduler,
        {**BETAS, "prediction_type": kind, "timestep_spacing": "trailing"},
        steps,
        start=lambda sigma: (1 + sigma**2) ** 0.5,
    )
    schedule = NoiseSchedule.scaled_linear_beta()
    agree(case, lambda times: ours("euler", schedule, [*times, -1], prediction=kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [1, 2, 10])
def test_heun_agrees(kind: str, steps: int) -> None:
    case = Case(
        diffusers.HeunDiscreteScheduler,
        {**BETAS, "prediction_type": kind, "timestep_spacing": "trailing"},
        steps,
        start=lambda sigma: (1 + sigma**2) ** 0.5,
    )
    schedule = NoiseSchedule.scaled_linear_beta()
    agree(
        case,
        lambda times: ours(
            "heun", schedule, [*sorted(set(times), reverse=True), -1], prediction=kind
        ),
    )


def test_dpmpp_2m_and_unipc_on_coarse_steps_to_clean_images_are_no_better_than_diffusers() -> None:
    """Leading steps on linear betas end with a leap in log-SNR: their extrapolation overshoots.

    DDIM gives .67228 there and the exact flow .79758.
    """
    times = LINEAR.times(10, spacing="leading")
    epsilon = lambda x, t: GAUSSIAN.epsilon(x, *(f(float(t)) for f in (LINEAR.alpha, LINEAR.sigma)))
    for solver, kind, expected in (
        ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler, 0.98756),
        ("unipc", diffusers.UniPCMultistepScheduler, 0.99884),
    ):
        with in_float64(kind):
            scheduler = kind(beta_schedule="linear")
            scheduler.set_timesteps(10)
            sigma = LINEAR.sigma(times) / LINEAR.alpha(times)
            scheduler.sigmas = torch.from_numpy(sigma)
            scheduler.timesteps = torch.from_numpy(times[:-1])
            x = torch.ones(1, 1, 1, 1, dtype=torch.float64)
            for t in scheduler.timesteps:
                x = scheduler.step(epsilon(x, t), t, x).prev_sample
        sampler = Sampler(
            lambda x, t: epsilon(x, t[0]), LINEAR, solver=solver, spacing=times, dtype=torch.float64
        )
        mine = sampler(torch.ones(1, 1, 1, 1, dtype=torch.float64)).item()
        assert mine == pytest.approx(x.item(), abs=1e-12)
        assert mine == pytest.approx(expected, abs=1e-5)


# == Where we differ on purpose ====================================================================


def pndm(steps: int, x: torch.Tensor, f: Callable[..., torch.Tensor], **config: Any) -> Any:
    """diffusers' PNDM in float64 from x; returns the states after every call, and the times."""
    with in_float64(diffusers.PNDMScheduler):
        scheduler = diffusers.PNDMScheduler(**config)
        scheduler.set_timesteps(steps)
        states = [x]
        for t in scheduler.timesteps:
            states.append(scheduler.step(f(states[-1], t), t, states[-1]).prev_sample)
    return states, scheduler.timesteps.tolist()


def test_plms_agrees_where_diffusers_has_no_defect() -> None:
    """Leading steps and an end at alpha-bar = 1: the same method, call by call."""
    states, times = pndm(10, X, network, skip_prk_steps=True, set_alpha_to_one=True)
    tableau = build_tableau("plms", LINEAR, 10, spacing="leading")
    # The same calls at the same times but for the order of the first two.
    assert sorted(times) == sorted(int(s.time) for s in tableau.stages[1:])
    mine = Sampler(network, tableau=tableau, dtype=torch.float64)(X)
    torch.testing.assert_close(mine, states[-1], rtol=0, atol=1e-9)


def test_f_pndm_agrees_where_diffusers_has_no_defect() -> None:
    states, times = pndm(10, X, network, set_alpha_to_one=True)
    tableau = build_tableau("f_pndm", LINEAR, 10, spacing="leading")
    assert times == [int(s.time) for s in tableau.stages[1:]]
    mine = Sampler(network, tableau=tableau, dtype=torch.float64)(X)
    torch.testing.assert_close(mine, states[-1], rtol=0, atol=1e-9)


def test_diffusers_pndm_wastes_its_last_call_and_ours_does_not() -> None:
    """By default it goes from time 0 to alpha-bar[0], which is time 0."""
    states, times = pndm(10, X, network, skip_prk_steps=True)
    assert times[-1] == 0
    torch.testing.assert_close(states[-1], states[-2], rtol=0, atol=1e-15)
    one, _ = pndm(1, X, network, skip_prk_steps=True)
    torch.testing.assert_close(one[-1], X, rtol=0, atol=1e-15)  # one step returns the noise
    for solver in ("plms", "f_pndm", "s_pndm"):
        for steps in (1, 10):
            tableau = build_tableau(solver, LINEAR, steps, spacing="leading")
            assert tableau.stages[-1].time == 0 and not tableau.stages[-1].is_identity
            assert tableau.times[-1] == -1


def test_diffusers_pndm_moves_to_other_times_than_it_evaluates_at() -> None:
    """Odd strides: the sample goes to 963, the network is asked at 962. Ours is asked at 962.5."""
    seen: list[tuple[float, float]] = []

    def exact(x: torch.Tensor, t: Any) -> torch.Tensor:
        return torch.full_like(x, 0.5)  # a constant epsilon, so that x tells its time

    states, times = pndm(40, X[:1, :1, :1, :1], exact)
    x, t = states[1], times[1]
    start = times[0]
    assert (start, t) == (975, 962)

    def after(time: float) -> torch.Tensor:
        x0 = (states[0] - LINEAR.sigma(start) * 0.5) / LINEAR.alpha(start)
        return LINEAR.alpha(time) * x0 + LINEAR.sigma(time) * 0.5

    torch.testing.assert_close(x, after(963), rtol=0, atol=1e-9)
    tableau = build_tableau("f_pndm", LINEAR, 40, spacing="leading")
    assert tableau.stages[2].time == 962.5
    sampler = Sampler(exact, tableau=tableau, dtype=torch.float64)
    sampler(states[0], callback=lambda p: seen.append((p.time, p.state.item())))
    assert seen[0][1] == pytest.approx(after(962.5).item(), abs=1e-9)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_diffusers_pndm_ignores_its_own_grid_and_ours_does_not(spacing: str) -> None:
    """It steps by T // S whatever the spacing, so its samples drift off the grid."""
    steps = 30
    with in_float64(diffusers.PNDMScheduler):
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, timestep_spacing=spacing)
        scheduler.set_timesteps(steps)
    times = list(dict.fromkeys(scheduler.timesteps.tolist()))
    strides = {a - b for a, b in pairwise(times)}
    assert strides != {1000 // steps}  # which is what it assumes
    # With a constant epsilon every transfer is exact: the end shows where it believes it is.
    constant = lambda x, t: torch.full_like(x, 0.5)
    states, _ = pndm(
        steps, X, constant, skip_prk_steps=True, timestep_spacing=spacing, set_alpha_to_one=True
    )
    a, s = LINEAR.alpha(times[0]), LINEAR.sigma(times[0])
    exact = (X - 0.5 * s) / a
    assert (states[-1] - exact).abs().max() > 0.02 * exact.abs().max()
    sampler = Sampler(constant, LINEAR, solver="plms", spacing=[*times, -1], dtype=torch.float64)
    torch.testing.assert_close(sampler(X), exact, rtol=1e-9, atol=1e-9)


def test_restarting_diffusers_pndm_in_the_middle_lags_and_ours_does_not() -> None:
    """Image to image slices its times; it then repeats the first step and stays one behind."""
    x0 = 0.2
    epsilon = lambda x, t: GAUSSIAN.epsilon(x, *(f(float(t)) for f in (LINEAR.alpha, LINEAR.sigma)))
    start = 180.0
    noisy = LINEAR.alpha(start) * x0 + LINEAR.sigma(start) * X
    exact = GAUSSIAN.flow(noisy, (LINEAR.alpha(start), LINEAR.sigma(start)), (1.0, 0.0))
    with in_float64(diffusers.PNDMScheduler):
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, set_alpha_to_one=True)
        scheduler.set_timesteps(50)
        x = noisy
        for t in scheduler.timesteps[scheduler.timesteps.tolist().index(int(start)) :]:
            x = scheduler.step(epsilon(x, t), t, x).prev_sample
    sampler = Sampler(
        lambda x, t: epsilon(x, t[0]),
        LINEAR,
        solver="plms",
        spacing=np.arange(start, -21, -20).clip(min=-1),
        from_image=True,
        dtype=torch.float64,
    )
    mine = sampler(X, image=torch.full_like(X, x0))
    error, theirs = ((y - exact).square().mean().sqrt() for y in (mine, x))
    assert theirs > 5 * error


def test_diffusers_pndm_blends_raw_v_and_ours_converts_first() -> None:
    """A v-network and the epsilon-network it stands for: diffusers gives two results, we one."""

    def epsilon(x: torch.Tensor, t: Any) -> torch.Tensor:
        return GAUSSIAN.epsilon(x, LINEAR.alpha(float(t)), LINEAR.sigma(float(t)))

    def velocity(x: torch.Tensor, t: Any) -> torch.Tensor:
        alpha, sigma, e = LINEAR.alpha(float(t)), LINEAR.sigma(float(t)), epsilon(x, t)
        return alpha * e - sigma * (x - sigma * e) / alpha

    config = {"skip_prk_steps": True, "set_alpha_to_one": True}
    from_epsilon = pndm(50, X, epsilon, **config)[0][-1]
    from_v = pndm(50, X, velocity, **config, prediction_type="v_prediction")[0][-1]
    assert (from_v - from_epsilon).abs().max() > 1e-2
    for kind, f in (("epsilon", epsilon), ("v_prediction", velocity)):
        sampler = Sampler(
            lambda x, t, f=f: f(x, t[0]),
            LINEAR,
            solver="plms",
            steps=50,
            spacing="leading",
            prediction=kind,
            dtype=torch.float64,
        )
        torch.testing.assert_close(sampler(X), from_epsilon, rtol=0, atol=1e-9)


def test_diffusers_pndm_fails_below_four_steps_and_ours_does_not() -> None:
    with pytest.raises(ValueError):
        diffusers.PNDMScheduler().set_timesteps(3)
    for steps in (1, 2, 3):
        assert ours("f_pndm", LINEAR, None, steps=steps).isfinite().all()
