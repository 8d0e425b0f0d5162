"""Random launches of the fused step, and its definition beside it."""

import math

import torch

from fastdiff.ops import allocate_slots, multistep_step, multistep_step_ref
from fastdiff.ops.constants import STAGE_NOISE
from fastdiff.ops.layout import sample_strides
from fastdiff.ops.row import Head, head, index, width
from tests.helpers.tensors import bits

LAYOUTS = ("contiguous", "channels_last")
NO_X0 = Head(p=0, q=0, low=0, high=0, input_scale=1)
ONE_SLOT = torch.tensor(index(0, STAGE_NOISE, [0], [0]), dtype=torch.int32)


def laid_out(tensor, layout):
    """The same values, every sample [C, ...] contiguous or channels_last."""
    strides = sample_strides(tensor.shape[1:], layout == "channels_last")
    target = torch.empty(tensor.numel(), dtype=tensor.dtype)
    batch_stride = math.prod(tensor.shape[1:])
    return target.as_strided(tensor.shape, (batch_stride, *strides)).copy_(tensor)


def problem(
    shape=(3, 3, 5, 7),
    reads=2,
    writes=2,
    layout="contiguous",
    dtype=torch.float32,
    output_dtype=torch.float32,
    input_dtype=torch.float32,
    guided=False,
    per_sample=False,
    noise=None,
    doubled=False,
    zeros=0.3,
):
    """Random arguments of multistep_step, as a dictionary."""
    batch = shape[0]
    rows = batch if per_sample else 1
    slots = allocate_slots(reads + writes, laid_out(torch.zeros(shape, dtype=dtype), layout))
    slots.copy_(torch.randn(slots.shape))
    coefficients = torch.randn(rows, width(reads, writes), dtype=dtype)
    coefficients[torch.rand(coefficients.shape) < zeros] = 0
    head(coefficients).low[:], head(coefficients).high[:] = -0.8, 0.9
    read = torch.randint(reads + writes, (reads,))
    write = torch.randperm(reads + writes)[:writes]
    output = torch.randn((2 * batch if guided else batch, *shape[1:]))
    network_input = torch.empty((2 * batch if doubled else batch, *shape[1:]), dtype=input_dtype)
    return {
        "slots": slots,
        "output": laid_out(output, layout).to(output_dtype),
        "coefficients": coefficients,
        "index": torch.tensor(index(7, STAGE_NOISE, read.tolist(), write.tolist())).int(),
        "guidance": torch.randn(rows, dtype=dtype) if guided else None,
        "seeds": torch.randint(-(2**62), 2**62, (batch,)) if noise == "seeds" else None,
        "noise": laid_out(torch.randn(shape), layout).to(dtype) if noise == "given" else None,
        "network_input": laid_out(network_input, layout),
        "reads": reads,
        "writes": writes,
    }


def copied(arguments):
    """The arguments with fresh memory for what is written, strides kept."""
    fresh = dict(arguments)
    slots = arguments["slots"]
    fresh["slots"] = torch.empty_strided(slots.shape, slots.stride(), dtype=slots.dtype)
    fresh["slots"].copy_(slots)
    if arguments["network_input"] is not None:
        fresh["network_input"] = arguments["network_input"].clone()
    return fresh


def assert_equals_reference(arguments):
    expected = copied(arguments)
    multistep_step_ref(*expected.values())
    multistep_step(**arguments)
    for name in ("slots", "network_input"):
        if arguments[name] is not None:
            assert torch.equal(bits(arguments[name]), bits(expected[name])), name
