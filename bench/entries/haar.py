"""`fastdiff.ops.haar_*`: pyramids of three levels, and the steps that never store one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.published import load_pytorch_wavelets, msdiff_merge, msdiff_split, msdiff_weight
from bench.registry import Baseline, Call, Case, Entry, Gate, relative_error
from fastdiff.ops import (
    HaarPyramid,
    haar_expand,
    haar_loss,
    haar_merge,
    haar_noise,
    haar_split,
    haar_step,
)
from fastdiff.ops.haar import (
    haar_expand_ref,
    haar_loss_ref,
    haar_merge_ref,
    haar_split_ref,
    haar_step_ref,
)
from fastdiff.ops.haar_orders import to_pytorch_wavelets, to_pywt

LEVELS = 3
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Buffers(NamedTuple):
    """What the calls of one set read."""

    x: Tensor
    score: Tensor
    pyramid: HaarPyramid
    coefficients: Tensor
    seeds: Tensor
    stage: Tensor


def buffers(
    number: int, shape: Sequence[int], device: torch.device, columns: int, levels: int = LEVELS
) -> Buffers:
    random = torch.Generator(device).manual_seed(number)
    draw = lambda *size: torch.randn(size, generator=random, device=device)
    x = draw(*shape)
    return Buffers(
        x,
        draw(*shape) if columns == 3 else x,
        haar_split(x, LEVELS),
        draw(1, levels + 1, columns),
        torch.arange(shape[0], device=device) + number,
        torch.zeros(1, dtype=torch.int32, device=device),
    )


def bands(pyramid: HaarPyramid) -> tuple[Tensor, ...]:
    return (*pyramid.details, pyramid.coarse)


# == Correctness ===================================================================================


def gates(device: torch.device, quick: bool) -> Iterator[Gate]:
    """Every op, level, dtype and layout: bits of the definition; losses to 1e-5 of float64."""
    random = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 32, 64), (1, 2, 37, 131)] + ([] if quick else [(2, 3, 256, 256)])
    for shape, dtype, last in itertools.product(shapes, FLOATS, (False, True)):
        x, score = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
        if last:
            x = x.contiguous(memory_format=torch.channels_last)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        seeds = torch.arange(shape[0])
        for levels in range(6):
            table = torch.randn(shape[0], levels + 1, 3, generator=random).to(wide)
            two = table[:, :, :2].contiguous()
            here = (x, score, table, two, seeds)
            there = [t.to(device) for t in here]
            layout = "channels_last" if last else "contiguous"
            case = f"levels={levels} {dtype} {layout} {shape}"
            yield {"case": case, **_gate(levels, *there)}
            if device.type != "cpu" and levels == LEVELS and shape == shapes[0]:
                same = all(
                    torch.equal(one.cpu(), two)
                    for one, two in zip(
                        definitions(levels, *there), definitions(levels, *here), strict=True
                    )
                )
                case = f"the definition on the device as on the CPU, {dtype} {layout}"
                yield {"case": case, "bit_equal": same, "ok": same}


def definitions(
    levels: int, x: Tensor, score: Tensor, table: Tensor, two: Tensor, seeds: Tensor
) -> list[Tensor]:
    """What every op has to make of these, to the bit, in x's dtype: in plain PyTorch."""
    made = haar_split_ref(x, levels)
    narrow = HaarPyramid(tuple(d.to(x.dtype) for d in made.details), made.coarse.to(x.dtype))
    wanted = [*bands(made), haar_merge_ref(narrow, x.shape[2:]),
              haar_step_ref(x, score, table, seeds, 3),
              haar_step_ref(x, None, two, seeds, 3)]  # fmt: skip
    if levels:
        size = (2 * x.shape[2] - levels % 2, 2 * x.shape[3])
        wanted.append(haar_expand_ref(x, two[:, :2], seeds, 3, size))
    return [value.to(x.dtype) for value in wanted]


def _gate(levels: int, x: Tensor, score: Tensor, table: Tensor, two: Tensor, seeds: Tensor) -> Gate:
    """Every op against its definition on the same device, which is quick."""
    made = haar_split(x, levels)
    found = [*bands(made), haar_merge(made, x.shape[2:]), haar_step(x, score, table, seeds, 3),
             haar_noise(x, two, seeds, 3)]  # fmt: skip
    if levels:
        size = (2 * x.shape[2] - levels % 2, 2 * x.shape[3])
        found.append(haar_expand(x, two[:, :2].contiguous(), seeds, 3, size))
    wanted = definitions(levels, x, score, table, two, seeds)
    same = all(map(torch.equal, found, wanted))
    error = relative_error(haar_loss(x, two, seeds, 3), haar_loss_ref(x, two, seeds, 3))
    return {"bit_equal": same, "error": error, "ok": same and error <= 1e-5}


