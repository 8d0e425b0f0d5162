"""The loop as one replay, on the CPU: recorded operations over fixed buffers."""

import functools

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.capture import LoopCache, cache_of
from fastdiff.models import load_digits
from tests.helpers.networks import STRUCTURES, Network, loops, pair, poison
from tests.helpers.schedules import LINEAR
from tests.helpers.tensors import normal


@pytest.mark.parametrize("solver", STRUCTURES)
def test_every_solver_replays_to_the_bit(solver):
    replayed, eager = pair(solver=solver)
    for seed in (1, 2, 3):
        x, seeds = normal(2, 3, 8, 8, seed=seed), [seed, seed + 10]
        if seed > 1:
            poison(replayed)
        assert torch.equal(replayed(x, seeds=seeds), eager(x, seeds=seeds))
    assert len(loops(replayed)) == 1
    assert replayed.describe()["routed"] == {} or solver == "predictor_corrector"  # its norms


def test_new_noise_schedule_guidance_and_prompt_are_copies():
    """After every intermediate was poisoned, with the loop's Python not entered again."""
    network = Network()
    schedules = [
        fastdiff.NoiseSchedule.linear_beta(),
        fastdiff.NoiseSchedule.scaled_linear_beta(),
        fastdiff.NoiseSchedule.cosine(),
    ]
    addresses = None
    for round_, schedule in enumerate(schedules):
        replayed, eager = pair(network, schedule)
        given = {
            "guidance_scale": 1.5 + round_,
            "labels": torch.tensor([round_, 3]),
            "uncond": {"labels": torch.tensor([4])},
        }
        x = normal(2, 3, 8, 8, seed=round_)
        wanted = eager(x, **given)
        if round_:
            poison(replayed)
        before = network.entered
        found = replayed(x, **given)
        assert torch.equal(found, wanted)
        assert network.entered - before == (8 if round_ == 0 else 0)  # a warm-up, the recording
        (loop,) = loops(replayed)
        now = [tensor.data_ptr() for tensor in loop.intermediates()]
        assert addresses in (None, now)
        addresses = now


def test_a_real_network_replays():
    network, _ = load_digits()
    replayed, eager = pair(network, steps=5)
    labels = torch.arange(4)
    for seed in (0, 7):
        seeds = range(seed, seed + 4)
        found = replayed(seeds=seeds, shape=(1, 8, 8), labels=labels)
        assert torch.equal(found, eager(seeds=seeds, shape=(1, 8, 8), labels=labels))


def test_wrapped_diffusers_unets_replay():
    diffusers = pytest.importorskip("diffusers")
    from tests.helpers.pipelines import unet

    denoiser = fastdiff.wrap(unet().requires_grad_(False), schedule=diffusers.DDPMScheduler())
    replayed, eager = pair(denoiser, None, solver="dpmpp_2m", clip=1.0)
    for seed in (1, 2):
        x = normal(2, 3, 8, 8, seed=seed)
        assert torch.equal(replayed(x), eager(x))


def test_the_result_is_the_callers():
    replayed, _ = pair()
    first = replayed(normal(1, 3, 8, 8))
    kept = first.clone()
    replayed(normal(1, 3, 8, 8, seed=1))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("mode", ["image", "mask", "stage_noise", "rescale", "threshold"])
def test_the_other_ways_to_call(mode):
    given, options = [], {}
    for seed in (0, 1):
        x, image = normal(2, 3, 8, 8, seed=seed), normal(2, 3, 8, 8, seed=seed + 5)
        if mode == "image":
            options, extra = {"from_image": True, "start": 600}, {"image": image}
        elif mode == "mask":
            extra = {"image": image, "mask": (normal(1, 1, 8, 8, seed=seed) > 0).float()}
        elif mode == "stage_noise":
            options = {"solver": "ddpm"}
            extra = {"stage_noise": [normal(2, 3, 8, 8, seed=seed + k) for k in range(4)]}
        elif mode == "rescale":
            extra = {"guidance_scale": torch.tensor([2.0, 3.0 + seed]), "guidance_rescale": 0.7}
        else:
            options, extra = {"dynamic_threshold": 0.9, "clip": 1.0}, {}
        given.append((x, extra))
    replayed, eager = pair(**options)
    for x, extra in given:
        assert torch.equal(replayed(x, **extra), eager(x, **extra))
    assert len(loops(replayed)) == 1


