"""What tests say of a call."""

from __future__ import annotations

import pytest


def refused(message: str, error: type[Exception] = ValueError) -> pytest.RaisesExc:
    """Inside, an error with that message is raised."""
    return pytest.raises(error, match=message)
