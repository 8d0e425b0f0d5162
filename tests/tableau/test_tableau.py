"""Tracing: a tableau does what its solver's function does, in the fewest buffers and passes."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff import (
    PREDICTIONS,
    Form,
    NoiseSchedule,
    Stage,
    Tableau,
    Trace,
    Write,
    build_tableau,
    solver_names,
)
from fastdiff.solvers.registry import get_solver
from fastdiff.tableau import trace_solver
from tests.helpers.oracles import COMPARISONS, ODE_SOLVERS, run_rows
from tests.helpers.schedules import LINEAR, SCHEDULES
from tests.helpers.tableaus import NOISE, check

# == The tableau is the solver =====================================================================


@pytest.mark.parametrize("steps", [1, 2, 3, 11])
@pytest.mark.parametrize("solver", solver_names())
def test_rows_equal_the_textbook(solver: str, steps: int) -> None:
    check(solver, LINEAR, steps=steps)
    check(solver, LINEAR, steps=steps, prediction="v_prediction", clip=1.0, spacing="karras")
    # The official grid has no 3 steps, and no derivative in time; its end is not clean.
    if steps != 3 and solver not in (*COMPARISONS, "euler_maruyama"):
        check(solver, LINEAR, steps=steps, spacing="leading", convention="published")
    check(solver, LINEAR, steps=steps, spacing="leading", convention="offset", prediction="both")


@pytest.mark.parametrize("kind", PREDICTIONS)
@pytest.mark.parametrize("solver", solver_names())
def test_rows_equal_the_textbook_for_every_prediction(solver: str, kind: str) -> None:
    check(solver, LINEAR, steps=6, prediction=kind)
    check(solver, NoiseSchedule.edm(), steps=5, prediction=kind, clip=(-1.0, 0.5))


@pytest.mark.parametrize("eta", [0.5, 1.0, np.array([0.0, 0.4, 1.0])], ids=["half", "one", "each"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_rows_equal_the_textbook_with_noise(kind: str, eta: Any) -> None:
    for schedule in (LINEAR, NoiseSchedule.ve()):
        for clip in (None, 1.0):
            tableau = check(
                "ddim", schedule, steps=5, prediction=kind, clip=clip, options={"eta": eta}
            )
            assert tableau.stochastic and not tableau.stages[-1].is_stochastic
            assert tableau.samples == (3 if np.ndim(eta) else None)


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_rows_equal_the_textbook_for_any_options(data: st.DataObject) -> None:
    draw = data.draw
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    schedule = SCHEDULES[name]
    discrete = name in ("linear", "cosine", "zero_snr")
    spacing = draw(
        st.sampled_from(["trailing", "linspace", "logsnr", "karras"] + ["leading"] * discrete)
    )
    solver = draw(st.sampled_from([name for name in solver_names() if name not in COMPARISONS]))
    low = schedule.last if schedule.clean is None else schedule.clean
    start = draw(st.none() | st.floats(0.3, 1.0).map(lambda f: low + f * (schedule.first - low)))
    if name == "flow" and solver == "euler_maruyama":  # its drift is infinite where alpha is zero
        start = 0.9
    kinds = PREDICTIONS
    if schedule.zero_terminal_snr:  # epsilon and score networks say nothing there
        kinds = ("sample", "v_prediction", "flow", "both")
    check(
        solver,
        schedule,
        steps=draw(st.integers(1, 9)),
        spacing=spacing,
        start=start,
        prediction=draw(st.sampled_from(kinds)),
        clip=draw(st.sampled_from([None, 0.7, (-0.2, 1.5)])),
        from_image=draw(st.booleans()),
        afs=draw(st.booleans()),
        options={"eta": draw(st.sampled_from([0.0, 0.6, 1.0]))} if solver == "ddim" else {},
    )


@pytest.mark.parametrize("solver", ODE_SOLVERS)
def test_a_constant_prediction_is_integrated_exactly(solver: str) -> None:
    """With epsilon constant, or x0 constant, every solver lands where the line ends."""
    for schedule in (LINEAR, NoiseSchedule.edm(), NoiseSchedule.logsnr_cosine()):
        times = schedule.times(7)
        (a, s), (b, r) = ((schedule.alpha(t), schedule.sigma(t)) for t in times[[0, -1]])
        x = NOISE * schedule.prior_scale(schedule.first)
        constant = lambda x, t: np.full(x.shape, 0.37)
        for kind in ("epsilon", "sample"):
            result = run_rows(build_tableau(solver, schedule, 7, prediction=kind), constant, NOISE)
            x0, e = ((x - s * 0.37) / a, 0.37) if kind == "epsilon" else (0.37, (x - a * 0.37) / s)
            np.testing.assert_allclose(result, b * x0 + r * e, rtol=1e-9, atol=1e-10)


# == What it costs =================================================================================


@pytest.mark.parametrize(
    ("solver", "slots", "passes"),
    [
        ("ddim", 1, 3),
        ("euler", 1, 3),
        ("heun", 3, 4),
        ("s_pndm", 3, 5),
        ("dpmpp_2m", 2, 5),
        ("ipndm", 4, 7),
        ("plms", 4, 7),
        ("f_pndm", 6, 7),
        ("unipc", 4, 8),
    ],
)
def test_slots_and_passes_of_a_steady_stage(solver: str, slots: int, passes: int) -> None:
    for kind in PREDICTIONS:
        for clip in (None, 1.0):
            short, long = (
                build_tableau(solver, LINEAR, n, prediction=kind, clip=clip) for n in (20, 30)
            )
            assert (short.slots, long.slots) == (slots, slots)
            calls = long.nfe - short.nfe
            assert long.launches - short.launches == calls == (20 if solver == "heun" else 10)
            each = (long.passes - short.passes) / calls
            if (kind, clip) == ("epsilon", None):
                assert each == passes
            # Heun's corrector needs the state its network saw for the conversion; UniPC does not
            # need it for x0-networks.
            assert passes - (solver == "unipc") <= each <= passes + 0.5 * (solver == "heun")


def test_the_first_launch_is_skipped_where_it_changes_nothing() -> None:
    assert build_tableau("ddim", LINEAR, 10).launches == 10
    assert build_tableau("ddim", NoiseSchedule.edm(), 10).launches == 11  # scales by sigma
    image = build_tableau("ddim", LINEAR, 10, from_image=True)
    assert image.launches == 11 and image.slots == 2
    assert build_tableau("ddim", LINEAR, 10).passes == 30


def test_how_a_tableau_reads() -> None:
    tableau = build_tableau("dpmpp_2m", LINEAR, spacing=[900, 500, 100, -1], clip=1.0)
    text = str(tableau).splitlines()
    assert text[0] == (
        "dpmpp_2m on linear_beta: 3 steps, 3 network calls, 2 slots, 3 launches, "
        "11 passes over the image"
    )
    assert "F = net(s0, 900), x0 = clip(" in text[2]
    first = tableau.stages[1].writes[0]
    assert f"s{first.slot} <- {first.slots[0]:.6g} s0 + {first.sample:.6g} x0" in text[2]
    assert text[-1].strip() == f"result: s{tableau.result}"
    assert len(text) == 1 + len(tableau.stages) + 1
    noisy = str(build_tableau("ddim", LINEAR, spacing=[900, 500], eta=np.array([0.5, 1.0])))
    assert " ..] z" in noisy


# == Rows and indices ==============================================================================


def test_rows_and_indices_are_what_the_launch_is_given() -> None:
    tableau = build_tableau("ipndm", LINEAR, 8, prediction="v_prediction", clip=(-1.0, 2.0))
    for number, stage in enumerate(tableau.stages):
        reads, writes = tableau.read_width(number), len(stage.writes)
        row, index = tableau.row(number), tableau.index(number)
        assert row.shape == (1, 5 + writes * (3 + reads)) and row.dtype == np.float64
        assert index.shape == (2 + reads + writes,) and index.dtype == np.int32
        assert index[0] == number and index[1] == 0
        assert tuple(index[2 : 2 + len(stage.reads)]) == stage.reads
        assert tuple(index[2 + reads :]) == tuple(w.slot for w in stage.writes)
        assert tuple(row[0, :2]) == stage.to_sample and tuple(row[0, 2:4]) == (-1.0, 2.0)
        for w, columns in zip(stage.writes, row[0, 5:].reshape(writes, -1), strict=True):
            assert tuple(columns[:3]) == (w.sample, w.output, w.noise)
            assert list(columns[3:]) == [w.slots.get(s, 0) for s in stage.reads] + [0] * (
                reads - len(stage.reads)
            )
    unclipped = build_tableau("ipndm", LINEAR, 3).row(1)
    assert tuple(unclipped[0, 2:4]) == (-math.inf, math.inf)


def test_times_told_to_the_network() -> None:
    """In the network's own units, and never below what it was trained on."""
    flow = dataclasses.replace(NoiseSchedule.flow(), time_scale=1000.0)
    tableau = build_tableau("euler", flow, 4, prediction="flow")
    np.testing.assert_allclose([s.time for s in tableau.stages[1:]], [1000, 750, 500, 250])
    edm = build_tableau("ddim", NoiseSchedule.edm(), spacing=[80.0, 1.0, 0.0005, 0.0])
    assert [s.time for s in edm.stages[1:]] == [80.0, 1.0, 0.002]


