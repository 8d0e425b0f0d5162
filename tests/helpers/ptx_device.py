"""A GPU made of its machine code, as a pytest plugin: `pytest -p tests.helpers.ptx_device -m gpu`.

Triton compiles for an H100 (bench/compile_only.py), and each launch runs its PTX on the CPU tensors
that it was given (tests/helpers/ptx): tests see what the compiled code computes, with
bfloat16, tf32 and fused operations as they are there. The ops' CUDA implementations serve CPU
tensors, so that an op's call is its kernel's launch. `--ptx-counts DIR` keeps the counts.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bench import compile_only
from bench.ptx import ARCH, Count
from tests.helpers.ptx import Program

os.environ["TRITON_INTERPRET"] = "0"  # before tests/conftest.py asks for the interpreter

_INTEGERS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q",
             "u1": "?", "u8": "B", "u16": "H", "u32": "I", "u64": "Q"}  # fmt: skip
_FLOATS = {"fp16": "e", "fp32": "f", "fp64": "d"}


class Device:
    """Runs what is launched, and counts it."""

    def __init__(self) -> None:
        self.counts: dict[str, Count] = defaultdict(Count)
        self.test = ""

    def launch(self, launch: compile_only.Launch) -> None:
        count = self.counts[launch.name]
        count.launches += 1
        count.bfloat16 += any(kind == "*bf16" for kind, _ in launch.arguments)
        count.variants.add(launch.hash)
        if self.test:
            count.tests.add(self.test)
        scratch = [bytes(8), bytes(8)]  # for the whole launch and for a profile: unused
        _program(launch.ptx).run(
            launch.grid,
            [_bytes(kind, value) for kind, value in launch.arguments] + scratch,
            [(storage.data_ptr(), storage.nbytes()) for storage in _storages(launch)],
            launch.shared,
        )


@lru_cache(maxsize=16)  # variants are launched again soon or never, and many would fill the memory
def _program(ptx: Path) -> Program:
    return Program(ptx.read_text())


def _bytes(kind: str, value: Any) -> bytes:
    """A parameter as the code reads it."""
    if kind.startswith("*"):
        return struct.pack("<Q", value.data_ptr() if isinstance(value, Tensor) else int(value or 0))
    return struct.pack("<" + (_INTEGERS | _FLOATS)[kind], value)


def _storages(launch: compile_only.Launch) -> Iterator[torch.UntypedStorage]:
    for _, value in launch.arguments:
        if isinstance(value, Tensor):
            yield value.untyped_storage()


class OnTheDevice(TorchFunctionMode):
    """Says that every tensor is on the GPU where an op asks, to choose its kernel."""

    IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func == self.IS_CUDA or func(*args, **(kwargs or {}))


_library: torch.library.Library


def install() -> Device:
    """Compile for an H100, and let launches and ops run on the CPU's tensors."""
    global _library
    device = Device()
    compile_only.install(ARCH, device.launch)
    _library = torch.library.Library("fastdiff", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that they do
        for name, function in compile_only.implementations().items():
            _library.impl(name, function, "CPU", allow_override=True)
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    OnTheDevice().__enter__()
    return device


# == The plugin ====================================================================================

_device: Device


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ptx-counts", type=Path, metavar="DIR",
                     help="where each process keeps the counts of what ran as PTX")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    global _device
    _device = install()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    _device.test = item.nodeid
    try:
        return (yield)
    finally:
        _device.test = ""


def pytest_sessionfinish(session: pytest.Session) -> None:
    if folder := session.config.getoption("--ptx-counts"):
        counts = {name: count.to_json() for name, count in _device.counts.items()}
        (folder / f"{os.getpid()}.json").write_text(json.dumps(counts))
