"""Preconditioners for Langevin and reverse-diffusion sampling, estimated from data.

Preconditioned diffusion sampling (Ma et al. 2022, 2023) passes the noise of an update through
M = F^-1 R F A and its drift through D = M M^T = F^-1 R F A^2 F^-1 R F, with a gain R for each
frequency and, for aligned images, a gain A for each pixel, both from simple statistics of data:

    m_f = log(1 + mean |F x|^2),   m_s = mean x^2,   gain = alpha / (m / max m + alpha - 1)

with x in [0, 1], F the unnormalised transform and one maximum over all channels. The gain is 1
where the data is strongest and at most alpha / (alpha - 1) where it vanishes. As D is the noise's
covariance, Langevin dynamics keep their stationary law; the reverse-diffusion predictor does not
(its variances change by d / (2 d - 1) in the limit of many steps).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.files import read_tensors, write_tensors
from fastdiff.images import image_files, read_images
from fastdiff.ops import SpectralGains, spectral_filter
from fastdiff.ops.common import FLOATS, wide_dtype
from fastdiff.ops.spectral_operators import mirrored

READ = 64  # images read at a time
FORMAT = "fastdiff masks 1"


@dataclass(frozen=True)
class MaskStatistics:
    """What masks are made of.

    Attributes:
        log_power: m_f [C, H, W] float64, unshifted (zero frequency first).
        mean_square: m_s [C, H, W] float64; None where only frequencies are known.
        count: how many images; 0 for a model of a spectrum.
        flipped: whether each image was counted with its mirror image, which makes the frequency
            statistic symmetric in both axes.
        source: where they come from, in words.
    """

    log_power: Tensor
    mean_square: Tensor | None
    count: int
    flipped: bool
    source: str

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.log_power.shape
        return channels, height, width

    def resized(self, height: int, width: int) -> MaskStatistics:
        """The statistics for another size: frequencies matched in cycles a pixel, bilinearly.

        The strongest entry keeps its gain and the range from it to the highest frequency keeps its
        course; what a camera of that resolution would have seen is another question.
        """
        if self.shape[1:] == (height, width):
            return self
        log_power = _resized_spectrum(self.log_power, height, width)
        pixels = self.mean_square
        if pixels is not None:
            pixels = torch.nn.functional.interpolate(
                pixels[None], (height, width), mode="bilinear", antialias=True
            )[0]
        source = f"{self.source}, resized from {self.shape[1]}x{self.shape[2]}"
        return MaskStatistics(log_power, pixels, self.count, self.flipped, source)

    def save(self, path: Path | str) -> None:
        """Write a safetensors file: tensors log_power and mean_square, the rest as metadata."""
        tensors = {"log_power": self.log_power}
        if self.mean_square is not None:
            tensors["mean_square"] = self.mean_square
        words = {"count": self.count, "flipped": self.flipped, "source": self.source}
        write_tensors(Path(path), tensors, {"format": FORMAT, "statistics": words})

    @classmethod
    def load(cls, path: Path | str) -> MaskStatistics:
        """Read what `save` wrote. Raises ValueError for another file."""
        tensors, metadata = read_tensors(path, "a safetensors file of masks")
        if metadata.get("format") != FORMAT or "log_power" not in tensors:
            raise ValueError(f"{path} must be of the format {FORMAT!r}; got metadata {metadata}")
        return cls(tensors["log_power"], tensors.get("mean_square"), **metadata["statistics"])


def estimate_masks(
    data: Tensor | Path | str | Iterable[Any], *, flip: bool = False, limit: int | None = None
) -> MaskStatistics:
    """Statistics of images, one batch in memory at a time, in float64 and in the order given.

    data: images [N, C, H, W], floats in [0, 1] or uint8; or a folder of 8-bit images of one size
        (by name); or an iterable of such batches, or of tuples that begin with one.
    flip: count each image with its mirror image too.
    limit: take the first so many images. 200 are enough for a smooth spectrum.

    Raises TypeError or ValueError for what is no image, for floats outside [0, 1] and for none.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    power: Tensor | None = None
    squares: Tensor | None = None
    count = 0
    for batch in _batches(data):
        if limit is not None:
            batch = batch[: limit - count]
        x = _in_unit_range(batch)
        if power is None:
            power, squares = torch.zeros_like(x[0]), torch.zeros_like(x[0])
        elif x.shape[1:] != power.shape:
            raise ValueError(
                f"data must hold images of one shape, {tuple(power.shape)}; got "
                f"{tuple(x.shape[1:])}"
            )
        assert squares is not None
        power += torch.fft.fft2(x).abs().square().sum(0)
        squares += x.square().sum(0)
        count += len(x)
        if limit is not None and count >= limit:
            break
    if power is None or squares is None or not count:
        raise ValueError("data must hold at least one image; got none")
    if flip:
        across = torch.arange(power.shape[2]).neg() % power.shape[2]
        power, squares = (power + power[:, :, across]) / 2, (squares + squares.flip(2)) / 2
    source = str(data) if isinstance(data, str | Path) else "images in memory"
    return MaskStatistics(torch.log1p(power / count), squares / count, count, flip, source)


