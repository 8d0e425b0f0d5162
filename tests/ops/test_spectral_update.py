"""Sampling moves through a preconditioner: against complex transforms, and as distributions."""

import gc
import itertools
import math
import os
import subprocess
import sys
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import _ext
from fastdiff.ops import (
    SpectralGains,
    SpectralResponse,
    multistep_step,
    spectral_langevin,
    spectral_predictor,
    spectral_update_ref,
    spectral_update_unchecked,
)
from fastdiff.ops.constants import STAGE_NOISE, STEPS
from fastdiff.ops.half_spectrum import (
    hartley_ref,
    spectral_move,
    spectral_move_ref,
    spectral_noise_ref,
)
from fastdiff.ops.row import Head, Weights, columns, index
from fastdiff.ops.spectral_operators import mirrored, whole_image_tables
from tests.helpers.threads import threads

TIERS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
SIZES = [(1, 1), (1, 6), (6, 1), (2, 2), (3, 4), (4, 3), (5, 7), (8, 6), (16, 16), (33, 20)]


def gains(channels, height, width, *, pixel=False, skew=False, dtype=torch.float64):
    random = torch.Generator().manual_seed(height + width)
    shape = (channels, height, width)
    values = 1 + torch.rand(shape, generator=random, dtype=torch.float64) / 4
    values = (values + mirrored(values)) / 2
    odd = torch.randn(shape, generator=random, dtype=torch.float64)
    odd = (odd - mirrored(odd)) / 4
    a = 1 + torch.rand(shape, generator=random, dtype=torch.float64) / 4
    return SpectralGains(
        values.to(dtype), a.to(dtype) if pixel else None, odd.to(dtype) if skew else None
    )


def images(shape, dtype=torch.float64, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for _ in range(3)]


def pixels(seeds, shape, stage, made):
    """The noise z that a move with these seeds draws, in space, float64."""
    if made.pixel is not None:
        z = torch.zeros((1, *shape))
        noise = columns(Head(0, 0, 0, 0, 0), [Weights(0, 0, noise=1.0, slots=[0])])
        at = torch.tensor(index(stage, STAGE_NOISE, [0], [0]), dtype=torch.int32)
        multistep_step(z, None, torch.tensor([noise]), at, seeds=seeds, reads=1, writes=1)
        return z[0].double()
    spectrum = spectral_noise_ref(seeds, torch.Size(shape), stage, torch.float64)
    return torch.fft.irfft2(spectrum, s=shape[2:])


def close(found, wanted, tier):
    error = float((found.double() - wanted.double()).norm() / wanted.double().norm())
    assert error <= tier, error


