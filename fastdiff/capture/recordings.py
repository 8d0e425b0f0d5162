"""A function of tensors, recorded once over fixed buffers and replayed.

On CUDA the recording is a CUDA graph. On the CPU it is the list of PyTorch operations with the very
tensors they ran on, issued again in order: slower than the function, and a proof that nothing of it
depends on Python, on addresses that move or on numbers that were read by the host.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

WARM_UPS = 2  # runs before a capture: lazy initialisation, autotuning, compilation

stance = threading.RLock()  # held while compiled code runs as Python, and while it is recorded


class NotCapturable(RuntimeError):
    """What an operation does cannot be repeated by a replay."""


class CpuRecording:
    """The operations of a function on CPU tensors.

    Attributes:
        result: what the function returned; a replay writes it anew, at the same address.
    """

    def __init__(self, body: Callable[[], Tensor]) -> None:
        recorder = _Recorder()
        with compiled_as_written(), recorder:
            self.result = body()
        self._steps = recorder.steps

    def replay(self) -> None:
        for func, args, kwargs, fresh in self._steps:
            results = func(*args, **kwargs)
            for kept, new in zip(fresh, _fresh(func, results), strict=True):
                kept.copy_(new)

    def intermediates(self) -> Iterator[Tensor]:
        """Every tensor that an operation of the function made."""
        for _, _, _, fresh in self._steps:
            yield from fresh

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.intermediates())


class CudaRecording:
    """The same as a CUDA graph, captured in thread-local mode.

    place: the memory pool and the stream of its captures. The graph knows addresses only: it keeps
    what operations of a warm-up read, and whoever makes it what else it needs.
    """

    def __init__(self, body: Callable[[], Tensor], device: torch.device, place: Any) -> None:
        pool, aside = place
        with torch.cuda.device(device):
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    body()
                with compiled_as_written(), Reader() as reader:
                    body()
            self._read = reader.foreign()  # tables in attributes, caches: kept alive
            stream = torch.cuda.current_stream()
            stream.wait_stream(aside)
            torch.cuda.synchronize()
            # cuBLAS's workspace goes into the pool: others may free the one of the warm-up.
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            self._graph = torch.cuda.CUDAGraph()
            # torch makes the generator's two tensors for graphs when the first living graph
            # registers, in the mode of that moment: here not as inference tensors, which captures
            # and replays of others could not write. Others may have made them so before: that is
            # why ours begin a capture, and replay, in inference mode, which may write both kinds.
            generator = torch.cuda.default_generators[torch.cuda.current_device()]
            self._graph.register_generator_state(generator)
            try:
                # The stream is given: the default one belongs to the device that captured first.
                with (
                    torch.inference_mode(),
                    torch.cuda.graph(
                        self._graph, pool=pool, stream=aside, capture_error_mode="thread_local"
                    ),
                    torch.inference_mode(False),
                    torch.no_grad(),
                ):
                    self.result = body()
            except BaseException:  # a capture that breaks off may leave both as they were in it
                torch.cuda.set_stream(stream)
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(stream.device_index, pool)
                raise
            self.bytes = max(torch.cuda.memory_reserved() - before, 0)

    def replay(self) -> None:
        with torch.inference_mode():
            self._graph.replay()


@contextmanager
def compiled_as_written() -> Iterator[None]:
    """What torch.compile made runs as the Python it was made of.

    For a mode that sees operations: under one, compiled code is passed over, and with
    fullgraph=True it raises and goes on raising afterwards.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and it takes seconds to import
        yield
        return
    with stance, torch.compiler.set_stance("force_eager"):  # of all threads: one at a time
        yield


# == Recording on the CPU ==========================================================================

Step = tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]


class Reader(TorchDispatchMode):
    """Collects the tensors that operations read and did not make: tables in attributes, caches."""

    def __init__(self) -> None:
        super().__init__()
        self._made: set[int] = set()
        self._read: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._made:
                    self._read.setdefault(storage._cdata, leaf.detach())
        results = func(*args, **kwargs)
        for leaf in tree_leaves(results):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                storage = leaf.untyped_storage()
                if storage._cdata not in self._read:
                    self._made.add(storage._cdata)
        return results

    def foreign(self) -> list[Tensor]:
        return list(self._read.values())


class _Recorder(TorchDispatchMode):
    """Lists the operations that a replay has to issue, with the tensors they made."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        masked = func.overloadpacket.__name__.startswith("index") and _has_mask(args)
        read = torch.Tag.data_dependent_output in func.tags
        if read or masked or _shape_of_data(func):
            raise NotCapturable(f"{func} reads data on the host or sizes a tensor by it")
        results = func(*args, **kwargs)
        fresh = list(_fresh(func, results))
        empty = func.overloadpacket.__name__.startswith(("empty", "new_empty"))
        written = func._schema.is_mutable and torch.Tag.inplace_view not in func.tags
        if (fresh and not empty) or written:
            # As they are now: a later operation may give them another shape in place.
            args, kwargs = tree_map(as_it_is, (args, kwargs))
            self.steps.append((func, args, kwargs, [as_it_is(t) for t in fresh]))
        return results


def _fresh(func: Any, results: Any) -> Iterator[Tensor]:
    """Those results of an operation that are neither views nor written arguments."""
    listed = results if isinstance(results, (tuple, list)) else (results,)
    returns = func._schema.returns
    if len(returns) == 1 and isinstance(results, list):  # one list of tensors
        listed, returns = results, returns * len(results)
    for result, declared in zip(listed, returns, strict=False):
        if isinstance(result, Tensor) and declared.alias_info is None:
            yield result


def as_it_is(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _has_mask(args: Iterable[Any]) -> bool:
    indices = next((a for a in args if isinstance(a, (list, tuple))), ())
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _shape_of_data(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return torch.Tag.dynamic_output_shape in func.tags and not name.startswith("index")
