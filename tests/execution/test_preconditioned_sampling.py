"""Preconditioned samplers against what is known exactly about Gaussians."""

import math

import numpy as np
import pytest
import torch

from fastdiff import (
    NoiseSchedule,
    Preconditioner,
    Sampler,
    build_tableau,
    power_law_masks,
)
from fastdiff.ops import SpectralGains, spectral_predictor
from fastdiff.ops.spectral_operators import mirrored

F64 = torch.float64
VE = NoiseSchedule.ve(0.01, 20.0)
SCHEDULES = {"ve": VE, "vp": NoiseSchedule.vp(), "sub_vp": NoiseSchedule.sub_vp()}


def random_gains(channels, height, width, *, pixel=False, skew=False, seed=0):
    random = torch.Generator().manual_seed(seed)
    shape = (channels, height, width)
    r = 1 + torch.rand(shape, generator=random, dtype=F64) / 4
    a = 1 + torch.rand(shape, generator=random, dtype=F64) / 4
    q = torch.randn(shape, generator=random, dtype=F64)
    return Preconditioner(
        (r + mirrored(r)) / 2, a if pixel else None, (q - mirrored(q)) / 4 if skew else None
    )


def covariance(size, seed=1):
    random = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=random, dtype=F64) / math.sqrt(size)
    return root @ root.T + 0.3 * torch.eye(size, dtype=F64)


def circulant(height, width, seed=1):
    """A covariance that commutes with every filter, from its spectrum."""
    random = torch.Generator().manual_seed(seed)
    spectrum = 0.3 + torch.rand(height, width, generator=random, dtype=F64)
    spectrum = (spectrum + mirrored(spectrum)) / 2
    basis = torch.eye(height * width, dtype=F64).view(-1, height, width)
    return torch.fft.ifft2(torch.fft.fft2(basis) * spectrum).real.flatten(1)


def stationary(a, noise):
    """V = A V A' + N, by doubling."""
    total = noise
    for _ in range(60):
        total = total + a @ total @ a.T
        a = a @ a
    return total


def fixed_step_chain(gains, precision, h):
    """The chain's matrix and its noise's covariance, read off the op."""
    size, (height, width) = len(precision), gains.size
    basis = torch.eye(size, dtype=F64).view(size, 1, height, width)
    row = torch.tensor([[h, math.sqrt(2 * h)]], dtype=F64)
    score = -(basis.flatten(1) @ precision).view_as(basis)
    a = spectral_predictor(basis, score, gains, row).flatten(1).T
    zero = torch.zeros_like(basis)
    m = spectral_predictor(zero, zero, gains, row, noise=basis).flatten(1).T
    return a, m @ m.T


@pytest.mark.parametrize("pixel", [False, True])
@pytest.mark.parametrize("commuting", [False, True])
def test_stationary_covariance_of_fixed_steps(pixel, commuting):
    """V = (I - h D Sigma^-1 / 2)^-1 Sigma for every positive D, and for no other operator."""
    height, width, h = 5, 6, 0.02
    size = height * width
    made = random_gains(1, height, width, pixel=pixel)
    sigma = circulant(height, width) if commuting else covariance(size)
    precision, eye = torch.linalg.inv(sigma), torch.eye(size, dtype=F64)
    a, noise = fixed_step_chain(made.gains, precision, h)
    d = made.drift(eye.view(size, 1, height, width)).flatten(1).T
    wanted = torch.linalg.inv(eye - (h / 2) * d @ precision) @ sigma
    torch.testing.assert_close(stationary(a, noise), wanted, rtol=0, atol=1e-11)
    # noise of another operator than the drift's: not that law
    _, other = fixed_step_chain(random_gains(1, height, width, seed=9).gains, precision, h)
    assert (stationary(a, other) - wanted).abs().max() > 1e-3


