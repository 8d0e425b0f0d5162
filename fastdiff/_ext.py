"""The compiled extension, loaded once.

Without it fastdiff runs on Triton (CUDA) and on the PyTorch references (CPU). HAS_EXT: whether it
is there. reason: why not, in one sentence ("" when it is). HAS_CUDA: whether it holds CUDA kernels.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch  # noqa: F401  first: the extension's symbols live in torch's libraries

_C: ModuleType | None = None
reason = ""
try:
    _C = import_module("fastdiff._C")  # importing it registers the C++ operators
except ModuleNotFoundError:
    reason = "the C++ extension was not built (FASTDIFF_EXT=0, or a checkout never installed)"
except ImportError as error:
    reason = f"the C++ extension does not load: {error}"

HAS_EXT = _C is not None


def build_info() -> dict[str, str]:
    """How it was built: compiler, torch_target, cuda, cpu_target, digest of sources; {} without."""
    return dict(_C.build_info()) if _C is not None else {}


HAS_CUDA = build_info().get("cuda", "none") != "none"
