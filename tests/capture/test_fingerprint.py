"""What a recording depends on is noticed, and cheaply: nothing is walked while nothing changes."""

import gc
import weakref

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.capture import NetworkWatch, NotCapturable
from tests.helpers.networks import Network, loops, pair
from tests.helpers.tensors import normal


def test_a_network_is_walked_again_only_where_modules_or_attributes_change(monkeypatch):
    network, walks = Network().eval(), []
    walk = NetworkWatch._walk
    monkeypatch.setattr(NetworkWatch, "_walk", lambda *args: (walks.append(1), walk(*args))[1])
    watch = NetworkWatch(network)
    first = watch.look()
    network.first.weight.mul_(2.0)
    assert watch.look() == first and len(walks) == 1  # in place: nothing that is recorded
    network.train()
    assert watch.look() != first and len(walks) == 1
    network.eval()
    assert watch.look() == first and len(walks) == 1
    network.first.weight = nn.Parameter(network.first.weight.clone(), requires_grad=False)
    other = watch.look()
    assert other != first and len(walks) == 1
    network.norm = nn.GroupNorm(4, 8)
    assert watch.look() not in (first, other) and len(walks) == 2
    network.note = "an attribute that no forward reads"
    watch.look()
    assert len(walks) == 3


def test_other_memory_and_other_types_of_weights_are_noticed():
    network, seen = Network(), []
    watch = NetworkWatch(network)
    for change in (
        lambda: None,
        lambda: setattr(network.first.weight, "data", network.first.weight.data.clone()),
        lambda: network.last.half(),
        lambda: network.last.register_buffer("table", torch.ones(3)),
        lambda: network.last.register_forward_pre_hook(lambda module, args: args),
        lambda: network.register_forward_hook(lambda module, args, output: output),
        lambda: delattr(network, "label"),
    ):
        change()
        seen.append(watch.look())
    assert len(set(seen)) == len(seen)


def test_a_watch_keeps_no_network_alive():
    network = Network()
    network.forward = network.forward  # a bound method, which owns the network
    watch = NetworkWatch(network)
    watch.look()
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_many_states_stay_told_apart():
    network = Network()
    watch, seen = NetworkWatch(network), set()
    for _ in range(200):
        network.first.bias = nn.Parameter(network.first.bias.clone(), requires_grad=False)
        network.kept = [*getattr(network, "kept", []), network.first.bias]  # no address comes back
        seen.add(watch.look())
        assert watch.look() in seen
    assert len(seen) == 200


def test_a_framework_names_what_its_modules_forward_depends_on():
    """diffusers' processors and FreeU's numbers; adapters and hooks that no replay can hold."""
    network = Network()
    watch = NetworkWatch(network)
    network.last.s1 = None
    first = watch.look()
    network.last.s1 = 0.9
    second = watch.look()
    network.last.s1 = None
    assert second != first == watch.look()
    network.last.s1 = [0.9]
    with pytest.raises(NotCapturable, match="a module's s1 is a list"):
        watch.look()
    network.last.s1 = None
    network.last._hf_hook = object()
    with pytest.raises(NotCapturable, match="Conv2d has an offloading hook"):
        watch.look()
    del network.last._hf_hook
    kind = type("Lora", (nn.Identity,), {"__module__": "peft.tuners.lora"})
    network.added = kind()
    with pytest.raises(NotCapturable, match="Lora is an adapter's layer"):
        watch.look()
    watch.look(adapters=True)
    with pytest.raises(NotCapturable, match="Lora is an adapter's layer"):
        watch.look()


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
