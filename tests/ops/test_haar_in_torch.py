"""Haar operators in PyTorch's machinery: gradients, compilation, capture, every CPU."""

import pytest
import torch

from fastdiff import check_capturable
from fastdiff.ops import (
    HaarPyramid,
    haar_expand,
    haar_loss,
    haar_merge,
    haar_noise,
    haar_split,
    haar_step,
)
from fastdiff.ops.haar import haar_merge_ref, haar_split_ref
from tests.helpers.haar import bands, table
from tests.helpers.tensors import normal


@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_gradients_pass_gradcheck(size):
    x = normal(2, 2, *size, dtype=torch.float64).requires_grad_()
    split = lambda x: tuple(bands(haar_split(x, 2)))
    assert torch.autograd.gradcheck(split, (x,))
    assert torch.autograd.gradgradcheck(split, (x,))
    *details, coarse = (b.detach().clone().requires_grad_() for b in split(x))
    merge = lambda *b: haar_merge(HaarPyramid(b[:-1], b[-1]), size)
    assert torch.autograd.gradcheck(merge, (*details, coarse))
    assert torch.autograd.gradgradcheck(merge, (*details, coarse))
    c = normal(2, 3, 2, dtype=torch.float64)
    loss = lambda p: haar_loss(p, c, torch.tensor([1, 2]))
    assert torch.autograd.gradcheck(loss, (x,)) and torch.autograd.gradgradcheck(loss, (x,))


@pytest.mark.parametrize("last", [False, True])
def test_the_ops_pass_opcheck(last):
    ops = torch.ops.fastdiff
    x = normal(2, 3, 9, 12)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    pyramid = haar_split(x, 2)
    c3, c2 = table(2, 2, 3, torch.float32), table(2, 2, 2, torch.float32, per_sample=True)
    seeds, stage = torch.arange(2), torch.tensor([1], dtype=torch.int32)
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    details = [d.detach().clone().requires_grad_() for d in pyramid.details]
    for operator, arguments in (
        (ops.haar_split, (leaf, 2, last)),
        (ops.haar_merge, (details, pyramid.coarse.detach(), 9, 12, last)),
        (ops.haar_step, (x, x, c3, seeds, stage, 0, 2, last)),
        (ops.haar_step, (x, None, c2, None, None, 3, 2, last)),
        (ops.haar_expand, (x, c2[:, :2].contiguous(), seeds, stage, 0, 18, 23, last)),
        (ops.haar_loss, (leaf, c2, seeds, None, 1, 2)),
        (ops.haar_loss_gradient, (leaf, c2, seeds, stage, 0, torch.ones(2), 2, last)),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_compiled_for_any_size():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    both = lambda x: haar_merge(haar_split(x, 2))
    compiled = torch.compile(both, fullgraph=True, backend="eager", dynamic=True)
    for size in ((9, 12), (10, 20), (33, 7), (16, 16)):
        x = normal(2, 3, *size)
        assert torch.equal(compiled(x), both(x))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_gradients_of_some_bands():
    """None for the others; also where the layout is channels_last."""
    for layout in (torch.contiguous_format, torch.channels_last):
        x = normal(2, 3, 12, 16).contiguous(memory_format=layout).requires_grad_()
        haar_split(x, 2).details[1].square().sum().backward()
        wanted = haar_split_ref(x.detach(), 2)
        only = [torch.zeros_like(wanted.details[0]), 2 * wanted.details[1]]
        expected = haar_merge_ref(HaarPyramid(tuple(only), wanted.coarse * 0), (12, 16))
        torch.testing.assert_close(x.grad, expected)


def test_compiled_without_a_graph_break():
    c, seeds = table(2, 2, 2, torch.float32), torch.arange(2)
    stage = torch.zeros(1, dtype=torch.int32)

    def body(x):
        pyramid = haar_split(x, 2)
        scaled = HaarPyramid(tuple(2 * d for d in pyramid.details), pyramid.coarse)
        return haar_loss(haar_merge(scaled, x.shape[2:]), c, seeds, stage).sum()

    x, y = normal(2, 3, 9, 12).requires_grad_(), normal(2, 3, 9, 12).requires_grad_()
    found, wanted = torch.compile(body, fullgraph=True, backend="aot_eager")(x), body(y)
    torch.testing.assert_close(found, wanted)
    found.backward()
    wanted.backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_nothing_a_graph_cannot_hold():
    def body(x, c, seeds, stage):
        noisy = haar_noise(haar_merge(haar_split(x, 2), x.shape[2:]), c, seeds, stage)
        finer = haar_expand(noisy, c[:, :2].contiguous(), seeds, stage)
        return haar_step(noisy, x, c.repeat(1, 1, 2)[:, :, :3].contiguous(), seeds, 3), finer, (
            haar_loss(noisy, c, seeds, stage)
        )  # fmt: skip

    stage = torch.zeros(1, dtype=torch.int32)
    given = (normal(2, 3, 9, 12), table(2, 2, 2, torch.float32), torch.arange(2), stage)
    assert check_capturable(body, *given) == []


# The same launches in a process that lacks the extension, or an instruction set.
LAUNCHES = """
import hashlib, sys, torch
{setup}
from fastdiff import _ext
from fastdiff.ops import haar_expand, haar_merge, haar_noise, haar_split, haar_step
g = torch.Generator().manual_seed(1)
digest = hashlib.sha256()
for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(2, 3, 37, 150, generator=g).to(dtype)
    c, seeds = torch.randn(2, 4, 3, generator=g).to(wide), torch.tensor([1, -7])
    pyramid = haar_split(x, 3)
    two = c[:, :2, :2].contiguous()
    for made in (pyramid.flat, haar_merge(pyramid, (37, 150)), haar_step(x, x, c, seeds, 2),
                 haar_noise(x, two, seeds), haar_expand(x, two, seeds)):
        digest.update(made.contiguous().view(torch.uint8).numpy().tobytes())
print(_ext.build_info().get("cpu_target", "reference"), digest.hexdigest())
"""


def test_every_cpu_target_and_the_reference_agree(same_everywhere):
    same_everywhere(LAUNCHES)


def test_more_elements_than_32_bits_count():
    x = torch.empty(3, 3, 20000, 20001, dtype=torch.float16, device="meta")
    pyramid = haar_split(x, 3)
    assert x.numel() > 2**31 and pyramid.flat.numel() > x.numel()
    assert haar_merge(pyramid, (20000, 20001)).shape == x.shape
    assert haar_merge(pyramid[:2]).shape == (3, 3, 20000, 20002)


def test_empty_batches_come_back_empty():
    for shape in ((0, 3, 8, 8), (2, 0, 8, 8)):
        pyramid = haar_split(torch.empty(shape), 2)
        assert haar_merge(pyramid).shape == shape and pyramid.flat.numel() == 0
        seeds = torch.arange(shape[0])
        assert haar_step(torch.empty(shape), None, torch.ones(1, 3, 2), seeds).shape == shape
        assert haar_loss(torch.empty(shape), torch.ones(1, 3, 2), seeds).tolist() == [0] * shape[0]
