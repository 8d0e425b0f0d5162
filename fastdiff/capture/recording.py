"""What all recordings share: what cannot be recorded, and the state in which functions are."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_stance = threading.RLock()  # held while compiled code runs as Python, and while it is recorded


class NotCapturable(RuntimeError):
    """What an operation does cannot be repeated by a replay."""


@contextmanager
def compiled_as_written() -> Iterator[None]:
    """What torch.compile made runs as the Python it was made of.

    For a mode that sees operations: under one, compiled code is passed over, and with
    fullgraph=True it raises and goes on raising afterwards.
    """
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and it takes seconds to import
        yield
        return
    with _stance, torch.compiler.set_stance("force_eager"):  # of all threads: one at a time
        yield


@contextmanager
def to_be_recorded() -> Iterator[None]:
    """In which functions are recorded: gradients off, one thread at a time.

    Tensors of inference mode could not be written later. Autocast's cache would keep copies of the
    weights as they are. And a recording in another thread must not make this one's compiled code
    run as Python.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with torch.inference_mode(False), torch.no_grad(), _stance:
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def as_it_is(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf
