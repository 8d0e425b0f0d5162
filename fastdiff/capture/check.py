"""What would break or poison a CUDA graph of a function, found on the CPU.

The function runs on tensors that hold their values on the CPU and say that they are on another
device ("meta"), under modes that see every call into PyTorch. It runs three times: the first is the
warm-up, where caches may fill; the other two must issue the same operations with the same numbers,
on tensors that were there before or that they made themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fastdiff.capture.recording import compiled_as_written

DEVICE = torch.device("meta")
GIVEN, WARM_UP, FIRST, SECOND = range(4)  # where a tensor was made: before, or in which run

SCALAR_READ = "scalar read"  # the host waits for a value; replays would go by the captured one
HOST_COPY = "host copy"  # data crosses between host and device
DYNAMIC_SHAPE = "data-dependent shape"
STALE = "storage of an earlier run"  # a replay would go on reading that of the capture
HOST_RANDOM = "host randomness"  # drawn once, at capture
CHANGES = "a number that changes"  # baked in at capture
MIXED = "CPU tensor among device tensors"


@dataclass(frozen=True)
class Finding:
    """An operation that a captured graph cannot hold, or would repeat wrongly.

    kind: one of the constants of this module; what: the operation; file, line, function: the
    innermost place outside of PyTorch that called it.
    """

    kind: str
    what: str
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} in {self.function}: {self.kind}, {self.what}"


def check_capturable(
    fn: Callable[..., Any], *args: Any, modules: Iterable[nn.Module] = (), **kwargs: Any
) -> list[Finding]:
    """Call a function as a capture would, on the CPU; returns what stands in the way, none if [].

    All tensors among the arguments, and the parameters and buffers of the modules, count as being
    on the device. Modules are also found where `fn` is one, has one in an attribute (as a `Sampler`
    has its denoiser) or in its closure. Everything is as it was afterwards, but for what the
    function itself changes.

    Found, with file and line: values read by the host (`item`, `if tensor:`, `tolist`, ...), shapes
    that depend on data (`nonzero`, boolean masks, `unique`), copies between host and device (`cpu`,
    `to`, `torch.tensor(..., device=)`), tensors kept from one run and read in the next, random
    numbers of the host (torch's CPU generator, a `generator=` argument, and by their effect those
    of Python and NumPy), numbers that differ from run to run, CPU tensors among device tensors.

    Not seen: what a Triton or pybind launch does inside, compilation at a later call, waits inside
    of libraries (cuDNN, cuBLAS workspaces), branches taken only where `is_cuda` holds or the device
    is called "cuda", and other streams.
    """
    watch = _Watch()
    found = [*modules, *_modules_of(fn)]
    weights = [tensor for module in found for tensor in module.state_dict().values()]
    for tensor in [*weights, *tree_flatten((args, kwargs))[0]]:
        if isinstance(tensor, Tensor) and tensor.device.type != "cpu":
            raise ValueError(
                "fn must be checked on the CPU: its arguments and modules must be there; got a "
                f"tensor on {tensor.device}"
            )
    with torch.no_grad(), compiled_as_written(), _on_device(found), watch.calls, watch:
        given = tree_map(lambda leaf: _wrap(leaf, GIVEN), (args, kwargs))
        for run in (WARM_UP, FIRST, SECOND):
            watch.begin(run)
            fn(*given[0], **given[1])
        watch.compare()
    return watch.findings


# == Tensors =======================================================================================


class DeviceTensor(Tensor):
    """Values on the CPU behind a tensor that says it is on `DEVICE`."""

    value: Tensor
    born: int

    @staticmethod
    def __new__(cls, value: Tensor, born: int) -> DeviceTensor:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            value.size(),
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            device=DEVICE,
            requires_grad=False,
        )

    def __init__(self, value: Tensor, born: int) -> None:
        self.value, self.born = value, born

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _execute(func, args, kwargs or {}, GIVEN)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.value!r})"


def _wrap(leaf: Any, born: int) -> Any:
    plain = isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor)
    return DeviceTensor(leaf.detach(), born) if plain and leaf.device.type == "cpu" else leaf


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, DeviceTensor) else leaf


def _execute(func: Any, args: Any, kwargs: dict[str, Any], born: int) -> Any:
    """Run an operation on the values; its results are on the device unless it moves them away."""
    leaves, _ = tree_flatten((args, kwargs))
    wrapped = {id(leaf.value): leaf for leaf in leaves if isinstance(leaf, DeviceTensor)}
    device = kwargs.get("device")
    on_device = bool(wrapped)
    if device is not None:
        on_device = torch.device(device) == DEVICE
        kwargs = kwargs | {"device": torch.device("cpu")}
    args, kwargs = tree_map(_value, (args, kwargs))
    results = func(*args, **kwargs)
    if not on_device:
        return results

    def placed(leaf: Any) -> Any:
        known = wrapped.get(id(leaf))
        return _wrap(leaf, born) if known is None else known

    return tree_map(placed, results)


# == What is seen ==================================================================================


class _Watch(TorchDispatchMode):
    """Sees every operation, notes what is wrong, and lets it happen."""

    def __init__(self) -> None:
        super().__init__()
        self.findings: list[Finding] = []
        self.run = WARM_UP
        self.calls = _Calls(self)
        self.logs: dict[int, list[tuple[Any, Finding]]] = {}

    def begin(self, run: int) -> None:
        self.run, self.logs[run] = run, []

    def note(self, kind: str, what: str) -> None:
        """Of the last run: what a warm-up does once is no harm."""
        finding = _here(kind, what)
        if self.run == SECOND and finding not in self.findings:
            self.findings.append(finding)

    def compare(self) -> None:
        """The two runs must have asked for the same things."""
        before, after = self.logs[FIRST], self.logs[SECOND]
        for (old, _), (new, place) in zip(before, after, strict=False):
            if old != new:
                if place not in self.findings:
                    self.findings.append(place)
                return  # what follows may only follow from it
        if len(before) != len(after):
            last = (before if len(before) > len(after) else after)[min(len(before), len(after))][1]
            self.findings.append(last)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        operands = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        held = [leaf for leaf in operands if isinstance(leaf, DeviceTensor)]
        name = str(func).removeprefix("aten.").removesuffix(".default")
        to_device = kwargs.get("device") is not None and torch.device(kwargs["device"]) == DEVICE
        if held or to_device:
            self._operation(func, name, kwargs, operands, held)
            numbers = tuple(_number(leaf) for leaf in leaves)
            self.logs[self.run].append(((str(func), str(spec), numbers), _here(CHANGES, name)))
        elif torch.Tag.nondeterministic_seeded in func.tags:
            self.note(HOST_RANDOM, f"{name} on the CPU")
        return _execute(func, args, kwargs, self.run)

    def _operation(
        self,
        func: Any,
        name: str,
        kwargs: dict[str, Any],
        operands: list[Tensor],
        held: list[DeviceTensor],
    ) -> None:
        tags = func.tags
        masks = name.startswith("index") and any(
            t.dtype in (torch.bool, torch.uint8) for t in operands[1:]
        )
        if torch.Tag.data_dependent_output in tags:
            self.note(SCALAR_READ, name)
        elif masks or (torch.Tag.dynamic_output_shape in tags and not name.startswith("index")):
            self.note(DYNAMIC_SHAPE, name)
        if torch.Tag.nondeterministic_seeded in tags and kwargs.get("generator") is not None:
            self.note(HOST_RANDOM, f"{name} with a generator of its own")
        if self.run == SECOND and any(t.born == FIRST for t in held):
            self.note(STALE, name)
        elsewhere = [t for t in operands if not isinstance(t, DeviceTensor)]
        device = kwargs.get("device")
        leaves = device is not None and torch.device(device) != DEVICE
        if leaves or (elsewhere and name.startswith(("_to_copy", "copy_"))):
            self.note(HOST_COPY, name)
        elif any(t.ndim for t in elsewhere):  # a CPU scalar goes by value
            self.note(MIXED, name)


class _Calls(TorchFunctionMode):
    """Sees the calls that reach PyTorch's dispatcher in pieces, or not at all."""

    READS = ("tolist", "numpy", "__array__", "cpu")
    MAKERS = (torch.tensor, torch.as_tensor, torch.asarray)

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, watch = kwargs or {}, self.watch
        name = getattr(func, "__name__", "")
        first = args[0] if args else kwargs.get("data")
        device = kwargs.get("device")
        if isinstance(first, DeviceTensor):
            if name in self.READS:
                watch.note(HOST_COPY if name == "cpu" else SCALAR_READ, name)
                return getattr(first.value.clone(), name)(*args[1:], **kwargs)
            if name == "new_tensor":
                watch.note(HOST_COPY, name)
                kwargs = {"dtype": first.dtype} | kwargs | {"device": None}
                return _wrap(torch.tensor(*args[1:], **kwargs), watch.run)
            if func in self.MAKERS and device is not None and torch.device(device) != DEVICE:
                watch.note(HOST_COPY, name)
                return func(first.value.clone(), *args[1:], **kwargs)
        elif func in self.MAKERS and device is not None and torch.device(device) == DEVICE:
            watch.note(HOST_COPY, f"{name} on the device")
            if isinstance(first, (list, tuple)) and any(isinstance(v, DeviceTensor) for v in first):
                watch.note(SCALAR_READ, name)
                args = ([_value(v) for v in first], *args[1:])
            made = func(*args, **(kwargs | {"device": None}))
            return _wrap(made.clone() if made is first else made, watch.run)
        return func(*args, **kwargs)


