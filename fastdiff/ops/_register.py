"""The one way to register an op: `register` gives its schema, implementations, fake and gradient.

Which implementation serves a call is torch's dispatcher's to say. The extension registers its C++
and CUDA kernels when it is imported, for the devices that it was built for; a Triton launch is
registered for CUDA; and the reference, registered for all devices at once
("CompositeExplicitAutograd"), serves where neither is there. So an op exists, and can be faked and
compiled, without the extension and without Triton.

A gradient is registered with its op, not as an autograd.Function around it, because opcheck then
tests it, torch.compile need not trace it, and it may be differentiated in its turn as any op is.
That costs some microseconds of Python at each call, whether a gradient is asked for or not: where
this counts, `needs_gradient` lets a caller choose an op without one.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _ext  # noqa: F401  the extension registers its kernels

HAS_TRITON = importlib.util.find_spec("triton") is not None

# What the ops with Triton kernels run on a GPU, by op; bench compiles it without one.
ON_TRITON: dict[str, Callable[..., Any]] = {}

_library = torch.library.Library("fastdiff", "FRAGMENT")


class Gradient(NamedTuple):
    """`keep(ctx, inputs, output)` saves what `backward(ctx, *upstream)` needs."""

    keep: Callable[..., None]
    backward: Callable[..., Any]


def launch(module: str, name: str = "launch") -> Callable[..., None]:
    """A launch of kernels/<module>.py, which is imported, and Triton with it, at the first call."""

    @cache
    def found() -> Callable[..., None]:
        return getattr(import_module(f"fastdiff.kernels.{module}"), name)

    return lambda *arguments: found()(*arguments)


def returns_nothing(*_arguments: Any) -> None:
    """The fake of an op that only writes into its arguments."""


def register(
    schema: str,
    reference: Callable[..., Any] | None,
    *,
    triton: Callable[..., Any] | None = None,
    fake: Callable[..., Any] = returns_nothing,
    gradient: Gradient | None = None,
) -> Any:
    """Define fastdiff::<name> and return it as a function.

    schema: as torch.library.define takes it, without the namespace; what is written is marked.
    reference: in plain PyTorch, for every device without a kernel; None: there it is an error.
    triton: for CUDA tensors, where Triton is installed.
    fake: makes empty results, for meta and fake tensors.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    torch.library.register_fake(f"fastdiff::{name}", fake, lib=_library)
    if reference is not None:
        _library.impl(name, reference, "CompositeExplicitAutograd")
    if triton is not None:
        ON_TRITON[name] = triton
        if HAS_TRITON:
            _library.impl(name, triton, "CUDA")
    if gradient is not None:
        keep, backward = gradient
        torch.library.register_autograd(
            f"fastdiff::{name}", backward, setup_context=keep, lib=_library
        )
    return getattr(torch.ops.fastdiff, name).default


def needs_gradient(x: Tensor) -> bool:
    """Whether one may be asked for; always where a graph is traced, which shall hold one."""
    return torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled())
