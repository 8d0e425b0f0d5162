"""The tableau: a solver run as a table of linear rows, obtained by tracing textbook code.

Every solver here is linear in the state, the network's outputs and the noise. So a solver is
written as the textbook writes it and run once on symbols:

    def ddim(trace):
        x = trace.x
        for t, u in trace.intervals:
            e = trace.net(x, t)
            x = trace.transfer(x, e, t, u)
        return x

Nothing here touches an image. `x` and `e` are linear forms, dictionaries {value: coefficient}, and
the run leaves behind which values exist, in which stage each is born and what it is made of. From
that the values that a later stage needs get a slot (a buffer; reused as soon as its value is dead)
and one row each: that table is the `Tableau`.

A stage is one network evaluation and the one launch after it (the first stage has no evaluation: it
scales the noise). With F the network's raw output, x the state it saw and z fresh noise,

    x0         = clip(p F + q x)                                 only where clipping is asked for
    slot[k]   <- sum_j s_j slot[j] + a x0 + f F + c z            up to three such writes
    next input = c_in * (first write), in the network's dtype

Conversions between predictions are folded into the rows in float64. A coefficient that is zero
means that the operand is not read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fastdiff.prediction import Prediction, prediction
from fastdiff.schedule import Array, NoiseSchedule, namespace

READS = (1, 2, 4, 8, 16)  # how many slots a launch can read: the kernel's variants
WRITES = (1, 2, 3)  # and write
JSON_SCHEMA = 1

Coefficient = Any  # a float, or an array [B]: one per sample


# == Linear forms ==================================================================================


class Value(NamedTuple):
    """A tensor that exists in a run: an input, a network output, noise, or something kept."""

    kind: str  # "input" | "output" | "x0" | "noise": leaves;  "state" | "history": have a row
    stage: int  # the stage in which it comes to be; -1 for the inputs
    number: int = 0


class Form:
    """A linear combination of values: {value: coefficient}. Supports + - * / with numbers."""

    def __init__(self, terms: dict[Value, Coefficient]) -> None:
        self.terms = {v: c for v, c in terms.items() if not _is_zero(c)}

    def __add__(self, other: Form) -> Form:
        if not isinstance(other, Form):
            raise TypeError(f"a solver must be linear: a form plus {other!r} has no tableau")
        terms = dict(self.terms)
        for value, coefficient in other.terms.items():
            terms[value] = _sum(terms[value], coefficient) if value in terms else coefficient
        return Form(terms)

    def __mul__(self, factor: Coefficient) -> Form:
        if isinstance(factor, Form):
            raise TypeError("a solver must be linear: a form times a form has no tableau")
        return Form({v: c * factor for v, c in self.terms.items()})

    __rmul__ = __mul__
    __array_ufunc__ = None  # numpy_array * form comes here, not to numpy

    def __truediv__(self, divisor: Coefficient) -> Form:
        return self * (1.0 / divisor)

    def __neg__(self) -> Form:
        return self * -1.0

    def __sub__(self, other: Form) -> Form:
        return self + other * -1.0

    def __repr__(self) -> str:
        return " + ".join(f"{c} {v.kind}{v.stage}" for v, c in self.terms.items()) or "0"


def _is_zero(coefficient: Coefficient) -> bool:
    return coefficient == 0 if isinstance(coefficient, float) else not np.any(coefficient)


def _sum(a: Coefficient, b: Coefficient) -> Coefficient:
    """a + b, exactly zero where the two cancel to within rounding: then nothing is read."""
    total = a + b
    return total * (abs(total) > 8 * np.finfo(np.float64).eps * abs(a))


# == Tracing =======================================================================================


class Trace:
    """What a solver is run on. Solvers use `x`, `intervals`, `net`, `transfer`, `keep`, `noise`.

    Attributes:
        x: the initial state, a form.
        schedule: alpha, sigma and logsnr of a time.
        times: the nodes [steps + 1], from the noisiest to the end.
        predicts: what `net` returns, "epsilon" or "sample" (x0): the solver's canonical prediction.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        times: Sequence[float] | np.ndarray,
        *,
        predicts: str,
        prediction: Prediction,
        clip: tuple[float, float] | None = None,
        from_image: bool = False,
        afs: bool = False,
    ) -> None:
        self.afs = afs  # whether the first call is still to be replaced
        self.schedule, self.times, self.predicts = schedule, list(times), predicts
        self.prediction, self.clip = prediction, clip
        self.definitions: dict[Value, dict[Value, Coefficient]] = {}
        self.evaluations: list[Evaluation] = []
        self.stage = 0  # the stage whose launch is being described
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
        if self.predicts == "sample":
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

    def transfer(self, x: Form, d: Form, t: Array, u: Array) -> Form:
        """Take x from time t to time u as if the canonical prediction d stayed constant.

        For epsilon this is an Euler step of dy/ds = epsilon with y = x / alpha, s = sigma / alpha
        (PNDM eq. 11; DDIM with eta = 0); for x0 the exponential Euler step (DPM-Solver++ eq. 9).
        """
        alpha_u, sigma_u, sigma_t = self.alpha(u), self.sigma(u), self.sigma(t)
        grown = self.expm1_step(t, u)  # e^-h - 1 = (s_u - s_t) / s_t, without cancellation
        if self.predicts == "sample":
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
            factor = sigma if self.predicts == "epsilon" else alpha
            return {seen: factor / (alpha**2 + sigma**2)}
        convert = (
            self.prediction.to_epsilon if self.predicts == "epsilon" else self.prediction.to_sample
        )
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
            if known and _is_one(coefficient):
                return value
        x.terms = self._define("state", x.terms).terms
        (value,) = x.terms
        return value


