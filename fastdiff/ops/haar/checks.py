"""What the public functions ask of their arguments; each error names one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..common import FLOATS, require_device, require_dtype, require_shape, wide_dtype
from ..constants import MAX_LEVELS


def check_image(name: str, x: Tensor) -> None:
    """Raise unless this is [B, C, H, W] of floats."""
    require_dtype(name, x, *FLOATS)
    if x.ndim != 4:
        raise ValueError(f"{name} must be [B, C, H, W], got shape {tuple(x.shape)}")


def check_levels(levels: int, size: Sequence[int]) -> None:
    """Raise unless images of that size have so many levels."""
    if not isinstance(levels, int) or not 0 <= levels <= MAX_LEVELS:
        raise ValueError(f"levels must be 0 to {MAX_LEVELS}, got {levels!r}")
    shorter = min(size)
    if levels and shorter <= 1 << (levels - 1):
        most = max(0, int(shorter) - 1).bit_length()
        raise ValueError(
            f"levels must be at most {most}, which halve the shorter side of {tuple(size)} to one, "
            f"got {levels}"
        )


def check_pyramid(
    details: Sequence[Tensor], coarse: Tensor, size: Sequence[int] | None
) -> tuple[int, int]:
    """Raise unless the bands fit each other; the size of their images."""
    check_image("coarse", coarse)
    if len(details) > MAX_LEVELS:
        raise ValueError(f"details must be at most {MAX_LEVELS} levels, got {len(details)}")
    batch, channels, height, width = coarse.shape
    for j in reversed(range(len(details))):
        detail = details[j]
        require_dtype(f"details[{j}]", detail, coarse.dtype)
        require_device(f"details[{j}]", detail, coarse)
        shape = tuple(detail.shape)
        inner = j < len(details) - 1  # it may be one short of twice the level before
        sides = ((2 * height, 2 * height - 1), (2 * width, 2 * width - 1))
        heights, widths = sides if inner else ((height,), (width,))
        fits = shape[:3] == (batch, 3, channels) and len(shape) == 5
        if not (fits and shape[3] in heights and shape[4] in widths):
            wanted = ((batch, 3, channels, h, w) for h in heights for w in widths)
            require_shape(f"details[{j}]", detail, *wanted)
        height, width = shape[3:]
    if not details:
        if size is not None and tuple(size) != tuple(coarse.shape[2:]):
            raise ValueError(f"size must be {tuple(coarse.shape[2:])} without details, got {size}")
        return height, width
    return check_size(size, (height, width), "the finest details")


def check_size(size: Sequence[int] | None, half: Sequence[int], of: str) -> tuple[int, int]:
    """The size of images whose sides are twice those, or one less; twice where it is None."""
    full = (2 * half[0], 2 * half[1])
    if size is None:
        return full
    if len(size) != 2 or any(
        not max(s - 1, 0) <= got <= s for s, got in zip(full, size, strict=True)
    ):
        raise ValueError(
            f"size must be {full}, twice that of {of}, or one less in a side, got {tuple(size)}"
        )
    return size[0], size[1]


def check_coefficients(
    coefficients: Tensor, x: Tensor, columns: int, size: Sequence[int], only: int | None = None
) -> int:
    """Raise unless they fit the images x; the number of levels that they are for."""
    require_dtype("coefficients", coefficients, wide_dtype(x))
    require_device("coefficients", coefficients, x)
    shape = tuple(coefficients.shape)
    rows = "levels + 1" if only is None else str(only + 1)
    fits = len(shape) == 3 and shape[0] in (1, len(x)) and shape[1] >= 1 and shape[2] == columns
    if not fits or (only is not None and shape[1] != only + 1):
        raise ValueError(
            f"coefficients must have the shape (1 or {len(x)}, {rows}, {columns}), got {shape}"
        )
    if only is None:
        check_levels(shape[1] - 1, size)
    return shape[1] - 1
