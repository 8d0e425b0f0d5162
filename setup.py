"""Builds the optional C++ (and, where there is nvcc, CUDA) extension. Environment variables:

FASTDIFF_EXT=0          pure Python: Triton on CUDA, PyTorch elsewhere
FASTDIFF_CUDA=auto|0|1  auto: CUDA sources if nvcc and a CUDA build of torch are found; 1: or fail
TORCH_CUDA_ARCH_LIST    compute capabilities, e.g. "8.0;9.0+PTX"
MAX_JOBS                parallel compilations (default: by cores and memory)
"""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import setuptools
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"fastdiff needs setuptools >= 77 to build, found {setuptools.__version__}")

NO_TORCH = (
    "fastdiff's extension is compiled against the torch you already have: install torch first, "
    "then run `pip install --no-build-isolation .` (or set FASTDIFF_EXT=0 for pure Python)."
)
TORCH_TARGET = "2.11"  # the stable ABI's version: torch 2.11 and later load the extension

# Bit equality with the reference needs every float operation rounded by itself: no contraction, no
# fast-math. errno and trapping only keep loops with a root or a comparison from vectorising.
CXX_FLAGS = (
    "-std=c++17 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden -g0"
)
NVCC_FLAGS = "-std=c++17 -O3 --fmad=false"


class MissingTorch(build_ext):
    """Stands for the compilation where torch is absent, so that sdist and metadata still work."""

    def run(self):
        sys.exit(NO_TORCH)


def find_toolkit():
    """Set CUDA_HOME to where the nvcc on PATH says that it lies: it may be a script or a link."""
    nvcc = shutil.which("nvcc")
    if nvcc and not (os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")):
        command = [nvcc, "--dryrun", "-x", "cu", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True).stderr
        if found := re.search(r"^#\$ TOP=(.+)$", said, re.M):
            os.environ["CUDA_HOME"] = os.path.realpath(found[1])


def cuda_sources(torch, cpp_extension):
    """The .cu files to compile: none without nvcc or with a CPU torch. Asks for no GPU."""
    wish = os.environ.get("FASTDIFF_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        sys.exit(f"FASTDIFF_CUDA must be auto, 0 or 1, got {wish!r}")
    nvcc = cpp_extension.CUDA_HOME and (Path(cpp_extension.CUDA_HOME) / "bin" / "nvcc").exists()
    if wish == "1" and not nvcc:
        sys.exit(
            "FASTDIFF_CUDA=1 needs nvcc: install the CUDA toolkit of your torch "
            f"({torch.version.cuda or 'a CUDA build'}) and set CUDA_HOME to it "
            "(or leave FASTDIFF_CUDA at auto: the Triton kernels need no nvcc)."
        )
    if wish == "1" and not torch.version.cuda:
        sys.exit("FASTDIFF_CUDA=1 needs a CUDA build of torch, and this one is for the CPU.")
    if wish == "0" or not nvcc or not torch.version.cuda:
        return []
    if wish == "auto" and (why := other_toolkit(torch, nvcc_of=cpp_extension.CUDA_HOME)):
        print(why, flush=True)
        return []
    return sorted(map(str, Path("csrc/cuda").glob("*.cu")))


def other_toolkit(torch, nvcc_of):
    """What is wrong with compiling for this torch by the nvcc of that folder; "" if nothing is."""
    command = [Path(nvcc_of) / "bin" / "nvcc", "--version"]
    said = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"release (\d+)\.", said.stdout)
    wanted = torch.version.cuda.partition(".")[0]
    if found and found[1] == wanted:
        return ""
    return (
        f"fastdiff: no CUDA kernels: nvcc in {nvcc_of} is of CUDA {found[1] if found else '?'}, "
        f"torch of CUDA {torch.version.cuda} (FASTDIFF_CUDA=1 makes this an error)"
    )


def write_digest():
    """A header with the sources' digest: in a file of its own, it recompiles python.cpp alone."""
    path = Path("build") / "fastdiff_sources.h"
    digest = runpy.run_path("csrc/digest.py")["digest"](Path())
    text = f'#define FASTDIFF_SOURCES "{digest}"\n'
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def set_jobs():
    """One compilation per core, with 2 GB of memory each."""
    known = hasattr(os, "sysconf")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 4 << 30
    return os.environ.setdefault("MAX_JOBS", str(max(1, min(os.cpu_count() or 1, memory >> 31))))


def extension():
    """Modules and commands for setup()."""
    if os.environ.get("FASTDIFF_EXT", "1") == "0":
        return [], {}
    find_toolkit()
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        return [setuptools.Extension("fastdiff._C", [])], {"build_ext": MissingTorch}

    cuda = cuda_sources(torch, cpp_extension)
    if cuda:
        version = tuple(map(int, torch.version.cuda.split(".")[:2]))
        oldest, newest = "" if version >= (13, 0) else "7.0;", ";10.0" if version >= (12, 8) else ""
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"{oldest}7.5;8.0;9.0{newest}+PTX")
    major, minor = map(int, TORCH_TARGET.split("."))
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    module = kind(
        "fastdiff._C",
        sorted(map(str, [*Path("csrc").glob("*.cpp"), *Path("csrc/cpu").glob("*.cpp")])) + cuda,
        depends=sorted(map(str, Path("csrc").rglob("*.h"))),
        include_dirs=[str(Path("build").resolve())],
        define_macros=[
            ("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000"),
            ("FASTDIFF_TORCH_TARGET", f'"{TORCH_TARGET}"'),
            ("FASTDIFF_CUDA_VERSION", f'"{torch.version.cuda if cuda else "none"}"'),
            *([("USE_CUDA", None)] if cuda else []),
        ],
        extra_compile_args={
            "cxx": CXX_FLAGS.split(),
            "nvcc": [*NVCC_FLAGS.split(), f"--threads={set_jobs()}"],  # an architecture a thread
        },
    )
    targets = "baseline, AVX2, AVX-512" if platform.machine() == "x86_64" else "baseline"
    summary = (
        f"fastdiff extension: {platform.machine()} ({targets}), {set_jobs()} jobs\n"
        f"  torch {torch.__version__}, ABI target {TORCH_TARGET}\n"
        f"  CUDA C++: {os.environ['TORCH_CUDA_ARCH_LIST'] if cuda else 'none'}"
    )

    class Build(cpp_extension.BuildExtension):
        def run(self):
            print(summary, flush=True)
            write_digest()
            # An editable build would compile in a temporary folder, everything every time.
            self.build_temp = str(Path("build") / f"objects-{sys.implementation.cache_tag}")
            super().run()

    return [module], {"build_ext": Build}


ext_modules, cmdclass = extension()
setuptools.setup(
    packages=[*setuptools.find_packages(include=["fastdiff", "fastdiff.*"]), "fastdiff.kernels"],
    package_dir={"fastdiff.kernels": "kernels"},
    package_data={
        "fastdiff": ["py.typed", "assets/**/*.safetensors", "assets/**/*.json", "assets/**/*.npz"],
        "fastdiff.kernels": ["configs/**/*.json"],
    },
    include_package_data=False,
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