@pytest.mark.parametrize("part", ["plain", "pixel", "skew"])
@pytest.mark.parametrize("size", SIZES)
def test_moves_are_their_definitions(size, part):
    """Both moves, with and without a part of the state, noise given, drawn and absent."""
    shape, seeds = (2, 3, *size), torch.tensor([5, -7])
    made = gains(3, *size, pixel=part == "pixel", skew=part == "skew")
    for dtype, tier in TIERS.items():
        x, score, z = images(shape, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        drawn = pixels(seeds, shape, 3, made)
        rows = (
            torch.tensor([[0.3, 0.5]], dtype=wide),
            torch.tensor([[-0.2, 0.3, 0.5], [0.1, -1.0, 0.02]], dtype=wide),
        )
        for row in rows:
            wanted = spectral_update_ref(x.double(), score.double(), made, row.double(), drawn)
            close(spectral_predictor(x, score, made, row, seeds, 3), wanted, tier)
            wanted = spectral_update_ref(x.double(), score.double(), made, row.double(), z.double())
            close(spectral_predictor(x, score, made, row, noise=z), wanted, tier)
            wanted = spectral_update_ref(x.double(), score.double(), made, row.double())
            close(spectral_predictor(x, score, made, row), wanted, tier)
            for norms, noise in itertools.product(("sample", "batch"), (None, z)):
                given_z = drawn if noise is None else noise
                found = spectral_langevin(
                    x, score, made, row.abs(), seeds if noise is None else None, 3,
                    norms=norms, noise=noise,
                )  # fmt: skip
                wanted = spectral_update_ref(
                    x.double(), score.double(), made, row.abs().double(), given_z.double(), norms
                )
                close(found, wanted, 4 * tier)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_size_layout_and_stride(data):
    batch, channels = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 40))
    shape, seeds = (batch, channels, height, width), torch.arange(batch) - 1
    made = gains(data.draw(st.sampled_from([1, channels])), height, width)
    x, score, _ = images(shape, torch.float32)
    row = torch.tensor([[0.1, 0.7, 0.4]])
    z = pixels(seeds, shape, 0, made)
    wanted = spectral_update_ref(x.double(), score.double(), made, row.double(), z)
    for lay in (
        lambda t: t,
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: torch.cat([t, t], 1)[:, channels:],
        lambda t: t.mT.contiguous().mT,
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        found = spectral_predictor(lay(x), lay(score), made, row, seeds)
        close(found, wanted, 2e-6)
        close(spectral_predictor(lay(x), lay(score), made, row, noise=lay(z)), wanted, 2e-6)
        if lay(x).is_contiguous(memory_format=torch.channels_last):
            assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 4), (4, 5), (3, 7), (16, 12)])
def test_the_noise_is_the_transform_of_white_noise(size):
    """Real in space, and of covariance one: its packed basis is orthonormal."""
    shape = torch.Size((1, 1, *size))
    count = math.prod(size)
    n = (size[1] + 1) // 2 * 2 * size[0]
    rows = []
    for place in range(n):  # the noise of one packed number each, by linearity
        unit = torch.zeros(1, n, dtype=torch.float64)
        unit[0, place] = 1
        with pytest.MonkeyPatch.context() as patch:
            import fastdiff.ops.half_spectrum as module

            patch.setattr(module, "philox_normal_ref", lambda *_, unit=unit: unit)
            spectrum = spectral_noise_ref(torch.tensor([0]), shape, 0, torch.float64)
        image = torch.fft.irfft2(spectrum, s=size)
        full = torch.fft.fft2(image)[..., : size[1] // 2 + 1]
        torch.testing.assert_close(full, spectrum, rtol=0, atol=1e-12)  # it is Hermitian
        rows.append(image.flatten())
    basis = torch.stack(rows)
    torch.testing.assert_close(
        basis.T @ basis, torch.eye(count, dtype=torch.float64), rtol=0, atol=1e-12
    )


def test_noise_spectra_of_the_op():
    """E |F M z|^2 = H W R^2, and no correlation between seeds, stages and channels."""
    made = gains(2, 6, 8)
    zero, count = torch.zeros(4000, 2, 6, 8, dtype=torch.float64), 4000
    row = torch.tensor([[0.0, 1.0]], dtype=torch.float64)
    draws = [
        spectral_predictor(zero, zero, made, row, torch.arange(count), stage) for stage in (0, 1)
    ]
    power = torch.fft.fft2(draws[0]).abs().square().mean(0)
    wanted = 48 * made.gain.full.square()
    assert float((power / wanted - 1).abs().max()) < 6 * math.sqrt(2 / count)
    white = draws[0] / draws[0].std()
    for other in (draws[1], draws[0].roll(1, 0), draws[0].roll(1, 1)):
        correlation = (white * other / other.std()).mean()
        assert abs(float(correlation)) < 5 / math.sqrt(white.numel())


def test_a_move_depends_on_its_own_seed_alone():
    made, (x, score, _) = gains(1, 9, 10), images((3, 2, 9, 10), torch.float32)
    row, seeds = torch.tensor([[0.1, 0.3]]), torch.tensor([4, 2**62, -9])
    for move in (spectral_predictor, spectral_langevin):
        whole = move(x, score, made, row, seeds, 2)
        for i in range(3):
            assert torch.equal(
                move(x[i : i + 1], score[i : i + 1], made, row, seeds[i : i + 1], 2)[0], whole[i]
            )
    # as published, neighbours count
    batch = spectral_langevin(
        x, score * torch.tensor([1.0, 2, 3]).view(3, 1, 1, 1), made, row, seeds, norms="batch"
    )
    alone = spectral_langevin(x[:1], score[:1], made, row, seeds[:1], norms="batch")
    assert not torch.allclose(batch[0], alone[0])


def test_a_stage_may_be_told_on_the_device():
    x, score, _ = images((2, 1, 8, 8), torch.float32)
    for made in (gains(1, 8, 8), gains(1, 8, 8, pixel=True)):
        row, seeds = torch.tensor([[0.1, 0.3]]), torch.tensor([1, 2])
        stage = torch.tensor([11], dtype=torch.int32)
        wanted = spectral_predictor(x, score, made, row, seeds, 11)
        assert torch.equal(spectral_predictor(x, score, made, row, seeds, stage), wanted)
        assert not torch.equal(spectral_predictor(x, score, made, row, seeds, 12), wanted)


def test_nothing_else_is_changed():
    made, (x, score, z) = gains(3, 8, 8), images((2, 3, 8, 8), torch.float32)
    kept = [t.clone() for t in (x, score, z)]
    spectral_langevin(x, score, made, torch.tensor([[1.0, 0.1]]), noise=z)
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, score, z), strict=True))
    nothing = spectral_predictor(
        x[:0], score[:0], made, torch.tensor([[1.0, 0.1]]), torch.zeros(0, dtype=torch.int64)
    )
    assert nothing.shape == (0, 3, 8, 8)