def _is_one(coefficient: Coefficient) -> bool:
    return bool(np.all(np.asarray(coefficient) == 1.0))


class Evaluation(NamedTuple):
    """One network call of a trace, or the formula that stands for it (AFS)."""

    time: float
    sees: Value
    input_scale: Coefficient
    to_sample: tuple[Coefficient, Coefficient]
    analytical: bool = False


# == The table =====================================================================================


@dataclass(frozen=True)
class Write:
    """slot <- sum of slots + sample * x0 + output * F + noise * z."""

    slot: int
    slots: dict[int, Coefficient]
    output: Coefficient = 0.0
    sample: Coefficient = 0.0
    noise: Coefficient = 0.0


@dataclass(frozen=True)
class Stage:
    """One network evaluation (none where `time` is None) and the launch that follows it.

    Attributes:
        time: what the network is told, in its own units.
        sees: the slot whose content, times `input_scale`, the network is shown.
        guidance: weight of guidance here: the scale in force is 1 + guidance * (scale - 1).
        to_sample: (p, q) of x0 = clip(p F + q slot[sees]); (0, 0) where x0 is not used.
        level: (alpha, sigma) of the state that the first row makes.
        reads: the slots the launch reads; `sees` comes first where x0 needs it.
        writes: one to three rows; the first is what the next evaluation sees.
        fill: a device function (row [1 or B, K], raw output F) -> row, called before the launch,
            for coefficients that depend on data. None: the host's row is used as it is.
    """

    time: Coefficient | None
    sees: int
    reads: tuple[int, ...]
    writes: tuple[Write, ...]
    input_scale: Coefficient = 1.0
    guidance: float = 1.0
    to_sample: tuple[Coefficient, Coefficient] = (0.0, 0.0)
    level: tuple[Coefficient, Coefficient] = (1.0, 0.0)
    fill: Callable[[Any, Any], Any] | None = field(default=None, compare=False)

    @property
    def is_identity(self) -> bool:
        """Whether the launch changes nothing: its only row copies a slot onto itself."""
        first = self.writes[0]
        return (
            len(self.writes) == 1
            and list(first.slots) == [first.slot]
            and _is_one(first.slots[first.slot])
            and all(map(_is_zero, (first.output, first.sample, first.noise)))
        )

    @property
    def is_stochastic(self) -> bool:
        """Whether any row draws noise."""
        return any(not _is_zero(w.noise) for w in self.writes)