def test_the_chain_by_monte_carlo():
    height, width, h, count = 4, 5, 0.1, 20_000
    made = random_gains(1, height, width)
    sigma = circulant(height, width)
    precision = torch.linalg.inv(sigma)
    a, noise = fixed_step_chain(made.gains, precision, h)
    wanted = stationary(a, noise)
    row = torch.tensor([[h, math.sqrt(2 * h)]], dtype=F64)
    x, seeds = torch.zeros(count, 1, height, width, dtype=F64), torch.arange(count)
    for stage in range(80):
        score = -(x.flatten(1) @ precision).view_as(x)
        x = spectral_predictor(x, score, made.gains, row, seeds, stage)
    error = (x.flatten(1).T.cov() - wanted).abs().max() / wanted.max()
    assert float(error) < 5 * math.sqrt(2 / count)


def test_a_skew_part_leaves_the_continuous_law():
    """(D + S) Sigma^-1 drives to Sigma: its Lyapunov equation has the noise's covariance."""
    made = random_gains(1, 5, 6, skew=True)
    basis = torch.eye(30, dtype=F64).view(30, 1, 5, 6)
    both, m = (f(basis).flatten(1).T for f in (made.drift, made.noise))
    d, s = (both + both.T) / 2, (both - both.T) / 2
    torch.testing.assert_close(d, m @ m.T, rtol=0, atol=1e-12)
    assert s.norm() > 0.1
    sigma = covariance(30)
    drift = both @ torch.linalg.inv(sigma)
    torch.testing.assert_close(drift @ sigma + sigma @ drift.T, 2 * m @ m.T, rtol=0, atol=1e-11)


def variances(solver, schedule, steps, made, power, **options):
    """Of the result's modes, exactly: every noise's share, one white impulse at a time.

    A run is linear in its noises where steps are not adaptive: image j of the batch gets an impulse
    in the noise of stage j alone (the initial one for j = 0).
    """
    height, width = power.shape

    def score(x, t):
        at = float(t[0]) / schedule.time_scale
        total = schedule.alpha(at) ** 2 * power + schedule.sigma(at) ** 2
        return torch.fft.ifft2(-torch.fft.fft2(x) / total).real

    sampler = Sampler(score, schedule, solver=solver, steps=steps, prediction="score", dtype=F64,
                      preconditioner=made, **options)  # fmt: skip
    drawn = sum(stage.is_stochastic for stage in sampler.tableau.stages)
    noises = torch.zeros(drawn + 1, drawn + 1, 1, height, width, dtype=F64)
    for j in range(drawn + 1):
        noises[j, j, 0, 0, 0] = 1
    x = sampler(noises[0], stage_noise=list(noises[1:]))
    return torch.fft.fft2(x).abs().square().sum((0, 1))


@pytest.mark.parametrize("name", list(SCHEDULES))
def test_the_predictors_recursion(name):
    """u <- (1 + D (1 - r - G^2 / v))^2 u + G^2 d for each mode, prior included, to rounding."""
    schedule, steps = SCHEDULES[name], 9
    made = random_gains(1, 6, 8)
    power = 0.1 + torch.rand(6, 8, dtype=F64, generator=torch.Generator().manual_seed(3))
    power = (power + mirrored(power)) / 2
    d = made.frequency[0].square()
    for preconditioner, gain in ((made, d), (None, torch.ones_like(d))):
        found = variances("reverse_diffusion", schedule, steps, preconditioner, power)
        times = build_tableau("reverse_diffusion", schedule, steps).times
        u = gain * schedule.prior_scale(times[0]) ** 2
        for t, after in zip(times[:-1], times[1:], strict=True):
            r = schedule.alpha(t) / schedule.alpha(after)
            g2 = schedule.sigma(t) ** 2 - (r * schedule.sigma(after)) ** 2
            v = schedule.alpha(t) ** 2 * power + schedule.sigma(t) ** 2
            u = (1 + gain * (1 - r - g2 / v)) ** 2 * u + (after != times[-1]) * g2 * gain
        torch.testing.assert_close(found, u, rtol=1e-9, atol=0)


