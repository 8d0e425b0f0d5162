"""k-diffusion's functions against its formulas, written out here in float64."""

import inspect
import math

import numpy as np
import pytest
import torch

from fastdiff.integrations import k_diffusion as ours

MIX = 0.3 * torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def model(x, sigma, shift=0.1):
    """A denoiser that is not linear in sigma nor in x."""
    s = sigma.to(x).view(-1, 1, 1, 1)
    return torch.tanh(torch.einsum("ij,bjhw->bihw", MIX.to(x), x) / (1 + s)) + shift * s / (2 + s)


def karras(steps, high=20.0, low=0.05, zero=True):
    root = torch.linspace(high ** (1 / 7), low ** (1 / 7), steps, dtype=torch.float64)
    return torch.cat([root**7, torch.zeros(int(zero)).double()])


def start(sigmas, dtype=torch.float64):
    noise = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    return (noise * sigmas[0]).to(dtype)


def draws(seed=2):
    generator = torch.Generator().manual_seed(seed)
    return lambda *_: torch.randn(2, 3, 5, 5, generator=generator).double()


# == The formulas ==================================================================================


def slope(x, sigma):
    return (x - at(x, sigma)) / sigma


def at(x, sigma):
    return model(x, sigma * torch.ones(len(x)).double())


def euler(x, sigmas):
    for s, u in zip(sigmas, sigmas[1:], strict=False):
        x = x + (u - s) * slope(x, s)
    return x


def heun(x, sigmas, churn=0.0, low=0.0, high=math.inf, s_noise=1.0, draw=None):
    for s, u in zip(sigmas, sigmas[1:], strict=False):
        gamma = min(churn / (len(sigmas) - 1), math.sqrt(2) - 1) if low <= s <= high else 0
        if gamma:
            hat = s * (1 + gamma)
            x, s = x + draw() * s_noise * (hat**2 - s**2).sqrt(), hat
        d = slope(x, s)
        y = x + (u - s) * d
        x = x + (u - s) * (d + slope(y, u)) / 2 if u > 0 else y
    return x


def dpm_2(x, sigmas):
    for s, u in zip(sigmas, sigmas[1:], strict=False):
        d = slope(x, s)
        if u > 0:
            m = (s * u).sqrt()
            d = slope(x + (m - s) * d, m)
        x = x + (u - s) * d
    return x


def lms(x, sigmas, order=4):
    levels, history = sigmas.numpy(), []
    for i in range(len(levels) - 1):
        history = [slope(x, sigmas[i]), *history[: order - 1]]
        nodes = levels[i::-1][: len(history)]
        for j, d in enumerate(history):  # the integral of the j-th Lagrange polynomial
            others = np.delete(nodes, j)
            primitive = (np.poly1d(others, r=True) / np.prod(nodes[j] - others)).integ()
            x = x + (primitive(levels[i + 1]) - primitive(levels[i])) * d
    return x


BLENDS = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(x, sigmas):
    history = []
    for s, u in zip(sigmas, sigmas[1:], strict=False):
        if u == 0:
            return at(x, s)
        history = [slope(x, s), *history[:3]]
        x = x + (u - s) * sum(w * d for w, d in zip(BLENDS[len(history) - 1], history, strict=True))
    return x


def dpmpp_2m(x, sigmas, eta=0.0, draw=None):
    old = before = None
    for s, u in zip(sigmas, sigmas[1:], strict=False):
        denoised = at(x, s)
        if u == 0:
            return denoised
        h = (s / u).log()
        x = (u / s) * (-h * eta).exp() * x - (-h * (1 + eta)).expm1() * denoised
        if old is not None:
            x = x - 0.5 * (-h * (1 + eta)).expm1() * (h / before) * (denoised - old)
        if eta:
            x = x + draw() * u * (-(-2 * eta * h).expm1()).sqrt()
        old, before = denoised, h
    return x


def ancestral(x, sigmas, eta, s_noise, draw):
    for s, u in zip(sigmas, sigmas[1:], strict=False):
        up = min(u, eta * u * (1 - u**2 / s**2).sqrt())
        down = (u**2 - up**2).sqrt()
        x = x + (down - s) * slope(x, s)
        if u > 0:
            x = x + draw() * s_noise * up
    return x


def lcm(x, sigmas, draw):
    for s, u in zip(sigmas, sigmas[1:], strict=False):
        x = at(x, s)
        if u > 0:
            x = x + u * draw()
    return x


