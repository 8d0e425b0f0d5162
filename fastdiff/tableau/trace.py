"""Tracing: a solver's textbook code, run once on symbols, becomes a `Tableau`.

Every solver here is linear in the state, the network's outputs and the noise. So a solver is
written as the textbook writes it:

    def ddim(trace):
        x = trace.x
        for t, u in trace.intervals:
            e = trace.net(x, t)
            x = trace.transfer(x, e, t, u)
        return x

Nothing here touches an image. `x` and `e` are linear forms, dictionaries {value: coefficient}, and
the run leaves behind which values exist, in which stage each is born and what it is made of. From
that the values that a later stage needs get a slot (a buffer; reused as soon as its value is dead)
and one row each. Conversions between predictions are folded into the rows in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fastdiff.prediction import Prediction, prediction
from fastdiff.schedule import Array, NoiseSchedule, namespace
from fastdiff.tableau.form import Coefficient, Form, is_one, is_zero
from fastdiff.tableau.tableau import Langevin, Stage, Tableau, Write

# == Values ========================================================================================


class Value(NamedTuple):
    """A tensor that exists in a run: an input, a network output, noise, or something kept."""

    kind: str  # "input" | "output" | "x0" | "noise": leaves;  "state" | "history": have a row
    stage: int  # the stage in which it comes to be; -1 for the inputs
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind}{self.stage}"


# == Tracing =======================================================================================


class Trace:
    """What a solver is run on. Solvers use `x`, `intervals`, `net`, `transfer`, `keep`, `noise`.

    Attributes:
        x: the initial state, a form.
        schedule: alpha, sigma and logsnr of a time.
        times: the nodes [steps + 1], from the noisiest to the end.
        solves_for: what `net` returns, "epsilon" or "sample" (x0), whatever the network predicts.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        times: Sequence[float] | np.ndarray,
        *,
        solves_for: str,
        prediction: Prediction,
        clip: tuple[float, float] | None = None,
        from_image: bool = False,
        afs: bool = False,
    ) -> None:
        self.afs = afs  # whether the first call is still to be replaced
        self.schedule, self.times, self.solves_for = schedule, list(times), solves_for
        self.prediction, self.clip = prediction, clip
        self.definitions: dict[Value, dict[Value, Coefficient]] = {}
        self.evaluations: list[Evaluation] = []
        self.stage = 0  # the stage whose launch is being described
        self.langevins: dict[int, tuple[Value, Langevin]] = {}
        start = self.times[0]
        if from_image:
            image, noise = Form({Value("input", -1, 1): 1.0}), Form({Value("input", -1, 0): 1.0})
            self.x = schedule.alpha(start) * image + schedule.sigma(start) * noise
        else:
            self.x = Form({Value("input", -1, 0): schedule.prior_scale(start)})

    @property
    def intervals(self) -> Iterator[tuple[float, float]]:
        """The pairs (t, u) of neighbouring times."""
        return pairwise(self.times)

    def alpha(self, t: Array) -> Array:
        return self.schedule.alpha(t)

    def sigma(self, t: Array) -> Array:
        return self.schedule.sigma(t)

    def half_logsnr(self, t: Array) -> Array:
        """lambda(t) = log(alpha / sigma); +inf at the clean time."""
        return 0.5 * self.schedule.logsnr(t)

    def is_clean(self, t: float) -> bool:
        """Whether sigma is zero at t."""
        return self.sigma(t) == 0

    def is_leap(self, t: float, u: float) -> bool:
        """Whether sigma / alpha falls by more than 20, and by more than 20 times what is left.

        So it does on the first step of cosine schedules, of flows and from zero terminal SNR, and
        on grids of two or three steps. Averages of epsilon over such a step blow up.
        """
        here, there = self.sigma(t) / self.alpha(t), self.sigma(u) / self.alpha(u)
        return here - there > 20 * max(there, 1.0)

    def net(self, x: Form, t: float) -> Form:
        """Evaluate the network on x at time t; returns its canonical prediction.

        `x` is materialised: from here on it stands for the buffer the network saw.
        """
        seen = self._materialise(x, fresh=True)
        alpha, sigma = self.alpha(t), self.sigma(t)
        self.stage += 1
        analytical, self.afs = self.afs, False
        self.evaluations.append(
            Evaluation(
                time=t,
                sees=seen,
                input_scale=self.prediction.input_scale(alpha, sigma),
                to_sample=self.prediction.to_sample(alpha, sigma),
                analytical=analytical,
            )
        )
        if analytical or self.clip is None:
            return self._define("history", self._unclipped(t, seen))
        x0 = Value("x0", self.stage)
        if self.solves_for == "sample":
            return self._define("history", {x0: 1.0})
        return self._define("history", {x0: -alpha / sigma, seen: 1 / sigma})

    def unclipped(self) -> Form:
        """The latest evaluation's canonical prediction before clipping (the same if none is)."""
        latest = self.evaluations[-1]
        return self._define("history", self._unclipped(latest.time, latest.sees))

    def keep(self, x: Form) -> Form:
        """Give x a buffer of its own in this stage, instead of carrying its parts along."""
        self._materialise(x)
        return x

    def noise(self) -> Form:
        """Fresh unit noise: the same tensor wherever this stage uses it; gone after the stage."""
        return Form({Value("noise", self.stage): 1.0})

    def langevin(
        self, x: Form, direction: Form, factor: Coefficient, *, norms: str = "sample"
    ) -> Form:
        """x + h direction + sqrt(2 h) z, h = factor (|z| / |direction|)^2: found on the device.

        norms: of each "sample", or their means over the "batch". x is the state that the network
        saw last. It ends its stage: what follows is a network call, or the end of the solver.
        """
        if not self.evaluations or x.terms != {self.evaluations[-1].sees: 1.0}:
            raise ValueError("a Langevin step must start from the state that the network saw last")
        result = self._define("state", (direction + self.noise()).terms)
        (value,) = result.terms
        self.langevins[self.stage] = value, Langevin(factor, norms)
        return result

    def transfer(self, x: Form, d: Form, t: Array, u: Array) -> Form:
        """Take x from time t to time u as if the canonical prediction d stayed constant.

        For epsilon this is an Euler step of dy/ds = epsilon with y = x / alpha, s = sigma / alpha
        (PNDM eq. 11; DDIM with eta = 0); for x0 the exponential Euler step (DPM-Solver++ eq. 9).
        """
        alpha_u, sigma_u, sigma_t = self.alpha(u), self.sigma(u), self.sigma(t)
        grown = self.expm1_step(t, u)  # e^-h - 1 = (s_u - s_t) / s_t, without cancellation
        if self.solves_for == "sample":
            return (sigma_u / sigma_t) * x - (alpha_u * grown) * d
        ratio = alpha_u / self.alpha(t)
        return ratio * x + (ratio * sigma_t * grown) * d

    def expm1_step(self, t: Array, u: Array) -> Array:
        """expm1(-h), h = lambda(u) - lambda(t): the relative change of sigma / alpha."""
        h = self.half_logsnr(u) - self.half_logsnr(t)
        return namespace(h).expm1(-h)

    def _unclipped(self, t: float, seen: Value) -> dict[Value, Coefficient]:
        if self.evaluations[-1].analytical:
            # Data of unit variance around zero: epsilon = sigma x / (alpha^2 + sigma^2).
            alpha, sigma = self.alpha(t), self.sigma(t)
            factor = sigma if self.solves_for == "epsilon" else alpha
            return {seen: factor / (alpha**2 + sigma**2)}
        kind = self.prediction
        convert = kind.to_epsilon if self.solves_for == "epsilon" else kind.to_sample
        of_output, of_state = convert(self.alpha(t), self.sigma(t))
        return {Value("output", self.stage): of_output, seen: of_state}

    def _define(self, kind: str, terms: dict[Value, Coefficient]) -> Form:
        value = Value(kind, self.stage, len(self.definitions))
        self.definitions[value] = Form(terms).terms
        return Form({value: 1.0})

    def _materialise(self, x: Form, fresh: bool = False) -> Value:
        """Make x a single stored value, unless it is one already (`fresh`: of this stage)."""
        if len(x.terms) == 1:
            ((value, coefficient),) = x.terms.items()
            known = value.kind == "state" and (value.stage == self.stage or not fresh)
            if known and is_one(coefficient):
                return value
        x.terms = self._define("state", x.terms).terms
        (value,) = x.terms
        return value