def test_sixteen_reads_are_served_and_seventeen_refused() -> None:
    def long_memory(run: Trace, memory: int = 16) -> Form:
        x, history = run.x, []
        for t, u in run.intervals:
            history = [run.net(x, t), *history[: memory - 1]]
            x = run.transfer(x, sum(history[1:], history[0]) / len(history), t, u)
        return x

    times = LINEAR.times(30)
    settings_ = {"schedule": LINEAR, "times": times, "solves_for": "epsilon"}
    tableau = trace_solver("long", long_memory, **settings_, memory=16)
    assert max(len(s.reads) for s in tableau.stages) == 16 and tableau.slots == 16
    with pytest.raises(ValueError, match=r"stages\[\d+\] may read 16 slots; got 17"):
        trace_solver("longer", long_memory, **settings_, memory=17)


# == What a solver may not do ======================================================================


def traced(function: Any, steps: int = 3, **settings: Any) -> Tableau:
    return trace_solver(
        "test", function, LINEAR, LINEAR.times(steps), **{"solves_for": "epsilon", **settings}
    )


def test_a_solver_must_be_linear() -> None:
    with pytest.raises(TypeError, match="a form times a form"):
        traced(lambda run: run.x * run.x)
    with pytest.raises(TypeError, match="a form plus 1.0"):
        traced(lambda run: run.x + 1.0)


