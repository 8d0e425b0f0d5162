"""The extras that no row can hold, against their formulas; inpainting and image to image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import NoiseSchedule, Sampler, build_tableau, solver_names
from fastdiff.execution.nonlinear import keep_known, rescaled_guidance, thresholded
from tests.helpers.networks import STRUCTURES
from tests.helpers.oracles import express
from tests.helpers.schedules import LINEAR

B, C = 3, 2
RNG = np.random.default_rng(5)
NOISE, IMAGE, OTHER = (torch.from_numpy(RNG.standard_normal((B, C, 4, 5))) for _ in range(3))
SEEDS = range(B)


def network(x: torch.Tensor, t: torch.Tensor, **_: Any) -> torch.Tensor:
    return 0.8 * torch.sin(1.3 * x + t.view(-1, 1, 1, 1) / 400) + 0.1 * x.roll(1, -1)


def conditional(x: torch.Tensor, t: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return network(x, t) * (1 + 0.2 * c.view(-1, 1, 1, 1))


def quantile(row: np.ndarray, q: float) -> float:
    """The q-quantile of some numbers, linear between the two nearest."""
    ordered = np.sort(row)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (position - low) * (ordered[high] - ordered[low]))


# == The formulas ==================================================================================


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("scale", [torch.tensor([3.0]), torch.tensor([1.0, 4.0, 7.5])])
def test_rescaled_guidance_is_its_formula(scale: torch.Tensor, rescale: float) -> None:
    """Lin et al. 2023, eq. 15-16, image by image in numpy."""
    scale = scale.double()
    uncond, cond = RNG.standard_normal((2, B, C, 4, 5))
    output = torch.from_numpy(np.concatenate([uncond, cond]))
    found = rescaled_guidance(output, scale, rescale).numpy()
    for i in range(B):
        guided = uncond[i] + scale[i % len(scale)].item() * (cond[i] - uncond[i])
        same_contrast = guided * cond[i].std() / guided.std()
        expected = rescale * same_contrast + (1 - rescale) * guided
        np.testing.assert_allclose(found[i], expected, rtol=1e-13)
        if rescale == 1:
            assert found[i].std() == pytest.approx(cond[i].std(), rel=1e-12)


@pytest.mark.parametrize("bound", [1.0, 0.5])
@pytest.mark.parametrize("q", [0.5, 0.9, 0.995, 1.0])
def test_a_threshold_is_its_formula(q: float, bound: float) -> None:
    """Saharia et al. 2022: images beyond the bound are squeezed into it, the others untouched."""
    p, k = -0.75, 1.25
    x = torch.from_numpy(RNG.standard_normal((B, C, 4, 5))) * torch.tensor([0.1, 1, 4]).view(
        -1, 1, 1, 1
    )
    output = 0.3 * torch.from_numpy(RNG.standard_normal(x.shape)) * x
    given = (torch.tensor([p], dtype=x.dtype), torch.tensor([k], dtype=x.dtype))
    x0 = (p * thresholded(output, x, given, q, bound) + k * x).numpy()
    plain = (p * output + k * x).numpy()
    squeezed = 0
    for found, before in zip(x0, plain, strict=True):
        s = max(quantile(np.abs(before).ravel(), q), bound)
        np.testing.assert_allclose(
            found, np.clip(before, -s, s) * bound / s, rtol=1e-12, atol=1e-14
        )
        squeezed += s > bound
    assert 0 < squeezed < B


def test_a_threshold_of_many_large_images() -> None:
    """More numbers than torch.quantile takes."""
    x, one, none = torch.zeros(2, 1, 3000, 3000), torch.ones(1), torch.zeros(1)
    x[1] = torch.linspace(0, 4, 9_000_000).view(1, 3000, 3000)
    found = thresholded(x, x, (one, none), 0.5, 1.0)
    assert not found[0].any() and float(found[1].max()) == 1
    assert float(found[1].flatten()[2_250_000]) == pytest.approx(0.5, rel=1e-5)


def test_keep_known_is_its_formula() -> None:
    mask = torch.tensor([1.0, 0.25, 0.0], dtype=torch.float64).view(-1, 1, 1, 1)
    alpha, sigma = (torch.tensor([v], dtype=torch.float64) for v in (0.8, 0.6))
    state = OTHER.clone()
    keep_known(state, IMAGE, NOISE, mask, (alpha, sigma))
    noised = 0.8 * IMAGE + 0.6 * NOISE
    torch.testing.assert_close(state, mask * OTHER + (1 - mask) * noised, rtol=1e-14, atol=0)
    assert torch.equal(state[0], OTHER[0]) and torch.equal(state[2], noised[2])


# == In a run ======================================================================================


@pytest.mark.parametrize("solver", STRUCTURES)
def test_dynamic_threshold_in_every_structure(solver: str) -> None:
    """Every x0 estimate, seen from outside: what the network's x0 is squeezed to."""
    settings = {"solver": solver, "steps": 6, "clip": 1.0, "prediction": "sample"}
    wild = lambda x, t: 3 * network(x, t)

    def squeezed(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x0 = wild(x, t)
        s = torch.stack([i.abs().flatten().quantile(0.9) for i in x0]).clamp(min=1.0)
        s = s.view(-1, 1, 1, 1)
        return x0.clamp(-s, s) / s

    sampler = Sampler(wild, LINEAR, dtype=torch.float64, dynamic_threshold=0.9, **settings)
    plain = Sampler(squeezed, LINEAR, dtype=torch.float64, **settings)
    run = {"seeds": SEEDS}
    torch.testing.assert_close(sampler(NOISE, **run), plain(NOISE, **run), rtol=1e-9, atol=1e-9)
    calls = sampler.tableau.nfe
    routed = sampler.describe()["routed"]
    routed.pop("length of a Langevin step found by PyTorch", None)
    assert routed == {"dynamic threshold by PyTorch": calls}
    clipped = Sampler(wild, LINEAR, dtype=torch.float64, **settings)
    assert (sampler(NOISE, **run) - clipped(NOISE, **run)).abs().max() > 1e-2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_dynamic_threshold_does_not_depend_on_the_prediction(prediction: str) -> None:
    def denoised(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 3 * network(x, t)

    def expressed(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = (f(float(t[0])) for f in (LINEAR.alpha, LINEAR.sigma))
        x0 = denoised(x, t)
        return express(prediction, x0, (x - alpha * x0) / sigma, alpha, sigma)

    settings = {"steps": 6, "clip": 1.0, "dynamic_threshold": 0.9, "dtype": torch.float64}
    expected = Sampler(denoised, LINEAR, prediction="sample", **settings)(NOISE)
    found = Sampler(expressed, LINEAR, prediction=prediction, **settings)(NOISE)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("threshold", [None, 0.9])
@pytest.mark.parametrize("solver", ["ipndm", "ddim", "unipc", "heun"])
def test_guidance_rescale_in_a_run(solver: str, threshold: float | None) -> None:
    """As a network that does the guidance itself."""
    c, none = torch.tensor([1.0, -1.0, 2.0]), torch.zeros(B)
    scale = torch.tensor([2.0, 5.0, 7.5], dtype=torch.float64)

    def guided(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        both = torch.cat([conditional(x, t, none), conditional(x, t, c)])
        return rescaled_guidance(both, scale, 0.7)

    settings = {"solver": solver, "steps": 5, "dtype": torch.float64, "clip": 1.0}
    settings["dynamic_threshold"] = threshold
    sampler = Sampler(conditional, LINEAR, **settings)
    found = sampler(NOISE, guidance_scale=scale, guidance_rescale=0.7, c=c, uncond={"c": none})
    expected = Sampler(guided, LINEAR, **settings)(NOISE)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    reason = "guidance combined by PyTorch (rescale or dynamic threshold)"
    assert sampler.describe()["routed"][reason] == sampler.tableau.nfe
    plain = sampler(NOISE, guidance_scale=scale, guidance_rescale=0.0, c=c, uncond={"c": none})
    assert (plain - found).abs().max() > 1e-3


# == Inpainting ====================================================================================


@pytest.mark.parametrize("solver", STRUCTURES)
def test_inpainting_keeps_what_the_mask_keeps(solver: str) -> None:
    """The kept part ends exactly as it was; a mask of ones changes nothing at all."""
    sampler = Sampler(network, LINEAR, solver=solver, steps=6, dtype=torch.float64)
    half = torch.ones(1, 1, 4, 5, dtype=torch.float64)
    half[..., :2] = 0
    found = sampler(NOISE, image=IMAGE, mask=half, seeds=SEEDS)
    assert torch.equal(found[..., :2], IMAGE[..., :2])
    assert not torch.equal(found[..., 2:], IMAGE[..., 2:]) and found.isfinite().all()
    free = sampler(NOISE, seeds=SEEDS)
    assert torch.equal(sampler(NOISE, image=IMAGE, mask=torch.ones(()), seeds=SEEDS), free)
    # The network mixes pixels, so what is kept matters for what is made.
    assert (found[..., 2:] - free[..., 2:]).abs().max() > 1e-3
    reason = "kept part of the image blended by PyTorch"
    assert sampler.describe()["routed"][reason] > sampler.tableau.nfe


@pytest.mark.parametrize("solver", ["ddim", "heun", "unipc", "dpmpp_2m_sde", "f_pndm"])
@pytest.mark.parametrize("schedule", [LINEAR, NoiseSchedule.edm()], ids=["linear", "edm"])
def test_what_the_network_sees_while_inpainting(solver: str, schedule: NoiseSchedule) -> None:
    """At every call the kept part is the image with the initial noise at that call's level."""
    seen = []

    def watching(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        seen.append((x.clone(), float(t[0])))
        return network(x, t)

    mask = torch.zeros(B, 1, 4, 5)
    mask[0] = 1
    sampler = Sampler(watching, schedule, solver=solver, steps=5, dtype=torch.float64)
    found = sampler(NOISE, image=IMAGE, mask=mask, seeds=SEEDS)
    assert len(seen) == sampler.tableau.nfe
    for (x, t), stage in zip(seen, sampler.tableau.stages[1:], strict=True):
        noised = schedule.alpha(t) * IMAGE + schedule.sigma(t) * NOISE
        expected = stage.input_scale * noised[1:]
        torch.testing.assert_close(x[1:], expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(found[1:], IMAGE[1:])


def test_inpainting_with_guidance_in_half_precision() -> None:
    """Both halves of the network's input carry the kept part, in the network's dtype."""
    seen = []

    def watching(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert x.dtype == torch.bfloat16 and len(x) == 2 * B
        seen.append(x.clone())
        return network(x.float(), t).to(x.dtype)

    sampler = Sampler(watching, LINEAR, solver="ddim", steps=4)
    found = sampler(NOISE.bfloat16(), image=IMAGE.float(), mask=torch.zeros(1), guidance_scale=3.0)
    assert torch.equal(found, IMAGE.float())
    times = [stage.time for stage in sampler.tableau.stages[1:]]
    for x, t in zip(seen, times, strict=True):
        noised = LINEAR.alpha(t) * IMAGE + LINEAR.sigma(t) * NOISE.bfloat16().double()
        for half in x.double().chunk(2):
            torch.testing.assert_close(half, noised, rtol=1e-2, atol=1e-3)


# == Image to image ================================================================================


# Classical methods and those of the reverse SDE do not follow straight lines exactly; the published
# weights of order 4 do not sum to one.
INEXACT = ("classical_euler", "classical_heun", "classical_rk4", "fon", "ipndm_v_published",
           "reverse_diffusion", "euler_maruyama", "predictor_corrector")  # fmt: skip


# Without the analytical first step every solver: none may leave noise behind at its end.
@pytest.mark.parametrize(
    ("solver", "afs"), [(name, False) for name in solver_names()] + [(n, True) for n in STRUCTURES]
)
def test_image_to_image_starts_at_the_noised_image(solver: str, afs: bool) -> None:
    """A network that knows the image returns it, whatever the noise; so does a mask on top."""
    knowing = lambda x, t: IMAGE.to(x)
    start = 600.0
    sampler = Sampler(
        knowing,
        LINEAR,
        solver=solver,
        steps=5,
        start=start,
        prediction="sample",
        from_image=True,
        dtype=torch.float64,
        afs=afs,
    )
    first: list[torch.Tensor] = []
    sampler(NOISE, image=IMAGE, seeds=SEEDS, callback=lambda p: first.append(p.state.clone()))
    found = first[-1]
    assert sampler.tableau.times[0] == start and len(first) == sampler.tableau.nfe
    noise, image = (sampler.tableau.stages[0].writes[0].slots[slot] for slot in (0, 1))
    assert noise / image == pytest.approx(LINEAR.sigma(start) / LINEAR.alpha(start), rel=1e-12)
    if not solver.endswith("_churn"):  # which add noise before the first call
        assert image == pytest.approx(LINEAR.alpha(start), rel=1e-12)
    if not afs and solver not in INEXACT:
        torch.testing.assert_close(found, IMAGE, rtol=1e-9, atol=1e-9)
    kept = sampler(NOISE, image=IMAGE, mask=torch.zeros(()), seeds=SEEDS)
    assert torch.equal(kept, IMAGE)


# == What is refused ===============================================================================


def test_bad_input_is_named() -> None:
    sampler = Sampler(conditional, LINEAR, solver="ddim", steps=3, dtype=torch.float64)
    c = torch.zeros(B)
    for rescale in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"guidance_rescale must be in \[0, 1\] and come with"):
            sampler(NOISE, guidance_scale=2.0, guidance_rescale=rescale, c=c)
    with pytest.raises(ValueError, match="guidance_rescale must .* come with guidance_scale"):
        sampler(NOISE, guidance_rescale=0.5, c=c)
    for threshold in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"dynamic_threshold must be in \(0, 1\]; got"):
            Sampler(network, LINEAR, steps=3, clip=1.0, dynamic_threshold=threshold)
    with pytest.raises(ValueError, match="dynamic_threshold must come with a symmetric clip"):
        Sampler(network, LINEAR, steps=3, dynamic_threshold=0.9)
    with pytest.raises(ValueError, match="dynamic_threshold must come with a symmetric clip"):
        Sampler(network, tableau=build_tableau("ddim", LINEAR, 3), dynamic_threshold=0.9)
    for clip in ((-1.0, 0.5), (-2.0, -1.0)):
        with pytest.raises(ValueError, match="dynamic_threshold must come with a symmetric clip"):
            Sampler(network, LINEAR, steps=3, clip=clip, dynamic_threshold=0.9)
    with pytest.raises(ValueError, match="image must be given exactly where"):
        sampler(NOISE, mask=torch.ones(()), c=c)
    with pytest.raises(ValueError, match="image must be given exactly where"):
        sampler(NOISE, image=IMAGE, c=c)
    with pytest.raises(ValueError, match=r"mask must have shape \(3, 2, 4, 5\) or expand to it"):
        sampler(NOISE, image=IMAGE, mask=torch.ones(4, 4), c=c)
    with pytest.raises(ValueError, match=r"image must be \(3, 2, 4, 5\)"):
        sampler(NOISE, image=IMAGE[:1], mask=torch.ones(()), c=c)
