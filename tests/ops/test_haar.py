"""Haar pyramids: against their definition, other packages, and themselves."""

import itertools
import math

import numpy as np
import ptwt
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.published import load_pytorch_wavelets
from fastdiff import check_capturable
from fastdiff.ops import (
    HaarPyramid,
    haar_expand,
    haar_loss,
    haar_merge,
    haar_noise,
    haar_orders,
    haar_split,
    haar_step,
)
from fastdiff.ops.haar import (
    haar_expand_ref,
    haar_loss_ref,
    haar_merge_ref,
    haar_normal_ref,
    haar_split_ref,
    haar_step_ref,
)
from tests.helpers.threads import threads

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(2, 3, 32, 32), (1, 2, 5, 7), (2, 1, 33, 130), (3, 4, 18, 35), (1, 3, 64, 1100)]


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def most(shape):
    return min(5, math.ceil(math.log2(min(shape[2:]))))


def bands(pyramid):
    return [*pyramid.details, pyramid.coarse]


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def layouts(x):
    """The same numbers in five memory layouts."""
    batch, channels, height, width = x.shape
    room = torch.full((batch, channels + 1, height + 2, width + 3), torch.nan, dtype=x.dtype)
    inside = room[:, 1:, 1:-1, 2:-1]
    yield "contiguous", x.contiguous()
    yield "channels_last", x.contiguous(memory_format=torch.channels_last)
    yield "a slice", inside.copy_(x)
    yield "transposed", x.transpose(2, 3).contiguous().transpose(2, 3)
    yield (
        "every other column",
        torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2],
    )


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


def test_the_block_formulas():
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
def test_orthonormal(dtype, size):
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
def test_pywavelets(size):
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


def test_ptwt():
    x = normal(2, 3, 32, 48, dtype=torch.float64)
    theirs = ptwt.wavedec2(x, "haar", level=3)
    ours = haar_orders.to_pywt(haar_split(x, 3))
    torch.testing.assert_close(ours[0], theirs[0])
    for found, wanted in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(found, tuple(wanted))


@pytest.mark.parametrize("size", [(32, 48), (13, 22)])
def test_pytorch_wavelets(size):
    pytorch_wavelets = load_pytorch_wavelets()
    x = normal(2, 3, *size)
    yl, yh = pytorch_wavelets.DWTForward(J=3, wave="haar", mode="zero")(x)
    low, high = haar_orders.to_pytorch_wavelets(haar_split(x, 3))
    torch.testing.assert_close(low, yl, rtol=0, atol=4e-6)
    for found, wanted in zip(high, yh, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=4e-6)
    back = haar_merge(haar_orders.from_pytorch_wavelets(yl, yh), size)
    torch.testing.assert_close(back, x, rtol=0, atol=4e-6)


def test_msdiff_order():
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


# == Steps, noise and loss =========================================================================


def table(batch, levels, columns, dtype, per_sample=False, seed=5):
    return normal(batch if per_sample else 1, levels + 1, columns, seed=seed, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 1, 1, 6)])
def test_a_step_is_split_update_merge(shape, dtype):
    seeds = torch.arange(shape[0]) * 7 - 3
    for levels, per_sample in itertools.product(range(most(shape) + 1), (False, True)):
        kind = wide(dtype)
        c = table(shape[0], levels, 3, kind, per_sample)
        others = itertools.cycle(FLOATS[1:])
        for (name, x), other in zip(layouts(normal(*shape).to(dtype)), others, strict=False):
            score = normal(*shape, seed=9).to(other)
            found = haar_step(x, score, c, seeds, 4)
            assert torch.equal(found, haar_step_ref(x, score, c, seeds, 4).to(dtype)), name
        assert torch.equal(
            haar_noise(x, c[:, :, :2], seeds, 4),
            haar_step_ref(x, None, c[:, :, :2], seeds, 4).to(dtype),
        )
        assert torch.equal(haar_step(x, score, c), haar_step_ref(x, score, c, None, 0).to(dtype))