def test_one_score_for_all():
    made, (x, score, z) = gains(3, 6, 5), images((4, 3, 6, 5), torch.float32)
    one, row = score[:1].expand(4, 3, 6, 5), torch.tensor([[0.3, 0.2]])
    found = spectral_predictor(x, one, made, row, noise=z[:1].expand_as(x))
    wanted = spectral_predictor(x, one.contiguous(), made, row, noise=z[:1].repeat(4, 1, 1, 1))
    assert torch.equal(found, wanted)


def test_an_adaptive_step_needs_noise():
    x, half = torch.ones(1, 1, 4, 4), torch.ones(1, 4, 3)
    for run in (spectral_move, spectral_move_ref):
        with pytest.raises((ValueError, RuntimeError), match="an adaptive step needs noise"):
            run(x, x, torch.empty_like(x), half, half, ROW, None, None, None, 0, 1)


def test_nan_stays_in_its_sample():
    made, (x, score, _) = gains(1, 8, 8), images((3, 1, 8, 8), torch.float32)
    score[1, 0, 2, 3] = math.nan
    for move in (spectral_predictor, spectral_langevin):
        found = move(x, score, made, torch.tensor([[1.0, 0.1]]), torch.arange(3))
        assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_the_hartley_spectrum_undoes_itself():
    """Re F h - Im F h = H W y for h = Re F y - Im F y, by whole transforms and from halves."""
    for size in SIZES:
        y = images((2, 3, *size), torch.float64)[0]
        whole = torch.fft.fft2(y)
        h = hartley_ref(torch.fft.rfft2(y), size[1])
        close(h, whole.real - whole.imag, 1e-12)
        close(hartley_ref(torch.fft.rfft2(h), size[1]), math.prod(size) * y, 1e-12)