def _number(leaf: Any) -> Any:
    """What of an argument a capture fixes: numbers, shapes, and the values of CPU scalars."""
    if isinstance(leaf, DeviceTensor):
        return tuple(leaf.shape), leaf.dtype
    if isinstance(leaf, Tensor):
        return leaf.item() if leaf.ndim == 0 else (tuple(leaf.shape), leaf.dtype)
    return leaf if isinstance(leaf, (int, float, bool, str, type(None))) else str(leaf)


def _here(kind: str, what: str) -> Finding:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and _inside(frame.f_code.co_filename):
        frame = frame.f_back
    if frame is None:
        return Finding(kind, what, "?", 0, "?")
    code = frame.f_code
    return Finding(kind, what, code.co_filename, frame.f_lineno, code.co_name)


_TORCH = str(Path(torch.__file__).parent)


def _inside(file: str) -> bool:
    return file == __file__ or file.startswith((_TORCH, "<"))


# == Modules =======================================================================================


def _modules_of(fn: Any) -> Iterator[nn.Module]:
    """The modules that a callable is, holds, or closes over."""
    owner = getattr(fn, "__self__", fn)
    cells = (c.cell_contents for c in getattr(fn, "__closure__", None) or () if _filled(c))
    held = () if isinstance(owner, nn.Module) else getattr(owner, "__dict__", {}).values()
    for value in (owner, *held, *cells):
        if isinstance(value, nn.Module):
            yield value
        elif value is not fn and hasattr(value, "denoiser"):
            yield from _modules_of(value)


def _filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True


@contextmanager
def _on_device(modules: list[nn.Module]) -> Iterator[None]:
    """Their parameters and buffers on the device, for a while."""
    undo: list[tuple[dict[str, Any], str, Any]] = []
    wrapped: dict[int, DeviceTensor] = {}
    for module in {part: None for whole in modules for part in whole.modules()}:
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and not isinstance(tensor, DeviceTensor):
                    undo.append((table, name, tensor))
                    wrapped.setdefault(id(tensor), DeviceTensor(tensor.detach(), GIVEN))
                    table[name] = wrapped[id(tensor)]  # type: ignore[assignment]
    try:
        yield
    finally:
        for table, name, tensor in undo:
            table[name] = tensor
