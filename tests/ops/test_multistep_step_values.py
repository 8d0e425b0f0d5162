"""Single values in the fused step: zero coefficients, NaN, clamps, half precision, noise."""

import math

import pytest
import torch

from fastdiff.ops import allocate_slots, multistep_step, multistep_step_ref
from fastdiff.ops.constants import STAGE_NOISE
from fastdiff.ops.philox import philox_normal_ref
from fastdiff.ops.row import Head, Weights, columns, index, weights
from tests.helpers.multistep import LAYOUTS, NO_X0, ONE_SLOT, copied, laid_out, problem
from tests.helpers.tensors import FLOATS, bits

NAN = math.nan


@pytest.mark.parametrize("reference", [False, True])
def test_zero_coefficients_hide_their_operands(reference):
    def step(arguments):
        if reference:
            multistep_step_ref(*arguments.values())
        else:
            multistep_step(**arguments)

    def row(p=0.0, q=0.0, x0=0.0, model=0.0, z=0.0, first=0.0, second=1.0):
        write = Weights(x0, model, z, [first, second])
        return torch.tensor([columns(Head(p, q, -1.0, 1.0, 1.0), [write])])

    for coefficients in (row(), row(p=1, q=1), row(q=1, x0=0, second=2)):
        arguments = problem(writes=1, guided=True, noise="given")
        arguments["index"] = torch.tensor([0, 0, 0, 1, 2], dtype=torch.int32)
        arguments["coefficients"] = coefficients
        arguments["slots"][0] = NAN
        arguments["slots"][2] = NAN
        arguments["output"][:] = NAN
        arguments["noise"][:] = math.inf
        step(arguments)
        expected = weights(coefficients, 2)[0].slots[1] * arguments["slots"][1]
        assert torch.equal(arguments["slots"][2], expected)
        assert torch.equal(arguments["network_input"], expected)

    # x0 from the output alone: the state is not read.
    arguments = problem(writes=1)
    arguments["index"] = torch.tensor([0, 0, 0, 1, 2], dtype=torch.int32)
    arguments["coefficients"] = row(p=1, x0=1, second=0)
    arguments["slots"][:] = NAN
    step(arguments)
    assert torch.equal(arguments["slots"][2], arguments["output"].clamp(-1, 1))


def test_per_sample_rows_hide_per_sample():
    arguments = problem(writes=1, reads=1, per_sample=True)
    arguments["index"] = torch.tensor([0, 0, 0, 1], dtype=torch.int32)
    arguments["coefficients"].zero_()
    weights(arguments["coefficients"], 1)[0].slots[0][:] = torch.tensor([1.0, 0.0, 2.0])
    arguments["slots"][0, 1] = NAN
    arguments["output"][:] = NAN
    state = arguments["slots"][0].clone()
    multistep_step(**arguments)
    expected = state * torch.tensor([1.0, 0.0, 2.0]).view(3, 1, 1, 1)
    expected[1] = 0
    assert torch.equal(arguments["slots"][1], expected)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["slots", "output", "noise"])
def test_bad_values_stay_in_their_sample(where, value):
    arguments = problem((4, 3, 17, 33), writes=2, noise="given", zeros=0)
    clean = copied(arguments)
    spoiled = arguments[where] = arguments[where].clone()
    (spoiled[:, 1] if where == "slots" else spoiled[1:2])[..., 3] = value
    multistep_step(**clean)
    multistep_step(**arguments)
    for name, samples in (("slots", lambda t: t[:, [0, 2, 3]]), ("network_input", lambda t: t)):
        got, expected = arguments[name], clean[name]
        if name == "network_input":
            got, expected = got[[0, 2, 3]], expected[[0, 2, 3]]
        else:
            got, expected = samples(got), samples(expected)
        assert torch.equal(got, expected)
    assert not arguments["network_input"][1].isfinite().all()
    assert arguments["network_input"][1][..., :3].isfinite().all()


def test_clamp_keeps_nan():
    slots = torch.tensor([[[NAN, -5.0, 5.0, 0.5, math.inf, -math.inf]]])
    row = torch.tensor([columns(Head(0, 1, -1, 1, 1), [Weights(1, 0, 0, [0.0])])])
    multistep_step(slots, None, row, ONE_SLOT, reads=1, writes=1)
    expected = torch.tensor([NAN, -1, 1, 0.5, 1, -1])
    torch.testing.assert_close(slots[0, 0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_half_conversions_round_as_torch_rounds(dtype):
    """Every float16 and bfloat16 value in; ties, subnormals, overflow and NaN out."""
    halves = torch.arange(2**16, dtype=torch.int32).short()
    row = torch.tensor([columns(NO_X0, [Weights(sample=0, output=1, noise=0, slots=[0.0])])])
    for source in (halves.view(torch.float16), halves.view(torch.bfloat16)):
        near = torch.stack([source.float(), source.float() * (1 + 2**-9), source.float() / 3])
        for values in (source[None], near):
            slots = torch.empty(1, *values.shape)
            network_input = torch.empty(values.shape, dtype=dtype)
            multistep_step(
                slots, values, row, ONE_SLOT, network_input=network_input, reads=1, writes=1
            )
            expected = values.float() + 0.0  # the sum starts from +0, so no -0 comes out
            assert torch.equal(bits(slots[0]), bits(expected))
            assert torch.equal(bits(network_input), bits(expected.to(dtype)))


def test_noise_is_logical_and_per_image():
    shape = (3, 5, 6, 7)
    row = torch.tensor([columns(NO_X0, [Weights(sample=0, output=0, noise=1, slots=[0.0])])])
    at = torch.tensor(index(9, STAGE_NOISE, [0], [0]), dtype=torch.int32)
    seeds = torch.tensor([11, -12, 13])
    expected = philox_normal_ref(seeds, 5 * 6 * 7, 9, STAGE_NOISE).view(shape)
    for layout in LAYOUTS:
        slots = allocate_slots(1, laid_out(torch.zeros(shape), layout))
        multistep_step(slots, None, row, at, seeds=seeds, reads=1, writes=1)
        assert torch.equal(slots[0], expected)
        one = allocate_slots(1, laid_out(torch.zeros(1, *shape[1:]), layout))
        multistep_step(one, None, row, at, seeds=seeds[1:2], reads=1, writes=1)
        assert torch.equal(one[0], expected[1:2])
