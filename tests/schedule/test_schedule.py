"""Noise schedules against formulas written out here and against diffusers' tables."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import NoiseSchedule
from fastdiff.schedule import SPACINGS
from tests.helpers.asserts import refused

T = 1000
MAKERS = {
    "linear": NoiseSchedule.linear_beta,
    "scaled_linear": NoiseSchedule.scaled_linear_beta,
    "cosine": NoiseSchedule.cosine,
    "logsnr_cosine": NoiseSchedule.logsnr_cosine,
    "ve": NoiseSchedule.ve,
    "edm": NoiseSchedule.edm,
    "flow": NoiseSchedule.flow,
    "flow_shifted": lambda: NoiseSchedule.flow(3.0),
    "table": lambda: NoiseSchedule.from_alphas_cumprod(np.linspace(0.99, 0.0, 100)),
}
DISCRETE = ("linear", "scaled_linear", "cosine", "table")


@pytest.fixture(params=MAKERS)
def schedule(request: pytest.FixtureRequest) -> NoiseSchedule:
    return MAKERS[request.param]()


def grid(schedule: NoiseSchedule, count: int = 50) -> np.ndarray:
    """Times strictly between the noisiest and the least noisy one trained on."""
    return np.linspace(schedule.first, schedule.last, count + 2)[1:-1]


# == Values ========================================================================================


def alpha_bar(betas: np.ndarray) -> np.ndarray:
    return np.cumprod(1 - betas.astype(np.longdouble))


def cosine_betas() -> np.ndarray:
    f = np.cos((np.arange(T + 1, dtype=np.longdouble) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - f[1:] / f[:-1], 0.999)


@pytest.mark.parametrize(
    ("schedule", "betas", "kind"),
    [
        (NoiseSchedule.linear_beta(), np.linspace(1e-4, 0.02, T), "linear"),
        (
            NoiseSchedule.scaled_linear_beta(),
            np.linspace(math.sqrt(0.00085), math.sqrt(0.012), T) ** 2,
            "scaled_linear",
        ),
        (NoiseSchedule.cosine(), cosine_betas(), "squaredcos_cap_v2"),
    ],
)
def test_beta_schedules_are_their_formulas(
    schedule: NoiseSchedule, betas: np.ndarray, kind: str
) -> None:
    bar, t = alpha_bar(betas), np.arange(T, dtype=float)
    np.testing.assert_allclose(schedule.alpha(t) ** 2, bar.astype(float), rtol=1e-12)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, (1 - bar).astype(float), rtol=1e-11)
    np.testing.assert_allclose(
        schedule.logsnr(t), np.log(bar / (1 - bar)).astype(float), rtol=1e-12, atol=1e-12
    )
    scaled = {"beta_start": 0.00085, "beta_end": 0.012} if kind == "scaled_linear" else {}
    theirs = diffusers.DDPMScheduler(beta_schedule=kind, **scaled).alphas_cumprod
    assert theirs.dtype == torch.float32
    np.testing.assert_allclose(schedule.alpha(t) ** 2, theirs.numpy(), rtol=2e-4, atol=1e-6)


def test_alpha_bars_are_the_known_ones() -> None:
    linear, scaled = NoiseSchedule.linear_beta(), NoiseSchedule.scaled_linear_beta()
    assert linear.alpha(0) ** 2 == pytest.approx(0.9999, abs=1e-15)
    assert linear.alpha(999) ** 2 == pytest.approx(4.0358e-5, rel=1e-5)
    assert scaled.alpha(999) ** 2 == pytest.approx(0.0046601, rel=1e-5)
    assert NoiseSchedule.cosine().alpha(999) ** 2 == pytest.approx(2.4e-9, rel=2e-2)


@pytest.mark.parametrize("name", DISCRETE)
def test_the_clean_time_has_no_noise_and_half_times_interpolate_log_alpha_bar(name: str) -> None:
    schedule = MAKERS[name]()
    assert (schedule.alpha(-1), schedule.sigma(-1), schedule.logsnr(-1)) == (1.0, 0.0, math.inf)
    for t in (0, 7, 40):
        a, b = schedule.alpha(t) ** 2, schedule.alpha(t + 1) ** 2
        assert schedule.alpha(t + 0.5) ** 2 == pytest.approx(math.sqrt(a * b), rel=1e-14)
        assert schedule.alpha(t + 0.25) ** 2 == pytest.approx(a**0.75 * b**0.25, rel=1e-14)


def test_the_official_convention_is_one_index_noisier() -> None:
    schedule = NoiseSchedule.linear_beta()
    official = schedule.with_convention("published")
    for t in (-1, 0, 42, 998):
        assert official.alpha(t) == schedule.alpha(t + 1)
    assert official.alpha(962.5) == schedule.alpha(963)  # fractions are cut off
    assert official.alpha(torch.tensor(962.5)).item() == schedule.alpha(963)
    assert official.sigma(-1) == pytest.approx(0.01)  # the residual noise of the published code


def test_logsnr_cosine_is_its_formula() -> None:
    schedule = NoiseSchedule.logsnr_cosine(-20.0, 20.0)
    t = np.linspace(0, 1, 101)
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    expected = -2 * np.log(np.tan(a * t + b))
    np.testing.assert_allclose(schedule.logsnr(t), expected, rtol=1e-11, atol=1e-11)
    assert schedule.logsnr(0.0) == pytest.approx(20.0, rel=1e-12)
    assert schedule.logsnr(1.0) == pytest.approx(-20.0, rel=1e-12)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 3, 18, 40])
def test_edm_visits_the_sigmas_of_equation_5(steps: int) -> None:
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    i = np.arange(steps)
    sigmas = (high + i / max(steps - 1, 1) * (low - high)) ** 7
    times = NoiseSchedule.edm().times(steps)
    np.testing.assert_allclose(times[:-1], sigmas, rtol=1e-12)
    assert times[-1] == 0


def test_ve_steps_are_geometric() -> None:
    times = NoiseSchedule.ve(0.01, 50.0).times(11)
    np.testing.assert_allclose(times[1:-1] / times[:-2], (0.01 / 50) ** (1 / 10), rtol=1e-12)
    assert (times[0], times[-2], times[-1]) == (50.0, 0.01, 0.0)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_rates_need_no_gradients_of_the_caller(mode: Callable[[], Any]) -> None:
    schedule = NoiseSchedule.cosine()
    with mode():
        assert schedule.rates(500.0) == NoiseSchedule.cosine().rates(500.0)
        found = schedule.rates(500.0)
    assert found == schedule.rates(500.0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
def test_flow_is_its_formula(shift: float) -> None:
    schedule = NoiseSchedule.flow(shift)
    t = np.linspace(0.001, 0.999, 99)
    np.testing.assert_allclose(schedule.alpha(t), 1 - t, rtol=1e-14)
    np.testing.assert_allclose(schedule.sigma(t), t, rtol=1e-14)
    uniform = np.linspace(1, 0, 11)
    expected = shift * uniform / (1 + (shift - 1) * uniform)
    np.testing.assert_allclose(schedule.times(10), expected, rtol=1e-14, atol=1e-16)
    # Starting at a shifted time visits the rest of the same curve.
    np.testing.assert_allclose(schedule.times(6, start=expected[4]), expected[4:], atol=1e-14)


def test_zero_terminal_snr_is_that_of_lin_et_al() -> None:
    """sqrt(alpha-bar) shifted and scaled so that it ends at zero and begins where it did."""
    plain = NoiseSchedule.scaled_linear_beta()
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True,
    )
    schedule = NoiseSchedule.from_diffusers(scheduler)
    assert schedule.zero_terminal_snr and not plain.zero_terminal_snr
    assert schedule.alpha(0) == pytest.approx(plain.alpha(0), rel=1e-14)
    assert 0 < schedule.alpha(999) < 1.001e-6 and schedule.sigma(999) == pytest.approx(1, abs=1e-12)
    root = np.array([plain.alpha(t) for t in range(T)])
    expected = (root - root[-1]) * root[0] / (root[0] - root[-1])
    np.testing.assert_allclose(schedule.alpha(np.arange(T - 1.0)), expected[:-1], rtol=1e-12)
    betas = rescale_zero_terminal_snr(torch.linspace(0.00085**0.5, 0.012**0.5, T).double() ** 2)
    theirs = torch.cumprod(1 - betas, 0)[:-1].numpy()
    np.testing.assert_allclose(schedule.alpha(np.arange(T - 1.0)) ** 2, theirs, rtol=1e-4)


def test_which_schedules_scale_the_initial_noise() -> None:
    for name in ("linear", "cosine", "logsnr_cosine"):
        assert MAKERS[name]().prior_scale(MAKERS[name]().first) == 1.0
    assert NoiseSchedule.edm().prior_scale(80.0) == pytest.approx(80.0, rel=1e-14)
    assert NoiseSchedule.flow().prior_scale(1.0) == 1.0
    assert NoiseSchedule.flow().prior_scale(0.25) == pytest.approx(0.25)


# == Numbers, arrays and tensors ===================================================================


def test_scalars_arrays_and_tensors_agree(schedule: NoiseSchedule) -> None:
    t = grid(schedule)
    for name in ("alpha", "sigma", "logsnr", "log_alpha", "log_sigma"):
        function = getattr(schedule, name)
        array, tensor = function(t), function(torch.from_numpy(t))
        assert array.dtype == np.float64 and tensor.dtype == torch.float64
        np.testing.assert_allclose(tensor.numpy(), array, rtol=1e-13, atol=1e-14)
        numbers = [function(float(each)) for each in t]
        assert all(type(number) is float for number in numbers)
        np.testing.assert_array_equal(numbers, array)
        assert function(t.reshape(2, -1)).shape == (2, len(t) // 2)


def test_whole_numbers_are_times_too(schedule: NoiseSchedule) -> None:
    t = 1 if schedule.first >= 1 else 0
    for function in (schedule.alpha, schedule.sigma):
        for value in (t, np.int64(t), torch.tensor(t)):
            assert float(function(value)) == pytest.approx(function(float(t)), rel=1e-14)


def test_tensors_carry_gradients() -> None:
    t = torch.tensor([0.2, 0.7], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(NoiseSchedule.logsnr_cosine().logsnr, (t,))
    t = torch.tensor([10.3, 700.6], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(NoiseSchedule.linear_beta().log_sigma, (t,))


def test_time_inverts_logsnr(schedule: NoiseSchedule) -> None:
    t = grid(schedule)
    np.testing.assert_allclose(schedule.time(schedule.logsnr(t)), t, rtol=1e-9, atol=1e-9)
    assert type(schedule.time(0.5)) is float


def test_logsnr_falls_with_time(schedule: NoiseSchedule) -> None:
    assert (np.diff(schedule.logsnr(np.sort(grid(schedule)))) < 0).all()


# == From diffusers ================================================================================

BETAS = {"beta_start": 0.0009, "beta_end": 0.013, "beta_schedule": "scaled_linear"}
DISCRETE_SCHEDULERS = (
    "DDIMScheduler",
    "DDPMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "TCDScheduler",
)


@pytest.mark.parametrize("name", DISCRETE_SCHEDULERS)
def test_from_diffusers_has_the_same_noise_levels(name: str) -> None:
    scheduler = getattr(diffusers, name)(**BETAS)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    t = np.arange(T, dtype=float)
    np.testing.assert_allclose(schedule.alpha(t) ** 2, scheduler.alphas_cumprod.numpy(), rtol=1e-4)
    assert schedule.spacing == scheduler.config.get("timestep_spacing", schedule.spacing)
    assert NoiseSchedule.from_diffusers(scheduler.config) == schedule  # the config says it all
    assert len(schedule.times(7)) == 8


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(beta_schedule="sigmoid"),
        diffusers.DDIMScheduler(trained_betas=np.linspace(1e-3, 0.01, 50).tolist()),
        diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=300),
        diffusers.DDPMScheduler(num_train_timesteps=20),
    ],
    ids=["sigmoid", "trained", "cosine", "short"],
)
def test_from_diffusers_with_other_betas(scheduler: diffusers.SchedulerMixin) -> None:
    theirs = scheduler.alphas_cumprod.numpy()
    schedule = NoiseSchedule.from_diffusers(scheduler)
    assert schedule.first == len(theirs) - 1
    ours = schedule.alpha(np.arange(len(theirs), dtype=float)) ** 2
    np.testing.assert_allclose(ours, theirs, rtol=2e-4)


def test_from_diffusers_flow_matching() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    for given_ in (scheduler, {**scheduler.config, "_class_name": type(scheduler).__name__}):
        schedule = NoiseSchedule.from_diffusers(given_)
        assert schedule.time_scale == 1000
        # diffusers ends its grid at the shifted 1/1000 and then jumps to zero; ours goes on evenly.
        spaced = np.linspace(1, 1 / 1000, 8)
        expected = 3 * spaced / (1 + 2 * spaced)
        np.testing.assert_allclose(schedule.times(spacing=[*expected, 0])[:-1], expected)
        np.testing.assert_allclose(scheduler.timesteps.numpy()[0], 1000 * schedule.first)
    unipc = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    )
    assert NoiseSchedule.from_diffusers(unipc).times(2)[1] == pytest.approx(5 * 0.5 / 3)


def test_from_diffusers_variance_exploding() -> None:
    ve = NoiseSchedule.from_diffusers(diffusers.ScoreSdeVeScheduler(sigma_min=0.02, sigma_max=90.0))
    assert (ve.first, ve.last, ve.alpha(3.0)) == (90.0, 0.02, 1.0)
    scheduler = diffusers.EDMEulerScheduler(sigma_min=0.003, sigma_max=70.0)
    scheduler.set_timesteps(9)
    edm = NoiseSchedule.from_diffusers(scheduler)
    np.testing.assert_allclose(edm.times(9), scheduler.sigmas.numpy(), rtol=1e-5)


def test_from_diffusers_refuses_what_has_no_schedule() -> None:
    for scheduler in (diffusers.VQDiffusionScheduler(10), {}, 3):
        with pytest.raises(TypeError, match="scheduler must be a diffusers scheduler"):
            NoiseSchedule.from_diffusers(scheduler)
    with pytest.raises(TypeError, match="scheduler must be"):  # its config does not say the betas
        NoiseSchedule.from_diffusers(diffusers.DDPMScheduler(beta_schedule="sigmoid").config)


# == Times =========================================================================================


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_steps_means_exactly_that_many_intervals(name: str, data: st.DataObject) -> None:
    schedule = MAKERS[name]()
    discrete = name in DISCRETE
    most = int(schedule.first) + 1 if discrete else 1000
    steps = data.draw(st.integers(1, most))
    spacing = data.draw(
        st.sampled_from([s for s in SPACINGS if discrete or s not in ("leading", "quadratic")])
    )
    low, end = schedule.last, schedule.last if schedule.clean is None else schedule.clean
    start = data.draw(st.none() | st.floats(low, schedule.first).filter(lambda t: t > low + 1e-3))
    try:
        times = schedule.times(steps, spacing=spacing, start=start)
    except ValueError as error:  # only where whole times run out
        assert re.search("steps must be at most|leaves no room", str(error))
        crowded = discrete and start is not None and steps > start
        assert crowded or (spacing == "quadratic" and steps > 5)
        return
    assert times.dtype == np.float64 and times.shape == (steps + 1,)
    assert (np.diff(times) < 0).all()
    assert times[-1] == end
    whole = discrete and spacing in ("leading", "trailing", "quadratic")
    if start is not None:
        assert times[0] == start
    elif not whole or spacing == "trailing":
        assert times[0] == schedule.first
    if whole:
        np.testing.assert_array_equal(times[1:], np.round(times[1:]))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 10, 25, 30, 37, 50, 333, 999, 1000])
def test_whole_number_grids_are_those_of_diffusers(steps: int) -> None:
    schedule = NoiseSchedule.linear_beta()
    scheduler = diffusers.DDIMScheduler(timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    leading = schedule.times(steps, spacing="leading")
    np.testing.assert_array_equal(leading[:-1], scheduler.timesteps.numpy())
    trailing = schedule.times(steps, spacing="trailing")
    expected = np.round(T - np.arange(steps) * T / steps) - 1
    np.testing.assert_array_equal(trailing[:-1], expected)
    if steps != 1:
        offset = diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=1)
        offset.set_timesteps(min(steps, 999))
        if offset.timesteps.max() < T:
            sd = schedule.times(min(steps, 999), spacing="leading", convention="offset")
            np.testing.assert_array_equal(sd[:-1], offset.timesteps.numpy())
            assert sd[-1] == 0


@pytest.mark.parametrize(("steps", "kept"), [(50, 30), (20, 3), (40, 40), (10, 1)])
def test_starting_in_the_middle_of_a_leading_grid_visits_the_rest_of_it(
    steps: int, kept: int
) -> None:
    """As diffusers' image-to-image pipelines slice it."""
    for convention, offset in (("aligned", 0), ("offset", 1)):
        scheduler = diffusers.DDIMScheduler(timestep_spacing="leading", steps_offset=offset)
        scheduler.set_timesteps(steps)
        rest = scheduler.timesteps.numpy()[-kept:]
        times = NoiseSchedule.linear_beta().times(
            kept, spacing="leading", start=rest[0], convention=convention
        )
        np.testing.assert_array_equal(times, [*rest, offset - 1])


