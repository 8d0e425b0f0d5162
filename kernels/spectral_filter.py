"""A frequency response on whole images in one launch: `fastdiff::spectral_filter`, in Triton.

One program holds an image of up to 64 x 64 and takes it to frequencies and back by products with
real bases: cosines c and sines s of both axes, each half of the orthonormal basis. In that basis a
real point-symmetric response is elementwise, up to the pairs cc-ss and cs-sc that mirrored
frequencies couple:

    T_cc = C_h X C_w',  ...;   U_cc = a_cc T_cc + c T_ss,   U_ss = a_ss T_ss + c T_cc,
    U_cs = a_cs T_cs - c T_sc, U_sc = a_sc T_sc - c T_cs;   y = x + C_h' U_cc C_w + ...

The tables hold the response minus one, so that low precision touches the change alone.

Bytes: an image is read once and written once; tables and bases (5/4 and 2 images at most) stay in
the second cache. Bound by memory where tensor cores keep up, about 24 N operations an element.
"""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .half_spectrum import strides_of

LARGEST = 64  # sides of an image that one program holds
LARGEST_SINCE = (9, 0)  # before, the registers of a program hold half of it
# No access is better for knowing whether these are 1 or multiples of 16: variants, seconds each,
# would only be waited for.
UNSPECIALISED = ["batch", "channels", "height", "row_stride", "stage_number"]
PRECISIONS = {"exact": "bf16x3", "fast": "tf32"}


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr, acc=None):
    """a b + acc. Tensor cores drop the low 13 bits of tf32's operands: here they are rounded."""
    if PRECISION == "tf32":
        a, b = _tf32(a), _tf32(b)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _tf32(value):
    """To the nearest float32 with 10 bits after the leading one, ties away from zero."""
    bits = value.to(tl.int32, bitcast=True)
    return ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def _load_basis(basis, HALF: tl.constexpr):
    """Cosines and sines of an axis, [HALF, 2 HALF] each."""
    at = tl.arange(0, HALF)[:, None] * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    return tl.load(basis + at), tl.load(basis + 2 * HALF * HALF + at)


@triton.jit
def _load_transposed(basis, HALF: tl.constexpr):
    """The same as [2 HALF, HALF]: loaded so, since a tile kept for both uses costs registers."""
    at = tl.arange(0, HALF)[None, :] * (2 * HALF) + tl.arange(0, 2 * HALF)[:, None]
    return tl.load(basis + at), tl.load(basis + 2 * HALF * HALF + at)


