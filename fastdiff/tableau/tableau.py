"""The tableau: a solver run as a table of linear rows; what every sampler and kernel is given.

A stage is one network evaluation and the one launch after it (the first stage has no evaluation: it
scales the noise). With F the network's raw output, x the state it saw and z fresh noise,

    x0         = clip(p F + q x)                                 only where clipping is asked for
    slot[k]   <- sum_j s_j slot[j] + a x0 + f F + c z            up to three such writes
    next input = c_in * (first write), in the network's dtype

A coefficient that is zero means that the operand is not read. What a row changes can also be read
as an increment, x <- x + (b x + e x0 + a F) + c z: Langevin steps find its length on the device,
and a preconditioner acts on its parts. Tables are made by tracing a solver (trace.py), and can be
printed and stored as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from fastdiff.ops import row
from fastdiff.ops.constants import READS, STAGE_NOISE, WRITES
from fastdiff.tableau.form import Coefficient, is_one, is_zero

JSON_SCHEMA = 2


@dataclass(frozen=True)
class Write:
    """slot <- sum of slots + sample * x0 + output * F + noise * z."""

    slot: int
    slots: dict[int, Coefficient]
    output: Coefficient = 0.0
    sample: Coefficient = 0.0
    noise: Coefficient = 0.0


class Langevin(NamedTuple):
    """An increment whose length is found on the device: x + h g + sqrt(2 h) z; the row holds g.

    h = factor (|z| / |g|)^2, with norms of each "sample", or with their means over the "batch".
    """

    factor: Coefficient
    norms: str = "sample"


@dataclass(frozen=True)
class Stage:
    """One network evaluation (none where `time` is None) and the launch that follows it.

    Attributes:
        time: what the network is told, in its own units.
        sees: the slot whose content, times `input_scale`, the network is shown.
        to_sample: (p, q) of x0 = clip(p F + q slot[sees]); (0, 0) where x0 is not used.
        rates: (alpha, sigma) of the state that the first row makes.
        reads: the slots the launch reads; `sees` comes first where x0 needs it.
        writes: one to three rows; the first is what the next evaluation sees.
        langevin: how the length of a one-slot stage's increment is found, whose direction is the
            row; None: the row is taken as it is.
    """

    time: Coefficient | None
    sees: int
    reads: tuple[int, ...]
    writes: tuple[Write, ...]
    input_scale: Coefficient = 1.0
    to_sample: tuple[Coefficient, Coefficient] = (0.0, 0.0)
    rates: tuple[Coefficient, Coefficient] = (1.0, 0.0)
    langevin: Langevin | None = None

    @property
    def step(self) -> str:
        """Where the length of its increment comes from: one of `fastdiff.ops.constants.STEPS`."""
        return "given" if self.langevin is None else self.langevin.norms

    @property
    def is_increment(self) -> bool:
        """Whether it is x <- x + (b x + e x0 + a F) + c z, for the state x that the network saw."""
        return len(self.writes) == 1 and set(self.writes[0].slots) <= {self.sees}

    @property
    def is_identity(self) -> bool:
        """Whether the launch changes nothing: its only row copies a slot onto itself."""
        first = self.writes[0]
        return (
            len(self.writes) == 1
            and list(first.slots) == [first.slot]
            and is_one(first.slots[first.slot])
            and all(map(is_zero, (first.output, first.sample, first.noise)))
        )

    @property
    def is_stochastic(self) -> bool:
        """Whether any row draws noise."""
        return any(not is_zero(w.noise) for w in self.writes)


@dataclass(frozen=True)
class Tableau:
    """A solver run, as data. Made by `fastdiff.build_tableau`, checked on construction.

    Attributes:
        solver: the solver's name.
        schedule: the schedule's name.
        prediction: what the network is taken to predict (`blend` of "both" included).
        times: the nodes of the time grid, float64 [steps + 1].
        stages: stages[0] evaluates nothing: it prepares the initial state.
        slots: how many state buffers the run needs. Slot 0 holds the noise at the start, slot 1 the
            image where `from_image`.
        result: the slot with the result at the end.
        clip: the bounds x0 is clamped to, or None.
        from_image: whether the run starts from an image with noise added.
        blend: for two-part outputs, (m0, m1) per stage; None otherwise.
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
    blend: tuple[tuple[Coefficient, Coefficient], ...] | None = None

    def __post_init__(self) -> None:
        if not self.stages or self.stages[0].time is not None:
            raise ValueError("stages[0] must evaluate nothing: it prepares the initial state")
        if not 0 <= self.result < self.slots:
            raise ValueError(f"result must be a slot below {self.slots}; got {self.result}")
        if self.blend is not None and len(self.blend) != len(self.stages):
            raise ValueError(f"blend must have {len(self.stages)} pairs; got {len(self.blend)}")
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
        if stage.langevin is not None and not stage.is_increment:
            raise ValueError(f"{name} must keep the state alone, for a Langevin step")
        if not is_zero(stage.to_sample[1]) and stage.reads[:1] != (stage.sees,):
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
            output = any(not is_zero(w.output) or not is_zero(w.sample) for w in stage.writes)
            total += len(stage.reads) + output + len(stage.writes)
        return total

    def padded(self) -> Tableau:
        """This run with equally many reads and writes in all launches.

        What a launch reads more has the factor zero, which is not read; what it writes more are
        zeros, into slots of their own behind the others.
        """
        reads = max(len(stage.reads) for stage in self.stages)
        writes = [len(stage.writes) for stage in self.stages]
        stages = []
        for stage in self.stages:
            others = [slot for slot in range(self.slots) if slot not in stage.reads]
            spare = [self.slots + i for i in range(max(writes) - len(stage.writes))]
            stages.append(
                replace(
                    stage,
                    reads=(*stage.reads, *others[: reads - len(stage.reads)]),
                    writes=(*stage.writes, *(Write(slot, {}) for slot in spare)),
                )
            )
        slots = self.slots + max(writes) - min(writes)
        return replace(self, stages=tuple(stages), slots=slots)

    def require_increments(self) -> None:
        """Raise ValueError unless every stage moves the state alone, as a preconditioner needs."""
        if not all(stage.is_increment for stage in self.stages[1:]):
            raise ValueError(
                f"solver must keep the state alone where a preconditioner acts; got {self.solver}"
            )

    # -- what the kernel is given -----------------------------------------------------------------

    def row(self, number: int) -> np.ndarray:
        """The coefficients of one stage's launch, float64 [1 or B, K]; columns: `fastdiff.ops.row`.

        Slots read are padded with zeros to a kernel variant.
        """
        stage, width = self.stages[number], self.read_width(number)
        low, high = self.clip or (-math.inf, math.inf)
        following = self.stages[number + 1].input_scale if number + 1 < len(self.stages) else 1.0
        padding = [0.0] * (width - len(stage.reads))
        writes = [
            row.Weights(
                w.sample, w.output, w.noise, [*(w.slots.get(s, 0.0) for s in stage.reads), *padding]
            )
            for w in stage.writes
        ]
        return self._stacked(row.columns(row.Head(*stage.to_sample, low, high, following), writes))

    def increment(self, number: int) -> np.ndarray:
        """A stage's change as x + (b x + e x0 + a F) + c z: e, b, a and c, float64 [1 or B, 4].

        With a Langevin step its direction, and its factor in place of c.
        """
        stage = self.stages[number]
        first = stage.writes[0]
        of_state = np.asarray(first.slots.get(stage.sees, 0.0))
        if stage.langevin is None:
            return self._stacked((first.sample, of_state - 1.0, first.output, first.noise))
        return self._stacked((first.sample, of_state, first.output, stage.langevin.factor))

    def index(self, number: int) -> np.ndarray:
        """The integers of one stage's launch, int32 [2 + R + W]: see `fastdiff.ops.row`."""
        stage = self.stages[number]
        first = stage.reads[0] if stage.reads else 0
        padding = [first] * (self.read_width(number) - len(stage.reads))
        writes = [w.slot for w in stage.writes]
        entries = row.index(number, STAGE_NOISE, [*stage.reads, *padding], writes)
        return np.array(entries, dtype=np.int32)

    def read_width(self, number: int) -> int:
        """R, the kernel variant that serves one stage's launch."""
        return row.variant(len(self.stages[number].reads))

    def _stacked(self, columns: Sequence[Coefficient]) -> np.ndarray:
        """Columns side by side, float64 [1 or B, K]."""
        size = (self.samples or 1,)
        return np.stack([np.broadcast_to(np.asarray(c, np.float64), size) for c in columns], 1)

    # -- as text ----------------------------------------------------------------------------------

    def __str__(self) -> str:
        lines = [
            f"{self.solver} on {self.schedule}: {self.steps} steps, {self.nfe} network calls, "
            f"{self.slots} slots, {self.launches} launches, {self.passes} passes over the image"
        ]
        for i, stage in enumerate(self.stages):
            rows = "; ".join(_describe(w, stage) for w in stage.writes)
            if stage.langevin is not None:
                rows = rows.replace("<-", "moves along", 1).removesuffix(" + 1 z")
                rows += f", h = {_number(stage.langevin.factor)} (|z| / |this|)^2 per {stage.step}"
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
        """As JSON text, every coefficient to the last bit; `Tableau.from_json` reads it back."""
        data = {"schema": JSON_SCHEMA} | asdict(self)
        for stage in data["stages"]:
            for write in stage["writes"]:
                write["slots"] = list(write["slots"].items())  # keys of JSON are strings
        return json.dumps(data, default=lambda array: array.tolist())

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
        def write(w: dict[str, Any]) -> Write:
            slots = {slot: _array(c) for slot, c in w["slots"]}
            return Write(w["slot"], slots, *(_array(w[k]) for k in ("output", "sample", "noise")))

        def stage(s: dict[str, Any]) -> Stage:
            langevin = s["langevin"]
            return Stage(
                time=_array(s["time"]),
                sees=s["sees"],
                reads=tuple(s["reads"]),
                writes=tuple(map(write, s["writes"])),
                input_scale=_array(s["input_scale"]),
                to_sample=_pair(s["to_sample"]),
                rates=_pair(s["rates"]),
                langevin=langevin and Langevin(_array(langevin[0]), langevin[1]),
            )

        clip, blend = data["clip"], data["blend"]
        return cls(
            solver=data["solver"],
            schedule=data["schedule"],
            prediction=data["prediction"],
            times=tuple(data["times"]),
            stages=tuple(map(stage, data["stages"])),
            slots=data["slots"],
            result=data["result"],
            clip=clip and tuple(clip),
            from_image=data["from_image"],
            blend=blend and tuple(map(_pair, blend)),
        )


def _coefficients(stage: Stage) -> Iterator[Coefficient]:
    yield from (*stage.to_sample, stage.input_scale)
    if stage.langevin is not None:
        yield stage.langevin.factor
    for w in stage.writes:
        yield from (w.sample, w.output, w.noise, *w.slots.values())


def _number(value: Coefficient) -> str:
    return f"{value:.6g}" if np.ndim(value) == 0 else f"[{value[0]:.6g} ..]"


def _describe(w: Write, stage: Stage) -> str:
    parts = [(c, f"s{slot}") for slot, c in w.slots.items()]
    parts += [(w.sample, "x0"), (w.output, "F"), (w.noise, "z")]
    terms = [f"{_number(c)} {name}" for c, name in parts if not is_zero(c)]
    return f"s{w.slot} <- " + (" + ".join(terms) or "0").replace("+ -", "- ")


def _array(value: Any) -> Coefficient:
    return np.array(value, dtype=np.float64) if isinstance(value, list) else value


def _pair(values: Sequence[Any]) -> tuple[Coefficient, Coefficient]:
    first, second = map(_array, values)
    return first, second
