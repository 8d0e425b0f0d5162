"""Haar pyramids: against their definition, other packages, and themselves."""

import numpy as np
import ptwt
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.published import load_pytorch_wavelets
from fastdiff.ops import HaarPyramid, haar_loss, haar_merge, haar_noise, haar_orders, haar_split
from fastdiff.ops.haar import haar_merge_ref, haar_split_ref
from tests.helpers.haar import SHAPES, bands, layouts, most, table
from tests.helpers.tensors import FLOATS, normal
from tests.helpers.threads import threads

# == The definition ================================================================================


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_split_and_merge_are_their_definition_to_the_bit(shape, dtype):
    for levels in range(most(shape) + 1):
        for _, x in layouts(normal(*shape).to(dtype)):
            pyramid, wanted = haar_split(x, levels), haar_split_ref(x, levels)
            for found, band in zip(bands(pyramid), bands(wanted), strict=True):
                assert found.dtype == dtype and torch.equal(found, band.to(dtype))
            whole = haar_merge(pyramid, shape[2:])
            made = haar_merge_ref(HaarPyramid(pyramid.details, pyramid.coarse), shape[2:])
            assert whole.dtype == dtype and torch.equal(whole, made.to(dtype))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_shape_stride_and_level(data):
    shape = [data.draw(st.integers(1, n)) for n in (3, 4, 40, 70)]
    levels = data.draw(st.integers(0, most(shape)))
    dtype = data.draw(st.sampled_from(FLOATS))
    _, x = data.draw(st.sampled_from(list(layouts(normal(*shape).to(dtype)))))
    pyramid = haar_split(x, levels)
    for found, band in zip(bands(pyramid), bands(haar_split_ref(x, levels)), strict=True):
        assert torch.equal(found, band.to(dtype))
    given_bands = [data.draw(st.sampled_from(list(layouts(b.flatten(1, -3)))))[1].view_as(b)
                   if b.ndim == 4 else b for b in bands(pyramid)]  # fmt: skip
    mixed = HaarPyramid(tuple(given_bands[:-1]), given_bands[-1])
    assert torch.equal(haar_merge(mixed, shape[2:]), haar_merge(pyramid, shape[2:]))
    half = {torch.float16: 4e-3, torch.bfloat16: 3e-2}
    torch.testing.assert_close(
        haar_merge(pyramid, shape[2:]), x, rtol=0, atol=half.get(dtype, 4e-6)
    )


def test_threads_change_no_bit():
    """Of enough work for several, with losses that are summed over tiles."""
    x, seeds = normal(2, 3, 250, 322), torch.tensor([3, 4])
    c = table(2, 3, 2, torch.float32, False)
    found = []
    for count in (1, 3):
        with threads(count):
            pyramid = haar_split(x, 3)
            parts = [*bands(pyramid), haar_merge(pyramid, x.shape[2:])]
            found.append([*parts, haar_noise(x, c, seeds, 1), haar_loss(x, c, seeds, 1)])
    assert all(map(torch.equal, *found))
    for band, wanted in zip(found[1], bands(haar_split_ref(x, 3)), strict=False):
        assert torch.equal(band, wanted)


def test_a_pyramid_knows_its_size():
    x = normal(1, 2, 13, 22)
    pyramid = haar_split(x, 3)
    assert pyramid.size == (13, 22) and haar_merge(pyramid).shape == x.shape
    assert haar_merge(pyramid, (14, 22)).shape == (1, 2, 14, 22)
    assert haar_merge((pyramid.details, pyramid.coarse)).shape == (1, 2, 14, 22)


def test_a_block_is_its_formulas():
    a, b, c, d = 1.0, 2.0, 4.0, 8.0
    pyramid = haar_split(torch.tensor([[a, b], [c, d]]).view(1, 1, 2, 2), 1)
    assert pyramid.coarse.item() == (a + b + c + d) / 2
    v, h, diagonal = pyramid.details[0].flatten().tolist()
    assert v == (a + b - c - d) / 2 and h == (a - b + c - d) / 2 and diagonal == (a - b - c + d) / 2


def test_layouts_of_what_is_made():
    x = normal(2, 3, 32, 48)
    pyramid = haar_split(x, 3)
    assert [tuple(b.shape) for b in bands(pyramid)] == [
        (2, 3, 3, 16, 24), (2, 3, 3, 8, 12), (2, 3, 3, 4, 6), (2, 3, 4, 6)]  # fmt: skip
    assert pyramid.flat.shape == (x.numel(),) and all(b.is_contiguous() for b in bands(pyramid))
    start = pyramid.flat.data_ptr()
    for band in bands(pyramid):  # one after the other
        assert band.data_ptr() == start
        start += 4 * band.numel()
    last = haar_split(x.contiguous(memory_format=torch.channels_last), 3)
    for band in [d.flatten(1, 2) for d in last.details] + [last.coarse]:
        assert band.is_contiguous(memory_format=torch.channels_last)
        assert band.untyped_storage().data_ptr() == last.flat.untyped_storage().data_ptr()
    assert haar_merge(pyramid).is_contiguous()
    assert haar_merge(last).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(haar_merge(last), haar_merge(pyramid))


