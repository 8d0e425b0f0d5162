"""The GPU's Python without a GPU: its tests on a device that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SOME = (
    "eager_to_the_bit and (ipndm and not ipndm_v or predictor_corrector) or copies or waits "
    "or callers or others or text_to_image and UniPC"
)
ALL = "not replaced and not compiled"  # what needs parameters made anew, or a compiler


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: they run on it")
@pytest.mark.parametrize(
    "chosen, number",
    [(SOME, 8), pytest.param(ALL, 74, marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_the_tests_for_a_gpu_hold_on_a_stand_in(chosen, number):
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "tests.helpers.cuda_stand_in", "-p",
         "no:cacheprovider", "-m", "gpu", "-k", chosen, "tests/capture/test_gpu.py",
         "tests/integrations/test_pipelines_gpu.py"],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert f"{number} passed" in done.stdout, done.stdout[-300:]
