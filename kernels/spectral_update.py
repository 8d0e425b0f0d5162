"""Sampling moves through a preconditioner, in Triton: what fastdiff/ops/spectral_update.py defines.

Two kernels:

- `fastdiff::spectrum_combine`: one pass over the half spectrum between two transforms. It reads and
  writes the spectrum once, 8 bytes a pixel, draws the noise where it needs it, and is bound by
  memory for an update without noise, by Philox's integer products with it. With norms it only
  reads: partial sums, one pair a program.
- `fastdiff::spectral_update_whole`: an image of up to 64 x 64 in one program, with the bases and
  tables of kernels/spectral_filter.py. State and score are read once and the result is written
  once, 12 bytes a pixel; for the norms of an adaptive step a launch before it reads the score.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import box_muller, philox_words
from .spectral_filter import (
    PRECISIONS,
    from_tiles,
    responded,
    serves,
    to_tiles,
)

_NOISE = tl.constexpr(4)  # a Philox purpose
_ROOT2 = tl.constexpr(1.4142135623730951)
_ROOT_HALF = tl.constexpr(0.7071067811865476)
WARPS = {(False, "fast"): 4, (False, "exact"): 8, (True, "fast"): 8, (True, "exact"): 8}
TILE = 1024  # entries of the half spectrum that a program takes


@triton.jit
def _words(seed, quad, stage):
    zero = tl.zeros((), tl.int32)
    return philox_words(seed, quad, zero + stage, zero + _NOISE)


@triton.jit
def _normal_pairs(seed, element, stage):
    """The normals of elements e and e + 1, e even, int64 in any shape."""
    u0, u1, u2, u3 = _words(seed, element // 4, stage)
    second = element % 4 >= 2
    return box_muller(tl.where(second, u2, u0), tl.where(second, u3, u1))


@triton.jit
def _edge_noise(first, second, k, mirror):
    """An edge column's noise from the numbers of rows k and mirror: Hermitian down the rows."""
    re = tl.where(k == mirror, _ROOT2 * first, tl.where(k < mirror, first, second))
    im = tl.where(k == mirror, 0.0, tl.where(k < mirror, second, -first))
    return re, im


