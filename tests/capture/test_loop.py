"""The loop as one replay, on the CPU: recorded operations over fixed buffers."""

import functools
import threading

import numpy as np
import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.capture import Loop, LoopCache, cache_of
from fastdiff.models import load_digits


class Network(nn.Module):
    """Convolutions, a time embedding and a label; counts how often its Python is entered."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.norm, self.time, self.label = nn.GroupNorm(2, 8), nn.Linear(1, 8), nn.Embedding(5, 8)
        self.requires_grad_(False)
        self.entered = 0

    def forward(self, x, t, labels=None):
        self.entered += 1
        h = self.first(x) + self.time((t[:, None] / 1000).to(x.dtype))[:, :, None, None]
        if labels is not None:
            h = h + self.label(labels)[:, :, None, None]
        return self.last(nn.functional.silu(self.norm(h)))


SCHEDULE = fastdiff.NoiseSchedule.linear_beta()


def pair(network=None, schedule=SCHEDULE, **options):
    """The same sampler with and without replays."""
    network = Network() if network is None else network
    options = {"steps": 4} | options
    return tuple(
        fastdiff.Sampler(network, schedule, capture=capture, **options)
        for capture in ("always", "never")
    )


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def loops(sampler):
    return [v for v in cache_of(sampler.denoiser).loops.values() if isinstance(v, Loop)]


def poison(sampler):
    """NaN into everything that the recorded operations made."""
    for loop in loops(sampler):
        for tensor in loop.intermediates():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            else:
                tensor.fill_(1)


@pytest.mark.parametrize("solver", fastdiff.solver_names())
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
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval().requires_grad_(False)  # fmt: skip
    denoiser = fastdiff.wrap(unet, schedule=diffusers.DDPMScheduler())
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
    cache = LoopCache(most=2)
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
    sampler = fastdiff.Sampler(Network(), SCHEDULE, steps=4)
    sampler(normal(1, 3, 8, 8))
    assert loops(sampler) == [] and sampler.describe()["loop"] == "eager"
    with pytest.raises(ValueError, match="capture must be \"auto\".*got 'sometimes'"):
        fastdiff.Sampler(Network(), SCHEDULE, steps=4, capture="sometimes")


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
        network, SCHEDULE, steps=4, capture="always", capture_key=lambda: active[0]
    )
    x = normal(1, 3, 8, 8)
    sampler(x)
    active[0] = "b"
    sampler(x)
    active[0] = "a"
    sampler(x)
    assert len(loops(sampler)) == 2 and network.entered == 16


# == Stage by stage ================================================================================


def watched(sampler, x, **given):
    """The result, and all that a callback was told."""
    seen = []
    note = lambda p: seen.append((p.call, p.calls, p.time, p.state.clone()))
    return sampler(x, callback=note, **given), seen


def same(found, wanted):
    (result, seen), (other, told) = found, wanted
    return torch.equal(result, other) and all(
        a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(seen, told, strict=True)
    )


@pytest.mark.parametrize("solver", fastdiff.solver_names())
def test_a_stage_serves_every_number_of_steps(solver):
    """With a callback the network's Python is not entered again, whatever the schedule."""
    network = Network()
    options = {"guidance_scale": 2.0, "labels": torch.tensor([1, 2])}
    options["uncond"] = {"labels": torch.tensor([4])}
    kept = None
    kinds = 2 if solver == "predictor_corrector" else 1  # of stages, each recorded
    for steps, schedule in ((20, SCHEDULE), (10, SCHEDULE), (12, fastdiff.NoiseSchedule.cosine())):
        replayed, eager = pair(network, schedule, solver=solver, steps=steps)
        x, seeds = normal(2, 3, 8, 8, seed=steps), [steps, 3]
        wanted = watched(eager, x, seeds=seeds, **options)
        if kept:
            poison(replayed)
        before = network.entered
        assert same(watched(replayed, x, seeds=seeds, **options), wanted)
        assert network.entered - before == (0 if kept else 2 * kinds)  # a warm-up, the recording
        (loop,) = loops(replayed)
        addresses = [tensor.data_ptr() for tensor in loop.intermediates()]
        assert kept in (None, addresses)
        assert replayed.describe()["routed"] == {} or solver == "predictor_corrector"
        kept = addresses