# == Ours and baselines ============================================================================


def slices_split(x: Tensor, levels: int = LEVELS) -> tuple[Tensor, ...]:
    """A butterfly of slices, as one would write it for torch.compile."""
    return bands(haar_split_ref(x, levels))


def slices_merge(*made: Tensor) -> Tensor:
    height, width = made[0].shape[3:]
    return haar_merge_ref(HaarPyramid(made[:-1], made[-1]), (2 * height, 2 * width))


def slices_step(x: Tensor, score: Tensor, c: Tensor) -> Tensor:
    updated = [
        c[0, j, 0] * b + c[0, j, 1] * s
        for j, (b, s) in enumerate(zip(slices_split(x), slices_split(score), strict=True))
    ]
    return slices_merge(*updated)


def slices_noisy_step(x: Tensor, score: Tensor, c: Tensor) -> Tensor:
    updated = [
        c[0, j, 0] * b + c[0, j, 1] * s + c[0, j, 2] * torch.randn_like(b)
        for j, (b, s) in enumerate(zip(slices_split(x), slices_split(score), strict=True))
    ]
    return slices_merge(*updated)


def slices_noise(x: Tensor, c: Tensor) -> Tensor:
    updated = [
        c[0, j, 0] * b + c[0, j, 1] * torch.randn_like(b) for j, b in enumerate(slices_split(x))
    ]
    return slices_merge(*updated)


def slices_expand(coarse: Tensor, c: Tensor) -> Tensor:
    details = c[0, 0, 1] * torch.randn_like(coarse[:, None].expand(-1, 3, -1, -1, -1))
    return slices_merge(details, c[0, 1, 0] * coarse + c[0, 1, 1] * torch.randn_like(coarse))


def slices_loss(x: Tensor, c: Tensor, *noise: Tensor) -> Tensor:
    return sum(
        c[0, j, 0] * (c[0, j, 1] * b + z).square().flatten(1).sum(1)
        for j, (b, z) in enumerate(zip(slices_split(x), noise, strict=True))
    )


def plain(
    body: Callable[..., Any], pick: Callable[[Buffers], tuple[Any, ...]], agrees: bool
) -> dict[str, Baseline]:
    """The body by PyTorch's operations, and compiled."""

    def compiled(sets: Sequence[Buffers]) -> Call:
        fused = torch.compile(body, fullgraph=True, dynamic=False)
        return lambda i: fused(*pick(sets[i]))

    return {
        "PyTorch slices": Baseline(lambda sets: lambda i: body(*pick(sets[i])), agrees=agrees),
        "torch.compile": Baseline(compiled, compiles=True),
    }


def published_split(sets: Sequence[Buffers]) -> Call:
    weight = msdiff_weight(sets[0].x.shape[1], sets[0].x.device)

    def call(i: int) -> list[Tensor]:
        *details, coarse = msdiff_split(sets[i].x, LEVELS, weight)
        return [*(d.unflatten(1, (3, -1)) for d in details), coarse]

    return call


def published_merge(sets: Sequence[Buffers]) -> Call:
    weight = msdiff_weight(sets[0].x.shape[1], sets[0].x.device)
    scales = [[*(d.flatten(1, 2) for d in s.pyramid.details), s.pyramid.coarse] for s in sets]
    return lambda i: msdiff_merge(scales[i], weight)


def wavelets_split(sets: Sequence[Buffers]) -> Call:
    transform = load_pytorch_wavelets().DWTForward(J=LEVELS, wave="haar").to(sets[0].x.device)

    def call(i: int) -> list[Tensor]:
        low, high = transform(sets[i].x)
        return [*(h.transpose(1, 2) for h in high), low]

    return call


def wavelets_merge(sets: Sequence[Buffers]) -> Call:
    transform = load_pytorch_wavelets().DWTInverse(wave="haar").to(sets[0].x.device)
    given = []
    for s in sets:
        low, high = to_pytorch_wavelets(s.pyramid)
        given.append((low, [h.contiguous() for h in high]))
    return lambda i: transform(given[i])


def ptwt_split(sets: Sequence[Buffers]) -> Call:
    import ptwt

    def call(i: int) -> list[Tensor]:
        coarse, *details = ptwt.wavedec2(sets[i].x, "haar", level=LEVELS)
        return [torch.stack(tuple(d), 1) for d in reversed(details)] + [coarse]

    return call


def ptwt_merge(sets: Sequence[Buffers]) -> Call:
    import ptwt

    given = [to_pywt(s.pyramid) for s in sets]
    return lambda i: ptwt.waverec2(given[i], "haar")