class Evaluation(NamedTuple):
    """One network call of a trace, or the formula that stands for it (AFS)."""

    time: float
    sees: Value
    input_scale: Coefficient
    to_sample: tuple[Coefficient, Coefficient]
    analytical: bool = False


# == From trace to table ===========================================================================


def trace_solver(
    name: str,
    solver: Callable[..., Form],
    schedule: NoiseSchedule,
    times: Sequence[float] | np.ndarray,
    *,
    solves_for: str,
    kind: str | Prediction = "epsilon",
    clip: tuple[float, float] | None = None,
    from_image: bool = False,
    afs: bool = False,
    **options: Any,
) -> Tableau:
    """Run a solver on symbols and lay out what it did as a `Tableau`."""
    run = Trace(
        schedule,
        times,
        solves_for=solves_for,
        prediction=prediction(kind),
        clip=clip,
        from_image=from_image,
        afs=afs,
    )
    result = run._materialise(solver(run, **options))
    rows = _needed_rows(run, result)
    slot_of, count = _assign_slots(run, rows, result)
    stages = [
        _lay_out(run, stage, rows_of_stage, slot_of) for stage, rows_of_stage in enumerate(rows)
    ]
    blend = run.prediction.blend
    return Tableau(
        solver=name,
        schedule=schedule.name,
        prediction=run.prediction.name,
        times=tuple(float(t) for t in times),
        stages=tuple(stages),
        slots=count,
        result=slot_of[result],
        clip=clip,
        from_image=from_image,
        blend=blend
        and ((0.0, 0.0), *(blend(run.alpha(e.time), run.sigma(e.time)) for e in run.evaluations)),
    )


