"""Triton's interpreter with the numerics of a GPU's tensor cores.

The interpreter multiplies float32 matrices in float32, whatever precision is asked for. On a GPU
"tf32" drops the low 13 bits of both operands, and "bf16x3" is three products of bfloat16 parts:
of a = a_high + a_low, b likewise, a_high b_high + a_high b_low + a_low b_high, summed in float32.

`DEVICE` is where the tests of kernels have their tensors, and `INTERPRETED` says whether Triton
interprets kernels, which it decides when it is imported (tests/conftest.py asks for it).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED: bool = triton.knobs.runtime.interpret

Product = Callable[[np.ndarray, np.ndarray], np.ndarray]


def bfloat16_parts(value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest bfloat16 of float32 numbers and that of what is left, both as float32."""

    def nearest(x: np.ndarray) -> np.ndarray:
        return torch.from_numpy(np.ascontiguousarray(x)).bfloat16().float().numpy()

    high = nearest(value)
    return high, nearest(value - high)


def bf16x3(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    (a_high, a_low), (b_high, b_low) = bfloat16_parts(a), bfloat16_parts(b)
    return a_low @ b_high + a_high @ b_low + a_high @ b_high


def tf32(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def dropped(x: np.ndarray) -> np.ndarray:
        return (np.ascontiguousarray(x).view(np.int32) & -0x2000).view(np.float32)

    return dropped(a) @ dropped(b)


PRODUCTS: dict[str, Product] = {"BF16x3": bf16x3, "TF32": tf32}


def install() -> None:
    """Patch the interpreter of this process; once."""
    from triton.runtime import interpreter

    if getattr(interpreter.InterpreterBuilder.create_dot, "like_a_gpu", False):
        return

    @dataclass(frozen=True)
    class Options(interpreter.InterpreterOptions):  # type: ignore[misc, name-defined]
        allowed_dot_input_precisions: tuple[str, ...] = ("tf32", "bf16x3", "ieee")

    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: int) -> Any:
        product = PRODUCTS.get(str(precision).rpartition(".")[2])
        if product is None or a.data.dtype != np.float32:
            return plain(self, a, b, d, precision, imprecise)
        total = product(a.data, b.data) + d.data
        return interpreter.TensorHandle(total, d.dtype.scalar)

    create_dot.like_a_gpu = True  # type: ignore[attr-defined]
    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter.interpreter_builder.options = Options()