def test_noise_does_not_outlive_its_stage() -> None:
    def late(run: Trace) -> Form:
        z = run.noise()
        return run.net(run.x, 5.0) + z

    with pytest.raises(ValueError, match=r"noise drawn in stage 0 is used in stage 1; use keep"):
        traced(late)

    def kept(run: Trace) -> Form:
        z = run.keep(run.noise())
        return run.net(run.x, 5.0) + z

    assert traced(kept).stochastic and traced(kept).slots == 2


def test_a_stage_writes_at_most_three_slots() -> None:
    def hoarder(run: Trace) -> Form:
        e = run.net(run.x, 9.0)
        kept = [run.keep(k * e + run.x) for k in range(1, 5)]
        f = run.net(run.x, 5.0)
        return sum(kept, f)

    with pytest.raises(ValueError, match="must write 1 to 3 different slots; got"):
        traced(hoarder)


def test_what_nothing_needs_is_not_kept() -> None:
    def wasteful(run: Trace) -> Form:
        x = run.x
        for t, u in run.intervals:
            e = run.net(x, t)
            run.keep(3.0 * e)
            x = run.transfer(x, e, t, u)
        return x

    assert traced(wasteful).stages == traced(get_solver("ddim").function).stages


def test_terms_that_cancel_are_not_read() -> None:
    def cancelling(run: Trace) -> Form:
        e = run.net(run.x, 900.0)
        f = run.net(run.transfer(run.x, e, 900.0, 500.0), 500.0)
        return f + 0.1 * e + 0.2 * e - 0.3 * e

    tableau = traced(cancelling)
    assert tableau.slots == 1 and tableau.stages[-1].reads == ()