# == Truths ========================================================================================


@pytest.mark.parametrize("dtype", FLOATS)
def test_dyadic_integers_come_back_to_the_bit(dtype):
    """8-bit images are exact: in float32 for any depth, in half precision while they fit."""
    x = torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(0)).to(dtype)
    levels = {torch.float16: 1, torch.bfloat16: 0}.get(dtype, 5)
    assert torch.equal(haar_merge(haar_split(x, levels)), x)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [(64, 64), (37, 51), (1, 1)])
def test_norms_and_inner_products_are_kept(dtype, size):
    """Norms and inner products are kept, also through odd sides (zeros add nothing)."""
    x, y = (normal(2, 3, *size, seed=s).to(dtype) for s in (0, 1))
    levels = most(x.shape)
    p, q = haar_split(x, levels), haar_split(y, levels)
    inner = sum((a.double() * b.double()).sum() for a, b in zip(bands(p), bands(q), strict=True))
    exact = (x.double() * y.double()).sum()
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float64: 1e-13}.get(dtype, 1e-6)
    scale = x.double().norm() * y.double().norm()
    assert abs(inner - exact) <= tolerance * scale
    assert p.flat.double().norm() == pytest.approx(x.double().norm().item(), rel=tolerance)


def test_a_constant_is_all_in_the_coarse_image():
    pyramid = haar_split(torch.full((1, 1, 32, 32), 0.75), 5)
    assert all(not detail.any() for detail in pyramid.details)
    assert pyramid.coarse.item() == 0.75 * 2**5


def test_nan_stays_in_its_block():
    x = normal(1, 1, 16, 16)
    pyramid = haar_split(x, 2)
    pyramid.details[0][0, 1, 0, 3, 2] = torch.nan
    spoiled = haar_merge(pyramid).isnan()
    assert spoiled.sum() == 4 and spoiled[0, 0, 6:8, 4:6].all()
    x[0, 0, 5, 9] = torch.inf
    found = haar_split(x, 2)
    assert sum(int((~band.isfinite()).sum()) for band in bands(found)) == 3 + 3 + 1


# == Other packages ================================================================================


@pytest.mark.parametrize("size", [(32, 48), (13, 22)])
def test_bands_are_those_of_pywavelets(size):
    x = normal(2, 3, *size, dtype=torch.float64)
    pyramid = haar_split(x, 3)
    theirs = pywt.wavedec2(x.numpy(), "haar", mode="zero", level=3)
    ours = haar_orders.to_pywt(pyramid)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=0, atol=1e-13)
    for found, wanted in zip(ours[1:], theirs[1:], strict=True):
        for a, b in zip(found, wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-13)
    as_tensors = [torch.tensor(theirs[0]), *(tuple(map(torch.tensor, d)) for d in theirs[1:])]
    back = haar_merge(haar_orders.from_pywt(as_tensors), size)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-13)


def test_bands_are_those_of_ptwt():
    x = normal(2, 3, 32, 48, dtype=torch.float64)
    theirs = ptwt.wavedec2(x, "haar", level=3)
    ours = haar_orders.to_pywt(haar_split(x, 3))
    torch.testing.assert_close(ours[0], theirs[0])
    for found, wanted in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(found, tuple(wanted))


@pytest.mark.parametrize("size", [(32, 48), (13, 22)])
def test_bands_are_those_of_pytorch_wavelets(size):
    pytorch_wavelets = load_pytorch_wavelets()
    x = normal(2, 3, *size)
    yl, yh = pytorch_wavelets.DWTForward(J=3, wave="haar", mode="zero")(x)
    low, high = haar_orders.to_pytorch_wavelets(haar_split(x, 3))
    torch.testing.assert_close(low, yl, rtol=0, atol=4e-6)
    for found, wanted in zip(high, yh, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=4e-6)
    back = haar_merge(haar_orders.from_pytorch_wavelets(yl, yh), size)
    torch.testing.assert_close(back, x, rtol=0, atol=4e-6)


def test_msdiff_orders_bands_by_channels():
    """Twelve channels of one level: low, V, H, D with the colours inside, from the formulas."""
    x = normal(2, 3, 8, 8)
    *details, coarse = haar_orders.to_msdiff(haar_split(x, 2))
    assert [tuple(t.shape) for t in (*details, coarse)] == [
        (2, 9, 4, 4),
        (2, 9, 2, 2),
        (2, 3, 2, 2),
    ]
    a, b, c, d = (x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1))
    wanted = torch.cat([a + b - c - d, a - b + c - d, a - b - c + d], 1) / 2
    torch.testing.assert_close(details[0], wanted)
    back = haar_orders.from_msdiff([*details, coarse])
    torch.testing.assert_close(haar_merge(back), x)
