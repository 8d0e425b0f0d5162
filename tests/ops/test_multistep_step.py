"""The fused step: kernel equal to reference bit for bit, both near the textbook in float64."""

import itertools
import math

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff.ops import (
    allocate_slots,
    multistep_step,
    multistep_step_ref,
    multistep_step_unchecked,
)
from fastdiff.ops.constants import READS, STAGE_NOISE, WRITES
from fastdiff.ops.layout import sample_strides
from fastdiff.ops.philox import philox_normal_ref
from fastdiff.ops.row import Head, Weights, columns, head, index, weights, width
from tests.helpers.threads import threads

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channels_last")
NAN = math.nan
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


def bits(tensor):
    """Bit patterns, with every NaN alike."""
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    return torch.where(tensor.isnan(), 0x7FFF, tensor.contiguous().view(integers))


def assert_equals_reference(arguments):
    expected = copied(arguments)
    multistep_step_ref(*expected.values())
    multistep_step(**arguments)
    for name in ("slots", "network_input"):
        if arguments[name] is not None:
            assert torch.equal(bits(arguments[name]), bits(expected[name])), name


@pytest.mark.parametrize("writes", WRITES)
@pytest.mark.parametrize("reads", READS)
def test_kernel_equals_reference(reads, writes):
    dtypes = itertools.cycle(itertools.product(FLOATS, FLOATS))
    for layout, dtype, noise, guided, per_sample in itertools.product(
        LAYOUTS, (torch.float32, torch.float64), (None, "seeds", "given"), (0, 1), (0, 1)
    ):
        output_dtype, input_dtype = next(dtypes)
        arguments = problem(
            (3, 3, 5, 7),
            reads,
            writes,
            layout,
            dtype,
            output_dtype,
            input_dtype,
            bool(guided),
            bool(per_sample),
            noise,
            doubled=bool(guided),
        )
        assert_equals_reference(arguments)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    layout=st.sampled_from(LAYOUTS),
    noise=st.sampled_from([None, "seeds", "given"]),
    output_dtype=st.sampled_from(FLOATS),
    input_dtype=st.sampled_from(FLOATS),
    guided=st.booleans(),
    per_sample=st.booleans(),
    long=st.sampled_from([1, 1, 1, 257, 1024, 1025]),
)
def test_any_shape(shape, layout, noise, output_dtype, input_dtype, guided, per_sample, long):
    if len(shape) in (2, 3):
        shape[-1] *= long
    arguments = problem(
        tuple(shape),
        layout=layout,
        noise=noise,
        output_dtype=output_dtype,
        input_dtype=input_dtype,
        guided=guided,
        per_sample=per_sample,
        doubled=guided,
    )
    assert_equals_reference(arguments)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("shape", "noise"),
    [((2, 3, 256, 512), None), ((3, 3, 511, 257), None), ((3, 3, 101, 67), "seeds")],
)
def test_large_launches(shape, noise, count):
    """Enough work for several threads, and for stores past the caches, aligned and not."""
    arguments = problem(shape, reads=4, writes=2, noise=noise)
    with threads(count):
        assert_equals_reference(arguments)


def test_operands_may_have_gaps():
    """A learned-variance network's output[:, :C], a noise and an input that are slices."""
    wide = torch.randn(4, 6, 5, 5)
    arguments = problem((4, 3, 5, 5), noise="given", zeros=0)
    arguments["output"] = wide[:, :3]
    arguments["noise"] = torch.randn(4, 6, 5, 5)[:, 3:]
    arguments["network_input"] = torch.zeros(4, 6, 5, 5)[:, :3]
    assert_equals_reference(arguments)
    slots = torch.randn(9, 4, 3, 5, 5)[::2]
    arguments = problem((4, 3, 5, 5), zeros=0) | {"slots": slots[:4]}
    assert_equals_reference(arguments)


def test_slots_start_on_64_bytes():
    for shape in ((3, 3, 5, 7), (1, 1), (2, 0), (4,)):
        for dtype in (torch.float32, torch.float64):
            arena = allocate_slots(3, torch.zeros(shape, dtype=dtype))
            assert arena.shape == (3, *shape) and arena.dtype == dtype
            assert arena.stride(0) * arena.element_size() % 64 == 0
            assert arena[0].is_contiguous()
    sample = torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last)
    arena = allocate_slots(2, sample.half())
    assert arena.dtype == torch.float32
    assert arena[1].is_contiguous(memory_format=torch.channels_last)


