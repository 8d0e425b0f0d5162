"""What one thread of the CUDA Haar kernels does, run on the CPU for every thread of a launch."""

import ctypes
import functools
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from fastdiff.ops.haar import (
    HaarPyramid,
    _plain_loss_gradient,
    _views,
    haar_expand_ref,
    haar_loss_ref,
    haar_merge_ref,
    haar_split_ref,
    haar_step_ref,
)

ROOT = Path(__file__).parents[2]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # in the order of Type
SPLIT, MERGE, STEP, EXPAND, LOSS = range(5)


@pytest.fixture(scope="module")
def lanes(tmp_path_factory):
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("lanes") / "lanes.so"
    source = Path(__file__).with_name("haar_lane.cpp")
    flags = "-std=c++17 -O0 -ffp-contract=off -fPIC -shared -pthread -DFASTDIFF_INLINE=inline"
    subprocess.run(
        [compiler, *flags.split(), "-I", str(ROOT / "csrc"), "-o", str(library), str(source)],
        check=True,
    )
    return ctypes.CDLL(str(library)).run_haar


def run(lanes, op, levels, shape, dtype, last=False, *, image=None, score=None, result=None,
        flat=None, table=None, seeds=None, stage=None, upstream=None, losses=None):  # fmt: skip
    """One launch; returns whether it was the aligned one."""
    pointer = lambda t: ctypes.c_void_p(None if t is None else t.data_ptr())
    number = lambda n: ctypes.c_int64(n)
    kind = FLOATS.index(dtype)
    return bool(
        lanes(
            op, levels, *map(number, shape), kind,
            FLOATS.index(score.dtype) if score is not None else kind, int(last),
            *map(pointer, (image, score, result, flat, table)),
            int(table is not None and len(table) > 1),
            *map(pointer, (seeds, stage, upstream, losses)),
        )
    )  # fmt: skip


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def flat_of(pyramid, shape, levels, last, dtype):
    count = sum(b.numel() for b in (*pyramid.details, pyramid.coarse))
    flat = torch.full((count,), torch.nan, dtype=dtype)
    views = _views(flat, shape, levels, last)
    for view, band in zip((*views.details, views.coarse), (*pyramid.details, pyramid.coarse),
                          strict=True):  # fmt: skip
        view.copy_(band)
    return flat


# Aligned and odd sizes; groups of lanes that are whole, and that hang over an edge.
CASES = [
    ((2, 2, 64, 64), range(6), False),
    ((1, 3, 40, 24), range(6), False),
    ((2, 1, 37, 45), range(6), False),
    ((1, 3, 9, 70), range(5), False),
    ((1, 3, 33, 34), range(6), True),
    ((3, 1, 1, 8), [0], False),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "depths", "last"), CASES)
def test_a_launch_is_its_definition(lanes, shape, depths, last, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    layout = torch.channels_last if last else torch.contiguous_format
    x = normal(*shape, dtype=dtype).contiguous(memory_format=layout)
    seeds, stage = torch.arange(shape[0]) - 1, torch.tensor([3], dtype=torch.int32)
    others = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    for levels, other in zip(depths, others, strict=False):
        call = functools.partial(run, lanes, levels=levels, shape=shape, dtype=dtype, last=last)
        pyramid = haar_split_ref(x, levels)
        wanted = flat_of(pyramid, shape, levels, last, dtype)
        flat, result = torch.full_like(wanted, torch.nan), torch.full_like(x, torch.nan)
        aligned = call(SPLIT, image=x, flat=flat)
        assert aligned == (dtype != torch.float64 and shape[3] % 8 == 0 and not last)
        assert torch.equal(flat, wanted)

        made = _views(flat, shape, levels, last)
        merged = haar_merge_ref(HaarPyramid(made.details, made.coarse), shape[2:])
        assert call(MERGE, flat=flat, result=result) == aligned
        assert torch.equal(result, merged.to(dtype))

        score = normal(*shape, seed=1, dtype=wide if wide == torch.float64 else other)
        score = score.contiguous(memory_format=layout)
        table = normal(shape[0] if levels % 2 else 1, levels + 1, 3, seed=2, dtype=wide)
        call(STEP, image=x, score=score, result=result, table=table, seeds=seeds, stage=stage)
        assert torch.equal(result, haar_step_ref(x, score, table, seeds, 3).to(dtype))

        two = table[:, :, :2].contiguous()
        call(STEP, image=x, result=result, table=two, seeds=seeds, stage=stage)
        assert torch.equal(result, haar_step_ref(x, None, two, seeds, 3).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [(16, 24), (7, 11), (32, 13)])
def test_expansion(lanes, size, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shape, half = (2, 2, *size), [(s + 1) // 2 for s in size]
    coarse, table = normal(2, 2, *half, dtype=dtype), normal(1, 2, 2, seed=3, dtype=wide)
    seeds, stage = torch.tensor([4, 5]), torch.tensor([2], dtype=torch.int32)
    result = torch.full(shape, torch.nan, dtype=dtype)
    run(lanes, EXPAND, 1, shape, dtype, flat=coarse, result=result, table=table, seeds=seeds,
        stage=stage)  # fmt: skip
    assert torch.equal(result, haar_expand_ref(coarse, table, seeds, 2, size).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "levels"), [((2, 1, 16, 24), 2), ((2, 1, 33, 45), 5)])
def test_loss_and_gradient(lanes, shape, levels, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, table = normal(*shape, dtype=dtype), normal(2, levels + 1, 2, seed=3, dtype=wide)
    seeds, stage = torch.tensor([4, 5]), torch.tensor([2], dtype=torch.int32)
    losses, upstream = torch.empty(2, dtype=torch.float64), normal(2, seed=4, dtype=wide)
    result = torch.full_like(x, torch.nan)
    run(lanes, LOSS, levels, shape, dtype, image=x, table=table, seeds=seeds, stage=stage,
        losses=losses)  # fmt: skip
    wanted = haar_loss_ref(x, table, seeds, 2)
    torch.testing.assert_close(losses.to(wide), wanted, rtol=2e-5, atol=1e-5)
    run(lanes, LOSS, levels, shape, dtype, image=x, table=table, seeds=seeds, stage=stage,
        upstream=upstream, result=result)  # fmt: skip
    gradient = _plain_loss_gradient(x, table, seeds, None, 2, upstream, levels, False)
    torch.testing.assert_close(result, gradient, rtol=1e-2 if wide != dtype else 1e-5, atol=1e-5)
