"""A recording on the CPU: the list of PyTorch operations, issued again in order.

With the very tensors that they ran on. It is slower than the function, and a proof that nothing of
it depends on Python, on addresses that move or on numbers that were read by the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fastdiff.capture.recording import NotCapturable, as_it_is, compiled_as_written

Step = tuple[Any, tuple[Any, ...], dict[str, Any], list[Tensor]]


class DryRecording:
    """The operations of a function on CPU tensors: a dry run of what a CUDA graph would do.

    Attributes:
        result: what the function returned; a replay writes it anew, at the same address.
    """

    def __init__(self, body: Callable[[], Tensor]) -> None:
        recorder = Recorder()
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


class Recorder(TorchDispatchMode):
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


def _has_mask(args: Iterable[Any]) -> bool:
    indices = next((a for a in args if isinstance(a, (list, tuple))), ())
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _shape_of_data(func: Any) -> bool:
    name = func.overloadpacket.__name__
    return torch.Tag.dynamic_output_shape in func.tags and not name.startswith("index")
