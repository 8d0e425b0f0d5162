"""A stock scheduler's `step`, run once on symbols, becomes one launch.

Nearly every `step` in diffusers is linear in the sample, the network's output, the tensors it kept
and fresh noise. So the stock code itself is run on symbolic linear forms, as solvers of this
package are traced: whatever it does, its own indices, float32 tables, warm-up and last-step rules
included, comes out as a few weights. A `Plan` holds them; the same step of a later image is one
`weighted_sums`. Code that is not linear (a quantile, a norm) says so by `NotLinear` and stays
with the stock class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastdiff.ops import weighted_sums_unchecked
from fastdiff.ops.constants import MAX_OPERANDS, MAX_SUMS
from fastdiff.tableau import Form

# Where an operand comes from: ("given", argument), ("held", attribute[, place]), ("noise", number),
# or a Clamped.
Source = Any


class NotLinear(Exception):
    """The code did something to a sample that no weighted sum does; in words for the user."""


@dataclass(frozen=True)
class Clamped:
    """An operand of its own: clamp(a weighted sum, lowest, highest)."""

    lowest: float
    highest: float
    terms: tuple[tuple[Source, float], ...]


class SampleForm(Form):
    """A sample-shaped tensor as weights of sources; it lives on the CPU and has no data.

    Knows what stock steps do with samples: + - * /, `to`, `clamp`, `torch.stack` and `einsum` over
    a few of them. Anything else raises NotLinear.
    """

    device = torch.device("cpu")  # tables stay on the host while a step is traced
    layout = torch.strided

    def __init__(
        self, terms: Mapping[Source, float], shape: torch.Size, dtype: torch.dtype
    ) -> None:
        super().__init__(terms)
        self.shape, self.dtype = shape, dtype
        self.ndim = len(shape)

    @staticmethod
    def _sum(a: float, b: float) -> float:
        return a + b  # as the stock code rounds

    def _like(self, terms: dict[Source, float]) -> SampleForm:
        return SampleForm(terms, self.shape, self.dtype)

    def __add__(self, other: Any) -> SampleForm:
        if isinstance(other, SampleForm):
            dtype = torch.promote_types(self.dtype, other.dtype)
            return SampleForm(self._added(other), self.shape, dtype)
        if _number(other) == 0:
            return self
        raise NotLinear("a number is added to a sample")

    __radd__ = __add__

    def __mul__(self, factor: Any) -> SampleForm:
        return super().__mul__(_number(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> SampleForm:
        by = _number(divisor)
        # As a tensor divides: by zero is infinite, and then refused.
        return self * (1.0 / by if by else math.inf)

    def __rtruediv__(self, other: Any) -> SampleForm:
        raise NotLinear("something is divided by a sample")

    def __sub__(self, other: Any) -> SampleForm:
        return self + (-other if isinstance(other, SampleForm) else -_number(other))

    def __rsub__(self, other: Any) -> SampleForm:
        return -self + other

    def to(self, *what: Any, dtype: torch.dtype | None = None, **_: Any) -> SampleForm:
        kinds = [w for w in (*what, dtype) if isinstance(w, torch.dtype)]
        return SampleForm(self.terms, self.shape, kinds[0] if kinds else self.dtype)

    def clamp(self, lowest: float, highest: float) -> SampleForm:
        if any(isinstance(source, Clamped) for source in self.terms):
            raise NotLinear("a sample is clamped twice")
        clamped = Clamped(float(lowest), float(highest), tuple(self.terms.items()))
        return SampleForm({clamped: 1.0}, self.shape, self.dtype)

    def dim(self) -> int:
        return self.ndim

    def __getattr__(self, name: str) -> Any:
        raise NotLinear(f"a sample's {name} is taken")

    def __getitem__(self, index: Any) -> Any:
        raise NotLinear("a sample is indexed")

    def __bool__(self) -> bool:
        raise NotLinear("a sample decides a branch")

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        if name in _BINARY and not kwargs:
            left, right = args
            return _BINARY[name](left, right)
        if name == "stack":
            return Stack(args[0])
        if name == "einsum" and args[0] == "k,bkc...->bc...":
            factors, forms = args[1:] if len(args) == 3 else args[1]
            pairs = zip(factors, forms.parts, strict=True)
            return _total(form * factor for factor, form in pairs)
        if name == "zeros_like":
            return SampleForm({}, args[0].shape, args[0].dtype)
        if name == "cat" and all(isinstance(part, SampleForm) for part in args[0]):
            return args[0][0]  # noise drawn image by image
        raise NotLinear(f"{name or func} is taken of a sample")


@dataclass
class Stack:
    """What torch.stack makes of forms; good for an einsum over them."""

    parts: Sequence[SampleForm]
    __torch_function__ = SampleForm.__torch_function__


def _total(forms: Iterable[SampleForm]) -> SampleForm:
    first, *rest = forms
    for form in rest:
        first = first + form
    return first


def _divide(left: Any, right: Any) -> SampleForm:
    if isinstance(right, SampleForm):
        raise NotLinear("something is divided by a sample")
    return left / right


def _multiply(left: Any, right: Any) -> SampleForm:
    form, factor = (left, right) if isinstance(left, SampleForm) else (right, left)
    return form * factor


# Tensor (op) SampleForm comes to __torch_function__ by these names.
_BINARY: dict[str, Callable[[Any, Any], SampleForm]] = {
    "mul": _multiply,
    "rmul": _multiply,
    "add": lambda left, right: left + right if isinstance(left, SampleForm) else right + left,
    "sub": lambda left, right: left - right if isinstance(left, SampleForm) else -right + left,
    "rsub": lambda left, right: right - left if isinstance(right, SampleForm) else -left + right,
    "div": _divide,
    "truediv": _divide,
    "true_divide": _divide,
}


def _number(value: Any) -> float:
    """A coefficient: a number, or a tensor whose elements are all the same."""
    if isinstance(value, SampleForm):
        raise NotLinear("a sample is multiplied by a sample")
    if isinstance(value, Tensor) and value.numel() != 1:
        if value.numel() == 0 or value.ndim == 0 or not bool((value == value.flatten()[0]).all()):
            raise NotLinear("a sample meets a tensor that is neither one of its kind nor a number")
        value = value.flatten()[0]
    return float(value)


class NoiseAsForms(TorchFunctionMode):
    """While a step is traced torch.randn draws nothing: it names a source of noise."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.dtypes = shape, list[torch.dtype]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.randn:
            return func(*args, **kwargs)
        shape = torch.Size(args[0])
        if shape[1:] != self.shape[1:]:
            raise NotLinear("noise of another shape is drawn")
        if shape == self.shape or not self.dtypes:  # else the next image of the same draw
            self.dtypes.append(kwargs.get("dtype") or torch.get_default_dtype())
        return SampleForm({("noise", len(self.dtypes) - 1): 1.0}, self.shape, self.dtypes[-1])


