"""The kernels of the passes over half spectra: compiled on a GPU, else under the interpreter."""

import itertools
import math

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

pytestmark = pytest.mark.gpu

from fastdiff.kernels.half_spectrum import adaptive_row, launch_add, launch_combine  # noqa: E402
from fastdiff.ops import SpectralResponse  # noqa: E402
from fastdiff.ops.constants import STEPS  # noqa: E402
from fastdiff.ops.half_spectrum import add_ref, combine_ref, step_row  # noqa: E402
from fastdiff.ops.spectral_operators import mirrored  # noqa: E402
from tests.helpers.interpreter import DEVICE  # noqa: E402

SIZES = [(1, 1), (4, 6), (5, 6), (6, 5), (3, 70), (24, 64), (6, 300)]


def random(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(DEVICE)


def halves(*shape, seed):
    return torch.fft.rfft2(random(*shape, seed=seed))


@pytest.mark.parametrize("size", SIZES)
def test_the_pass_between(size):
    spectrum, given = (halves(2, 2, *size, seed=s) for s in (1, 2))
    response = SpectralResponse(torch.fft.fft2(random(2, *size, seed=3)))
    skew = response.half(torch.float32)
    gain = random(2, *size, seed=4).abs()
    gain = SpectralResponse(gain + mirrored(gain)).half(torch.float32)
    seeds = torch.tensor([3, -4], device=DEVICE)
    row = torch.tensor([[0.4, 1.5], [2.0, 0.01]], device=DEVICE)
    cases = [(skew, None, seeds, 0), (gain, None, seeds, 1), (skew, given, None, 2),
             (gain, given, None, 0), (skew, None, None, 0)]  # fmt: skip
    for drift, noise, drawn, step in cases:
        same(1e-5, size[1], spectrum, drift, gain, row, noise, drawn, None, 9, step)


def same(tier, width, spectrum, *arguments):
    """The kernel and the definition on the same arguments."""
    *tensors, step = arguments
    results = []
    for run in (launch_combine, combine_ref):
        h = tensors[2].new_full((*spectrum.shape[:3], width), math.nan)
        run(spectrum, h, *tensors, STEPS[step])
        results.append(h)
    assert float((results[0] - results[1]).norm() / results[1].norm()) <= tier


@pytest.mark.parametrize("size", [(6, 5), (4, 8)])
def test_what_a_samplers_launches_hand_over(size):
    """One row and one table for all, the stage on the device, float64, nothing but a product."""
    spectrum = torch.fft.rfft2(random(2, 3, *size, dtype=torch.float64))
    gain = random(1, *size, dtype=torch.float64, seed=4).abs()
    gain = SpectralResponse(gain + mirrored(gain)).half(torch.float64)
    row = torch.tensor([[0.4, 0.2]], dtype=torch.float64, device=DEVICE)
    seeds = torch.tensor([3, -4], device=DEVICE)
    stage = torch.tensor([7], dtype=torch.int32, device=DEVICE)
    for step in range(3):
        same(1e-12, size[1], spectrum, gain, gain, row, None, seeds, stage, 0, step)
    same(1e-12, size[1], spectrum, gain, None, row, None, None, None, 0, 0)


def test_a_spectrum_in_another_order_is_refused():
    spectrum, y = halves(3, 2, 4, 6, seed=1).transpose(0, 1), torch.empty(2, 3, 4, 6, device=DEVICE)
    table, row = torch.ones(1, 4, 4, device=DEVICE), torch.ones(1, 2, device=DEVICE)
    with pytest.raises(ValueError, match="spectrum must be contiguous"):
        launch_combine(spectrum, y, table, None, row, None, None, None, 0, "given")
    with pytest.raises(ValueError, match="spectrum must be contiguous"):
        launch_add(spectrum, None, y)


@pytest.mark.parametrize("size", SIZES)
def test_the_last_pass(size):
    spectrum = halves(2, 3, *size, seed=1)
    for dtype, last in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        x = random(2, 3, *size, dtype=dtype, seed=2)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        for state in (x, None):
            results = []
            for run in (launch_add, add_ref):
                y = torch.full_like(x, math.nan)
                run(spectrum, state, y)
                results.append(y)
            torch.testing.assert_close(
                *results, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-5
            )


@pytest.mark.parametrize("size", SIZES)
def test_the_last_pass_in_place(size):
    spectrum = halves(2, 3, *size, seed=1)
    for dtype, last in itertools.product((torch.float32, torch.float16), (False, True)):
        x = random(2, 3, *size, dtype=dtype, seed=2)
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        for run in (launch_add, add_ref):
            fresh, state = torch.full_like(x, math.nan), x.clone()
            run(spectrum, x, fresh)
            run(spectrum, state, state)
            assert torch.equal(state, fresh)


@triton.jit
def _row_kernel(row, squares, to, batch, parts, STEP: tl.constexpr, PARTS: tl.constexpr):
    a, k = tl.load(row), tl.load(row + 1)
    a, c = adaptive_row(a, k, squares, tl.program_id(0), batch, parts, STEP, PARTS)
    tl.store(to + 2 * tl.program_id(0), a)
    tl.store(to + 2 * tl.program_id(0) + 1, c)


@pytest.mark.parametrize(("batch", "parts"), [(5, 1), (3, 5), (600, 1), (130, 3)])
def test_adaptive_steps_of_many_samples(batch, parts):
    """More of them than a tile holds."""
    squares, samples = random(batch, parts, 2, dtype=torch.float64).square(), min(batch, 4)
    for norms in ("sample", "batch"):
        found = torch.empty(samples, 2, dtype=torch.float64, device=DEVICE)
        row = torch.tensor([2, 0.1], dtype=torch.float64, device=DEVICE)
        _row_kernel[(samples,)](
            row, squares, found, batch, parts, norms, triton.next_power_of_2(parts)
        )
        h, root = step_row(squares.sum(1), row[1:], norms).expand(batch, 2)[:samples].T
        torch.testing.assert_close(found, torch.stack([2 * h, root], 1), rtol=1e-6, atol=0)
