"""`python -m bench warm`: compile now, for an H100 or H200, what a visit to one will launch.

No GPU is needed (bench/compile_only.py). The tests marked `gpu` and the benchmarks' cases are
walked in a process a core; Triton's cache under --cache then holds their kernels and the C
modules that launch them. --to packs what a visit reads of it. --check proves that what was packed
serves: unpacked elsewhere, nothing may be compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Container
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .compile_only import STUBS
from .files import ROOT
from .ptx import PLUGIN, TESTS
from .visit.brought import CACHE, triton_environment, unpack
from .visit.plan import ENTRIES

MOST = 1 << 24  # elements; larger cases launch the same variants, so they are not walked
KEPT = (".cubin", ".json", ".so", ".ptx")  # what a launch reads of the cache; PTX for --check
COUNTS = "FASTDIFF_WARM_COUNTS"  # where a process leaves which kernels it compiled or found
# The files of tests that capture, and in how many parts each is walked.
ON_STAND_IN = {"tests/capture/test_gpu.py": 8, "tests/integrations/test_pipelines_gpu.py": 1}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench warm", description=__doc__)
    parser.add_argument("--procs", type=int, default=os.cpu_count(), metavar="N")
    parser.add_argument("--cache", type=Path, metavar="DIR", help=f"default: {CACHE}")
    parser.add_argument("--to", type=Path, metavar="FILE", help="pack the cache: .tar.xz")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="exit 1 where that packed cache does not serve"
    )
    return parser


def main(given: list[str]) -> int:
    parser = arguments()
    options = parser.parse_args(given)
    if options.procs < 1:
        parser.error(f"--procs must be 1 or more, got {options.procs}")
    if options.check and not options.check.is_file():
        parser.error(f"--check must be a file that --to has packed, got {options.check}")
    if options.check and (options.cache or options.to):
        parser.error("--check unpacks a cache of its own: it goes without --cache and --to")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        cache = (options.cache or CACHE).resolve()
        if options.check:
            cache = Path(folder) / "cache"
            unpack(options.check, cache)
        env = {
            **os.environ,
            **triton_environment(cache),
            "PYTHONPATH": str(ROOT),
            COUNTS: folder,
            STUBS: "1",
            "TRITON_INTERPRET": "0",
            "OMP_NUM_THREADS": "1",  # a process a core: threads beside them only wait
            "CUDA_VISIBLE_DEVICES": "",  # so that no GPU runs them instead
        }
        with ThreadPoolExecutor(options.procs) as pool:
            done = list(pool.map(lambda job: _ran(job, env), jobs()))
        counts = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    broken = False
    for job, (code, said) in zip(jobs(), done, strict=True):
        # On the stand-in some tests fail by design (1); their kernels were launched all the same.
        if code not in ((0, 1) if "--walk" in job else (0,)):
            print(f"{' '.join(job[3:])} ended with {code}:\n{said[-2000:]}")
            broken = True
    compiled, cached = (sum(count[key] for count in counts) for key in ("compiled", "cached"))
    if options.to:
        used = {name for count in counts for name in count["folders"]}
        print(f"packed {pack(cache, options.to, used)} files: {options.to}")
    print(f"{compiled} kernels compiled, {cached} found, in {time.monotonic() - begun:.0f} s")
    return int(broken or (options.check is not None and compiled > 0))


def jobs() -> list[list[str]]:
    """The longest first."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
    on_ptx = [[*pytest, "-p", PLUGIN, "-p", "bench.warm", test] for test in TESTS]
    on_stand_in = [[*pytest, "-p", "bench.warm", "--walk", f"{part}/{of}", file]
                   for file, of in ON_STAND_IN.items() for part in range(of)]  # fmt: skip
    return [*on_stand_in, *on_ptx, *([sys.executable, "-m", "bench.warm", e] for e in ENTRIES)]


def _ran(job: list[str], env: dict[str, str]) -> tuple[int, str]:
    done = subprocess.run(job, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def pack(cache: Path, to: Path, used: Container[str]) -> int:
    """Pack the files of KEPT, of kernels in `used` folders alone; how many files those are.

    The other kernels are of sources that have changed since.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    files = [path for path in sorted(cache.rglob("*")) if path.suffix in KEPT
             and (path.suffix == ".so" or path.parent.name in used)]  # fmt: skip
    with tarfile.open(to, "w:xz") as archive:
        for path in files:
            archive.add(path, path.relative_to(cache))
    return len(files)


# == In a process of its own =======================================================================


def count() -> None:
    """Leave how many kernels this process compiles, and finds, and in which folders they are."""
    import atexit

    import triton

    found: dict[str, Any] = {"compiled": 0, "cached": 0, "folders": []}

    def listen(*, cache_hit: bool, metadata_group: dict[str, str], **_: Any) -> None:
        found["cached" if cache_hit else "compiled"] += 1
        found["folders"].append(Path(next(iter(metadata_group.values()))).parent.name)

    def leave() -> None:
        path = Path(os.environ[COUNTS]) / f"{os.getpid()}.json"
        path.write_text(json.dumps(found))

    triton.knobs.compilation.listener = listen
    atexit.register(leave)


def walk() -> None:
    """A device that is not there: ops compile their launches for it, and run on the CPU."""
    import torch

    from tests.helpers import cuda_stand_in

    from . import compile_only

    compile_only.install(90)
    is_cuda, plain_generator = torch.Tensor.is_cuda.__get__, torch.Generator  # type: ignore

    class Device(cuda_stand_in.Pretence):
        """Its tensors also say so where an op chooses its kernel."""

        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func == is_cuda:
                return cuda_stand_in._is_there(args[0]) or func(*args)
            return super().__torch_function__(func, types, args, kwargs)

    class Generator:
        def __new__(cls, device: Any = "cpu") -> Any:
            return plain_generator()

    cuda_stand_in.Pretence = Device  # type: ignore[misc]
    cuda_stand_in.pytest_configure(None)
    torch.Generator = Generator  # type: ignore[misc, assignment]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    torch.cuda.get_device_name = lambda *_: "NVIDIA H100 80GB HBM3"
    library = torch.library.Library("fastdiff", "IMPL")
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    for name, launch in compile_only.implementations().items():
        try:
            plain = torch.library.get_kernel(f"fastdiff::{name}", "CPU")
        except RuntimeError:  # it is for a GPU alone
            library.impl(name, launch, "CPU")
            continue

        def both(*args: Any, launch: Any = launch, plain: Any = plain) -> Any:
            launch(*args)
            return plain.call_boxed(keys, *args)

        library.impl(name, both, "CPU", allow_override=True)
    walk.library = library  # type: ignore[attr-defined]


def cases(name: str) -> None:
    """One call of ours of every case of an entry that is not too large."""
    import math

    import torch

    walk()
    from .registry import named

    entry = named(name)
    if entry.lacks() or name in ("captured_loop", "pipeline", "scheduler_step"):
        return  # their launches are those of the tests
    for case in entry.cases(torch.device("cuda", 0), False):
        if math.prod(case.shape) <= MOST:
            with torch.inference_mode():
                case.ours([case.inputs(0)])(0)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--walk", metavar="PART/OF", help="on a stand-in for a GPU, a part of it")


def pytest_configure(config: Any) -> None:
    count()
    if config.getoption("--walk"):
        walk()


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if config.getoption("--walk"):
        part, of = map(int, config.getoption("--walk").split("/"))
        items[:] = items[part::of]


if __name__ == "__main__":
    count()
    cases(sys.argv[1])
