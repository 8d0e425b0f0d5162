"""Compile every kernel for GPUs that are not here and read its machine code: `python -m bench.aot`.

Triton kernels (each `kernels/*.py` with `aot_variants()`) go through the specialisation that a
launch makes, csrc/cuda/*.cu through nvcc, both for sm_80, sm_90 and sm_100, or for --archs. A
kernel fails with a stack frame, with local memory accesses (LDL, STL: spilled registers; LOCAL:0
stands even then), or with fewer 128-bit accesses than its variant declares. No GPU is needed; exit
code 1 names what failed. Under another triton: PYTHONPATH=<its folder> python -m bench.aot. With
--json FILE what was read is kept: docs/kernels.md shows it.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import itertools
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import Any

from .files import ROOT, write_json
from .record import commit

ARCHS = (80, 90, 100)
NVCC_WHEELS = " ".join(
    f"'nvidia-{name}==13.0.*'"
    for name in ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")
)
HAAR_THREADS = 128  # of a block: kThreads of csrc/cuda/haar_lane.h

# Of a Triton kernel: name, kernel, arguments of a launch, 128-bit accesses to be there, and, where
# it is not for all, the least architecture.
Variant = tuple[Any, ...]


class NoCompiler(Exception):
    """A tool that the check needs is not on this machine."""


@dataclass(frozen=True)
class Report:
    """What one kernel became on one architecture."""

    name: str
    arch: int
    registers: int
    stack: int
    local_accesses: int  # LDL and STL
    wide_loads: int  # LDG.E.128 and wider
    wide_stores: int
    wide: int  # 128-bit accesses there must be
    shared: int = 0  # bytes of shared memory, with what a launch asks for
    instructions: int = 0  # of a thread's code, where nothing loops
    threads: int = 0  # of a program or block

    def faults(self) -> list[str]:
        faults = []
        if self.stack:
            faults.append(f"a stack of {self.stack} bytes")
        if self.local_accesses:
            faults.append(f"{self.local_accesses} local memory accesses")
        if self.wide_loads + self.wide_stores < self.wide:
            faults.append(f"{self.wide_loads + self.wide_stores} of {self.wide} 128-bit accesses")
        return faults


def kept(reports: Iterable[Report]) -> dict[str, Any]:
    """Reports for a file: of each kernel its numbers by architecture, in the order of `columns`."""
    kernels: dict[str, dict[str, list[int]]] = {}
    for report in reports:
        name, arch, *numbers = asdict(report).values()
        kernels.setdefault(name, {})[str(arch)] = numbers
    return {"columns": [field.name for field in fields(Report)[2:]], "kernels": kernels}


def reports(kept: dict[str, Any]) -> list[Report]:
    """The reports that such a file was made of."""
    return [
        Report(name, int(arch), **dict(zip(kept["columns"], numbers, strict=True)))
        for name, archs in kept["kernels"].items()
        for arch, numbers in archs.items()
    ]


@dataclass(frozen=True)
class Binary:
    """A compiled file, not yet read."""

    cubin: bytes
    arch: int
    name: str | None = None  # in place of the kernel's own
    wide: int = 0  # as a Report's
    dynamic_shared: int = 0  # bytes that a launch asks for
    threads: int = HAAR_THREADS


def triton_binaries(variants: Iterable[Variant], archs: Iterable[int] = ARCHS) -> Iterator[Binary]:
    """Compile Triton kernels through the specialisation that a launch makes."""
    import triton
    from triton.backends.compiler import GPUTarget

    for name, kernel, arguments, wide, *least in variants:
        for arch in (arch for arch in archs if arch >= sum(least)):
            target = GPUTarget("cuda", arch, 32)
            source, options = specialised(kernel, arguments, target)
            compiled = triton.compile(source, target=target, options=options)
            yield Binary(compiled.asm["cubin"], arch, name, wide, compiled.metadata.shared,
                         32 * compiled.metadata.num_warps)  # fmt: skip


def specialised(kernel: Any, arguments: dict[str, Any], target: Any) -> tuple[Any, dict[str, Any]]:
    """What triton.compile takes for a launch with these arguments: a source and its options.

    Launches whose `source.hash()` and options are equal share their machine code.
    """
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = bind(**arguments)
    options, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, options
    )
    return ASTSource(kernel, signature, constants, attributes), options.__dict__


def triton_reports(variants: Iterable[Variant], archs: Iterable[int] = ARCHS) -> Iterator[Report]:
    """What Triton kernels become."""
    return read(triton_binaries(variants, archs))


def nvcc_reports(
    files: Iterable[Path], archs: Iterable[int] = ARCHS, flags: Iterable[str] = ()
) -> Iterator[Report]:
    """Compile .cu files; every kernel in them is reported by its own name."""
    files = list(files)
    if not files:
        return
    nvcc = find_nvcc()

    def compiled(job: tuple[Path, int]) -> Binary:
        file, arch = job
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernels.cubin"
            _run(nvcc, "-cubin", "-std=c++17", "-O3", "--fmad=false", f"-arch=sm_{arch}", *flags,
                 "-I", str(ROOT / "csrc"), "-o", str(cubin), str(file))  # fmt: skip
            return Binary(cubin.read_bytes(), arch)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        binaries = list(pool.map(compiled, itertools.product(files, archs)))
    yield from read(binaries)


KINDS = {"f": "float32", "d": "float64"}


def cuda_kernel(function: str) -> tuple[str, int]:
    """A readable name of a CUDA C++ kernel, and the 128-bit accesses there must be in it.

    Aligned Haar kernels read or write an image by 16 bytes, at least one a row of a lane's tile.
    """
    if found := re.search(r"sum_kernelI(\w)E", function):
        return f"haar sum of losses {KINDS[found[1]]}", 0
    found = re.search(r"haar_kernelI(\w)Li(\d)ELb(\d)E\w*?HaarOpE(\d)", function)
    if not found:
        return function, 0
    operation = ("split", "merge", "step", "expand", "loss")[int(found[4])]
    kind, levels = KINDS[found[1]], int(found[2])
    aligned = found[3] == "1"
    name = f"haar {operation} K={levels} {kind}{' aligned' if aligned else ''}"
    return name, max(2, 1 << levels) if aligned else 0


def read(binaries: Iterable[Binary]) -> Iterator[Report]:
    """Report every kernel of the files, in order."""
    files = list(binaries)
    sections = [dict(_code(binary.cubin)) for binary in files]

    def disassembled(arch: int) -> dict[tuple[int, str], list[str]]:
        """The operations of a file's function; a disassembler takes half a second to begin."""
        keys = [(n, function) for n, binary in enumerate(files) if binary.arch == arch
                for function in sections[n]]  # fmt: skip
        parts = [sections[n][function] for n, function in keys]
        return dict(zip(keys, _operations(parts, arch), strict=True))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(disassembled, {binary.arch for binary in files})
        code = {key: operations for one in found for key, operations in one.items()}
    for n, binary in enumerate(files):
        for function, registers, stack, shared in _resources(binary):
            operations = code[n, function]
            readable, wide = cuda_kernel(function)
            if binary.name:
                readable, wide = binary.name, binary.wide
            yield Report(
                name=readable,
                arch=binary.arch,
                registers=registers,
                stack=stack,
                local_accesses=sum(o.startswith(("LDL", "STL")) for o in operations),
                wide_loads=sum(bool(re.match(r"LDG\.E\S*\.(128|256)", o)) for o in operations),
                wide_stores=sum(bool(re.match(r"STG\.E\S*\.(128|256)", o)) for o in operations),
                wide=wide,
                shared=shared + binary.dynamic_shared,
                instructions=sum(not o.startswith("NOP") for o in operations),
                threads=binary.threads,
            )