def _needed_rows(run: Trace, result: Value) -> list[dict[Value, dict[Value, Coefficient]]]:
    """For each stage the values that later stages need, each as a row over what the stage can read:
    values of earlier stages and the stage's own F, x0 and z."""
    needed: list[set[Value]] = [set() for _ in range(run.stage + 1)]  # by the stage of their birth
    for value in (result, *(e.sees for e in run.evaluations)):
        needed[value.stage].add(value)
    rows: list[dict[Value, dict[Value, Coefficient]]] = [{} for _ in range(run.stage + 1)]
    for stage in reversed(range(run.stage + 1)):
        seen_next = run.evaluations[stage].sees if stage < len(run.evaluations) else result
        # What the next evaluation sees comes first; the others in the order they were made.
        for value in sorted(needed[stage], key=lambda v: (v != seen_next, v.number)):
            row = _expand(run, value, stage)
            for leaf in row:
                if leaf.kind in ("output", "x0", "noise") and leaf.stage != stage:
                    raise ValueError(
                        f"{leaf.kind} drawn in stage {leaf.stage} is used in stage "
                        f"{stage}; use keep() to carry it over"
                    )
            rows[stage][value] = row
            for part in row:
                if part.stage < stage and part.kind != "input":
                    needed[part.stage].add(part)
    return rows


def _expand(run: Trace, value: Value, stage: int) -> dict[Value, Coefficient]:
    """A value's definition with every other value of the same stage replaced by its own."""
    total = Form({})
    for part, coefficient in run.definitions[value].items():
        inner = (
            _expand(run, part, stage)
            if part.stage == stage and part in run.definitions
            else {part: 1.0}
        )
        total = total + Form(inner) * coefficient
    return total.terms


def _assign_slots(
    run: Trace, rows: list[dict[Value, dict[Value, Coefficient]]], result: Value
) -> tuple[dict[Value, int], int]:
    """A physical slot for every value that is stored, reused once the value is dead.

    All reads of a launch come before its writes, so a value may take the slot of one that the same
    launch reads for the last time.
    """
    last_use: dict[Value, int] = {result: len(rows)}
    for stage, rows_of_stage in enumerate(rows):
        reads = {v for row in rows_of_stage.values() for v in row}
        if stage:
            reads.add(run.evaluations[stage - 1].sees)
        for value in reads:
            last_use[value] = max(last_use.get(value, -1), stage)
    inputs = [Value("input", -1, k) for k in range(2)]
    slot_of = {value: k for k, value in enumerate(inputs) if k == 0 or value in last_use}
    count, alive = len(slot_of), set(slot_of)
    for stage, rows_of_stage in enumerate(rows):
        alive = {value for value in alive if last_use.get(value, -1) > stage}
        for value in rows_of_stage:
            taken = {slot_of[other] for other in alive}
            slot_of[value] = next(k for k in range(count + 1) if k not in taken)
            alive.add(value)
            count = max(count, slot_of[value] + 1)
    return slot_of, count


def _lay_out(
    run: Trace, stage: int, rows: dict[Value, dict[Value, Coefficient]], slot_of: dict[Value, int]
) -> Stage:
    output, x0, noise = (Value(kind, stage) for kind in ("output", "x0", "noise"))
    stepped, langevin = run.langevins.get(stage, (None, None))
    if langevin is not None and list(rows) != [stepped]:
        raise ValueError(f"stage {stage} goes on after its Langevin step: call the network first")
    evaluation = run.evaluations[stage - 1] if stage else None
    uses_sample = any(x0 in row for row in rows.values())
    to_sample = evaluation.to_sample if evaluation and uses_sample else (0.0, 0.0)
    stored = {v for row in rows.values() for v in row if v in slot_of}
    # A Langevin step starts from the state that was seen, though its row may not read it.
    kept = {evaluation.sees} if evaluation and langevin is not None else set()
    stored |= kept
    if evaluation and not is_zero(to_sample[1]):
        stored.add(evaluation.sees)
    # The state the network saw first, then the older values, newest to oldest.
    order = sorted(
        stored, key=lambda v: (evaluation is None or v != evaluation.sees, -v.stage, v.number)
    )
    schedule = run.schedule
    following = run.evaluations[stage].time if stage < len(run.evaluations) else run.times[-1]
    return Stage(
        time=None
        if evaluation is None or evaluation.analytical
        else schedule.time_scale * max(evaluation.time, schedule.last),
        sees=slot_of[evaluation.sees] if evaluation else 0,
        reads=tuple(slot_of[v] for v in order),
        writes=tuple(
            Write(
                slot_of[value],
                {slot_of[v]: row.get(v, 0.0) for v in order if v in row or v in kept},
                output=row.get(output, 0.0),
                sample=row.get(x0, 0.0),
                noise=row.get(noise, 0.0),
            )
            for value, row in rows.items()
        ),
        input_scale=evaluation.input_scale if evaluation else 1.0,
        to_sample=to_sample,
        rates=(run.alpha(following), run.sigma(following)),
        langevin=langevin,
    )
