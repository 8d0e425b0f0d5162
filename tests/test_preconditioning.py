"""Masks of preconditioned sampling, and the operators they make."""

import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastdiff.images import write_png
from fastdiff.preconditioning import (
    MaskStatistics,
    Preconditioner,
    estimate_masks,
    power_law_masks,
)


def images(count=10, channels=3, height=8, width=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand((count, channels, height // 2, width // 2), generator=generator)
    return torch.nn.functional.interpolate(smooth, (height, width), mode="bilinear")


def test_the_statistics_are_their_formulas():
    x = images()
    found = estimate_masks(x)
    power = np.mean(np.abs(np.fft.fft2(x.double().numpy())) ** 2, axis=0)
    np.testing.assert_allclose(found.log_power, np.log(1 + power), rtol=1e-12)
    np.testing.assert_allclose(found.mean_square, np.mean(x.double().numpy() ** 2, 0), rtol=1e-12)
    assert found.count == 10 and found.shape == (3, 8, 12)


def test_batches_loaders_and_folders_say_the_same(tmp_path):
    x = (images(70) * 255).round().to(torch.uint8)
    for number, image in enumerate(x):
        write_png(tmp_path / f"{number:03d}.png", image)
    whole = estimate_masks(x)
    pairs = [(part, torch.zeros(len(part))) for part in x.split(9)]
    for other in (estimate_masks(tmp_path), estimate_masks(x.float() / 255), estimate_masks(pairs)):
        assert other.count == 70
        torch.testing.assert_close(other.log_power, whole.log_power, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other.mean_square, whole.mean_square, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        estimate_masks(x, limit=13).log_power, estimate_masks(x[:13]).log_power
    )


def test_flips_make_both_axes_symmetric():
    x = images(3)
    found = estimate_masks(x, flip=True)
    torch.testing.assert_close(found.log_power, estimate_masks(torch.cat([x, x.flip(3)])).log_power)
    torch.testing.assert_close(found.mean_square, found.mean_square.flip(2))
    across = torch.arange(12).neg() % 12
    torch.testing.assert_close(found.log_power, found.log_power[:, :, across])


def test_the_gains_are_their_formula():
    statistics = estimate_masks(images())
    made = Preconditioner.from_statistics(statistics, alpha=4, use_pixels=True)
    m = statistics.log_power / statistics.log_power.max()
    torch.testing.assert_close(made.frequency.double(), 4 / (m + 3), rtol=1e-6, atol=0)
    m = statistics.mean_square / statistics.mean_square.max()
    torch.testing.assert_close(made.pixel.double(), 4 / (m + 3), rtol=1e-6, atol=0)
    assert float(made.frequency.min()) == 1 and float(made.frequency.max()) <= 4 / 3


def test_infinite_alpha_is_the_identity():
    made = Preconditioner.from_statistics(estimate_masks(images()), alpha=math.inf, use_pixels=True)
    x = images(2)
    assert made.is_identity and made.noise(x) is x and made.drift(x) is x and made.adjoint(x) is x


def test_automatic_alpha_cancels_the_inflation_at_the_median():
    statistics = power_law_masks(3, 64, 64)
    made = Preconditioner.from_statistics(
        statistics, alpha="auto", steps=66, sigma_min=0.01, sigma_max=1348
    )
    d = float(made.frequency.median()) ** 2
    assert d == pytest.approx(1 + math.log(1348 / 0.01) / 66, rel=1e-5)


@pytest.mark.parametrize("parts", ["frequency", "pixel", "both"])
def test_operators(parts):
    """D = M M^T, symmetric and positive; M^T is M's adjoint."""
    statistics = estimate_masks(images(4, 2, 5, 6))
    both = Preconditioner.from_statistics(statistics, alpha=2, use_pixels=True)
    frequency = both.frequency.double() if parts != "pixel" else None
    pixel = both.pixel.double() if parts != "frequency" else None
    made = Preconditioner(frequency, pixel)
    basis = torch.eye(60, dtype=torch.float64).view(60, 2, 5, 6)
    m, adjoint, d = (f(basis).flatten(1).T for f in (made.noise, made.adjoint, made.drift))
    torch.testing.assert_close(adjoint, m.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(d, m @ m.T, rtol=0, atol=1e-12)
    assert torch.linalg.eigvalsh((d + d.T) / 2).min() >= 1 - 1e-9


def test_a_power_law():
    found = power_law_masks(1, 64, 64, exponent=2.0)
    power = found.log_power.expm1()[0]
    assert float(power[0, 2] / power[0, 4]) == pytest.approx(4, rel=1e-6)
    variance = (power.sum() - power[0, 0]) / 64**4  # of a pixel, by Parseval
    assert float(variance) == pytest.approx(0.06, rel=1e-6)
    assert float(power[0, 0]) == pytest.approx((64 * 64 / 2) ** 2)


def test_statistics_are_resized():
    statistics = estimate_masks(images(20, 1, 16, 16), flip=True)
    same = statistics.resized(16, 16)
    assert same is statistics
    for size in ((32, 24), (9, 16), (8, 8)):
        other = statistics.resized(*size)
        assert other.shape == (1, *size) and other.mean_square.shape == (1, *size)
        assert float(other.log_power.max()) == float(statistics.log_power.max())
        assert float(other.log_power.min()) >= float(statistics.log_power.min())
        Preconditioner.from_statistics(other, use_pixels=True)  # symmetric: no warning
    back = statistics.resized(32, 32).log_power[:, ::2, ::2]
    torch.testing.assert_close(back, statistics.log_power)


def test_masks_come_back_from_files(tmp_path):
    for statistics in (estimate_masks(images(), flip=True), power_law_masks(3, 8, 8)):
        statistics.save(tmp_path / "deep" / "mask.safetensors")
        found = MaskStatistics.load(tmp_path / "deep" / "mask.safetensors")
        assert torch.equal(found.log_power, statistics.log_power)
        assert (found.mean_square is None) == (statistics.mean_square is None)
        assert (found.count, found.flipped) == (statistics.count, statistics.flipped)
    (tmp_path / "other").write_text("no masks")
    with pytest.raises(ValueError, match="must be a safetensors file of masks"):
        MaskStatistics.load(tmp_path / "other")


def test_the_command_writes_masks(tmp_path):
    from fastdiff.app.cli import app

    for number, image in enumerate((images(4) * 255).to(torch.uint8)):
        write_png(tmp_path / "data" / f"{number}.png", image) if number else (
            (tmp_path / "data").mkdir(),
            write_png(tmp_path / "data" / "0.png", image),
        )
    out = tmp_path / "mask.safetensors"
    result = CliRunner().invoke(
        app, ["precondition", "estimate", str(tmp_path / "data"), "--out", str(out), "--limit", "3"]
    )
    assert result.exit_code == 0 and "3 images of 3x8x12" in result.output
    assert MaskStatistics.load(out).count == 3
    result = CliRunner().invoke(app, ["precondition", "estimate", str(tmp_path / "none")])
    assert result.exit_code != 0


GAIN = torch.full((1, 4, 4), 1.1)
READY = Preconditioner.from_statistics
FLAT = MaskStatistics(torch.rand(1, 4, 4).double(), None, 1, False, "")


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: estimate_masks(images() * 2 - 1), ValueError, r"data must lie in \[0, 1\]"),
        (lambda: estimate_masks(images()[0]), TypeError, r"batches \[N, C, H, W\]"),
        (lambda: estimate_masks([]), ValueError, "at least one image"),
        (lambda: estimate_masks([images(), images(height=6)]), ValueError, "images of one shape"),
        (lambda: estimate_masks(images(), limit=0), ValueError, "limit must be at least 1"),
        (lambda: estimate_masks(images().long()), TypeError, "uint8 or floating-point"),
        (lambda: Preconditioner(GAIN.int()), TypeError, "frequency must be a float32"),
        (lambda: Preconditioner(GAIN[0]), ValueError, r"frequency must be \[C or 1, H, W\]"),
        (lambda: Preconditioner(-GAIN), ValueError, "frequency must hold positive finite gains"),
        (lambda: Preconditioner(None, GAIN * 0), ValueError, "pixel must hold positive"),
        (lambda: Preconditioner(GAIN, GAIN[:, :2]), ValueError, r"pixel must be \[C or 1, 4, 4\]"),
        (
            lambda: READY(FLAT, alpha=0.0),
            ValueError,
            "alpha must be above",
        ),
        (lambda: READY(FLAT, alpha="all"), ValueError, 'or "auto"'),
        (lambda: READY(FLAT, alpha="auto"), ValueError, "needs steps"),
        (lambda: READY(FLAT, use_pixels=True), ValueError, "mean_square"),
        (lambda: power_law_masks(1, 0, 4), ValueError, "must be positive"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
