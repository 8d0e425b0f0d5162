"""csrc/cuda/haar*.cu, whole, on the CPU: every thread of every launch, its memory watched."""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastdiff.ops.constants import EXPANSION_NOISE, MAX_LEVELS, PYRAMID_NOISE
from fastdiff.ops.haar import (
    HaarPyramid,
    haar_expand_ref,
    haar_loss_ref,
    haar_merge_ref,
    haar_step_ref,
)
from fastdiff.ops.haar.pyramid import views
from fastdiff.ops.haar.register import plain_loss_gradient, plain_split
from tests.helpers.tensors import FLOATS, normal, wide

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
SPLIT, MERGE, STEP, EXPAND, LOSS = range(5)


def on_host(folder: Path, *sources: Path) -> ctypes.CDLL:
    """A library of .cu files, which go through the stand-in for CUDA, and of .cpp files."""
    if sys.platform != "linux" or not (compiler := shutil.which("g++")):
        pytest.skip("the stand-in for CUDA needs Linux and g++")

    def compiled(source: Path) -> str:
        flags = "-std=c++17 -ffp-contract=off -fPIC -DFASTDIFF_INLINE=inline"
        if source.suffix == ".cu":
            header = HERE / "cuda_on_host.h"
            flags += f" -O0 -x c++ -fsanitize=thread -include {header}"
        else:
            flags += " -O2"
        made = str(folder / f"{source.name}.o")
        command = [compiler, *flags.split(), "-I", str(CSRC), "-c", "-o", made, str(source)]
        subprocess.run(command, check=True)
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, [HERE / "cuda_on_host.cpp", *sources]))
    library = folder / "on_host.so"
    subprocess.run([compiler, "-shared", "-o", str(library), *objects], check=True)
    return ctypes.CDLL(str(library))


# == What haar.h passes ============================================================================


class Image(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int), ("strides", ctypes.c_int64 * 4)]


class Details(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("type", ctypes.c_int), ("strides", ctypes.c_int64 * 5)]


class Haar(ctypes.Structure):
    _fields_ = [
        ("levels", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("batch", "channels", "height", "width")),
        ("is_double", ctypes.c_bool),
        *((name, Image) for name in ("image", "score", "result")),
        ("details", Details * MAX_LEVELS),
        ("coarse", Image),
        ("coefficients", ctypes.c_void_p),
        ("row_per_sample", ctypes.c_bool),
        ("seeds", ctypes.c_void_p),
        ("stage", ctypes.c_void_p),
        ("stage_number", ctypes.c_uint32),
        ("purpose", ctypes.c_uint32),
        ("upstream", ctypes.c_void_p),
        ("stream", ctypes.c_bool),
    ]


