"""Triton without a GPU: what a launch compiles, and where asked its C stub, but nothing runs.

`install` puts a driver in Triton's place for one that says it is an H100 (or another architecture).
`kernel[grid](...)` then goes through Triton's own launch path: the same specialisation, the same
cache keys and files as on such a machine. In place of the launch itself a function of yours is
called, if there is one. `python -m bench warm` fills a cache in this way, tests/helpers/ptx.py runs
what was compiled.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

MAX_SHARED = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}  # bytes of a program


class Launch(NamedTuple):
    """What a launch hands to the GPU."""

    name: str  # of the kernel
    hash: str  # of what was compiled
    ptx: Path  # the file in Triton's cache
    grid: tuple[int, int, int]
    threads: int  # of a program
    shared: int  # bytes of shared memory of a program
    arguments: list[tuple[str, Any]]  # types and values, no constants among them, tuples flat


OnLaunch = Callable[[Launch], None]


STUBS = "FASTDIFF_STUBS"  # in the environment: launches also build their C modules


def install(arch: int = 90, on_launch: OnLaunch | None = None) -> None:
    """Make Triton compile for `arch`, and hand its launches to `on_launch`.

    With FASTDIFF_STUBS=1 in the environment launches also build the C modules that they would build
    there, since a cache that is to be carried must hold them; this takes a C compiler. Call it
    before a module with kernels is imported: under Triton's interpreter they are not compiled.
    Raises RuntimeError where that is too late.
    """
    os.environ["TRITON_INTERPRET"] = "0"
    import triton

    if not isinstance(triton.language.cdiv, triton.JITFunction):
        raise RuntimeError("triton was imported under its interpreter: kernels are not compiled")
    stubs = os.environ.get(STUBS) == "1"
    triton.runtime.driver.set_active(_Driver(arch, on_launch, stubs))


class _Driver:
    """Of a Triton driver what its launch path uses."""

    def __init__(self, arch: int, on_launch: OnLaunch | None, stubs: bool) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)
        self.on_launch, self.stubs = on_launch, stubs
        self.utils = self
        if stubs:
            _build_utilities()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        import torch

        return torch.cuda

    def map_python_to_cpp_type(self, name: str) -> str:
        from triton.backends.nvidia.driver import ty_to_cpp

        return ty_to_cpp(name)

    @staticmethod
    def is_active() -> bool:
        return True

    # Triton asks its driver's `utils` for these.

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": MAX_SHARED[self.target.arch]}

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[str, str, int, int, int]:
        """Module, function, registers, spills, most threads of a program: nothing is loaded."""
        return name, name, 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What Triton calls at every launch of a compiled kernel."""
        from triton.runtime.cache import get_cache_manager

        if self.stubs:
            _build_stub(source, metadata)
        name, on_launch = metadata.name, self.on_launch
        group = get_cache_manager(metadata.hash).get_group(f"{source.name[:150]}.json") or {}
        ptx = Path(next((path for file, path in group.items() if file.endswith(".ptx")), ""))
        types = list(source.signature.values())

        def launch(x: int, y: int, z: int, *rest: Any) -> None:
            if on_launch is not None:
                arguments = rest[len(rest) - len(types) :]
                on_launch(
                    Launch(
                        name, metadata.hash, ptx, (x, y, z), 32 * metadata.num_warps,
                        metadata.shared, list(_flat(types, arguments)),
                    )
                )  # fmt: skip

        return launch


def _flat(types: Any, values: Any) -> Iterator[tuple[str, Any]]:
    """Pairs of a type and a value, as the kernel's parameters are ordered."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple | list):
            yield from _flat(kind, value)
        elif kind != "constexpr":
            yield kind, value


def implementations() -> dict[str, Callable[..., Any]]:
    """What the ops with Triton kernels run on a GPU, by op: it serves a stand-in's CPU tensors."""
    from fastdiff.ops._register import ON_TRITON

    return dict(ON_TRITON)


# == The C modules of a launch =====================================================================


def _build_utilities() -> None:
    """The module that loads binaries, and from Triton 3.7 on launches all signatures too."""
    from triton.backends.nvidia import driver

    with _built_only():
        driver.CudaUtils.__init__(_Unloaded())


def _build_stub(source: Any, metadata: Any) -> None:
    """The launch stub of a signature, which Triton before 3.7 compiles at the first launch."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        with _built_only():
            driver.CudaLauncher(source, metadata)


class _Unloaded:
    """Stands for a module that was built and not loaded."""

    def __getattr__(self, name: str) -> None:
        return None


@contextlib.contextmanager
def _built_only() -> Iterator[None]:
    """C modules are built into Triton's cache but not loaded: they need a GPU's libcuda."""
    from triton import knobs
    from triton.runtime import build

    with contextlib.ExitStack() as undo:
        load, path = build._load_module_from_path, knobs.nvidia.libcuda_path
        undo.callback(setattr, build, "_load_module_from_path", load)
        undo.callback(setattr, knobs.nvidia, "libcuda_path", path)
        build._load_module_from_path = lambda name, path: _Unloaded()
        knobs.nvidia.libcuda_path = path or str(_libcuda())
        yield


@cache
def _libcuda() -> Path:
    """A folder with an empty library named like the driver's, which the linker asks for."""
    folder = Path(tempfile.mkdtemp(prefix="fastdiff-libcuda-"))
    (folder / "empty.c").touch()
    subprocess.run(
        [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o",
         folder / "libcuda.so.1", folder / "empty.c"],
        check=True,
    )  # fmt: skip
    return folder
