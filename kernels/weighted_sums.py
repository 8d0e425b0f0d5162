"""One launch for up to three weighted sums: `fastdiff::weighted_sums` on CUDA tensors, in Triton.

Bytes: each operand with a non-zero weight is read once, each result is written once, nothing else
moves. Memory bandwidth is the bound.

Weights are read from device memory: a captured launch serves others unchanged. IEEE arithmetic in a
fixed order, no contraction: the reference's result, bit for bit.
"""

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_ACCESS_BYTES = 16  # of a thread, to the widest operand or result: all share one register layout
_MAX_THREADS = 256


@triton.jit
def _weighted_sum(weights, values):
    """In order from +0.0, which leaves no negative zero; a zero weight hides its operand."""
    total = tl.zeros_like(values[0])
    for j in tl.static_range(len(values)):
        weight = tl.load(weights + j)
        total += tl.where(weight != 0, weight * values[j], 0.0)
    return total


@triton.jit
def _weighted_sums_kernel(
    operands,  # tuples of pointers
    weights,
    clamp,
    results,
    elements,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = weights.dtype.element_ty
    COUNT: tl.constexpr = len(operands)
    WIDTH: tl.constexpr = COUNT + (clamp is not None)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < elements

    clamps = False
    if clamp is not None:
        for w in tl.static_range(len(results)):
            clamps |= tl.load(weights + w * WIDTH + COUNT) != 0
    # Loads come first: all in flight together.
    values = ()
    for j in tl.static_range(COUNT):
        used = False
        for w in tl.static_range(len(results)):
            used |= tl.load(weights + w * WIDTH + j) != 0
        if clamp is not None:
            used |= clamps & (tl.load(clamp + 2 + j) != 0)
        values = values + (tl.load(operands[j] + offsets, mask=inside & used, other=0.0).to(dtype),)

    if clamp is not None:
        c = _weighted_sum(clamp + 2, values)
        low, high = tl.load(clamp), tl.load(clamp + 1)
        # Comparisons are false on NaN: it passes.
        c = tl.where(c < low, low, c)
        values = values + (tl.where(c > high, high, c),)

    for w in tl.static_range(len(results)):
        total = _weighted_sum(weights + w * WIDTH, values)
        if results[w].dtype.element_ty.primitive_bitwidth < 32:
            # float64 reaches 16 bits through float32, as in PyTorch.
            total = total.to(tl.float32)
        tl.store(results[w] + offsets, total, mask=inside)


def plan(
    operands: Sequence[Tensor], weights: Tensor, clamp: Tensor | None, results: Sequence[Tensor]
) -> tuple[int, dict[str, object]]:
    """Programs and keyword arguments of the launch these tensors need."""
    elements = results[0].numel()
    per_thread = _ACCESS_BYTES // max(tensor.element_size() for tensor in (*operands, *results))
    threads = _MAX_THREADS
    while threads > 32 and threads * per_thread >= 2 * elements:
        threads //= 2
    block = threads * per_thread
    return triton.cdiv(elements, block), {
        "operands": tuple(operands),
        "weights": weights,
        "clamp": clamp,
        "results": tuple(results),
        "elements": elements,
        "BLOCK": block,
        "num_warps": threads // 32,
        "enable_fp_fusion": False,
    }


def launch(
    operands: Sequence[Tensor], weights: Tensor, clamp: Tensor | None, results: Sequence[Tensor]
) -> None:
    """`fastdiff::weighted_sums` on checked arguments; allocates nothing, never synchronises."""
    if results[0].numel() == 0:
        return
    programs, arguments = plan(operands, weights, clamp, results)
    with torch.cuda.device_of(results[0]):
        _weighted_sums_kernel[(programs,)](**arguments)


def aot_variants() -> Iterator[tuple[str, object, dict[str, object], int]]:
    """For `python -m bench.aot`: name, kernel, arguments of a launch, 128-bit accesses to be there.

    Numbers of operands and results, with and without clamp; then what else changes the code.
    """

    def variant(
        name: str,
        count: int,
        sums: int,
        clamped: bool = False,
        sample: tuple[int, ...] = (2, 4, 64, 64),
        dtype: torch.dtype = torch.float32,
        operand: torch.dtype = torch.float32,
        result: torch.dtype = torch.float32,
    ) -> tuple[str, object, dict[str, object], int]:
        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        _, arguments = plan(
            [empty(*sample, of=operand) for _ in range(count)],
            empty(sums, count + clamped),
            empty(2 + count) if clamped else None,
            [empty(*sample, of=result) for _ in range(sums)],
        )
        widest = max(operand.itemsize, result.itemsize)
        wide = count * (operand.itemsize == widest) + sums * (result.itemsize == widest)
        if empty(*sample).numel() % 16:
            wide = 0
        return f"J={count} W={sums} {name}", _weighted_sums_kernel, arguments, wide

    for count in (1, 2, 4, 8):
        for sums in (1, 2, 3):
            yield variant("plain", count, sums)
            yield variant("clamp", count, sums, clamped=True)
    half, double = torch.bfloat16, torch.float64
    yield variant("bf16", 5, 1, operand=half, result=half)
    yield variant("bf16 to float32", 8, 3, clamped=True, operand=half)
    yield variant("float32 to float16", 8, 3, clamped=True, result=torch.float16)
    yield variant("odd size", 8, 3, clamped=True, sample=(3, 31, 31))
    yield variant("float64", 8, 3, clamped=True, dtype=double, operand=double, result=double)
    yield variant("float64 of bf16", 8, 3, clamped=True, dtype=double, operand=half, result=half)
