"""Weighted sums: kernel equal to reference bit for bit, both near the textbook in float64."""

import math

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff import _ext
from fastdiff.ops import weighted_sums, weighted_sums_ref, weighted_sums_unchecked
from fastdiff.ops.constants import MAX_OPERANDS, MAX_SUMS
from tests.helpers.tensors import FLOATS, bits
from tests.helpers.threads import threads

NAN = math.nan


def _spaced(tensor):
    """Every second sample of a larger batch."""
    return torch.cat([tensor, tensor + 1])[:: 2 if len(tensor) > 1 else 1][: len(tensor)]


def _sliced(tensor):
    """The first channels of a network with learned variance: gaps between samples."""
    return torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]


def _misaligned(tensor):
    """Contiguous, one element into its storage."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


LAYOUTS = {  # of one's own for an operand [B, C, ...]; the least number of dimensions
    "contiguous": (lambda t: t, 0),
    "channels_last": (lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1), 3),
    "transposed": (lambda t: t.transpose(0, -1).contiguous().transpose(0, -1), 2),
    "spaced": (_spaced, 1),
    "sliced": (_sliced, 2),
    "misaligned": (_misaligned, 0),
    "expanded": (lambda t: t[:1].expand(t.shape), 1),
}


def laid_out(tensor, layout):
    make, dimensions = LAYOUTS[layout]
    return make(tensor) if tensor.dim() >= dimensions else tensor


def problem(
    shape=(2, 3, 5, 7),
    operands=(torch.float32,) * 3,
    dtypes=(torch.float32,) * 2,
    precision=torch.float32,
    clamped=False,
    layouts=("contiguous",),
    zeros=0.3,
):
    """Random arguments of weighted_sums, as a tuple."""
    count = len(operands)
    tensors = [
        laid_out(torch.randn(shape).to(dtype), layouts[i % len(layouts)])
        for i, dtype in enumerate(operands)
    ]
    weights = torch.randn(len(dtypes), count + clamped, dtype=precision)
    weights[torch.rand(weights.shape) < zeros] = 0
    clamp = torch.randn(2 + count, dtype=precision)
    clamp[0], clamp[1] = -0.5, 0.7
    return tensors, weights, list(dtypes), clamp if clamped else None


def assert_equals_reference(arguments):
    operands, _, dtypes, _ = arguments
    before = [operand.clone() for operand in operands]
    expected, got = weighted_sums_ref(*arguments), weighted_sums(*arguments)
    assert len(got) == len(expected)
    for dtype, result, wanted in zip(dtypes, got, expected, strict=True):
        assert result.dtype == dtype and result.stride() == wanted.stride()
        assert torch.equal(bits(result), bits(wanted))
    for operand, value in zip(operands, before, strict=True):
        assert torch.equal(operand, value)
    memory = {tensor.untyped_storage().data_ptr() for tensor in got if tensor.numel()}
    assert len(memory) == len([tensor for tensor in got if tensor.numel()])
    assert not memory & {operand.untyped_storage().data_ptr() for operand in operands}


@settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.lists(st.integers(0, 5), max_size=5),
    operands=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=MAX_OPERANDS),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=1, max_size=MAX_SUMS),
    precision=st.sampled_from((torch.float32, torch.float64)),
    clamped=st.booleans(),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=1, max_size=3),
    long=st.sampled_from([1, 1, 1, 257, 1024, 1025]),
)
def test_kernel_equals_reference(shape, operands, dtypes, precision, clamped, layouts, long):
    if len(shape) in (2, 3):
        shape[-1] *= long
    assert_equals_reference(problem(tuple(shape), operands, dtypes, precision, clamped, layouts))


@pytest.mark.parametrize(("shape", "count"), [((1, 3, 640, 656), 2), ((3, 3, 521, 257), 1)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_large_launches_equal_the_reference(shape, dtype, count):
    """Enough work for several threads, and for stores past the caches, with tails."""
    arguments = problem(shape, (dtype,) * 4, (dtype, torch.float32), clamped=True, zeros=0)
    with threads(count):
        assert_equals_reference(arguments)


@pytest.mark.parametrize(
    ("precision", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)]
)
@pytest.mark.parametrize("clamped", [False, True])
@pytest.mark.parametrize("count", range(1, MAX_OPERANDS + 1))
def test_sums_are_near_their_formulas_in_float64(count, clamped, precision, tolerance):
    arguments = problem((2, 3, 9), (precision,) * count, (precision,) * 3, precision, clamped)
    terms = [operand.double().numpy() for operand in arguments[0]]
    if clamped:
        lo, hi, *factors = arguments[3].double().numpy()
        terms.append(numpy.clip(numpy.tensordot(factors, numpy.stack(terms), 1), lo, hi))
    expected = numpy.tensordot(arguments[1].double().numpy(), numpy.stack(terms), 1)
    for result, wanted in zip(weighted_sums(*arguments), torch.from_numpy(expected), strict=True):
        assert (result - wanted).abs().max() < tolerance * (1 + wanted.abs().max())


def test_clipped_ddim():
    x, eps = (torch.randn(2, 3, 8, 8, dtype=torch.float64) for _ in range(2))
    alpha, sigma, alpha_next, sigma_next = 0.6, 0.8, 0.8, 0.6
    weights = torch.tensor([[0, sigma_next, alpha_next], [0, 0, 1]], dtype=torch.float64)
    clamp = torch.tensor([-1, 1, 1 / alpha, -sigma / alpha], dtype=torch.float64)
    following, x0 = weighted_sums([x, eps], weights, [torch.float64] * 2, clamp)
    expected = ((x - sigma * eps) / alpha).clamp(-1, 1)
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-14)
    expected = alpha_next * expected + sigma_next * eps
    torch.testing.assert_close(following, expected, rtol=0, atol=1e-14)


def test_the_order_of_the_sum():
    """From the first operand to the last, each operation rounded, the clamped value at the end."""
    big = torch.tensor([2.0**24])
    operands, ones = [big, torch.ones(1), -big], torch.ones(1, 3)
    assert weighted_sums(operands, ones, [torch.float32])[0] == 0  # 2^24 + 1 = 2^24 in float32
    assert weighted_sums(operands, ones.double(), [torch.float32])[0] == 1
    clamp = torch.tensor([-1.0, 1.0, 1.0, 0.0, 0.0])
    weights = torch.tensor([[1.0, 0.0, 1.0, 0.25]])
    assert weighted_sums(operands, weights, [torch.float32], clamp)[0] == 0.25
    # A fused multiply-add would keep what the product's rounding drops: 2^-24.
    x = torch.full((64,), 1 + 2.0**-12)
    weights = torch.tensor([[-1.0, 1 + 2.0**-12]])
    assert not weighted_sums([x * x, x], weights, [torch.float32])[0].any()


@pytest.mark.parametrize("call", [weighted_sums, weighted_sums_ref])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_zero_weights_hide_their_operands(value, dtype, call):
    good, bad = torch.randn(3, 700), torch.full((3, 700), value, dtype=dtype)
    weights = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -0.0]])
    first, second, third = call([good, bad], weights, [torch.float32] * 3)
    assert torch.equal(first, 2 * good)
    assert not second.isfinite().any()
    assert torch.equal(bits(third), bits(torch.zeros(3, 700)))
    # Likewise the clamp's factors, and the weight of the clamped value.
    clamp = torch.tensor([-0.1, 0.1, 1.0, 0.0])
    weights = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 3.0]])
    first, second = call([good, bad], weights, [torch.float32] * 2, clamp)
    assert torch.equal(second, 3 * good.clamp(-0.1, 0.1))
    assert torch.equal(first, good + good.clamp(-0.1, 0.1))
    clamp = torch.tensor([NAN, value, value, 1.0])
    weights = torch.tensor([[1.0, 0.0, 0.0]])
    assert torch.equal(call([good, bad], weights, [torch.float32], clamp)[0], good)


def test_clamp_keeps_nan():
    x = torch.tensor([NAN, -5.0, 5.0, 0.5, math.inf, -math.inf])
    clamp = torch.tensor([-1.0, 1.0, 1.0])
    (result,) = weighted_sums([x], torch.tensor([[0.0, 1.0]]), [torch.float32], clamp)
    expected = torch.tensor([NAN, -1, 1, 0.5, 1, -1])
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_conversions_round_as_torch_rounds(dtype):
    """Every float16 and bfloat16 value in; ties, subnormals, overflow and NaN out."""
    halves = torch.arange(2**16, dtype=torch.int32).short()
    for source in (halves.view(torch.float16), halves.view(torch.bfloat16)):
        for scale in (1.0, 1 + 2**-9, 1 / 3):
            weights = torch.tensor([[scale]])
            (result,) = weighted_sums([source], weights, [dtype])
            expected = (source.float() * weights + 0.0).to(dtype)[0]  # sums hold no -0
            assert torch.equal(bits(result), bits(expected))


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_results_have_the_memory_order_that_torch_gives(layout):
    """That of `torch.empty_like`, whatever the other operands'."""
    first, other = laid_out(torch.randn(2, 3, 4, 5), layout), torch.randn(2, 3, 4, 5)
    results = weighted_sums([first, other], torch.ones(2, 2), [torch.float16, torch.float32])
    for result in results:
        assert result.stride() == torch.empty_like(first).stride()
    assert torch.equal(results[1], first + other)


