"""The kernels of the spectral moves: compiled where there is a GPU, else under the interpreter."""

import itertools
import math

import pytest
import torch

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

from fastdiff.kernels.spectral_filter import serves  # noqa: E402
from fastdiff.kernels.spectral_update import launch_whole  # noqa: E402
from fastdiff.ops import (  # noqa: E402
    SpectralGains,
    spectral_langevin,
    spectral_predictor,
    spectral_update_ref,
)
from fastdiff.ops.constants import STEPS  # noqa: E402
from fastdiff.ops.half_spectrum import spectral_noise_ref  # noqa: E402
from fastdiff.ops.spectral_filter import PRECISIONS  # noqa: E402
from fastdiff.ops.spectral_operators import mirrored, whole_image_tables  # noqa: E402
from tests.helpers.interpreter import DEVICE, INTERPRETED  # noqa: E402


def gains(channels, size, *, skew=False, pixel=False):
    random = torch.Generator().manual_seed(0)
    values = 1 + torch.rand(channels, *size, generator=random, dtype=torch.float64) / 4
    values = ((values + mirrored(values)) / 2).to(DEVICE)
    odd = torch.randn(channels, *size, generator=random, dtype=torch.float64)
    odd = ((odd - mirrored(odd)) / 4).to(DEVICE)
    a = 1 + torch.rand(channels, *size, generator=random).to(DEVICE) / 4
    return SpectralGains(values, a if pixel else None, odd if skew else None)


def images(shape, dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).to(DEVICE)
            for _ in range(2)]  # fmt: skip


def tables(made):
    drift, rows, columns = whole_image_tables(made.drift.full)
    return drift, whole_image_tables(made.gain.full, less=0.0)[0], rows, columns


@pytest.mark.parametrize("size", [(1, 1), (5, 6), (6, 5), (28, 32), (32, 32), (33, 20), (64, 64)])
def test_whole_images(size):
    shape, seeds = (2, 3, *size), torch.tensor([3, -4], device=DEVICE)
    stage = torch.tensor([6], dtype=torch.int32, device=DEVICE)
    x, score = images(shape)
    z = torch.fft.irfft2(spectral_noise_ref(seeds, torch.Size(shape), 6, torch.float64), s=size)
    rows = [torch.tensor(row, device=DEVICE) for row in ([[0.4, 0.7]], [[-0.3, 0.4], [1.0, 0.2]])]
    for made, row, precision in (
        (gains(3, size), rows[0], "exact"),
        (gains(1, size), rows[1], "fast"),
    ):
        y = torch.full_like(x, math.nan)
        launch_whole(x, y, row, score, *tables(made), seeds, stage, 0, precision, "given")
        wanted = spectral_update_ref(x.double(), score.double(), made, row.double(), z)
        error = (y.double() - wanted).norm() / (wanted - x).norm()
        assert float(error) <= PRECISIONS[precision]
        y = torch.full_like(x, math.nan)
        launch_whole(x, y, row, score, *tables(made), None, None, 0, precision, "given")
        wanted = spectral_update_ref(x.double(), score.double(), made, row.double())
        assert float((y.double() - wanted).norm() / (wanted - x).norm()) <= PRECISIONS[precision]


@pytest.mark.parametrize("norms", STEPS[1:])
@pytest.mark.parametrize("size", [(1, 1), (5, 6), (6, 5), (32, 28), (31, 31)])
def test_adaptive_steps_of_whole_images(size, norms):
    seeds = torch.tensor([3, -4], device=DEVICE)
    x, score = images((2, 3, *size))
    score[1] *= 3
    z = torch.fft.irfft2(spectral_noise_ref(seeds, x.shape, 2, torch.float64), s=size)
    row = torch.tensor([[-0.3, 0.1], [0.5, 0.2]], device=DEVICE)
    for channels in (1, 3):
        made, y = gains(channels, size), torch.full_like(x, math.nan)
        arguments = (score, *tables(made), seeds, None, 2, "exact", norms)
        launch_whole(x, y, row, *arguments)
        wanted = spectral_update_ref(x.double(), score.double(), made, row.double(), z, norms)
        error = (y.double() - wanted).norm() / (wanted - x).norm()
        assert float(error) <= PRECISIONS["exact"]


