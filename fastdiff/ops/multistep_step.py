"""The fused solver step: one launch does everything a stage does around one network evaluation.

Guidance, conversion of the raw output to x0, clipping, up to three weighted sums over state slots,
noise, and the next network input in the network's dtype. All coefficients and slot numbers are data
on the device, so a new schedule is a copy and not a new capture.

Backends: Triton for CUDA tensors (kernels/multistep_step.py), C++ for CPU tensors
(csrc/cpu/multistep_step.cpp), and `multistep_step_ref` where neither is there. In float32 the three
agree bit for bit, noise included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import row
from ._register import launch, register
from .common import FLOATS, clamped, product, require_dtype, require_shape, wide_dtype
from .constants import INITIAL_NOISE, READS, WRITES
from .layout import has_strides, is_channels_last, per_sample, sample_strides
from .philox import philox_normal_ref

_ALIGNMENT = 64  # bytes at which every slot starts
_NOISE_ALONE = row.columns(row.Head(0, 0, 0, 0, 0), [row.Weights(0, 0, noise=1, slots=[0])])


def multistep_step(
    slots: Tensor,
    output: Tensor | None,
    coefficients: Tensor,
    index: Tensor,
    guidance: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    network_input: Tensor | None = None,
    *,
    reads: int,
    writes: int,
) -> None:
    """Apply one stage of a solver to the state slots, in place.

    With the row  [p, q, lo, hi, c_in,  then for each write w: a_w, f_w, z_w, s_w0 .. s_w(reads-1)]
    and  index = [stage, purpose, read slots, write slots]  (ops/row.py makes and reads both):

        F     = output,  or  uncond + guidance * (cond - uncond)
        x0    = clamp(p * F + q * slot[read 0], lo, hi)
        new_w = s_w0 * slot[read 0] + ... + a_w * x0 + f_w * F + z_w * z
        slot[write w] = new_w;   network_input = c_in * new_0, cast

    All reads of an element happen before its writes. A zero coefficient means that the operand is
    not read, so it may hold anything, NaN included. The clamp keeps NaN. An absent operand counts
    as zero.

    slots: [S, B, ...] float32 or float64 (also the arithmetic's precision); every slot dense,
        contiguous or channels_last; stride(0) may exceed a slot (see `allocate_slots`).
    output: [B, ...], or [2B, ...] with guidance (unconditional half first); any float dtype, a
        slot's layout within each sample, stride(0) free.
    coefficients: [1 or B, 5 + writes * (3 + reads)], dtype of slots: a row for all samples, or one
        each.
    index: [2 + reads + writes] int32. Slots to write must differ from each other.
    guidance: [1 or B], dtype of slots.
    seeds: [B] int64: z is drawn by Philox (ops/philox.py) from seed, stage and purpose.
    noise: [B, ...], dtype and layout of slots: z itself, instead of seeds.
    network_input: [B, ...], or [2B, ...] to be written twice; any float dtype, layout as output.
    reads: 1, 2, 4, 8 or 16. writes: 1, 2 or 3.

    Raises TypeError or ValueError naming the argument. Not differentiable. Loops that have checked
    their arguments once call `multistep_step_unchecked` (the same, reads and writes positional).
    """
    _check(slots, output, coefficients, index, guidance, seeds, noise, network_input, reads, writes)
    multistep_step_unchecked(
        slots, output, coefficients, index, guidance, seeds, noise, network_input, reads, writes
    )


def multistep_step_ref(
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
    """`multistep_step` in plain PyTorch: the definition that the kernels equal bit for bit."""
    batch, *sample = slots.shape[1:]
    stage, purpose, *chosen = index.tolist()
    states = [slots[i].clone() for i in chosen[:reads]]
    p, q, low, high, input_scale = (per_sample(c, slots[0]) for c in row.head(coefficients))
    all_weights = row.weights(coefficients, reads)

    model = slots.new_zeros(()) if output is None else output.to(slots.dtype)
    if output is not None and guidance is not None:
        uncond, cond = model.chunk(2)
        model = uncond + per_sample(guidance, slots[0]) * (cond - uncond)
    x0 = clamped(product(p, model) + product(q, states[0]), low, high)
    z = slots.new_zeros(()) if noise is None else noise
    if seeds is not None and any(bool((w.noise != 0).any()) for w in all_weights):
        z = philox_normal_ref(seeds, math.prod(sample), stage, purpose)
        z = z.view(batch, *sample).to(slots.dtype)

    new = []
    for w in all_weights:
        terms = [
            *zip(w.slots, states, strict=True),
            (w.sample, x0),
            (w.output, model),
            (w.noise, z),
        ]
        total = torch.zeros_like(states[0])
        for weight, operand in terms:
            total = total + product(per_sample(weight, total), operand)
        new.append(total)
    for slot, value in zip(chosen[reads:], new, strict=True):
        slots[slot].copy_(value)
    if network_input is not None:
        copies = network_input.shape[0] // max(batch, 1)
        network_input.copy_(torch.cat([input_scale * new[0]] * max(copies, 1)))


def allocate_slots(count: int, sample: Tensor) -> Tensor:
    """An uninitialised arena [count, *sample.shape] for the states of a solver.

    sample: [B, ...], contiguous or channels_last: gives shape, layout and device. The arena is
    float64 for a float64 sample and float32 otherwise; every slot starts on 64 bytes.
    """
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"count must be a positive integer, got {count!r}")
    dtype = wide_dtype(sample)
    strides = sample_strides(sample.shape[1:], is_channels_last(sample, "sample"))
    step = _ALIGNMENT // dtype.itemsize
    padded = -(-sample.numel() // step) * step
    arena = torch.empty(count * padded, dtype=dtype, device=sample.device)
    return arena.as_strided((count, *sample.shape), (padded, math.prod(sample.shape[1:]), *strides))


def seeded_noise(
    seeds: Tensor | Sequence[int],
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal initial noise; an image's noise depends on its seed alone, bit for bit.

    seeds: [B] int64 or integers (-2^63 .. 2^63 - 1); shape: (B, ...), the batch included; dtype:
    any float (float64 holds the widened float32 normals); device: the seeds' by default. Returns a
    contiguous tensor of that shape.
    """
    seeds = torch.as_tensor(seeds, device=device)
    if seeds.numel() == 0:
        seeds = seeds.long()
    require_shape("seeds", seeds, tuple(shape[:1]))
    require_dtype("seeds", seeds, torch.int64)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype}")
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    slots = torch.empty((1, *shape), dtype=accumulate, device=seeds.device)
    coefficients = torch.tensor([_NOISE_ALONE], dtype=accumulate, device=seeds.device)
    index = torch.tensor(
        row.index(0, INITIAL_NOISE, [0], [0]), dtype=torch.int32, device=seeds.device
    )
    multistep_step_unchecked(
        slots, None, coefficients, index, None, seeds.contiguous(), None, None, 1, 1
    )
    return slots[0].to(dtype)


