"""Passes over half spectra, in Triton: what fastdiff/ops/half_spectrum.py defines.

- combine: reads the half spectrum and writes its Hartley spectrum, 8 bytes a
  pixel, draws the noise where it needs it, and is bound by memory for an update without noise, by
  Philox's integer products with it. An adaptive step takes a launch before it (STEP = "norms"),
  which only reads: partial sums, one pair a program.
- add: reads the half spectrum and the state and writes the result, 12 bytes a
  pixel; rows k and -k come from the same memory, the second time from a cache. Bound by memory.
"""

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .philox import box_muller, philox_words

TILE = 4096  # bytes of real numbers that a program writes; twice that spills in float64


@triton.jit
def _words(seed, quad, stage):
    NOISE: tl.constexpr = 4  # a Philox purpose
    zero = tl.zeros((), tl.int32)
    return philox_words(seed, quad, zero + stage, zero + NOISE)


@triton.jit
def normal_pairs(seed, element, stage):
    """The normals of elements e and e + 1, e even, int64 in any shape."""
    u0, u1, u2, u3 = _words(seed, element // 4, stage)
    second = element % 4 >= 2
    return box_muller(tl.where(second, u2, u0), tl.where(second, u3, u1))


@triton.jit
def adaptive_row(
    a, k, squares, sample, batch, parts, STEP: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """(a h, sqrt(2 h)), h = k (|noise| / |direction|)^2: of a sample, or of means over the batch.

    squares: [batch, parts, 2], of direction and noise; PARTS: parts rounded up to a power of two.
    """
    part = tl.arange(0, PARTS)
    if STEP == "sample":
        at = squares + 2 * (sample * parts + part)
        direction = tl.sqrt(tl.sum(tl.load(at, mask=part < parts, other=0.0)))
        noise = tl.sqrt(tl.sum(tl.load(at + 1, mask=part < parts, other=0.0)))
    else:
        ROWS: tl.constexpr = 256 // PARTS if PARTS < 256 else 1
        direction = tl.zeros((), squares.dtype.element_ty)
        noise = direction
        for start in range(0, batch, ROWS):
            one = start + tl.arange(0, ROWS)
            inside = (one < batch)[:, None] & (part < parts)[None, :]
            at = squares + 2 * (one[:, None] * parts + part[None, :])
            direction += tl.sum(tl.sqrt(tl.sum(tl.load(at, mask=inside, other=0.0), 1)))
            noise += tl.sum(tl.sqrt(tl.sum(tl.load(at + 1, mask=inside, other=0.0), 1)))
    ratio = noise / direction
    h = k * ratio * ratio
    return (a * h).to(a.dtype), tl.sqrt(2 * h).to(a.dtype)


@triton.jit
def _edge_noise(first, second, k, mirror):
    """An edge column's noise from the numbers of rows k and mirror: Hermitian down the rows."""
    ROOT2: tl.constexpr = 1.4142135623730951
    re = tl.where(k == mirror, ROOT2 * first, tl.where(k < mirror, first, second))
    im = tl.where(k == mirror, 0.0, tl.where(k < mirror, second, -first))
    return re, im


@triton.jit
def _combined(
    spectrum, drift, gain, noise, at, table, gain_at, inside, n_re, n_im, a, c, unit,
    COMPLEX: tl.constexpr, NOISE: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """Entries of the two parts' sum, as (re, im); or their squared magnitudes."""
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
    elif NOISE != "none":
        re, im = re + c * n_re, im + c * n_im
    return re, im


@triton.jit(do_not_specialize=["stage_number"])
def _combine_kernel(
    spectrum,  # pairs [B, C, H, columns, 2]
    hartley,  # [B, C, H, W], what is written
    drift,
    gain,
    row,  # [1 or B, 2]
    noise,  # pairs like spectrum; unused unless given
    seeds,
    stage,  # int32 [1]; unused without HAS_STAGE
    squares,  # float64: [B C, programs, 2] to fill, or [B, 2]; unused where steps are given
    stage_number,
    batch,
    channels,
    height,
    width,
    drift_stride,  # 0: one table for all channels
    gain_stride,
    row_stride,
    COMPLEX: tl.constexpr,
    NOISE: tl.constexpr,  # "none", "given" or "drawn"
    HAS_STAGE: tl.constexpr,
    STEP: tl.constexpr,  # where the length comes from: "given", "sample", "batch"; or "norms"
    ALIGNED: tl.constexpr,  # rows of the packed noise begin with a quad
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns, packed = width // 2 + 1, (width + 1) // 2 * 2
    across = tl.cdiv(packed // 2, COLUMNS)
    blocks = across * tl.cdiv(height, ROWS)
    image = (tl.program_id(0) // blocks).to(tl.int64)
    sample, channel = image // channels, image % channels
    block = tl.program_id(0) % blocks % across
    k = tl.program_id(0) % blocks // across * ROWS + tl.arange(0, ROWS)
    m = block * COLUMNS + tl.arange(0, COLUMNS)
    a, c = tl.load(row + sample * row_stride), tl.load(row + sample * row_stride + 1)
    NORMS: tl.constexpr = STEP == "norms"
    if STEP == "sample" or STEP == "batch":
        a, c = adaptive_row(a, c, squares, sample, batch, 1, STEP, 1)
    first = (channel * height + k) * packed
    number, unit, seed = stage_number, 1.0, tl.zeros((), tl.int64)
    if NOISE == "drawn":
        pixels = tl.zeros((), tl.int64) + height * width
        unit = tl.sqrt(pixels.to(spectrum.dtype.element_ty) / 2)
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
            n_re, n_im = normal_pairs(seed, first[:, None] + 2 * m[None, :], number)
    inside = (k < height)[:, None] & ((m > 0) & (2 * m < width))[None, :]
    table = k[:, None] * columns + m[None, :]
    at = image * (height * columns) + table
    one, other = _combined(
        spectrum, drift, gain, noise, at, channel * drift_stride + table,
        channel * gain_stride + table, inside, n_re, n_im, a, c, unit, COMPLEX, NOISE, NORMS,
    )  # fmt: skip
    mirror = tl.where(k == 0, 0, height - k)
    to = hartley + image * (height * width)
    total, noise_total = 0.0, 0.0
    if NORMS:  # a column inside stands for its mirror image too
        keep = tl.where(inside, 2.0, 0.0)
        total, noise_total = tl.sum(keep * one), tl.sum(keep * other)
    else:
        tl.store(to + k[:, None] * width + m[None, :], one - other, mask=inside)
        tl.store(to + mirror[:, None] * width + (width - m)[None, :], one + other, mask=inside)

    if block == 0:
        wide: tl.constexpr = spectrum.dtype.element_ty
        zero, nyquist = tl.zeros((ROWS,), wide), tl.zeros((ROWS,), wide)
        zero_im, nyquist_im = zero, zero
        if NOISE == "drawn":
            at_zero, at_nyquist = normal_pairs(seed, first, number)
            mirrored = (channel * height + mirror) * packed
            of_zero, of_nyquist = normal_pairs(seed, mirrored, number)
            zero, zero_im = _edge_noise(at_zero.to(wide), of_zero.to(wide), k, mirror)
            nyquist, nyquist_im = _edge_noise(at_nyquist.to(wide), of_nyquist.to(wide), k, mirror)
        for edge in tl.static_range(2):
            inside_edge = k < height * (1 - edge * (width % 2))  # an odd width has one edge
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
            else:
                at_edge = to + k * width + edge * (width // 2)
                tl.store(at_edge, one_edge - other_edge, mask=inside_edge)
    if NORMS:
        sums = squares + 2 * tl.program_id(0)
        tl.store(sums, total.to(tl.float64))
        tl.store(sums + 1, noise_total.to(tl.float64))


def combine_plan(
    spectrum: Tensor,
    hartley: Tensor,
    drift: Tensor,
    gain: Tensor | None,
    row: Tensor,
    noise: Tensor | None,
    seeds: Tensor | None,
    stage: Tensor | None,
    stage_number: int,
    step: str,
    squares: Tensor | None = None,
) -> tuple[int, dict[str, Any]]:
    """Programs and keyword arguments of the launch these tensors need."""
    batch, channels, height, width = hartley.shape
    packed = (width + 1) // 2 * 2
    columns = min(128, triton.next_power_of_2(max(packed // 2, 2)))
    tile = TILE // hartley.element_size()
    rows = min(tile // columns, triton.next_power_of_2(height))
    kind = "given" if noise is not None else "drawn" if seeds is not None else "none"
    blocks = triton.cdiv(packed // 2, columns) * triton.cdiv(height, rows)
    return blocks * batch * channels, {
        "spectrum": torch.view_as_real(spectrum),
        "hartley": hartley,
        "drift": torch.view_as_real(drift) if drift.is_complex() else drift,
        "gain": gain if gain is not None else row,
        "row": row,
        "noise": torch.view_as_real(noise) if noise is not None else row,
        "seeds": seeds if seeds is not None else row,
        "stage": stage if stage is not None else row,
        "squares": squares if squares is not None else row,
        "stage_number": stage_number,
        "batch": batch,
        "channels": channels,
        "height": height,
        "width": width,
        "drift_stride": drift[0].numel() if len(drift) > 1 else 0,
        "gain_stride": gain[0].numel() if gain is not None and len(gain) > 1 else 0,
        "row_stride": 2 if len(row) > 1 else 0,
        "COMPLEX": drift.is_complex(),
        "NOISE": kind,
        "HAS_STAGE": stage is not None,
        "STEP": step,
        "ALIGNED": packed % 4 == 0,
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": 4,
        "enable_fp_fusion": False,
    }


def launch_combine(*arguments: Any) -> None:
    """The pass between two transforms: `combine_ref` on checked arguments."""
    *tensors, step = arguments
    spectrum, hartley, *_ = tensors
    if spectrum.numel() == 0:
        return
    if not spectrum.is_contiguous():
        raise ValueError(f"spectrum must be contiguous, got strides {spectrum.stride()}")
    squares = None
    with torch.cuda.device_of(spectrum):
        if step != "given":
            programs, _ = combine_plan(*tensors, "norms")
            samples = len(spectrum)
            parts = hartley.new_empty((samples, programs // samples, 2), dtype=torch.float64)
            _combine_kernel[(programs,)](**combine_plan(*tensors, "norms", parts)[1])
            squares = parts.sum(1)
        programs, keywords = combine_plan(*tensors, step, squares)
        _combine_kernel[(programs,)](**keywords)


@triton.jit
def _add_kernel(
    spectrum,  # pairs [B, C, H, columns, 2]
    x,  # unused without HAS_X
    y,
    channels,
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
    HAS_X: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns, across = width // 2 + 1, tl.cdiv(width, COLUMNS)
    blocks = across * tl.cdiv(height, ROWS)
    image, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    sample, channel = image // channels, image % channels
    p = (block // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    q = (block % across * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)[None, :]
    inside = (p < height) & (q < width)
    left = 2 * q < width
    row = tl.where(left | (p == 0), p, height - p)
    at = row * columns + tl.where(left, q, width - q)
    pair = spectrum + 2 * (image * (height * columns) + at)
    re = tl.load(pair, mask=inside, other=0.0)
    im = tl.load(pair + 1, mask=inside, other=0.0)
    change = tl.where(left, re - im, re + im)
    if HAS_X:
        x += sample * x_sample + channel * x_channel + p * x_row + q * x_column
        change += tl.load(x, mask=inside, other=0.0).to(change.dtype)
    y += sample * y_sample + channel * y_channel + p * y_row + q * y_column
    tl.store(y, change, mask=inside)


def strides_of(**images: Tensor) -> dict[str, int]:
    """Keyword arguments x_sample, x_channel, x_row and x_column for an image x, and so on."""
    axes = ("sample", "channel", "row", "column")
    return {
        f"{name}_{axis}": stride
        for name, image in images.items()
        for axis, stride in zip(axes, image.stride(), strict=True)
    }


def add_plan(spectrum: Tensor, x: Tensor | None, y: Tensor) -> tuple[int, dict[str, Any]]:
    """Programs and keyword arguments of the launch these tensors need."""
    batch, channels, height, width = y.shape
    columns = min(128, triton.next_power_of_2(width))
    tile = TILE // (8 if y.dtype == torch.float64 else 4)
    rows = min(tile // columns, triton.next_power_of_2(height))
    blocks = triton.cdiv(width, columns) * triton.cdiv(height, rows)
    return blocks * batch * channels, {
        "spectrum": torch.view_as_real(spectrum),
        "x": y if x is None else x,
        "y": y,
        "channels": channels,
        "height": height,
        "width": width,
        **strides_of(x=y if x is None else x, y=y),
        "HAS_X": x is not None,
        "ROWS": rows,
        "COLUMNS": columns,
        "num_warps": 4,
    }


def launch_add(spectrum: Tensor, x: Tensor | None, y: Tensor) -> None:
    """The pass after the last transform: `add_ref` on checked arguments."""
    if y.numel() == 0:
        return
    if not spectrum.is_contiguous():
        raise ValueError(f"spectrum must be contiguous, got strides {spectrum.stride()}")
    programs, keywords = add_plan(spectrum, x, y)
    with torch.cuda.device_of(y):
        _add_kernel[(programs,)](**keywords)


def aot_variants() -> Iterator[tuple[str, object, dict[str, object], int, int]]:
    """For `python -m bench.aot`; the last number is the least arch."""

    def empty(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    seeds, stage = empty(2, of=torch.int64), empty(1, of=torch.int32)
    for size, of in (((256, 256), torch.float32), ((256, 256), torch.float64),
                     ((97, 101), torch.float32), ((1, 1), torch.float32)):  # fmt: skip
        half = (*size[:1], size[1] // 2 + 1)
        spectrum, table = empty(2, 3, *half, of=of.to_complex()), empty(3, *half, of=of)
        for kind in ("drawn", "given", "none", "drawn norms", "drawn sample", "drawn batch",
                     "drawn skew"):  # fmt: skip
            step = kind.split()[-1] if kind.split()[-1] in ("norms", "sample", "batch") else "given"
            drift = empty(3, *half, of=of.to_complex()) if "skew" in kind else table
            _, keywords = combine_plan(
                spectrum, empty(2, 3, *size, of=of), drift, table, empty(2, 2, of=of),
                spectrum if kind == "given" else None, seeds if "drawn" in kind else None, stage, 0,
                step, empty(2, 2, of=torch.float64),
            )  # fmt: skip
            yield f"combine {size[0]}x{size[1]} {kind} {of}", _combine_kernel, keywords, 0, 80
        for y_of in dict.fromkeys((of, torch.bfloat16 if of == torch.float32 else of)):
            y = empty(2, 3, *size, of=y_of)
            for x in (y, None):
                kind = f"{'no' if x is None else 'add'} x {size[0]}x{size[1]} {y_of}"
                yield f"hartley {kind}", _add_kernel, add_plan(spectrum, x, y)[1], 0, 80