def power_law_masks(
    channels: int, height: int, width: int, *, exponent: float = 2.0, variance: float = 0.06
) -> MaskStatistics:
    """Statistics of a model spectrum in place of data: power falls as frequency^-exponent.

    variance: of a pixel around its mean of 1/2. Natural images have exponents near 2. Frequencies
    alone: there is no pixel statistic.
    """
    if min(channels, height, width) < 1:
        raise ValueError(
            f"channels, height and width must be positive; got {channels}, {height}, {width}"
        )
    if not (math.isfinite(exponent) and variance > 0):
        raise ValueError(
            f"exponent must be finite and variance positive; got {exponent}, {variance}"
        )
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in (height, width))
    radius = torch.hypot(rows[:, None], columns[None, :])
    radius[0, 0] = torch.inf if exponent >= 0 else 0.0
    law = radius.pow(-exponent)
    size = height * width
    total = float(law.sum())
    power = law * (variance * size**2 / total) if total else torch.zeros_like(law)
    power[0, 0] = (size / 2) ** 2
    log_power = torch.log1p(power).expand(channels, height, width).clone()
    return MaskStatistics(log_power, None, 0, True, f"power law, exponent {exponent:g}")


class Preconditioner:
    """The operators M and D = M M^T (+ S) of an update, from gains for frequencies and pixels.

    Args:
        frequency: R [C or 1, H, W], real, positive, unshifted and point-symmetric (made so, with a
            warning, where it is not); None: all ones.
        pixel: A [C or 1, H, W], positive; None: all ones.
        skew: q [C or 1, H, W], real and odd, q(-k) = -q(k): adds S = F^-1 i q F to D, which leaves
            the stationary law of Langevin dynamics as it is. Not with a pixel gain.

    All None is the identity: nothing is computed. Raises TypeError or ValueError naming the gain.
    """

    def __init__(
        self,
        frequency: Tensor | None = None,
        pixel: Tensor | None = None,
        skew: Tensor | None = None,
    ) -> None:
        given = {"frequency": frequency, "pixel": pixel, "skew": skew}
        for name, gain in given.items():
            if gain is None:
                continue
            if not isinstance(gain, Tensor) or gain.dtype not in FLOATS[:2]:
                kind = gain.dtype if isinstance(gain, Tensor) else type(gain).__name__
                raise TypeError(f"{name} must be a float32 or float64 tensor; got {kind}")
            if gain.ndim != 3:
                raise ValueError(f"{name} must be [C or 1, H, W]; got shape {tuple(gain.shape)}")
            if name != "skew" and not bool((gain.isfinite() & (gain > 0)).all()):
                raise ValueError(
                    f"{name} must hold positive finite gains; got entries from "
                    f"{float(gain.min())} to {float(gain.max())}"
                )
        self.gains: SpectralGains | None = None
        there = next((gain for gain in given.values() if gain is not None), None)
        if there is not None:
            ones = torch.ones_like(there[:1])
            self.gains = SpectralGains(ones if frequency is None else frequency, pixel, skew)
        if frequency is not None and self.gains is not None:
            frequency = self.gains.gain.full
        self.frequency, self.pixel, self.skew = frequency, pixel, skew

    @classmethod
    def from_statistics(
        cls,
        statistics: MaskStatistics,
        *,
        alpha: float | str = 5.0,
        use_pixels: bool = False,
        steps: int | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        device: torch.device | str | None = None,
    ) -> Preconditioner:
        """The published gains, alpha / (m / max m + alpha - 1).

        alpha: infinity is the identity. "auto": so that at the median frequency the predictor's
            shrinking, d - 1 for d = gain^2, cancels the inflation by its step size,
            log(sigma_max / sigma_min) / steps; needs those three.
        use_pixels: also the pixel gain, for aligned images such as faces.

        Raises ValueError for an alpha that makes a gain infinite or negative.
        """
        frequency = statistics.log_power / _largest(statistics.log_power, "log_power")
        if isinstance(alpha, str):
            alpha = _automatic(alpha, frequency, steps, sigma_min, sigma_max)
        if use_pixels and statistics.mean_square is None:
            raise ValueError("use_pixels needs statistics with mean_square; these have none")
        if math.isinf(alpha) and alpha > 0:
            return cls()
        gains = [_gain(frequency, alpha)]
        if use_pixels:
            assert statistics.mean_square is not None
            pixels = statistics.mean_square / _largest(statistics.mean_square, "mean_square")
            gains.append(_gain(pixels, alpha))
        return cls(*(g.to(device) for g in gains))

    @property
    def is_identity(self) -> bool:
        return self.gains is None

    def to(self, device: torch.device | str) -> Preconditioner:
        """The same operators on a device."""
        device = torch.device(device)
        if self.gains is None or self.gains.device == device:
            return self
        parts = (self.frequency, self.pixel, self.skew)
        return Preconditioner(*(gain if gain is None else gain.to(device) for gain in parts))

    def noise(self, z: Tensor) -> Tensor:
        """M z: what colours white noise. z: [B, C, H, W], any float dtype."""
        if self.gains is None:
            return z
        return self._frequency(self._pixel(z)).to(z.dtype)

    def adjoint(self, x: Tensor) -> Tensor:
        """M^T x. x: [B, C, H, W], any float dtype."""
        if self.gains is None:
            return x
        return self._pixel(self._frequency(x.to(wide_dtype(x)))).to(x.dtype)

    def drift(self, score: Tensor) -> Tensor:
        """D s + S s: what a score passes through. score: [B, C, H, W], any float dtype."""
        if self.gains is None:
            return score
        if self.gains.pixel is None:
            return spectral_filter(score, self.gains.drift)
        between = self._pixel(self._pixel(self._frequency(score.to(wide_dtype(score)))))
        return self._frequency(between).to(score.dtype)

    def _frequency(self, x: Tensor) -> Tensor:
        assert self.gains is not None
        return x if self.frequency is None else spectral_filter(x, self.gains.gain)

    def _pixel(self, x: Tensor) -> Tensor:
        """A x, in the arithmetic's dtype."""
        gain = self.pixel
        if gain is None:
            return x
        if x.shape[2:] != gain.shape[1:] or len(gain) not in (1, x.shape[1]):
            raise ValueError(
                f"images must be [B, {len(gain)}, {gain.shape[1]}, {gain.shape[2]}], "
                f"as the pixel gain is; got {tuple(x.shape)}"
            )
        return gain.to(wide_dtype(x)) * x

    def __repr__(self) -> str:
        if self.is_identity:
            return "Preconditioner(identity)"
        parts = []
        for name in ("frequency", "pixel", "skew"):
            gain = getattr(self, name)
            if gain is not None:
                shape = "x".join(map(str, gain.shape))
                parts.append(f"{name} {shape} {float(gain.min()):.3f} .. {float(gain.max()):.3f}")
        return f"Preconditioner({', '.join(parts)})"