@pytest.mark.skipif(not _ext.HAS_EXT, reason="no extension")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_move_in_cpp_is_the_definition(dtype):
    for size in SIZES:
        made = gains(3, *size, skew=True, dtype=dtype)
        direction, z, x = images((2, 3, *size), dtype)
        row = torch.tensor([[0.4, 1.5], [2.0, 0.0]], dtype=dtype)
        kinds = [(None, SEEDS, 0), (None, SEEDS, 1), (None, SEEDS, 2), (z, None, 0), (z, None, 2),
                 (None, None, 0)]  # fmt: skip
        for drift, (noise, seeds, step) in itertools.product((made.drift, made.gain), kinds):
            results = []
            for run in (spectral_move, spectral_move_ref):
                y = torch.full_like(x, math.nan)
                run(
                    direction, x, y, drift.half(dtype), made.gain.half(dtype), row, noise, seeds,
                    None, 9, step,
                )  # fmt: skip
                results.append(y)
            close(results[0], results[1], 1e-12 if dtype == torch.float64 else 1e-6)


@pytest.mark.skipif(not _ext.HAS_EXT, reason="no extension")
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_large_moves_in_cpp(step, count):
    """Enough work for several threads, in the passes between and after."""
    made = gains(3, 130, 250, dtype=torch.float32)
    direction, _, x = images((2, 3, 130, 250), torch.float32)
    half, row = made.drift.half(torch.float32), torch.tensor([[0.4, 1.5]])
    found, wanted = torch.full_like(x, math.nan), torch.empty_like(x)
    with threads(count):
        spectral_move(direction, x, found, half, half, row, None, SEEDS, None, 9, step)
    spectral_move_ref(direction, x, wanted, half, half, row, None, SEEDS, None, 9, step)
    close(found, wanted, 1e-6)


@pytest.mark.skipif(not _ext.HAS_EXT, reason="no extension")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_layouts_change_no_bit_in_cpp(dtype):
    """Of the state, and of the result, which need not be the same: bit for bit."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layouts = {
        "contiguous": lambda t: t.clone(),
        "last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "slice": lambda t: torch.cat([t, t], 3)[..., ::2],
        "none": lambda t: None,
    }
    row = torch.tensor([[1.0, 0.0]], dtype=wide)  # so that both multiply once
    for size in SIZES:
        direction, x, _ = images((2, 3, *size), wide)
        half = gains(3, *size, dtype=wide).drift.half(wide)
        for of_x, of_y in itertools.product(layouts, list(layouts)[:3]):
            state, results = layouts[of_x](x.to(dtype)), []
            for run in (spectral_move, spectral_move_ref):
                y = layouts[of_y](torch.full_like(x, math.nan, dtype=dtype))
                run(direction, state, y, half, None, row, None, None, None, 0, 0)
                results.append(y)
            assert torch.equal(*results)


LAYOUTS = {
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norms", STEPS)
def test_a_given_result_may_be_the_state(norms, dtype, layout):
    """The bits of a fresh one, and nothing else is written; drawn noise, given noise and none."""
    lay = LAYOUTS[layout]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for size, part in itertools.product(((5, 7), (8, 6), (16, 70)), ("plain", "pixel", "skew")):
        made = gains(3, *size, pixel=part == "pixel", skew=part == "skew")
        x, score, z = (lay(t) for t in images((2, 3, *size), dtype))
        kinds = [(SEEDS, None), (None, z)] + [(None, None)] * (norms == "given")
        for row, (seeds, noise) in itertools.product(([[0.3, 0.5]], [[-0.2, 0.3, 0.5]]), kinds):
            coefficients = torch.tensor(row, dtype=wide)
            rest = (score, made, coefficients, seeds, None, 3, noise, "exact", norms)
            fresh = spectral_update_unchecked(x, *rest)
            for other in LAYOUTS.values():
                y = other(torch.full_like(x, math.nan))
                assert spectral_update_unchecked(x, *rest, y) is y and torch.equal(y, fresh)
            state = lay(x)
            assert spectral_update_unchecked(state, *rest, state) is state
            assert torch.equal(state, fresh)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_both_moves_in_place(dtype):
    """Those of C++ and of the definition: a slot of an arena, moved where it lies."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    row = torch.tensor([[0.4, 1.5], [2.0, 0.1]], dtype=wide)
    for size, lay in itertools.product(SIZES, LAYOUTS.values()):
        made = gains(3, *size, dtype=wide)
        direction, z, x = images((2, 3, *size), wide)
        half = made.drift.half(wide), made.gain.half(wide)
        for run, (noise, seeds, step) in itertools.product(
            (spectral_move, spectral_move_ref), ((None, SEEDS, 0), (None, SEEDS, 1), (z, None, 2))
        ):
            state = lay(x.to(dtype))
            arena = torch.stack([state, state, state])
            fresh = lay(torch.full_like(state, math.nan))
            run(direction, state, fresh, *half, row, noise, seeds, None, 9, step)
            run(direction, arena[1], arena[1], *half, row, noise, seeds, None, 9, step)
            assert torch.equal(arena[1], fresh)
            assert torch.equal(arena[0], state) and torch.equal(arena[2], state)
            run(direction, arena[1], arena[0], *half, row, noise, seeds, None, 9, step)
            run(direction, fresh, state, *half, row, noise, seeds, None, 9, step)
            assert torch.equal(arena[0], state) and torch.equal(arena[1], fresh)