def test_the_steps_noise_is_normal_and_each_images_own():
    x = torch.zeros(3, 3, 64, 64)
    c = torch.tensor([[[0.0, 1.0]] * 4])
    z = haar_noise(x, c, torch.tensor([5, 6, 5]), 2)
    assert torch.equal(z[0], z[2]) and not torch.equal(z[0], z[1])
    assert torch.equal(z[1:2], haar_noise(x[:1], c, torch.tensor([6]), 2))
    assert not torch.equal(z, haar_noise(x, c, torch.tensor([5, 6, 5]), 3))
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    split = haar_split(z, 3)
    wanted = haar_normal_ref(torch.tensor([5, 6, 5]), x.shape, 3, 2)
    for found, noise in zip(bands(split), bands(wanted), strict=True):
        torch.testing.assert_close(found, noise, rtol=0, atol=3e-6)
    last = haar_noise(
        x.contiguous(memory_format=torch.channels_last), c, torch.tensor([5, 6, 5]), 2
    )
    assert torch.equal(last, z)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [(32, 48), (31, 48), (7, 9), (1, 1)])
def test_expansion(dtype, size):
    half = [(s + 1) // 2 for s in size]
    coarse, seeds = normal(2, 3, *half).to(dtype), torch.tensor([1, 2])
    for per_sample in (False, True):
        c = normal(2 if per_sample else 1, 2, 2, seed=3, dtype=wide(dtype))
        for _, x in layouts(coarse):
            found = haar_expand(x, c, seeds, 6, size)
            assert torch.equal(found, haar_expand_ref(x, c, seeds, 6, size).to(dtype))
    c = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], dtype=wide(dtype))  # no details: blocks of pixels
    blocks = haar_expand(coarse, c, seeds)
    wanted = (coarse.to(wide(dtype)) / 2).repeat_interleave(2, 2).repeat_interleave(2, 3).to(dtype)
    assert torch.equal(blocks, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_loss_and_its_gradient(shape, dtype):
    """Against autograd of the unfused form."""
    seeds, kind = torch.arange(shape[0]) + 11, wide(dtype)
    for levels, per_sample in itertools.product(range(most(shape) + 1), (False, True)):
        c = table(shape[0], levels, 2, kind, per_sample).abs() + 0.1
        upstream = normal(shape[0], seed=2, dtype=kind)
        for _, prediction in layouts(normal(*shape, seed=8).to(dtype)):
            ours = prediction.detach().requires_grad_()
            plain = prediction.detach().to(kind).requires_grad_()
            found, wanted = haar_loss(ours, c, seeds, 3), haar_loss_ref(plain, c, seeds, 3)
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=0)
            found.backward(upstream)
            wanted.backward(upstream)
            tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}
            tolerance = tolerance.get(dtype, 2e-6)
            error = (ours.grad.to(kind) - plain.grad).abs().max() / plain.grad.abs().max()
            assert ours.grad.dtype == dtype and error <= tolerance


def test_the_loss_knows_the_noise_again():
    """A perfect noise prediction costs nothing; the weights are what they are said to be."""
    x, seeds = normal(2, 3, 32, 32), torch.tensor([3, 4])
    alpha, sigma = torch.tensor([0.9, 0.8, 0.5]), torch.tensor([0.3, 0.6, 0.8])
    noisy = haar_noise(x, torch.stack([alpha, sigma], -1)[None], seeds, 1)
    ones = torch.tensor([[[0.0, 1.0]] * 3])
    noise = haar_noise(x, ones, seeds, 1)  # the same draw alone, in image space
    weights = torch.tensor([[[1.0, -1.0], [2.0, -1.0], [3.0, -1.0]]])
    assert haar_loss(noise, weights, seeds, 1).abs().max() < 1e-6
    off = haar_step(noise, x, torch.tensor([[[1.0, 1.0, 0.0]] * 3]))
    parts = haar_split(x, 2)
    wanted = sum(
        w * b.square().flatten(1).sum(1) for w, b in zip((1, 2, 3), bands(parts), strict=True)
    )
    torch.testing.assert_close(haar_loss(off, weights, seeds, 1), wanted, rtol=1e-5, atol=0)
    clean = haar_split(x, 2)
    for band, source, z, a, s in zip(bands(haar_split(noisy, 2)), bands(clean),
                                     bands(haar_normal_ref(seeds, x.shape, 2, 1)), alpha, sigma,
                                     strict=True):  # fmt: skip
        torch.testing.assert_close(band, a * source + s * z, rtol=0, atol=3e-6)


