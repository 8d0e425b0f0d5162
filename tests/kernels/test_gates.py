"""The gates of the bench's entries whose ops are Triton's kernels, where these are compiled."""

import pytest
import torch
import triton

from bench.entries import (
    initial_noise,
    multistep_step,
    spectral_filter,
    spectral_update,
    weighted_sums,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        triton.knobs.runtime.interpret, reason="bench/test_entries.py holds them on the CPU"
    ),
]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENTRIES = (initial_noise, multistep_step, spectral_filter, spectral_update, weighted_sums)


@pytest.mark.parametrize("entry", [module.ENTRY for module in ENTRIES], ids=lambda e: e.name)
def test_every_gate_holds(entry):
    with torch.no_grad():
        gates = list(entry.gates(DEVICE, True))  # the others are larger, through the same code
    assert gates and not [gate for gate in gates if not gate["ok"]]
