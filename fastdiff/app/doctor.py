"""What is installed, what serves, and why: `fastdiff doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator

import torch

import fastdiff
from fastdiff import _ext
from fastdiff.app.machine import cpu_model


def examine() -> list[tuple[str, str]]:
    """(topic, finding) pairs in reading order. Asks the GPU driver; changes nothing."""
    return list(_findings())


def warnings() -> list[str]:
    """What should be put right, one sentence each; empty if all is well."""
    found = []
    if _installed("fastdiff"):
        found.append(
            f"another package named fastdiff ({_installed('fastdiff')}) is installed and fights "
            "over the import name: pip uninstall fastdiff, then install this one again"
        )
    if not _ext.HAS_EXT:
        found.append(f"{_ext.reason}; CPU tensors run on the PyTorch reference, many times slower")
    if torch.cuda.is_available() and not _triton():
        found.append("a GPU is here but Triton is not: CUDA tensors run on the PyTorch reference")
    if torch.cuda.is_available() and not _ext.HAS_CUDA:
        found.append(
            "a GPU is here but the extension holds no CUDA kernels: the Haar ops run on PyTorch; "
            "install a CUDA toolkit and build again with FASTDIFF_CUDA=1"
        )
    return found


def machine() -> str:
    """The processor, or the GPU where there is one, as a short name."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{cpu_model()}, {torch.get_num_threads()} threads"


def _findings() -> Iterator[tuple[str, str]]:
    yield "fastdiff", f"{fastdiff.__version__} from {fastdiff.__path__[0]}"
    yield "Python, torch", f"{platform.python_version()}, {torch.__version__}"
    yield "Triton", _triton() or "not installed"
    yield "machine", machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    yield "GPU", gpu
    if _ext.HAS_EXT:
        info = _ext.build_info()
        yield "extension", ", ".join(f"{k} {v}" for k, v in info.items())
        yield "CPU tensors", f"C++ ({info.get('cpu_target', 'baseline')})"
    else:
        yield "extension", _ext.reason
        yield "CPU tensors", "PyTorch reference"
    if gpu == "none":
        yield "CUDA tensors", "no GPU here" + (", Triton would serve" if _triton() else "")
    else:
        yield "CUDA tensors", "Triton" if _triton() else "PyTorch reference (Triton is missing)"
        if _triton():
            from fastdiff.kernels._tuning import live

            yield "launches", live("multistep_step", torch.device("cuda"))
    yield "solvers", ", ".join(fastdiff.solver_names())


def _triton() -> str | None:
    return _installed("triton") if importlib.util.find_spec("triton") else None


def _installed(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
