"""Without a GPU the interpreter stands in for it, with the numerics of its tensor cores."""

import triton

from tests.helpers import interpreter

if triton.knobs.runtime.interpret:
    interpreter.install()
