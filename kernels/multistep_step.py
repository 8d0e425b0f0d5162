"""One launch per solver stage: `fastdiff::multistep_step` on CUDA tensors, in Triton.

Bytes: each operand with a non-zero coefficient is read once, each write slot and the network input
is written once, nothing else moves. For n float32 elements that is 4 n (reads + writes), plus the
network output (twice under guidance) and the network input (likewise) in their own dtypes. Memory
bandwidth is the bound, save where seeded noise (70 instructions an element) meets few operands.

Coefficients and slot indices are read from device memory: a captured launch serves another schedule
unchanged. IEEE arithmetic in a fixed order, no contraction: the reference's result, bit for bit.
"""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._tuning import CHOICES, HEURISTIC, Config, config
from .philox import normals, normals_of_quads


@triton.jit
def _term(coefficient, value):
    """coefficient * value, where a zero coefficient silences NaN and infinity."""
    return tl.where(coefficient != 0, coefficient * value, 0.0)


@triton.jit(do_not_specialize=["row_stride", "guidance_stride", "channels"])
def _multistep_step_kernel(
    slots,
    output,
    coefficients,
    index,
    guidance,
    seeds,
    noise,
    network_input,
    elements,  # of one sample
    slot_stride,
    output_stride,  # between samples
    guided_offset,  # from the unconditional to the conditional half of output
    row_stride,  # 0: one row for all samples
    guidance_stride,
    noise_stride,
    input_stride,
    input_copy_offset,  # from the first to the second copy of network_input
    channels,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    INPUT_COPIES: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = slots.dtype.element_ty
    blocks = (elements - 1) // BLOCK + 1
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    inside = offsets < elements

    row = coefficients + sample * row_stride
    p, q = tl.load(row), tl.load(row + 1)
    low, high = tl.load(row + 2), tl.load(row + 3)
    # Weights of the writes: x0, output, noise, then the slots. They are loaded again where they are
    # used: that is a cache hit, and holding up to 57 of them costs the registers of a spill.
    WEIGHTS: tl.constexpr = 3 + READS
    weights = row + 5
    use_x0 = False
    use_output = False
    use_noise = False
    for w in tl.static_range(WRITES):
        use_x0 |= tl.load(weights + w * WEIGHTS) != 0
        use_output |= tl.load(weights + w * WEIGHTS + 1) != 0
        use_noise |= tl.load(weights + w * WEIGHTS + 2) != 0

    # Loads come first: all in flight together, and before any write.
    state = slots + sample * elements + offsets
    reads = ()
    for r in tl.static_range(READS):
        used = use_x0 & (q != 0) if r == 0 else False
        for w in tl.static_range(WRITES):
            used |= tl.load(weights + w * WEIGHTS + 3 + r) != 0
        slot = tl.load(index + 2 + r).to(tl.int64)
        reads = reads + (tl.load(state + slot * slot_stride, mask=inside & used, other=0.0),)

    x0 = _term(q, reads[0])
    if output is not None:
        used = use_output | (use_x0 & (p != 0))
        pointer = output + sample * output_stride + offsets
        raw = tl.load(pointer, mask=inside & used, other=0.0).to(dtype)
        if guidance is not None:
            scale = tl.load(guidance + sample * guidance_stride)
            conditional = tl.load(pointer + guided_offset, mask=inside & used, other=0.0).to(dtype)
            raw += scale * (conditional - raw)
        x0 += _term(p, raw)
    # Comparisons are false on NaN: it passes.
    x0 = tl.where(x0 < low, low, x0)
    x0 = tl.where(x0 > high, high, x0)

    if noise is not None:
        z = tl.load(noise + sample * noise_stride + offsets, mask=inside & use_noise, other=0.0)
    elif seeds is not None:
        seed = tl.load(seeds + sample)
        stage, purpose = tl.load(index), tl.load(index + 1)
        if CHANNELS_LAST:
            # Memory to logical index, with 64-bit divisions on scalars only.
            local = (start % channels).to(tl.int32) + tl.arange(0, BLOCK)
            pixel = start // channels + local // channels
            logical = (local % channels) * (elements // channels).to(tl.int64) + pixel
            z = normals(seed, logical, stage, purpose).to(dtype)
        else:
            quads = start // 4 + tl.arange(0, BLOCK // 4)
            z = normals_of_quads(seed, quads, stage, purpose).to(dtype)

    for w in tl.static_range(WRITES):
        # Starting from +0.0 leaves no negative zero in any sum.
        total = tl.zeros([BLOCK], dtype)
        for r in tl.static_range(READS):
            total += _term(tl.load(weights + w * WEIGHTS + 3 + r), reads[r])
        total += _term(tl.load(weights + w * WEIGHTS), x0)
        if output is not None:
            total += _term(tl.load(weights + w * WEIGHTS + 1), raw)
        if (noise is not None) or (seeds is not None):
            total += _term(tl.load(weights + w * WEIGHTS + 2), z)
        slot = tl.load(index + 2 + READS + w).to(tl.int64)
        tl.store(state + slot * slot_stride, total, mask=inside)
        if w == 0 and network_input is not None:
            scaled = tl.load(row + 4) * total
            if network_input.dtype.element_ty.primitive_bitwidth < 32:
                # float64 reaches 16 bits through float32, as in PyTorch.
                scaled = scaled.to(tl.float32)
            pointer = network_input + sample * input_stride + offsets
            for copy in tl.static_range(INPUT_COPIES):
                tl.store(pointer + copy * input_copy_offset, scaled, mask=inside)


def plan(
    slots: Tensor,
    output: Tensor | None,
    coefficients: Tensor,
    index: Tensor,
    guidance: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
    network_input: Tensor | None,
    reads: int,
    writes: int,
    chosen: Config = HEURISTIC,
) -> tuple[int, dict[str, object]]:
    """Programs and keyword arguments of the launch these tensors need; address arithmetic alone.

    A program is as wide as `chosen` says, or as narrow as one small sample asks. All its operands
    share one register layout. The result does not depend on it.
    """
    batch, sample = slots.shape[1], slots.shape[2:]
    elements = sample.numel()
    # With one channel or one pixel both layouts are the same.
    channels_last = sample[1:].numel() > 1 < sample[0] and slots.stride(2) == 1
    threads, per_thread = chosen.threads, chosen.bytes_per_thread // slots.element_size()
    while threads > 32 and threads * per_thread >= 2 * elements:
        threads //= 2
    block = threads * per_thread
    return batch * triton.cdiv(elements, block), {
        "slots": slots,
        "output": output,
        "coefficients": coefficients,
        "index": index,
        "guidance": guidance,
        "seeds": seeds,
        "noise": noise,
        "network_input": network_input,
        "elements": elements,
        "slot_stride": slots.stride(0),
        "output_stride": 0 if output is None else output.stride(0),
        "guided_offset": 0 if guidance is None else batch * output.stride(0),
        "row_stride": 0 if coefficients.shape[0] == 1 else coefficients.stride(0),
        "guidance_stride": 0 if guidance is None or guidance.shape[0] == 1 else 1,
        "noise_stride": 0 if noise is None else noise.stride(0),
        "input_stride": 0 if network_input is None else network_input.stride(0),
        "input_copy_offset": 0 if network_input is None else batch * network_input.stride(0),
        "channels": sample[0] if channels_last else 1,
        "READS": reads,
        "WRITES": writes,
        "INPUT_COPIES": 0 if network_input is None else network_input.shape[0] // batch,
        "CHANNELS_LAST": channels_last and seeds is not None,
        "BLOCK": block,
        "num_warps": threads // 32,
        "enable_fp_fusion": False,
    }


def launch(
    slots: Tensor,
    output: Tensor | None,
    coefficients: Tensor,
    index: Tensor,
    guidance: Tensor | None,
    seeds: Tensor | None,
    noise: Tensor | None,
    network_input: Tensor | None,
    reads: int,
    writes: int,
) -> None:
    """`fastdiff.ops.multistep_step` on checked arguments; allocates nothing, never synchronises."""
    if slots.shape[1:].numel() == 0:
        return
    chosen = config("multistep_step", f"R{reads} W{writes}", slots.device)
    programs, arguments = plan(
        slots, output, coefficients, index, guidance, seeds, noise, network_input, reads, writes,
        chosen,
    )  # fmt: skip
    with torch.cuda.device_of(slots):
        _multistep_step_kernel[(programs,)](**arguments)


def aot_variants() -> Iterator[tuple[str, object, dict[str, object], int]]:
    """For `python -m bench.aot`: name, kernel, arguments of a launch, 128-bit accesses to be there.

    Every R x W with all operands, then what else changes the code, one at a time.
    """

    def variant(
        name: str,
        reads: int,
        writes: int,
        sample: tuple[int, ...] = (4, 64, 64),
        dtype: torch.dtype = torch.float32,
        output: torch.dtype | None = torch.bfloat16,
        network_input: torch.dtype | None = torch.bfloat16,
        guided: bool = True,
        seeded: bool = False,
        given_noise: bool = False,
        channels_last: bool = False,
        chosen: Config = HEURISTIC,
    ) -> tuple[str, object, dict[str, object], int]:
        batch, forward = 2, 4 if guided else 2

        def empty(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=of, device="meta")

        slots = empty(reads + writes, batch, *sample)
        if channels_last:
            slots = slots[0].to(memory_format=torch.channels_last).expand_as(slots)
        _, arguments = plan(
            slots,
            empty(forward, *sample, of=output) if output else None,
            empty(batch, 5 + writes * (3 + reads)),
            empty(2 + reads + writes, of=torch.int32),
            empty(batch) if guided else None,
            empty(batch, of=torch.int64) if seeded else None,
            empty(batch, *sample) if given_noise else None,
            empty(forward, *sample, of=network_input) if network_input else None,
            reads,
            writes,
            chosen,
        )
        name = f"R={reads} W={writes} {name}"
        wide = reads + writes if math.prod(sample) % 16 == 0 else 0
        return name, _multistep_step_kernel, arguments, wide

    for reads in (1, 2, 4, 8, 16):
        for writes in (1, 2, 3):
            yield variant("all operands", reads, writes, seeded=True)
    plain = {"guided": False, "network_input": None, "output": torch.float32}
    yield variant("plain", 1, 1, **plain)
    yield variant("plain", 4, 1, **plain)
    yield variant("no output", 1, 1, guided=False, output=None)
    noise = {"guided": False, "network_input": None, "output": None, "seeded": True}
    yield variant("seeded noise alone", 1, 1, **noise)
    yield variant("given noise", 1, 1, **plain, given_noise=True)
    yield variant("seeded channels_last", 1, 1, **plain, seeded=True, channels_last=True)
    yield variant("odd size", 16, 3, sample=(3, 31, 31), seeded=True)
    yield variant("float64", 16, 3, dtype=torch.float64, output=torch.float64, seeded=True)
    for chosen in CHOICES:
        if chosen != HEURISTIC:
            name = f"all operands, {chosen.threads} x {chosen.bytes_per_thread} bytes"
            yield variant(name, 4, 2, seeded=True, chosen=chosen)
            yield variant(name, 16, 3, seeded=True, chosen=chosen)
