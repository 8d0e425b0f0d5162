"""Every test of a training runs in one thread."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _in_one_thread(one_thread):
    pass
