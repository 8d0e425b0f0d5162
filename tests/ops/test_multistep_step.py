"""The fused step: kernel equal to reference bit for bit, both near the textbook in float64."""

import itertools

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdiff.ops import allocate_slots, multistep_step, multistep_step_unchecked
from fastdiff.ops.constants import READS, STAGE_NOISE, WRITES
from fastdiff.ops.philox import philox_normal_ref
from fastdiff.ops.row import Head, Weights, columns, head, index, weights
from tests.helpers.multistep import (
    LAYOUTS,
    NO_X0,
    ONE_SLOT,
    assert_equals_reference,
    copied,
    problem,
)
from tests.helpers.tensors import FLOATS
from tests.helpers.threads import threads


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
def test_any_shape_equals_the_reference(
    shape, layout, noise, output_dtype, input_dtype, guided, per_sample, long
):
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
def test_large_launches_equal_the_reference(shape, noise, count):
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
def test_a_step_is_near_its_formulas_in_float64(dtype, tolerance, guided, noise):
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
def test_the_op_passes_opcheck(layout, noise):
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
