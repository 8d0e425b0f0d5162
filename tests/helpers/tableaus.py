"""Whether a tableau does what its solver's function does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastdiff import NoiseSchedule, Sampler, Tableau, build_tableau
from tests.helpers.oracles import as_denoiser, run_rows, textbook

RNG = np.random.default_rng(0)
NOISE, IMAGE = RNG.standard_normal((2, 3, 2, 5))
STAGE_NOISE = list(RNG.standard_normal((60, 3, 2, 5)))


def network(kind: str) -> Any:
    """Some smooth function of the state and the time, with two outputs for "both"."""

    def function(x: np.ndarray, t: float) -> np.ndarray:
        first = 0.8 * np.sin(1.3 * x + 0.7 * np.log1p(t)) + 0.1 * x
        return np.concatenate([first, np.cos(0.7 * x)], axis=1) if kind == "both" else first

    return function


def check(
    solver: str,
    schedule: NoiseSchedule,
    *,
    prediction: str = "epsilon",
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> Tableau:
    """One tableau: textbook = rows = rows with dead slots poisoned = sampler = JSON and back."""
    options = options or {}
    tableau = build_tableau(solver, schedule, prediction=prediction, **settings, **options)
    image = IMAGE if settings.get("from_image") else None
    f = network(prediction)
    shaped = {k: v[:, None, None] if np.ndim(v) else v for k, v in options.items()}
    inputs = {"image": image, "stage_noise": STAGE_NOISE}
    exact, plain = (
        textbook(
            solver,
            schedule.with_convention(settings.get("convention", "aligned")),
            tableau.times,
            f,
            NOISE,
            prediction=prediction,
            clip=tableau.clip,
            options=shaped,
            afs=settings.get("afs", False),
            precision=precision,
            **inputs,
        )
        for precision in (np.longdouble, np.float64)
    )
    found = run_rows(tableau, f, NOISE, **inputs)
    # As exact as float64 allows, which the plain run shows: coarse steps amplify rounding.
    rounding = 1e-11 * np.abs(exact).max() + 30 * np.abs(plain - exact).max()
    assert np.abs(found - exact).max() <= rounding

    np.testing.assert_array_equal(run_rows(tableau, f, NOISE, **inputs, poison=True), found)
    given_noise = [z for z, s in zip(STAGE_NOISE, tableau.stages, strict=False) if s.is_stochastic]
    sampled = Sampler(as_denoiser(f), tableau=tableau, dtype=torch.float64)(
        torch.from_numpy(NOISE),
        image=None if image is None else torch.from_numpy(image),
        stage_noise=[torch.from_numpy(z) for z in given_noise] or None,
    )
    if any(stage.langevin is not None for stage in tableau.stages):
        np.testing.assert_allclose(sampled.numpy(), found, rtol=1e-9, atol=rounding)
    else:
        np.testing.assert_array_equal(sampled.numpy(), found)

    again = Tableau.from_json(tableau.to_json())
    assert str(again) == str(tableau) and again.to_json() == tableau.to_json()
    for number in range(len(tableau.stages)):
        np.testing.assert_array_equal(again.row(number), tableau.row(number))
        np.testing.assert_array_equal(again.index(number), tableau.index(number))
    return tableau
