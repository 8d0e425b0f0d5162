"""The eager sampler: what it promises about noise, layouts, guidance, callbacks and bad input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastdiff
from fastdiff import NoiseSchedule, Sampler, build_tableau, seeded_noise, solver_names
from tests.helpers.oracles import ODE_SOLVERS, Gaussian

LINEAR = NoiseSchedule.linear_beta()
GAUSSIAN = Gaussian()


def network(x: Tensor, t: Tensor) -> Tensor:
    """Additions and products only: the same bits wherever a sample stands in its batch."""
    return 0.3 * x + (t.view(-1, *[1] * (x.ndim - 1)) * 1e-4).to(x.dtype)


def gaussian(x: Tensor, t: Tensor) -> Tensor:
    return GAUSSIAN.epsilon(x, *(f(float(t[0])) for f in (LINEAR.alpha, LINEAR.sigma)))


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).standard_normal(shape)).to(dtype)


# == Noise and seeds ===============================================================================


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=5),
    shape=st.sampled_from([(1,), (3, 5), (2, 3, 3), (1, 2, 2, 3)]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_an_image_depends_on_its_own_seed_alone(
    seeds: list[int], shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Bit for bit, initial noise and the noise on the way, whatever the batch around it."""
    sampler = Sampler(network, LINEAR, solver="ddim", steps=3, eta=1.0, dtype=dtype)
    together = sampler(seeds=seeds, shape=shape)
    assert together.shape == (len(seeds), *shape) and together.dtype == dtype
    for i, seed in enumerate(seeds):
        assert torch.equal(sampler(seeds=[seed], shape=shape)[0], together[i])
    backwards = sampler(seeds=torch.tensor(seeds[::-1]), shape=shape)
    assert torch.equal(backwards.flip(0), together)


def test_seeds_draw_the_documented_noise() -> None:
    sampler = Sampler(network, LINEAR, solver="ddim", steps=4)
    drawn = sampler(seeds=[5, 6], shape=(3, 4))
    assert torch.equal(drawn, sampler(seeded_noise([5, 6], (2, 3, 4))))
    assert torch.equal(drawn[:1], sampler(seeds=5, shape=(3, 4)))
    # With noise given, seeds still drive what a stochastic solver adds.
    stochastic = Sampler(network, LINEAR, solver="ddim", steps=4, eta=0.7)
    x = noise(2, 3, 4)
    runs = [stochastic(x, seeds=seeds) for seeds in ([1, 2], [1, 2], [1, 3])]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0][0], runs[2][0]) and not torch.equal(runs[0][1], runs[2][1])


