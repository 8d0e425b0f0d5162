"""Images as 8-bit files: the one rule by which floats become bytes, and folders of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.files import write_whole

ROUNDING = "(x + 1) * 127.5 to the nearest whole number, ties to even, held in 0..255"
SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
RECIPE = "recipe.json"  # what a folder of samples says of itself; no image


def to_bytes(x: Tensor) -> Tensor:
    """Images in [-1, 1], any float dtype, to uint8 of the same shape, by `ROUNDING`.

    Raises ValueError where a number is not finite: a file cannot hold it.
    """
    if not x.isfinite().all():
        raise ValueError("images must be finite; got NaN or infinity")
    return ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 images to float64 in [-1, 1]."""
    return images.double() / 127.5 - 1


def write_png(path: Path, image: Tensor) -> None:
    """Write one image, uint8 [1 or 3, H, W] (grey or RGB), without loss."""
    from PIL import Image  # late: importing fastdiff must stay cheap

    pixels = image.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(pixels[:, :, 0] if len(image) == 1 else pixels)
    write_whole(path, lambda part: picture.save(part, format="png"))


def image_files(folder: Path, argument: str) -> list[Path]:
    """The images that lie in a folder, by name; `argument` is what errors call the folder.

    Hidden files and `recipe.json` are passed over. Raises FileNotFoundError, NotADirectoryError, or
    ValueError for anything else that is no image, and for a folder without any.
    """
    if not folder.exists():
        raise FileNotFoundError(f"{argument} must be a folder of images; {folder} does not exist")
    if not folder.is_dir():
        raise NotADirectoryError(f"{argument} must be a folder of images; {folder} is a file")
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name == RECIPE:
            continue
        if path.is_dir() or path.suffix.lower() not in SUFFIXES:
            kind = "a folder" if path.is_dir() else "no image"
            raise ValueError(f"{argument} must hold images only, directly; {path} is {kind}")
        found.append(path)
    if not found:
        raise ValueError(f"{argument} must hold images; {folder} holds none")
    return found


def read_images(paths: Sequence[Path], shape: Sequence[int] | None, argument: str) -> Tensor:
    """Read 8-bit grey or RGB images of one shape: uint8 [N, 1 or 3, H, W].

    shape: (C, H, W) they must have; None: whatever the first one has. Raises ValueError for another
    shape, a file that cannot be read, or pixels that are not 8-bit grey or RGB.
    """
    from PIL import Image, UnidentifiedImageError

    images = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                mode, pixels = picture.mode, np.array(picture)
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{argument} must hold images; {path} cannot be read") from error
        if mode not in ("L", "RGB"):
            raise ValueError(
                f"{argument} must hold 8-bit grey or RGB images; {path} has mode {mode}"
            )
        image = torch.from_numpy(pixels)
        image = image[None] if mode == "L" else image.permute(2, 0, 1)
        shape = tuple(image.shape) if shape is None else tuple(shape)
        if tuple(image.shape) != shape:
            raise ValueError(
                f"{argument} must hold images of one shape, {dims(shape)}; {path} is "
                f"{dims(image.shape)}"
            )
        images.append(image)
    return torch.stack(images)


def contact_sheet(paths: Sequence[Path], out: Path, columns: int = 10) -> None:
    """Write a PNG with the images in rows, enlarged by whole numbers where they are small."""
    images = read_images(paths, None, "sheet")
    scale = max(1, 64 // images.shape[-1])
    images = images.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    images = F.pad(images, (0, 2, 0, 2), value=255)
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    blank = images.new_full((rows * columns - len(images), *images.shape[1:]), 255)
    grid = torch.cat([images, blank]).unflatten(0, (rows, columns))
    grid = grid.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    write_png(out, F.pad(grid, (2, 0, 2, 0), value=255))


def dims(shape: Sequence[int]) -> str:
    """A shape as people write it: 3x32x32."""
    return "x".join(map(str, shape))
