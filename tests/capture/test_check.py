"""check_capturable finds each planted offender at its line, and nothing in clean networks."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fastdiff
from fastdiff.capture import check as kinds
from fastdiff.capture.check import DeviceTensor, check_capturable
from fastdiff.models import load_digits
from tests.helpers.networks import STRUCTURES

pytestmark = pytest.mark.filterwarnings("ignore")


class Nested(nn.Module):
    """A network with something two modules deep."""

    def __init__(self, inner):
        super().__init__()
        self.before, self.after = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.middle = nn.Sequential(nn.SiLU(), Block(inner))

    def forward(self, x):
        return self.after(self.middle(self.before(x)))


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.norm = inner, nn.GroupNorm(2, 8)

    def forward(self, x):
        return self.inner(self.norm(x))


# == Offenders; the line that is to be found ends in a mark ========================================


def item(x):
    return x * x.abs().max().item()  # <- scalar read


def branch(x):
    if x.mean() > 0:  # <- scalar read
        return x + 1
    return x - 1


def listed(x):
    return x * sum(x.flatten()[:2].tolist())  # <- scalar read


class Counting(nn.Module):
    """A position taken from a tensor, as stock schedulers look their step up."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.arange(10))

    def forward(self, x):
        place = (self.steps == 3).nonzero()  # <- data-dependent shape
        return x + place.sum()


def masked(x):
    return x + x[x > 0].sum()  # <- data-dependent shape


def assigned(x):
    y = x.clone()
    y[y[:, 0, 0, 0] < 0] = x[0]  # <- data-dependent shape
    return y


def unique(x):
    return x + torch.unique(x.round()).sum()  # <- data-dependent shape


def fetched(x):
    return x + x.mean().cpu().to(x.device)  # <- host copy


def uploaded(x):
    return x * torch.tensor([2.0], device=x.device)  # <- host copy


class Table(nn.Module):
    """A table that is no buffer: it stays where it was made."""

    def __init__(self):
        super().__init__()
        self.table = torch.linspace(0, 1, 4)

    def forward(self, x):
        return x * self.table.to(x.device).mean()  # <- host copy


def moved(x):
    return x + torch.zeros(3, 1, 1).to(x.device)  # <- host copy


class Cached(nn.Module):
    """Keeps its last result and blends with it."""

    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        last, self.last = self.last, x.clone()
        return x if last is None else x + last  # <- storage of an earlier run


kept = {}


def remembered(x):
    y = x * 2
    z = y + kept.get("y", y)  # <- storage of an earlier run
    kept["y"] = y
    return z


def drawn(x):
    return x + torch.randn(x.shape[-1:]).sum().item()  # <- host randomness


def generator(x):
    own = torch.Generator().manual_seed(0)
    return x + torch.randn(x.shape, generator=own, device="cpu").mean().item()  # <- host randomness


def python_random(x):
    return x * random.random()  # <- a number that changes


class Dropped(nn.Module):
    """Draws its probability from NumPy."""

    def forward(self, x):
        return x * float(np.random.rand())  # <- a number that changes


class Stepping(nn.Module):
    """Counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        return x / self.calls  # <- a number that changes


def mixed(x):
    return torch.cat([x, torch.zeros(x.shape)])  # <- CPU tensor among device tensors


OFFENDERS = [
    item, branch, listed, Counting, masked, assigned, unique, fetched, uploaded, Table, moved,
    Cached, remembered, drawn, generator, python_random, Dropped, Stepping, mixed,
]  # fmt: skip
SOURCE = Path(__file__).read_text().splitlines()


def marked(offender):
    """The kind and line of the mark that follows an offender's definition."""
    for keyword in ("def", "class"):
        for number, line in enumerate(SOURCE):
            if line.startswith(f"{keyword} {offender.__name__}("):
                while "# <- " not in SOURCE[number]:
                    number += 1
                return SOURCE[number].partition("# <- ")[2], number + 1
    raise AssertionError(offender)


