"""diffusers' schedulers with a fused `step`: the same classes, constructors, configs and results.

    from fastdiff.integrations.diffusers.schedulers import PNDMScheduler
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)

Each is a subclass of the stock class under the stock name, so saved configs load in stock diffusers
and the other way round. `step` is one launch where the stock step is linear, else the stock step;
`scheduler.describe()` counts both. The first step of a kind is traced from the stock code
(linear_step.py), at about the cost of a stock step; a later one finds its plan by the scheduler's
own state: numbers by value, tables by identity. Equal tables of a new run are therefore made the
same object in `set_timesteps`.

Nothing inside a planned `step` waits for the device, given timesteps of the scheduler's own: their
values are known on the host. Steps keep no state of their own beyond the stock attributes; `clone`
gives another request a scheduler that shares the plans.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections import Counter
from collections.abc import Callable
from operator import itemgetter
from typing import Any, TypeVar

import diffusers
import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff.integrations.diffusers.linear_step import (
    NoiseAsForms,
    NotLinear,
    Plan,
    PlanMaker,
    SampleForm,
    Source,
)

# Attributes in which stock schedulers keep tensors of the sample's shape.
HISTORY = (
    "model_outputs",
    "last_sample",
    "ets",
    "cur_sample",
    "cur_model_output",
    "sample",
    "prev_derivative",
)
PLAIN = (bool, int, float, str, Tensor)  # in a key: numbers by value, tensors by identity
SIMPLE = frozenset((bool, int, float, str, type(None)))  # the types of most options
MOST_PLANS = 8192  # of a scheduler: eight runs of 1000 steps

S = TypeVar("S", bound="FusedStep")


class _Fusion:
    """What a scheduler's clones share: plans, known tables, counts."""

    def __init__(self) -> None:
        self.plans: dict[Any, Plan | str] = {}
        # The first table of each content, and the version it had then.
        self.tables: dict[Any, tuple[Any, int]] = {}
        # For each attribute the table that it held last, and its version.
        self.seen: dict[str, tuple[Any, int]] = {}
        # A timesteps table, its values, and the bytes from one to the next.
        self.times: dict[int, tuple[Tensor, list[float], int]] = {}
        # For a table of sigmas its version, and sqrt(sigma^2 + 1) of each entry.
        self.scales: dict[int, tuple[Tensor, int, Any]] = {}
        self.attributes: dict[Any, _Attributes] = {}  # by names and types
        self.counts: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def known(self, name: str, table: Tensor | np.ndarray) -> Any:
        """The first table of this content, under this attribute and on this device."""
        host = table.detach().cpu().numpy() if isinstance(table, Tensor) else table
        place = str(table.device) if isinstance(table, Tensor) else ""
        key = name, place, str(host.dtype), host.shape, host.tobytes()
        found, version = self.tables.get(key, (None, 0))
        if found is None or _version(found) != version:  # written to since
            found = table
            self.tables[key] = found, _version(found)
        if name == "timesteps" and isinstance(found, Tensor):
            self.times[id(found)] = found, host.tolist(), found.stride(-1) * found.element_size()
        return found


def _version(table: Any) -> int:
    """Of a tensor's content; inference tensors and arrays count none."""
    return 0 if isinstance(table, np.ndarray) or table.is_inference() else table._version


class _Attributes:
    """A scheduler's attributes sorted by how they enter a key: by value, as samples, otherwise."""

    def __init__(self, own: dict[str, Any]) -> None:
        rest = [name for name in own if name not in HISTORY and name != "_fusion"]
        simple = [name for name in rest if own[name] is None or isinstance(own[name], PLAIN)]
        tables = [name for name in simple if isinstance(own[name], Tensor)]
        self.history = [name for name in own if name in HISTORY]
        self.others = [name for name in rest if name not in simple]
        self.plain = _values([name for name in simple if name not in tables])
        self.tables = _values(tables)


