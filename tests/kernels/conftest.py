"""Without a GPU the interpreter stands in for it, with the numerics of its tensor cores."""

from tests.helpers import interpreter

if interpreter.INTERPRETED:
    interpreter.install()