@dataclass(frozen=True)
class Tableau:
    """A solver run, as data. Made by `fastdiff.build_tableau`, checked on construction.

    Attributes:
        solver: the solver's name.
        schedule: the schedule's name.
        prediction: what the network is taken to predict (`merge` of "both" included).
        times: the nodes of the time grid, float64 [steps + 1].
        stages: stages[0] evaluates nothing: it prepares the initial state.
        slots: how many state buffers the run needs. Slot 0 holds the noise at the start, slot 1 the
            image where `from_image`.
        result: the slot with the result at the end.
        clip: the bounds x0 is clamped to, or None.
        from_image: whether the run starts from an image with noise added.
        merge: for two-part outputs, (m0, m1) per stage; None otherwise.
    """

    solver: str
    schedule: str
    prediction: str
    times: tuple[float, ...]
    stages: tuple[Stage, ...]
    slots: int
    result: int
    clip: tuple[float, float] | None = None
    from_image: bool = False
    merge: tuple[tuple[Coefficient, Coefficient], ...] | None = None

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0].time is not None:
            raise ValueError("stages[0] must evaluate nothing: it prepares the initial state")
        if not 0 <= self.result < self.slots:
            raise ValueError(f"result must be a slot below {self.slots}; got {self.result}")
        if self.merge is not None and len(self.merge) != len(self.stages):
            raise ValueError(f"merge must have {len(self.stages)} pairs; got {len(self.merge)}")
        samples = {len(c) for s in self.stages for c in _coefficients(s) if np.ndim(c)}
        if len(samples) > 1:
            raise ValueError(f"coefficient arrays must have one length; got {sorted(samples)}")
        for i, stage in enumerate(self.stages):
            self._check(f"stages[{i}]", stage)

    def _check(self, name: str, stage: Stage) -> None:
        targets = [w.slot for w in stage.writes]
        if not 1 <= len(targets) <= WRITES[-1] or len(set(targets)) < len(targets):
            raise ValueError(f"{name} must write 1 to {WRITES[-1]} different slots; got {targets}")
        if len(stage.reads) > READS[-1]:
            raise ValueError(f"{name} may read {READS[-1]} slots; got {len(stage.reads)}")
        used = {stage.sees, *stage.reads, *targets}.union(*(w.slots for w in stage.writes))
        if not used <= set(range(self.slots)):
            raise ValueError(f"{name} must use slots below {self.slots}; got {sorted(used)}")
        if not set().union(*(w.slots for w in stage.writes)) <= set(stage.reads):
            raise ValueError(f"{name} has a row on a slot that is not among its reads")
        if not _is_zero(stage.to_sample[1]) and stage.reads[:1] != (stage.sees,):
            raise ValueError(f"{name} must read the slot its network saw first, to form x0")
        for coefficient in _coefficients(stage):
            if not np.all(np.isfinite(np.asarray(coefficient, dtype=np.float64))):
                raise ValueError(f"{name} has a coefficient that is not finite: {coefficient}")

    # -- what a user asks of it -------------------------------------------------------------------

    @cached_property
    def nfe(self) -> int:
        """Network evaluations of one run (a guided evaluation counts once)."""
        return sum(stage.time is not None for stage in self.stages)

    @property
    def steps(self) -> int:
        """Intervals of the time grid."""
        return len(self.times) - 1

    @cached_property
    def stochastic(self) -> bool:
        """Whether the run draws noise on the way."""
        return any(stage.is_stochastic for stage in self.stages)

    @cached_property
    def samples(self) -> int | None:
        """B where the coefficients are per sample, None where all samples share them."""
        for stage in self.stages:
            for coefficient in _coefficients(stage):
                if np.ndim(coefficient):
                    return len(coefficient)
        return None

    @cached_property
    def launches(self) -> int:
        """Launches of the fused step (the first is skipped where it would change nothing)."""
        return len(self.stages) - self.stages[0].is_identity

    @cached_property
    def passes(self) -> int:
        """Reads and writes of whole image tensors by the fused step over the run."""
        total = 0
        for stage in self.stages:
            if stage is self.stages[0] and stage.is_identity:
                continue
            output = any(not _is_zero(w.output) or not _is_zero(w.sample) for w in stage.writes)
            total += len(stage.reads) + output + len(stage.writes)
        return total

    def filled(self, stage: int, fill: Callable[[Any, Any], Any]) -> Tableau:
        """This tableau with a device function filling the row of one stage (see `Stage.fill`)."""
        if not 0 <= stage < len(self.stages):
            raise ValueError(f"stage must be 0 .. {len(self.stages) - 1}; got {stage}")
        stages = list(self.stages)
        stages[stage] = replace(stages[stage], fill=fill)
        return replace(self, stages=tuple(stages))

    # -- what the kernel is given -----------------------------------------------------------------

    def row(self, number: int) -> np.ndarray:
        """The coefficients of one stage's launch, float64 [1 or B, 5 + W (3 + R)].

        p, q, lowest x0, highest x0, c_in of the next stage's network; then for each write its
        factors of x0, F and z and of the slots read, padded with zeros to a kernel variant.
        """
        stage, width = self.stages[number], self.read_width(number)
        low, high = self.clip or (-math.inf, math.inf)
        following = self.stages[number + 1].input_scale if number + 1 < len(self.stages) else 1.0
        columns = [*stage.to_sample, low, high, following]
        for w in stage.writes:
            columns += [w.sample, w.output, w.noise]
            columns += [w.slots.get(slot, 0.0) for slot in stage.reads]
            columns += [0.0] * (width - len(stage.reads))
        return np.stack(
            [np.broadcast_to(np.asarray(c, np.float64), (self.samples or 1,)) for c in columns], 1
        )

    def index(self, number: int) -> np.ndarray:
        """The integers of one stage's launch, int32 [2 + R + W]: stage, purpose, reads, writes."""
        stage = self.stages[number]
        padding = [stage.reads[0] if stage.reads else 0] * (
            self.read_width(number) - len(stage.reads)
        )
        return np.array(
            [number, 0, *stage.reads, *padding, *(w.slot for w in stage.writes)], dtype=np.int32
        )

    def read_width(self, number: int) -> int:
        """R, the kernel variant that serves one stage's launch."""
        return next(r for r in READS if r >= len(self.stages[number].reads))

    # -- as text ----------------------------------------------------------------------------------

    def __str__(self) -> str:
        lines = [
            f"{self.solver} on {self.schedule}: {self.steps} steps, {self.nfe} network calls, "
            f"{self.slots} slots, {self.launches} launches, {self.passes} passes over the image"
        ]
        for i, stage in enumerate(self.stages):
            rows = "; ".join(_describe(w, stage) for w in stage.writes)
            if stage.time is None:
                call = "start"
            else:
                call = f"F = net(s{stage.sees}, {_number(stage.time)})"
            if stage.to_sample != (0.0, 0.0):
                p, q = map(_number, stage.to_sample)
                call += f", x0 = clip({p} F + {q} s{stage.sees})"
            lines.append(f"{i:>4}  {call:<22}  {rows}")
        return "\n".join([*lines, f"      result: s{self.result}"])

    def to_json(self) -> str:
        """As JSON text, every coefficient to the last bit; `Tableau.from_json` reads it back.

        Raises:
            ValueError: a stage is filled on the device (`Stage.fill`); code is not data.
        """
        if any(stage.fill for stage in self.stages):
            raise ValueError("a tableau with stages filled on the device has no JSON form")
        stages = [
            {
                "time": stage.time, "sees": stage.sees, "reads": stage.reads,
                "input_scale": stage.input_scale, "guidance": stage.guidance,
                "to_sample": stage.to_sample, "level": stage.level,
                "writes": [
                    {"slot": w.slot, "slots": list(w.slots.items()), "output": w.output,
                     "sample": w.sample, "noise": w.noise} for w in stage.writes
                ],
            }
            for stage in self.stages
        ]  # fmt: skip
        data = {"schema": JSON_SCHEMA, "solver": self.solver, "schedule": self.schedule,
                "prediction": self.prediction, "times": self.times, "slots": self.slots,
                "result": self.result, "clip": self.clip, "from_image": self.from_image,
                "merge": self.merge, "stages": stages}  # fmt: skip
        return json.dumps(data, default=_json_array)

    @classmethod
    def from_json(cls, text: str) -> Tableau:
        """Read what `to_json` wrote.

        Raises:
            ValueError: not JSON, not a tableau, or written by a newer schema.
        """
        data = json.loads(text)
        if not isinstance(data, dict) or data.get("schema") != JSON_SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"a tableau's JSON must have schema {JSON_SCHEMA}; got {found}")
        try:
            return cls._from_data(data)
        except KeyError as error:
            raise ValueError(f"a tableau's JSON must have an entry {error}") from None

    @classmethod
    def _from_data(cls, data: dict[str, Any]) -> Tableau:
        stages = tuple(
            Stage(
                time=_array(s["time"]), sees=s["sees"], reads=tuple(s["reads"]),
                input_scale=_array(s["input_scale"]), guidance=s["guidance"],
                to_sample=_pair(s["to_sample"]), level=_pair(s["level"]),
                writes=tuple(
                    Write(w["slot"], {slot: _array(c) for slot, c in w["slots"]},
                          *(_array(w[key]) for key in ("output", "sample", "noise")))
                    for w in s["writes"]
                ),
            )
            for s in data["stages"]
        )  # fmt: skip
        merge, clip = data["merge"], data["clip"]
        return cls(
            data["solver"], data["schedule"], data["prediction"], tuple(data["times"]), stages,
            data["slots"], data["result"], tuple(clip) if clip else None, data["from_image"],
            tuple(map(_pair, merge)) if merge else None,
        )  # fmt: skip


