"""Steps, noise, expansion and loss in Haar bands, against their definitions."""

import itertools

import pytest
import torch

from fastdiff.ops import haar_expand, haar_loss, haar_noise, haar_split, haar_step
from fastdiff.ops.haar import haar_expand_ref, haar_loss_ref, haar_normal_ref, haar_step_ref
from tests.helpers.haar import SHAPES, bands, layouts, most, table
from tests.helpers.tensors import FLOATS, normal, wide


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
def test_the_expansion_is_its_definition(dtype, size):
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