@triton.jit
def to_tiles(
    value, row_basis, column_basis,
    HALF_H: tl.constexpr, HALF_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """An image in the real bases: T_cc, T_cs, T_sc, T_ss."""
    row_cos, row_sin = _load_basis(row_basis, HALF_H)
    column_cos, column_sin = _load_transposed(column_basis, HALF_W)
    by_cos = _dot(row_cos, value, PRECISION)
    t_cc = _dot(by_cos, column_cos, PRECISION)
    t_cs = _dot(by_cos, column_sin, PRECISION)
    by_sin = _dot(row_sin, value, PRECISION)
    t_sc = _dot(by_sin, column_cos, PRECISION)
    t_ss = _dot(by_sin, column_sin, PRECISION)
    return t_cc, t_cs, t_sc, t_ss


@triton.jit
def responded(t_cc, t_cs, t_sc, t_ss, table, HALF_H: tl.constexpr, HALF_W: tl.constexpr):
    """Tiles through a response; table: a_cc, a_cs, a_sc, a_ss, c [5, HALF_H, HALF_W]."""
    size: tl.constexpr = HALF_H * HALF_W
    table += tl.arange(0, HALF_H)[:, None] * HALF_W + tl.arange(0, HALF_W)[None, :]
    coupling = tl.load(table + 4 * size)
    u_cc = tl.load(table) * t_cc + coupling * t_ss
    u_ss = tl.load(table + 3 * size) * t_ss + coupling * t_cc
    u_cs = tl.load(table + size) * t_cs - coupling * t_sc
    u_sc = tl.load(table + 2 * size) * t_sc - coupling * t_cs
    return u_cc, u_cs, u_sc, u_ss


@triton.jit
def from_tiles(
    u_cc, u_cs, u_sc, u_ss, row_basis, column_basis,
    HALF_H: tl.constexpr, HALF_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The image of tiles."""
    column_cos, column_sin = _load_basis(column_basis, HALF_W)
    by_cos = _dot(u_cc, column_cos, PRECISION)
    by_cos = _dot(u_cs, column_sin, PRECISION, by_cos)
    by_sin = _dot(u_sc, column_cos, PRECISION)
    by_sin = _dot(u_ss, column_sin, PRECISION, by_sin)
    row_cos, row_sin = _load_transposed(row_basis, HALF_H)
    image = _dot(row_cos, by_cos, PRECISION)
    return _dot(row_sin, by_sin, PRECISION, image)


@triton.jit(do_not_specialize=UNSPECIALISED)
def _spectral_filter_kernel(
    x,
    y,
    tables,  # [1 or channels, 5, HALF_H, HALF_W]: a_cc, a_cs, a_sc, a_ss, c
    row_basis,  # [2, HALF_H, 2 HALF_H]: cosines, sines
    column_basis,
    channels,
    table_stride,  # 0: one table for all channels
    height,
    width,
    x_sample,
    x_channel,
    x_row,
    x_column,
    y_sample,
    y_channel,
    y_row,
    y_column,
    HALF_H: tl.constexpr,
    HALF_W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    sample, channel = image // channels, image % channels
    rows, columns = tl.arange(0, 2 * HALF_H), tl.arange(0, 2 * HALF_W)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    at = sample * x_sample + channel * x_channel
    at += rows.to(tl.int64)[:, None] * x_row + columns.to(tl.int64)[None, :] * x_column
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)

    t_cc, t_cs, t_sc, t_ss = to_tiles(value, row_basis, column_basis, HALF_H, HALF_W, PRECISION)
    u_cc, u_cs, u_sc, u_ss = responded(
        t_cc, t_cs, t_sc, t_ss, tables + channel * table_stride, HALF_H, HALF_W
    )
    change = from_tiles(u_cc, u_cs, u_sc, u_ss, row_basis, column_basis, HALF_H, HALF_W, PRECISION)

    at = sample * y_sample + channel * y_channel
    at += rows.to(tl.int64)[:, None] * y_row + columns.to(tl.int64)[None, :] * y_column
    tl.store(y + at, value + change, mask=inside)


def plan(
    x: Tensor, y: Tensor, tables: Tensor, row_basis: Tensor, column_basis: Tensor, precision: str
) -> tuple[int, dict[str, object]]:
    """Programs and keyword arguments of the launch these tensors need."""
    batch, channels, height, width = x.shape
    half_height, half_width = tables.shape[2:]
    return batch * channels, {
        "x": x,
        "y": y,
        "tables": tables,
        "row_basis": row_basis,
        "column_basis": column_basis,
        "channels": channels,
        "table_stride": tables.stride(0) if len(tables) > 1 else 0,
        "height": height,
        "width": width,
        **strides_of(x=x, y=y),
        "HALF_H": half_height,
        "HALF_W": half_width,
        "PRECISION": PRECISIONS[precision],
        "num_warps": 8 if half_height * half_width > 256 else 4,
    }


def launch(
    x: Tensor, y: Tensor, tables: Tensor, row_basis: Tensor, column_basis: Tensor, precision: str
) -> None:
    """y = response of x, on checked arguments; allocates nothing, never synchronises."""
    if x.numel() == 0:
        return
    programs, arguments = plan(x, y, tables, row_basis, column_basis, precision)
    with torch.cuda.device_of(x):
        _spectral_filter_kernel[(programs,)](**arguments)


def serves(height: int, width: int, capability: tuple[int, int]) -> bool:
    """Whether an image of that size fits a program on a GPU of that compute capability."""
    return max(height, width) <= (LARGEST if capability >= LARGEST_SINCE else LARGEST // 2)


def aot_variants() -> Iterator[tuple[str, object, dict[str, object], int, int]]:
    """For `python -m bench.aot`: sizes, precisions, dtypes; the last number is the least arch."""

    def variant(
        name: str, size: tuple[int, int], precision: str, dtype: torch.dtype = torch.float32
    ) -> tuple[str, object, dict[str, object], int, int]:
        def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        padded = [32 if side <= 32 else 64 for side in size]
        halves = [side // 2 for side in padded]
        x = empty(2, 3, *size, of=dtype)
        bases = [empty(2, half, 2 * half) for half in halves]
        _, arguments = plan(x, x, empty(3, 5, *halves), *bases, precision)
        arch = 80 if serves(*size, (8, 0)) else 90
        return f"{size[0]}x{size[1]} {name}", _spectral_filter_kernel, arguments, 0, arch

    for size in ((32, 32), (64, 64)):
        for precision in PRECISIONS:
            yield variant(precision, size, precision)
        yield variant("exact bf16", size, "exact", torch.bfloat16)
    yield variant("exact", (28, 28), "exact")
    yield variant("exact", (33, 64), "exact")
    yield variant("exact", (32, 64), "exact")
