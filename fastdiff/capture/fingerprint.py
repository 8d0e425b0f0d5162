"""What a recording depends on: the state of a network, and the kind of a call."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterator
from enum import Enum
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.capture.recording import NotCapturable
from fastdiff.frameworks import frameworks

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)
MOST_STATES = 64  # States of a network that are remembered; then all are forgotten.


class NetworkWatch:
    """Says whether a network is as it was when a loop over it was recorded.

    Looked at are the modules and their classes, train or eval mode, the addresses and dtypes of
    parameters and buffers, forward hooks, forwards of a module's own, and the attributes that a
    framework names (`Framework.watched`). What is to be compared lies in flat lists, made by one
    walk over the network and again when a module has another one below it or another attribute:
    a look costs the host a tenth of a millisecond, not several.

    It holds modules weakly: it lives in a cache that must not keep the network alive.
    """

    def __init__(self, network: Any) -> None:
        self._root = weakref.ref(network) if isinstance(network, nn.Module) else None
        self._adapters = False
        self._modules: list[weakref.ref[nn.Module]] = []
        self._structure: Any = None  # of the modules when they were walked
        self._watched: list[tuple[int, str]] = []  # module and name of the attributes looked at
        self._last: list[Any] = []
        self._tokens: dict[tuple[Any, ...], int] = {}  # of the states there have been
        self._token, self._count = -1, 0

    def look(self, adapters: bool = False) -> Hashable:
        """A key that is equal where nothing that a recording depends on has changed.

        adapters: whether the caller answers for adapter layers, whose state is not looked at.
        Raises NotCapturable for a network that no replay can hold.
        """
        modules: list[Any] = [ref() for ref in self._modules]
        own = None if None in modules else [module.__dict__ for module in modules]
        if own is None or adapters != self._adapters or self._structure != _structure(own):
            modules, own = self._walk(adapters)
        state = self._state(modules, own)
        if state != self._last:
            if len(self._tokens) >= MOST_STATES:
                self._tokens.clear()
            self._token = self._tokens.setdefault(tuple(state), self._count)
            self._last, self._count = state, self._count + 1
        return self._token

    def weights(self) -> list[Tensor]:
        """Parameters and buffers: a recording knows their addresses, so it must keep them."""
        return _tensors(list(map(vars, self._walked())))

    def _walked(self) -> Iterator[nn.Module]:
        root = None if self._root is None else self._root()
        waiting = [] if root is None else [root]
        while waiting:
            module = waiting.pop()
            yield module
            waiting += [child for child in module._modules.values() if child is not None]

    def _walk(self, adapters: bool) -> tuple[list[Any], list[dict[str, Any]]]:
        modules = list(self._walked())
        own, watched = list(map(vars, modules)), []
        for number, module in enumerate(modules):
            names = {"forward"}.union(*(f.watched(module, adapters) for f in frameworks()))
            watched += [(number, name) for name in sorted(names) if name in own[number]]
        self._modules, self._watched = list(map(weakref.ref, modules)), watched
        self._adapters, self._structure = adapters, _structure(own)
        return modules, own

    def _state(self, modules: list[Any], own: list[dict[str, Any]]) -> list[Any]:
        """All that is compared, in one flat list."""
        tensors = _tensors(own)
        state: list[Any] = [*map(Tensor.data_ptr, tensors), *map(_dtype, tensors)]
        state += map(_training, modules)
        state += map(type, modules)
        # By weak reference: an id may be another's later, and they may own the network.
        state += self._modules
        for hooks in (map(_hooks, own), map(_pre_hooks, own)):
            state += map(
                weakref.ref, chain.from_iterable([h.values() for h in filter(None, hooks)])
            )
        for number, name in self._watched:
            state.append(_fixed(name, own[number][name]))
        return state


# Of a network of 300 modules each of these is a few microseconds, as a loop in Python ten.
_dtype, _training = attrgetter("dtype"), attrgetter("training")
_parameters, _buffers = itemgetter("_parameters"), itemgetter("_buffers")
_hooks, _pre_hooks = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")
_below = itemgetter("_modules")


def _fixed(name: str, value: Any) -> Any:
    """What of an attribute is compared: a plain value, or which object it is."""
    if isinstance(value, PLAIN):
        return value
    try:
        return weakref.ref(value)
    except TypeError:
        raise NotCapturable(f"a module's {name} is a {type(value).__name__}") from None


def _tensors(own: list[dict[str, Any]]) -> list[Tensor]:
    tables = filter(None, chain(map(_parameters, own), map(_buffers, own)))
    tensors = chain.from_iterable([table.values() for table in tables])
    return [tensor for tensor in tensors if tensor is not None]


def _structure(own: list[dict[str, Any]]) -> Any:
    """How many attributes each module has, and which modules are below it."""
    tables = filter(None, map(_below, own))
    children = chain.from_iterable([table.values() for table in tables])
    return list(map(len, own)), list(map(id, children))


def modes(device: torch.device) -> Hashable:
    """What else of PyTorch's state a recording fixes: autocast, the precision of products."""
    return (
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.get_float32_matmul_precision(),
    )


def leaf_key(leaf: Any) -> Hashable:
    """What a recording fixes of an argument: the layout of a tensor, the value of a plain one.

    Raises NotCapturable for anything else: what it holds may change.
    """
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    if not isinstance(leaf, PLAIN):
        raise NotCapturable(f"an argument is a {type(leaf).__name__}, not a tensor or plain value")
    return type(leaf), leaf
