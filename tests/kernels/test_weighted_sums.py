"""The Triton kernel of weighted_sums against its reference, bit for bit.

It runs compiled where there is a GPU, else on CPU tensors under Triton's interpreter.
"""

import itertools
import math

import pytest
import torch

from fastdiff.kernels.weighted_sums import launch
from fastdiff.ops import weighted_sums, weighted_sums_ref
from fastdiff.ops.constants import MAX_OPERANDS, MAX_SUMS
from tests.helpers.interpreter import DEVICE, INTERPRETED
from tests.helpers.tensors import bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered"),
]

FLOATS = (torch.float64, torch.float32, torch.float16)
if not INTERPRETED:
    FLOATS += (torch.bfloat16,)  # the interpreter truncates to bfloat16


def case(
    count=3,
    sums=2,
    shape=(2, 3, 5, 7),
    precision=torch.float32,
    operands=(torch.float32,),
    dtypes=(torch.float32,),
    clamped=False,
    seed=0,
):
    """Arguments in the reference's order; every weight is non-zero, dtypes go round."""
    random = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=random, dtype=torch.float64)

    kinds = itertools.cycle(operands)
    tensors = [normal(*shape).to(next(kinds)) for _ in range(count)]
    weights = normal(sums, count + clamped).to(precision)
    clamp = torch.tensor([-0.5, 0.7, *normal(count)], dtype=precision) if clamped else None
    return tensors, weights, list(itertools.islice(itertools.cycle(dtypes), sums)), clamp


def check(arguments):
    """Launch the kernel and compare its results with the reference."""
    operands, weights, dtypes, clamp = arguments
    expected = weighted_sums_ref(*arguments)
    results = [torch.full_like(x, math.nan, device=DEVICE) for x in expected]
    on_device = [operand.to(DEVICE) for operand in operands]
    launch(on_device, weights.to(DEVICE), None if clamp is None else clamp.to(DEVICE), results)
    for result, wanted in zip(results, expected, strict=True):
        assert torch.equal(bits(result.cpu()), bits(wanted))
    return expected


@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("sums", range(1, MAX_SUMS + 1))
@pytest.mark.parametrize("count", range(1, MAX_OPERANDS + 1))
def test_every_number_of_operands(count, sums, clamped):
    for precision in (torch.float32, torch.float64):
        check(case(count, sums, (3, 7), precision, clamped=clamped, seed=count + sums))


@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
@pytest.mark.parametrize("result", FLOATS)
@pytest.mark.parametrize("operand", FLOATS)
def test_dtypes(operand, result, precision):
    check(case(precision=precision, operands=(operand,), dtypes=(result,), clamped=True))
    mixed = (torch.float32, operand)
    check(case(precision=precision, operands=mixed, dtypes=(result, torch.float32)))


@pytest.mark.skipif(INTERPRETED, reason="tests/ops/test_weighted_sums.py holds it on the CPU")
@pytest.mark.parametrize("result", FLOATS)
@pytest.mark.parametrize("operand", FLOATS)
def test_the_op_on_a_gpu(operand, result):
    """Operands of two memory layouts, results of the op's own."""
    for clamped, precision in itertools.product((False, True), (torch.float32, torch.float64)):
        kind = dict(precision=precision, operands=(operand,), dtypes=(result,), clamped=clamped)
        operands, weights, dtypes, clamp = case(4, 3, (2, 3, 16, 17), **kind)
        operands[0] = operands[0].to(memory_format=torch.channels_last)
        expected = weighted_sums_ref(operands, weights, dtypes, clamp)
        clamp = None if clamp is None else clamp.to(DEVICE)
        there = [one.to(DEVICE) for one in operands]
        found = weighted_sums(there, weights.to(DEVICE), dtypes, clamp)
        for one, wanted in zip(found, expected, strict=True):
            assert torch.equal(bits(one.cpu()), bits(wanted))


def test_float64_is_cast_to_half_precision_as_torch_casts():
    """A value that rounds differently in one step than through float32."""
    arguments = case(1, 1, precision=torch.float64, dtypes=(torch.float16,))
    value = torch.full((4,), 1 + 2**-11 + 2**-40, dtype=torch.float64)
    check(([value], torch.ones(1, 1, dtype=torch.float64), *arguments[2:]))


@pytest.mark.parametrize("shape", [(), (1,), (5,), (0,), (3, 0, 4), (257,), (3, 1200)], ids=str)
def test_sizes(shape):
    check(case(shape=shape, clamped=True))


def test_a_storage_offset_that_is_not_aligned():
    operands, *rest = case(shape=(1201,))
    check(([operand[1:] for operand in operands], *rest))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_zero_weights_are_not_read(value):
    """In one sum or in all, of an operand, of the clamp's factors, or of the clamped value."""
    for column in range(4):
        for rows in ([0], [1], [0, 1]):
            operands, weights, dtypes, clamp = case(clamped=True)
            weights[rows, column] = 0
            if column < 3:
                operands[column][0] = value
                clamp[2 + column] = 0
            else:
                clamp[2:] = value
            expected = check((operands, weights, dtypes, clamp))
            for row in rows:
                assert expected[row].isfinite().all()


def test_nan_passes_the_clamp():
    operands, weights, dtypes, clamp = case(clamped=True)
    operands[0][0, 0, 0, 0] = math.nan
    expected = check((operands, weights, dtypes, clamp))
    assert expected[0].isnan().sum() == 1


def test_infinite_bounds_clip_nothing():
    operands, weights, dtypes, clamp = case(clamped=True)
    clamp[:2] = torch.tensor([-math.inf, math.inf])
    check(([operand * 1e30 for operand in operands], weights, dtypes, clamp))
