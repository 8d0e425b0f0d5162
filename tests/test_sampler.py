"""The eager sampler: what it promises about noise, conditioning, guidance, images and callbacks."""

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
from fastdiff import NoiseSchedule, Sampler, seeded_noise
from tests.helpers.networks import affine, conditional, gaussian
from tests.helpers.oracles import GAUSSIAN, ODE_SOLVERS
from tests.helpers.schedules import LINEAR
from tests.helpers.tensors import normal

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
    sampler = Sampler(affine, LINEAR, solver="ddim", steps=3, eta=1.0, dtype=dtype)
    together = sampler(seeds=seeds, shape=shape)
    assert together.shape == (len(seeds), *shape) and together.dtype == dtype
    for i, seed in enumerate(seeds):
        assert torch.equal(sampler(seeds=[seed], shape=shape)[0], together[i])
    backwards = sampler(seeds=torch.tensor(seeds[::-1]), shape=shape)
    assert torch.equal(backwards.flip(0), together)


def test_seeds_draw_the_documented_noise() -> None:
    sampler = Sampler(affine, LINEAR, solver="ddim", steps=4)
    drawn = sampler(seeds=[5, 6], shape=(3, 4))
    assert torch.equal(drawn, sampler(seeded_noise([5, 6], (2, 3, 4))))
    assert torch.equal(drawn[:1], sampler(seeds=5, shape=(3, 4)))
    # With noise given, seeds still drive what a stochastic solver adds.
    stochastic = Sampler(affine, LINEAR, solver="ddim", steps=4, eta=0.7)
    x = normal(2, 3, 4)
    runs = [stochastic(x, seeds=seeds) for seeds in ([1, 2], [1, 2], [1, 3])]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0][0], runs[2][0]) and not torch.equal(runs[0][1], runs[2][1])