# == Inside ========================================================================================


def _batches(data: Tensor | Path | str | Iterable[Any]) -> Iterator[Any]:
    if isinstance(data, Tensor):
        yield from data.split(READ)
    elif isinstance(data, str | Path):
        paths, shape = image_files(Path(data), "data"), None
        for start in range(0, len(paths), READ):
            images = read_images(paths[start : start + READ], shape, "data")
            shape = images.shape[1:]
            yield images
    else:
        for item in data:
            yield item[0] if isinstance(item, list | tuple) else item


def _in_unit_range(batch: Tensor) -> Tensor:
    if not isinstance(batch, Tensor) or batch.ndim != 4:
        what = f"shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"data must hold batches [N, C, H, W]; got {what}")
    if batch.dtype == torch.uint8:
        return batch.double() / 255
    if batch.dtype not in FLOATS:
        raise TypeError(f"data must be uint8 or floating-point; got {batch.dtype}")
    x = batch.double()
    if x.numel() and not (float(x.min()) >= 0 and float(x.max()) <= 1):
        raise ValueError(
            f"data must lie in [0, 1]; got {float(x.min()):.3g} .. {float(x.max()):.3g} "
            "(images in [-1, 1]: give (x + 1) / 2)"
        )
    return x


def _largest(m: Tensor, name: str) -> float:
    largest = float(m.max())
    if not (math.isfinite(largest) and largest > 0 and bool((m >= 0).all())):
        raise ValueError(
            f"{name} must be finite, not negative and not all zero; got {largest} as "
            "its largest entry"
        )
    return largest