def test_long_loops_are_recorded_by_the_stage():
    network = Network()
    for steps in (17, 50, 200):
        replayed, eager = pair(network, steps=steps)
        x = normal(1, 3, 8, 8, seed=steps)
        wanted, before = eager(x), network.entered
        assert torch.equal(replayed(x), wanted)
        assert network.entered - before == (2 if steps == 17 else 0)  # a warm-up, the recording
    (loop,) = loops(replayed)
    assert len(loop.recordings) == 2


@pytest.mark.parametrize("mode", ["image", "channels_last", "half", "per sample", "rescale"])
def test_stages_of_the_other_ways_to_call(mode):
    network, options, extra = Network(), {"steps": 6}, {}
    if mode == "image":
        options |= {"from_image": True, "start": 600}
        extra = {"image": normal(2, 3, 8, 8, seed=9)}
    elif mode == "half":
        network = network.to(torch.bfloat16)
    elif mode == "rescale":
        extra = {"guidance_scale": torch.tensor([2.0, 3.0]), "guidance_rescale": 0.7}
    elif mode == "per sample":
        options |= {"solver": "ddim", "eta": np.array([0.0, 1.0])}
        extra = {"seeds": [1, 2]}
    replayed, eager = pair(network, **options)
    for seed in (1, 2):
        x = normal(2, 3, 8, 8, seed=seed)
        if mode == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        assert same(watched(replayed, x, **extra), watched(eager, x, **extra))
        poison(replayed)
    assert len(loops(replayed)) == 1 and len(loops(replayed)[0].recordings) == 2


def test_a_progress_bar_counts_the_stages(capsys):
    bar = fastdiff.Sampler(Network(), SCHEDULE, steps=4, capture="always", progress=True)
    eager = fastdiff.Sampler(Network(), SCHEDULE, steps=4, capture="never")
    x = normal(1, 3, 8, 8)
    for _ in range(2):
        assert torch.equal(bar(x), eager(x)) and "4/4" in capsys.readouterr().err
    assert len(loops(bar)) == 1


class Cancelled(Exception):
    pass


def test_a_callback_may_cancel():
    replayed, eager = pair()
    x, y = normal(1, 3, 8, 8), normal(1, 3, 8, 8, seed=1)

    def cancel(progress):
        if progress.call == 2:
            raise Cancelled("enough")

    for _ in range(2):  # at the recording call, and at a replay
        with pytest.raises(Cancelled, match="enough"):
            replayed(x, callback=cancel)
    assert same(watched(replayed, y), watched(eager, y))
    assert len(loops(replayed)) == 1 and replayed.describe()["routed"] == {}


def test_a_callback_may_sample_from_the_same_network():
    replayed, eager = pair()
    x, y = normal(1, 3, 8, 8), normal(1, 3, 8, 8, seed=1)
    replayed(y)
    inner = []
    found = replayed(x, callback=lambda progress: inner.append(replayed(y)))
    assert torch.equal(found, eager(x)) and len(inner) == 4
    assert all(torch.equal(sample, eager(y)) for sample in inner)
    assert replayed.describe()["routed"] == {
        "stepwise, another loop is between two of its stages": 4
    }


def test_a_callback_lives_in_its_callers_mode():
    replayed, eager = pair()
    for sampler in (eager, replayed, replayed):
        with torch.inference_mode():
            total, modes = torch.zeros(1, 3, 8, 8), []

            def add(progress, total=total, modes=modes):
                total.add_(progress.state)  # of an inference tensor: in inference mode only
                modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

            sampler(normal(1, 3, 8, 8), callback=add)
        assert modes == [(True, False)] * 4


def test_a_callback_keeps_no_thread_waiting():
    """Who samples from the network, or asks, while a callback waits for it."""
    replayed, eager = pair()
    x, y = normal(1, 3, 8, 8), normal(1, 3, 8, 8, seed=1)
    wanted, found = eager(y), []

    def work():
        replayed.describe()
        found.append(replayed(y))

    def wait(progress):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(timeout=60)
        assert not thread.is_alive()

    assert torch.equal(replayed(x, callback=wait), eager(x))
    assert len(found) == 4 and all(torch.equal(sample, wanted) for sample in found)