def drawn_noise(x: Tensor, seeds: Tensor, stage: Tensor | None, number: int = 0) -> Tensor:
    """The noise z that `multistep_step` draws at a stage, like x [B, ...], float64 where x is.

    stage: int32 [1] on the device; None: the number.
    """
    wide = torch.empty_like(x, dtype=wide_dtype(x))
    if not any(has_strides(wide, sample_strides(x.shape[1:], last)) for last in (False, True)):
        wide = wide.contiguous()
    # Filled on the device, so that a graph may record it. Zeros: slot 0, and the noise of a stage.
    coefficients = wide.new_zeros((1, row.width(1, 1)))
    coefficients[:, _NOISE_ALONE.index(1)] = 1
    index = torch.zeros(row.INDEX_HEAD + 2, dtype=torch.int32, device=x.device)
    told = index[row.STAGE : row.STAGE + 1]
    told.fill_(number) if stage is None else told.copy_(stage)
    multistep_step_unchecked(wide[None], None, coefficients, index, None, seeds, None, None, 1, 1)
    return wide


# Checks, once per call of the public function.


def _check(
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
    if reads not in READS:
        raise ValueError(f"reads must be one of {READS}, got {reads!r}")
    if writes not in WRITES:
        raise ValueError(f"writes must be one of {WRITES}, got {writes!r}")
    require_dtype("slots", slots, torch.float32, torch.float64)
    if slots.dim() < 2:
        raise ValueError(f"slots must have the shape [S, B, ...], got {tuple(slots.shape)}")
    batch, *sample = slots.shape[1:]
    channels_last = is_channels_last(slots[0], "slots")
    if slots.numel() and batch > 1 and slots.stride(1) != math.prod(sample):
        raise ValueError(
            "slots must be dense within each slot, "
            f"got strides {slots.stride()} for {tuple(slots.shape)}"
        )
    if slots.shape[0] > 1 and slots.stride(0) < slots[0].numel():
        raise ValueError(
            f"slots must not overlap, got strides {slots.stride()} for {tuple(slots.shape)}"
        )

    for name, tensor, doubled in (
        ("output", output, guidance is not None),
        ("noise", noise, False),
        ("network_input", network_input, None),
    ):
        if tensor is None:
            continue
        require_dtype(name, tensor, *([slots.dtype] if name == "noise" else FLOATS))
        rows = {None: (batch, 2 * batch), True: (2 * batch,), False: (batch,)}[doubled]
        if tensor.dim() == 0 or tensor.shape[0] not in rows or list(tensor.shape[1:]) != sample:
            allowed = " or ".join(str((n, *sample)) for n in dict.fromkeys(rows))
            raise ValueError(f"{name} must have the shape {allowed}, got {tuple(tensor.shape)}")
        if not has_strides(tensor, sample_strides(sample, channels_last)):
            layout = "channels_last" if channels_last else "contiguous"
            raise ValueError(
                f"{name} must be {layout} within each sample, as slots is; "
                f"got strides {tensor.stride()}"
            )
    if (
        network_input is not None
        and network_input.shape[0] > 1
        and network_input.stride(0) < math.prod(sample)
    ):
        raise ValueError(
            f"network_input must not overlap itself, got strides {network_input.stride()}"
        )

    require_dtype("coefficients", coefficients, slots.dtype)
    width = row.width(reads, writes)
    require_shape("coefficients", coefficients, (1, width), (batch, width))
    require_dtype("index", index, torch.int32)
    require_shape("index", index, (row.INDEX_HEAD + reads + writes,))
    if guidance is not None:
        require_dtype("guidance", guidance, slots.dtype)
        require_shape("guidance", guidance, (1,), (batch,))
        if output is None:
            raise ValueError("guidance needs output, got None")
    if seeds is not None:
        require_dtype("seeds", seeds, torch.int64)
        require_shape("seeds", seeds, (batch,))
        if noise is not None:
            raise ValueError("at most one of seeds and noise may be given, got both")
    for name, tensor in (
        ("output", output),
        ("coefficients", coefficients),
        ("index", index),
        ("guidance", guidance),
        ("seeds", seeds),
        ("noise", noise),
        ("network_input", network_input),
    ):
        if tensor is None:
            continue
        if tensor.device != slots.device:
            raise ValueError(
                f"{name} must be on the device of slots, {slots.device}, got {tensor.device}"
            )
        if name in ("coefficients", "index", "guidance", "seeds") and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")
    if torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad
        for tensor in (slots, output, coefficients, guidance, noise)
    ):
        raise ValueError("multistep_step is not differentiable: call it under torch.no_grad()")


# Registration.

multistep_step_unchecked = register(
    "multistep_step(Tensor(a!) slots, Tensor? output, Tensor coefficients, Tensor index, "
    "Tensor? guidance, Tensor? seeds, Tensor? noise, Tensor(b!)? network_input, "
    "int reads, int writes) -> ()",
    multistep_step_ref,
    triton=launch("multistep_step"),
)