def _code(cubin: bytes) -> Iterator[tuple[str, bytes]]:
    """Functions of a cubin and their machine code: sections .text.FUNCTION of a 64-bit ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    count, names = struct.unpack_from("<HH", cubin, 60)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + 64 * n) for n in range(count)]
    for name, _, _, _, offset, size in headers:
        start = headers[names][4] + name
        section = cubin[start : cubin.index(0, start)].decode()
        if section.startswith(".text."):
            yield section.removeprefix(".text."), cubin[offset : offset + size]


INSTRUCTION = 16  # bytes, of every architecture from sm_70 on


def _operations(code: Sequence[bytes], arch: int) -> Iterator[list[str]]:
    """The operation of every instruction, by function."""
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(code))
        file.flush()
        kind = f"SM{arch}a" if arch >= 90 else f"SM{arch}"  # with what Triton's targets add
        said = _run(_tool("nvdisasm"), "--binary", kind, file.name)
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?(\S+)", said, re.M)
    if len(found) * INSTRUCTION != sum(map(len, code)):
        raise RuntimeError(
            f"nvdisasm read {len(found)} instructions of {sum(map(len, code))} bytes"
        )
    operations = iter(found)
    for part in code:
        yield list(itertools.islice(operations, len(part) // INSTRUCTION))


def _resources(binary: Binary) -> list[tuple[str, int, int, int]]:
    """Functions, and their registers, bytes of stack and of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.cubin)
        file.flush()
        usage = _run(_tool("cuobjdump"), "--dump-resource-usage", file.name)
    found = re.findall(r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    if not found:
        of = f"{binary.name or 'a .cu file'} on sm_{binary.arch}"
        raise RuntimeError(f"cuobjdump names no kernel of {of}:\n{usage}")
    return [(name, *map(int, numbers)) for name, *numbers in found]  # type: ignore[misc]


def find_nvcc() -> str:
    """nvcc of CUDA_HOME, of PATH, or of the PyPI wheels in this Python environment."""
    home, wheels = os.environ.get("CUDA_HOME"), Path(sysconfig.get_path("purelib"), "nvidia/cu13")
    places = [home and f"{home}/bin", os.environ.get("PATH"), f"{wheels}/bin"]
    nvcc = shutil.which("nvcc", path=os.pathsep.join(filter(None, places)))
    if nvcc:
        return nvcc
    raise NoCompiler(
        "nvcc is needed to check csrc/cuda/*.cu and is neither in CUDA_HOME nor on PATH nor among "
        f"this environment's packages; install a CUDA toolkit, or: pip install {NVCC_WHEELS}"
    )


def _tool(name: str) -> str:
    """A binary tool from triton's own package, else from PATH."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = shutil.which(name, path=str(bundled)) or shutil.which(name)
    if not tool:
        raise NoCompiler(f"{name} was found neither in {bundled} nor on PATH; reinstall triton")
    return tool


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


@cache
def kernel_variants() -> list[Variant]:
    """The declared variants of every module in kernels/."""
    found = []
    for file in sorted((ROOT / "kernels").glob("*.py")):
        module = importlib.import_module(f"fastdiff.kernels.{file.stem}")
        for name, *rest in getattr(module, "aot_variants", tuple)():
            found.append((f"{file.stem} {name}", *rest))
    return found


def variant_binaries(number: int, archs: Sequence[int]) -> list[Binary]:
    """What the declared variant of that number became, in whichever process this runs."""
    return list(triton_binaries([kernel_variants()[number]], archs))


def all_reports(archs: Sequence[int]) -> Iterator[Report]:
    """Every kernel of the project, in order: Triton's in a process a core, then nvcc's."""
    compiled = partial(variant_binaries, archs=archs)
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        binaries = list(pool.map(compiled, range(len(kernel_variants()))))
    yield from read(itertools.chain.from_iterable(binaries))
    yield from nvcc_reports(sorted((ROOT / "csrc" / "cuda").glob("*.cu")), archs)


def main(given: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.aot", description="Check machine code.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep what was read, if all pass")
    parser.add_argument("--archs", type=int, nargs="+", choices=ARCHS, default=ARCHS,
                        metavar="SM", help="default: %(default)s")  # fmt: skip
    options = parser.parse_args(given)
    if options.json and set(options.archs) != set(ARCHS):
        parser.error(f"--json keeps all of {ARCHS}; got --archs {options.archs}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("bench.aot compiles kernels: unset TRITON_INTERPRET", file=sys.stderr)
        return 1
    import triton

    print(f"triton {triton.__version__}, sm_{', sm_'.join(map(str, options.archs))}")
    print(
        f"{'kernel':56} {'sm':>4} {'regs':>5} {'stack':>6} {'shared':>6} {'local':>6} "
        f"{'ld128':>6} {'st128':>6}"
    )
    kernels, failed = [], []
    try:
        for r in all_reports(options.archs):
            faults = ", ".join(r.faults())
            print(
                f"{r.name:56} {r.arch:4} {r.registers:5} {r.stack:6} {r.shared:6} "
                f"{r.local_accesses:6} {r.wide_loads:6} {r.wide_stores:6} {faults}"
            )
            kernels.append(r)
            if faults:
                failed.append(f"{r.name} on sm_{r.arch}: {faults}")
    except NoCompiler as error:
        failed.append(str(error))
    if failed:
        print("\ncuda-check failed:\n  " + "\n  ".join(failed), file=sys.stderr)
        return 1
    if options.json:
        head = {
            "command": "python -m bench.aot",
            "triton": triton.__version__,
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
        }
        write_json(options.json, head | kept(kernels))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