def test_what_a_callback_raises_keeps_its_cause():
    replayed, _ = pair()

    def fail(progress):
        raise Cancelled("enough") from KeyError("its cause")

    with pytest.raises(Cancelled) as caught:
        replayed(normal(1, 3, 8, 8), callback=fail)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_replay_that_fails_after_a_callback_is_raised(monkeypatch):
    """Not begun again: the callback would be told everything twice."""
    replayed, _ = pair()
    x, told = normal(1, 3, 8, 8), []
    replayed(x, callback=lambda p: None)
    (loop,) = loops(replayed)
    replay, runs = loop.recordings[1].replay, iter(range(9))
    monkeypatch.setattr(loop.recordings[1], "replay", lambda: replay() if next(runs) < 2 else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        replayed(x, callback=lambda p: told.append(p.call))
    assert told == [1, 2] and loops(replayed) == [loop]


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_the_auto_policy_measures_a_few_stages(monkeypatch, ratio):
    network, measured = Network(), []

    def faster(eager, replay, device):
        before = network.entered
        eager()
        measured.append(network.entered - before)
        replay()
        return ratio

    monkeypatch.setattr(fastdiff.capture.cache, "faster", faster)
    monkeypatch.setattr(fastdiff.sampler, "captures", lambda mode, device: mode == "auto")
    auto = fastdiff.Sampler(network, SCHEDULE, steps=40)
    eager = fastdiff.Sampler(network, SCHEDULE, steps=40, capture="never")
    x = normal(1, 3, 8, 8)
    auto.prepare((1, 3, 8, 8), callback=True)
    assert same(watched(auto, x), watched(eager, x))
    assert measured == [4] and len(loops(auto)) == (ratio > 1)


@pytest.mark.parametrize("mode", ["mask", "stage_noise", "threshold", "filled"])
def test_stages_that_differ_in_more_than_numbers_are_stepwise(mode):
    options, extra = {"steps": 5}, {}
    if mode == "mask":
        extra = {"image": normal(1, 3, 8, 8, seed=4), "mask": torch.ones(1, 1, 8, 8)}
    elif mode == "stage_noise":
        options["solver"] = "ddpm"
        extra = {"stage_noise": [normal(1, 3, 8, 8, seed=k) for k in range(5)]}
    elif mode == "threshold":
        options |= {"dynamic_threshold": 0.9, "clip": 1.0}
    if mode == "filled":
        tableau = fastdiff.build_tableau("ddim", SCHEDULE, 5).filled(2, lambda row, output: row)
        replayed, eager = (
            fastdiff.Sampler(Network(), tableau=tableau, capture=capture)
            for capture in ("always", "never")
        )
    else:
        replayed, eager = pair(**options)
    x = normal(1, 3, 8, 8)
    assert same(watched(replayed, x, **extra), watched(eager, x, **extra))
    assert loops(replayed) == []
    told = [reason for reason in replayed.describe()["routed"] if reason.startswith("stepwise")]
    assert len(told) == 1 and told[0].startswith("stepwise for the callback or progress bar: ")
    assert torch.equal(replayed(x, **extra), eager(x, **extra)) and len(loops(replayed)) == 1


@pytest.mark.parametrize("solver", fastdiff.solver_names())
def test_padding_changes_no_number(solver):
    tableau = fastdiff.build_tableau(solver, SCHEDULE, 8)
    padded = tableau.padded()
    variants = {(padded.read_width(i), len(s.writes)) for i, s in enumerate(padded.stages)}
    assert len(variants) == 1
    x, seeds = normal(2, 3, 8, 8).double(), [1, 2]
    found, wanted = (
        fastdiff.Sampler(lambda x, t: x.tanh(), tableau=t, dtype=torch.float64)(x, seeds=seeds)
        for t in (padded, tableau)
    )
    assert torch.equal(found, wanted)


# == Faults ========================================================================================


class Reading(Network):
    """Reads a value on the host at its second call."""

    def forward(self, x, t, labels=None):
        output = super().forward(x, t, labels)
        return output * float(output.mean().sign()) if self.entered % 4 == 2 else output


def test_a_network_that_reads_on_the_host_finishes_and_is_named_once():
    replayed, eager = pair(Reading())
    x = normal(1, 3, 8, 8)
    replayed.denoiser.entered = 0
    wanted = eager(x)
    with pytest.warns(UserWarning, match="not captured: NotCapturable.*_local_scalar_dense"):
        replayed.denoiser.entered = 0
        # A warm-up; the recording, which ended in its second call; all four made anew.
        found = replayed(x)
        assert replayed.denoiser.entered == 4 + 2 + 4
    replayed.denoiser.entered = 0
    assert torch.equal(replayed(x), wanted) and found.shape == wanted.shape
    ((reason, count),) = replayed.describe()["routed"].items()
    assert "NotCapturable" in reason and count == 2


class Failing(Network):
    """Out of memory while it is recorded, and never again."""

    def forward(self, x, t, labels=None):
        if self.entered == 2:
            self.entered += 1
            raise torch.OutOfMemoryError("no memory is left")
        return super().forward(x, t, labels)


def test_a_recording_that_fails_is_finished_stepwise():
    network = Failing()
    replayed, _ = pair(network)
    with pytest.warns(UserWarning, match="OutOfMemoryError: no memory is left"):
        found = replayed(normal(1, 3, 8, 8))
    eager = fastdiff.Sampler(Network(), SCHEDULE, steps=4, capture="never")
    assert torch.equal(found, eager(normal(1, 3, 8, 8)))
    assert loops(replayed) == []


def test_wrong_arguments_are_told_as_ever():
    replayed, eager = pair(from_image=True, start=600)
    for sampler in (replayed, eager):
        with pytest.raises(ValueError, match="image must be given"):
            sampler(normal(1, 3, 8, 8))
    assert loops(replayed) == []


def test_arguments_that_cannot_be_a_key():
    network = Network()
    forward = network.forward
    network.forward = lambda x, t, extra=None: forward(x, t)
    replayed, eager = pair(network)
    x = normal(1, 3, 8, 8)

    class Holder:
        """Hashable, and what it holds may change."""

    with pytest.warns(UserWarning, match="argument is a Holder, not a tensor or plain value"):
        found = replayed(x, extra=Holder())
    assert torch.equal(found, eager(x)) and cache_of(network).loops == {}


def test_offloading_hooks_are_stepwise():
    network = Network()
    network.last._hf_hook = object()
    replayed, eager = pair(network)
    x = normal(1, 3, 8, 8)
    with pytest.warns(UserWarning, match="Conv2d has an offloading hook"):
        assert torch.equal(replayed(x), eager(x))


def test_threads_and_samplers_share_a_network():
    network = Network()
    (replayed, eager), (other, other_eager) = pair(network), pair(network, solver="dpmpp_2m")
    inputs = [normal(1, 3, 8, 8, seed=s) for s in range(16)]
    wanted = [(eager(x), other_eager(x)) for x in inputs]
    found = {}

    def work(first):
        for i in range(first, 16, 4):
            found[i] = replayed(inputs[i]), other(inputs[i])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, pairs in enumerate(wanted):
        assert all(map(torch.equal, found[i], pairs))
    assert len(loops(replayed)) == 2


def test_inference_mode_and_back():
    replayed, eager = pair()
    x = normal(1, 3, 8, 8)
    with torch.inference_mode():
        y = normal(1, 3, 8, 8, seed=1)
        assert torch.equal(replayed(y), eager(y))
    assert torch.equal(replayed(x), eager(x))
    assert torch.equal(replayed(y), eager(y))
    assert len(loops(replayed)) == 1


def test_half_precision():
    network = Network().to(torch.bfloat16)
    replayed, eager = pair(network)
    for seed in (1, 2):
        x = normal(2, 3, 8, 8, seed=seed)
        assert torch.equal(replayed(x), eager(x))


def test_the_likely_loop_replays_while_the_network_is_looked_at(monkeypatch):
    """What it made counts only if the network turns out to be the one that was recorded."""
    seen = []
    for owner, name in ((LoopCache, "play"), (fastdiff.sampler, "network_state")):
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, inner=inner, name=name, **kwargs: (
            seen.append(name), inner(*args, **kwargs))[1])  # fmt: skip
    network = Network()
    replayed, eager = pair(network)
    x, y = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1)
    replayed(x)
    assert seen == ["network_state", "play"]
    assert torch.equal(replayed(y), eager(y)) and seen[2:] == ["play", "network_state"]
    network.first.weight = nn.Parameter(2 * network.first.weight, requires_grad=False)
    assert torch.equal(replayed(y), eager(y))
    assert seen[4:] == ["play", "network_state", "play"] and len(loops(replayed)) == 2
    replayed(x, callback=lambda progress: None)  # told once, so nothing is tried before
    assert seen[7:] == ["network_state", "play"]
    network.train()
    assert torch.equal(replayed(y), eager(y)) and len(loops(replayed)) == 3  # a stage too