class Launches:
    """The operations over tensors of the CPU; a launch that does wrong is a RuntimeError."""

    def __init__(self, library: ctypes.CDLL):
        self.library = library
        library.haar.restype = library.haar_sum.restype = ctypes.c_char_p
        library.haar_blocks.restype = library.haar_losses.restype = ctypes.c_int64
        library.haar_aligned.restype = ctypes.c_bool
        assert library.haar_bytes() == ctypes.sizeof(Haar)
        self.aligned = False  # whether the last launch was an aligned one
        self.blocks = 0  # of the last launch, for each sample

    def give(self, tensor: Tensor, writable: bool = False) -> int:
        """Let the next launch read a tensor, or write it; returns its address."""
        extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        size = ctypes.c_size_t(extent * tensor.element_size())
        self.library.give(ctypes.c_void_p(tensor.data_ptr()), size, writable)
        return tensor.data_ptr()

    def view(self, tensor: Tensor, writable: bool = False) -> tuple:
        """The fields of an Image or of Details."""
        return self.give(tensor, writable), FLOATS.index(tensor.dtype), tensor.stride()

    def haar(self, levels: int, shape: Sequence[int], dtype: torch.dtype) -> Haar:
        self.library.take_back()
        return Haar(levels, *shape, dtype == torch.float64)

    def run(self, haar: Haar, op: int, losses: Tensor | None = None) -> None:
        data = None if losses is None else ctypes.c_void_p(self.give(losses, True))
        self.aligned = self.library.haar_aligned(ctypes.byref(haar))
        self.blocks = self.library.haar_blocks(ctypes.byref(haar)) // haar.batch
        self.check(self.library.haar(ctypes.byref(haar), op, data))

    def check(self, error: bytes | None) -> None:
        if error is not None:
            raise RuntimeError(error.decode())

    def noisy(
        self, haar: Haar, table: Tensor, seeds: Tensor | None, stage: int | Tensor,
        purpose: int = PYRAMID_NOISE,
    ) -> None:  # fmt: skip
        haar.coefficients, haar.row_per_sample = self.give(table), len(table) > 1
        if seeds is not None:
            haar.seeds = self.give(seeds)
        if isinstance(stage, Tensor):
            haar.stage = self.give(stage)
        else:
            haar.stage_number = stage
        haar.purpose = purpose

    def pyramid(
        self, haar: Haar, details: Sequence[Tensor], coarse: Tensor, writable: bool = False
    ) -> None:
        for level, detail in enumerate(details):
            haar.details[level] = Details(*self.view(detail, writable))
        haar.coarse = Image(*self.view(coarse, writable))

    def split(self, x: Tensor, levels: int, last: bool) -> HaarPyramid:
        haar = self.haar(levels, x.shape, x.dtype)
        haar.image = Image(*self.view(x))
        made = views(
            torch.full_like(plain_split(x, levels, last), torch.nan), x.shape, levels, last
        )
        self.pyramid(haar, made.details, made.coarse, True)
        self.run(haar, SPLIT)
        return made

    def merge(self, details: Sequence[Tensor], coarse: Tensor, like: Tensor) -> Tensor:
        haar = self.haar(len(details), like.shape, coarse.dtype)
        self.pyramid(haar, details, coarse)
        return self.result(haar, MERGE, like)

    def result(self, haar: Haar, op: int, like: Tensor) -> Tensor:
        result = torch.full_like(like, torch.nan)
        haar.result = Image(*self.view(result, True))
        self.run(haar, op)
        return result

    def step(
        self, x: Tensor, score: Tensor | None, table: Tensor, seeds: Tensor | None,
        stage: int | Tensor,
    ) -> Tensor:  # fmt: skip
        haar = self.haar(table.shape[1] - 1, x.shape, x.dtype)
        haar.image = Image(*self.view(x))
        if score is not None:
            haar.score = Image(*self.view(score))
        self.noisy(haar, table, seeds, stage)
        return self.result(haar, STEP, x)

    def expand(
        self, coarse: Tensor, table: Tensor, seeds: Tensor, stage: int, size: Sequence[int],
        last: bool,
    ) -> Tensor:  # fmt: skip
        layout = torch.channels_last if last else torch.contiguous_format
        like = torch.empty(*coarse.shape[:2], *size, dtype=coarse.dtype).to(memory_format=layout)
        haar = self.haar(1, like.shape, coarse.dtype)
        self.pyramid(haar, (), coarse)
        self.noisy(haar, table, seeds, stage, EXPANSION_NOISE)
        return self.result(haar, EXPAND, like)

    def loss(self, x: Tensor, table: Tensor, seeds: Tensor, stage: int) -> Tensor:
        haar = self.haar(table.shape[1] - 1, x.shape, x.dtype)
        haar.image = Image(*self.view(x))
        self.noisy(haar, table, seeds, stage)
        count = self.library.haar_losses(ctypes.byref(haar))
        losses = torch.full((count,), torch.nan, dtype=torch.float64)
        self.run(haar, LOSS, losses)
        return self.sums(haar, losses)

    def sums(self, haar: Haar, losses: Tensor) -> Tensor:
        self.library.take_back()
        dtype = torch.float64 if haar.is_double else torch.float32
        sums = torch.full((haar.batch,), torch.nan, dtype=dtype)
        data = ctypes.c_void_p(self.give(losses)), ctypes.c_void_p(self.give(sums, True))
        self.check(self.library.haar_sum(ctypes.byref(haar), *data))
        return sums

    def gradient(
        self, x: Tensor, table: Tensor, seeds: Tensor, stage: int, upstream: Tensor
    ) -> Tensor:
        haar = self.haar(table.shape[1] - 1, x.shape, x.dtype)
        haar.image = Image(*self.view(x))
        self.noisy(haar, table, seeds, stage)
        haar.upstream = self.give(upstream)
        return self.result(haar, LOSS, x)


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> ctypes.CDLL:
    sources = [HERE / "haar_on_host.cpp", *(CSRC / "cuda").glob("haar*.cu")]
    return on_host(tmp_path_factory.mktemp("on_host"), *sources, HERE / "faults_on_host.cu")


