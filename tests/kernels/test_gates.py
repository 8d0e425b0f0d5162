"""The gates of the bench's entries whose ops are Triton's kernels, where these are compiled."""

import pytest
import torch

from bench.ptx import GATED
from bench.registry import entries
from tests.helpers.interpreter import DEVICE, INTERPRETED

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="bench/test_entries.py holds them on the CPU"),
]


@pytest.mark.parametrize("name", GATED)
def test_every_gate_holds(name):
    (entry,) = (entry for entry in entries() if entry.name == name)
    with torch.no_grad():
        gates = list(entry.gates(DEVICE, True))  # the others are more sizes and dtypes
    assert gates and not [gate for gate in gates if not gate["ok"]]