def test_the_predictor_is_not_invariant():
    """With a score of the plain process its variances go to d / (2 d - 1)."""
    for d in (1.0, 1.25, 1.5625):
        made = Preconditioner(torch.full((1, 1, 1), math.sqrt(d), dtype=F64))
        found = [
            float(variances("reverse_diffusion", NoiseSchedule.ve(1e-3, 50.0), steps, made,
                            torch.ones(1, 1, dtype=F64)))
            for steps in (500, 1000)
        ]  # fmt: skip
        limit = 2 * found[1] - found[0]  # of first order in the step
        assert limit == pytest.approx(d / (2 * d - 1), abs=2e-3)


def reference_run(schedule, steps, made, power, z0, noises, snr, per_batch):
    """Predictor and corrector written out over full spectra, one mode at a time."""
    d = torch.ones_like(power) if made is None else made.frequency[0].square()
    hat = lambda image: torch.fft.fft2(image)
    times = build_tableau("reverse_diffusion", schedule, steps).times
    x = d.sqrt() * hat(z0) * schedule.prior_scale(times[0])
    noises = iter(noises)
    for t, after in zip(times[:-1], times[1:], strict=True):
        r = schedule.alpha(t) / schedule.alpha(after)
        v = schedule.alpha(t) ** 2 * power + schedule.sigma(t) ** 2
        z, direction = d.sqrt() * hat(next(noises)), -d * x / v
        sizes = [value.flatten(1).norm(dim=1) for value in (z, direction)]
        if per_batch:
            sizes = [size.mean() for size in sizes]
        h = (2 * r**2 * (snr * sizes[0] / sizes[1]) ** 2).view(-1, 1, 1, 1)
        x = x + h * direction + (2 * h).sqrt() * z
        g2 = schedule.sigma(t) ** 2 - (r * schedule.sigma(after)) ** 2
        x = x + d * ((1 - r) * x - g2 * x / v)
        if after != times[-1]:
            x = x + math.sqrt(g2) * d.sqrt() * hat(next(noises))
    return torch.fft.ifft2(x).real


@pytest.mark.parametrize("norms", ["sample", "batch"])
@pytest.mark.parametrize("prediction", ["score", "epsilon", "v_prediction"])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_predictor_and_corrector_written_out(name, prediction, norms):
    """The whole loop with given noises: adaptive steps, all moves, what the network predicts."""
    schedule, steps, shape = SCHEDULES[name], 4, (3, 1, 6, 8)
    random = torch.Generator().manual_seed(5)
    power = 0.1 + torch.rand(6, 8, generator=random, dtype=F64)
    power = (power + mirrored(power)) / 2
    z0, *noises = torch.randn(2 * steps, *shape, generator=random, dtype=F64)

    def network(x, t):
        at = float(t[0]) / schedule.time_scale
        alpha, sigma = schedule.alpha(at), schedule.sigma(at)
        epsilon = sigma * torch.fft.ifft2(torch.fft.fft2(x) / (alpha**2 * power + sigma**2)).real
        x0 = (x - sigma * epsilon) / alpha
        return {"score": -epsilon / sigma, "epsilon": epsilon,
                "v_prediction": alpha * epsilon - sigma * x0}[prediction]  # fmt: skip

    for made in (None, random_gains(1, 6, 8)):
        sampler = Sampler(
            network, schedule, solver="predictor_corrector", steps=steps, prediction=prediction,
            dtype=F64, preconditioner=made, snr=0.2, norms=norms,
        )  # fmt: skip
        found = sampler(z0, stage_noise=noises)
        wanted = reference_run(schedule, steps, made, power, z0, noises, 0.2, norms == "batch")
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def recursion(steps, d, power, sigma_max, snr):
    """The variances of the whole sampler where norms are their means (papers' defaults)."""
    sigmas = np.append(np.geomspace(0.01, sigma_max, steps)[::-1], 0.0)
    u = d * sigma_max**2
    for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        v = power + sigma**2
        h = 2 * snr**2 * d.sum() / (d**2 * u / v**2).sum()
        u = (1 - h * d / v) ** 2 * u + 2 * h * d
        g2 = sigma**2 - after**2
        u = (1 - g2 * d / v) ** 2 * u + (after > 0) * g2 * d
    return u


