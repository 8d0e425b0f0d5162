"""The Triton kernel of multistep_step against its reference, bit for bit.

It runs compiled where there is a GPU, else on CPU tensors under Triton's interpreter.
"""

import math
from types import SimpleNamespace

import pytest
import torch

from fastdiff.kernels._tuning import CHOICES
from fastdiff.kernels.multistep_step import _multistep_step_kernel, launch, plan
from fastdiff.ops import allocate_slots, multistep_step_ref, row, seeded_noise
from fastdiff.ops.constants import INITIAL_NOISE, READS, STAGE_NOISE, WRITES
from fastdiff.ops.philox import philox_normal_ref
from tests.helpers.interpreter import DEVICE, INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]

INF = math.inf
BF16 = [
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter truncates to bfloat16"),
    )
]


def case(
    reads=2,
    writes=1,
    batch=2,
    sample=(3, 5, 7),
    dtype=torch.float32,
    output=torch.float32,
    network_input=None,
    guided=False,
    rows=1,
    seeded=False,
    given_noise=False,
    channels_last=False,
    seed=0,
):
    """Arguments of a launch as a namespace, in the op's order; every coefficient is non-zero."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape, of=dtype):
        value = torch.randn(shape, generator=random, dtype=torch.float64).to(of)
        return value.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else value

    forward = 2 * batch if guided else batch
    slots = allocate_slots(reads + writes + 1, normal(batch, *sample))
    slots.copy_(torch.stack([normal(batch, *sample) for _ in slots]))
    columns = row.width(reads, writes)
    coefficients = torch.randn(rows, columns, generator=random, dtype=torch.float64).to(dtype)
    row.head(coefficients).low[:], row.head(coefficients).high[:] = -0.7, 0.8
    numbers = row.index(3, STAGE_NOISE, range(reads), range(reads, reads + writes))
    index = torch.tensor(numbers, dtype=torch.int32)
    return SimpleNamespace(
        slots=slots,
        output=None if output is None else normal(forward, *sample, of=output),
        coefficients=coefficients,
        index=index,
        guidance=torch.rand(rows, generator=random, dtype=dtype) * 5 if guided else None,
        seeds=torch.arange(batch) * 0x123456789ABC - 7 if seeded else None,
        noise=normal(batch, *sample) if given_noise else None,
        network_input=None
        if network_input is None
        else torch.full_like(normal(forward, *sample, of=network_input), math.nan),
        reads=reads,
        writes=writes,
    )


def assert_same(got, expected):
    """Equal bits, any NaN being like any other."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def to_reference(arguments):
    """What the definition makes of a copy of the arguments."""
    expected = {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in vars(arguments).items()
    }
    multistep_step_ref(**expected)
    return expected


def check(arguments):
    """Launch the kernel and compare everything it may write with the reference."""
    expected = to_reference(arguments)
    got = {k: to(v, DEVICE) for k, v in vars(arguments).items()}
    launch(**got)
    assert_same(got["slots"].cpu(), expected["slots"])
    if arguments.network_input is not None:
        assert_same(got["network_input"].cpu(), expected["network_input"])
    return expected


