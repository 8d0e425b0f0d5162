"""A CUDA device that is not there: `pytest -p tests.helpers.cuda_stand_in -m gpu ...`.

Tensors are the CPU's and say that they are on cuda:0; a graph is the list of operations that its
capture saw. So the Python of the GPU's path runs: places, keys, the order of things, what the tests
themselves assume. It shows nothing of kernels, streams or memory, and torch.compile does not run.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fastdiff.capture.dry_run import DryRecording, Recorder

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
DEVICE_OF = Tensor.device.__get__  # type: ignore[attr-defined]


def _is_there(value: Any) -> bool:
    """Whether a tensor is said to be on the device."""
    return isinstance(value, Tensor) and getattr(value, "_on_stand_in", False)


def _put(value: Any, there: bool = True) -> Any:
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor):
            tensor._on_stand_in = there  # type: ignore[attr-defined]
    return value


def _names_it(value: Any) -> bool:
    return isinstance(value, str | torch.device) and str(value).startswith("cuda")


def _is_place(value: Any) -> bool:
    return isinstance(value, torch.device) or (
        isinstance(value, str) and value in ("cpu", "cuda", "cuda:0")
    )


class Pretence(TorchFunctionMode):
    """Sends what is asked of cuda to the CPU, and remembers which results are said to be there."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if func == DEVICE_OF:
            return CUDA if _is_there(args[0]) else func(*args)
        if name == "device":  # torch.device itself
            return func(*args, **kwargs)
        if name in ("cuda", "cpu"):
            return _put(args[0].clone(), name == "cuda")
        given = [*args, kwargs.get("device")]
        asked = any(_names_it(value) for value in given if isinstance(value, str | torch.device))
        moves = name == "to" and any(_is_place(v) for v in given[1:] if not isinstance(v, Tensor))
        there = asked or (not moves and any(map(_is_there, tree_leaves((args, kwargs)))))
        if asked:
            args = tuple(CPU if not isinstance(v, Tensor) and _is_place(v) else v for v in args)
            kwargs = kwargs | ({"device": CPU} if "device" in kwargs else {})
        if moves and there != _is_there(args[0]):
            kwargs = kwargs | {"copy": True}
        result = func(*args, **kwargs)
        return _put(result) if there else result


class Graph:
    """Of torch.cuda.CUDAGraph what recordings use.

    As in torch, the first living graph that registers makes the generator's tensor for graphs, in
    inference mode or not; each capture and each replay writes it.
    """

    recording: DryRecording
    living: weakref.WeakSet[Graph] = weakref.WeakSet()
    offset: Tensor

    def register_generator_state(self, generator: Any) -> None:
        if not Graph.living:
            Graph.offset = torch.zeros(1)
        Graph.living.add(self)

    def replay(self) -> None:
        Graph.offset.fill_(1)
        with torch.no_grad():
            self.recording.replay()


class Stream:
    device_index = 0

    def __init__(self, *args: Any) -> None: ...
    def wait_stream(self, other: Stream) -> None: ...
    def wait_event(self, event: Any) -> None: ...
    def record_event(self) -> object:
        return object()


STREAM = Stream()
_capturing = False


@contextlib.contextmanager
def capture(graph: Graph, **options: Any) -> Iterator[None]:
    global _capturing
    graph.register_generator_state(None)
    Graph.offset.fill_(0)
    recorder, _capturing = Recorder(), True
    try:
        with recorder:
            yield
    finally:
        _capturing = False
    graph.recording = DryRecording.__new__(DryRecording)
    graph.recording._steps = recorder.steps


def _weights(module: nn.Module) -> Iterable[Tensor]:
    return [*module.parameters(), *module.buffers()]


def pytest_configure(config: Any) -> None:
    nothing = lambda *args, **kwargs: None
    somewhere = lambda *args: contextlib.nullcontext()
    replaced: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "memory_reserved": lambda *args: 0,
        "current_stream": lambda *args: STREAM,
        "graph_pool_handle": lambda: (0, 1),
        "is_current_stream_capturing": lambda: _capturing,
        "device": somewhere,
        "stream": somewhere,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "default_generators": (torch.default_generator,),
        "graph": capture,
        **dict.fromkeys(("synchronize", "empty_cache", "set_stream"), nothing),
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    for name in ("_cuda_clearCublasWorkspaces", "_cuda_endAllocateToPool"):
        setattr(torch._C, name, nothing)
    plain_to = nn.Module.to

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if not any(_names_it(v) for v in (*args, *kwargs.values())):
            return plain_to(module, *args, **kwargs)
        _put(_weights(module))
        return module

    nn.Module.cuda = lambda module: module.to("cuda")  # type: ignore[assignment, method-assign]
    nn.Module.cpu = lambda module: (_put(_weights(module), False), module)[1]  # type: ignore
    nn.Module.to = to  # type: ignore[assignment, method-assign]
    Pretence().__enter__()
