"""The Haar kernels on a GPU; without one tests/ops/test_haar_on_host.py runs them on the CPU."""

from types import SimpleNamespace

import pytest
import torch

from bench.entries import haar as entry
from fastdiff import _ext, ops
from fastdiff.ops import HaarPyramid, haar_loss, haar_merge, haar_noise, haar_split, haar_step
from fastdiff.ops.haar import (
    haar_expand_ref,
    haar_loss_ref,
    haar_merge_ref,
    haar_split_ref,
    haar_step_ref,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
CUDA = torch.device("cuda")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def test_the_extension_has_them():
    assert _ext.HAS_CUDA


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(2, 3, 32, 64), (1, 2, 37, 131), (1, 3, 128, 256)], ids=str)
def test_every_op_and_level_is_its_definition(shape, dtype, last):
    """To the bit; losses to 1e-5, their sums have an order of their own."""
    random = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(size, generator=random)
    x, score = normal(*shape).to(dtype), normal(*shape).to(dtype)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    seeds, wide = torch.arange(shape[0]), torch.float64 if dtype == torch.float64 else torch.float32
    for levels in range(6):
        three = normal(shape[0], levels + 1, 3).to(wide)
        here = x, score, three, three[:, :, :2].contiguous(), seeds
        there = [value.to(CUDA) for value in here]
        pairs = zip(made(ops, levels, *there), made(REFERENCES, levels, *here), strict=True)
        for found, wanted in pairs:
            assert torch.equal(found.cpu(), wanted.to(dtype)), levels
        loss = haar_loss(there[0], *there[3:], 3).cpu()
        torch.testing.assert_close(loss, haar_loss_ref(x, *here[3:], 3), rtol=1e-5, atol=0)


REFERENCES = SimpleNamespace(
    haar_split=haar_split_ref,
    haar_merge=haar_merge_ref,
    haar_step=haar_step_ref,
    haar_noise=lambda x, *rest: haar_step_ref(x, None, *rest),
    haar_expand=haar_expand_ref,
)


def made(of, levels, x, score, three, two, seeds):
    """What the ops, or their definitions, make of these."""
    split = of.haar_split(x, levels)
    narrow = HaarPyramid(tuple(d.to(x.dtype) for d in split.details), split.coarse.to(x.dtype))
    yield from (*split.details, split.coarse)
    yield of.haar_merge(narrow, x.shape[2:])
    yield of.haar_step(x, score, three, seeds, 3)
    yield of.haar_noise(x, two, seeds, 3)
    if levels:
        size = (2 * x.shape[2] - levels % 2, 2 * x.shape[3])
        yield of.haar_expand(x, two[:, :2].contiguous(), seeds, 3, size)


@pytest.mark.parametrize("row", entry.ROWS)
def test_one_launch(row, monkeypatch):
    """Of its own: deterministic mode would fill fresh memory by another."""
    columns = entry.ROWS[row].columns
    sets = [entry.buffers(0, (2, 3, 64, 64), CUDA, columns, 1 if row == "expand" else 3)]
    call = lambda i: entry.ROWS[row].ours(sets[i])
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    call(0)
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        call(0)
        torch.cuda.synchronize()
    launched = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(launched) == (2 if row == "loss" else 1), [e.name for e in launched]


def test_replays_with_another_stage_draw_other_noise():
    x = torch.randn(2, 3, 40, 24, device=CUDA)
    c = torch.rand(1, 4, 2, device=CUDA)
    seeds, stage = torch.arange(2, device=CUDA), torch.zeros(1, dtype=torch.int32, device=CUDA)
    haar_noise(x, c, seeds, stage)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = haar_merge(haar_split(haar_noise(x, c, seeds, stage), 3), (40, 24))
        loss = haar_loss(found, c, seeds, stage)
    for number in (1, 5):
        stage.fill_(number)
        graph.replay()
        noisy = haar_noise(x, c, seeds, number)
        torch.testing.assert_close(found, noisy, rtol=0, atol=1e-5)
        assert torch.equal(loss, haar_loss(found, c, seeds, number))


def test_more_than_32_bits_of_elements():
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of memory")
    x = torch.zeros(33, 1, 8192, 8192, dtype=torch.float16, device=CUDA)
    x[-1, 0, -2:, -2:] = 1
    pyramid = haar_split(x, 3)
    assert pyramid.coarse[-1, 0, -1, -1] == 0.5 and pyramid.coarse.count_nonzero() == 1
    assert torch.equal(haar_merge(pyramid), x)


def test_the_stream_is_the_callers():
    """Its input is written late, on a side stream: a launch elsewhere would read the old one."""
    side = torch.cuda.Stream()
    x, c = torch.randn(4, 3, 128, 128, device=CUDA), torch.rand(1, 4, 3, device=CUDA)
    wanted, late = haar_step(x, x, c), torch.zeros_like(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        found = haar_step(late, late, c)
    side.synchronize()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_slices_and_other_alignments(dtype):
    """Views that begin off an aligned address, with odd strides, or with gaps."""
    wide = torch.randn(2, 4, 40, 80, device=CUDA).to(dtype)
    c, seeds = torch.rand(1, 4, 3, device=CUDA), torch.arange(2, device=CUDA)
    views = [wide[..., 1:65], wide[..., 4:68], wide[..., 8:72], wide[:, 1:, 3:], wide[:1, ..., ::2],
             wide.mT, wide.flatten()[1 : 1 + 2 * 3 * 32 * 64].view(2, 3, 32, 64)]  # fmt: skip
    for x in views:
        score = torch.randn(x.shape, device=CUDA)[...]
        seeds = torch.arange(len(x), device=CUDA)
        pyramid, there = haar_split(x, 3), haar_split(x.contiguous().cpu(), 3)
        assert torch.equal(pyramid.flat.cpu(), there.flat)
        assert torch.equal(haar_merge(pyramid).cpu(), haar_merge(there))
        for other in (score, score.to(dtype), score.mT.contiguous().mT):
            found = haar_step(x, other, c, seeds, 1).cpu()
            wanted = haar_step(x.cpu(), other.cpu(), c.cpu(), seeds.cpu(), 1)
            assert torch.equal(found, wanted.contiguous())


def test_gradients():
    x = torch.randn(2, 3, 37, 64, dtype=torch.float64, device=CUDA).requires_grad_()
    c, seeds = torch.rand(2, 4, 2, device=CUDA).double(), torch.arange(2, device=CUDA)
    weight = torch.randn_like(haar_split(x.detach(), 3).flat)
    for device in (CUDA, torch.device("cpu")):
        leaf = x.detach().to(device).requires_grad_()
        pyramid = haar_split(leaf, 3)
        total = (pyramid.flat * weight.to(device)).sum() + haar_merge(pyramid).pow(3).sum()
        (total + haar_loss(leaf, c.to(device), seeds.to(device), 2).sum()).backward()
        if device == CUDA:
            found = leaf.grad.cpu()
        else:
            torch.testing.assert_close(found, leaf.grad, rtol=1e-9, atol=1e-9)
