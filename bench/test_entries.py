"""The registry's cases under pytest-benchmark: `pytest bench --benchmark-only`.

Sizes are those of --quick. `python -m bench` measures beside baselines and a copy; this is for
those who keep histories with pytest-benchmark.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from bench.gates import gate_of
from bench.measure import sets_for
from bench.registry import entries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = {
    f"{entry.name} {case.name}": case
    for entry in entries()
    if not entry.lacks()
    for case in entry.cases(DEVICE, True)
}


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_case(name, benchmark):
    case = CASES[name]
    gate = gate_of(case)
    assert gate["ok"], gate
    sets = sets_for(case, DEVICE)
    call = case.ours([case.inputs(i) for i in range(sets)])
    numbers = itertools.cycle(range(sets))

    def run() -> None:
        call(next(numbers))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops)
    benchmark(run)