def oracle(arguments):
    """The step in float64, written from its formulas, one sample at a time: slots, input."""
    a = arguments
    slots = a["slots"].double().numpy().copy()
    reads, batch = a["reads"], slots.shape[1]
    stage, purpose, *which = a["index"].tolist()
    new = {}
    for b in range(batch):
        row = a["coefficients"].double().numpy()[b % len(a["coefficients"])][None]
        p, q, low, high, _ = (column.item() for column in head(row))
        state = [slots[i, b] for i in which[:reads]]
        model = a["output"][b].double().numpy()
        if a["guidance"] is not None:
            scale = a["guidance"].double()[b % len(a["guidance"])].item()
            model = (1 - scale) * model + scale * a["output"][batch + b].double().numpy()
        z = 0.0
        if a["noise"] is not None:
            z = a["noise"][b].double().numpy()
        if a["seeds"] is not None:
            z = philox_normal_ref(a["seeds"][b : b + 1], model.size, stage, purpose)
            z = z.double().numpy().reshape(model.shape)
        x0 = numpy.clip(p * model + q * state[0], low, high)
        for w, factors in enumerate(weights(row, reads)):
            total = factors.sample * x0 + factors.output * model + factors.noise * z
            slot_factors = numpy.concatenate(factors.slots)
            new[w, b] = total + numpy.tensordot(slot_factors, numpy.stack(state), 1)
    for (w, b), value in new.items():
        slots[which[reads + w], b] = value
    first = numpy.stack([new[0, b] for b in range(batch)])
    scale = head(a["coefficients"]).input_scale.double().numpy()
    scale = scale.reshape(-1, *(1 for _ in first.shape[1:]))
    return torch.from_numpy(slots), torch.from_numpy(scale * first)