@pytest.mark.parametrize("alpha", [math.inf, 5.0])
def test_the_whole_sampler_follows_its_recursion(alpha):
    """In bands of frequency, from drawn noise: images large enough for their norms to be sharp."""
    size, steps, count = 64, 40, 96
    statistics = power_law_masks(1, size, size)
    power = statistics.log_power[0].expm1().numpy() / size**2
    power[0, 0] = power[0, 1]
    made = Preconditioner.from_statistics(statistics, alpha=alpha)
    table = torch.from_numpy(power).float()

    def score(x, t):
        return torch.fft.ifft2(-torch.fft.fft2(x) / (table + float(t[0]) ** 2)).real

    sampler = Sampler(score, NoiseSchedule.ve(0.01, 100.0), solver="predictor_corrector",
                      steps=steps, prediction="score", preconditioner=made, snr=0.1)  # fmt: skip
    x = sampler(seeds=list(range(count)), shape=(1, size, size))
    found = torch.fft.fft2(x, norm="ortho").abs().double().square().mean((0, 1)).numpy()
    d = np.ones_like(power) if made.is_identity else made.frequency[0].numpy() ** 2
    wanted = recursion(steps, d, power, 100.0, 0.1)
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    for low, high in ((0.03, 0.1), (0.1, 0.2), (0.2, 0.35), (0.35, 0.8)):
        band = (radius >= low) & (radius < high)
        ratio = (found[band] / wanted[band]).mean()
        assert ratio == pytest.approx(1, abs=5 * math.sqrt(2 / (band.sum() / 2 * count)) + 2e-3)


def denoiser(x, t):
    return -x / (0.5 + t.view(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize("solver", ["reverse_diffusion", "euler_maruyama", "predictor_corrector"])
def test_no_preconditioner_is_the_plain_path(solver):
    """To the bit: an infinite alpha, and none."""
    plain, other = (
        Sampler(denoiser, VE, solver=solver, steps=5, prediction="score", preconditioner=made)
        for made in (None, Preconditioner.from_statistics(power_law_masks(3, 8, 8), alpha=math.inf))
    )
    seeds = [1, 2]
    x = plain(seeds=seeds, shape=(3, 8, 8))
    assert torch.equal(x, other(seeds=seeds, shape=(3, 8, 8)))
    made = Preconditioner.from_statistics(power_law_masks(3, 8, 8))
    assert not torch.equal(
        x,
        Sampler(denoiser, VE, solver=solver, steps=5, prediction="score", preconditioner=made)(
            seeds=seeds, shape=(3, 8, 8)
        ),
    )


def test_nothing_ignores_a_preconditioner():
    """Every solver either runs through it, and says so, or refuses it."""
    from fastdiff import solver_names

    made = random_gains(3, 8, 8)
    beta = NoiseSchedule.linear_beta()
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    taken = []
    for name in solver_names():
        plain = Sampler(lambda x, t: 0.1 * x, beta, solver=name, steps=5)
        try:
            sampler = Sampler(lambda x, t: 0.1 * x, beta, solver=name, steps=5, preconditioner=made)
        except ValueError as error:
            assert "keep the state alone" in str(error)
            continue
        taken.append(name)
        assert "transforms" in sampler.describe()["moves"]
        images = [s(noise, seeds=[1, 2]) for s in (sampler, plain)]
        assert not torch.allclose(*images, atol=1e-3)
    assert {"ddim", "ddpm", "reverse_diffusion", "predictor_corrector"} <= set(taken)
    assert not {"ipndm", "dpmpp_2m", "f_pndm"} & set(taken)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.3))

    def forward(self, x, t):
        return -self.weight * x / (0.5 + t.view(-1, 1, 1, 1) ** 2)