@pytest.mark.parametrize("offender", OFFENDERS, ids=lambda o: o.__name__)
def test_an_offender_is_found_at_its_line(offender):
    kind, line = marked(offender)
    fn = offender() if isinstance(offender, type) else offender
    found = check_capturable(fn, torch.randn(2, 3, 8, 8))
    assert (kind, __file__, line) in [(f.kind, f.file, f.line) for f in found], found
    assert all(f.line == line for f in found), found  # and nowhere else
    assert str(found[0]).startswith(f"{__file__}:{line} in ")


@pytest.mark.parametrize(
    "offender",
    [Counting, Table, Cached, Dropped, Stepping, item, masked, uploaded],
    ids=lambda o: o.__name__,
)
def test_an_offender_deep_inside_a_network_is_found(offender):
    class Inner(nn.Module):
        def forward(self, x):
            return offender(x)

    kind, line = marked(offender)
    inner = offender() if isinstance(offender, type) else Inner()
    network = Nested(inner).eval()
    before = {name: p.data_ptr() for name, p in network.named_parameters()}
    found = check_capturable(network, torch.randn(2, 3, 8, 8))
    assert (kind, line) in [(f.kind, f.line) for f in found], found
    assert {name: p.data_ptr() for name, p in network.named_parameters()} == before
    assert all(isinstance(p, nn.Parameter) for p in network.parameters())


def test_kinds_are_all_planted_twice():
    planted = [marked(offender)[0] for offender in OFFENDERS]
    every = [v for k, v in vars(kinds).items() if k.isupper() and isinstance(v, str)
             and not k.startswith("_")]  # fmt: skip
    assert set(planted) == set(every) and len(planted) >= 15
    assert all(planted.count(kind) >= 2 for kind in every if kind != kinds.MIXED)


# == Clean networks ================================================================================


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Conv2d(3, 24, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        q, k, v = self.qkv(x).flatten(2).transpose(1, 2)[:, None].chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y[:, 0].transpose(1, 2).unflatten(2, x.shape[2:]))


class Lazy(nn.Module):
    """Makes a table at its first call, which the warm-up is for."""

    table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.tensor([1.0, 2.0, 3.0], device=x.device).view(3, 1, 1)
        return x * self.table


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running", torch.zeros(3, 1, 1))

    def forward(self, x):
        self.running.mul_(0.9).add_(x.mean((0, 2, 3)).view(3, 1, 1))
        y = x.clone()
        y[:, 0] = self.running[0]
        y.view(-1)[:2].zero_()
        return torch.where(y > 0, y, -y)


CLEAN = {
    "conv": lambda: nn.Conv2d(3, 3, 3, padding=1),
    "nested": lambda: Nested(nn.Conv2d(8, 8, 1)),
    "attention": Attention,
    "lazy": Lazy,
    "in place": InPlace,
    "batch norm": lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Upsample(2)),
    "dropout on the device": lambda: nn.Dropout(0.5).train(),
    "fft": lambda: lambda x: torch.fft.irfft2(torch.fft.rfft2(x) * 2, s=x.shape[-2:]),
    "factories": lambda: lambda x: x + torch.arange(8, device=x.device) * torch.randn_like(x),
    "gather": lambda: lambda x: x[:, torch.ones(2, dtype=torch.int64, device=x.device)].sum(1),
    "multihead": lambda: _Heads(),
    "digits": lambda: _Digits(),
}


class _Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        y = x.flatten(0, 1)
        return self.attention(y, y, y, need_weights=False)[0]


class _Digits(nn.Module):
    def __init__(self):
        super().__init__()
        self.unet = load_digits()[0]

    def forward(self, x):
        return self.unet(x[:, :1], torch.full((len(x),), 5.0, device=x.device))


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_network_gives_no_alarm(name):
    network = CLEAN[name]()
    if isinstance(network, nn.Module) and name != "dropout on the device":
        network.eval()
    assert check_capturable(network, torch.randn(2, 3, 8, 8)) == []


