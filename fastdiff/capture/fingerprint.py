"""What a recording depends on: the state of a network, and the kind of a call."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.capture.recordings import NotCapturable


def network_state(
    network: Any, device: torch.device, *, adapters: bool = False
) -> tuple[list[Tensor], Hashable]:
    """What a recording fixes of a network: its weights, whose memory is to be kept, and a key.

    The key has addresses and dtypes of parameters and buffers, classes, own forwards and attention
    processors of the modules, train or eval mode, hooks, FreeU's numbers, autocast and the
    precision of float32 products. adapters: whether adapter layers are allowed, whose own state it
    lacks.
    Raises NotCapturable for weights that are moved about (an offloading hook), and for adapters.
    """
    weights: list[Tensor] = []
    key: list[Any] = [torch.is_autocast_enabled(device.type),
                      torch.get_autocast_dtype(device.type),
                      torch.get_float32_matmul_precision()]  # fmt: skip
    waiting = [network] if isinstance(network, nn.Module) else []
    while waiting:
        module = waiting.pop()
        own = vars(module)
        if "_hf_hook" in own:
            raise NotCapturable(f"{type(module).__name__} has an offloading hook")
        if not adapters and type(module).__module__.startswith("peft."):
            raise NotCapturable(f"{type(module).__name__} is an adapter's layer: fuse and unload "
                                "it, or give capture_key=")  # fmt: skip
        key += (type(module), module.training)
        # By weak reference: an id may be another's later, and they may own the network.
        if "forward" in own or "processor" in own:
            key += [weakref.ref(own[name]) for name in ("forward", "processor") if name in own]
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            if hooks:
                key += map(weakref.ref, hooks.values())
        if own.get("s1") is not None:
            key.append(tuple(own.get(name) for name in ("s1", "s2", "b1", "b2")))
        for table in (module._parameters, module._buffers):
            for tensor in table.values():
                if tensor is not None:
                    weights.append(tensor)
                    key += (tensor.data_ptr(), tensor.dtype)
        waiting += [child for child in module._modules.values() if child is not None]
    return weights, tuple(key)


PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, Enum)


def leaf_key(leaf: Any) -> Hashable:
    """What a recording fixes of an argument: the layout of a tensor, the value of a plain one.

    Raises NotCapturable for anything else: what it holds may change.
    """
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    if not isinstance(leaf, PLAIN):
        raise NotCapturable(f"an argument is a {type(leaf).__name__}, not a tensor or plain value")
    return type(leaf), leaf
