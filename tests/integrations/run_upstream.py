"""diffusers' own scheduler tests with our classes in place of the stock ones.

    python tests/integrations/run_upstream.py --src CHECKOUT [pytest arguments]

CHECKOUT: a clone of huggingface/diffusers at the tag of the installed version (wheels do not carry
the tests). Its test modules import the classes by name from `diffusers`, so that is where they are
replaced, before collection. Exit code: pytest's.
"""

import argparse
import os
import sys
from pathlib import Path

import diffusers
import pytest

from fastdiff.integrations import diffusers_schedulers as fused

FILES = {  # of tests/schedulers, for the classes that have a twin
    "PNDMScheduler": "pndm",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DPMSolverMultistepScheduler": "dpm_multi",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "deis",
    "EulerDiscreteScheduler": "euler",
    "HeunDiscreteScheduler": "heun",
    "ScoreSdeVeScheduler": "score_sde_ve",
}


class Twins:
    """A pytest plugin: replaces the classes, and says at the end how many steps were fused."""

    def __init__(self) -> None:
        self.fusions = []

    def pytest_configure(self) -> None:
        for name in FILES:
            setattr(diffusers, name, getattr(fused, name))
        real, made = fused._fusion, self.fusions

        def remembered(scheduler):
            new = "_fusion" not in vars(scheduler)
            fusion = real(scheduler)
            if new:
                made.append(fusion)
            return fusion

        fused._fusion = remembered

    def pytest_terminal_summary(self, terminalreporter) -> None:
        counts = {}
        for fusion in self.fusions:
            for why, count in fusion.counts.items():
                counts[why] = counts.get(why, 0) + count
        terminalreporter.write_line(f"steps: {counts}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--src", type=Path, required=True, help="a clone of huggingface/diffusers")
    options, rest = parser.parse_known_args()
    source = options.src.resolve()
    tests = source / "tests" / "schedulers"
    files = [tests / f"test_scheduler_{file}.py" for file in FILES.values()]
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        parser.error(f"--src must be a clone of huggingface/diffusers; it has no {missing[0]}")
    os.chdir(source)  # the tests import relative to it
    sys.path.insert(0, str(source))
    here = [str(file.relative_to(source)) for file in files]
    return pytest.main(["-q", "-p", "no:cacheprovider", *here, *rest], plugins=[Twins()])


if __name__ == "__main__":
    sys.exit(main())
