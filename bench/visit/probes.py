"""Doubts about the machine and about torch, each answered in at most five seconds.

A probe returns what it found, in words or numbers, and raises where the doubt was right. Nothing of
them is timed for publication. They also run on a stand-in for a GPU, where most prove nothing.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fastdiff

Found = str | dict[str, Any]
SCHEDULE = fastdiff.NoiseSchedule.linear_beta()


class Small(nn.Module):
    """A convolution, attention and the time: what a network's replay has to repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 16, 3, padding=1)
        self.outer = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.inner(x)) + t.view(-1, 1, 1, 1) / 1000
        rows = h.flatten(2).transpose(1, 2)
        h = nn.functional.scaled_dot_product_attention(rows, rows, rows).transpose(1, 2).view_as(h)
        return self.outer(h)


def network(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return Small().to(device).requires_grad_(False)


def pair(net: nn.Module, **options: Any) -> tuple[fastdiff.Sampler, fastdiff.Sampler]:
    """The same loop captured and eager."""
    captured, eager = (
        fastdiff.Sampler(net, SCHEDULE, steps=4, capture=capture, **options)
        for capture in ("always", "never")
    )
    return captured, eager


def same(captured: fastdiff.Sampler, eager: fastdiff.Sampler, x: torch.Tensor) -> None:
    """Raise unless a loop is captured, silently, and makes the eager loop's bits."""
    with warnings.catch_warnings(), deterministic_convolutions():
        warnings.filterwarnings("error", message="the loop is not captured")
        found, wanted = captured(x), eager(x)
    difference = float((found - wanted).abs().max())
    assert difference == 0, f"captured differs from eager by {difference:.1e}"


def deterministic_convolutions() -> Any:
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True)


def images(device: torch.device) -> torch.Tensor:
    return torch.randn(2, 4, 16, 16, device=device)


def generator(device: torch.device) -> Found:
    """Beside a living graph of another, made under inference_mode with random numbers."""
    x = images(device)
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        y = x + torch.rand_like(x)
    same(*pair(network(device)), x)
    with torch.inference_mode():
        graph.replay()
    assert bool(y.isfinite().all())
    return "captured beside it"


def broken_capture(device: torch.device) -> Found:
    """A capture that reads on the host breaks off: is everything usable after it?"""

    class Reads(Small):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(x, t) * float(x.mean().item() * 0 + 1)

    torch.manual_seed(0)
    reads, x = Reads().to(device).requires_grad_(False), images(device)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pair(reads)[0](x)
    assert any("not captured" in str(w.message) for w in told), "no warning said that it broke off"
    pinned = torch.empty(1 << 20, pin_memory=True).to(device, non_blocking=True)
    assert torch.randn(4, device=device).isfinite().all().item()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    same(*pair(network(device)), x)
    return f"usable, {pinned.numel()} pinned numbers copied"


def profiler(device: torch.device) -> Found:
    """Whether one profile slows the launches that come after it in the same process."""
    x = torch.zeros(64, device=device)

    def launches_us() -> float:
        found = []
        for _ in range(7):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            for _ in range(1000):
                x.add_(1)
            torch.cuda.synchronize()
            found.append((time.perf_counter() - begun) * 1e3)
        return statistics.median(found)

    launches_us()
    before = launches_us()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
        x.add_(1)
    return {"us_a_launch_before": round(before, 3), "after": round(launches_us(), 3)}


def compiled_bits(device: torch.device) -> Found:
    """A network of convolution and attention: eager, on a side stream, and replayed: equal bits?"""
    net, x, t = network(device), images(device), torch.full((2,), 10.0, device=device)
    with torch.inference_mode(), deterministic_convolutions():
        wanted = net(x, t)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            beside = net(x, t)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = net(x, t)
        graph.replay()
        torch.cuda.synchronize()
    assert torch.equal(beside, wanted), "a side stream gives other bits"
    assert torch.equal(found, wanted), "a replay gives other bits"
    return "equal on a side stream and replayed"


def workspace(device: torch.device) -> Found:
    """Two loops in one pool, products in both: does a replay of one leave the other's bits?"""

    class Linear(Small):
        def __init__(self) -> None:
            super().__init__()
            self.wide = nn.Linear(256, 256)

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return super().forward(self.wide(x.flatten(2)).view_as(x), t)

    torch.manual_seed(0)
    net, x = Linear().to(device).requires_grad_(False), images(device)
    (one, one_eager), (two, two_eager) = pair(net), pair(net, solver="ipndm")
    for _ in range(2):
        same(one, one_eager, x)
        same(two, two_eager, x)
        torch.mm(torch.randn(512, 512, device=device), torch.randn(512, 512, device=device))
    return "A, B, A, B: bits of the eager loops"


def transforms(device: torch.device) -> Found:
    """cuFFT's real transforms of odd sizes in float64, against the CPU's complex ones."""
    worst = 0.0
    for height, width in ((1, 1), (101, 37), (257, 31), (96, 128), (5, 7)):
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        wanted = torch.fft.fft2(x)[..., : width // 2 + 1]
        found = torch.fft.rfft2(x.to(device))
        worst = max(worst, float((found.cpu() - wanted).norm() / wanted.norm()))
        back = torch.fft.irfft2(found, s=(height, width)).cpu()
        worst = max(worst, float((back - x).norm() / x.norm()))
    assert worst < 1e-14, f"a transform is off by {worst:.1e}"
    return {"worst_error": worst}


def haar(device: torch.device) -> Found:
    """Every Haar op once against its definition."""
    from fastdiff import _ext

    if not _ext.HAS_CUDA:
        return f"no CUDA kernels: {_ext.reason or _ext.build_info()}"
    return defined(device, "haar")


def launches(device: torch.device) -> Found:
    """The first launches of every Triton kernel against its definition."""
    return defined(device, "multistep_step", "weighted_sums", "seeded_noise", "spectral_filter",
                   "spectral_update")  # fmt: skip


def defined(device: torch.device, *names: str) -> Found:
    """The gate of every row at its smallest size; how many there are."""
    from ..gates import gate_of
    from ..registry import named

    counts = {}
    for name in names:
        cases = sorted(named(name).cases(device, False), key=lambda case: -math.prod(case.shape))
        smallest = {case.row: case for case in cases}
        for gate in map(gate_of, smallest.values()):
            assert gate["ok"], (name, gate)
        counts[name] = len(smallest)
    return counts


def deterministic(device: torch.device) -> Found:
    """Deterministic mode fills fresh memory: launches of a split with and without."""
    from fastdiff import _ext
    from fastdiff.ops import haar_split

    from ..measure import launches as counted

    if not _ext.HAS_CUDA:
        return "no CUDA kernels"
    x, found = torch.randn(2, 3, 64, 64, device=device), {}
    haar_split(x, 3)
    for fill in (False, True):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        try:
            found[f"fill {fill}"] = counted(lambda _: haar_split(x, 3), device)
        finally:
            torch.use_deterministic_algorithms(False)
    return found


ANYWHERE = ("transforms", "haar", "launches")  # probes that also mean something on a CPU
PROBES: dict[str, Callable[[torch.device], Found]] = {
    function.__name__: function
    for function in (generator, broken_capture, profiler, compiled_bits, workspace, transforms,
                     haar, launches, deterministic)
}  # fmt: skip