def _gain(m: Tensor, alpha: float) -> Tensor:
    """alpha / (m + alpha - 1), m in [0, 1]."""
    least = float(m.min())
    if not alpha > 1 - least:
        raise ValueError(
            f"alpha must be above {1 - least:.6g}, where a gain would be infinite; got {alpha}"
        )
    return alpha / (m + alpha - 1)


def _automatic(
    word: str,
    frequency: Tensor,
    steps: int | None,
    sigma_min: float | None,
    sigma_max: float | None,
) -> float:
    if word != "auto":
        raise ValueError(f'alpha must be a number or "auto"; got {word!r}')
    if steps is None or sigma_min is None or sigma_max is None:
        raise ValueError('alpha="auto" needs steps, sigma_min and sigma_max')
    if steps < 1 or not 0 < sigma_min < sigma_max:
        raise ValueError(
            f"steps must be positive and 0 < sigma_min < sigma_max; got {steps}, "
            f"{sigma_min}, {sigma_max}"
        )
    gain = math.sqrt(1 + math.log(sigma_max / sigma_min) / steps)
    return gain * (1 - float(frequency.median())) / (gain - 1)


def _resized_spectrum(values: Tensor, height: int, width: int) -> Tensor:
    """Values on an unshifted grid of frequencies, bilinearly on another one."""
    if min(height, width) < 1:
        raise ValueError(f"height and width must be positive; got {height}, {width}")
    for axis, size in ((1, height), (2, width)):
        old = values.shape[axis]
        at = torch.fft.fftfreq(size, dtype=torch.float64) * old
        low = at.floor()
        shape = [1, 1, 1]
        shape[axis] = size
        weight = (at - low).view(shape)
        below, above = (values.index_select(axis, (low + i).long() % old) for i in (0, 1))
        values = (1 - weight) * below + weight * above
    return (values + mirrored(values)) / 2
