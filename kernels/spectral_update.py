"""Sampling moves through a preconditioner, in Triton: what fastdiff/ops/spectral_update.py defines.

`fastdiff::spectral_update_whole`: an image of up to 64 x 64 in one program, with the bases and
tables of kernels/spectral_filter.py. State and score are read once and the result is written once,
12 bytes a pixel. An adaptive step takes a launch before it (STEP = "norms"), which reads the score
and leaves squared norms; the launch that moves makes its factors of them.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .half_spectrum import adaptive_row, normal_pairs, strides_of
from .spectral_filter import (
    PRECISIONS,
    UNSPECIALISED,
    from_tiles,
    responded,
    serves,
    to_tiles,
)

WARPS = {(False, "fast"): 4, (False, "exact"): 8, (True, "fast"): 8, (True, "exact"): 8}


@triton.jit
def _packed_tiles(seed, number, channel, height, width, HALF_H: tl.constexpr, HALF_W: tl.constexpr):
    """The noise's numbers in the real bases: N_cc, N_cs, N_sc, N_ss [HALF_H, HALF_W].

    Row i of a basis has the frequency i (cosines), i or Nyquist for i = 0 (sines). With p, q the
    pairs of packed numbers of the frequencies (i, j) and (-i, j), Nyquist for -0: orthonormal
    combinations of real and imaginary parts.
    """
    ROOT_HALF: tl.constexpr = 0.7071067811865476
    i, j = tl.arange(0, HALF_H)[:, None], tl.arange(0, HALF_W)[None, :]
    packed = (width + 1) // 2 * 2
    other = tl.where(i == 0, height // 2, height - i)
    start = channel * height
    p_re, p_im = normal_pairs(seed, (start + i) * packed + 2 * j, number)
    q_re, q_im = normal_pairs(seed, (start + other) * packed + 2 * j, number)
    edge_row, edge_column = i == 0, j == 0
    edge = edge_row | edge_column
    n_cc = tl.where(edge, p_re, (p_re + q_re) * ROOT_HALF)
    n_cs = tl.where(edge, tl.where(edge_column, p_im, -p_im), -(p_im + q_im) * ROOT_HALF)
    n_sc = tl.where(edge, tl.where(edge_row, q_re, -q_re), (q_im - p_im) * ROOT_HALF)
    both = edge_row & edge_column
    n_ss = tl.where(edge, tl.where(both, q_im, -q_im), (q_re - p_re) * ROOT_HALF)
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


@triton.jit(do_not_specialize=UNSPECIALISED)
def _whole_kernel(
    x,
    score,
    y,  # the result; for norms float32 [B, C, 2]
    squares,  # float32 [B, C, 2], what that launch left; unused where steps are given
    row,  # [1 or B, 2]: factors of direction and noise
    drift,  # tables of D - 1
    gain,  # tables of R
    row_basis,
    column_basis,
    seeds,
    stage,
    stage_number,
    batch,
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
    STEP: tl.constexpr,  # "given", "norms", "sample" or "batch"
    PARTS: tl.constexpr,
    HALF_H: tl.constexpr,
    HALF_W: tl.constexpr,
    PRECISION: tl.constexpr,
):
    NORMS: tl.constexpr = STEP == "norms"
    image = tl.program_id(0).to(tl.int64)
    sample, channel = image // channels, image % channels
    rows, columns = tl.arange(0, 2 * HALF_H), tl.arange(0, 2 * HALF_W)
    inside = (rows < height)[:, None] & (columns < width)[None, :]
    down, across = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
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
    if STEP == "sample" or STEP == "batch":
        a, c = adaptive_row(a, c, squares, sample, batch, channels, STEP, PARTS)
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
    step: str,
    squares: Tensor | None = None,
) -> tuple[int, dict[str, Any]]:
    """Programs and keyword arguments of the launch these tensors need."""
    batch, channels, height, width = x.shape
    half_height, half_width = drift.shape[2:]
    return batch * channels, {
        "x": x,
        "score": score,
        "y": y,
        "squares": squares if squares is not None else row,
        "row": row,
        "drift": drift,
        "gain": gain,
        "row_basis": row_basis,
        "column_basis": column_basis,
        "seeds": seeds if seeds is not None else row,
        "stage": stage if stage is not None else row,
        "stage_number": stage_number,
        "batch": batch,
        "channels": channels,
        "drift_stride": drift.stride(0) if len(drift) > 1 else 0,
        "gain_stride": gain.stride(0) if len(gain) > 1 else 0,
        "row_stride": 2 if len(row) > 1 else 0,
        "height": height,
        "width": width,
        **strides_of(x=x, score=score, y=x if step == "norms" else y),
        "HAS_NOISE": seeds is not None,
        "HAS_STAGE": stage is not None,
        "STEP": step,
        "PARTS": triton.next_power_of_2(channels),
        "HALF_H": half_height,
        "HALF_W": half_width,
        "PRECISION": PRECISIONS[precision],
        "num_warps": WARPS[(half_height * half_width > 256, precision)],
        "enable_fp_fusion": False,
    }


def launch_whole(x: Tensor, y: Tensor, *arguments: Any) -> None:
    """A move of whole images: the plan's arguments from `row` on, and the step by its name."""
    if x.numel() == 0:
        return
    *tensors, step = arguments
    squares = None
    with torch.cuda.device_of(x):
        if step != "given":
            squares = x.new_empty((*x.shape[:2], 2), dtype=torch.float32)
            programs, keywords = whole_plan(x, squares, *tensors, "norms")
            _whole_kernel[(programs,)](**keywords)
        programs, keywords = whole_plan(x, y, *tensors, step, squares)
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
        for name, step, drawn in (
            ("update", "given", True),
            ("norms", "norms", True),
            ("adaptive", "sample", True),
            ("adaptive, batch", "batch", True),
            ("no noise", "given", False),
        ):
            for precision in PRECISIONS:
                y = empty(2, 3, 2) if step == "norms" else x
                _, keywords = whole_plan(
                    x, y, empty(2, 2), x, tables, tables, *bases,
                    seeds if drawn else None, stage, 0, precision, step, empty(2, 3, 2),
                )  # fmt: skip
                title = f"{size[0]}x{size[1]} {name} {precision}"
                yield title, _whole_kernel, keywords, 0, arch
