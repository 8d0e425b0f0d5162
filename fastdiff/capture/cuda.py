"""A recording on a GPU: a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff.capture.recording import compiled_as_written

WARM_UPS = 2  # runs before a capture: lazy initialisation, autotuning, compilation


class CudaRecording:
    """A function as a CUDA graph, captured in thread-local mode.

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