@pytest.mark.parametrize("part", ["none", "plain", "pixel"])
@pytest.mark.parametrize("options", [{}, {"corrections": 2}, {"norms": "batch"}])
def test_captured_whole_and_by_the_stage(part, options):
    """Recorded once, replayed for other seeds, and by the stage for other numbers of steps."""
    made = None if part == "none" else random_gains(3, 8, 8, pixel=part == "pixel")
    net = Net().eval()

    def sampler(steps, capture):
        return Sampler(net, VE, solver="predictor_corrector", steps=steps, prediction="score",
                       preconditioner=made, capture=capture, **options)  # fmt: skip

    def run(steps, capture, seeds, callback=None):
        return sampler(steps, capture)(seeds=seeds, shape=(3, 8, 8), callback=callback)

    for seeds in ([1, 2], [5, 6]):
        assert torch.equal(run(3, "always", seeds), run(3, "never", seeds))
    for steps in (4, 7, 12):
        told = []
        found = run(steps, "always", [3, 4], told.append)
        assert torch.equal(found, run(steps, "never", [3, 4]))
        assert [p.call for p in told] == list(
            range(1, steps * (options.get("corrections", 1) + 1) + 1)
        )
    from fastdiff.capture import cache_of

    by_stage = [loop for loop in cache_of(net).loops.values() if len(loop.recordings) > 1]
    assert len(by_stage) == 1  # all numbers of steps
    assert len(by_stage[0].recordings) == 2 + options.get("corrections", 1)