@triton.jit
def _combined(
    spectrum, drift, gain, noise, at, table, gain_at, inside, n_re, n_im, a, c, unit,
    COMPLEX: tl.constexpr, NOISE: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """Entries of the two parts' sum, stored; or their squared magnitudes."""
    re = tl.load(spectrum + 2 * at, mask=inside, other=0.0)
    im = tl.load(spectrum + 2 * at + 1, mask=inside, other=0.0)
    if COMPLEX:
        d_re = tl.load(drift + 2 * table, mask=inside, other=0.0)
        d_im = tl.load(drift + 2 * table + 1, mask=inside, other=0.0)
        re, im = d_re * re - d_im * im, d_re * im + d_im * re
    else:
        d = tl.load(drift + table, mask=inside, other=0.0)
        re, im = d * re, d * im
    re, im = a * re, a * im
    if NOISE == "given":
        n_re = tl.load(noise + 2 * at, mask=inside, other=0.0)
        n_im = tl.load(noise + 2 * at + 1, mask=inside, other=0.0)
    if NOISE != "none":
        r = tl.load(gain + gain_at, mask=inside, other=0.0) * unit
        n_re, n_im = r * n_re, r * n_im
    if NORMS:
        re, im = re * re + im * im, n_re * n_re + n_im * n_im
    else:
        if NOISE != "none":
            re, im = re + c * n_re, im + c * n_im
        tl.store(spectrum + 2 * at, re, mask=inside)
        tl.store(spectrum + 2 * at + 1, im, mask=inside)
    return re, im


@triton.jit(do_not_specialize=["stage_number"])
def _combine_kernel(
    spectrum,  # pairs [B, C, H, COLUMNS, 2]
    drift,
    gain,
    row,  # [1 or B, 2]
    noise,  # pairs like spectrum; unused unless given
    seeds,
    stage,  # int32 [1]; unused without HAS_STAGE
    norms,  # float64 [B C, programs, 2]; unused without NORMS
    stage_number,
    channels,
    height,
    width,
    drift_stride,  # 0: one table for all channels
    gain_stride,
    row_stride,
    COMPLEX: tl.constexpr,
    NOISE: tl.constexpr,  # "none", "given" or "drawn"
    HAS_STAGE: tl.constexpr,
    NORMS: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of the packed noise begin with a quad
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    sample, channel = image // channels, image % channels
    columns, packed = width // 2 + 1, (width + 1) // 2 * 2
    across = tl.cdiv(packed // 2, COLUMNS)
    block = tl.program_id(0) % across
    k = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    m = block * COLUMNS + tl.arange(0, COLUMNS)
    a, c = tl.load(row + sample * row_stride), tl.load(row + sample * row_stride + 1)
    first = (channel * height + k) * packed
    number, unit, seed = stage_number, 1.0, tl.zeros((), tl.int64)
    if NOISE == "drawn":
        unit = tl.sqrt((height * width).to(spectrum.dtype.element_ty) / 2)
        seed = tl.load(seeds + sample)
        if HAS_STAGE:
            number = tl.load(stage)

    # Columns inside; column 0 stands for both edges, which come after.
    n_re = tl.zeros((ROWS, COLUMNS), spectrum.dtype.element_ty)
    n_im = n_re
    if NOISE == "drawn":
        if ALIGNED:
            pairs = block * COLUMNS + 2 * tl.arange(0, COLUMNS // 2)
            quad = (first[:, None] + 2 * pairs[None, :]) // 4
            u0, u1, u2, u3 = _words(seed, quad, number)
            z0, z1 = box_muller(u0, u1)
            z2, z3 = box_muller(u2, u3)
            n_re, n_im = tl.interleave(z0, z2), tl.interleave(z1, z3)
        else:
            n_re, n_im = _normal_pairs(seed, first[:, None] + 2 * m[None, :], number)
    inside = (k < height)[:, None] & ((m > 0) & (2 * m < width))[None, :]
    table = k[:, None] * columns + m[None, :]
    at = image * (height * columns) + table
    one, other = _combined(
        spectrum, drift, gain, noise, at, channel * drift_stride + table,
        channel * gain_stride + table, inside, n_re, n_im, a, c, unit, COMPLEX, NOISE, NORMS,
    )  # fmt: skip
    total, noise_total = 0.0, 0.0
    if NORMS:  # a column inside stands for its mirror image too
        keep = tl.where(inside, 2.0, 0.0)
        total, noise_total = tl.sum(keep * one), tl.sum(keep * other)

    if block == 0:
        mirror = tl.where(k == 0, 0, height - k)
        zero, nyquist = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        zero_im, nyquist_im = zero, zero
        if NOISE == "drawn":
            zero, nyquist = _normal_pairs(seed, first, number)
            theirs = (channel * height + mirror) * packed
            zero_of, nyquist_of = _normal_pairs(seed, theirs, number)
            zero, zero_im = _edge_noise(zero, zero_of, k, mirror)
            nyquist, nyquist_im = _edge_noise(nyquist, nyquist_of, k, mirror)
        there = k < height
        for edge in tl.static_range(2):
            inside_edge = there & (edge * width % 2 == 0)
            table_edge = k * columns + edge * (width // 2)
            one_edge, other_edge = _combined(
                spectrum, drift, gain, noise, image * (height * columns) + table_edge,
                channel * drift_stride + table_edge, channel * gain_stride + table_edge,
                inside_edge, nyquist if edge else zero, nyquist_im if edge else zero_im,
                a, c, unit, COMPLEX, NOISE, NORMS,
            )  # fmt: skip
            if NORMS:
                total += tl.sum(tl.where(inside_edge, one_edge, 0.0))
                noise_total += tl.sum(tl.where(inside_edge, other_edge, 0.0))
    if NORMS:
        to = norms + 2 * (image * tl.num_programs(0) + tl.program_id(0))
        tl.store(to, total.to(tl.float64))
        tl.store(to + 1, noise_total.to(tl.float64))


def combine_plan(
    spectrum: Tensor,
    width: int,
    drift: Tensor,
    gain: Tensor | None,
    row: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    norms: Tensor | None,
) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and keyword arguments of the launch these tensors need."""
    batch, channels, height, _, _ = spectrum.shape
    packed = (width + 1) // 2 * 2
    columns = min(128, triton.next_power_of_2(max(packed // 2, 2)))
    rows = min(TILE // columns, triton.next_power_of_2(height))
    kind = "given" if noise is not None else "drawn" if seeds is not None else "none"
    grid = (triton.cdiv(packed // 2, columns) * triton.cdiv(height, rows), batch * channels)
    return grid, {
        "spectrum": spectrum,
        "drift": drift,
        "gain": gain if gain is not None else drift,
        "row": row,
        "noise": noise if noise is not None else spectrum,
        "seeds": seeds if seeds is not None else spectrum,
        "stage": stage if stage is not None else spectrum,
        "norms": norms if norms is not None else spectrum,
        "stage_number": stage_number,
        "channels": channels,
        "height": height,
        "width": width,
        "drift_stride": drift[0].numel() // (drift.ndim - 2) if len(drift) > 1 else 0,
        "gain_stride": gain[0].numel() if gain is not None and len(gain) > 1 else 0,
        "row_stride": 2 if len(row) > 1 else 0,
        "COMPLEX": drift.ndim == 4,
        "NOISE": kind,
        "HAS_STAGE": stage is not None,
        "NORMS": norms is not None,
        "ALIGNED": packed % 4 == 0,
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": 4,
    }


def launch_combine(*tensors: Any) -> None:
    """The pass over the half spectrum, or its norms [B, 2], on checked arguments of the op."""
    spectrum, norms = tensors[0], tensors[-1]
    if spectrum.numel() == 0:
        return
    grid, arguments = combine_plan(*tensors)
    with torch.cuda.device_of(spectrum):
        if norms is None:
            _combine_kernel[grid](**arguments)
            return
        parts = norms.new_empty((len(norms), grid[1] // len(norms) * grid[0], 2))
        _combine_kernel[grid](**{**arguments, "norms": parts})
        torch.sum(parts, 1, out=norms)


@triton.jit
def _packed_tiles(seed, number, channel, height, width, HALF_H: tl.constexpr, HALF_W: tl.constexpr):
    """The noise's numbers in the real bases: N_cc, N_cs, N_sc, N_ss [HALF_H, HALF_W].

    Row i of a basis has the frequency i (cosines), i or Nyquist for i = 0 (sines). With p, q the
    pairs of packed numbers of the frequencies (i, j) and (-i, j), Nyquist for -0: orthonormal
    combinations of real and imaginary parts.
    """
    i, j = tl.arange(0, HALF_H)[:, None], tl.arange(0, HALF_W)[None, :]
    packed = (width + 1) // 2 * 2
    other = tl.where(i == 0, height // 2, height - i)
    start = channel * height
    p_re, p_im = _normal_pairs(seed, (start + i) * packed + 2 * j, number)
    q_re, q_im = _normal_pairs(seed, (start + other) * packed + 2 * j, number)
    edge_row, edge_column = i == 0, j == 0
    edge = edge_row | edge_column
    n_cc = tl.where(edge, p_re, (p_re + q_re) * _ROOT_HALF)
    n_cs = tl.where(edge, tl.where(edge_column, p_im, -p_im), -(p_im + q_im) * _ROOT_HALF)
    n_sc = tl.where(edge, tl.where(edge_row, q_re, -q_re), (q_im - p_im) * _ROOT_HALF)
    both = edge_row & edge_column
    n_ss = tl.where(edge, tl.where(both, q_im, -q_im), (q_re - p_re) * _ROOT_HALF)
    return n_cc, n_cs, n_sc, n_ss


@triton.jit
def _coloured_noise(
    seed, stage, stage_number, table, channel, height, width,
    HAS_STAGE: tl.constexpr, HALF_H: tl.constexpr, HALF_W: tl.constexpr,
):  # fmt: skip
    """R z in the real bases."""
    number = stage_number
    if HAS_STAGE:
        number = tl.load(stage)
    n_cc, n_cs, n_sc, n_ss = _packed_tiles(
        tl.load(seed), number, channel, height, width, HALF_H, HALF_W
    )
    return responded(n_cc, n_cs, n_sc, n_ss, table, HALF_H, HALF_W)


@triton.jit(do_not_specialize=["stage_number"])
def _whole_kernel(
    x,
    score,
    y,  # the result; with NORMS float32 [B, C, 2]
    row,  # [1 or B, 2]: factors of direction and noise
    drift,  # tables of D - 1
    gain,  # tables of R
    row_basis,
    column_basis,
    seeds,
    stage,
    stage_number,
    channels,
    drift_stride,
    gain_stride,
    row_stride,
    height,
    width,
    x_sample,
    x_channel,
    x_row,
    x_column,
    score_sample,
    score_channel,
    score_row,
    score_column,
    y_sample,
    y_channel,
    y_row,
    y_column,
    HAS_NOISE: tl.constexpr,
    HAS_STAGE: tl.constexpr,
    NORMS: tl.constexpr,
    HALF_H: tl.constexpr,
    HALF_W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    sample, channel = image // channels, image % channels
    rows, columns = tl.arange(0, 2 * HALF_H), tl.arange(0, 2 * HALF_W)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    down, across = rows[:, None], columns[None, :]  # offsets in an image are 32 bits wide
    if NORMS:
        n_cc, n_cs, n_sc, n_ss = _coloured_noise(
            seeds + sample, stage, stage_number, gain + channel * gain_stride, channel, height,
            width, HAS_STAGE, HALF_H, HALF_W,
        )  # fmt: skip
        total = tl.sum(n_cc * n_cc + n_cs * n_cs) + tl.sum(n_sc * n_sc + n_ss * n_ss)
        tl.store(y + 2 * image + 1, total)
    score += sample * score_sample + channel * score_channel
    score += down * score_row + across * score_column
    direction = tl.load(score, mask=inside, other=0.0).to(tl.float32)
    a, c = tl.load(row + sample * row_stride), tl.load(row + sample * row_stride + 1)
    # The factor comes after the products: a scaled image as their operand costs 80 registers.
    t_cc, t_cs, t_sc, t_ss = to_tiles(direction, row_basis, column_basis, HALF_H, HALF_W, PRECISION)
    u_cc, u_cs, u_sc, u_ss = responded(
        t_cc, t_cs, t_sc, t_ss, drift + channel * drift_stride, HALF_H, HALF_W
    )
    u_cc, u_cs, u_sc, u_ss = a * u_cc, a * u_cs, a * u_sc, a * u_ss
    if HAS_NOISE and not NORMS:
        n_cc, n_cs, n_sc, n_ss = _coloured_noise(
            seeds + sample, stage, stage_number, gain + channel * gain_stride, channel, height,
            width, HAS_STAGE, HALF_H, HALF_W,
        )  # fmt: skip
        u_cc, u_cs = u_cc + c * n_cc, u_cs + c * n_cs
        u_sc, u_ss = u_sc + c * n_sc, u_ss + c * n_ss
    change = from_tiles(u_cc, u_cs, u_sc, u_ss, row_basis, column_basis, HALF_H, HALF_W, PRECISION)
    change = a * direction + change
    if NORMS:  # of the image, though that of its tiles is the same: summed there, they spill
        tl.store(y + 2 * image, tl.sum(change * change))
    else:
        x += sample * x_sample + channel * x_channel + down * x_row + across * x_column
        state = tl.load(x, mask=inside, other=0.0).to(tl.float32)
        y += sample * y_sample + channel * y_channel + down * y_row + across * y_column
        tl.store(y, state + change, mask=inside)


def whole_plan(
    x: Tensor,
    y: Tensor,
    row: Tensor,
    score: Tensor,
    drift: Tensor,
    gain: Tensor,
    row_basis: Tensor,
    column_basis: Tensor,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    precision: str,
    *,
    norms: bool = False,
) -> tuple[int, dict[str, Any]]:
    """Programs and keyword arguments of the launch these tensors need."""
    batch, channels, height, width = x.shape
    half_height, half_width = drift.shape[2:]
    strides = {}
    for name, tensor in (("x", x), ("score", score), ("y", x if norms else y)):
        for axis, stride in zip(("sample", "channel", "row", "column"), tensor.stride(),
                                strict=True):  # fmt: skip
            strides[f"{name}_{axis}"] = stride
    return batch * channels, {
        "x": x,
        "score": score,
        "y": y,
        "row": row,
        "drift": drift,
        "gain": gain,
        "row_basis": row_basis,
        "column_basis": column_basis,
        "seeds": seeds if seeds is not None else row,
        "stage": stage if stage is not None else row,
        "stage_number": stage_number,
        "channels": channels,
        "drift_stride": drift.stride(0) if len(drift) > 1 else 0,
        "gain_stride": gain.stride(0) if len(gain) > 1 else 0,
        "row_stride": 2 if len(row) > 1 else 0,
        "height": height,
        "width": width,
        **strides,
        "HAS_NOISE": seeds is not None,
        "HAS_STAGE": stage is not None,
        "NORMS": norms,
        "HALF_H": half_height,
        "HALF_W": half_width,
        # The interpreter multiplies in float32 and knows no bf16x3.
        "PRECISION": "ieee" if triton.knobs.runtime.interpret else PRECISIONS[precision],
        "num_warps": WARPS[(half_height * half_width > 256, precision)],
    }


def launch_whole(x: Tensor, y: Tensor, *arguments: Any, norms: bool = False) -> None:
    """A move of whole images, or with norms y [B, C, 2]: its parts' squared norms."""
    if x.numel() == 0:
        return
    programs, keywords = whole_plan(x, y, *arguments, norms=norms)
    with torch.cuda.device_of(x):
        _whole_kernel[(programs,)](**keywords)


def aot_variants() -> Iterator[tuple[str, object, dict[str, object], int, int]]:
    """For `python -m bench.aot`; the last number is the least arch."""

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    seeds, stage = empty(2, of=torch.int64), empty(1, of=torch.int32)
    for size in ((32, 32), (64, 64)):
        padded = [32 if side <= 32 else 64 for side in size]
        halves = [side // 2 for side in padded]
        x, tables = empty(2, 3, *size), empty(3, 5, *halves)
        bases = [empty(2, half, 2 * half) for half in halves]
        arch = 80 if serves(*size, (8, 0)) else 90
        for name, norms, drawn in (
            ("update", False, True),
            ("norms", True, True),
            ("no noise", False, False),
        ):
            for precision in PRECISIONS:
                y = empty(2, 3, 2) if norms else x
                _, keywords = whole_plan(
                    x, y, empty(2, 2), x, tables, tables, *bases,
                    seeds if drawn else None, stage, 0, precision, norms=norms,
                )  # fmt: skip
                title = f"{size[0]}x{size[1]} {name} {precision}"
                yield title, _whole_kernel, keywords, 0, arch
    for size, of in (((256, 256), torch.float32), ((256, 256), torch.float64),
                     ((97, 101), torch.float32)):  # fmt: skip
        half = (*size[:1], size[1] // 2 + 1)
        spectrum, table = empty(2, 3, *half, 2, of=of), empty(3, *half, of=of)
        for kind in ("drawn", "given", "none", "drawn norms", "drawn skew"):
            drift = empty(3, *half, 2, of=of) if "skew" in kind else table
            _, keywords = combine_plan(
                spectrum, size[1], drift, table, empty(2, 2, of=of),
                spectrum if kind == "given" else None, seeds if "drawn" in kind else None, stage, 0,
                empty(2, 2, of=torch.float64) if "norms" in kind else None,
            )  # fmt: skip
            yield f"combine {size[0]}x{size[1]} {kind} {of}", _combine_kernel, keywords, 0, 80
