"""The reference UNet: shapes, times, labels, layouts, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fastdiff.models import UNet, UNetConfig
from fastdiff.models.unet import time_embedding

CONFIG = UNetConfig(channels=2, widths=(16, 24), blocks=1, heads=2, classes=3, dropout=0.5)


def lively(config: UNetConfig = CONFIG) -> UNet:
    """A network whose zero-initialised layers were filled, in float64 and eval mode."""
    torch.manual_seed(0)
    unet = UNet(config)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return unet.double().eval()


def test_begins_at_zero_whatever_goes_in() -> None:
    out = UNet(CONFIG)(torch.randn(2, 2, 8, 8), 5)
    assert out.shape == (2, 2, 8, 8)
    assert not out.any()


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (CONFIG, (6, 10)),
        (UNetConfig(channels=1, widths=(8,), blocks=2, heads=1), (5, 3)),
        (UNetConfig(channels=3, widths=(8, 16, 8), blocks=2, heads=4), (4, 12)),
    ],
)
def test_any_size_the_levels_allow(config: UNetConfig, size: tuple[int, int]) -> None:
    x = torch.randn(3, config.channels, *size, dtype=torch.float64)
    out = lively(config)(x, torch.tensor([0, 3, 999]))
    assert out.shape == x.shape
    assert out.std() > 0


def test_an_image_is_computed_alone() -> None:
    unet, x = lively(), torch.randn(3, 2, 8, 8, dtype=torch.float64)
    t, labels = torch.tensor([-1.0, 7.5, 999.0]), torch.tensor([0, 2, 3])
    together = unet(x, t, labels)
    for i in range(3):
        alone = unet(x[i : i + 1], float(t[i]), labels[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-12)


def test_null_class_is_the_last_label_and_the_default() -> None:
    unet, x = lively(), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    null = unet(x, 10)
    assert torch.equal(null, unet(x, 10, torch.tensor([3, 3])))
    assert not torch.allclose(null, unet(x, 10, torch.tensor([0, 1])))


def test_time_matters_and_only_smoothly() -> None:
    """Fractions of a step change the output, by no more than the shortest period allows."""
    unet, x = lively(), torch.randn(1, 2, 8, 8, dtype=torch.float64)
    at, near, far = unet(x, 500.0), unet(x, 500.001), unet(x, 505.0)
    step, leap = (near - at).abs().max(), (far - at).abs().max()
    assert 0 < step < leap / 100


def test_time_embedding_by_hand() -> None:
    rows = time_embedding(torch.tensor([0.0, 2.5]), 4, (10.0, 40.0))
    quarter_and_sixteenth = [1.0, math.sin(math.pi / 8), 0.0, math.cos(math.pi / 8)]
    expected = torch.tensor([[0.0, 0.0, 1.0, 1.0], quarter_and_sixteenth], dtype=torch.float64)
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-12)


def test_channels_last_gives_the_same_and_keeps_its_layout() -> None:
    unet, x = lively(), torch.randn(2, 2, 8, 8, dtype=torch.float64)
    expected = unet(x, 3)
    out = unet.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last), 3)
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


def test_bfloat16_follows_the_weights() -> None:
    unet = lively()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    out = unet.bfloat16()(x.bfloat16(), torch.tensor([1.0, 900.0]))
    assert out.dtype == torch.bfloat16
    expected = lively()(x, torch.tensor([1.0, 900.0]))
    assert (out - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_dropout_only_while_training() -> None:
    unet, x = lively(), torch.randn(1, 2, 8, 8, dtype=torch.float64)
    assert torch.equal(unet(x, 0), unet(x, 0))
    unet.train()
    assert not torch.equal(unet(x, 0), unet(x, 0))


def test_a_config_survives_json() -> None:
    assert UNetConfig.from_dict(json.loads(json.dumps(CONFIG.to_dict()))) == CONFIG


def test_fits_one_graph() -> None:
    unet, x = lively(), torch.randn(1, 2, 8, 8, dtype=torch.float64)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, torch.tensor([4.0])), unet(x, torch.tensor([4.0])))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: net(torch.zeros(1, 3, 8, 8).double(), 0), r"x must .* \[B, 2, H, W\]"),
        (lambda net: net(torch.zeros(1, 2, 7, 8).double(), 0), "multiples of 2"),
        (lambda net: net(torch.zeros(2, 8, 8).double(), 0), "x must have shape"),
        (lambda net: net(torch.zeros(1, 2, 8, 8).double(), 0, torch.zeros(2).long()), "labels"),
        (lambda net: net(torch.zeros(2, 2, 8, 8).double(), torch.zeros(3)), "t must"),
        (
            lambda net: lively(UNetConfig(widths=(8,), heads=1))(
                torch.zeros(1, 3, 8, 8).double(), 0, torch.zeros(1).long()
            ),
            "no classes",
        ),
        (lambda net: UNetConfig(widths=(12,)), "groups"),
        (lambda net: UNetConfig(widths=(24,), heads=5), "heads"),
    ],
)
def test_says_what_does_not_fit(call, message: str) -> None:  # noqa: ANN001
    with pytest.raises(ValueError, match=message):
        call(lively())