GAINS = random_gains(3, 8, 8)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"schedule": "ve"}, {"schedule": "vp"}),
        ({"prediction": "epsilon"}, {"prediction": "sample"}),
        ({"solver": "ddim"}, {"solver": "ddim", "prediction": "sample"}),
        ({"solver": "predictor_corrector"}, {"solver": "predictor_corrector", "clip": (-1, 1)}),
        ({"solver": "predictor_corrector", "preconditioner": None},
         {"solver": "predictor_corrector", "preconditioner": None, "clip": (-1, 1)}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("steps", [3, 20])
def test_a_recorded_loop_is_not_taken_for_another(one, other, steps):
    """What a move reads, of the state or of a clipped sample, is part of the recording."""
    net = torch.nn.Conv2d(3, 3, 3, padding=1).eval().requires_grad_(False)

    def network(x, t):
        return net(x) / (1 + x.abs())

    def run(capture, schedule="ve", **options):
        told = {"solver": "reverse_diffusion", "preconditioner": GAINS} | options
        sampler = Sampler(network, SCHEDULES[schedule], steps=steps, capture=capture, **told)
        return sampler(seeds=[1, 2], shape=(3, 8, 8))

    for first, second in ((one, other), (other, one)):
        run("always", **first)
        assert torch.equal(run("always", **second), run("never", **second))


@pytest.mark.parametrize("made", [None, GAINS], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("solver", ["predictor_corrector", "reverse_diffusion"])
def test_empty_batches_come_back_empty(solver, made):
    sampler = Sampler(lambda x, t: -x, VE, solver=solver, steps=3, preconditioner=made)
    assert sampler(torch.zeros(0, 3, 8, 8), seeds=[]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("made", [None, random_gains(3, 8, 8)], ids=["plain", "preconditioned"])
@pytest.mark.parametrize("solver", ["predictor_corrector", "reverse_diffusion", "ddpm"])
def test_clipping_and_the_analytical_first_step(solver, made):
    """Clipped is what a network that clips itself gives; AFS what data N(0, 1) gives."""
    schedule, noise = NoiseSchedule.vp(), torch.randn(2, 3, 8, 8, dtype=F64)

    def run(network, **options):
        return Sampler(
            network, schedule, solver=solver, steps=4, dtype=F64, preconditioner=made, **options
        )(noise, seeds=[1, 2])

    wild = lambda x, t: 2 * x.sin()
    clipped = run(wild, prediction="sample", clip=0.7)
    wanted = run(lambda x, t: wild(x, t).clamp(-0.7, 0.7), prediction="sample")
    torch.testing.assert_close(clipped, wanted, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(clipped, run(wild, prediction="sample"))

    def normal(x, t):
        return schedule.sigma(float(t[0]) / 999) * x

    torch.testing.assert_close(run(normal, afs=True), run(normal), rtol=1e-9, atol=1e-9)


def test_guidance_and_half_precision_networks():
    made = random_gains(3, 8, 8)

    def network(x, t, label):
        return (-x.float() / (0.5 + t.view(-1, 1, 1, 1) ** 2) * (1 + label.view(-1, 1, 1, 1))).to(
            x.dtype
        )

    sampler = Sampler(network, VE, solver="predictor_corrector", steps=4, prediction="score",
                      preconditioner=made, dtype=F64)  # fmt: skip
    label, null = torch.tensor([0.2, 0.4]), torch.tensor([0.0, 0.0])
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    given = dict(seeds=[1, 2], label=label)
    guided = sampler(noise, guidance_scale=2.0, uncond={"label": null}, **given)
    # scores are linear in the label: scale 2 is twice the label
    wanted = sampler(noise, seeds=[1, 2], label=2 * label)
    torch.testing.assert_close(guided, wanted, rtol=1e-5, atol=1e-5)


def test_an_image_depends_on_its_seed_alone():
    made = random_gains(3, 8, 8)
    sampler = Sampler(
        denoiser, VE, solver="predictor_corrector", steps=6, prediction="score", preconditioner=made
    )
    both = sampler(seeds=[7, 9], shape=(3, 8, 8))
    alone = sampler(seeds=[9, 1], shape=(3, 8, 8))
    assert torch.equal(both[1], alone[0])


def test_tableaux_with_langevin_steps_print_and_store():
    from fastdiff import Tableau

    tableau = build_tableau("predictor_corrector", VE, 3, snr=0.1, norms="batch")
    assert tableau.nfe == 6 and tableau.slots == 1
    assert "s0 moves along -0.05 F, h = 0.02 (|z| / |this|)^2 per batch" in str(tableau)
    assert Tableau.from_json(tableau.to_json()) == tableau


MADE = random_gains(3, 8, 8)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: Sampler(denoiser, VE, steps=3, preconditioner=MADE), ValueError, "keep the state"),
        (lambda: Sampler(denoiser, VE, solver="ddim", steps=3, preconditioner="mask"), TypeError,
         "preconditioner must be a fastdiff.Preconditioner"),
        (lambda: Sampler(denoiser, VE, solver="ddim", steps=3, preconditioner=MADE)(
            torch.zeros(1, 3, 8, 9)), ValueError, r"noise must be \[B, 3, 8, 8\]"),
        (lambda: build_tableau("predictor_corrector", VE, 3, predictor="heun"), ValueError,
         "predictor must be one of"),
        (lambda: build_tableau("predictor_corrector", VE, 3, corrections=-1), ValueError,
         "corrections must be"),
        (lambda: build_tableau("predictor_corrector", VE, 3, corrections=0, predictor="none"),
         ValueError, "at least 1"),
        (lambda: build_tableau("predictor_corrector", VE, 3, norms="song"), ValueError, "norms"),
        (lambda: build_tableau("euler_maruyama", NoiseSchedule.flow(), 3, prediction="flow"),
         ValueError, "start must be below 1"),
        (lambda: NoiseSchedule.vp(0.0, 1.0), ValueError, "beta_min and beta_max"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_gains_of_frequency_alone_are_needed_for_nothing():
    """A pixel gain alone: D = A^2."""
    a = 1 + torch.rand(1, 4, 6, dtype=F64)
    made = Preconditioner(None, a)
    x = torch.randn(2, 3, 4, 6, dtype=F64)
    torch.testing.assert_close(made.drift(x), a.square() * x)
    moved = spectral_predictor(x, x, made.gains, torch.tensor([[0.5, 0.0]], dtype=F64))
    torch.testing.assert_close(moved, x + 0.5 * a.square() * x)
    assert isinstance(made.gains, SpectralGains)