def to(value, device):
    """A copy on the device with the same strides, padding between slots included."""
    if not isinstance(value, torch.Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return copy.copy_(value)


@pytest.mark.parametrize("writes", WRITES)
@pytest.mark.parametrize("reads", READS)
def test_every_table_shape(reads, writes):
    check(case(reads, writes, seed=reads + writes))
    check(case(reads, writes, dtype=torch.float64, rows=2, seeded=True, sample=(2, 3)))


@pytest.mark.parametrize("chosen", CHOICES, ids=str)
def test_the_configuration_changes_no_bit(chosen):
    arguments = case(4, 2, sample=(3, 19, 31), seeded=True, network_input=torch.float16)
    expected = to_reference(arguments)
    got = {k: to(v, DEVICE) for k, v in vars(arguments).items()}
    programs, launch_arguments = plan(**got, chosen=chosen)
    _multistep_step_kernel[(programs,)](**launch_arguments)
    assert_same(got["slots"].cpu(), expected["slots"])
    assert_same(got["network_input"].cpu(), expected["network_input"])


@pytest.mark.parametrize("network_input", [torch.float32, torch.float16, *BF16])
@pytest.mark.parametrize("output", [torch.float32, torch.float16, *BF16])
@pytest.mark.parametrize(
    "channels_last, guided", [(False, True), (True, False)], ids=["guided", "channels_last"]
)
def test_dtypes_layouts_guidance(output, network_input, channels_last, guided):
    arguments = case(
        output=output,
        network_input=network_input,
        channels_last=channels_last,
        guided=guided,
        rows=2,
        seeded=True,
    )
    check(arguments)


@pytest.mark.parametrize("output", [torch.float64, torch.float32, torch.float16])
def test_float64_state(output):
    arguments = case(4, 3, dtype=torch.float64, output=output, network_input=output, seeded=True)
    check(arguments)


def test_float64_is_cast_to_half_precision_as_torch_casts():
    """A value that rounds differently in one step than through float32."""
    arguments = case(1, 1, dtype=torch.float64, network_input=torch.float16)
    arguments.slots[0] = 1 + 2**-11 + 2**-40
    copy = row.columns(row.Head(0, 0, 0, 0, 1.0), [row.Weights(0, 0, 0, slots=[1])])
    arguments.coefficients = torch.tensor([copy], dtype=torch.float64)
    check(arguments)


@pytest.mark.parametrize(
    "sample", [(), (1,), (5,), (257,), (1, 1, 4), (3, 16, 16), (1, 33, 35), (2, 3, 2, 5)], ids=str
)
def test_sizes(sample):
    batch = 1 + len(sample)
    check(case(sample=sample, batch=batch, seeded=True, network_input=torch.float16))


@pytest.mark.parametrize(
    "sample", [(4, 1, 1), (1, 6, 5), (5, 1, 9), (3, 24, 32), (6, 7), (3, 2, 3, 4)], ids=str
)
def test_channels_last_sizes(sample):
    check(case(sample=sample, channels_last=True, seeded=True))


def test_given_noise_and_shared_guidance():
    check(case(given_noise=True, guided=True, rows=1, network_input=torch.float32))


def test_output_with_extra_channels():
    """A network with learned variance: the first channels of a larger output."""
    arguments = case()
    whole = torch.randn(2, 6, 5, 7)
    arguments.output = whole[:, :3]
    check(arguments)


def test_zero_coefficients_are_not_read():
    """NaN in an operand without weight reaches nothing, sample by sample."""
    reads, writes = 2, 2
    numbers = range(row.width(reads, writes))
    shared = row.Head(*numbers[: row.HEAD])
    for column in numbers:
        if column in (shared.low, shared.high, shared.input_scale):
            continue
        arguments = case(reads, writes, rows=2, guided=True, given_noise=True, sample=(3, 4, 4))
        arguments.coefficients[0, column] = 0
        arguments.slots[column % reads, 0] = math.nan
        arguments.output[1::2] = INF
        arguments.noise[0, 0] = math.nan
        check(arguments)


@pytest.mark.parametrize("operand", ["slot", "output", "noise", "conversion"])
def test_nan_in_an_unread_operand_vanishes(operand):
    arguments = case(2, 1, given_noise=True)
    (write,) = row.weights(arguments.coefficients, 2)
    if operand == "slot":
        write.slots[1].zero_()
        arguments.slots[1] = math.nan
    elif operand == "output":
        row.head(arguments.coefficients).p.zero_()
        write.output.zero_()
        arguments.output[:] = math.nan
    elif operand == "noise":
        write.noise.zero_()
        arguments.noise[:] = math.nan
    else:
        row.head(arguments.coefficients).q.zero_()
        write.slots[0].zero_()
        arguments.slots[0] = math.nan
    expected = check(arguments)
    assert expected["slots"][2].isfinite().all()


def test_nan_passes_the_clamp():
    arguments = case(1, 1, rows=2)
    arguments.output[0, 0, 0, 0] = math.nan
    expected = check(arguments)
    assert expected["slots"][1].isnan().sum() == 1


def test_infinite_bounds_clip_nothing():
    arguments = case(1, 1, network_input=torch.float16)
    bounds = row.head(arguments.coefficients)
    bounds.low[:], bounds.high[:] = -INF, INF
    arguments.output *= 1e30
    check(arguments)


def test_writing_a_slot_that_was_read():
    arguments = case(2, 2)
    arguments.index = torch.tensor([0, 0, 0, 1, 1, 0], dtype=torch.int32)
    check(arguments)


def test_noise_alone_matches_its_definition():
    """Initial noise: no output, purpose 1, and a sample of more than one program."""
    arguments = case(1, 1, output=None, seeded=True, sample=(1200,))
    arguments.index[row.STAGE], arguments.index[row.PURPOSE] = 2**31 - 1, INITIAL_NOISE
    noise = row.columns(row.Head(0, 0, 0, 0, 0), [row.Weights(0, 0, noise=1.0, slots=[0])])
    arguments.coefficients = torch.tensor([noise])
    expected = check(arguments)
    assert 0.9 < expected["slots"][1].std() < 1.1


@pytest.mark.skipif(INTERPRETED, reason="tests/ops/test_philox.py holds it on the CPU")
@pytest.mark.parametrize("shape", [(4, 3, 32, 32), (4, 1, 7, 9)])
def test_seeded_noise(shape):
    seeds = torch.tensor([0, 1, -5, 2**40 + 7])
    found = seeded_noise(seeds.to(DEVICE), shape)
    wanted = philox_normal_ref(seeds, math.prod(shape[1:]), 0, INITIAL_NOISE).view(shape)
    assert torch.equal(found.cpu(), wanted)
    alone = seeded_noise(seeds[2:3].to(DEVICE), (1, *shape[1:]))
    assert torch.equal(found[2:3], alone)


@pytest.mark.parametrize("sample, batch", [((3, 4, 4), 0), ((0, 4, 4), 2)])
def test_nothing_to_do(sample, batch):
    check(case(sample=sample, batch=batch, rows=1, seeded=True))