# The same launches in a process that lacks the extension, or an instruction set.
LAUNCHES = """
import hashlib, sys, torch
{setup}
from fastdiff import _ext
from fastdiff.ops import weighted_sums
g = torch.Generator().manual_seed(1)
digest = hashlib.sha256()
for precision in (torch.float32, torch.float64):
    for kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        operands = [torch.randn(3, 21, 33, generator=g).to(kind) for _ in range(5)]
        weights = torch.randn(2, 6, generator=g).to(precision)
        clamp = torch.randn(7, generator=g).to(precision)
        for result in weighted_sums(operands, weights, [kind, torch.float32], clamp):
            digest.update(result.view(torch.uint8).numpy().tobytes())
print(_ext.build_info().get("cpu_target", "reference"), digest.hexdigest())
"""


def test_every_cpu_target_and_the_reference_agree(same_everywhere):
    same_everywhere(LAUNCHES)


@pytest.mark.parametrize("clamped", [False, True])
def test_the_op_passes_opcheck(clamped):
    operands, weights, dtypes, clamp = problem(clamped=clamped, layouts=("channels_last",))
    results = [torch.empty_like(operands[0], dtype=dtype) for dtype in dtypes]
    operator = torch.ops.fastdiff.weighted_sums.default
    torch.library.opcheck(operator, (operands, weights, clamp, results))