def test_a_step_and_the_expansion_after_it_draw_apart():
    """Of the same seeds and stage too."""
    seeds, zero = torch.tensor([3]), torch.zeros(1, 1, 16, 16)
    step = haar_split(haar_noise(zero, torch.tensor([[[0.0, 1.0]] * 2]), seeds, 5), 1)
    more = haar_split(haar_expand(zero, torch.tensor([[[0.0, 1.0]] * 2]), seeds, 5), 1)
    drawn = step.flat.round(decimals=4).unique()
    assert torch.isin(more.flat.round(decimals=4).unique(), drawn).float().mean() < 0.1


def test_a_zero_coefficient_hides_its_operand():
    x, nan = normal(1, 2, 8, 8), torch.full((1, 2, 8, 8), torch.nan)
    c = torch.tensor([[[1.0, 0.0, 0.0]] * 3])
    torch.testing.assert_close(haar_step(x, nan, c, torch.tensor([1])), x)
    c = torch.tensor([[[0.0, 1.0, 0.0]] * 3])
    torch.testing.assert_close(haar_step(nan, x, c, torch.tensor([1])), x)
    assert haar_loss(nan, torch.zeros(1, 3, 2), torch.tensor([1])).item() == 0


def test_a_stage_number_may_be_a_tensor():
    x, c, seeds = normal(1, 1, 8, 8), torch.ones(1, 3, 2), torch.tensor([1])
    stage = torch.tensor([9], dtype=torch.int32)
    assert torch.equal(haar_noise(x, c, seeds, stage), haar_noise(x, c, seeds, 9))


def test_a_step_stores_no_pyramid():
    """Nothing is allocated but the result."""
    x, score = normal(8, 3, 64, 64), normal(8, 3, 64, 64, seed=1)
    c, seeds = table(8, 3, 3, torch.float32), torch.arange(8)
    stage = torch.zeros(1, dtype=torch.int32)
    haar_step(x, score, c, seeds, stage)
    with torch.profiler.profile(profile_memory=True) as profile:
        haar_step(x, score, c, seeds, stage)
    made = sum(
        e.self_cpu_memory_usage for e in profile.key_averages() if e.self_cpu_memory_usage > 0
    )
    assert made == x.nbytes


# == PyTorch's machinery ===========================================================================


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_gradcheck(size):
    x = normal(2, 2, *size, dtype=torch.float64).requires_grad_()
    split = lambda x: tuple(bands(haar_split(x, 2)))
    assert torch.autograd.gradcheck(split, (x,))
    assert torch.autograd.gradgradcheck(split, (x,))
    *details, coarse = (b.detach().clone().requires_grad_() for b in split(x))
    merge = lambda *b: haar_merge(HaarPyramid(b[:-1], b[-1]), size)
    assert torch.autograd.gradcheck(merge, (*details, coarse))
    assert torch.autograd.gradgradcheck(merge, (*details, coarse))
    c = normal(2, 3, 2, dtype=torch.float64)
    loss = lambda p: haar_loss(p, c, torch.tensor([1, 2]))
    assert torch.autograd.gradcheck(loss, (x,)) and torch.autograd.gradgradcheck(loss, (x,))