def _values(names: list[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """What gets the values of these names, as a tuple."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda own: tuple(own[name] for name in names)


class FusedStep:
    """A stock scheduler whose linear steps are single launches. Mixed in before the stock class."""

    def describe(self) -> dict[str, Any]:
        """How many steps were fused, which stayed with the stock class and why, what was read.

        host_reads: timesteps that were read back from the device because they were not the
        scheduler's own, with their number.
        """
        fusion = _fusion(self)
        fused, stock = fusion.counts["fused"], dict(fusion.counts)
        stock.pop("fused", None)
        return {
            "scheduler": type(self).__name__,
            "fused_steps": fused,
            "stock_steps": stock,
            "plans": sum(isinstance(plan, Plan) for plan in fusion.plans.values()),
            "host_reads": dict(fusion.reads),
        }

    def clone(self: S) -> S:
        """Another scheduler in the same state, for a request of its own; the plans are shared."""
        _fusion(self)  # made now, so that it is shared
        return type(self).of(self)

    @classmethod
    def of(cls: type[S], stock: Any) -> S:
        """The twin of a scheduler of the stock class, in its present state."""
        twin = object.__new__(cls)
        vars(twin).update(
            (k, list(v) if isinstance(v, list) else v) for k, v in vars(stock).items()
        )
        return twin

    def __deepcopy__(self: S, memo: dict[int, Any]) -> S:
        other = object.__new__(type(self))
        memo[id(self)] = other
        own = {k: v for k, v in vars(self).items() if k != "_fusion"}
        vars(other).update(copy.deepcopy(own, memo))
        return other

    def __reduce__(self) -> Any:
        own = {k: v for k, v in vars(self).items() if k != "_fusion"}
        return _rebuild, (type(self).__name__, own)

    def _know_tables(self) -> None:
        fusion = _fusion(self)
        for name, value in vars(self).items():
            if not isinstance(value, (Tensor, np.ndarray)) or name in HISTORY:
                continue
            seen, version = fusion.seen.get(name, (None, 0))
            if seen is value and version == _version(value):
                continue
            value = vars(self)[name] = fusion.known(name, value)
            if isinstance(value, Tensor) and not value.is_inference():  # else changes do not show
                fusion.seen[name] = value, _version(value)


def _rebuild(name: str, state: dict[str, Any]) -> Any:
    other = object.__new__(globals()[name])
    vars(other).update(state)
    return other


def _fusion(scheduler: Any) -> _Fusion:
    own = vars(scheduler)
    if "_fusion" not in own:
        own["_fusion"] = _Fusion()
    return own["_fusion"]


def fused(stock_step: Callable[..., Any]) -> Callable[..., Any]:
    """A stock step as a method that launches its plan."""
    signature = inspect.signature(stock_step)
    names = list(signature.parameters)[1:]
    defaults = {
        name: parameter.default
        for name, parameter in signature.parameters.items()
        if parameter.default is not parameter.empty
    }

    special = ("timestep", "sample", "model_output", "generator")
    options = [name for name in names if name not in special]

    @functools.wraps(stock_step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        fusion = _fusion(self)
        given = defaults | dict(zip(names, args, strict=False)) | kwargs
        try:
            if len(given) != len(names) or (
                kwargs and not kwargs.keys().isdisjoint(names[: len(args)])
            ):
                raise NotLinear("the arguments are not those of the stock step")  # which says so
            call = _Call(self, fusion, stock_step, given, options)
            plan = fusion.plans.get(call.key)
            if plan is None:
                self._know_tables()  # set by other ways than set_timesteps
                call = _Call(self, fusion, stock_step, given, options)
                plan = fusion.plans.get(call.key)
            if plan is None:
                if len(fusion.plans) >= MOST_PLANS:
                    fusion.plans.clear()
                plan = fusion.plans[call.key] = call.trace()
            if isinstance(plan, str):
                raise NotLinear(plan)
        except NotLinear as why:
            fusion.counts[str(why)] += 1
            return stock_step(self, *args, **kwargs)
        call.draw(plan.noise)
        output, kept = plan.run(call.sources, call.output.device)
        own = vars(self)
        own.update(plan.constants)
        own.update(kept)
        fusion.counts["fused"] += 1
        return output

    return step


class _Call:
    """One call of `step`: its tensors, its other arguments, and the key that finds its plan."""

    def __init__(
        self,
        scheduler: Any,
        fusion: _Fusion,
        stock_step: Callable[..., Any],
        given: dict[str, Any],
        names: list[str],
    ) -> None:
        self.scheduler, self.fusion, self.stock_step = scheduler, fusion, stock_step
        output, sample = given.get("model_output"), given.get("sample")
        if not isinstance(output, Tensor) or not isinstance(sample, Tensor):
            raise NotLinear("model_output and sample are not both tensors")
        self.output, self.sample = output, sample
        self.shape, self.generator, self.given = sample.shape, given.get("generator"), given
        self.sources: dict[Source, Tensor] = {
            ("given", "sample"): sample,
            ("given", "model_output"): output,
        }
        options = [given[name] for name in names]
        for number, value in enumerate(options):
            if type(value) in SIMPLE:
                continue
            if isinstance(value, Tensor):
                self.sources["given", names[number]] = value
                options[number] = value.dtype
            elif not isinstance(value, PLAIN):
                raise NotLinear(f"{names[number]} is a {type(value).__name__}")
        timestep = given.get("timestep")
        self.time = self._time(timestep)
        self.key = (
            stock_step.__name__,
            self.time,
            type(timestep),
            output.dtype,
            sample.dtype,
            self.generator is None,
            *options,
            self._state(),
        )
        self._check()

    def _check(self) -> None:
        shape, device, grad = self.shape, self.sample.device, torch.is_grad_enabled()
        for tensor in self.sources.values():
            if tensor.shape != shape or not tensor.is_floating_point():
                raise NotLinear("a tensor is not of the sample's shape, or of whole numbers")
            if tensor.device != device:
                raise NotLinear(f"tensors on {tensor.device} and {device}")
            if grad and tensor.requires_grad:
                raise NotLinear("gradients are asked for")
        if not (self.sample.is_cpu or self.sample.is_cuda):
            raise NotLinear(f"tensors on {device}")
        if torch.compiler.is_compiling():
            raise NotLinear("the step is inside torch.compile")

    def _state(self) -> Any:
        """The scheduler's part of the key; tensors of the sample's kind become sources."""
        own = vars(self.scheduler)
        kinds = tuple(own), tuple(map(type, own.values()))
        sorted_ = self.fusion.attributes.get(kinds)
        if sorted_ is None:
            sorted_ = self.fusion.attributes[kinds] = _Attributes(own)
        tables = sorted_.tables(own)
        state: list[Any] = [sorted_, *sorted_.plain(own), *map(id, tables), *map(_version, tables)]
        for name in sorted_.history:
            value = own[name]
            if value is None:
                continue  # its type is in the key
            if isinstance(value, list):
                state += [len(value)]
                state += [self._held(("held", name, i), part) for i, part in enumerate(value)]
            else:
                state.append(self._held(("held", name), value))
        others = [own[name] for name in sorted_.others]
        self.holds = [*tables, *others]  # identities stay their own
        for value in others:
            if isinstance(value, list):
                simple = all(v is None or isinstance(v, PLAIN[:-1]) for v in value)
                state.append(tuple(value) if simple else len(value))
            else:
                state.append(id(value))
        return tuple(state)

    def _held(self, source: Source, value: Any) -> Any:
        """A kept tensor becomes a source, unless it is left over from samples of another shape."""
        if not isinstance(value, Tensor):
            return value
        if value.shape != self.shape:
            return "of another shape"
        self.sources[source] = value
        return value.dtype

    def _time(self, timestep: Any) -> Any:
        """The timestep as a number; nothing waits for a device if it is one of the scheduler's."""
        if not isinstance(timestep, Tensor):
            return timestep
        if timestep.numel() != 1:
            raise NotLinear("a timestep for each sample")
        table = vars(self.scheduler).get("timesteps")
        if id(table) in self.fusion.times:
            known, values, size = self.fusion.times[id(table)]
            place = timestep.data_ptr() - known.data_ptr()
            if timestep.dtype == known.dtype and 0 <= place < size * len(values):
                return values[place // size]
        if not timestep.is_cpu:
            self.fusion.reads["timestep"] += 1
        return timestep.item()

    def draw(self, dtypes: list[torch.dtype]) -> None:
        """Noise as the stock step draws it: the same generators, the same order."""
        for number, dtype in enumerate(dtypes):
            self.sources["noise", number] = randn_tensor(
                self.output.shape,
                generator=self.generator,
                device=self.output.device,
                dtype=dtype,
            )

    def trace(self) -> Plan | str:
        """Run the stock step on symbols, on a copy of the scheduler; or why it is not linear."""
        shadow, shape = copy.copy(self.scheduler), self.sample.shape
        forms = {s: SampleForm({s: 1.0}, shape, t.dtype) for s, t in self.sources.items()}
        state = vars(shadow)
        for name, value in state.items():
            if name in HISTORY and isinstance(value, Tensor):
                state[name] = forms.get(("held", name), value)
            elif isinstance(value, list):
                state[name] = [forms.get(("held", name, i), part) for i, part in enumerate(value)]
            elif isinstance(value, Tensor) and value.device.type != "cpu":
                state[name] = value.cpu()
        before = {k: list(v) if isinstance(v, list) else v for k, v in state.items()}
        given = {name: forms.get(("given", name), value) for name, value in self.given.items()}
        if "generator" in given and ("given", "variance_noise") not in forms:
            given["generator"] = None  # nothing is drawn
        if isinstance(given.get("timestep"), Tensor):
            given["timestep"] = torch.tensor(self.time, dtype=given["timestep"].dtype)
        try:
            with NoiseAsForms(shape) as noise:
                result = self.stock_step(shadow, **given)
            fields, make = _fields(result)
            maker = PlanMaker({s: t.dtype for s, t in self.sources.items()})
            results = [maker.held(form) for form in fields]
            kept = {
                name: self._kept(name, maker.value(value))
                for name, value in vars(shadow).items()
                if name != "_fusion" and not (name in before and _same(value, before[name]))
            }
            return maker.plan(results, make, kept, noise.dtypes, tuple(self.holds))
        except NotLinear as why:
            return str(why)

    def _kept(self, name: str, value: Any) -> Any:
        """Small tables that a step leaves (Heun's dt) are found again by identity, too."""
        return self.fusion.known(name, value) if isinstance(value, Tensor) else value


def _same(value: Any, before: Any) -> bool:
    """Whether an attribute still holds the very same things."""
    if isinstance(value, list) and isinstance(before, list):
        return len(value) == len(before) and all(map(_same, value, before))
    return value is before or (
        type(value) is type(before) and isinstance(value, (int, float, str)) and value == before
    )


def _fields(result: Any) -> tuple[list[SampleForm], Callable[..., Any]]:
    """The forms of a step's result, and what makes such a result of tensors."""
    if isinstance(result, tuple):
        fields, make = list(result), lambda *tensors: tensors
    else:
        names, kind = list(result.keys()), type(result)
        new: Callable[..., Any] = kind.__new__
        fields = [result[name] for name in names]

        def make(*tensors: Tensor) -> Any:
            filled = new(kind)  # its own start looks up its fields each time
            for name, tensor in zip(names, tensors, strict=True):
                filled[name] = tensor  # also the attribute
            return filled

    if not all(isinstance(f, SampleForm) for f in fields):
        raise NotLinear("the result holds more than samples")
    return fields, make


def _tabled(stock_set: Callable[..., Any]) -> Callable[..., Any]:
    """A stock `set_timesteps` after which equal tables are the same objects."""

    @functools.wraps(stock_set)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_set(self, *args, **kwargs)
        self._know_tables()

    return set_timesteps


def _scaled(stock_scale: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A stock `scale_model_input` that divides by sqrt(sigma^2 + 1), with these ready.

    The stock one computes each anew, in four operations on tensors of one number.
    """

    @functools.wraps(stock_scale)
    def scale_model_input(self: Any, sample: Tensor, timestep: Any) -> Tensor:
        if self.step_index is None:
            self._init_step_index(timestep)
        table, known = self.sigmas, _fusion(self).scales
        _, version, scales = known.get(id(table), (None, -1, ()))
        if version != _version(table):
            scales = ((table**2 + 1) ** 0.5).unbind()
            known[id(table)] = table, _version(table), scales
        if "is_scale_input_called" in vars(self):
            self.is_scale_input_called = True
        return sample / scales[self.step_index]

    return scale_model_input


def _fused_class(stock: Any, *steps: str, scales_input: bool = False) -> Any:
    """The subclass under the stock name, with these methods fused."""
    methods: dict[str, Any] = {name: fused(getattr(stock, name)) for name in steps or ("step",)}
    if scales_input:
        methods["scale_model_input"] = _scaled(stock.scale_model_input)
    methods["set_timesteps"] = _tabled(stock.set_timesteps)
    # The stock module's name: pipelines save a scheduler by it, and then load without this package.
    own = {"__module__": stock.__module__, "__doc__": stock.__doc__}
    return type(stock.__name__, (FusedStep, stock), own | methods)


PNDMScheduler = _fused_class(diffusers.PNDMScheduler, "step_prk", "step_plms")
DDIMScheduler = _fused_class(diffusers.DDIMScheduler)
DDPMScheduler = _fused_class(diffusers.DDPMScheduler)
DPMSolverMultistepScheduler = _fused_class(diffusers.DPMSolverMultistepScheduler)
UniPCMultistepScheduler = _fused_class(diffusers.UniPCMultistepScheduler)
DEISMultistepScheduler = _fused_class(diffusers.DEISMultistepScheduler)
EulerDiscreteScheduler = _fused_class(diffusers.EulerDiscreteScheduler, scales_input=True)
HeunDiscreteScheduler = _fused_class(diffusers.HeunDiscreteScheduler, scales_input=True)
ScoreSdeVeScheduler = _fused_class(diffusers.ScoreSdeVeScheduler, "step_pred", "step_correct")