def test_without_seeds_torch_s_generator_decides() -> None:
    sampler = Sampler(network, LINEAR, solver="ddim", steps=4, eta=1.0)
    x = noise(2, 8)
    torch.manual_seed(3)
    first, second = sampler(x), sampler(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(sampler(x), first)
    # A deterministic solver does not touch the generator.
    state = torch.get_rng_state()
    Sampler(network, LINEAR, steps=4)(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_given_noise_of_the_stages() -> None:
    """DDIM at eta = 1, composed by hand from the noise handed in."""
    z = noise(2, 3, 5, dtype=torch.float64)
    sampler = Sampler(
        gaussian, LINEAR, solver="ddim", spacing=[900, 600, 300, -1], eta=1.0, dtype=torch.float64
    )
    x = noise(3, 5, dtype=torch.float64)
    result = sampler(x, stage_noise=iter(z))
    for (t, u), fresh in zip([(900, 600), (600, 300), (300, -1)], [*z, 0.0], strict=True):
        a, s, b, r = LINEAR.alpha(t), LINEAR.sigma(t), LINEAR.alpha(u), LINEAR.sigma(u)
        e = GAUSSIAN.epsilon(x, a, s)
        # q(x_u | x_t, x0): its mean from x0 and x_t, its variance from the two noise levels.
        between = s**2 - (a / b) ** 2 * r**2
        x0 = (x - s * e) / a
        mean = a / b * r**2 / s**2 * x + b * between / s**2 * x0
        x = mean + math.sqrt(between) * r / s * fresh
    torch.testing.assert_close(result, x, rtol=1e-10, atol=1e-10)


# == What belongs to the caller ====================================================================


def test_the_caller_s_tensors_are_left_alone_and_results_are_the_caller_s() -> None:
    for dtype in (torch.float32, torch.float64):
        sampler = Sampler(network, LINEAR, steps=3, dtype=dtype)
        x = noise(2, 4, dtype=dtype)
        before = x.clone()
        first = sampler(x)
        kept = first.clone()
        second = sampler(x + 1)
        assert torch.equal(x, before) and torch.equal(first, kept)
        first.zero_()
        assert torch.equal(sampler(x + 1), second)
        assert first.untyped_storage().nbytes() == first.nbytes  # not a view of all buffers
    assert not torch.is_grad_enabled() or not Sampler(network, LINEAR, steps=2)(x).requires_grad


def test_a_run_without_gradients_even_for_a_network_that_trains() -> None:
    module = nn.Linear(4, 4)
    result = Sampler(lambda x, t: module(x), LINEAR, steps=3)(noise(2, 4))
    assert not result.requires_grad and module.weight.grad is None


# == Shapes, layouts and dtypes ====================================================================


@pytest.mark.parametrize("solver", solver_names())
@pytest.mark.parametrize(
    "shape", [(3,), (3, 7), (2, 2, 9), (2, 3, 4, 5), (2, 2, 3, 4, 5)], ids=lambda s: f"rank{len(s)}"
)
def test_samples_of_any_rank(solver: str, shape: tuple[int, ...]) -> None:
    """Scalars, vectors, audio, images and video are the same numbers in another shape."""
    sampler = Sampler(network, LINEAR, solver=solver, steps=4)
    x, seeds = noise(*shape), range(shape[0])
    result = sampler(x, seeds=seeds)
    assert result.shape == x.shape
    assert torch.equal(result.reshape(len(x), -1), sampler(x.reshape(len(x), -1), seeds=seeds))


@pytest.mark.parametrize("solver", ["ddim", "f_pndm", "unipc"])
def test_channels_last(solver: str) -> None:
    """The layout is kept through the network and to the result; the numbers do not change."""
    for x, layout in (
        (noise(2, 3, 4, 5), torch.channels_last),
        (noise(2, 3, 2, 4, 5), torch.channels_last_3d),
    ):
        strides = []

        def spy(x: Tensor, t: Tensor, strides: list[Any] = strides) -> Tensor:
            strides.append(x.stride())
            return network(x, t)

        sampler = Sampler(spy, LINEAR, solver=solver, steps=3)
        plain, last = sampler(x), sampler(x.contiguous(memory_format=layout))
        assert torch.equal(plain, last)
        assert plain.is_contiguous() and last.is_contiguous(memory_format=layout)
        assert set(strides) == {plain.stride(), last.stride()}
        assert sampler.describe()["routed"] == {}


def test_noise_and_outputs_of_any_strides() -> None:
    x = noise(4, 5, 3)
    sampler = Sampler(lambda x, t: network(x, t).mT.contiguous().mT, LINEAR, steps=3)
    assert torch.equal(sampler(x.mT.contiguous().mT), Sampler(network, LINEAR, steps=3)(x))
    assert sampler.describe()["routed"] == {
        "network output copied into the state's memory layout": 3
    }
    sliced = noise(4, 5, 6)[..., ::2]
    assert torch.equal(
        Sampler(network, LINEAR, steps=3)(sliced),
        Sampler(network, LINEAR, steps=3)(sliced.contiguous()),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_networks(dtype: torch.dtype) -> None:
    """The state stays float32; what the network sees is the state, cast."""

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.3, dtype=dtype))
            self.seen: list[Tensor] = []

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            assert x.dtype == dtype and t.dtype == torch.float32
            self.seen.append(x.clone())
            return self.scale * x

    module, states = Half(), []
    sampler = Sampler(module, LINEAR, solver="ipndm", steps=5)
    x = noise(2, 3, 4)
    result = sampler(x, callback=lambda p: states.append(p.state.clone()))
    assert result.dtype == torch.float32
    assert torch.equal(module.seen[0], x.to(dtype))
    for seen, state in zip(module.seen[1:], states, strict=False):
        assert torch.equal(seen, state.to(dtype))
    exact = Sampler(lambda x, t: module.scale.float() * x, LINEAR, solver="ipndm", steps=5)(x)
    eps = torch.finfo(dtype).eps
    assert (result - exact).abs().max() < 50 * eps * exact.abs().max()
    # A plain function is fed what the noise is.
    dtypes = []
    plain = Sampler(lambda x, t: dtypes.append(x.dtype) or x, LINEAR, steps=2)
    assert plain(x.to(dtype)).dtype == torch.float32 and set(dtypes) == {dtype}


def test_float64_runs_are_float64_throughout() -> None:
    dtypes = set()

    def spy(x: Tensor, t: Tensor) -> Tensor:
        dtypes.update((x.dtype, t.dtype))
        return gaussian(x, t)

    x = noise(2, 3, dtype=torch.float64)
    wide = Sampler(spy, LINEAR, solver="f_pndm", steps=8, dtype=torch.float64)(x)
    assert dtypes == {torch.float64} and wide.dtype == torch.float64
    narrow = Sampler(gaussian, LINEAR, solver="f_pndm", steps=8)(x)
    assert narrow.dtype == torch.float32
    assert 1e-9 < (wide - narrow).abs().max() < 2e-5


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0,)])
@pytest.mark.parametrize("settings_", [{}, {"guidance_scale": 2.0}])
def test_empty_batches(shape: tuple[int, ...], settings_: dict[str, Any]) -> None:
    sampler = Sampler(network, LINEAR, solver="ddim", steps=3, eta=1.0)
    assert sampler(torch.empty(shape), **settings_).shape == shape
    assert sampler(seeds=[], shape=shape[1:]).shape == (0, *shape[1:])


