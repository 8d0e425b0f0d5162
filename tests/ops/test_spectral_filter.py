"""Frequency responses on images: against complex transforms in float64, and themselves."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import check_capturable
from fastdiff.ops import SpectralResponse, spectral_filter, spectral_filter_ref
from fastdiff.ops.half_spectrum import spectral_product, spectral_product_ref
from fastdiff.ops.spectral_filter import whole_image_ref
from fastdiff.ops.spectral_operators import mirrored, real_basis, whole_image_tables
from tests.helpers.tensors import normal

TIER = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def response(channels, height, width, seed=5, hermitian=False):
    """Real and even, or complex with R(-k) = conj R(k)."""
    values = normal(channels, height, width, seed=seed, dtype=torch.float64)
    if hermitian:
        return torch.fft.fft2(values)
    values = values.abs() + 0.5
    return (values + mirrored(values)) / 2


def off(found, wanted):
    return float(
        (found.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
    )


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_size_layout_and_response(data):
    height, width = (
        data.draw(st.sampled_from([1, 2, 3, 5, 8, 17, 32, 63, 64, 101, 257])) for _ in "hw"
    )
    batch, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    dtype = data.draw(st.sampled_from(list(TIER)))
    x = normal(batch, channels, height, width, dtype=dtype)
    layout = data.draw(
        st.sampled_from(
            ["contiguous", "channels_last", "a slice", "transposed", "channels first", "expanded"]
        )
    )
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "a slice":
        x = torch.cat([x, x], 3)[..., :width]
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "channels first":
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "expanded":
        x = x[:1].expand(batch, -1, -1, -1)
    kept = data.draw(st.sampled_from([1, channels]))
    hermitian = data.draw(st.booleans())
    r = response(kept, height, width, hermitian=hermitian)
    found = spectral_filter(x, SpectralResponse(r))
    assert found.dtype == dtype and found.shape == x.shape and found.is_contiguous()
    assert off(found, spectral_filter_ref(x.double(), r)) <= TIER[dtype]


@pytest.mark.parametrize("side", [128, 256, 512, 1024])
def test_powers_of_two(side):
    x, r = normal(1, 1, side, side), response(1, side, side)
    assert off(spectral_filter(x, r), spectral_filter_ref(x.double(), r)) <= 1e-6


@pytest.mark.parametrize("size", [1, 2, 5, 28, 31, 32, 33, 48, 63, 64])
def test_real_bases_are_orthonormal(size):
    basis = torch.tensor(real_basis(size)).flatten(0, 1)
    torch.testing.assert_close(
        basis.T @ basis, torch.diag((torch.arange(len(basis)) < size).double())
    )


@pytest.mark.parametrize(
    "size", [(1, 1), (2, 3), (5, 7), (28, 28), (32, 64), (33, 20), (63, 64), (64, 64)]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_whole_image_form(size, channels):
    """The tables and products of the kernel, in float64, are the filter."""
    x, r = normal(2, 3, *size, dtype=torch.float64), response(channels, *size)
    tables = [table.double() for table in whole_image_tables(r)]
    assert off(whole_image_ref(x, *tables), spectral_filter_ref(x, r)) <= 1e-7  # of float32 tables


def test_known_responses():
    x = normal(2, 3, 12, 15, dtype=torch.float64)
    torch.testing.assert_close(spectral_filter(x, torch.ones(1, 12, 15)), x)
    mean = torch.zeros(1, 12, 15)
    mean[0, 0, 0] = 1
    torch.testing.assert_close(spectral_filter(x, mean), x.mean((2, 3), keepdim=True).expand_as(x))
    rows, columns = (torch.fft.fftfreq(n, dtype=torch.float64) for n in (12, 15))
    shift = torch.exp(-2j * torch.pi * (2 * rows[:, None] + 3 * columns))[None]
    torch.testing.assert_close(spectral_filter(x, shift), x.roll((2, 3), (2, 3)))


def test_an_odd_multiplier_is_skew():
    """i q(k) with odd q: <x, S x> = 0, and its adjoint is its negative."""
    q = normal(1, 9, 14, dtype=torch.float64)
    skew = 1j * (q - mirrored(q)) / 2
    x, y = (normal(2, 1, 9, 14, seed=s, dtype=torch.float64) for s in (1, 2))
    ready = SpectralResponse(skew)
    assert abs((x * spectral_filter(x, ready)).sum()) < 1e-12
    left, right = (y * spectral_filter(x, ready)).sum(), (spectral_filter(y, ready) * x).sum()
    torch.testing.assert_close(left, -right)


@pytest.mark.parametrize("hermitian", [False, True])
def test_the_adjoint_and_gradcheck(hermitian):
    ready = SpectralResponse(response(2, 4, 5, hermitian=hermitian))
    x = normal(1, 2, 4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: spectral_filter(x, ready), (x,))
    assert torch.autograd.gradcheck(
        lambda x: spectral_filter(x.repeat(3, 1, 1, 1), ready).sum(0).square(), (x,)
    )  # its gradient comes expanded
    assert torch.autograd.gradgradcheck(lambda x: spectral_filter(x, ready), (x,), fast_mode=True)


def test_a_response_that_is_not_symmetric_is_made_so_with_one_warning():
    values = normal(2, 8, 8, dtype=torch.float64)
    x = normal(1, 2, 8, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="response is not point-symmetric"):
        found = spectral_filter(x, values)
    torch.testing.assert_close(found, spectral_filter_ref(x, values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spectral_filter(x, values)
        values.add_(mirrored(values))  # changed in place: read again
        torch.testing.assert_close(spectral_filter(x, values), spectral_filter_ref(x, values))


def test_nan_stays_in_its_image():
    x = normal(3, 2, 8, 8)
    x[1, 0, 2, 3] = torch.nan
    found = spectral_filter(x, response(2, 8, 8))
    assert found[1, 0].isnan().all() and not found[[0, 2]].isnan().any()
    assert not found[1, 1].isnan().any()


def test_pytorchs_machinery():
    ready = SpectralResponse(response(3, 8, 10))
    x = normal(2, 3, 8, 10).requires_grad_()
    half = ready.half(torch.float32)
    ops = torch.ops.fastdiff
    torch.library.opcheck(ops.spectral_filter.default, (x, half, half))
    tables = whole_image_tables(ready.full)
    torch.library.opcheck(ops.spectral_filter_whole.default, (x, *tables, "exact"))
    compiled = torch.compile(
        lambda x: spectral_filter(x, ready), fullgraph=True, backend="aot_eager"
    )
    found = compiled(x)
    torch.testing.assert_close(found, spectral_filter(x, ready))
    found.sum().backward()
    assert check_capturable(ops.spectral_filter.default, x.detach(), half, half) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_product_is_the_definition(dtype):
    """The op beneath, on a table with the scale in it, in any layout."""
    response = SpectralResponse(torch.rand(3, 9, 10, dtype=torch.float64) + 0.5)
    half = response.half(torch.float64 if dtype == torch.float64 else torch.float32)
    last = normal(2, 3, 9, 10).to(dtype).contiguous(memory_format=torch.channels_last)
    for x in (last, last[:, :, 1:].contiguous(), last[:1].expand(2, 3, 9, 10)):
        x = x if x.shape[2] == 9 else torch.cat([x, x[:, :, :1]], 2)
        found, wanted = spectral_product(x, half), spectral_product_ref(x, half)
        assert found.dtype == dtype and found.is_contiguous()
        assert torch.equal(found, wanted)
    torch.library.opcheck(spectral_product, (last, half))
    assert spectral_product(last[:0], half).shape == (0, 3, 9, 10)


def test_empty_batches_and_what_serves():
    ready = SpectralResponse(response(1, 8, 8))
    assert spectral_filter(torch.empty(0, 3, 8, 8), ready).shape == (0, 3, 8, 8)
    assert ready.describe(torch.empty(1, 3, 8, 8)).startswith("transforms: torch.fft, the scale")


X, ONES = torch.zeros(2, 3, 8, 8), torch.ones(1, 8, 8)


@pytest.mark.parametrize(
    ("x", "response", "error", "says"),
    [
        (X[0], ONES, ValueError, r"x must be \[B, C, H, W\], got"),
        (X.cfloat(), ONES, TypeError, "x must be .*complex64"),
        (X, ONES[:, :, :5], ValueError, r"must be \[3 or 1, 8, 8\], got \(1, 8, 5\)"),
        (X, ONES.expand(2, 8, 8), ValueError, r"must be \[3 or 1, 8, 8\], got \(2, 8, 8\)"),
        (X, ONES[0], ValueError, r"response must be \[C or 1, H, W\]"),
        (X, ONES.int(), TypeError, "response must be"),
        (X, ONES * torch.nan, ValueError, "response must be finite"),
        (X, [1.0], TypeError, "response must be a tensor, got list"),
    ],
)
def test_bad_input_is_named(x, response, error, says):
    with pytest.raises(error, match=says):
        spectral_filter(x, response)


def test_a_tier_that_is_none():
    with pytest.raises(ValueError, match="precision must be one of .*got 'half'"):
        spectral_filter(X, ONES, precision="half")
