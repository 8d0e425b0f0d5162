"""Every test starts from the same seeds, and reads NaN where library code left memory unwritten."""

import os
import random

# Tensors of tests are small: threads only wait for each other, long where a machine is busy. Tests
# of threads ask for theirs (tests/helpers/threads.py). torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy
import pytest
import torch

from tests.helpers.threads import threads

if not torch.cuda.is_available():
    # Triton's interpreter stands in for a GPU; triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """On a GPU a few, since each keeps a CUDA context there; else xdist's own number."""
    return 4 if torch.cuda.is_available() else None


def pytest_runtest_logfinish():
    """A worker whose CUDA context an error has spoilt ends: another one runs the tests after it."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(70)


@pytest.fixture(autouse=True)
def _same_start():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
    # In this mode torch fills the memory of torch.empty with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def one_thread():
    """Small networks gain nothing from more threads, and bits depend on how many there are."""
    with threads(1):
        yield
