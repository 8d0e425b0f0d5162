"""Any options of any solver make a valid tableau."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff import PREDICTIONS, NoiseSchedule, Tableau, build_tableau, solver_names
from fastdiff.solvers.registry import get_solver
from tests.helpers.oracles import CLASSICAL, run_rows
from tests.helpers.schedules import SCHEDULES
from tests.helpers.tableaus import NOISE

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
