"""The whole-image kernel: compiled where there is a GPU, else under Triton's interpreter."""

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

from fastdiff.kernels.spectral_filter import launch, serves  # noqa: E402
from fastdiff.ops import SpectralResponse, spectral_filter, spectral_filter_ref  # noqa: E402
from fastdiff.ops.spectral_filter import PRECISIONS  # noqa: E402
from fastdiff.ops.spectral_operators import mirrored, whole_image_tables  # noqa: E402
from tests.helpers.interpreter import DEVICE, INTERPRETED  # noqa: E402

EXACT, FAST = 2e-6, 2e-4  # of y, in norm, for responses near one


def case(shape, channels, dtype=torch.float32, gain=False):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)
    values = torch.rand(channels, *shape[2:], generator=generator, dtype=torch.float64)
    values = 1 + values / 4 if gain else values - 0.3
    return x, ((values + mirrored(values)) / 2).to(DEVICE)


def error(x, response, precision, of_change=False):
    """In norm, relative to y or to the change from x."""
    y = torch.full(x.shape, torch.nan, dtype=x.dtype, device=DEVICE)
    launch(x, y, *whole_image_tables(response), precision)
    wanted = spectral_filter_ref(x.double(), response)
    whole = wanted - x if of_change else wanted
    return float((y.double() - wanted).norm() / whole.norm())


SIZES = [(1, 1), (5, 7), (28, 28), (32, 32), (33, 20), (32, 64), (64, 64)]


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size):
    for channels in (1, 3):
        for precision, tier in PRECISIONS.items():
            assert error(*case((2, 3, *size), channels), precision, of_change=True) <= tier
        assert error(*case((2, 3, *size), channels, gain=True), "exact") <= EXACT
        assert error(*case((2, 3, *size), channels, gain=True), "fast") <= FAST


@pytest.mark.parametrize("dtype, rounding", [(torch.float16, 4e-4), (torch.bfloat16, 3e-3)])
def test_half_precision(dtype, rounding):
    if dtype == torch.bfloat16 and INTERPRETED:
        pytest.skip("the interpreter truncates to bfloat16")
    assert error(*case((2, 3, 28, 32), 3, dtype, gain=True), "exact") <= rounding


def test_strides():
    x, response = case((2, 3, 32, 28), 3, gain=True)
    for made in (x.contiguous(memory_format=torch.channels_last),
                 torch.cat([x, x], 1)[:, 3:], x.mT.contiguous().mT):  # fmt: skip
        assert error(made, response, "exact") <= EXACT


def test_what_fits_a_program():
    assert serves(64, 64, (9, 0)) and serves(1, 64, (10, 0)) and not serves(65, 8, (9, 0))
    assert serves(32, 32, (8, 0)) and not serves(33, 32, (8, 9))


def test_nothing_to_do():
    x, response = case((2, 3, 8, 8), 1)
    launch(x[:0], x[:0].clone(), *whole_image_tables(response), "exact")


TIERS = {torch.float64: 1e-12, torch.float32: EXACT, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.skipif(INTERPRETED, reason="tests/ops/test_spectral_filter.py holds it on the CPU")
@pytest.mark.parametrize("dtype", TIERS)
@pytest.mark.parametrize("size", [(5, 7), (33, 64), (101, 37)], ids=str)
def test_dtypes_and_layouts_of_the_op(size, dtype):
    """In one launch and by transforms."""
    x, response = case((2, 3, *size), 3, dtype, gain=True)
    wanted, ready = spectral_filter_ref(x.double(), response), SpectralResponse(response)
    for made in (x, x.contiguous(memory_format=torch.channels_last)):
        for precision, tier in (("exact", TIERS[dtype]), ("fast", max(TIERS[dtype], FAST))):
            found = spectral_filter(made, ready, precision=precision).double()
            assert float((found - wanted).norm() / wanted.norm()) <= tier


@pytest.mark.skipif(INTERPRETED, reason="no GPU")
def test_the_definition_on_a_gpu():
    """Complex transforms in float64, there and here."""
    x, response = case((2, 3, 33, 64), 3, torch.float64, gain=True)
    wanted = spectral_filter_ref(x.cpu(), response.cpu())
    found = spectral_filter_ref(x, response).cpu()
    assert float((found - wanted).norm() / wanted.norm()) <= 1e-14


@pytest.mark.skipif(INTERPRETED, reason="no GPU")
def test_the_op_on_a_gpu():
    for shape in ((4, 3, 32, 32), (4, 3, 64, 64), (2, 3, 128, 96), (1, 1, 257, 31)):
        x, response = case(shape, 3 if shape[1] == 3 else 1, gain=True)
        ready = SpectralResponse(response)
        wanted = spectral_filter_ref(x.double(), response)
        found = spectral_filter(x, ready)
        assert float((found - wanted).norm() / wanted.norm()) <= EXACT
        whole = serves(*shape[2:], torch.cuda.get_device_capability())
        assert ready.describe(x).startswith("whole" if whole else "transforms")
        leaf = x.clone().requires_grad_()
        (spectral_filter(leaf, ready) * x).sum().backward()
        wanted = spectral_filter_ref(x.double(), response)
        assert float((leaf.grad - wanted).norm() / wanted.norm()) <= EXACT