@pytest.mark.parametrize("norms", STEPS)
@pytest.mark.parametrize("size", [(5, 6), (31, 32)])
def test_whole_images_in_place(size, norms):
    """Each program reads its image before it writes it: the bits of a fresh result."""
    seeds, made = torch.tensor([3, -4], device=DEVICE), gains(3, size)
    row = torch.tensor([[-0.3, 0.1], [0.5, 0.2]], device=DEVICE)
    for dtype, layout in itertools.product(
        (torch.float32, torch.float16), (torch.contiguous_format, torch.channels_last)
    ):
        x, score = (t.contiguous(memory_format=layout) for t in images((2, 3, *size), dtype))
        fresh = torch.full_like(x, math.nan)
        arguments = (row, score, *tables(made), seeds, None, 2, "exact", norms)
        launch_whole(x, fresh, *arguments)
        launch_whole(x, x, *arguments)
        assert torch.equal(x, fresh)


@pytest.mark.skipif(INTERPRETED, reason="no GPU")
@pytest.mark.parametrize("part", ["plain", "pixel", "skew"])
@pytest.mark.parametrize("size", [(32, 32), (64, 64), (128, 96), (31, 257)])
def test_moves_on_a_gpu(size, part):
    made, (x, score) = (
        gains(3, size, pixel=part == "pixel", skew=part == "skew"),
        images((2, 3, *size)),
    )
    row = torch.tensor([[-0.1, 0.4, 0.02]], device=DEVICE)
    whole = serves(*size, torch.cuda.get_device_capability()) and part == "plain"
    assert made.describe(x).startswith("whole" if whole else "transforms")
    seeds = torch.tensor([3, -4], device=DEVICE)
    spectrum = spectral_noise_ref(seeds, x.shape, 5, torch.float64)
    drawn = torch.fft.irfft2(spectrum, s=size)
    for move, norms in ((spectral_predictor, "given"), (spectral_langevin, "sample")):
        cases = [(score, {"noise": score})]
        if part != "pixel":  # whose noise is the one of multistep_step
            cases.append((drawn, {"seeds": seeds, "stage": 5}))
        for z, given in cases:
            wanted = spectral_update_ref(
                x.double(), score.double(), made, row.double(), z.double(), norms
            )
            found = move(x, score, made, row, **given).double()
            assert float((found - wanted).norm() / (wanted - x).norm()) <= 2 * PRECISIONS["exact"]


TIERS = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.skipif(INTERPRETED, reason="tests/ops/test_spectral_update.py holds it on the CPU")
@pytest.mark.parametrize("dtype", TIERS)
@pytest.mark.parametrize("size", [(5, 7), (33, 64), (101, 37)], ids=str)
def test_dtypes_of_the_moves(size, dtype):
    """In one launch and by transforms, noise drawn inside."""
    made, (x, score) = gains(3, size), images((2, 3, *size), dtype)
    seeds = torch.tensor([3, -4], device=DEVICE)
    z = torch.fft.irfft2(spectral_noise_ref(seeds, x.shape, 5, torch.float64), s=size)
    whole = made.describe(x).startswith("whole")
    tier = max(TIERS[dtype], PRECISIONS["exact"]) if whole else TIERS[dtype]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for move, norms, numbers in (
        (spectral_predictor, "given", [0.09, 0.3]),
        (spectral_langevin, "sample", [1.0, 0.05]),
    ):
        row = torch.tensor([numbers], dtype=wide, device=DEVICE)
        wanted = spectral_update_ref(x.double(), score.double(), made, row.double(), z, norms)
        found = move(x, score, made, row, seeds, 5).double()
        assert float((found - wanted).norm() / wanted.norm()) <= tier
