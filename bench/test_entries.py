"""The registry's cases under pytest-benchmark: `pytest bench --benchmark-only`.

Sizes are those of --quick. `python -m bench` measures beside baselines and a copy; this is for
those who keep histories with pytest-benchmark.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from bench.measure import sets_for
from bench.registry import entries

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ENTRIES = {entry.name: entry for entry in entries() if not entry.lacks()}
CASES = {
    f"{entry.name} {case.name}": (entry.name, case)
    for entry in ENTRIES.values()
    for case in entry.cases(DEVICE, True)
}


@pytest.fixture(scope="session")
def green() -> dict[str, bool]:
    """Whether all gates of an entry are green; each entry is asked once."""
    return {
        name: all(gate["ok"] for gate in entry.gates(DEVICE, True))
        for name, entry in ENTRIES.items()
    }


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_case(name, green, benchmark):
    entry, case = CASES[name]
    if not green[entry]:
        pytest.fail(f"a gate of {entry} is red: no time is taken", pytrace=False)
    sets = sets_for(case, DEVICE)
    call = case.ours([case.inputs(i) for i in range(sets)])
    numbers = itertools.cycle(range(sets))

    def run() -> None:
        call(next(numbers))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops)
    benchmark(run)