# == What the network is given =====================================================================


def test_times_and_conditioning_reach_the_network() -> None:
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def spy(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        calls.append((t.clone(), conditioning))
        return x

    labels = torch.tensor([4, 5])
    Sampler(spy, LINEAR, solver="ddim", spacing=[900, 450.5, -1])(
        noise(2, 3), labels=labels, name="a"
    )
    assert [t.tolist() for t, _ in calls] == [[900.0, 900.0], [450.5, 450.5]]
    assert all(c["labels"] is labels and c["name"] == "a" for _, c in calls)


def test_what_the_network_sees_is_scaled() -> None:
    """c_in of a preconditioned network, and sigma_max at the start of a VE schedule."""
    kind = fastdiff.Prediction(
        "scaled",
        lambda a, s: (1.0, 0.0),
        lambda a, s: (-a / s, 1 / s),
        input_scale=lambda a, s: 1 / (1 + s),
    )
    seen = []
    sampler = Sampler(
        lambda x, t: seen.append(x.clone()) or 0 * x,
        NoiseSchedule.edm(),
        solver="ddim",
        spacing=[80.0, 2.0, 0.0],
        prediction=kind,
    )
    x = noise(2, 3)
    assert torch.equal(sampler(x), torch.zeros(2, 3))
    torch.testing.assert_close(seen[0], 80 * x / 81)
    torch.testing.assert_close(seen[1], 2 * x / 3)  # x0 = 0: the state is sigma times the noise


# == Guidance ======================================================================================


def conditional(x: Tensor, t: Tensor, *, shift: Tensor, label: Tensor) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 1))
    return torch.sin(x + t.view(shape) / 500 + shift.view(shape)) * (1 + 0.1 * label.view(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["ddim", "f_pndm", "unipc"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5, torch.tensor(2.5), torch.tensor([0.0, 3.0, 9.0])])
def test_guidance_equals_its_formula(
    scale: float | Tensor, solver: str, dtype: torch.dtype
) -> None:
    """One call on the doubled batch = uncond + scale (cond - uncond) of two calls."""
    given_ = {"shift": torch.tensor([0.1, 0.4, 0.9]), "label": torch.tensor([1, 2, 3])}
    null = {"label": torch.tensor([0])}
    counts = []

    def spy(x: Tensor, t: Tensor, **conditioning: Tensor) -> Tensor:
        counts.append((len(x), len(t)))
        return conditional(x, t, **conditioning)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        cond = conditional(x, t, **given_)
        uncond = conditional(x, t, **{**given_, "label": null["label"].expand(3)})
        weight = torch.as_tensor(scale, dtype=x.dtype).view(-1, 1, 1)
        return uncond + weight * (cond - uncond)

    x = noise(3, 2, 4, dtype=dtype)
    fused = Sampler(spy, LINEAR, solver=solver, steps=5, dtype=dtype)(
        x, guidance_scale=scale, uncond=null, **given_
    )
    assert set(counts) == {(6, 6)}
    expected = Sampler(guided, LINEAR, solver=solver, steps=5, dtype=dtype)(x)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(fused, expected, rtol=tolerance, atol=tolerance)


# == Predictions at run time =======================================================================


def test_both_is_merged_and_learned_variance_dropped() -> None:
    x = noise(2, 3, 4, 4, dtype=torch.float64)

    def both(x: Tensor, t: Tensor) -> Tensor:
        e = gaussian(x, t)
        x0 = (x - LINEAR.sigma(float(t[0])) * e) / LINEAR.alpha(float(t[0]))
        return torch.cat([x0, e], dim=1)

    run = {"solver": "dpmpp_2m", "steps": 6, "spacing": "leading", "dtype": torch.float64}
    expected = Sampler(gaussian, LINEAR, **run)(x)
    sampler = Sampler(both, LINEAR, prediction="both", **run)
    torch.testing.assert_close(sampler(x), expected, rtol=1e-11, atol=1e-11)
    guided = sampler(x, guidance_scale=3.0)  # cond = uncond here
    torch.testing.assert_close(guided, expected, rtol=1e-11, atol=1e-11)
    assert list(sampler.describe()["routed"].values()) == [12]

    def variance(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([gaussian(x, t), torch.full_like(x, torch.inf)], dim=1)

    for layout in (torch.contiguous_format, torch.channels_last):
        y = x.contiguous(memory_format=layout)
        assert torch.equal(Sampler(variance, LINEAR, **run)(y), expected)


def test_per_sample_eta() -> None:
    """Each sample runs as if the whole batch had its eta."""
    eta = np.array([0.0, 0.4, 1.0])
    x, z = noise(3, 2, 4), noise(5, 3, 2, 4)
    for kind in ("epsilon", "v_prediction"):
        run = {"solver": "ddim", "steps": 6, "prediction": kind, "clip": 1.0}
        mixed = Sampler(network, LINEAR, eta=eta, **run)(x, stage_noise=z)
        for i, each in enumerate(eta):
            alone = Sampler(network, LINEAR, eta=float(each), **run)(
                x, stage_noise=z if each else None
            )
            torch.testing.assert_close(mixed[i], alone[i], rtol=1e-6, atol=1e-6)


# == Image to image ================================================================================


@pytest.mark.parametrize("solver", ODE_SOLVERS)
@pytest.mark.parametrize("start", [180.0, 700.0])
def test_restart_from_an_image(solver: str, start: float) -> None:
    """alpha image + sigma noise, followed along the exact flow of the Gaussian to its end."""
    image, x = noise(2, 4, 3, dtype=torch.float64)
    sampler = Sampler(
        gaussian,
        LINEAR,
        solver=solver,
        steps=60,
        start=start,
        spacing="trailing",
        from_image=True,
        dtype=torch.float64,
    )
    assert sampler.tableau.times[0] == start
    result = sampler(x, image=image)
    level = LINEAR.alpha(start), LINEAR.sigma(start)
    exact = GAUSSIAN.flow(level[0] * image + level[1] * x, level, (1.0, 0.0))
    limit = 0.06 if solver in ("ddim", "euler") else 0.012
    assert (result - exact).abs().max() < limit
    # The seeds' noise, and an image of another dtype.
    drawn = sampler(seeds=[1, 2, 3, 4], shape=(3,), image=image.float())
    assert drawn.shape == image.shape and drawn.isfinite().all()


def test_an_image_is_given_exactly_where_it_is_asked_for() -> None:
    x = noise(2, 3)
    with pytest.raises(ValueError, match="image must be given exactly where"):
        Sampler(network, LINEAR, steps=3, start=500, from_image=True)(x)
    with pytest.raises(ValueError, match="image must be given exactly where"):
        Sampler(network, LINEAR, steps=3)(x, image=x)
    with pytest.raises(ValueError, match=r"image must be \(2, 3\) on cpu; got \(3, 2\)"):
        Sampler(network, LINEAR, steps=3, from_image=True)(x, image=noise(3, 2))
    with pytest.raises(ValueError, match=r"image must be \(2, 3\) on cpu; got .* on meta"):
        Sampler(network, LINEAR, steps=3, from_image=True)(x, image=x.to("meta"))


# == Callback and progress =========================================================================


def test_callback() -> None:
    sampler = Sampler(network, LINEAR, solver="heun", steps=4)
    seen: list[fastdiff.Progress] = []
    states = []
    inputs = []
    spy = Sampler(lambda x, t: inputs.append(x.clone()) or network(x, t), tableau=sampler.tableau)

    def callback(progress: fastdiff.Progress) -> None:
        seen.append(progress)
        states.append(progress.state.clone())

    result = spy(noise(2, 3), callback=callback)
    assert [p.call for p in seen] == [1, 2, 3, 4, 5, 6, 7] and {p.calls for p in seen} == {7}
    assert [p.time for p in seen] == [s.time for s in spy.tableau.stages[1:]]
    assert torch.equal(states[-1], result)
    for state, x in zip(states, inputs[1:], strict=False):
        assert torch.equal(state, x)

    class Stop(Exception):
        pass

    def stop(progress: fastdiff.Progress) -> None:
        if progress.call == 2:
            raise Stop

    with pytest.raises(Stop):
        spy(noise(2, 3), callback=stop)
    assert torch.equal(spy(noise(2, 3)), result)  # and the sampler is as good as new


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    Sampler(network, LINEAR, steps=6, progress=True)(noise(1, 2))
    assert "ipndm" in (shown := capsys.readouterr().err) and "6/6" in shown
    Sampler(network, LINEAR, steps=6)(noise(1, 2))
    assert capsys.readouterr().err == ""


# == What it says about itself =====================================================================


def test_describe() -> None:
    sampler = Sampler(network, LINEAR, solver="ipndm", steps=10, prediction="v_prediction")
    described = sampler.describe((4, 3, 8, 8))
    tableau = sampler.tableau
    assert described["calls"] == tableau.nfe == 10 and described["steps"] == 10
    assert described["launches"] == 10 and described["slots"] == 4
    assert described["passes"] == 4 + 5 + 6 + 7 * 6 + 6
    assert described["bytes"] == 63 * 4 * 3 * 8 * 8 * 4
    assert described["solver"] == "ipndm" and described["prediction"] == "v_prediction"
    assert described["dtype"] == "float32" and described["device"] == "cpu"
    assert described["backend"] in ("C++", "PyTorch") and described["routed"] == {}
    assert "ipndm, 10 steps, 10 calls" in repr(sampler)
    wide = Sampler(network, LINEAR, steps=10, dtype=torch.float64).describe((1, 1))
    assert wide["bytes"] == 63 * 8


def test_prepare_changes_nothing() -> None:
    for options in ({}, {"solver": "ddim", "eta": 1.0}, {"from_image": True}):
        sampler = Sampler(network, LINEAR, steps=5, **options)
        assert sampler.prepare((2, 3, 4)) is sampler
        inputs = {"image": noise(2, 3, 4)} if "from_image" in options else {}
        fresh = Sampler(network, LINEAR, steps=5, **options)
        x = noise(2, 3, 4)
        assert torch.equal(sampler(x, seeds=[1, 2], **inputs), fresh(x, seeds=[1, 2], **inputs))
    assert sampler.prepare((0, 3)) is sampler


# == Bad input =====================================================================================


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("solver", solver_names())
def test_nan_and_inf_stay_in_their_own_sample(solver: str, bad: float) -> None:
    x = noise(3, 2, 5)
    for options in ({}, {"clip": 1.0}, {"prediction": "v_prediction"}):
        sampler = Sampler(network, LINEAR, solver=solver, steps=5, **options)
        good = sampler(x, seeds=range(3))
        poisoned = x.clone()
        poisoned[1, 0, 2] = bad
        result = sampler(poisoned, seeds=range(3))
        assert torch.equal(result[[0, 2]], good[[0, 2]])
        if solver != "predictor_corrector":  # whose steps have the length of the whole sample
            assert torch.equal(result[1, 1], good[1, 1])  # nor does it leave its pixel
    guided = Sampler(network, LINEAR, solver=solver, steps=5)(poisoned, guidance_scale=2.0)
    assert guided[[0, 2]].isfinite().all()


def test_a_nan_is_not_clipped_away() -> None:
    x = noise(2, 3)
    x[0, 0] = math.nan
    result = Sampler(network, LINEAR, solver="ddim", steps=3, clip=1.0)(x)
    assert result[0, 0].isnan() and result.isnan().sum() == 1


def refused(message: str, error: type[Exception] = ValueError) -> Any:
    return pytest.raises(error, match=message)


def test_bad_construction() -> None:
    with refused("denoiser must be callable; got int", TypeError):
        Sampler(3, LINEAR, steps=5)
    with refused("dtype must be torch.float32 or torch.float64; got torch.float16"):
        Sampler(network, LINEAR, steps=5, dtype=torch.float16)
    with refused("schedule must be given unless tableau is"):
        Sampler(network, steps=5)
    tableau = build_tableau("ddim", LINEAR, 5)
    for extra in ({"schedule": LINEAR}, {"steps": 5}, {"eta": 1.0}):
        with refused("tableau stands for schedule, steps and options"):
            Sampler(network, tableau=tableau, **extra)
    with refused("solver must be one of"):
        Sampler(network, LINEAR, solver="euler_a", steps=5)
    with refused("prediction must be one of"):
        Sampler(network, LINEAR, prediction="eps", steps=5)
    with refused("steps must be a whole number >= 1; got None"):
        Sampler(network, LINEAR)
    with refused("steps must be at most 1000.*got 1001"):
        Sampler(network, LINEAR, steps=1001)
    with refused("ipndm has no option 'eta'", TypeError):
        Sampler(network, LINEAR, steps=5, eta=1.0)


def test_bad_noise_and_seeds() -> None:
    sampler = Sampler(network, LINEAR, solver="ddim", steps=3, eta=1.0)
    x = noise(2, 3)
    with refused("noise must be given, or seeds and shape"):
        sampler()
    with refused("noise must be given, or seeds and shape"):
        sampler(seeds=[1, 2])
    with refused("noise must be a floating-point tensor.*got torch.int64", TypeError):
        sampler(torch.ones(2, 3, dtype=torch.int64))
    with refused("noise must be a floating-point tensor.*got ndarray", TypeError):
        sampler(x.numpy())
    with refused("noise must have a batch dimension"):
        sampler(torch.tensor(1.0))
    with refused("seeds must be 2, one per image; got 3"):
        sampler(x, seeds=[1, 2, 3])
    for seeds in ([0.5, 1.0], torch.ones(2, 2, dtype=torch.int64), 2**64, [1, -(2**63) - 1], "ab"):
        with refused("seeds must be whole numbers"):
            sampler(x, seeds=seeds)
    with refused(r"shape must be \(3,\), noise's; got \(4,\)"):
        sampler(x, shape=(4,))
    with refused("stage_noise must hold 2 tensors, one per stochastic stage"):
        sampler(x, stage_noise=[x])
    with refused(r"stage_noise must be \(2, 3\) each; got \(3, 2\)"):
        sampler(x, stage_noise=[noise(3, 2)] * 2)
    each = Sampler(network, LINEAR, solver="ddim", steps=3, eta=np.array([0.0, 0.5, 1.0]))
    with refused("noise must have the 3 samples the tableau has rows for; got 2"):
        each(x)


def test_bad_guidance() -> None:
    sampler = Sampler(conditional, LINEAR, steps=3)
    x, given_ = noise(2, 3), {"shift": torch.zeros(2), "label": torch.zeros(2)}
    with refused("uncond must come with guidance_scale"):
        sampler(x, uncond={}, **given_)
    for scale in (torch.ones(3), torch.ones(2, 1)):
        with refused(r"guidance_scale must be a number or a tensor \[2\]; got shape"):
            sampler(x, guidance_scale=scale, **given_)
    with refused(r"uncond\['label'\] must have shape \(2,\) or expand to it; got \(3,\)"):
        sampler(x, guidance_scale=2.0, uncond={"label": torch.zeros(3)}, **given_)


@pytest.mark.parametrize(
    ("returned", "message", "error"),
    [
        (lambda x: (x,), "denoiser must return a tensor; got tuple", TypeError),
        (lambda x: x[:, :1], r"denoiser must return \(2, 3, 4\); got \(2, 1, 4\)", ValueError),
        (lambda x: x[:1], r"denoiser must return \(2, 3, 4\); got \(1, 3, 4\)", ValueError),
        (lambda x: x[..., None], r"denoiser must return \(2, 3, 4\)", ValueError),
        (lambda x: x.to("meta"), "denoiser must return a tensor on cpu; got meta", ValueError),
        (lambda x: x.to(torch.int32), "denoiser must return .*float", TypeError),
        (lambda x: x.to(torch.complex64), "denoiser must return .*float", TypeError),
    ],
)
def test_bad_network_outputs(returned: Any, message: str, error: type[Exception]) -> None:
    with refused(message, error):
        Sampler(lambda x, t: returned(x), LINEAR, steps=2)(noise(2, 3, 4))
    if error is ValueError and "meta" not in message:
        with refused(r"denoiser must return \(2, 6, 4\)"):
            Sampler(lambda x, t: returned(x), LINEAR, steps=2, prediction="both")(noise(2, 3, 4))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_shape_layout_and_dtype_samples_the_same(data: st.DataObject) -> None:
    """Against the run of each image alone in float64."""
    shape = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=5)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    solver = data.draw(st.sampled_from(solver_names()))
    steps = data.draw(st.integers(1, 5))
    x = noise(*shape).to(dtype)
    order = data.draw(st.permutations(range(len(shape))))
    strided = x.permute(order).contiguous().permute(tuple(np.argsort(order)))
    assert torch.equal(strided, x)
    f = lambda x, t: (0.3 * x.double()).to(x.dtype)
    seeds = range(len(x))
    result = Sampler(f, LINEAR, solver=solver, steps=steps)(strided, seeds=seeds)
    assert result.shape == x.shape and result.dtype == torch.float32
    exact = Sampler(f, LINEAR, solver=solver, steps=steps, dtype=torch.float64)
    expected = exact(x.double(), seeds=seeds)
    size = max(1.0, float(expected.abs().max())) if x.numel() else 1.0
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=rounding * 10 * size)