def unfused(noisy: bool) -> Callable[[Sequence[Buffers]], Call]:
    """Our split and merge, with the update by PyTorch between."""

    def make(sets: Sequence[Buffers]) -> Call:
        def call(i: int) -> Tensor:
            x, score, _, c, _, _ = sets[i]
            p, q = haar_split(x, LEVELS), haar_split(score, LEVELS)
            made = []
            for j, (b, s) in enumerate(zip(bands(p), bands(q), strict=True)):
                b = (c[0, j, 0] * b).addcmul_(c[0, j, 1], s)
                made.append(b.addcmul_(c[0, j, 2], torch.randn_like(b)) if noisy else b)
            return haar_merge(HaarPyramid(tuple(made[:-1]), made[-1]))

        return call

    return make


class Row(NamedTuple):
    """One way of calling: columns of its coefficients, passes over the image, operations."""

    columns: int
    passes: float
    flops: float
    ours: Callable[[Sequence[Buffers]], Call]
    baselines: dict[str, Baseline]


NORMAL, SPLIT = 70, 8 / 3  # operations of a normal; of one element's way through all levels

ROWS = {
    "split": Row(
        2, 2, SPLIT,
        lambda sets: lambda i: bands(haar_split(sets[i].x, LEVELS)),
        {
            **plain(slices_split, lambda b: (b.x,), True),
            "published operations": Baseline(published_split),
            "pytorch_wavelets": Baseline(wavelets_split, "pytorch_wavelets"),
            "ptwt": Baseline(ptwt_split, "ptwt", capturable=False),
        },
    ),
    "merge": Row(
        2, 2, SPLIT,
        lambda sets: lambda i: haar_merge(sets[i].pyramid),
        {
            **plain(slices_merge, lambda b: bands(b.pyramid), True),
            "published operations": Baseline(published_merge),
            "pytorch_wavelets": Baseline(wavelets_merge, "pytorch_wavelets"),
            "ptwt": Baseline(ptwt_merge, "ptwt", capturable=False),
        },
    ),
    "step": Row(
        3, 3, 3 * SPLIT + 3,
        lambda sets: lambda i: haar_step(sets[i].x, sets[i].score, sets[i].coefficients),
        {
            **plain(slices_step, lambda b: (b.x, b.score, b.coefficients), True),
            "split, update, merge": Baseline(unfused(False)),
        },
    ),
    "step with noise": Row(
        3, 3, 3 * SPLIT + 5 + NORMAL,
        lambda sets: lambda i: haar_step(
            sets[i].x, sets[i].score, sets[i].coefficients, sets[i].seeds, sets[i].stage
        ),
        {
            **plain(slices_noisy_step, lambda b: (b.x, b.score, b.coefficients), False),
            "split, update, merge": Baseline(unfused(True), agrees=False),
        },
    ),
    "noise": Row(
        2, 2, 2 * SPLIT + 3 + NORMAL,
        lambda sets: lambda i: haar_noise(
            sets[i].x, sets[i].coefficients, sets[i].seeds, sets[i].stage
        ),
        plain(slices_noise, lambda b: (b.x, b.coefficients), False),
    ),
    "expand": Row(
        2, 1.25, SPLIT + NORMAL,
        lambda sets: lambda i: haar_expand(
            sets[i].x, sets[i].coefficients, sets[i].seeds, sets[i].stage
        ),
        plain(slices_expand, lambda b: (b.x, b.coefficients), False),
    ),
    "loss": Row(
        2, 1, SPLIT + 5 + NORMAL,
        lambda sets: lambda i: haar_loss(
            sets[i].x, sets[i].coefficients, sets[i].seeds, sets[i].stage
        ),
        plain(slices_loss, lambda b: (b.x, b.coefficients, *bands(b.pyramid)), False),
    ),
}  # fmt: skip


def moved_bytes(row: str, shape: Sequence[int]) -> int:
    """Bytes of a float32 launch: what it reads and writes, once."""
    return int(4 * ROWS[row].passes * math.prod(shape))


def cases(device: torch.device, quick: bool) -> Iterator[Case]:
    sizes = [(16, 3, 256, 256), (64, 3, 128, 128), (1, 3, 32, 32)]
    if device.type == "cuda":
        sizes = [(64, 4, 512, 512), *sizes]
    for shape, (name, row) in itertools.product(sizes[:1] if quick else sizes, ROWS.items()):
        given, levels = shape, LEVELS
        if name == "expand":  # to that size
            given, levels = (*shape[:2], shape[2] // 2, shape[3] // 2), 1
        yield Case(
            name,
            shape,
            inputs=lambda i, given=(given, device, row.columns, levels): buffers(i, *given),
            ours=row.ours,
            bytes=moved_bytes(name, shape),
            flops=int(row.flops * math.prod(shape)),
            baselines=row.baselines,
            settings={"levels": levels},
        )


ENTRY = Entry(
    "haar",
    "op",
    ("haar_split", "haar_merge", "haar_step", "haar_noise", "haar_expand", "haar_loss"),
    gates,
    cases,
)