def test_only_a_recording_that_breaks_off_starts_over(monkeypatch):
    """What cannot be recorded is told before anything is captured: no pool is made for that."""
    begun = []
    monkeypatch.setattr(LoopCache, "_start_over", lambda self, device: begun.append(device))
    hooked = Network()
    hooked._hf_hook = object()
    reading = fastdiff.wrap(lambda x, t: x * float(x.sum()), prediction="epsilon")
    for network, wanted in ((hooked, 0), (reading, 1)):
        replayed, eager = pair(network)
        x = normal(1, 3, 8, 8)
        with pytest.warns(UserWarning, match="not captured"):
            assert torch.equal(replayed(x), eager(x))
        assert len(begun) == wanted


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 3, padding=1).requires_grad_(False)

    def forward(self, x, t):
        return torch.tanh(self.inner(x)) + t[:, None, None, None] / 1000


class Compiled:
    """A backend that counts the calls of what was compiled, and leaves it as it is."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, inputs):
        def call(*args):
            self.calls += 1
            return module(*args)

        return call


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_compiled_network_is_recorded_and_stays_compiled(fullgraph, before):
    backend = Compiled()
    network = torch.compile(Scaled(), backend=backend, fullgraph=fullgraph, dynamic=False)
    replayed, eager = pair(network)
    x, other = normal(2, 3, 8, 8), normal(2, 3, 8, 8, seed=1)
    wanted = eager(x) if before else None
    for sampler in (replayed, replayed, eager):
        found = sampler(x)
        assert wanted is None or torch.equal(found, wanted)
    assert len(loops(replayed)) == 1 and replayed.describe()["routed"] == {}
    calls = backend.calls
    replayed(other)
    assert backend.calls == calls
    assert fastdiff.check_capturable(eager, other) == []
    wanted = eager(other)
    assert torch.equal(wanted, replayed(other)) and backend.calls == calls + 4
    torch.compiler.reset()


def test_recordings_in_threads_leave_compiled_code_compiled():
    """The switch is one for all threads: it must come back, whoever leaves it last."""
    backend = Compiled()
    network = torch.compile(Scaled(), backend=backend, dynamic=False)
    x = normal(2, 3, 8, 8)
    fastdiff.Sampler(network, SCHEDULE, steps=2, capture="never")(x)
    start = threading.Barrier(4)

    def record(number):
        sampler = pair(torch.compile(Scaled(), backend=backend, dynamic=False))[0]
        start.wait()
        sampler(x)

    threads = [threading.Thread(target=record, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    calls = backend.calls
    network(x, torch.zeros(2))
    assert backend.calls == calls + 1
    torch.compiler.reset()


def test_what_else_a_recording_fixes():
    """Train or eval mode, hooks and autocast are noticed."""
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.5)).requires_grad_(False).eval()
    replayed, eager = pair(fastdiff.wrap(lambda x, t: network(x), prediction="epsilon"))
    replayed.denoiser.inner = network  # so that its modules are seen
    x = normal(1, 3, 8, 8)
    assert torch.equal(replayed(x), eager(x))
    network.train()
    assert not torch.equal(replayed(x), eager(x))  # noise of its own each
    network.eval()
    assert torch.equal(replayed(x), eager(x)) and len(loops(replayed)) == 2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(replayed(x), eager(x))
    assert torch.equal(replayed(x), eager(x)) and len(loops(replayed)) == 3
    network[0].register_forward_hook(lambda module, args, output: output * 0)
    assert torch.equal(replayed(x), eager(x)) and len(loops(replayed)) == 4


def test_another_forward_class_or_processor_is_noticed():
    network = Network()
    replayed, eager = pair(network)
    x = normal(1, 3, 8, 8)
    replayed(x)
    network.last.processor = nn.Identity.forward
    replayed(x)
    assert len(loops(replayed)) == 2
    inner = network.last.forward
    network.last.forward = lambda h: 2 * inner(h)
    assert torch.equal(replayed(x), eager(x)) and len(loops(replayed)) == 3
    network.norm.__class__ = type("Other", (nn.GroupNorm,), {"forward": lambda self, h: h})
    assert torch.equal(replayed(x), eager(x)) and len(loops(replayed)) == 4


def test_tables_outside_of_modules_are_found():
    """What a graph reads and nobody else would keep: plain attributes, cached tables."""
    kept, weight = torch.randn(4), torch.randn(4)
    with fastdiff.capture.recordings.Reader() as reader:
        made = torch.ones(4) * weight
        (made.add_(kept[:2].sum()) + made).sum()
    found = {tensor.untyped_storage().data_ptr() for tensor in reader.foreign()}
    assert found == {kept.untyped_storage().data_ptr(), weight.untyped_storage().data_ptr()}


def test_trainable_weights_under_autocast_are_read_anew():
    network = Network().requires_grad_(True)
    replayed, eager = pair(network)
    x = normal(1, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        replayed(x)
    with torch.no_grad():
        network.last.weight.mul_(0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found, wanted = replayed(x), eager(x)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    assert len(loops(replayed)) == 1


def test_host_arguments_are_moved_before_the_loop():
    replayed, eager = pair()
    given = {"guidance_scale": 2.0, "labels": torch.tensor([1, 2]), "uncond": {"labels": 4}}
    x = normal(2, 3, 8, 8)
    assert torch.equal(replayed(x, **given), eager(x, **given))
    given["uncond"] = {"labels": [3, 4]}
    assert torch.equal(replayed(x, **given), eager(x, **given))
    # Another number is a copy into the recording of the same layout.
    assert len(loops(replayed)) == 2


def test_a_loop_keeps_what_it_reads():
    """A graph knows addresses only: weights and tables have to be the loop's own."""
    network = Network()
    replayed, _ = pair(network)
    replayed(normal(1, 3, 8, 8))
    (loop,) = loops(replayed)
    kept = {t.untyped_storage().data_ptr() for t in (*loop._tables, *loop._leaves, *loop.held)
            if isinstance(t, torch.Tensor)}  # fmt: skip
    made = {t.untyped_storage().data_ptr() for t in loop.intermediates()}
    read = set()
    for _, args, kwargs, _ in loop.recordings[0]._steps:
        for leaf in torch.utils._pytree.tree_flatten((args, kwargs))[0]:
            if isinstance(leaf, torch.Tensor):
                read.add(leaf.untyped_storage().data_ptr())
    assert {p.untyped_storage().data_ptr() for p in network.parameters()} & read <= kept
    arena = read - made - kept  # uninitialised buffers that the loop itself made
    assert len(arena) <= 2


def test_uncond_is_never_dropped():
    replayed, eager = pair()
    x, labels = normal(2, 3, 8, 8), torch.tensor([1, 2])
    for given, words in (
        ({"labels": None, "uncond": {"labels": torch.tensor([4])}}, "can only replace tensors"),
        ({"labels": 1, "uncond": {"labels": 0}}, "can only replace tensors with a batch of 2"),
        ({"labels": torch.tensor(1.0), "uncond": {"labels": torch.tensor(0.0)}}, r"shape \(\)"),
        ({"labels": {"a": labels}, "uncond": {"labels": {"b": labels}}}, r"keys of \['a'\]"),
        ({"labels": {"a": labels}, "uncond": {"labels": 3}}, "must be a dict"),
        ({"labels": [labels], "uncond": {"labels": 3}}, "must have 1 entries; got int"),
    ):
        with pytest.raises(ValueError, match=words):
            eager(x, guidance_scale=2.0, **given)
    one = eager(x, guidance_scale=2.0, labels=labels[:1], uncond={"labels": torch.tensor([4])})
    both = eager(x, guidance_scale=2.0, labels=labels[:1].expand(2).clone(),
                 uncond={"labels": torch.tensor([4])})  # fmt: skip
    assert torch.equal(one, both)
