"""What a recording meets: faults, threads, compiled code, modes; and what it keeps."""

import threading

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.capture import LoopCache, cache_of
from fastdiff.capture.cuda import Reader
from tests.helpers.networks import Network, loops, pair
from tests.helpers.schedules import LINEAR
from tests.helpers.tensors import normal


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
    eager = fastdiff.Sampler(Network(), LINEAR, steps=4, capture="never")
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
    fastdiff.Sampler(network, LINEAR, steps=2, capture="never")(x)
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


def test_tables_outside_of_modules_are_found():
    """What a graph reads and nobody else would keep: plain attributes, cached tables."""
    kept, weight = torch.randn(4), torch.randn(4)
    with Reader() as reader:
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