@pytest.mark.skipif(not _ext.HAS_EXT, reason="no extension")
@pytest.mark.parametrize("target", ["baseline", "avx2"])
def test_every_cpu_target_moves_in_place(target):
    program = """
import torch
from fastdiff.ops import SpectralGains, spectral_update_unchecked
g = torch.Generator().manual_seed(0)
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for size in ((5, 7), (33, 130)):
        for layout in (torch.contiguous_format, torch.channels_last):
            x, score = torch.randn(2, 2, 3, *size, generator=g).to(dtype)
            x = x.contiguous(memory_format=layout)
            row, gains = torch.tensor([[0.3, 0.5]], dtype=wide), SpectralGains(torch.ones(1, *size))
            rest = (score, gains, row, torch.tensor([1, 2]), None, 0, None, "exact", "sample")
            fresh = spectral_update_unchecked(x, *rest)
            assert torch.equal(spectral_update_unchecked(x, *rest, x), fresh)
"""
    env = {**os.environ, "FASTDIFF_CPU_TARGET": target}
    subprocess.run([sys.executable, "-c", program], env=env, check=True)


def test_a_compiled_move_in_place():
    made, (x, score, _) = gains(3, 6, 8, dtype=torch.float32), images((2, 3, 6, 8), torch.float32)
    rest = (score, made, ROW, SEEDS, None, 0, None, "exact", "sample")
    wanted = spectral_update_unchecked(x, *rest)
    for whole in (torch.stack([x, x]), torch.stack([x, torch.full_like(x, math.nan)])):
        move = torch.compile(
            lambda whole: spectral_update_unchecked(whole[0], *rest, whole[1]) + 0,
            fullgraph=True,
            backend="aot_eager",
        )
        assert torch.equal(move(whole), wanted) and torch.equal(whole[1], wanted)
        assert torch.equal(whole[0], x)
    state = x.clone()
    move = torch.compile(
        lambda state: spectral_update_unchecked(state, *rest, state) + 0,
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(move(state), wanted) and torch.equal(state, wanted)


def test_describe_names_the_backend():
    made, x = gains(3, 8, 8), torch.zeros(2, 3, 8, 8)
    assert made.describe(x).startswith("transforms: torch.fft, a pass between and one after")
    assert "around the pixel gain, twice" in gains(3, 8, 8, pixel=True).describe(x)


X = torch.zeros(2, 3, 8, 8)
ROW = torch.tensor([[0.1, 0.2]])
SEEDS = torch.tensor([1, 2])
FLAT = torch.ones(3, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: spectral_predictor(X[0], X, FLAT, ROW, SEEDS), ValueError, r"x must be \[B, C"),
        (lambda: spectral_predictor(X, X[:1], FLAT, ROW, SEEDS), ValueError, "score must have"),
        (lambda: spectral_predictor(X, X.int(), FLAT, ROW, SEEDS), TypeError, "score must be"),
        (lambda: spectral_predictor(X + 0j, X, FLAT, ROW), TypeError, "x must be"),
        (lambda: spectral_predictor(X, X, FLAT[:2], ROW), ValueError, r"gains must be \[3 or 1"),
        (lambda: spectral_predictor(X, X, FLAT[:, :4], ROW), ValueError, "gains must be"),
        (lambda: spectral_predictor(X, X, FLAT.int(), ROW), TypeError, "gains must be"),
        (lambda: spectral_predictor(X, X, FLAT + 0j, ROW), TypeError, "frequency must be real"),
        (lambda: spectral_predictor(X, X, FLAT, ROW[0]), ValueError, "coefficients must have"),
        (lambda: spectral_predictor(X, X, FLAT, ROW.double()), TypeError, "coefficients must be"),
        (lambda: spectral_predictor(X, X, FLAT, ROW, SEEDS[:1]), ValueError, "seeds must have"),
        (lambda: spectral_predictor(X, X, FLAT, ROW, SEEDS, noise=X), ValueError, "got both"),
        (lambda: spectral_predictor(X, X, FLAT, ROW, SEEDS, -1), ValueError, "stage must be"),
        (lambda: spectral_predictor(X, X, FLAT, ROW, precision="low"), ValueError, "precision"),
        (lambda: spectral_langevin(X, X, FLAT, ROW), ValueError, "seeds or noise must be given"),
        (lambda: spectral_langevin(X, X, FLAT, ROW, SEEDS, norms="all"), ValueError, "norms must"),
        (
            lambda: spectral_predictor(X.clone().requires_grad_(), X, FLAT, ROW, SEEDS),
            ValueError,
            "not differentiable",
        ),
        (lambda: SpectralGains(FLAT, FLAT[:2]), ValueError, "agree in channels"),
        (lambda: SpectralGains(FLAT, FLAT[:, :2]), ValueError, "pixel must be"),
        (lambda: SpectralGains(FLAT, None, FLAT), ValueError, "skew must be odd"),
        (lambda: SpectralGains(FLAT, FLAT, 0 * FLAT), ValueError, "skew must come without"),
    ],
)
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_opcheck_and_compile():
    made, (x, score, z) = gains(3, 6, 8, dtype=torch.float32), images((2, 3, 6, 8), torch.float32)
    halves = made.drift.half(torch.float32), made.gain.half(torch.float32)
    for noise, seeds, step in ((z, None, 0), (None, SEEDS, 1), (None, None, 0)):
        arguments = (x, score, z.clone(), ROW, *halves, None, noise, seeds, None, 0, step)
        torch.library.opcheck(torch.ops.fastdiff.spectral_update.default, arguments)
    torch.library.opcheck(
        spectral_move,
        (score, x, torch.empty_like(x), *halves, ROW, None, SEEDS, None, 0, 0),
    )
    move = torch.compile(
        lambda x, score: spectral_predictor(x, score, made, ROW, SEEDS),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.no_grad():
        assert torch.equal(move(x, score), spectral_predictor(x, score, made, ROW, SEEDS))


def test_a_response_is_made_ready_once():
    response = SpectralResponse(FLAT)
    spectral_predictor(X, X, response, ROW)
    made = response.kept["gains"]
    spectral_predictor(X, X, response, ROW)
    assert response.kept["gains"] is made
    assert whole_image_tables(made.gain.full, less=1.0)[0].abs().max() == 0


def test_what_is_kept_with_a_response_goes_with_it():
    response = SpectralResponse(FLAT.clone())
    spectral_predictor(X, X, response, ROW)
    gone = weakref.ref(response)
    del response
    gc.collect()
    assert gone() is None