def _coefficients(stage: Stage) -> Iterator[Coefficient]:
    yield from (*stage.to_sample, stage.input_scale, stage.guidance)
    for w in stage.writes:
        yield from (w.sample, w.output, w.noise, *w.slots.values())


def _number(value: Coefficient) -> str:
    return f"{value:.6g}" if np.ndim(value) == 0 else f"[{value[0]:.6g} ..]"


def _describe(w: Write, stage: Stage) -> str:
    parts = [(c, f"s{slot}") for slot, c in w.slots.items()]
    parts += [(w.sample, "x0"), (w.output, "F"), (w.noise, "z")]
    terms = [f"{_number(c)} {name}" for c, name in parts if not _is_zero(c)]
    return f"s{w.slot} <- " + (" + ".join(terms) or "0").replace("+ -", "- ")


def _json_array(value: Any) -> list[float] | float:
    return np.asarray(value, dtype=np.float64).tolist()


def _array(value: Any) -> Coefficient:
    return np.array(value, dtype=np.float64) if isinstance(value, list) else value


def _pair(values: Sequence[Any]) -> tuple[Coefficient, Coefficient]:
    first, second = map(_array, values)
    return first, second


# == From trace to table ===========================================================================


def trace(
    name: str,
    solver: Callable[..., Form],
    schedule: NoiseSchedule,
    times: Sequence[float] | np.ndarray,
    *,
    predicts: str,
    kind: str | Prediction = "epsilon",
    clip: tuple[float, float] | None = None,
    from_image: bool = False,
    afs: bool = False,
    **options: Any,
) -> Tableau:
    """Run a solver on symbols and lay out what it did as a `Tableau`."""
    run = Trace(schedule, times, predicts=predicts, prediction=prediction(kind), clip=clip,
                from_image=from_image, afs=afs)  # fmt: skip
    result = run._materialise(solver(run, **options))
    rows = _needed_rows(run, result)
    slot_of, count = _assign_slots(run, rows, result)
    stages = [
        _lay_out(run, stage, rows_of_stage, slot_of) for stage, rows_of_stage in enumerate(rows)
    ]
    merge = run.prediction.merge
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
        merge=merge
        and ((0.0, 0.0), *(merge(run.alpha(e.time), run.sigma(e.time)) for e in run.evaluations)),
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
                    raise ValueError(f"{leaf.kind} drawn in stage {leaf.stage} is used in stage "
                                     f"{stage}; use keep() to carry it over")  # fmt: skip
            rows[stage][value] = row
            for part in row:
                if part.stage < stage and part.kind != "input":
                    needed[part.stage].add(part)
    return rows


def _expand(run: Trace, value: Value, stage: int) -> dict[Value, Coefficient]:
    """A value's definition with every other value of the same stage replaced by its own."""
    total = Form({})
    for part, coefficient in run.definitions[value].items():
        inner = _expand(run, part, stage) if part.stage == stage and part in run.definitions else {
            part: 1.0
        }  # fmt: skip
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
    evaluation = run.evaluations[stage - 1] if stage else None
    uses_sample = any(x0 in row for row in rows.values())
    to_sample = evaluation.to_sample if evaluation and uses_sample else (0.0, 0.0)
    stored = {v for row in rows.values() for v in row if v in slot_of}
    if evaluation and not _is_zero(to_sample[1]):
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
                {slot_of[v]: row[v] for v in order if v in row},
                output=row.get(output, 0.0),
                sample=row.get(x0, 0.0),
                noise=row.get(noise, 0.0),
            )
            for value, row in rows.items()
        ),
        input_scale=evaluation.input_scale if evaluation else 1.0,
        to_sample=to_sample,
        level=(run.alpha(following), run.sigma(following)),
    )
