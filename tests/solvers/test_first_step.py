"""The analytical first step, and the noise of the stages after it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import NoiseSchedule, Sampler, build_tableau, solver_names
from tests.helpers.oracles import as_denoiser, run_rows
from tests.helpers.schedules import LINEAR, SCHEDULES
from tests.helpers.tableaus import NOISE, STAGE_NOISE, check


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