def test_values_are_computed():
    """The stand-in tensors hold the true results."""
    network, seen = Nested(nn.Conv2d(8, 8, 1)).eval(), []
    x = torch.randn(2, 3, 8, 8)
    check_capturable(lambda x: seen.append(network(x)), x, modules=[network])
    assert isinstance(seen[-1], DeviceTensor) and seen[-1].device.type == "meta"
    with torch.no_grad():
        assert torch.equal(seen[-1].value, network(x))


def test_errors_of_the_function_come_through():
    network = nn.Conv2d(3, 3, 3)
    weight = network.weight
    with pytest.raises(RuntimeError, match="channels"):
        check_capturable(network, torch.randn(1, 4, 8, 8))
    assert network.weight is weight


# == Samplers ======================================================================================


def stock_loop(scheduler, steps=4):
    """diffusers' own stepping, with timesteps on the device, as pipelines have them."""

    def loop(x):
        scheduler.set_timesteps(steps)
        for t in DeviceTensor(scheduler.timesteps, kinds.GIVEN):
            x = scheduler.step(0.1 * x, t, x).prev_sample
        return x

    return loop


@pytest.mark.parametrize("name", ["PNDMScheduler", "UniPCMultistepScheduler"])
def test_host_reads_of_stock_schedulers_are_named(name):
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)()
    found = check_capturable(stock_loop(scheduler), torch.randn(1, 3, 8, 8))
    assert found and all("diffusers" in f.file for f in found)
    assert {f.kind for f in found} & {kinds.SCALAR_READ, kinds.HOST_COPY}


@pytest.mark.parametrize("mode", ["guidance", "rescale", "image", "mask", "threshold", "noise"])
def test_the_other_ways_to_call_are_clean(mode):
    """With the guidance scale on the device, as a captured loop has it."""
    network = Nested(nn.Conv2d(8, 8, 1)).eval().requires_grad_(False)
    x, scale = torch.randn(2, 3, 8, 8), torch.tensor([2.0, 3.0])
    options, given = {
        "guidance": ({}, {"guidance_scale": scale}),
        "rescale": ({}, {"guidance_scale": scale, "guidance_rescale": 0.5}),
        "image": ({"from_image": True, "start": 600}, {"image": x}),
        "mask": ({}, {"image": x, "mask": torch.ones(1, 1, 8, 8)}),
        "threshold": ({"dynamic_threshold": 0.9, "clip": 1.0}, {}),
        "noise": ({"solver": "ddpm"}, {"stage_noise": [x, x, x, x]}),
    }[mode]
    schedule = fastdiff.NoiseSchedule.linear_beta()
    sampler = fastdiff.Sampler(lambda x, t: network(x), schedule, steps=4, **options)
    assert check_capturable(sampler, x, modules=[network], **given) == []


@pytest.mark.parametrize("solver", STRUCTURES)
def test_every_structure_is_clean(solver):
    network = Nested(nn.Conv2d(8, 8, 1)).eval().requires_grad_(False)
    denoiser = fastdiff.wrap(lambda x, t: network(x), prediction="epsilon")
    schedule = fastdiff.NoiseSchedule.linear_beta()
    sampler = fastdiff.Sampler(denoiser, schedule, solver=solver, steps=5)
    seeds = torch.tensor([1, 2])
    found = check_capturable(sampler, torch.randn(2, 3, 8, 8), seeds=seeds, modules=[network])
    assert found == []


@pytest.mark.parametrize("prediction", ["score", "v_prediction"])
@pytest.mark.parametrize("pixel", [False, True])
def test_preconditioned_loops_are_clean(pixel, prediction):
    gain = 1 + torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0)) / 4
    made = fastdiff.Preconditioner(torch.full((1, 8, 8), 1.1), gain if pixel else None)
    sampler = fastdiff.Sampler(
        lambda x, t: -x, fastdiff.NoiseSchedule.vp(), solver="predictor_corrector", steps=3,
        prediction=prediction, preconditioner=made,
    )  # fmt: skip
    noise, seeds = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    assert fastdiff.check_capturable(lambda x, s: sampler(x, seeds=s), noise, seeds) == []
