"""What the tests of ops share."""

import os
import subprocess
import sys

import pytest

from fastdiff import _ext


@pytest.fixture
def same_everywhere(capsys):
    """Checks that launches make the same bytes here, without the extension, and on lesser targets.

    They are a program with a line `{setup}` after its imports that prints the backend and a digest
    of what it made; it runs here, and in processes of its own.
    """

    def elsewhere(launches, setup="", **environment):
        command = [sys.executable, "-c", launches.format(setup=setup)]
        env = {**os.environ, **environment}
        run = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return run.stdout.split()

    def check(launches):
        exec(launches.format(setup=""), {})
        _, here = capsys.readouterr().out.split()
        assert elsewhere(launches, "sys.modules['fastdiff._C'] = None") == ["reference", here]
        if _ext.HAS_EXT:
            assert elsewhere(launches, FASTDIFF_CPU_TARGET="baseline") == ["baseline", here]
            assert elsewhere(launches, FASTDIFF_CPU_TARGET="avx2")[1] == here

    return check