@pytest.fixture(scope="module")
def cuda(library) -> Launches:
    return Launches(library)


# == The operations ================================================================================

# Aligned and odd sizes; groups of lanes that are whole, and that hang over an edge; blocks.
CASES = [
    ((2, 1, 136, 80), range(6), False),
    ((1, 3, 40, 24), range(6), False),
    ((2, 1, 37, 45), range(6), False),
    ((1, 3, 9, 70), range(5), False),
    ((2, 3, 33, 34), range(6), True),
    ((1, 8, 16, 16), range(5), True),
    ((3, 1, 1, 8), [0], False),
]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "depths", "last"), CASES)
def test_a_launch_is_its_definition(cuda, shape, depths, last, dtype):
    layout = torch.channels_last if last else torch.contiguous_format
    x = normal(*shape, dtype=dtype).contiguous(memory_format=layout)
    seeds, stage = torch.arange(shape[0]) - 1, torch.tensor([3], dtype=torch.int32)
    others = itertools.cycle((torch.float32, torch.bfloat16, torch.float16))
    for levels, other in zip(depths, others, strict=False):
        made = cuda.split(x, levels, last)
        assert cuda.aligned == (dtype != torch.float64 and shape[3] % 8 == 0 and not last)
        assert torch.equal(made.flat, plain_split(x, levels, last))
        assert cuda.blocks > 1 or shape != CASES[0][0]

        merged = cuda.merge(made.details, made.coarse, x)
        assert torch.equal(merged, haar_merge_ref(made, shape[2:]).to(dtype))

        score = normal(*shape, seed=1, dtype=dtype if dtype == torch.float64 else other)
        score = score.contiguous(memory_format=layout)
        table = normal(shape[0] if levels % 2 else 1, levels + 1, 3, seed=2, dtype=wide(dtype))
        table[0, levels // 2] = 0  # these operands do not count
        stepped = cuda.step(x, score, table, seeds, stage)
        assert torch.equal(stepped, haar_step_ref(x, score, table, seeds, 3).to(dtype))

        two = table[:, :, :2].contiguous()
        assert torch.equal(
            cuda.step(x, None, two, seeds, 3), haar_step_ref(x, None, two, seeds, 3).to(dtype)
        )
        assert torch.equal(
            cuda.step(x, None, two, None, 0), haar_step_ref(x, None, two, None, 0).to(dtype)
        )


@pytest.mark.parametrize("dtype", FLOATS)
def testviews(cuda, dtype):
    """Views that begin off an aligned address, with odd strides, or with gaps."""
    whole = normal(2, 4, 24, 48, dtype=dtype)
    views = [whole[..., 1:41], whole[..., 4:44], whole[..., 8:48], whole[:, 1:, 3:],
             whole[:1, ..., ::2], whole.mT, whole.flatten()[1:769].view(2, 3, 8, 16)]  # fmt: skip
    for x in views:
        score, table = normal(*x.shape, dtype=dtype).mT.contiguous().mT, normal(1, 4, 3, seed=2)
        table, seeds = table.to(wide(dtype)), torch.arange(len(x))
        made = cuda.split(x, 3, False)
        assert torch.equal(made.flat, plain_split(x, 3, False))
        details = [detail.mT.contiguous().mT for detail in made.details]
        merged = cuda.merge(details, made.coarse, x.contiguous())
        assert torch.equal(merged, haar_merge_ref(made, x.shape[2:]).to(dtype))
        for other in (score, x):
            wanted = haar_step_ref(x, other, table, seeds, 1).to(dtype)
            assert torch.equal(cuda.step(x, other, table, seeds, 1), wanted)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_one_band_off_an_aligned_address(cuda, levels, dtype):
    x = normal(1, 2, 16, 32, dtype=dtype)
    for odd in range(levels + 1):
        bands = [*(made := cuda.split(x, levels, False)).details, made.coarse]
        bands[odd] = torch.cat([bands[odd].flatten()[:1], bands[odd].flatten()])[1:].view_as(
            bands[odd]
        )
        merged = cuda.merge(bands[:-1], bands[-1], x)
        assert torch.equal(merged, haar_merge_ref(made, x.shape[2:]).to(dtype))
        assert cuda.aligned == (dtype != torch.float64 and odd >= 2 and levels == 3)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("size", [(16, 24), (7, 11), (32, 13), (130, 40)])
def test_the_expansion_is_its_definition(cuda, size, last, dtype):
    layout = torch.channels_last if last else torch.contiguous_format
    coarse = normal(2, 2, *((side + 1) // 2 for side in size), dtype=dtype)
    coarse, table = coarse.contiguous(memory_format=layout), normal(1, 2, 2, seed=3)
    table, seeds = table.to(wide(dtype)), torch.tensor([4, 5])
    result = cuda.expand(coarse, table, seeds, 2, size, last)
    assert torch.equal(result, haar_expand_ref(coarse, table, seeds, 2, size).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    ("shape", "levels"),
    [((2, 1, 16, 24), 2), ((2, 1, 33, 45), 5), ((2, 3, 96, 80), 4), ((1, 1, 260, 256), 0)],
)
def test_the_loss_and_its_gradient_are_their_definitions(cuda, shape, levels, dtype):
    x, table = normal(*shape, dtype=dtype), normal(shape[0], levels + 1, 2, seed=3)
    table, seeds = table.to(wide(dtype)), torch.tensor([4, 5][: shape[0]])
    loss, wanted = cuda.loss(x, table, seeds, 2), haar_loss_ref(x, table, seeds, 2)
    # Terms are those of the definition, summed in float64 in another order, and rounded once.
    terms = haar_loss_ref(x, torch.stack([table[..., 0].abs(), table[..., 1]], 2), seeds, 2)
    bound = x[0].numel() * 2.0**-53 * terms + torch.finfo(loss.dtype).eps * wanted.abs()
    assert ((loss - wanted).abs() <= bound).all()

    upstream = normal(shape[0], seed=4, dtype=wide(dtype))
    gradient = cuda.gradient(x, table, seeds, 2, upstream)
    assert torch.equal(
        gradient, plain_loss_gradient(x, table, seeds, None, 2, upstream, levels, False)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [(8, 8), (256, 264), (512, 512)])
def test_a_sum_is_each_thread_in_order_then_a_tree(cuda, size, dtype):
    """Of fewer numbers than threads, of two for some threads, of four for each."""
    haar = cuda.haar(0, (3, 1, *size), dtype)
    losses = normal(cuda.library.haar_losses(ctypes.byref(haar)), dtype=torch.float64).view(3, -1)
    part = torch.zeros(3, 128, dtype=torch.float64)
    for some in losses.split(128, 1):
        part[:, : some.shape[1]] += some
    while part.shape[1] > 1:
        part = part[:, : part.shape[1] // 2] + part[:, part.shape[1] // 2 :]
    assert torch.equal(cuda.sums(haar, losses), part[:, 0].to(dtype))
    assert losses.shape[1] == {8: 4, 264: 132, 512: 512}[size[1]]


# == The stand-in itself ===========================================================================

FAULTS = {
    "no_fault": None,
    "lane_returns": "thread 37 misses an exchange of its warp",
    "lane_waits_elsewhere": "thread 37 misses an exchange of its warp",
    "other_exchange": "misses an exchange of its warp",
    "some_lanes": "exchanges with lanes that there are not",
    "thread_returns": "thread 37 misses a barrier of its block",
    "no_barrier": " 4 bytes that ",
    "exchange_is_no_barrier": "reads 4 bytes that block 0, thread ",
    "reads_nothing": "thread 127 reads 4 bytes that nobody wrote",
    "late_write": " 4 bytes that block 0, thread ",
    "no_blocks": "invalid configuration",
    "same_place": "writes 4 bytes that block 0, thread ",
    "other_block": "writes 4 bytes that block ",
    "reads_past": "reads 4 bytes that are not its own",
    "writes_past": "writes 4 bytes that are not its own",
    "writes_before": "block 0, thread 0 writes 4 bytes that are not its own",
    "writes_input": "writes 4 bytes that are not its own",
    "misaligned": "writes 16 bytes at an address that is no multiple of it",
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.items())
def test_what_a_gpu_leaves_undefined_is_an_error(library, fault, message):
    launches, run = Launches(library), library.run_fault
    run.restype = ctypes.c_char_p
    library.take_back()
    data = torch.zeros(384)
    launches.give(data[:256], writable=True)
    launches.give(data[256:])
    error = run(fault.encode(), ctypes.c_void_p(data.data_ptr()))
    if message is not None:
        assert message in error.decode()
        assert not data[256:].any()
    else:
        assert error is None
        assert torch.equal(data[:256], torch.arange(32.0).repeat(8))
