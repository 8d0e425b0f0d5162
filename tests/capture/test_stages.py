"""Loops replayed by the stage: callbacks, many steps, any number of them."""

import threading

import numpy as np
import pytest
import torch

import fastdiff
from tests.helpers.networks import STRUCTURES, Network, loops, pair, poison
from tests.helpers.schedules import LINEAR
from tests.helpers.tensors import normal


def watched(sampler, x, **given):
    """The result, and all that a callback was told."""
    seen = []
    note = lambda p: seen.append((p.call, p.nfe, p.time, p.state.clone()))
    return sampler(x, callback=note, **given), seen


def same(found, wanted):
    (result, seen), (other, told) = found, wanted
    return torch.equal(result, other) and all(
        a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(seen, told, strict=True)
    )


@pytest.mark.parametrize("solver", STRUCTURES)
def test_a_stage_serves_every_number_of_steps(solver):
    """With a callback the network's Python is not entered again, whatever the schedule."""
    network = Network()
    options = {"guidance_scale": 2.0, "labels": torch.tensor([1, 2])}
    options["uncond"] = {"labels": torch.tensor([4])}
    kept = None
    kinds = 2 if solver == "predictor_corrector" else 1  # of stages, each recorded
    for steps, schedule in ((20, LINEAR), (10, LINEAR), (12, fastdiff.NoiseSchedule.cosine())):
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
    bar = fastdiff.Sampler(Network(), LINEAR, steps=4, capture="always", progress=True)
    eager = fastdiff.Sampler(Network(), LINEAR, steps=4, capture="never")
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


@pytest.mark.parametrize("mode", ["mask", "stage_noise", "threshold"])
def test_stages_that_differ_in_more_than_numbers_are_stepwise(mode):
    options, extra = {"steps": 5}, {}
    if mode == "mask":
        extra = {"image": normal(1, 3, 8, 8, seed=4), "mask": torch.ones(1, 1, 8, 8)}
    elif mode == "stage_noise":
        options["solver"] = "ddpm"
        extra = {"stage_noise": [normal(1, 3, 8, 8, seed=k) for k in range(5)]}
    elif mode == "threshold":
        options |= {"dynamic_threshold": 0.9, "clip": 1.0}
    replayed, eager = pair(**options)
    x = normal(1, 3, 8, 8)
    assert same(watched(replayed, x, **extra), watched(eager, x, **extra))
    assert loops(replayed) == []
    told = [reason for reason in replayed.describe()["routed"] if reason.startswith("stepwise")]
    assert len(told) == 1 and told[0].startswith("stepwise for the callback or progress bar: ")
    assert torch.equal(replayed(x, **extra), eager(x, **extra)) and len(loops(replayed)) == 1


@pytest.mark.parametrize("solver", STRUCTURES)
def test_padding_changes_no_number(solver):
    tableau = fastdiff.build_tableau(solver, LINEAR, 8)
    padded = tableau.padded()
    variants = {(padded.read_width(i), len(s.writes)) for i, s in enumerate(padded.stages)}
    assert len(variants) == 1
    x, seeds = normal(2, 3, 8, 8).double(), [1, 2]
    found, wanted = (
        fastdiff.Sampler(lambda x, t: x.tanh(), tableau=t, dtype=torch.float64)(x, seeds=seeds)
        for t in (padded, tableau)
    )
    assert torch.equal(found, wanted)