def test_quadratic_times_are_those_of_ddim() -> None:
    expected = (np.linspace(0, np.sqrt(T * 0.8), 10) ** 2).astype(int)[::-1]
    times = NoiseSchedule.linear_beta().times(10, spacing="quadratic")
    np.testing.assert_array_equal(times, [*expected, -1])


@pytest.mark.parametrize("spacing", ["karras", "logsnr", "linspace"])
def test_spacings_are_uniform_in_what_they_are_named_after(spacing: str) -> None:
    for schedule in (NoiseSchedule.linear_beta(), NoiseSchedule.ve(), NoiseSchedule.flow()):
        times = schedule.times(12, spacing=spacing)[:-1]
        logsnr = schedule.logsnr(times)
        mark = {"linspace": times, "logsnr": logsnr, "karras": np.exp(-logsnr / 14)}[spacing]
        np.testing.assert_allclose(np.diff(mark), np.diff(mark)[0], rtol=1e-6)


def test_the_official_grid() -> None:
    """Stride T // S, so that there can be more steps than asked for; some S do not work at all."""
    schedule = NoiseSchedule.linear_beta()
    broken = {3, 9, 27, 36, 37, *range(101, 112), *range(251, 334), *range(501, 1001)}
    for steps in range(1, T + 1):
        if steps in broken:
            with pytest.raises(ValueError, match=f"steps = {steps} puts the published grid on"):
                schedule.times(steps, spacing="leading", convention="published")
            continue
        times = schedule.times(steps, spacing="leading", convention="published")
        np.testing.assert_array_equal(times, [*range(0, T, T // steps)][::-1] + [-1])
    assert len(schedule.times(30, spacing="leading", convention="published")) - 1 == 31
    assert len(schedule.times(50, spacing="leading", convention="published")) - 1 == 50


def test_given_times_are_taken_as_they_are() -> None:
    schedule = NoiseSchedule.linear_beta()
    times = schedule.times(spacing=[999, 500.5, 3, -1])
    np.testing.assert_array_equal(times, [999.0, 500.5, 3.0, -1.0])
    np.testing.assert_array_equal(schedule.times(3, spacing=tuple(times)), times)


# == Refusals ======================================================================================


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, None, "10"])
def test_steps_must_be_a_positive_whole_number(schedule: NoiseSchedule, steps: object) -> None:
    with refused("steps must be a whole number >= 1; got"):
        schedule.times(steps)


def test_bad_times_are_refused() -> None:
    schedule = NoiseSchedule.linear_beta()
    with refused("steps must be at most 1000"):
        schedule.times(1001)
    with refused("steps must be at most 101.*from 100"):
        schedule.times(102, start=100)
    with refused("spacing must be one of .*; got 'trailling'"):
        schedule.times(10, spacing="trailling")
    with refused("convention must be one of .*; got 'pndm'"):
        schedule.times(10, convention="pndm")
    with refused('convention "?\'?published.* goes with spacing "leading"'):
        schedule.times(10, spacing="karras", convention="published")
    with refused('start does not go with convention "published"'):
        schedule.times(10, spacing="leading", convention="published", start=500)
    with refused("past the last one"):
        schedule.times(1000, spacing="leading", convention="offset")
    for start in (-1, -5, 1000, math.nan):
        with refused("start must be above -1.0 and at most 999.0"):
            schedule.times(10, start=start)
    with refused("at least two"):
        schedule.times(spacing=[5.0])
    with refused("steps must be 2 for 3 times; got 3"):
        schedule.times(3, spacing=[5.0, 4.0, 3.0])
    for given_ in ([5.0, 5.0, 3.0], [3.0, 4.0], [5.0, math.nan]):
        with refused("finite and strictly decreasing"):
            schedule.times(spacing=given_)
    for given_ in ([1000.0, 3.0], [5.0, -2.0]):
        with refused(r"must lie in \[-1.0, 999.0\]"):
            schedule.times(spacing=given_)
    for other in (NoiseSchedule.edm(), NoiseSchedule.flow(), NoiseSchedule.logsnr_cosine()):
        with refused("is for beta schedules"):
            other.times(10, spacing="leading")
        with refused("is for beta schedules"):
            other.times(10, convention="published")


def test_bad_schedules_are_refused() -> None:
    with refused("0 < beta_start <= beta_end < 1; got 0.02 and 0.0001"):
        NoiseSchedule.linear_beta(0.02, 1e-4)
    with refused("num_train_timesteps must be >= 1; got 0"):
        NoiseSchedule.cosine(0)
    with refused("num_train_timesteps must be an int; got 10.0", TypeError):
        NoiseSchedule.cosine(10.0)
    with refused("logsnr_min must be below logsnr_max"):
        NoiseSchedule.logsnr_cosine(20, -20)
    with refused("0 < sigma_min < sigma_max; got 0 and 3"):
        NoiseSchedule.ve(0, 3)
    for shift in (0, -1.0, math.inf, math.nan):
        with refused("shift must be positive and finite"):
            NoiseSchedule.flow(shift)
    with refused(r"shape \[T\]"):
        NoiseSchedule.from_alphas_cumprod(np.ones((2, 2)))
    with refused(r"finite and in \[0, 1\)"):
        NoiseSchedule.from_alphas_cumprod([1.5, 0.5])
    with refused(r"finite and in \[0, 1\)"):
        NoiseSchedule.from_alphas_cumprod([0.9, math.nan])
    with refused(r"decrease strictly; alphas_cumprod\[1\] = 0.5 and"):
        NoiseSchedule.from_alphas_cumprod([0.9, 0.5, 0.6])