def test_weights_changed_in_place_count_and_new_ones_are_noticed():
    network = Network()
    replayed, eager = pair(network)
    x = normal(1, 3, 8, 8)
    replayed(x)
    network.last.weight.mul_(2)  # as a LoRA that is merged
    before = network.entered
    found = replayed(x)
    assert network.entered == before and torch.equal(found, eager(x))
    network.last.weight = nn.Parameter(network.last.weight.clone() * 2, requires_grad=False)
    assert torch.equal(replayed(x), eager(x)) and len(loops(replayed)) == 2
    network.first = nn.Sequential(network.first, nn.Conv2d(8, 8, 1).requires_grad_(False))
    assert torch.equal(replayed(x), eager(x)) and len(loops(replayed)) == 3


def test_what_is_a_loop_of_its_own():
    network = Network()
    replayed, eager = pair(network)
    calls = [
        (normal(1, 3, 8, 8), {}),
        (normal(2, 3, 8, 8), {}),
        (normal(2, 3, 8, 8).to(memory_format=torch.channels_last), {}),
        (normal(2, 3, 8, 8), {"labels": torch.tensor([1, 2])}),
        (normal(2, 3, 8, 8), {"guidance_scale": 2.0}),
        (normal(2, 3, 8, 8), {"guidance_scale": torch.tensor([2.0, 3.0])}),
    ]
    for again in (False, True):
        for number, (x, extra) in enumerate(calls):
            assert torch.equal(replayed(x, **extra), eager(x, **extra))
            assert len(loops(replayed)) == (len(calls) if again else number + 1)


def test_the_oldest_loops_make_room():
    cache = LoopCache(Network(), most=2)
    for key in "abc":
        cache.keep(key, f"why not {key}")
    assert list(cache.loops) == ["b", "c"] and cache.find("a") is None
    cache.find("b")  # used last
    cache.keep("d", "why not d")
    assert list(cache.loops) == ["b", "d"]


def test_a_bound_on_memory():
    network = Network()
    replayed, _ = pair(network)
    replayed(normal(1, 3, 8, 8))
    (loop,) = loops(replayed)
    assert loop.bytes > 4 * 1 * 3 * 8 * 8
    cache_of(network).memory = loop.bytes
    replayed(normal(4, 3, 8, 8))  # more than fits: it is kept alone
    assert len(loops(replayed)) == 1 and loops(replayed)[0] is not loop
    assert replayed.describe()["captured_bytes"] == loops(replayed)[0].bytes


def test_a_cache_goes_with_its_network():
    import gc
    import weakref

    replayed, eager = pair()
    replayed(normal(1, 3, 8, 8))
    gone = weakref.ref(replayed.denoiser)
    del replayed, eager
    gc.collect()
    assert gone() is None


def test_a_cache_goes_with_a_network_whose_forward_owns_it():
    import gc
    import weakref

    network = Network()
    network.forward = functools.partial(network.forward, labels=None)
    replayed, eager = pair(network)
    x = normal(1, 3, 8, 8)
    assert torch.equal(replayed(x), eager(x)) and len(loops(replayed)) == 1
    gone = weakref.ref(network)
    del network, replayed, eager
    gc.collect()
    assert gone() is None


def test_the_environment_makes_it_stepwise(monkeypatch):
    network = Network()
    replayed, eager = pair(network)
    x = normal(1, 3, 8, 8)
    wanted = eager(x)
    monkeypatch.setenv("FASTDIFF_CAPTURE", "0")
    before = network.entered
    assert torch.equal(replayed(x), wanted) and network.entered == before + 4
    assert replayed.describe()["loop"] == "eager"


def test_auto_on_a_cpu_is_stepwise():
    sampler = fastdiff.Sampler(Network(), LINEAR, steps=4)
    sampler(normal(1, 3, 8, 8))
    assert loops(sampler) == [] and sampler.describe()["loop"] == "eager"
    with pytest.raises(ValueError, match="capture must be \"auto\".*got 'sometimes'"):
        fastdiff.Sampler(Network(), LINEAR, steps=4, capture="sometimes")


def test_prepare_records():
    network = Network()
    replayed, eager = pair(network)
    labels = torch.tensor([1, 2])
    replayed.prepare((2, 3, 8, 8), labels=labels)
    assert len(loops(replayed)) == 1
    before = network.entered
    x = normal(2, 3, 8, 8)
    found = replayed(x, labels=labels)
    assert network.entered == before and torch.equal(found, eager(x, labels=labels))


def test_an_adapters_name_can_be_part_of_the_key():
    network, active = Network(), ["a"]
    sampler = fastdiff.Sampler(
        network, LINEAR, steps=4, capture="always", capture_key=lambda: active[0]
    )
    x = normal(1, 3, 8, 8)
    sampler(x)
    active[0] = "b"
    sampler(x)
    active[0] = "a"
    sampler(x)
    assert len(loops(sampler)) == 2 and network.entered == 16