def test_without_seeds_torch_s_generator_decides() -> None:
    sampler = Sampler(affine, LINEAR, solver="ddim", steps=4, eta=1.0)
    x = normal(2, 8)
    torch.manual_seed(3)
    first, second = sampler(x), sampler(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(sampler(x), first)
    # A deterministic solver does not touch the generator.
    state = torch.get_rng_state()
    Sampler(affine, LINEAR, steps=4)(x)
    assert torch.equal(torch.get_rng_state(), state)


def test_given_noise_of_the_stages() -> None:
    """DDIM at eta = 1, composed by hand from the noise handed in."""
    z = normal(2, 3, 5, dtype=torch.float64)
    sampler = Sampler(
        gaussian, LINEAR, solver="ddim", spacing=[900, 600, 300, -1], eta=1.0, dtype=torch.float64
    )
    x = normal(3, 5, dtype=torch.float64)
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
        sampler = Sampler(affine, LINEAR, steps=3, dtype=dtype)
        x = normal(2, 4, dtype=dtype)
        before = x.clone()
        first = sampler(x)
        kept = first.clone()
        second = sampler(x + 1)
        assert torch.equal(x, before) and torch.equal(first, kept)
        first.zero_()
        assert torch.equal(sampler(x + 1), second)
        assert first.untyped_storage().nbytes() == first.nbytes  # not a view of all buffers
    assert not torch.is_grad_enabled() or not Sampler(affine, LINEAR, steps=2)(x).requires_grad


def test_a_run_without_gradients_even_for_a_network_that_trains() -> None:
    module = nn.Linear(4, 4)
    result = Sampler(lambda x, t: module(x), LINEAR, steps=3)(normal(2, 4))
    assert not result.requires_grad and module.weight.grad is None


# == What the network is given =====================================================================


def test_times_and_conditioning_reach_the_network() -> None:
    calls: list[tuple[Tensor, dict[str, Any]]] = []

    def spy(x: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
        calls.append((t.clone(), conditioning))
        return x

    labels = torch.tensor([4, 5])
    Sampler(spy, LINEAR, solver="ddim", spacing=[900, 450.5, -1])(
        normal(2, 3), labels=labels, name="a"
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
    x = normal(2, 3)
    assert torch.equal(sampler(x), torch.zeros(2, 3))
    torch.testing.assert_close(seen[0], 80 * x / 81)
    torch.testing.assert_close(seen[1], 2 * x / 3)  # x0 = 0: the state is sigma times the noise


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

    x = normal(3, 2, 4, dtype=dtype)
    fused = Sampler(spy, LINEAR, solver=solver, steps=5, dtype=dtype)(
        x, guidance_scale=scale, uncond=null, **given_
    )
    assert set(counts) == {(6, 6)}
    expected = Sampler(guided, LINEAR, solver=solver, steps=5, dtype=dtype)(x)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(fused, expected, rtol=tolerance, atol=tolerance)


# == Predictions at run time =======================================================================


def test_both_is_merged_and_learned_variance_dropped() -> None:
    x = normal(2, 3, 4, 4, dtype=torch.float64)

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


def test_each_sample_may_have_its_own_eta() -> None:
    """Each sample runs as if the whole batch had its eta."""
    eta = np.array([0.0, 0.4, 1.0])
    x, z = normal(3, 2, 4), normal(5, 3, 2, 4)
    for kind in ("epsilon", "v_prediction"):
        run = {"solver": "ddim", "steps": 6, "prediction": kind, "clip": 1.0}
        mixed = Sampler(affine, LINEAR, eta=eta, **run)(x, stage_noise=z)
        for i, each in enumerate(eta):
            alone = Sampler(affine, LINEAR, eta=float(each), **run)(
                x, stage_noise=z if each else None
            )
            torch.testing.assert_close(mixed[i], alone[i], rtol=1e-6, atol=1e-6)


# == Image to image ================================================================================


@pytest.mark.parametrize("solver", ODE_SOLVERS)
@pytest.mark.parametrize("start", [180.0, 700.0])
def test_restart_from_an_image(solver: str, start: float) -> None:
    """alpha image + sigma noise, followed along the exact flow of the Gaussian to its end."""
    image, x = normal(2, 4, 3, dtype=torch.float64)
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
    x = normal(2, 3)
    with pytest.raises(ValueError, match="image must be given exactly where"):
        Sampler(affine, LINEAR, steps=3, start=500, from_image=True)(x)
    with pytest.raises(ValueError, match="image must be given exactly where"):
        Sampler(affine, LINEAR, steps=3)(x, image=x)
    with pytest.raises(ValueError, match=r"image must be \(2, 3\) on cpu; got \(3, 2\)"):
        Sampler(affine, LINEAR, steps=3, from_image=True)(x, image=normal(3, 2))
    with pytest.raises(ValueError, match=r"image must be \(2, 3\) on cpu; got .* on meta"):
        Sampler(affine, LINEAR, steps=3, from_image=True)(x, image=x.to("meta"))


# == Callback and progress =========================================================================


def test_a_callback_sees_every_call() -> None:
    sampler = Sampler(affine, LINEAR, solver="heun", steps=4)
    seen: list[fastdiff.Progress] = []
    states = []
    inputs = []
    spy = Sampler(lambda x, t: inputs.append(x.clone()) or affine(x, t), tableau=sampler.tableau)

    def callback(progress: fastdiff.Progress) -> None:
        seen.append(progress)
        states.append(progress.state.clone())

    result = spy(normal(2, 3), callback=callback)
    assert [p.call for p in seen] == [1, 2, 3, 4, 5, 6, 7] and {p.nfe for p in seen} == {7}
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
        spy(normal(2, 3), callback=stop)
    assert torch.equal(spy(normal(2, 3)), result)  # and the sampler is as good as new


def test_a_progress_bar_shows_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    Sampler(affine, LINEAR, steps=6, progress=True)(normal(1, 2))
    assert "ipndm" in (shown := capsys.readouterr().err) and "6/6" in shown
    Sampler(affine, LINEAR, steps=6)(normal(1, 2))
    assert capsys.readouterr().err == ""


# == What it says about itself =====================================================================


def test_describe_counts_calls_launches_and_bytes() -> None:
    sampler = Sampler(affine, LINEAR, solver="ipndm", steps=10, prediction="v_prediction")
    described = sampler.describe((4, 3, 8, 8))
    tableau = sampler.tableau
    assert described["nfe"] == tableau.nfe == 10 and described["steps"] == 10
    assert described["launches"] == 10 and described["slots"] == 4
    assert described["passes"] == 4 + 5 + 6 + 7 * 6 + 6
    assert described["bytes"] == 63 * 4 * 3 * 8 * 8 * 4
    assert described["solver"] == "ipndm" and described["prediction"] == "v_prediction"
    assert described["dtype"] == "float32" and described["device"] == "cpu"
    assert described["backend"] in ("C++", "PyTorch") and described["routed"] == {}
    assert "ipndm, 10 steps, 10 calls" in repr(sampler)
    wide = Sampler(affine, LINEAR, steps=10, dtype=torch.float64).describe((1, 1))
    assert wide["bytes"] == 63 * 8


def test_prepare_changes_nothing() -> None:
    for options in ({}, {"solver": "ddim", "eta": 1.0}, {"from_image": True}):
        sampler = Sampler(affine, LINEAR, steps=5, **options)
        assert sampler.prepare((2, 3, 4)) is sampler
        inputs = {"image": normal(2, 3, 4)} if "from_image" in options else {}
        fresh = Sampler(affine, LINEAR, steps=5, **options)
        x = normal(2, 3, 4)
        assert torch.equal(sampler(x, seeds=[1, 2], **inputs), fresh(x, seeds=[1, 2], **inputs))
    assert sampler.prepare((0, 3)) is sampler