@pytest.mark.parametrize("noise", [None, "seeds", "given"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_float64_oracle(dtype, tolerance, guided, noise):
    for reads, per_sample in itertools.product((1, 4, 16), (False, True)):
        arguments = problem(
            reads=reads,
            writes=3,
            dtype=dtype,
            output_dtype=dtype,
            input_dtype=dtype,
            guided=guided,
            per_sample=per_sample,
            noise=noise,
        )
        slots, network_input = oracle(arguments)
        multistep_step(**arguments)
        size = 1 + slots.abs().max()
        assert (arguments["slots"] - slots).abs().max() < tolerance * size
        assert (arguments["network_input"] - network_input).abs().max() < tolerance * size


def test_ddim_and_adams_bashforth():
    """Two textbook steps: clipped DDIM, and second-order Adams-Bashforth keeping its history."""
    x, eps, old = (torch.randn(2, 3, 8, 8, dtype=torch.float64) for _ in range(3))
    alpha, sigma, alpha_next, sigma_next = 0.6, 0.8, 0.8, 0.6

    slots = torch.stack([x])
    to_x0 = Head(p=-sigma / alpha, q=1 / alpha, low=-1, high=1, input_scale=1)
    row = columns(to_x0, [Weights(sample=alpha_next, output=sigma_next, noise=0, slots=[0])])
    row = torch.tensor([row], dtype=torch.float64)
    multistep_step(slots, eps, row, ONE_SLOT, reads=1, writes=1)
    x0 = ((x - sigma * eps) / alpha).clamp(-1, 1)
    torch.testing.assert_close(slots[0], alpha_next * x0 + sigma_next * eps, rtol=0, atol=1e-14)

    slots = torch.stack([x, old])
    ratio = alpha_next / alpha
    step = sigma_next - sigma * ratio
    new_x = Weights(sample=0, output=1.5 * step, noise=0, slots=[ratio, -0.5 * step])
    new_old = Weights(sample=0, output=1, noise=0, slots=[0, 0])
    row = torch.tensor([columns(NO_X0, [new_x, new_old])], dtype=torch.float64)
    both = torch.tensor(index(0, STAGE_NOISE, [0, 1], [0, 1]), dtype=torch.int32)
    multistep_step(slots, eps, row, both, reads=2, writes=2)
    expected = ratio * x + step * (1.5 * eps - 0.5 * old)
    torch.testing.assert_close(slots[0], expected, rtol=0, atol=1e-14)
    assert torch.equal(slots[1], eps)


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
def test_half_conversions(dtype):
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


def test_wide_channels_last_noise():
    """More channels than a chunk of work has elements."""
    assert_equals_reference(problem((2, 2500, 3, 1), layout="channels_last", noise="seeds"))


# The same launches in a process that lacks the extension, or an instruction set.
LAUNCHES = """
import hashlib, sys, torch
{setup}
from fastdiff import _ext
from fastdiff.ops import multistep_step_unchecked as step
from fastdiff.ops.row import head, width
g = torch.Generator().manual_seed(1)
digest = hashlib.sha256()
for dtype in (torch.float32, torch.float64):
    for kind in (torch.float16, torch.bfloat16, torch.float32):
        slots = torch.randn(4, 3, 3, 21, 33, generator=g).to(dtype)
        output = torch.randn(6, 3, 21, 33, generator=g).to(kind)
        row = torch.randn(3, width(4, 2), generator=g).to(dtype)
        head(row).low[:], head(row).high[:] = -1, 1
        index = torch.tensor([5, 0, 0, 1, 2, 3, 3, 0], dtype=torch.int32)
        guidance = torch.tensor([7.5], dtype=dtype)
        network_input = torch.empty(6, 3, 21, 33, dtype=kind)
        seeds = torch.tensor([1, 2, -3])
        step(slots, output, row, index, guidance, seeds, None, network_input, 4, 2)
        for tensor in (slots, network_input):
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
print(_ext.build_info().get("cpu_target", "reference"), digest.hexdigest())
"""


def test_every_cpu_target_and_the_reference_agree(same_everywhere):
    same_everywhere(LAUNCHES)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noise", [None, "seeds", "given"])
def test_opcheck(layout, noise):
    arguments = problem(layout=layout, noise=noise, guided=noise == "seeds", doubled=True)
    torch.library.opcheck(multistep_step_unchecked, tuple(arguments.values()))


def test_compiles_without_graph_breaks():
    arguments = problem(noise="seeds", guided=True)
    expected = copied(arguments)
    multistep_step(**expected)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(slots, network_input, rest):
        scaled = {**rest, "output": rest["output"] * 1.0}
        multistep_step(slots=slots, network_input=network_input, **scaled)
        return network_input + 1

    rest = {k: v for k, v in arguments.items() if k not in ("slots", "network_input")}
    result = step(arguments["slots"], arguments["network_input"], rest)
    assert torch.equal(arguments["slots"], expected["slots"])
    assert torch.equal(result, expected["network_input"] + 1)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"reads": 3}, ValueError, r"reads must be one of \(1, 2, 4, 8, 16\), got 3"),
        ({"writes": 4}, ValueError, r"writes must be one of \(1, 2, 3\), got 4"),
        ({"slots": [1.0]}, TypeError, "slots must be a tensor, got list"),
        ({"slots": torch.zeros(4, 3, 5).half()}, TypeError, "slots must be torch.float32 or"),
        ({"slots": torch.zeros(4)}, ValueError, r"slots must have the shape \[S, B, \.\.\.\]"),
        (
            {"slots": torch.zeros(4, 3, 5, 7, 3).transpose(2, 3)},
            ValueError,
            "slots must be contiguous or channels_last",
        ),
        ({"slots": torch.zeros(1, 3, 3, 5, 7).expand(4, -1, -1, -1, -1)}, ValueError, "overlap"),
        ({"slots": torch.zeros(4, 6, 3, 5, 7)[:, ::2]}, ValueError, "slots must be dense"),
        ({"output": torch.zeros(3, 3, 5, 8)}, ValueError, r"output must have the shape \(3, 3"),
        ({"output": torch.zeros(6, 3, 5, 7)}, ValueError, r"output must have the shape \(3, 3"),
        ({"output": torch.zeros(3, 3, 5, 7).int()}, TypeError, "output must be torch.float64 or"),
        (
            {"output": torch.zeros(3, 5, 7, 3).permute(0, 3, 1, 2)},
            ValueError,
            "output must be contiguous within each sample",
        ),
        ({"coefficients": torch.zeros(1, 14)}, ValueError, r"coefficients must .* got \(1, 14\)"),
        ({"coefficients": torch.zeros(1, 15).double()}, TypeError, "coefficients must be"),
        ({"index": torch.zeros(6)}, TypeError, "index must be torch.int32"),
        ({"index": torch.zeros(5).int()}, ValueError, r"index must have the shape \(6,\)"),
        ({"guidance": torch.zeros(2)}, ValueError, r"guidance must have the shape|output must"),
        ({"guidance": torch.zeros(1), "output": None}, ValueError, "guidance needs output"),
        ({"seeds": torch.zeros(3)}, TypeError, "seeds must be torch.int64"),
        ({"seeds": torch.zeros(2).long()}, ValueError, r"seeds must have the shape \(3,\)"),
        (
            {"seeds": torch.zeros(3).long(), "noise": torch.zeros(3, 3, 5, 7)},
            ValueError,
            "at most one of seeds and noise",
        ),
        ({"noise": torch.zeros(3, 3, 5, 7).half()}, TypeError, "noise must be torch.float32"),
        ({"network_input": torch.zeros(4, 3, 5, 7)}, ValueError, r"network_input must .* or \(6"),
        (
            {"network_input": torch.zeros(1, 3, 5, 7).expand(3, -1, -1, -1)},
            ValueError,
            "network_input must not overlap",
        ),
        ({"seeds": torch.zeros(6).long()[::2]}, ValueError, "seeds must be contiguous"),
        ({"output": torch.zeros(3, 3, 5, 7, device="meta")}, ValueError, "output must be on the"),
        (
            {"output": torch.zeros(3, 3, 5, 7, requires_grad=True)},
            ValueError,
            "not differentiable",
        ),
    ],
)
def test_bad_arguments(change, error, match):
    arguments = problem() | change
    with pytest.raises(error, match=match):
        multistep_step(**arguments)


@pytest.mark.parametrize("slot", [-1, 4, 2**30])
def test_unknown_slots_are_refused_on_the_cpu(slot):
    arguments = problem()
    arguments["index"][3] = slot
    with pytest.raises((RuntimeError, IndexError), match="index"):
        multistep_step(**arguments)


@pytest.mark.parametrize("count", [0, -1, 1.5])
def test_allocate_slots_errors(count):
    with pytest.raises(ValueError, match="count must be a positive integer"):
        allocate_slots(count, torch.zeros(1, 2))