# == Plans =========================================================================================


@dataclass
class Plan:
    """One step of one scheduler in one state, ready to be launched again and again.

    Attributes:
        sources: where the operands come from.
        weights: [sums, operands (+ 1 for the clamped one)], float64 on the host.
        dtypes: of the sums.
        dtype: of the arithmetic: float64 where an operand is.
        clamp: (lowest, highest, weights of the operands) or None.
        noise: dtypes of the noise to draw, in order.
        results: for each field of the output, what it is: a sum is the source ("sum", number).
        output: makes the output object of the fields.
        kept: attributes that hold tensors afterwards: `Held`, or lists with some.
        constants: attributes that hold anything else.
    """

    sources: list[Source]
    weights: list[list[float]]
    dtypes: list[torch.dtype]
    dtype: torch.dtype
    clamp: tuple[float, ...] | None
    noise: list[torch.dtype]
    results: list[Held]
    output: Callable[..., Any]
    kept: dict[str, Any]
    constants: dict[str, Any]
    # The plan is found by the ids of these tables: kept alive, so that no other object gets one.
    holds: tuple[Any, ...] = ()
    uploaded: dict[torch.device, tuple[Tensor, Tensor | None]] = field(default_factory=dict)

    def run(self, tensors: dict[Source, Tensor], device: torch.device) -> tuple[Any, Any]:
        """Launch; returns the output object and the tensor attributes to be set.

        The sums join the tensors that were given.
        """
        if self.weights:
            weights, clamp = self.uploaded.get(device) or self._upload(device)
            operands = [tensors[source] for source in self.sources]
            sums = weighted_sums_unchecked(operands, weights, self.dtypes, clamp)
            for number, value in enumerate(sums):
                tensors["sum", number] = value
        output = self.output(*[tensors[held.source] for held in self.results])
        after = {
            name: tensors[kept.source] if type(kept) is Held else _value(kept, tensors)
            for name, kept in self.kept.items()
        }
        return output, after

    def _upload(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        weights = torch.tensor(self.weights, dtype=self.dtype).to(device)
        clamp = None
        if self.clamp is not None:
            clamp = torch.tensor(self.clamp, dtype=self.dtype).to(device)
        self.uploaded[device] = weights, clamp
        return weights, clamp


@dataclass(frozen=True)
class Held:
    """A tensor after the step: a tensor that was there before, or a sum, ("sum", number)."""

    source: Source


def _value(kept: Any, tensors: Mapping[Source, Tensor]) -> Any:
    if isinstance(kept, Held):
        return tensors[kept.source]
    return [_value(part, tensors) for part in kept] if isinstance(kept, list) else kept


class PlanMaker:
    """Collects the sums that a traced step leaves behind, and lays them out as a plan."""

    def __init__(self, dtypes: Mapping[Source, torch.dtype]) -> None:
        self.dtypes = dtypes  # of all tensors that the step is given or that were kept
        self.sums = list[SampleForm]()

    def held(self, form: SampleForm) -> Held:
        """Where this form's value is found after the step."""
        if len(form.terms) == 1:
            ((source, weight),) = form.terms.items()
            plain = weight == 1.0 and not isinstance(source, Clamped)
            if plain and self.dtypes.get(source) == form.dtype:
                return Held(source)
        for number, other in enumerate(self.sums):
            if other.terms == form.terms and other.dtype == form.dtype:
                return Held(("sum", number))
        self.sums.append(form)
        return Held(("sum", len(self.sums) - 1))

    def value(self, kept: Any) -> Any:
        if isinstance(kept, SampleForm):
            return self.held(kept)
        return [self.value(part) for part in kept] if isinstance(kept, list) else kept

    def plan(
        self,
        results: list[Held],
        output: Callable[..., Any],
        kept: dict[str, Any],
        noise: list[torch.dtype],
        holds: tuple[Any, ...],
    ) -> Plan:
        clamps = {s for form in self.sums for s in form.terms if isinstance(s, Clamped)}
        if len(clamps) > 1:
            raise NotLinear("two samples are clamped")
        clamped = next(iter(clamps), None)
        inside: dict[Source, float] = dict(clamped.terms) if clamped else {}
        everywhere: list[Mapping[Source, float]] = [*(form.terms for form in self.sums), inside]
        named = (s for terms in everywhere for s in terms if not isinstance(s, Clamped))
        sources = list(dict.fromkeys(named))
        if self.sums and not sources:
            raise NotLinear("a sum of nothing")
        if len(sources) > MAX_OPERANDS or len(self.sums) > MAX_SUMS:
            raise NotLinear(f"{len(self.sums)} sums of {len(sources)} tensors are too many")
        columns: list[Any] = [*sources, *clamps]
        weights = [[form.terms.get(c, 0.0) for c in columns] for form in self.sums]
        clamp = None
        if clamped:
            clamp = (clamped.lowest, clamped.highest, *(inside.get(s, 0.0) for s in sources))
        if not all(map(math.isfinite, [w for row in (*weights, clamp or ()) for w in row])):
            raise NotLinear("a coefficient is not finite")
        exact = torch.float64 in {*(self.dtypes.get(s) for s in sources), *noise}
        moving = {name for name, value in kept.items() if isinstance(value, (Held, list))}
        return Plan(
            sources=sources,
            weights=weights,
            dtypes=[form.dtype for form in self.sums],
            dtype=torch.float64 if exact else torch.float32,
            clamp=clamp,
            noise=noise,
            results=results,
            output=output,
            kept={name: value for name, value in kept.items() if name in moving},
            constants={name: value for name, value in kept.items() if name not in moving},
            holds=holds,
        )