@pytest.mark.parametrize("call", [weighted_sums, weighted_sums_unchecked])
@pytest.mark.parametrize("layouts", [("contiguous",), ("channels_last", "contiguous", "sliced")])
def test_compiles_without_graph_breaks(layouts, call):
    arguments = problem(
        clamped=True, layouts=layouts, zeros=0, dtypes=(torch.float32, torch.bfloat16)
    )
    expected = call(*arguments)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(operands, weights, dtypes, clamp):
        first, second = call([operands[0] * 1.0, *operands[1:]], weights, dtypes, clamp)
        return first + 1, second

    first, second = step(*arguments)
    assert torch.equal(first, expected[0] + 1) and torch.equal(second, expected[1])
    assert second.stride() == expected[1].stride()


def _replaced(i, value):
    """A change of one operand."""
    return lambda operands, *rest: ([*operands[:i], value, *operands[i + 1 :]], *rest)


def _with(**changes):
    """A change of the arguments after the operands."""
    names = ("operands", "weights", "dtypes", "clamp")
    return lambda *given: tuple({**dict(zip(names, given, strict=True)), **changes}.values())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (_with(operands=[]), ValueError, "operands must be 1 to 8 tensors, got 0"),
        (_with(operands=[torch.zeros(1)] * 9), ValueError, "operands must be 1 to 8 .* got 9"),
        (_replaced(1, 1.0), TypeError, r"operands\[1\] must be a tensor, got float"),
        (
            _replaced(2, torch.zeros(2, 3, 5, 7).int()),
            TypeError,
            r"operands\[2\] must be torch.float64 or .* got torch.int32",
        ),
        (
            _replaced(1, torch.zeros(3, 5, 7)),
            ValueError,
            r"operands\[1\] must have the shape \(2, 3, 5, 7\), got \(3, 5, 7\)",
        ),
        (
            _replaced(1, torch.zeros(2, 3, 5, 7, device="meta")),
            ValueError,
            r"operands\[1\] must be on the device of operands\[0\], cpu, got meta",
        ),
        (
            _replaced(1, torch.zeros(2, 3, 5, 7, requires_grad=True)),
            ValueError,
            r"not differentiable: call it under torch.no_grad\(\)",
        ),
        (_with(weights=[[1.0] * 4] * 2), TypeError, "weights must be a tensor, got list"),
        (_with(weights=torch.zeros(2, 4).half()), TypeError, "weights must be torch.float32 or"),
        (_with(weights=torch.zeros(2, 3)), ValueError, r"weights must have the shape \(1, 4\) or"),
        (_with(weights=torch.zeros(4, 4)), ValueError, r"or \(3, 4\), got \(4, 4\)"),
        (_with(weights=torch.zeros(4)), ValueError, r"or \(3, 4\), got \(4,\)"),
        (_with(weights=torch.zeros(4, 2).T), ValueError, "weights must be contiguous, got strides"),
        (_with(weights=torch.zeros(2, 4, device="meta")), ValueError, "weights must be on the"),
        (_with(dtypes=[torch.float32]), ValueError, "dtypes must be 2, one a row .* got 1"),
        (
            _with(dtypes=[torch.float32, torch.int32]),
            TypeError,
            r"dtypes\[1\] must be torch.float64 or .* got torch.int32",
        ),
        (_with(clamp=None), ValueError, r"weights must have the shape \(1, 3\) or"),
        (_with(clamp=torch.zeros(5).double()), TypeError, "clamp must be torch.float32"),
        (_with(clamp=torch.zeros(4)), ValueError, r"clamp must have the shape \(5,\), got \(4,\)"),
        (_with(clamp=torch.zeros(10)[::2]), ValueError, "clamp must be contiguous, got strides"),
    ],
)
def test_bad_arguments_are_named(change, error, match):
    arguments = change(*problem(clamped=True))
    with pytest.raises(error, match=match):
        weighted_sums(*arguments)


def test_gradients_may_be_off():
    operands, *rest = problem()
    with torch.no_grad():
        results = weighted_sums([operand.requires_grad_() for operand in operands], *rest)
    assert not any(result.requires_grad for result in results)


@pytest.mark.skipif(not _ext.HAS_EXT, reason="needs the C++ extension")
def test_unchecked_calls_are_refused_where_they_would_reach_foreign_memory():
    x = torch.zeros(3)
    for operands, weights, clamp in (
        ([x, x], torch.zeros(1, 1), None),
        ([x, torch.zeros(2)], torch.zeros(1, 2), None),
        ([x] * 9, torch.zeros(1, 9), None),
        ([x], torch.zeros(1, 2), torch.zeros(2)),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            weighted_sums_unchecked(operands, weights, [torch.float32], clamp)
