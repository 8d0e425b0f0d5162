"""Weighted sums of the caller's own tensors into fresh ones, in one launch.

What a scheduler's step, or any other linear update, computes where no arena of slots is at hand
(that is `multistep_step`): nothing is written but the results. Weights are data on the device.

Backends: Triton for CUDA tensors (kernels/weighted_sums.py), C++ for CPU tensors
(csrc/cpu/weighted_sums.cpp), and `weighted_sums_ref` where neither is there. The three agree bit
for bit, in float32 and in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ._register import launch, register
from .common import FLOATS, clamped, product, require_dtype, require_shape
from .constants import MAX_OPERANDS, MAX_SUMS


def weighted_sums(
    operands: Sequence[Tensor],
    weights: Tensor,
    dtypes: Sequence[torch.dtype],
    clamp: Tensor | None = None,
) -> list[Tensor]:
    """Up to three weighted sums of up to eight tensors, as fresh tensors.

    With J operands o_0 .. o_(J-1), result w is, in this order and each operation rounded by itself:

        weights[w, 0] * o_0 + ... + weights[w, J-1] * o_(J-1)  [+ weights[w, J] * c]
        c = min(max(factors[0] * o_0 + ... + factors[J-1] * o_(J-1), lo), hi)

    A zero weight means that the operand is not read for that sum, so it may hold anything, NaN
    included; one without any weight costs no bytes. The clamp keeps NaN.

    operands: 1 to 8 tensors of one shape, each of any float dtype. Those in another memory order
        than `torch.empty_like` of the first are copied into it before.
    weights: [W, J], or [W, J + 1] with clamp, W from 1 to 3; contiguous, float32 or float64, which
        is the arithmetic's precision too: operands are converted to it.
    dtypes: W float dtypes of the results.
    clamp: [2 + J], dtype of weights, contiguous: lo, hi, factors.

    Returns W tensors in the shape of the operands and the memory order of the first, as
    `torch.empty_like`. Raises TypeError or ValueError naming the argument. Not differentiable.
    Callers that have checked call `weighted_sums_unchecked` with the same arguments.
    """
    _check(operands, weights, dtypes, clamp)
    return weighted_sums_unchecked(operands, weights, dtypes, clamp)


def weighted_sums_unchecked(
    operands: Sequence[Tensor],
    weights: Tensor,
    dtypes: Sequence[torch.dtype],
    clamp: Tensor | None = None,
) -> list[Tensor]:
    """`weighted_sums` without its checks of the arguments: wrong ones may read foreign memory."""
    first = operands[0]
    results = [torch.empty_like(first, dtype=dtype) for dtype in dtypes]
    strides = results[0].stride()
    for operand in operands:
        if operand.stride() != strides:
            operands = [_in_order_of(results[0], operand) for operand in operands]
            break
    _weighted_sums(operands, weights, clamp, results)
    return results


def _in_order_of(like: Tensor, operand: Tensor) -> Tensor:
    """The operand itself, or a copy, in the memory order of a dense tensor of its shape."""
    strides = zip(operand.shape, operand.stride(), like.stride(), strict=True)
    if all(size == 1 or theirs == ours for size, theirs, ours in strides):
        return operand
    return torch.empty_like(like, dtype=operand.dtype).copy_(operand)


def weighted_sums_ref(
    operands: Sequence[Tensor],
    weights: Tensor,
    dtypes: Sequence[torch.dtype],
    clamp: Tensor | None = None,
) -> list[Tensor]:
    """`weighted_sums` in plain PyTorch: the definition that the kernels equal bit for bit."""
    terms = [operand.to(weights.dtype) for operand in operands]
    if clamp is not None:
        lo, hi, *factors = clamp
        terms.append(clamped(_sum(factors, terms), lo, hi))
    results = [torch.empty_like(operands[0], dtype=dtype) for dtype in dtypes]
    for row, result in zip(weights, results, strict=True):
        result.copy_(_sum(row, terms))
    return results


def _sum(weights: Iterable[Tensor], terms: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(terms[0])
    for weight, term in zip(weights, terms, strict=True):
        total = total + product(weight, term)
    return total


def _check(
    operands: Sequence[Tensor],
    weights: Tensor,
    dtypes: Sequence[torch.dtype],
    clamp: Tensor | None,
) -> None:
    count = len(operands)
    if not 1 <= count <= MAX_OPERANDS:
        raise ValueError(f"operands must be 1 to {MAX_OPERANDS} tensors, got {count}")
    for i, operand in enumerate(operands):
        require_dtype(f"operands[{i}]", operand, *FLOATS)
        require_shape(f"operands[{i}]", operand, tuple(operands[0].shape))
    require_dtype("weights", weights, torch.float32, torch.float64)
    width = count + (clamp is not None)
    require_shape("weights", weights, *((sums, width) for sums in range(1, MAX_SUMS + 1)))
    if len(dtypes) != len(weights):
        raise ValueError(f"dtypes must be {len(weights)}, one a row of weights, got {len(dtypes)}")
    for i, dtype in enumerate(dtypes):
        if dtype not in FLOATS:
            raise TypeError(f"dtypes[{i}] must be {' or '.join(map(str, FLOATS))}, got {dtype}")
    if clamp is not None:
        require_dtype("clamp", clamp, weights.dtype)
        require_shape("clamp", clamp, (2 + count,))
    named = {f"operands[{i}]": operand for i, operand in enumerate(operands)}
    numbers = {"weights": weights} | ({} if clamp is None else {"clamp": clamp})
    for name, tensor in (named | numbers).items():
        if tensor.device != operands[0].device:
            raise ValueError(
                f"{name} must be on the device of operands[0], {operands[0].device}, "
                f"got {tensor.device}"
            )
        if name in numbers and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (named | numbers).values()):
        raise ValueError("weighted_sums is not differentiable: call it under torch.no_grad()")


# Registration. The operator itself writes into given results, of the operands' memory order.


def _reference(
    operands: Sequence[Tensor], weights: Tensor, clamp: Tensor | None, results: Sequence[Tensor]
) -> None:
    sums = weighted_sums_ref(operands, weights, [result.dtype for result in results], clamp)
    for result, value in zip(results, sums, strict=True):
        result.copy_(value)


_weighted_sums = register(
    "weighted_sums(Tensor[] operands, Tensor weights, Tensor? clamp, Tensor(a!)[] results) -> ()",
    _reference,
    triton=launch("weighted_sums"),
)
