"""The machine-code check goes red on what it is there to find."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import aot

ROOT = Path(__file__).resolve().parents[2]

SPILLING_CU = """
__global__ void spills(float *x, int n) {
    float held[256];
    for (int i = 0; i < 256; ++i) held[i] = x[i * n];
    for (int i = 0; i < 256; ++i) x[i] = held[(i * n) & 255];  // run-time index: local memory
}
"""

CLEAN_CU = "__global__ void clean(float *x) { x[threadIdx.x] *= 2.0f; }"

# Run in a process of its own, since this one may hold Triton's interpreter.
TRITON_CASES = """
import torch, triton, triton.language as tl
from bench.aot import triton_reports

@triton.jit
def kernel(x, n, HELD: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    values = ()
    for i in tl.static_range(HELD):
        values = values + (tl.load(x + i * n + offsets),)
    for i in tl.static_range(HELD):
        tl.store(x + (HELD - 1 - i) * n + offsets, values[i] * 2)

def variant(name, held, n):
    x = torch.empty(8, device="meta")
    return name, kernel, dict(x=x, n=n, HELD=held, BLOCK=512, num_warps=4), 2 * held

variants = [variant("clean", 2, 1024), variant("spilling", 128, 1024), variant("narrow", 2, 1023)]
for report in triton_reports(variants, archs=[90]):
    print(report.name, *report.faults(), sep="; ")
"""

SHAPES = """
import torch
from triton.backends.compiler import GPUTarget
from bench.aot import specialised
from fastdiff.kernels import spectral_filter, spectral_update

def empty(*shape, of=torch.float32):
    return torch.empty(shape, dtype=of, device="meta")

kernels = {
    "filter": spectral_filter._spectral_filter_kernel,
    "update": spectral_update._whole_kernel,
}
bases = [empty(2, 16, 32), empty(2, 16, 32)]
codes = {name: set() for name in kernels}
for batch, rows, channels, height in (1, 1, 3, 32), (2, 2, 4, 30), (16, 1, 3, 17), (16, 16, 4, 32):
    x, row = empty(batch, channels, height, 32), empty(rows, 2)
    tables, seeds = empty(channels, 5, 16, 16), empty(batch, of=torch.int64)
    squares = empty(batch, channels, 2)
    plans = {
        "filter": spectral_filter.plan(x, x, tables, *bases, "exact"),
        "update": spectral_update.whole_plan(
            x, x, row, x, tables, tables, *bases, seeds, None, batch, "exact", "batch", squares),
    }
    for name, (_, arguments) in plans.items():
        source, options = specialised(kernels[name], arguments, GPUTarget("cuda", 90, 32))
        codes[name].add((source.hash(), str(options)))
for name, found in codes.items():
    print(name, len(found))
"""

KEYS = """
import importlib
from triton import JITFunction

for name in {names}:
    module = importlib.import_module("fastdiff.kernels." + name)
    for function, value in vars(module).items():
        if function.endswith("_kernel") and isinstance(value, JITFunction):
            print(function, value.cache_key)
"""


def printed(script, text):
    """What a process without Triton's interpreter prints."""
    script.write_text(text)  # triton.jit reads its source from a file
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def triton_faults(tmp_path_factory):
    """What the check says of three Triton kernels, by name."""
    lines = printed(tmp_path_factory.mktemp("aot") / "cases.py", TRITON_CASES)
    return {name: faults for name, *faults in (line.split("; ") for line in lines)}


def test_a_clean_triton_kernel_passes(triton_faults):
    assert triton_faults["clean"] == []


def test_a_spilling_triton_kernel_fails(triton_faults):
    stack, local = triton_faults["spilling"]
    assert "stack" in stack and "local memory" in local


def test_narrow_accesses_fail_where_wide_ones_are_declared(triton_faults):
    """An odd stride leaves 128-bit accesses to the first row alone."""
    assert triton_faults["narrow"] == ["2 of 4 128-bit accesses"]


def test_a_kernel_is_found_in_the_cache_whichever_was_launched_before(tmp_path):
    names = ["multistep_step", "half_spectrum", "spectral_filter", "spectral_update"]
    found = [
        sorted(printed(tmp_path / "keys.py", KEYS.format(names=order)))
        for order in (names, names[::-1])
    ]
    assert len(found[0]) == 5 and found[0] == found[1]


def test_other_batches_channels_and_heights_compile_no_whole_image_again(tmp_path):
    """Heights up to the same padded one, and for updates channels up to the same power of two."""
    found = printed(tmp_path / "shapes.py", SHAPES)
    assert found == ["filter 1", "update 1"]


def has_nvcc():
    try:
        return bool(aot.find_nvcc())
    except aot.NoCompiler:
        return False


needs_nvcc = pytest.mark.skipif(not has_nvcc(), reason="no nvcc on this machine")


@needs_nvcc
def test_cuda_files(tmp_path):
    for name, text in (("clean.cu", CLEAN_CU), ("spills.cu", SPILLING_CU)):
        (tmp_path / name).write_text(text)
    files = [tmp_path / "clean.cu", tmp_path / "spills.cu"]
    reports = list(aot.nvcc_reports(files, archs=[80, 100]))
    assert [report.arch for report in reports] == [80, 100, 80, 100]
    for clean, spilled in zip(reports[:2], reports[2:], strict=True):
        assert "clean" in clean.name and not clean.faults()
        assert "spills" in spilled.name and any("stack" in fault for fault in spilled.faults())
        assert any("local memory" in fault for fault in spilled.faults())
        assert 0 < clean.instructions < spilled.instructions


@needs_nvcc
def test_a_cuda_file_that_does_not_compile(tmp_path):
    (tmp_path / "broken.cu").write_text("__global__ void broken( {")
    with pytest.raises(RuntimeError, match=r"broken\.cu"):
        list(aot.nvcc_reports([tmp_path / "broken.cu"], archs=[90]))


def test_without_nvcc_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(aot.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(aot.NoCompiler, match="pip install 'nvidia-cuda-nvcc"):
        list(aot.nvcc_reports([tmp_path / "any.cu"]))
    assert list(aot.nvcc_reports([])) == []


def test_what_is_kept_is_of_every_architecture(tmp_path, capsys):
    with pytest.raises(SystemExit):
        aot.main(["--json", str(tmp_path / "aot.json"), "--archs", "80", "90"])
    assert "--json keeps all of" in capsys.readouterr().err


def test_faults_of_a_report():
    def report(**changes):
        values = dict(registers=32, stack=0, local_accesses=0, wide_loads=2, wide_stores=1, wide=3)
        return aot.Report("kernel", 90, **{**values, **changes})

    assert report().faults() == []
    assert report(stack=8).faults() == ["a stack of 8 bytes"]
    assert report(local_accesses=2).faults() == ["2 local memory accesses"]
    assert report(wide_loads=0).faults() == ["1 of 3 128-bit accesses"]


def test_names_of_cuda_kernels():
    mangled = (
        "_ZN8fastdiff4cuda32_GLOBAL__N__1_2311haar_kernelIfLi3ELb1ELNS_6HaarOpE2EEEvNS_4HaarEPd"
    )
    assert aot.cuda_kernel(mangled) == ("haar step K=3 float32 aligned", 8)
    assert aot.cuda_kernel(mangled.replace("IfLi3ELb1E", "IdLi0ELb0E")) == (
        "haar step K=0 float64",
        0,
    )
    assert aot.cuda_kernel("_Z5otherv") == ("_Z5otherv", 0)