CASES = {
    "euler": (ours.sample_euler, euler, {}),
    "heun": (ours.sample_heun, heun, {}),
    "dpm_2": (ours.sample_dpm_2, dpm_2, {}),
    "lms": (ours.sample_lms, lms, {}),
    "ipndm": (ours.sample_ipndm, ipndm, {}),
    "dpmpp_2m": (ours.sample_dpmpp_2m, dpmpp_2m, {}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("steps", [1, 2, 3, 6, 11])
@pytest.mark.parametrize("zero", [True, False])
def test_deterministic_functions_are_their_formulas(name, steps, zero):
    function, formula, options = CASES[name]
    sigmas = karras(steps + 1 - zero, zero=zero)
    x = start(sigmas)
    wanted = formula(x, sigmas)
    torch.testing.assert_close(
        function(model, x, sigmas, disable=True, **options), wanted, rtol=1e-9, atol=1e-9
    )
    found = function(model, x.float(), sigmas.float(), disable=True, **options)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders_of_the_multistep_functions(order):
    sigmas = karras(7)
    x = start(sigmas)
    found = ours.sample_lms(model, x, sigmas, disable=True, order=order)
    torch.testing.assert_close(found, lms(x, sigmas, order), rtol=1e-9, atol=1e-9)
    # In sigma as time DEIS is the exact multistep method; its last step takes the denoised image.
    found = ours.sample_deis(model, x, sigmas, disable=True, max_order=order)
    inner = lms(x, sigmas[:-1], order)
    torch.testing.assert_close(found, at(inner, sigmas[-2]), rtol=1e-9, atol=1e-9)


def test_the_published_uneven_weights():
    """Orders 1 and 2 are exact, the last step is denoised, and order 3 has its slips."""
    sigmas = karras(8)
    x = start(sigmas)
    found = ours.sample_ipndm_v(model, x, sigmas, disable=True, max_order=2)
    inner = lms(x, sigmas[:-1], 2)
    torch.testing.assert_close(found, at(inner, sigmas[-2]), rtol=1e-9, atol=1e-9)
    third = ours.sample_ipndm_v(model, x, sigmas, disable=True, max_order=3)
    exact = at(lms(x, sigmas[:-1], 3), sigmas[-2])
    assert 1e-6 < float((third - exact).abs().max()) < 1


@pytest.mark.parametrize("variant", ["bh1", "bh2"])
def test_unipc_ends_where_the_others_do(variant):
    """On a fine grid it comes to the same image."""
    sigmas = karras(120)
    x = start(sigmas)
    function = ours.sample_uni_pc if variant == "bh1" else ours.sample_uni_pc_bh2
    wanted = heun(x, sigmas)
    error = float((function(model, x, sigmas, disable=True) - wanted).abs().max())
    assert error < 1e-3 * float(wanted.abs().max())


@pytest.mark.parametrize("eta", [0.4, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_stochastic_functions_are_their_formulas(eta, steps):
    sigmas = karras(steps)
    x = start(sigmas)
    found = ours.sample_euler_ancestral(
        model, x, sigmas, disable=True, eta=eta, s_noise=0.9, noise_sampler=draws()
    )
    wanted = ancestral(x, sigmas, eta, 0.9, draws())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    found = ours.sample_dpmpp_2m_sde(model, x, sigmas, disable=True, eta=eta, noise_sampler=draws())
    torch.testing.assert_close(found, dpmpp_2m(x, sigmas, eta, draws()), rtol=1e-9, atol=1e-9)
    found = ours.sample_lcm(model, x, sigmas, disable=True, noise_sampler=draws())
    torch.testing.assert_close(found, lcm(x, sigmas, draws()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bounds", [(0.0, math.inf), (0.2, 5.0)])
def test_churn(bounds):
    sigmas = karras(8)
    x = start(sigmas)
    options = dict(zip(("s_tmin", "s_tmax"), bounds, strict=True), s_churn=3.0, s_noise=1.003)
    found = ours.sample_heun(model, x, sigmas, disable=True, noise_sampler=draws(), **options)
    wanted = heun(x, sigmas, 3.0, *bounds, 1.003, draws())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    one = ours.sample_euler(model, x, sigmas, disable=True, noise_sampler=draws(), **options)
    assert one.isfinite().all() and not torch.allclose(one, found)


def test_noise_comes_from_torchs_generator():
    sigmas = karras(5)
    x = start(sigmas)
    torch.manual_seed(3)
    first = ours.sample_euler_ancestral(model, x, sigmas, disable=True)
    torch.manual_seed(3)
    wanted = ancestral(x, sigmas, 1.0, 1.0, lambda: torch.randn_like(x))
    torch.testing.assert_close(first, wanted, rtol=1e-9, atol=1e-9)


def test_noise_samplers_are_told_the_interval():
    sigmas, seen = karras(4), []

    def sampler(sigma, sigma_next):
        seen.append((float(sigma), float(sigma_next)))
        return torch.zeros(2, 3, 5, 5)

    ours.sample_euler_ancestral(model, start(sigmas), sigmas, disable=True, noise_sampler=sampler)
    assert seen == [(float(a), float(b)) for a, b in zip(sigmas, sigmas[1:-1], strict=False)]


def test_churned_noise_is_told_its_own_interval():
    sigmas, seen = torch.tensor([10.0, 5.0, 2.0, 1.0, 0.0]), []

    def sampler(sigma, sigma_next):
        seen.append((float(sigma), float(sigma_next)))
        return torch.zeros(2, 3, 5, 5)

    for function in (ours.sample_euler, ours.sample_heun):
        seen.clear()
        function(model, start(sigmas), sigmas, disable=True, s_churn=2.0, s_tmax=3.0,
                 noise_sampler=sampler)  # fmt: skip
        assert seen == [(2.0, 1.0), (1.0, 0.0)]


# == The interface =================================================================================


@pytest.mark.parametrize("name", sorted(vars(ours)))
def test_signatures_begin_as_k_diffusions_do(name):
    if name.startswith("sample_"):
        first = list(inspect.signature(getattr(ours, name)).parameters)[:6]
        assert first == ["model", "x", "sigmas", "extra_args", "callback", "disable"]


@pytest.mark.parametrize("name", ["euler", "heun", "ipndm", "dpmpp_2m"])
def test_callbacks_see_each_step(name):
    sigmas, seen = karras(4), []
    x = start(sigmas)

    def callback(info):
        assert set(info) == {"x", "i", "sigma", "sigma_hat", "denoised"}
        assert torch.equal(info["denoised"], at(info["x"], info["sigma_hat"].double()))
        seen.append((info["i"], float(info["sigma"])))

    function = getattr(ours, f"sample_{name}")
    wanted = function(model, x, sigmas, disable=True)
    # Whole numbers in float32, so that the time the model is told is the sigma exactly.
    found = function(lambda x, s: at(x, s[0].double()), x, sigmas, None, callback, True)
    assert seen == list(enumerate(sigmas[:-1].tolist()))
    torch.testing.assert_close(found, wanted)


def test_extra_arguments_reach_the_model():
    sigmas = karras(3)
    x = start(sigmas)
    plain = ours.sample_euler(model, x, sigmas, disable=True)
    shifted = ours.sample_euler(model, x, sigmas, {"shift": 0.5}, disable=True)
    assert not torch.allclose(plain, shifted)
    torch.testing.assert_close(
        shifted, ours.sample_euler(lambda x, s: model(x, s, 0.5), x, sigmas, disable=True)
    )


def test_sigmas_are_read_once():
    """None is read between the first evaluation and the end."""

    class Counted(torch.Tensor):
        reads = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__bool__,
                            torch.Tensor.__float__):  # fmt: skip
                cls.reads += 1
            return super().__torch_function__(function, types, args, kwargs or {})

    sigmas = karras(6).as_subclass(Counted)
    for name in ("sample_euler", "sample_ipndm", "sample_dpmpp_2m"):
        Counted.reads = 0
        getattr(ours, name)(model, start(karras(6)), sigmas, disable=True)
        assert Counted.reads == 1, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype):
    sigmas, seen = karras(6), set()

    def half(x, sigma):
        seen.update((x.dtype, sigma.dtype))
        return model(x.float(), sigma).to(dtype)

    found = ours.sample_ipndm(half, start(sigmas, dtype), sigmas.float(), disable=True)
    wanted = ipndm(start(sigmas), sigmas)
    assert found.dtype == dtype and seen == {dtype}
    assert float((found.double() - wanted).abs().max()) < 10 * torch.finfo(dtype).eps


def test_a_bar_is_shown_unless_disabled(capsys):
    sigmas = karras(3)
    ours.sample_ipndm(model, start(sigmas), sigmas, disable=False)
    assert "3/3" in capsys.readouterr().err
    ours.sample_ipndm(model, start(sigmas), sigmas, disable=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "x, sigmas, error, words",
    [
        (3, karras(3), TypeError, "x must be a floating-point tensor.*got int"),
        (torch.zeros(2, 3, dtype=torch.int64), karras(3), TypeError, "got torch.int64"),
        (torch.zeros(2), [3.0, 1.0], ValueError, r"sigmas must be a tensor \[N \+ 1\].*got list"),
        (torch.zeros(2), torch.ones(1), ValueError, r"got \(1,\)"),
        (torch.zeros(2), torch.tensor([1.0, 2.0]), ValueError, "decrease strictly"),
        (torch.zeros(2), torch.tensor([math.inf, 2.0]), ValueError, "finite"),
        (torch.zeros(2), torch.tensor([1.0, -1.0]), ValueError, "not go below 0"),
    ],
)
def test_bad_input_is_named(x, sigmas, error, words):
    with pytest.raises(error, match=words):
        ours.sample_ipndm(model, x, sigmas)


def test_bad_options_are_named():
    sigmas = karras(3)
    with pytest.raises(TypeError, match="s_churn"):
        ours.sample_ipndm(model, start(sigmas), sigmas, s_churn=1.0)
    with pytest.raises(ValueError, match="variant"):
        ours.sample_uni_pc(model, start(sigmas), sigmas, variant="bh3")


# == The package itself ============================================================================


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "lms", "dpmpp_2m"])
def test_against_the_package(name):
    theirs = pytest.importorskip("k_diffusion.sampling")
    sigmas = karras(8).float()
    x = start(sigmas, torch.float32)
    wanted = getattr(theirs, f"sample_{name}")(model, x, sigmas, disable=True)
    found = getattr(ours, f"sample_{name}")(model, x, sigmas, disable=True)
    torch.testing.assert_close(found, wanted, rtol=5e-5, atol=5e-5)
