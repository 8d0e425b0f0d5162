"""Other ways to a Haar pyramid of three levels and back, over the buffers of bench/entries/haar.py:
slices by PyTorch's operations, MSDiff's published code, and the wavelet packages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops import HaarPyramid, haar_merge, haar_split
from fastdiff.ops.haar import haar_merge_ref, haar_split_ref
from fastdiff.ops.haar_orders import to_pytorch_wavelets, to_pywt

from .baselines import compiled, each
from .published import load_pytorch_wavelets, msdiff_merge, msdiff_split, msdiff_weight
from .registry import Baseline, Call

LEVELS = 3


def bands(pyramid: HaarPyramid) -> tuple[Tensor, ...]:
    return (*pyramid.details, pyramid.coarse)


# == Slices, as one would write them for torch.compile =============================================


def slices(
    body: Callable[..., Any], pick: Callable[[Any], Sequence[Any]], agrees: bool = False
) -> dict[str, Baseline]:
    """A body of PyTorch's operations, and compiled; with noise of its own it cannot agree."""
    return {
        "PyTorch slices": Baseline(each(lambda b: body(*pick(b))), agrees=agrees),
        "torch.compile": compiled(body, pick),
    }


def slices_split(x: Tensor) -> tuple[Tensor, ...]:
    return bands(haar_split_ref(x, LEVELS))


def slices_merge(*made: Tensor) -> Tensor:
    height, width = made[0].shape[3:]
    return haar_merge_ref(HaarPyramid(made[:-1], made[-1]), (2 * height, 2 * width))


def slices_step(x: Tensor, c: Tensor, score: Tensor | None, noisy: bool) -> Tensor:
    """Band j becomes c[0, j, 0] of itself, the next column of the score's, the last of noise."""
    updated = []
    scores = [()] * (LEVELS + 1) if score is None else [(s,) for s in slices_split(score)]
    for j, (band, terms) in enumerate(zip(slices_split(x), scores, strict=True)):
        made = c[0, j, 0] * band
        for k, term in enumerate((*terms, *((torch.randn_like(band),) if noisy else ())), 1):
            made = made + c[0, j, k] * term
        updated.append(made)
    return slices_merge(*updated)


def slices_expand(coarse: Tensor, c: Tensor) -> Tensor:
    details = c[0, 0, 1] * torch.randn_like(coarse[:, None].expand(-1, 3, -1, -1, -1))
    return slices_merge(details, c[0, 1, 0] * coarse + c[0, 1, 1] * torch.randn_like(coarse))


def slices_loss(x: Tensor, c: Tensor, *noise: Tensor) -> Tensor:
    return sum(
        c[0, j, 0] * (c[0, j, 1] * b + z).square().flatten(1).sum(1)
        for j, (b, z) in enumerate(zip(slices_split(x), noise, strict=True))
    )


def unfused(b: Any, noisy: bool) -> Tensor:
    """Our split and merge, with the update by PyTorch between."""
    c, made = b.c, []
    both = zip(bands(haar_split(b.x, LEVELS)), bands(haar_split(b.score, LEVELS)), strict=True)
    for j, (band, score) in enumerate(both):
        band = (c[0, j, 0] * band).addcmul_(c[0, j, 1], score)
        made.append(band.addcmul_(c[0, j, 2], torch.randn_like(band)) if noisy else band)
    return haar_merge(HaarPyramid(tuple(made[:-1]), made[-1]))


# == Packages ======================================================================================


def published_split(sets: Sequence[Any]) -> Call:
    weight = msdiff_weight(sets[0].x.shape[1], sets[0].x.device)

    def call(i: int) -> list[Tensor]:
        *details, coarse = msdiff_split(sets[i].x, LEVELS, weight)
        return [*(d.unflatten(1, (3, -1)) for d in details), coarse]

    return call


def published_merge(sets: Sequence[Any]) -> Call:
    weight = msdiff_weight(sets[0].x.shape[1], sets[0].x.device)
    scales = [[*(d.flatten(1, 2) for d in s.pyramid.details), s.pyramid.coarse] for s in sets]
    return lambda i: msdiff_merge(scales[i], weight)


def wavelets_split(sets: Sequence[Any]) -> Call:
    transform = load_pytorch_wavelets().DWTForward(J=LEVELS, wave="haar").to(sets[0].x.device)

    def call(i: int) -> list[Tensor]:
        low, high = transform(sets[i].x)
        return [*(h.transpose(1, 2) for h in high), low]

    return call


def wavelets_merge(sets: Sequence[Any]) -> Call:
    transform = load_pytorch_wavelets().DWTInverse(wave="haar").to(sets[0].x.device)
    given = []
    for s in sets:
        low, high = to_pytorch_wavelets(s.pyramid)
        given.append((low, [h.contiguous() for h in high]))
    return lambda i: transform(given[i])


def ptwt_split(sets: Sequence[Any]) -> Call:
    import ptwt

    def call(i: int) -> list[Tensor]:
        coarse, *details = ptwt.wavedec2(sets[i].x, "haar", level=LEVELS)
        return [torch.stack(tuple(d), 1) for d in reversed(details)] + [coarse]

    return call


def ptwt_merge(sets: Sequence[Any]) -> Call:
    import ptwt

    given = [to_pywt(s.pyramid) for s in sets]
    return lambda i: ptwt.waverec2(given[i], "haar")


SPLITS = {
    "published operations": Baseline(published_split),
    "pytorch_wavelets": Baseline(wavelets_split, "pytorch_wavelets"),
    "ptwt": Baseline(ptwt_split, "ptwt", capturable=False),
}
MERGES = {
    "published operations": Baseline(published_merge),
    "pytorch_wavelets": Baseline(wavelets_merge, "pytorch_wavelets"),
    "ptwt": Baseline(ptwt_merge, "ptwt", capturable=False),
}