@pytest.mark.parametrize("last", [False, True])
def test_opcheck(last):
    ops = torch.ops.fastdiff
    x = normal(2, 3, 9, 12)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    pyramid = haar_split(x, 2)
    c3, c2 = table(2, 2, 3, torch.float32), table(2, 2, 2, torch.float32, per_sample=True)
    seeds, stage = torch.arange(2), torch.tensor([1], dtype=torch.int32)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    details = [d.detach().clone().requires_grad_() for d in pyramid.details]
    for operator, arguments in (
        (ops.haar_split, (leaf, 2, last)),
        (ops.haar_merge, (details, pyramid.coarse.detach(), 9, 12, last)),
        (ops.haar_step, (x, x, c3, seeds, stage, 0, 2, last)),
        (ops.haar_step, (x, None, c2, None, None, 3, 2, last)),
        (ops.haar_expand, (x, c2[:, :2].contiguous(), seeds, stage, 0, 18, 23, last)),
        (ops.haar_loss, (leaf, c2, seeds, None, 1, 2)),
        (ops.haar_loss_gradient, (leaf, c2, seeds, stage, 0, torch.ones(2), 2, last)),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_compiled_for_any_size():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    both = lambda x: haar_merge(haar_split(x, 2))
    compiled = torch.compile(both, fullgraph=True, backend="eager", dynamic=True)
    for size in ((9, 12), (10, 20), (33, 7), (16, 16)):
        x = normal(2, 3, *size)
        assert torch.equal(compiled(x), both(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_gradients_of_some_bands():
    """None for the others; also where the layout is channels_last."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = normal(2, 3, 12, 16).contiguous(memory_format=layout).requires_grad_()
        haar_split(x, 2).details[1].square().sum().backward()
        wanted = haar_split_ref(x.detach(), 2)
        only = [torch.zeros_like(wanted.details[0]), 2 * wanted.details[1]]
        expected = haar_merge_ref(HaarPyramid(tuple(only), wanted.coarse * 0), (12, 16))
        torch.testing.assert_close(x.grad, expected)


def test_compiled_without_a_graph_break():
    c, seeds = table(2, 2, 2, torch.float32), torch.arange(2)
    stage = torch.zeros(1, dtype=torch.int32)

    def body(x):
        pyramid = haar_split(x, 2)
        scaled = HaarPyramid(tuple(2 * d for d in pyramid.details), pyramid.coarse)
        return haar_loss(haar_merge(scaled, x.shape[2:]), c, seeds, stage).sum()

    x, y = normal(2, 3, 9, 12).requires_grad_(), normal(2, 3, 9, 12).requires_grad_()
    found, wanted = torch.compile(body, fullgraph=True, backend="aot_eager")(x), body(y)
    torch.testing.assert_close(found, wanted)
    found.backward()
    wanted.backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_nothing_a_graph_cannot_hold():
    def body(x, c, seeds, stage):
        noisy = haar_noise(haar_merge(haar_split(x, 2), x.shape[2:]), c, seeds, stage)
        finer = haar_expand(noisy, c[:, :2].contiguous(), seeds, stage)
        return haar_step(noisy, x, c.repeat(1, 1, 2)[:, :, :3].contiguous(), seeds, 3), finer, (
            haar_loss(noisy, c, seeds, stage)
        )  # fmt: skip

    stage = torch.zeros(1, dtype=torch.int32)
    given = (normal(2, 3, 9, 12), table(2, 2, 2, torch.float32), torch.arange(2), stage)
    assert check_capturable(body, *given) == []


# The same launches in a process that lacks the extension, or an instruction set.
LAUNCHES = """
import hashlib, sys, torch
{setup}
from fastdiff import _ext
from fastdiff.ops import haar_expand, haar_merge, haar_noise, haar_split, haar_step
g = torch.Generator().manual_seed(1)
digest = hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, 3, 37, 150, generator=g).to(dtype)
    c, seeds = torch.randn(2, 4, 3, generator=g).to(wide), torch.tensor([1, -7])
    pyramid = haar_split(x, 3)
    two = c[:, :2, :2].contiguous()
    for made in (pyramid.flat, haar_merge(pyramid, (37, 150)), haar_step(x, x, c, seeds, 2),
                 haar_noise(x, two, seeds), haar_expand(x, two, seeds)):
        digest.update(made.contiguous().view(torch.uint8).numpy().tobytes())
print(_ext.build_info().get("cpu_target", "reference"), digest.hexdigest())
"""


def test_every_cpu_target_and_the_reference_agree(same_everywhere):
    same_everywhere(LAUNCHES)


def test_more_elements_than_32_bits_count():
    x = torch.empty(3, 3, 20000, 20001, dtype=torch.float16, device="meta")
    pyramid = haar_split(x, 3)
    assert x.numel() > 2**31 and pyramid.flat.numel() > x.numel()
    assert haar_merge(pyramid, (20000, 20001)).shape == x.shape
    assert haar_merge(pyramid[:2]).shape == (3, 3, 20000, 20002)


def test_empty_batches():
    for shape in ((0, 3, 8, 8), (2, 0, 8, 8)):
        pyramid = haar_split(torch.empty(shape), 2)
        assert haar_merge(pyramid).shape == shape and pyramid.flat.numel() == 0
        seeds = torch.arange(shape[0])
        assert haar_step(torch.empty(shape), None, torch.ones(1, 3, 2), seeds).shape == shape
        assert haar_loss(torch.empty(shape), torch.ones(1, 3, 2), seeds).tolist() == [0] * shape[0]


# == Bad input =====================================================================================

NOT_A_SIZE = r"size must be \(8, 8\).*or one less in a side, got "
X, SEED = torch.zeros(1, 3, 8, 8), torch.tensor([1])
PYRAMID = haar_split_ref(X, 2)
FINE, COARSE = PYRAMID.details, PYRAMID.coarse
ONES2, ONES3 = torch.ones(1, 2, 2), torch.ones(1, 2, 3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: haar_split(X, 4), ValueError, r"levels must be at most 3.*\(8, 8\).*got 4"),
        (lambda: haar_split(X, 6), ValueError, "levels must be 0 to 5, got 6"),
        (lambda: haar_split(X, -1), ValueError, "levels must be 0 to 5, got -1"),
        (lambda: haar_split(X[0], 1), ValueError, r"x must be \[B, C, H, W\], got shape"),
        (lambda: haar_split(X.int(), 1), TypeError, "x must be torch.float64.*got torch.int32"),
        (lambda: haar_split(X.cfloat(), 1), TypeError, "x must be .*got torch.complex64"),
        (lambda: haar_split([1.0], 1), TypeError, "x must be a tensor, got list"),
        (lambda: haar_split(X[:, :, :1], 1), ValueError, "levels must be at most 0"),
        (lambda: haar_merge(PYRAMID, (9, 8)), ValueError, NOT_A_SIZE + r"\(9, 8\)"),
        (lambda: haar_merge(PYRAMID, (6, 8)), ValueError, NOT_A_SIZE + r"\(6, 8\)"),
        (lambda: haar_merge((FINE[:1], COARSE)), ValueError, r"details\[0\] must have"),
        (lambda: haar_merge((FINE[::-1], COARSE)), ValueError, r"details\[1\] must have"),
        (lambda: haar_merge(([d.double() for d in FINE], COARSE)), TypeError,
         r"details\[1\] must be torch.float32, got torch.float64"),
        (lambda: haar_step(X, X[:, :2], ONES3), ValueError, "score must have the shape"),
        (lambda: haar_step(X, X, ONES2), ValueError, r"levels \+ 1, 3\), got"),
        (lambda: haar_step(X, None, ONES3), ValueError, r"levels \+ 1, 2\), got"),
        (lambda: haar_step(X, None, torch.ones(2, 2, 2)), ValueError, r"\(1 or 1, levels \+ 1, 2"),
        (lambda: haar_step(X, None, torch.ones(1, 6, 2)), ValueError, "levels must be at most 3"),
        (lambda: haar_step(X, X, ONES3.double()), TypeError, "coefficients must be torch.float32"),
        (lambda: haar_noise(X, ONES2, None), TypeError, "seeds must be a tensor"),
        (lambda: haar_noise(X, ONES2, SEED.int()), TypeError, "seeds must be torch.int64"),
        (lambda: haar_noise(X, ONES2, torch.arange(2)), ValueError, "seeds must have the shape"),
        (lambda: haar_noise(X, ONES2, SEED, torch.ones(1)), TypeError, "stage must be"),
        (lambda: haar_noise(X, ONES2, SEED, -1), ValueError, "stage must be 0 to"),
        (lambda: haar_noise(X, ONES2, SEED, 1.5), TypeError, "stage must be a tensor, got float"),
        (lambda: haar_expand(X, torch.ones(1, 3, 2), SEED), ValueError, r"\(1 or 1, 2, 2\)"),
        (lambda: haar_expand(X, ONES2, SEED, 0, (14, 16)), ValueError, "size must be"),
        (lambda: haar_step(X.clone().requires_grad_(), None, ONES2), ValueError,
         "haar_step is not differentiable"),
        (lambda: haar_loss(X, ONES2.clone().requires_grad_(), SEED), ValueError,
         "not differentiable in its coefficients"),
    ],
)  # fmt: skip
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()
