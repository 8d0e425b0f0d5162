"""CUDA graphs of whole loops; skipped where there is no GPU."""

from functools import partial

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.capture import CudaRecording, Loop, cache_of
from fastdiff.models import load_digits
from tests.helpers import networks
from tests.helpers.networks import loops_of
from tests.helpers.schedules import LINEAR

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
# What is not done by the fused launch even so, counted where a loop is recorded.
ROUTED = {"predictor_corrector": {"length of a Langevin step found by PyTorch"}}


@pytest.fixture(autouse=True)
def _deterministic():
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
        yield


def digits():
    return load_digits()[0].cuda().requires_grad_(False)


pair = partial(networks.pair, steps=5)


def call(sampler, seed=0, **extra):
    labels = torch.arange(4, device="cuda")
    return sampler(seeds=range(seed, seed + 4), shape=(1, 8, 8), labels=labels, **extra)


@pytest.mark.parametrize("solver", fastdiff.solver_names())
def test_captured_is_eager_to_the_bit(solver):
    replayed, eager = pair(digits(), solver=solver)
    for seed in (0, 5, 9):
        assert torch.equal(call(replayed, seed), call(eager, seed))
    (loop,) = loops_of(replayed.denoiser)
    assert isinstance(loop.recordings[0], CudaRecording)
    assert set(replayed.describe()["routed"]) == ROUTED.get(solver, set())


def test_another_schedule_and_guidance_are_copies():
    network = digits()
    for number, schedule in enumerate((LINEAR, fastdiff.NoiseSchedule.cosine())):
        replayed, eager = (
            fastdiff.Sampler(network, schedule, steps=5, capture=capture)
            for capture in ("always", "never")
        )
        extra = {"guidance_scale": 2.0 + number, "uncond": {"labels": torch.tensor([10]).cuda()}}
        torch.testing.assert_close(call(replayed, **extra), call(eager, **extra), rtol=0, atol=0)
    assert len(loops_of(network)) == 1


@pytest.mark.parametrize("solver", fastdiff.solver_names())
def test_a_stage_serves_every_number_of_steps(solver):
    """With a callback: to the bit, by one recording, whatever the callback allocates."""
    network = digits()

    def watched(sampler, seed):
        states = []
        call(sampler, seed, callback=lambda p: states.append(p.state.clone()))
        return states

    for steps in (20, 10, 12):
        replayed, eager = pair(network, solver=solver, steps=steps)
        states, told = watched(replayed, steps), watched(eager, steps)
        assert len(states) == len(told) and all(map(torch.equal, states, told))
        assert torch.equal(call(replayed, 5), call(eager, 5))
        assert set(replayed.describe()["routed"]) <= ROUTED.get(solver, set())
    kinds = 2 if solver == "predictor_corrector" else 1  # of stages, each recorded
    assert sum(len(loop.recordings) == 1 + kinds for loop in loops_of(network)) == 1


def test_a_stage_beside_whole_loops_in_one_pool():
    network = digits()
    (short, eager), (long, long_eager) = pair(network), pair(network, steps=30)
    for seed in (0, 4, 8):
        assert torch.equal(call(short, seed), call(eager, seed))
        assert torch.equal(call(long, seed), call(long_eager, seed))
    assert sorted(len(loop.recordings) for loop in loops_of(network)) == [1, 2]
    inner = []
    found = call(long, 3, callback=lambda p: inner.append(call(short, 5)))
    assert torch.equal(found, call(long_eager, 3))
    assert all(torch.equal(sample, call(eager, 5)) for sample in inner)


def test_weights_in_place_and_replaced():
    network = digits()
    replayed, eager = pair(network)
    call(replayed)
    for parameter in network.parameters():
        parameter.mul_(1.01)
    assert torch.equal(call(replayed), call(eager)) and len(loops_of(network)) == 1
    network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)
    assert torch.equal(call(replayed), call(eager)) and len(loops_of(network)) == 2


@pytest.mark.parametrize("ours_first", [False, True])
def test_graphs_of_others_under_inference_mode(ours_first):
    """Theirs before ours, or after: all are captured and replay, in their modes."""
    replayed, eager = pair(digits())
    if ours_first:
        call(replayed)
    x, theirs = torch.ones(4, device="cuda"), []
    # After a first one of theirs in inference mode torch refuses them any other.
    for inference in (True, False) if ours_first else (True,):
        theirs.append((torch.cuda.CUDAGraph(), inference))
        with torch.inference_mode(inference), torch.cuda.graph(theirs[-1][0]):
            y = x + 1
    for seed in (0, 5):
        assert torch.equal(call(replayed, seed), call(eager, seed))
    (loop,) = loops_of(replayed.denoiser)
    assert isinstance(loop.recordings[0], CudaRecording)
    for graph, inference in theirs:
        with torch.inference_mode(inference):
            graph.replay()
    assert torch.equal(y, x + 1)


def test_replays_survive_an_emptied_cache_and_other_allocations():
    replayed, eager = pair(digits())
    call(replayed)
    torch.cuda.empty_cache()
    waste = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(64)]
    del waste
    assert torch.equal(call(replayed, 3), call(eager, 3))


def test_a_network_that_waits_for_the_host_finishes_stepwise():
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t):
            return x * self.scale.item()

    network = Reading().cuda().requires_grad_(False)
    replayed, eager = pair(network)
    x = torch.randn(2, 3, 8, 8, device="cuda")
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="the loop is not captured"):
        found = replayed(x)
    # A capture that broke off leaves nothing behind: stream, generator, allocator.
    assert torch.cuda.current_stream() == stream
    assert torch.randn(4, device="cuda").isfinite().all()
    torch.cuda.empty_cache()
    assert torch.equal(found, eager(x)) and torch.equal(replayed(x), eager(x))
    assert fastdiff.check_capturable(network.cpu(), x.cpu(), torch.zeros(2)) != []


def test_a_compiled_network_is_captured_as_it_runs():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x, t):
            return torch.tanh(self.inner(x)) + t[:, None, None, None] / 1000

    module = Small().cuda().requires_grad_(False)
    replayed, eager = pair(torch.compile(module, fullgraph=True, dynamic=False))
    for seed in (0, 1):
        x = torch.randn(
            2, 3, 8, 8, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)
        )
        assert torch.equal(replayed(x), eager(x))
    (loop,) = loops_of(replayed.denoiser)
    assert isinstance(loop.recordings[0], CudaRecording)
    assert replayed.describe()["routed"] == {}


def test_auto_measures_once_and_says_so():
    network = digits()
    sampler = fastdiff.Sampler(network, LINEAR, steps=5)
    first = call(sampler)
    assert sampler.describe()["loop"] == "captured" and torch.equal(first, call(sampler))
    (kept,) = cache_of(network).loops.values()
    assert isinstance(kept, (Loop, str))


def test_a_callers_own_capture_is_left_alone():
    replayed, eager = pair(digits())
    noise = torch.randn(4, 1, 8, 8, device="cuda")
    labels = torch.arange(4, device="cuda")
    eager(noise, labels=labels)  # tables and kernels
    replayed(noise, labels=labels)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = replayed(noise, labels=labels)
    graph.replay()
    assert torch.equal(found, eager(noise, labels=labels))