# == Validation ====================================================================================

GOOD = Tableau(
    solver="s",
    schedule="n",
    prediction="epsilon",
    times=(9.0, -1.0),
    stages=(
        Stage(None, 0, (0,), (Write(0, {0: 1.0}),)),
        Stage(9.0, 0, (0,), (Write(0, {0: 1.5}, output=-0.5),)),
    ),
    slots=1,
    result=0,
)


def broken(stage: int, **changes: Any) -> Any:
    stages = list(GOOD.stages)
    stages[stage] = dataclasses.replace(stages[stage], **changes)
    return {"stages": tuple(stages)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ()}, r"stages\[0\] must evaluate nothing"),
        ({"stages": GOOD.stages[1:]}, r"stages\[0\] must evaluate nothing"),
        ({"result": 1}, "result must be a slot below 1; got 1"),
        ({"result": -1}, "result must be a slot below 1; got -1"),
        ({"blend": ((0.0, 0.0),)}, "blend must have 2 pairs; got 1"),
        (broken(1, writes=()), r"stages\[1\] must write 1 to 3 different slots; got \[\]"),
        (broken(1, writes=(Write(0, {}), Write(0, {}))), r"different slots; got \[0, 0\]"),
        (broken(1, writes=(Write(3, {}),)), r"must use slots below 1; got \[0, 3\]"),
        (broken(1, sees=2), r"must use slots below 1; got \[0, 2\]"),
        (broken(1, reads=()), "a row on a slot that is not among its reads"),
        (broken(1, reads=(0,) * 17), "may read 16 slots; got 17"),
        (
            {"slots": 2, **broken(1, reads=(1, 0), to_sample=(1.0, 0.5))},
            "must read the slot its network saw first",
        ),
        (broken(1, writes=(Write(0, {0: math.nan}),)), "a coefficient that is not finite: nan"),
        (broken(1, writes=(Write(0, {}, output=math.inf),)), "not finite: inf"),
        (broken(1, input_scale=math.nan), "not finite"),
        (broken(1, to_sample=(math.inf, 0.0)), "not finite"),
        (
            broken(1, writes=(Write(0, {0: np.ones(2)}, output=np.ones(3)),)),
            r"coefficient arrays must have one length; got \[2, 3\]",
        ),
    ],
)
def test_a_tableau_is_checked_on_construction(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(GOOD, **changes)


def test_json_keeps_every_bit_of_per_sample_rows() -> None:
    eta = np.array([1 / 3, 0.1, np.nextafter(0.7, 1)])
    tableau = build_tableau("ddim", LINEAR, 4, eta=eta, clip=1.0, prediction="both")
    again = Tableau.from_json(tableau.to_json())
    assert again.samples == 3 and again.clip == (-1.0, 1.0) and again.times == tableau.times
    for number in range(5):
        np.testing.assert_array_equal(again.row(number), tableau.row(number))
    np.testing.assert_array_equal(again.blend, tableau.blend)


def test_json_of_another_kind_is_refused() -> None:
    data = json.loads(GOOD.to_json())
    assert data["schema"] == 2 and Tableau.from_json(json.dumps(data)) == GOOD
    for schema in (1, 3, None, "2"):
        with pytest.raises(ValueError, match=f"must have schema 2; got {schema}"):
            Tableau.from_json(json.dumps({**data, "schema": schema}))
    with pytest.raises(ValueError, match="must have schema 2; got list"):
        Tableau.from_json("[]")
    with pytest.raises(ValueError):
        Tableau.from_json("a tableau")
    with pytest.raises(ValueError, match="must have an entry 'stages'"):
        Tableau.from_json(json.dumps({k: v for k, v in data.items() if k != "stages"}))
    with pytest.raises(ValueError, match="result must be a slot"):  # read back means checked
        Tableau.from_json(json.dumps({**data, "result": 7}))
