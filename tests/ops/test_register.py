"""What torch's dispatcher holds of the ops that `register` made."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch

from fastdiff import _ext
from fastdiff.ops._register import HAS_TRITON, ON_TRITON, needs_gradient

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = "".join(source.read_text() for source in sorted(CSRC.glob("*.cpp")))
IN_CPP = sorted(set(re.findall(r'library\.impl\("(\w+)"', SOURCES)))
IN_PYTHON = ["spectral_filter", "spectral_filter_whole", "spectral_update"]


def has(name):
    return partial(torch._C._dispatch_has_kernel_for_dispatch_key, f"fastdiff::{name}")


@pytest.mark.parametrize("name", [*IN_CPP, *IN_PYTHON])
def test_the_reference_serves_where_no_kernel_does(name):
    """A kernel of a device comes before it, so it takes none's place and needs no condition."""
    assert has(name)("CompositeExplicitAutograd") and has(name)("Meta")
    assert has(name)("CPU") == (_ext.HAS_EXT and name in IN_CPP)
    haar = name.startswith("haar")
    assert has(name)("CUDA") == (_ext.HAS_CUDA if haar else HAS_TRITON and name in ON_TRITON)


def test_what_triton_runs():
    by_transforms = {"spectral_move", "spectral_product"}
    whole = {"spectral_filter_whole", "spectral_update_whole"}
    assert {"multistep_step", "weighted_sums"} | by_transforms | whole <= set(ON_TRITON)


def test_a_gradient_is_needed_where_it_may_be_asked_for():
    x, leaf = torch.ones(1), torch.ones(1, requires_grad=True)
    assert needs_gradient(leaf) and not needs_gradient(x)
    with torch.no_grad():
        assert not needs_gradient(leaf)
